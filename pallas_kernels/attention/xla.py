"""Attention for any XLA back end, one block of query rows at a time.

Each block reads only the keys it can see, so a causal sequence costs half of the square, and a
window costs what it spans. Blocks are recomputed in the backward pass, so nothing of size T x T
is kept.
"""

import functools

import jax
import jax.numpy as jnp

# Rows in a block: enough for full matrix tiles. At most MAX_BLOCKS of them are laid out, so that
# the compiled program stays small at any length.
BLOCK_ROWS = 512
MAX_BLOCKS = 16
MASKED = -1e30


def _block(query, key, value, query_segments, key_segments, *, first, start, scale, causal,
           window, softcap):
    """Query rows first.. against keys start..: [B, T', G, R, K], [B, S', G, K], [B, S', G, V]."""
    scores = jnp.einsum("btgrk,bsgk->bgrts", query, key, preferred_element_type=jnp.float32)
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    t, s = query.shape[1], key.shape[1]
    age = (first + jnp.arange(t))[:, None] - (start + jnp.arange(s))
    seen = None
    if causal:
        seen = age >= 0
    if window is not None:
        seen = seen & (age < window)
    if query_segments is not None:
        same = (query_segments[:, :, None] == key_segments[:, None, :])[:, None, None]
        seen = same if seen is None else seen & same
    if seen is not None:
        scores = jnp.where(seen, scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum(
        "bgrts,bsgv->btgrv", weights, value, preferred_element_type=jnp.float32
    ).astype(query.dtype)


def attention(query, key, value, query_segments, key_segments, *, scale, causal, window, softcap):
    """See `pallas_kernels.attention.attention`."""
    b, t, h, k = query.shape
    s, g = key.shape[1:3]
    query = query.reshape(b, t, g, h // g, k)
    rows = max(BLOCK_ROWS, -(-t // MAX_BLOCKS))
    rows = -(-rows // BLOCK_ROWS) * BLOCK_ROWS
    outputs = []
    for first in range(0, t, rows):
        last = min(first + rows, t)
        start = 0 if window is None else max(0, first - window + 1)
        stop = last if causal else s
        block = functools.partial(
            _block, first=first, start=start, scale=scale, causal=causal, window=window,
            softcap=softcap,
        )
        if t > rows:
            block = jax.checkpoint(block)
        segments = (None, None)
        if query_segments is not None:
            segments = (query_segments[:, first:last], key_segments[:, start:stop])
        outputs.append(
            block(query[:, first:last], key[:, start:stop], value[:, start:stop], *segments)
        )
    out = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)
    return out.reshape(b, t, h, value.shape[-1])
