"""Softmax attention over a whole (packed) sequence.

Why it is an op: the scores are T x T, and writing them to memory costs traffic and space quadratic
in T. Here they exist a tile at a time, forward and backward, and none is kept between the two.
Forward floor: 2 H T S (K + V) FLOPs, half of it where causal, and one read of q, k, v; backward
2.5 times that.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.dims import Dims
from pallas_kernels.dispatch import op

# The score of a pair that the mask forbids, and the maximum of a row that sees nothing.
MASKED = -1e30

_ROWS = ("batch", None, "heads")


def _results(options):
    return (_ROWS, _ROWS, (*_ROWS, None)) if options.get("partial") else (*_ROWS, None)


DIMS = Dims(
    operands=(
        ("batch", None, "heads", None),
        ("batch", None, "kv_heads", None),
        ("batch", None, "kv_heads", None),
        ("batch", None),
        ("batch", None),
        (None, None),
    ),
    results=_results,
    shardable=frozenset({"batch", "heads", "kv_heads"}),
    aligned=(("heads", "kv_heads"),),
)


@op(DIMS, cpu=("xla",), tpu=("tpu", "splash", "xla"), gpu=("cudnn", "gpu", "xla"))
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    block_mask: jax.Array | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    partial: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array, jax.Array]:
    """``softmax(mask(cap(scale * q k^T))) v`` per head, grouped queries included.

    The softmax is taken tile by tile with a running maximum (Milakov and Gimelshein,
    arXiv:1805.02867; FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2).

    Args:
      query: [B, T, H, K]; differentiable.
      key: [B, S, G, K], where G divides H: head h reads key head h // (H / G); differentiable.
      value: [B, S, G, V]; differentiable.
      query_segments, key_segments: int32 [B, T] and [B, S]; a query sees only keys of its own
        segment. Both or neither.
      block_mask: bool [NQ, NK], where NQ divides T and NK divides S: the T / NQ queries of a
        block see the S / NK keys of those blocks where it is true, if the other masks let them.
      scale: factor on the scores, usually K ** -0.5.
      causal: query t sees keys 0..t (needs T == S).
      window: query t sees keys t - window + 1 .. t (needs causal).
      softcap: scores become ``softcap * tanh(scores / softcap)``.
      partial: return the parts of the softmax instead, for `merge`.

    Returns:
      [B, T, H, V] in query's dtype; scores, softmax and accumulation are float32. A row that sees
      no key is 0. With `partial`, float32 (m [B, T, H], l [B, T, H], o [B, T, H, V]): the largest
      score of a row, the sum of ``exp(score - m)``, and the same sum weighting the values.
      ``o / l`` is the attention; a row that sees no key has m = MASKED, l = 0 and o = 0. No
      gradient flows through m, of which no merged result depends.

    Raises:
      ValueError: shapes or options that do not fit together.
      NotImplementedError: the named implementation cannot run them.
    """
    if any(x.ndim != 4 for x in (query, key, value)):
        raise ValueError(
            f"attention: query {query.shape}, key {key.shape} and value {value.shape} must be "
            "[B, T, H, K], [B, S, G, K] and [B, S, G, V]"
        )
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
    if window is not None and (not causal or window < 1):
        raise ValueError(f"attention: window={window} must be >= 1 and needs causal=True")
    if (query_segments is None) != (key_segments is None):
        raise ValueError("attention: give segments for both queries and keys, or for neither")
    if query_segments is not None and (query_segments.shape, key_segments.shape) != (
            (b, t), (b, s)):
        raise ValueError(f"attention: segments {query_segments.shape} and {key_segments.shape} "
                         f"must be {(b, t)} and {(b, s)}")
    if query_segments is not None and not all(
            jnp.issubdtype(x.dtype, jnp.integer) for x in (query_segments, key_segments)):
        raise ValueError(f"attention: segments are {query_segments.dtype} and "
                         f"{key_segments.dtype}; they must be integers")
    if block_mask is not None and (
            block_mask.ndim != 2 or t % block_mask.shape[0] or s % block_mask.shape[1]):
        raise ValueError(f"attention: block_mask {block_mask.shape} must be [NQ, NK] where NQ "
                         f"divides {t} queries and NK divides {s} keys")
    if block_mask is not None and block_mask.dtype != bool:
        raise ValueError(f"attention: block_mask is {block_mask.dtype}; it must be bool")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap={softcap} must be > 0; None turns it off")


def merge(*parts: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The partial softmax over the union of disjoint key sets, from the parts (m, l, o) of each.

    Parts are as `attention(..., partial=True)` returns them; ``o / l`` of the result is the
    attention over all keys (0 where l is 0).
    """
    m = functools.reduce(jnp.maximum, (part[0] for part in parts))
    shrink = [jnp.exp(part[0] - m) for part in parts]
    l = sum(part[1] * a for part, a in zip(parts, shrink, strict=True))
    o = sum(part[2] * a[..., None] for part, a in zip(parts, shrink, strict=True))
    return m, l, o
