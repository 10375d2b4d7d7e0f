"""RMSNorm and LayerNorm, computed in float32, perhaps with the residual add before it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

import sharding
from pallas_kernels.layer_norm import layer_norm
from pallas_kernels.rms_norm import dims, rms_norm


@dataclasses.dataclass(frozen=True)
class Norm:
    """Which normalisation: kind "rms" (arXiv:1910.07467) or "layer" (arXiv:1607.06450).

    `bias` adds a learned vector; eps is added to the mean square or variance; `offset` to the
    learned scale: 1 where that is stored as its distance from one, as in Gemma.
    """

    kind: str = "rms"
    eps: float = 1e-6
    bias: bool = False
    offset: float = 0.0

    def __post_init__(self):
        if self.kind not in ("rms", "layer"):
            raise ValueError(f"norm.kind is {self.kind!r}; it must be 'rms' or 'layer'")
        if not self.eps > 0:
            raise ValueError(f"norm.eps is {self.eps}; it must be positive, e.g. 1e-6")
        if not math.isfinite(self.offset):
            raise ValueError(f"norm.offset is {self.offset}; it must be finite, e.g. 0 or 1")


class Normalize(nnx.Module):
    """Normalises the last dimension and scales it by a learned vector, initially one
    (the parameter and the config's offset together)."""

    def __init__(self, config: Norm, width: int, *, axis: str | None = "embed",
                 rows: tuple[str | None, ...] = ("batch", "seq"), key: jax.Array,
                 dtype=jnp.float32):
        """`axis` is the logical axis of the vector, `rows` are those of the other dimensions."""
        self.config, self.rows = config, rows
        scale = sharding.param(jax.nn.initializers.constant(1.0 - config.offset), axis)
        self.scale = nnx.Param(scale(key, (width,), dtype), axes=scale.axes)
        zeros = sharding.param(jax.nn.initializers.zeros, axis)
        self.bias = (
            nnx.Param(zeros(key, (width,), dtype), axes=zeros.axes) if config.bias else None)

    def __call__(self, x: jax.Array, residual: jax.Array | None = None
                 ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """[*rows, width] -> the same in x's dtype.

        With a residual, (the normalised sum of both, the sum).
        """
        options = {"eps": self.config.eps, "dims": dims(*self.rows)}
        # In float32 shards add up their gradients in float32.
        scale, bias = (None if p is None else p[...].astype(jnp.float32)
                       for p in (self.scale, self.bias))
        if self.config.kind == "rms":
            op, options["offset"] = rms_norm, self.config.offset
        else:
            op, scale = layer_norm, scale + self.config.offset
        return sharding.local(op, x, scale, residual, bias, **options)
