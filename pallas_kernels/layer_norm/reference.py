"""LayerNorm by its definition, in the operands' own precision."""

import jax.numpy as jnp


def layer_norm(x, scale, residual=None, bias=None, *, eps, offset=0.0):
    """See `pallas_kernels.layer_norm.layer_norm`."""
    total = x if residual is None else x + residual
    centred = total - jnp.mean(total, axis=-1, keepdims=True)
    y = centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + eps) * (offset + scale)
    y = y if bias is None else y + bias
    return y if residual is None else (y, total)
