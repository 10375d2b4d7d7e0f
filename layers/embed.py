"""Token and position embeddings."""

import jax
import jax.numpy as jnp
from flax import nnx

import sharding
from layers.linear import filled_up


class Embedding(nnx.Module):
    """A table of `size` rows of `width`; rows are looked up by id."""

    def __init__(self, size: int, width: int, *, axis: str | None = "vocab", deviation: float,
                 fill: int = 0, key: jax.Array, dtype=jnp.float32):
        """`axis` is the rows' logical axis, `deviation` the initial standard deviation; `fill`
        rows of zeros follow those of the ids."""
        init = sharding.param(filled_up(jax.nn.initializers.normal(deviation), 0, fill),
                              axis, "embed")
        self.table = nnx.Param(init(key, (size + fill, width), dtype), axes=init.axes)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int [B, T] -> [B, T, width]. An id outside the table reads its nearest row; rows that
        fill it up are zeros."""
        table = sharding.gathered(self.table[...], *self.table.get_metadata()["axes"])
        return sharding.lookup(table, ids, "batch", "seq", "embed")
