"""The recurrence by its definition, a step at a time: what the other files must equal."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.rnn import CELLS, step


def rnn(inputs, recurrent, bias, segment_ids=None, state=None, *, cell):
    """See `pallas_kernels.rnn.rnn`."""
    b, t, _, h, d = inputs.shape
    if state is None:
        state = jnp.zeros((CELLS[cell].states, b, h, d),
                          jnp.promote_types(inputs.dtype, jnp.float32))
    if segment_ids is None:
        segment_ids = jnp.ones((b, t), jnp.int32)

    def advance(carry, x):
        segment, state = carry
        gates, own = x
        inside = own != 0
        forgets = inside & (segment != 0) & (own != segment)
        state = jnp.where(forgets[:, None, None], 0.0, state)
        new = step(gates, recurrent, bias, state, cell=cell)
        state = jnp.where(inside[:, None, None], new, state)
        out = jnp.where(inside[:, None, None], new[0], 0.0).astype(inputs.dtype)
        return (jnp.where(inside, own, segment), state), out

    by_time = jnp.swapaxes(inputs, 0, 1), jnp.swapaxes(segment_ids, 0, 1)
    (_, state), out = lax.scan(advance, (jnp.zeros((b,), segment_ids.dtype), state), by_time)
    return jnp.swapaxes(out, 0, 1), state
