"""The gradient that every blockwise implementation of attention shares."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import MASKED
from pallas_kernels.dispatch import residual

# Any score is far above the maximum of a row that sees nothing.
EMPTY = 0.1 * MASKED


def differentiable(forward: Callable, backward: Callable) -> Callable:
    """Makes the op's function from its two passes.

    Args:
      forward: ``(query, key, value, query_segments, key_segments, block_mask, **static) ->
        (o, m, l)``: the attention itself [B, T, H, V], of dtype ``static["dtype"]``, and float32
        [B, T, H] the rows' maxima and sums.
      backward: ``(the same six, lse, delta, d_o, **static) -> (d_query, d_key, d_value)``, with
        float32 lse [B, T, H] = m + log l (0 where a row sees nothing; its scores must be masked
        to a weight of 0), and delta [B, T, H] such that ``d_score = weight * (d_o . value -
        delta)``.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
    def attend(query, key, value, query_segments, key_segments, block_mask, static):
        o, m, l = forward(query, key, value, query_segments, key_segments, block_mask,
                          **dict(static))
        return o, _lse(m, l), m

    def attend_forward(*operands_and_static):
        *operands, static = operands_and_static
        o, lse, m = attend(*operands, static)
        o, lse = residual(o), residual(lse)
        return (o, lse, m), (operands, o, lse)

    def attend_backward(static, residuals, cotangents):
        operands, o, lse = residuals
        d_o, d_lse, _ = cotangents
        delta = jnp.sum(d_o.astype(jnp.float32) * o.astype(jnp.float32), axis=-1) - d_lse
        grads = backward(*operands, lse, delta, d_o, **dict(static))
        zeros = (None if x is None else np.zeros(x.shape, jax.dtypes.float0)
                 for x in operands[3:])
        return *grads, *zeros

    attend.defvjp(attend_forward, attend_backward)

    def attention(query, key, value, query_segments, key_segments, block_mask, *, partial,
                  **static):
        static["dtype"] = jnp.dtype(jnp.float32) if partial else query.dtype
        o, lse, m = attend(query, key, value, query_segments, key_segments, block_mask,
                           tuple(sorted(static.items())))
        if not partial:
            return o
        m = jax.lax.stop_gradient(m)
        seen = m > EMPTY
        l = jnp.where(seen, jnp.exp(jnp.where(seen, lse - m, 0.0)), 0.0)
        return m, l, o * l[..., None]

    return attention


def _lse(m, l):
    return jnp.where(l > 0, m + jnp.log(jnp.where(l > 0, l, 1.0)), 0.0)
