"""Linear + softmax cross-entropy from hidden states, without the logits of all positions.

Why it is an op: [tokens, vocabulary] float32 logits are the largest array of a language model's
step (9.3 GiB at 16k tokens and a 152k vocabulary). Only a slice of positions is held at a time.
The cotangent of a summed loss is one scalar, so both gradients are made in the forward pass and
merely scaled in the backward pass: three matmuls altogether, as many as the plain form, where
kernels that keep no slice of logits make them twice and pay four or five.
Floor: 2 N D V FLOPs without gradients, 6 N D V with both, and one read of hidden and head.

The chips' own kernels stand behind XLA because nobody has timed them on a chip yet. By bytes they
move 10 a logit where XLA moves 16 (TPU) or 22 (GPU), and need a tenth of the room without
gradients; but their matmul must keep up with XLA's, and on v6e, by the compiler's schedule, its
epilogue takes a quarter of the time. A tuned table changes the order.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dims import Dims
from pallas_kernels.dispatch import op

METRICS = ("nll", "z_squared", "correct")

DIMS = Dims(
    operands=(("batch", None, None), (None, "vocab"), ("batch", None), ("batch", None)),
    results=(("batch",), ("batch",), dict.fromkeys(METRICS, ("batch",))),
    shardable=frozenset({"batch", "vocab"}),
    communicates={"vocab": "vocab_axis"},
)


@op(DIMS, cpu=("xla",), tpu=("xla", "tpu"), gpu=("xla", "gpu"))
def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    vocab_axis: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Weighted sum over positions of the cross-entropy of ``softmax(cap(hidden @ head))``.

    With ``p`` that softmax, ``Z`` its normaliser and ``e = label_smoothing``, a position's loss is
    ``-(1 - e) log p[label] - e mean(log p) + z_loss log(Z)^2``: smoothing (Szegedy et al.,
    arXiv:1512.00567, section 7) as in `torch.nn.CrossEntropyLoss`, the z-loss as in PaLM
    (arXiv:2204.02311, section 5).

    Args:
      hidden: [B, T, D]; differentiable.
      head: [D, V]; differentiable. Sharded over the vocabulary where `vocab_axis` is given.
      labels: int32 [B, T], numbers of tokens in the whole vocabulary (of any other number the loss
        means nothing); ignored where the weight is 0.
      weights: float32 [B, T].
      z_loss: coefficient of the squared log-normaliser.
      label_smoothing: in [0, 1): the part of the target that is spread over the vocabulary.
      softcap: logits become ``softcap * tanh(logits / softcap)``.
      vocab_size: how many of the whole vocabulary's columns are tokens, where the last ones only
        fill it up: these are in no sum and have no gradient. None: all.
      vocab_axis: the mesh axes over which `head` is sharded, inside a shard_map.

    Returns:
      (loss sum, weight sum, metrics), float32 arrays of one element a shard. The metrics are
      weighted sums too: "nll", ``-log p[label]`` without smoothing and z-loss, in nats;
      "z_squared", ``log(Z)^2``; "correct", 1 where the label is the first largest logit. Only the
      loss sum has a gradient.

    Raises:
      ValueError: shapes that do not fit together, or options out of range.
    """
    if head.ndim != 2 or hidden.ndim != 3 or hidden.shape[-1] != head.shape[0]:
        raise ValueError(f"cross_entropy: hidden {hidden.shape} and head {head.shape} must be "
                         "[B, T, D] and [D, V]")
    if labels.shape != hidden.shape[:2] or weights.shape != hidden.shape[:2]:
        raise ValueError(f"cross_entropy: labels {labels.shape} and weights {weights.shape} must "
                         f"be {hidden.shape[:2]}, as hidden {hidden.shape} says")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"cross_entropy: labels are {labels.dtype}; they must be integers")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"cross_entropy: label_smoothing={label_smoothing} must be in [0, 1); "
                         "0 turns it off")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"cross_entropy: softcap={softcap} must be > 0; None turns it off")
    if vocab_size is not None:
        columns = head.shape[1] * (1 if vocab_axis is None else lax.axis_size(vocab_axis))
        if not 1 <= vocab_size <= columns:
            raise ValueError(f"cross_entropy: vocab_size={vocab_size} must be in 1..{columns}, "
                             "the columns of the head; None takes all")
