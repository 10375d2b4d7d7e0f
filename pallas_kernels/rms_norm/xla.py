"""RMSNorm and LayerNorm for any XLA back end, keeping one or two numbers a row between the passes.

Autodiff would keep the float32 rows, or make the reductions again.
"""

import functools

import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.rms_norm.gradient import differentiable, pull_back, standardise, statistics


def supports(target, x, scale, residual, bias, **options):
    """Everything but integers."""
    return dispatch.refuse_other_than_floats(x=x, scale=scale)


def _forward(x, scale, residual, bias, *, eps, offset, centred):
    total = x if residual is None else x + residual
    rows = total.astype(jnp.float32)
    mean, factor = statistics(rows, centred, eps)
    y = standardise(rows, mean, factor) * (offset + scale.astype(jnp.float32))
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    kept = (None if mean is None else dispatch.residual(mean), dispatch.residual(factor))
    return y.astype(x.dtype), total, kept


def _backward(total, scale, bias, kept, d_y, d_total, *, eps, offset, centred):
    mean, factor = kept
    unit = standardise(total.astype(jnp.float32), mean, factor)
    d_y = d_y.astype(jnp.float32)
    d_rows = pull_back(d_y * (offset + scale.astype(jnp.float32)), unit, factor, centred)
    if d_total is not None:
        d_rows = d_rows + d_total.astype(jnp.float32)
    over = tuple(range(total.ndim - 1))
    return (d_rows.astype(total.dtype), jnp.sum(d_y * unit, axis=over), jnp.sum(d_y, axis=over))


normalise = differentiable(_forward, _backward)
rms_norm = functools.partial(normalise, centred=False)
