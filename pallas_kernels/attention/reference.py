"""Attention by its definition, in the operands' own precision: what the other files must equal."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import MASKED


def attention(query, key, value, query_segments=None, key_segments=None, block_mask=None, *,
              scale, causal=True, window=None, softcap=None, partial=False):
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
    if block_mask is not None:
        blocks = jnp.repeat(block_mask, t // block_mask.shape[0], axis=0)
        seen &= jnp.repeat(blocks, s // block_mask.shape[1], axis=1)
    seen = seen[:, None]
    m = jax.lax.stop_gradient(jnp.max(jnp.where(seen, scores, MASKED), axis=-1))
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores - m[..., None], 0)), 0)
    l = jnp.sum(weights, axis=-1)
    o = jnp.einsum("bhts,bshv->bthv", weights, value)
    m, l = (jnp.swapaxes(x, 1, 2) for x in (m, l))
    if partial:
        return m, l, o
    return o / jnp.where(l > 0, l, 1)[..., None]
