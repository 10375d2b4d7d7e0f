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
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of a linear head, without holding the logits of all positions at once.

    Args:
      hidden: [B, T, D], the model's last hidden states.
      head: [D, V].
      labels: int32 [B, T].
      weights: float32 [B, T]; 0 where there is no label.
      z_loss: coefficient of log(Z)^2 (PaLM, arXiv:2204.02311, section 5).
      softcap: logits become ``softcap * tanh(logits / softcap)``.

    Returns:
      (sum in nats, z-loss included; sum of weights; {"log_z_squared": weighted sum of log(Z)^2}),
      float32 scalars over all shards.
    """
    sums = sharding.local(cross_entropy_op, hidden, head, labels, weights, z_loss=z_loss,
                          softcap=softcap)
    loss, weight, z_sum = (jnp.sum(x) for x in sums)
    return loss, weight, {"log_z_squared": z_sum}
