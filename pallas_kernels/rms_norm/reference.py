"""RMSNorm by its definition, in the operands' own precision."""

import jax.numpy as jnp


def rms_norm(x, scale, residual=None, bias=None, *, eps, offset=0.0):
    """See `pallas_kernels.rms_norm.rms_norm`."""
    total = x if residual is None else x + residual
    y = total / jnp.sqrt(jnp.mean(total**2, axis=-1, keepdims=True) + eps) * (offset + scale)
    y = y if bias is None else y + bias
    return y if residual is None else (y, total)
