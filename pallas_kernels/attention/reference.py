"""Attention by its definition, in the operands' own precision: what the other files must equal."""

import jax
import jax.numpy as jnp


def attention(query, key, value, query_segments, key_segments, *, scale, causal, window, softcap):
    """See `pallas_kernels.attention.attention`; holds all [B, H, T, S] scores."""
    t, s = query.shape[1], key.shape[1]
    repeat = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, repeat, axis=2) for x in (key, value))
    scores = scale * jnp.einsum("bthk,bshk->bhts", query, key)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    age = jnp.arange(t)[:, None] - jnp.arange(s)
    seen = jnp.ones((1, t, s), bool)
    if causal:
        seen &= age >= 0
    if window is not None:
        seen &= age < window
    if query_segments is not None:
        seen &= query_segments[:, :, None] == key_segments[:, None, :]
    scores = jnp.where(seen[:, None], scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores, axis=-1), value)
