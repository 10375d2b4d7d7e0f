"""Linear maps over named axes, written as einsums."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

import sharding

Axes = Sequence[str | None]


def fan_in_normal(fan_in: int, gain: float = 1.0) -> jax.nn.initializers.Initializer:
    """Normal of standard deviation ``gain / sqrt(fan_in)``, cut at three deviations."""
    return jax.nn.initializers.truncated_normal(gain * fan_in**-0.5, lower=-3, upper=3)


def filled_up(init: jax.nn.initializers.Initializer, axis: int, fill: int
              ) -> jax.nn.initializers.Initializer:
    """`init`, but for the last `fill` entries along an axis, which are zero."""
    def make(key, shape, dtype=jnp.float32):
        drawn = [n - fill if i == axis else n for i, n in enumerate(shape)]
        behind = [(0, fill if i == axis else 0) for i in range(len(shape))]
        return jnp.pad(init(key, tuple(drawn), dtype), behind)

    return make if fill else init


class Linear(nnx.Module):
    """``y = einsum(expression, x, kernel) + bias``.

    The bias has the dimensions that only the kernel and the result share.
    """

    def __init__(
        self,
        expression: str,
        shape: Sequence[int],
        axes: Axes,
        out_axes: Axes,
        *,
        bias: bool = False,
        gain: float = 1.0,
        key: jax.Array,
        dtype=jnp.float32,
    ):
        """Args:
          expression: e.g. ``"btd,dhk->bthk"``: activation, kernel, result.
          shape: the kernel's shape.
          axes: the kernel's logical axes.
          out_axes: the result's logical axes.
          bias: whether to add one.
          gain: factor on the initial kernel, whose deviation is 1 / sqrt(inputs).
          key: for the initial kernel.
          dtype: of the parameters.
        """
        self.expression = expression
        self.axes = tuple(axes)
        self.out_axes = tuple(out_axes)
        inputs, _, result = expression.partition("->")
        letters = inputs.partition(",")[2]
        contracted = [n for c, n in zip(letters, shape, strict=True) if c not in result]
        fan_in = 1
        for n in contracted:
            fan_in *= n
        init = sharding.param(fan_in_normal(fan_in, gain), *axes)
        self.kernel = nnx.Param(init(key, shape, dtype), axes=init.axes)
        kept = [(n, a) for c, n, a in zip(letters, shape, axes, strict=True) if c in result]
        init = sharding.param(jax.nn.initializers.zeros, *(a for _, a in kept))
        self.bias = (
            nnx.Param(init(key, [n for n, _ in kept], dtype), axes=init.axes) if bias else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the map; the result has x's dtype."""
        y = sharding.einsum(
            self.expression, x, self.kernel[...], weight=self.axes, out=self.out_axes
        )
        if self.bias is None:
            return y
        bias_axes = self.bias.get_metadata()["axes"]
        return y + sharding.gathered(self.bias[...], *bias_axes)
