"""Token and position embeddings."""

import jax
import jax.numpy as jnp
from flax import nnx

import sharding


class Embedding(nnx.Module):
    """A table of `size` rows of `width`; rows are looked up by id."""

    def __init__(self, size: int, width: int, *, axis: str | None = "vocab", deviation: float,
                 key: jax.Array, dtype=jnp.float32):
        """`axis` is the rows' logical axis, `deviation` the initial standard deviation."""
        init = sharding.param(jax.nn.initializers.normal(deviation), axis, "embed")
        self.table = nnx.Param(init(key, (size, width), dtype), axes=init.axes)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int [B, T] -> [B, T, width]. An id outside the table reads its nearest row."""
        table = sharding.gathered(self.table[...], *self.table.get_metadata()["axes"])
        return sharding.lookup(table, ids, "batch", "seq", "embed")
