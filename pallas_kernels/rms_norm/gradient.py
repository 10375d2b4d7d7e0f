"""What the implementations of rms_norm and layer_norm share: the mathematics and the gradient."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def statistics(rows: jax.Array, centred: bool, eps: float
               ) -> tuple[jax.Array | None, jax.Array]:
    """(mean, None unless `centred`; 1 / sqrt(mean square about it + eps)) of float32 rows [..., D].

    Both are float32 [..., 1].
    """
    mean = jnp.mean(rows, axis=-1, keepdims=True) if centred else None
    distance = rows if mean is None else rows - mean
    return mean, jax.lax.rsqrt(jnp.mean(distance * distance, axis=-1, keepdims=True) + eps)


def standardise(rows: jax.Array, mean: jax.Array | None, factor: jax.Array) -> jax.Array:
    """float32 rows by their `statistics`."""
    return (rows if mean is None else rows - mean) * factor


def pull_back(d_unit: jax.Array, unit: jax.Array, factor: jax.Array, centred: bool) -> jax.Array:
    """The rows' cotangent from that of ``unit = standardise(rows, *statistics(rows))``."""
    d_rows = d_unit - unit * jnp.mean(d_unit * unit, axis=-1, keepdims=True)
    if centred:
        # The mean of `unit` is zero already.
        d_rows = d_rows - jnp.mean(d_unit, axis=-1, keepdims=True)
    return d_rows * factor


def differentiable(forward: Callable, backward: Callable) -> Callable:
    """Makes the function ``(x, scale, residual, bias, **static)`` of an op from its two passes.

    Args:
      forward: ``(x, scale, residual, bias, **static) -> (y, total, kept)``: total is the sum (x
        itself without a residual), kept whatever else the backward pass reads.
      backward: ``(total, scale, bias, kept, d_y, d_total, **static) -> (d_x, d_scale, d_bias)``:
        d_total is None without a residual; d_x is also the residual's cotangent; d_scale and
        d_bias are [D] of any floating dtype, the latter unused without a bias.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
    def normalise(x, scale, residual, bias, static):
        return normalise_forward(x, scale, residual, bias, static)[0]

    def normalise_forward(x, scale, residual, bias, static):
        y, total, kept = forward(x, scale, residual, bias, **dict(static))
        return (y if residual is None else (y, total)), (total, scale, bias, kept)

    def normalise_backward(static, residuals, cotangents):
        total, scale, bias, kept = residuals
        alone = not isinstance(cotangents, tuple)
        d_y, d_total = (cotangents, None) if alone else cotangents
        d_x, d_scale, d_bias = backward(total, scale, bias, kept, d_y, d_total,
                                        **dict(static))
        return (d_x, d_scale.astype(scale.dtype), None if alone else d_x,
                None if bias is None else d_bias.astype(bias.dtype))

    normalise.defvjp(normalise_forward, normalise_backward)

    def function(x, scale, residual, bias, **static):
        return normalise(x, scale, residual, bias, tuple(sorted(static.items())))

    return function
