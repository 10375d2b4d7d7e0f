"""The matrix LSTM by its definition, a step at a time: what the other files must equal."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mlstm import step


def mlstm(query, key, value, input_gate, forget_gate, segment_ids=None, cell=None,
          normalizer=None, stabilizer=None, *, eps=1e-6, sigmoid_gate=False):
    """See `pallas_kernels.mlstm.mlstm`."""
    b, t, h, k = query.shape
    kind = jnp.promote_types(value.dtype, jnp.float32)
    if cell is None:
        cell, normalizer, stabilizer = (
            jnp.zeros(shape, kind) for shape in ((b, h, k, value.shape[-1]), (b, h, k), (b, h)))
    if sigmoid_gate:
        stabilizer = jnp.zeros_like(stabilizer)
    if segment_ids is None:
        segment_ids = jnp.ones((b, t), jnp.int32)

    def advance(carry, x):
        segment, state = carry
        *tokens, own = x
        inside = own != 0
        forgets = inside & (segment != 0) & (own != segment)
        kept = [jnp.where(_like(forgets, s), 0, s) for s in state]
        # Forgetting leaves nothing that the stabilizer could be the maximum of; not an infinity,
        # through which gradients would be NaN.
        kept[2] = jnp.where(_like(forgets, kept[2]), -1e5, kept[2])
        out, *new = step(*tokens, *kept, eps=eps, sigmoid_gate=sigmoid_gate)
        state = tuple(jnp.where(_like(inside, s), n, s) for n, s in zip(new, state, strict=True))
        return (jnp.where(inside, own, segment), state), jnp.where(_like(inside, out), out, 0)

    by_time = [jnp.swapaxes(x, 0, 1)
               for x in (query, key, value, input_gate, forget_gate, segment_ids)]
    first = jnp.zeros((b,), segment_ids.dtype), (cell, normalizer, stabilizer)
    (_, state), out = lax.scan(advance, first, by_time)
    return jnp.swapaxes(out, 0, 1), *state


def _like(rows, x):
    """[B] with the trailing axes of `x`."""
    return rows.reshape(rows.shape + (1,) * (x.ndim - 1))
