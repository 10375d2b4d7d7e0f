"""Softmax attention over a whole (packed) sequence.

Why it is an op: the scores are T x T, and holding them costs memory quadratic in T. Here they
are made a block of query rows at a time, forward and backward, and none is kept between the two.
"""

import jax

from pallas_kernels.attention import xla
from pallas_kernels.dims import Dims, op

DIMS = Dims(
    operands=(
        ("batch", None, "heads", None),
        ("batch", None, "kv_heads", None),
        ("batch", None, "kv_heads", None),
        ("batch", None),
        ("batch", None),
    ),
    results=("batch", None, "heads", None),
    shardable=frozenset({"batch", "heads", "kv_heads"}),
    aligned=(("heads", "kv_heads"),),
)


@op(DIMS)
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """``softmax(mask(cap(scale * q k^T))) v`` per head, grouped queries included.

    Args:
      query: [B, T, H, K].
      key: [B, S, G, K], where G divides H: head h reads key head h // (H / G).
      value: [B, S, G, V].
      query_segments, key_segments: int32 [B, T] and [B, S]; a query sees only keys of its own
        segment. Both or neither.
      scale: factor on the scores, usually K ** -0.5.
      causal: query t sees keys 0..t (needs T == S).
      window: query t sees keys t - window + 1 .. t (needs causal).
      softcap: scores become ``softcap * tanh(scores / softcap)``.

    Returns:
      [B, T, H, V] in query's dtype. Scores, softmax and accumulation are float32. A row that
      sees no key is a mean of values: finite, without meaning.

    Raises:
      ValueError: shapes that do not fit together.
    """
    b, t, h, k = query.shape
    s, g = key.shape[1:3]
    if key.shape != (b, s, g, k) or value.shape[:3] != (b, s, g):
        raise ValueError(
            f"attention: key {key.shape} and value {value.shape} must be [B, S, G, K] and "
            f"[B, S, G, V] with B={b} and K={k} of query {query.shape}"
        )
    if h % g:
        raise ValueError(f"attention: {h} query heads do not divide by {g} key heads")
    if causal and t != s:
        raise ValueError(f"attention: causal needs as many keys as queries, not {s} and {t}")
    if window is not None and not causal:
        raise ValueError("attention: a window needs causal=True")
    if (query_segments is None) != (key_segments is None):
        raise ValueError("attention: give segments for both queries and keys, or for neither")
    return xla.attention(
        query, key, value, query_segments, key_segments,
        scale=scale, causal=causal, window=window, softcap=softcap,
    )
