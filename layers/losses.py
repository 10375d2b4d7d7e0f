"""Losses as (sum, weight) pairs: microbatches, shards and processes add both and divide once."""

import jax
import jax.numpy as jnp

import sharding
from pallas_kernels.cross_entropy import cross_entropy as cross_entropy_op


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
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of a linear head, without holding the logits of all positions at once.

    Args:
      hidden: [B, T, D], the model's last hidden states.
      head: [D, V].
      labels: int32 [B, T].
      weights: float32 [B, T]; 0 where there is no label.
      z_loss: coefficient of log(Z)^2 (PaLM, arXiv:2204.02311, section 5).
      label_smoothing: in [0, 1): the part of the target spread over the vocabulary.
      softcap: logits become ``softcap * tanh(logits / softcap)``.
      vocab_size: how many of the head's columns are tokens; None: all.

    Returns:
      (sum in nats, smoothing and z-loss included; sum of weights; weighted sums by name: "nll",
      the cross-entropy without these two, "z_squared", log(Z)^2, and "correct"), float32 scalars
      over all shards. Only the first has a gradient.
    """
    # The chips' kernels take whole heads only.
    vocab_size = None if vocab_size == head.shape[1] else vocab_size
    sums = sharding.local(cross_entropy_op, hidden, head, labels, weights, z_loss=z_loss,
                          label_smoothing=label_smoothing, softcap=softcap, vocab_size=vocab_size)
    return jax.tree.map(jnp.sum, sums)
