"""Losses of dense prediction: a class for every pixel."""

import jax
import jax.numpy as jnp


def cross_entropy_and_dice(
    logits: jax.Array, labels: jax.Array, weights: jax.Array, *, dice: float = 0.5,
    smooth: float = 1e-5,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Pixel cross-entropy and soft Dice loss (V-Net, arXiv:1606.04797), mixed.

    The Dice loss of a class is ``1 - (2 sum p g + s) / (sum p^2 + sum g^2 + s)`` with sums over all
    pixels of the batch; of classes, background included, the mean is taken. It is no sum over
    pixels. Where a batch is computed in microbatches their Dice losses are averaged.

    Args:
      logits: [B, ..., classes].
      labels: int32 [B, ...].
      weights: float32 [B, ...]; 0 where there is no label.
      dice: the Dice loss's part of the mixture.
      smooth: s, what keeps the quotient of an absent class finite.

    Returns:
      (the mixture's mean times the weight, the sum of the weights, and by name the parts, "nll" and
      "dice_loss", times the weight), float32 scalars over all shards.
    """
    logits, weights = logits.astype(jnp.float32), weights.astype(jnp.float32)
    pixels = tuple(range(logits.ndim - 1))
    log_p = jax.nn.log_softmax(logits)
    # A comparison instead of a gather: it fuses, and its gradient is no scatter.
    truth = (labels[..., None] == jnp.arange(logits.shape[-1])) * weights[..., None]
    weight = jnp.sum(weights)
    nll = -jnp.sum(truth * log_p)
    p = jnp.exp(log_p)
    # Weights are 0 or 1 in practice; of others each pixel counts so many times.
    both = jnp.sum(p * truth, axis=pixels)
    squares = jnp.sum(jnp.square(p) * weights[..., None], axis=pixels)
    overlap = (2 * both + smooth) / (squares + jnp.sum(truth, axis=pixels) + smooth)
    dice_loss = weight * jnp.mean(1 - overlap)
    total = (1 - dice) * nll + dice * dice_loss
    return total, weight, {"nll": nll, "dice_loss": dice_loss}
