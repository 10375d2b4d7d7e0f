"""Linear + softmax cross-entropy from hidden states, without the logits of all positions.

Why it is an op: [tokens, vocabulary] float32 logits are the largest array of a language model's
step (9.3 GiB at 16k tokens and a 152k vocabulary). Only a slice of positions is held at a time.
The cotangent of a summed loss is one scalar, so both gradients are made in the forward pass and
merely scaled in the backward pass: three matmuls altogether, as many as the plain form.
"""

import jax

from pallas_kernels.cross_entropy import xla
from pallas_kernels.dims import Dims, op

DIMS = Dims(
    operands=(("batch", None, None), (None, "vocab"), ("batch", None), ("batch", None)),
    results=(("batch",), ("batch",), ("batch",)),
    shardable=frozenset({"batch", "vocab"}),
    communicates={"vocab": "vocab_axis"},
)


@op(DIMS)
def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    vocab_axis: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted sum of ``-log softmax(cap(hidden @ head))[label] + z_loss * log(Z)^2``.

    Args:
      hidden: [B, T, D]; differentiable.
      head: [D, V]; differentiable. Sharded over the vocabulary where `vocab_axis` is given.
      labels: int32 [B, T] in 0..V-1 of the whole vocabulary; ignored where the weight is 0.
      weights: float32 [B, T].
      z_loss: coefficient of the squared log-normaliser (PaLM, arXiv:2204.02311, section 5).
      softcap: logits become ``softcap * tanh(logits / softcap)``.
      vocab_axis: the mesh axes over which `head` is sharded, inside a shard_map.

    Returns:
      Three float32 arrays of one element a shard: the loss sum (z-loss included), the weight
      sum, and the weighted sum of ``log(Z)^2``. Only the first has a gradient.

    Raises:
      ValueError: shapes that do not fit together.
    """
    if head.ndim != 2 or hidden.shape[-1] != head.shape[0]:
        raise ValueError(f"cross_entropy: hidden {hidden.shape} and head {head.shape} must be "
                         "[B, T, D] and [D, V]")
    if labels.shape != hidden.shape[:2] or weights.shape != hidden.shape[:2]:
        raise ValueError(f"cross_entropy: labels {labels.shape} and weights {weights.shape} must "
                         f"be {hidden.shape[:2]}, as hidden {hidden.shape} says")
    sums = xla.cross_entropy(
        hidden, head, labels, weights, z_loss=z_loss, softcap=softcap, vocab_axis=vocab_axis
    )
    return tuple(x[None] for x in sums)
