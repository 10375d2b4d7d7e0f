"""RMSNorm and LayerNorm, computed in float32."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

import sharding


@dataclasses.dataclass(frozen=True)
class Norm:
    """Which normalisation: kind "rms" (arXiv:1910.07467) or "layer" (arXiv:1607.06450).

    `bias` adds a learned offset; eps is added to the mean square or variance.
    """

    kind: str = "rms"
    eps: float = 1e-6
    bias: bool = False

    def __post_init__(self):
        if self.kind not in ("rms", "layer"):
            raise ValueError(f"norm.kind is {self.kind!r}; it must be 'rms' or 'layer'")
        if not self.eps > 0:
            raise ValueError(f"norm.eps is {self.eps}; it must be positive, e.g. 1e-6")


class Normalize(nnx.Module):
    """Normalises the last dimension and scales it by a learned vector, initially one."""

    def __init__(self, config: Norm, width: int, *, axis: str | None = "embed",
                 key: jax.Array, dtype=jnp.float32):
        self.config = config
        ones = sharding.param(jax.nn.initializers.ones, axis)
        self.scale = nnx.Param(ones(key, (width,), dtype), axes=ones.axes)
        zeros = sharding.param(jax.nn.initializers.zeros, axis)
        self.bias = (
            nnx.Param(zeros(key, (width,), dtype), axes=zeros.axes) if config.bias else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] -> [..., width] in x's dtype."""
        y = x.astype(jnp.float32)
        if self.config.kind == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.config.eps)
        axes = self.scale.get_metadata()["axes"]
        y = y * sharding.gathered(self.scale[...], *axes).astype(jnp.float32)
        if self.bias is not None:
            y = y + sharding.gathered(self.bias[...], *axes).astype(jnp.float32)
        return y.astype(x.dtype)
