"""An op of somebody else: one folder, and no edit elsewhere."""

import jax

from pallas_kernels import Dims, op


@op(Dims(operands=(("batch", None), (None,)), results=("batch", None),
         shardable=frozenset({"batch"})),
    cpu=("xla",), tpu=("tpu", "xla"), gpu=("xla",))
def toy(x: jax.Array, scale: jax.Array, *, power: int = 2) -> jax.Array:
    """``scale * x ** power`` of x [B, D] and scale [D]."""
    if x.shape[1:] != scale.shape:
        raise ValueError(f"toy: x {x.shape} and scale {scale.shape} must be [B, D] and [D]")
