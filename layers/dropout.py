"""Dropout by folded keys: modules hold no random state."""

import jax
import jax.numpy as jnp

import sharding


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes elements of x [B, T, D] with probability `rate` and scales the rest.

    The key None turns it off. The mask does not depend on how x is sharded.

    Raises ValueError where the rate is not in [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate is {rate}; it must be in [0, 1)")
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    keep = sharding.constrain(keep, "batch", "seq", "embed")
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def fold(key: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
    """``jax.random.fold_in``, passing None through."""
    return None if key is None else jax.random.fold_in(key, number)
