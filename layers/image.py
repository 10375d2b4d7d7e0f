"""Layers of images [B, H, W, C]: convolution, batch norm, squeeze-and-excitation, patches.

Batch norm's running statistics are `nnx.BatchStat` variables, which no call changes. In training a
layer that holds some returns what they become next to its result, nested by attribute names as the
modules are; in evaluation that is an empty dict.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import sharding
from layers.linear import Linear, fan_in_normal
from layers.winograd import winograd
from pallas_kernels.dispatch import Target
from sharding.ambient import PRODUCT

IMAGE = ("batch", "height", None, "channels")
"""The logical axes of an activation."""

# Narrower kernels do too little work on what the transforms write and read.
_CHANNELS = 48


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """[B, H, W, C] with an odd kernel [k, k, C, D], zeros around: [B, ceil(H / stride), .., D]."""
    size = kernel.shape[0]
    if size == 1:
        return jnp.einsum("bhwc,cd->bhwd", x[:, ::stride, ::stride], kernel[0, 0])
    if size == 3 and stride == 1 and _is_wide(x, kernel):
        return winograd(x, kernel)
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(size // 2, size // 2)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _is_wide(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether `winograd` is the faster form: found by timing both, see docs/benchmarks.md."""
    return (min(kernel.shape[2:]) >= _CHANNELS and x.dtype == kernel.dtype == jnp.float32
            and Target.ambient().platform == "cpu"
            and sharding.shards("height") == sharding.shards("channels") == 1)


class Conv(nnx.Module):
    """A convolution with an odd square kernel [k, k, C, D], zeros around the image."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, *, stride: int = 1,
                 bias: bool = False,
                 axes: tuple[str | None, str | None] = ("embed", "channels"), key: jax.Array,
                 dtype=jnp.float32):
        """`axes` are the logical axes of the kernel's inputs and outputs."""
        self.stride = stride
        # He et al., arXiv:1502.01852, with the outputs' fan, as ResNets begin.
        init = sharding.param(
            jax.nn.initializers.normal((2.0 / (outputs * size * size)) ** 0.5),
            None, None, *axes)
        self.kernel = nnx.Param(init(key, (size, size, inputs, outputs), dtype), axes=init.axes)
        self.bias = _vector(jax.nn.initializers.zeros, outputs, dtype, axes[1]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), D]."""
        axes = self.kernel.get_metadata()["axes"]
        kernel = sharding.gathered(self.kernel[...], *axes)
        y = checkpoint_name(convolve(x, kernel, self.stride), PRODUCT)
        y = sharding.constrain(y, *IMAGE[:-1], axes[-1])
        return y if self.bias is None else y + self.bias[...]


def _vector(init: Any, channels: int, dtype, axis: str | None = "channels") -> nnx.Param:
    init = sharding.param(init, axis)
    return nnx.Param(init(jax.random.key(0), (channels,), dtype), axes=init.axes)


class BatchNorm(nnx.Module):
    """Normalises each channel over batch and space (arXiv:1502.03167), in float32.

    Training normalises by the global batch's own statistics, whatever it is sharded over, and
    moves the running ones towards them by `momentum`; evaluation normalises by the running ones.
    As in PyTorch the running variance is the unbiased one.
    """

    def __init__(self, channels: int, *, momentum: float = 0.1, eps: float = 1e-5,
                 dtype=jnp.float32):
        self.momentum, self.eps = momentum, eps
        self.scale = _vector(jax.nn.initializers.ones, channels, dtype)
        self.bias = _vector(jax.nn.initializers.zeros, channels, dtype)
        self.mean = nnx.BatchStat(jnp.zeros(channels, jnp.float32), axes=("channels",))
        self.variance = nnx.BatchStat(jnp.ones(channels, jnp.float32), axes=("channels",))

    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """[B, H, W, C] -> (the same in x's dtype, {"mean", "variance"} float32 [C] in training)."""
        full = x.astype(jnp.float32)
        mean, variance, new = self.mean[...], self.variance[...], {}
        if train:
            old = {"mean": mean, "variance": variance}
            mean = jnp.mean(full, axis=(0, 1, 2))
            variance = jnp.mean(jnp.square(full - mean), axis=(0, 1, 2))
            count = x.size // x.shape[-1]
            seen = {"mean": mean, "variance": variance * (count / max(count - 1, 1))}
            new = {name: lax.stop_gradient((1.0 - self.momentum) * old[name]
                                           + self.momentum * seen[name]) for name in old}
        scale = self.scale[...].astype(jnp.float32) * lax.rsqrt(variance + self.eps)
        y = (full - mean) * scale + self.bias[...].astype(jnp.float32)
        return sharding.constrain(y.astype(x.dtype), *IMAGE), new


class ConvNorm(nnx.Module):
    """A convolution and its batch norm."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, *, key: jax.Array, dtype,
                 **options: Any):
        """`options` are those of `Conv`."""
        self.conv = Conv(inputs, outputs, size, key=key, dtype=dtype, **options)
        self.norm = BatchNorm(outputs, dtype=dtype)

    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, dict[str, Any]]:
        """[B, H, W, C] -> ([B, ceil(H / stride), ceil(W / stride), D], statistics)."""
        y, new = self.norm(self.conv(x), train)
        return y, {"norm": new} if new else {}


class SqueezeExcite(nnx.Module):
    """Scales each channel by a gate that all channels' means decide (arXiv:1709.01507)."""

    def __init__(self, channels: int, reduction: int = 16, *, key: jax.Array, dtype):
        hidden = max(1, channels // reduction)
        down, up = jax.random.split(key)
        self.down = Linear("bc,cf->bf", (channels, hidden), ("embed", None), ("batch", None),
                           key=down, dtype=dtype)
        self.up = Linear("bf,fc->bc", (hidden, channels), (None, "embed"), ("batch", "embed"),
                         key=up, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> the same."""
        means = jnp.mean(x, axis=(1, 2), dtype=jnp.float32).astype(x.dtype)
        gate = jax.nn.sigmoid(self.up(jax.nn.relu(self.down(means))))
        return sharding.constrain(x * gate[:, None, None], *IMAGE)


class PatchEmbed(nnx.Module):
    """A convolution whose stride is its kernel's size: each patch of size x size is one vector."""

    def __init__(self, inputs: int, width: int, size: int, *, key: jax.Array, dtype):
        self.size = size
        self.patch = Linear("bhpwqc,pqcd->bhwd", (size, size, inputs, width),
                            (None, None, None, "embed"), ("batch", "height", None, "embed"),
                            bias=True, key=key, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H / size, W / size, width]."""
        b, h, w, c = x.shape
        p = self.size
        return self.patch(x.reshape(b, h // p, p, w // p, p, c))


class PatchExpand(nnx.Module):
    """A transposed convolution whose stride is its kernel's size: each vector becomes a patch."""

    def __init__(self, inputs: int, outputs: int, size: int, *, key: jax.Array, dtype):
        init = sharding.param(fan_in_normal(inputs), None, None, "embed", "channels")
        self.kernel = nnx.Param(init(key, (size, size, inputs, outputs), dtype), axes=init.axes)
        self.bias = _vector(jax.nn.initializers.zeros, outputs, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H size, W size, D]."""
        # In this order no operand as large as the image is transposed for the product.
        kernel = jnp.moveaxis(self.kernel[...], 2, 0)
        _, _, inputs, outputs = self.kernel.get_metadata()["axes"]
        y = sharding.einsum("bhwc,cpqd->bhwpqd", x, kernel, weight=(inputs, None, None, outputs),
                            out=("batch", "height", None, None, None, "channels"))
        y = y.swapaxes(2, 3)
        b, h, p, w, q, d = y.shape
        return sharding.constrain(y.reshape(b, h * p, w * q, d) + self.bias[...], *IMAGE)
