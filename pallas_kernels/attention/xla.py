"""Attention for any XLA back end: tiles of scores in loops, forward and backward.

Only tiles that the causal mask and the window let through are visited, so a causal sequence costs
half of the square and a window what it spans. Memory is linear in the length: the backward pass
makes the tiles again (FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2). On CPUs tiles are
larger where nothing is causal, and where one head's is large enough heads follow one another.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import MASKED
from pallas_kernels.attention.gradient import differentiable
from pallas_kernels.dispatch import Target, refuse_other_than_floats

# Queries and keys of a tile. A sequence of fewer is one tile, without loops or padding.
BLOCK_Q = 512
BLOCK_K = 256
# On CPUs: the most scores of a tile that stay in the cache, and the least of a key head's tile with
# which heads are taken in turn.
_CACHED, _IN_TURN = 2**20, 2**17
# On CPUs, in float32: up to this width XLA multiplies the transpose of a tile faster from the right
# (a backward pass at width 12 takes 0.6 times as long, at 64 more; bfloat16 fails there, jax 0.10).
_NARROW = 32
# And products are as fast for so many columns as for fewer: one more, of ones, sums the weights.
# With fewer query rows than these the copy of the values, to add it, costs more.
_COLUMNS, _ROWS = 16, 64


def supports(target, query, key, value, *masks, **options):
    """Everything but integers."""
    return refuse_other_than_floats(query=query, key=key, value=value)


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """How T queries and S keys are cut, and which key tiles a query tile meets."""

    t: int
    s: int
    bq: int
    bk: int
    causal: bool
    window: int | None

    @property
    def nq(self) -> int:
        return -(-self.t // self.bq)

    @property
    def nk(self) -> int:
        return -(-self.s // self.bk)

    def keys(self, i):
        """(first, first that only a mask cuts, end) of query tile i's key tiles."""
        first, last = i * self.bq, i * self.bq + self.bq - 1
        start = 0
        if self.window is not None:
            start = lax.max(first - self.window + 1, 0) // self.bk
        end = lax.min(last // self.bk + 1, self.nk) if self.causal else self.nk
        # Tiles before `whole` lie under the diagonal and inside the sequence.
        whole = first // self.bk if self.causal else self.s // self.bk
        return start, whole if self.window is None else start, end

    def queries(self, j):
        """(first, end) of key tile j's query tiles."""
        first, last = j * self.bk, j * self.bk + self.bk - 1
        start = first // self.bq if self.causal else 0
        end = self.nq
        if self.window is not None:
            end = lax.min((last + self.window - 1) // self.bq + 1, self.nq)
        return start, end


def _even(block: int, length: int) -> int:
    """A tile's size near `block`, so that the tiles of `length` are filled about alike."""
    if length <= block or length % block == 0:
        return min(block, length)
    size = -(-length // -(-length // block))
    return -(-size // 8) * 8


def _split(x, blocks, size, axis_order):
    """[B, T, ...] as [blocks, B, ...], time padded; `axis_order` of [blocks, B, size, ...]."""
    short = blocks * size - x.shape[1]
    if short:
        x = jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], blocks, size, *x.shape[2:])
    return jnp.transpose(x, axis_order)


class _Problem:
    """The operands in tiles, and the mathematics of one tile."""

    def __init__(self, query, key, value, query_segments, key_segments, block_mask, *, scale,
                 causal, window, softcap, block_q, block_k, dtype):
        b, t, h, k = query.shape
        s, g = key.shape[1:3]
        self.softcap = softcap
        self.block_mask = None if block_mask is None else jnp.asarray(block_mask)
        self.shape, self.groups, self.repeat = (b, t, h, k), g, h // g
        self.tiles = _Tiles(t, s, _even(block_q, t), _even(block_k, s), causal, window)
        tiles = self.tiles
        # Scaling the queries costs less than scaling the scores; bfloat16 would round them.
        exact = query.dtype == jnp.float32 or math.frexp(scale)[0] == 0.5
        self.query_scale, self.scale = (scale, 1.0) if exact else (1.0, scale)
        # [nq, B, G, R * bq, K]: the rows of one key head lie together.
        self.q = self.rows(query * self.query_scale if exact else query)
        self.k = _split(key, tiles.nk, tiles.bk, (1, 0, 3, 2, 4))
        self.v = _split(value, tiles.nk, tiles.bk, (1, 0, 3, 2, 4))
        self.segments = None
        if query_segments is not None:
            self.segments = (_split(query_segments, tiles.nq, tiles.bq, (1, 0, 2)),
                             _split(key_segments, tiles.nk, tiles.bk, (1, 0, 2)))
        # Whether interior tiles are masked by more than their place.
        self.by_data = self.segments is not None or block_mask is not None

    def rows(self, x):
        """[B, T, H, ...] as [nq, B, G, R * bq, ...]."""
        b, t = x.shape[:2]
        x = x.reshape(b, t, self.groups, self.repeat, *x.shape[3:])
        rest = tuple(range(5, x.ndim + 1))
        x = _split(x, self.tiles.nq, self.tiles.bq, (1, 0, 3, 4, 2, *rest))
        return x.reshape(*x.shape[:3], -1, *x.shape[5:])

    def unrows(self, x):
        """The inverse of `rows`."""
        nq, b, g = x.shape[:3]
        x = x.reshape(nq, b, g, self.repeat, self.tiles.bq, *x.shape[4:])
        rest = tuple(range(5, x.ndim))
        x = jnp.transpose(x, (1, 0, 4, 2, 3, *rest))
        x = x.reshape(b, nq * self.tiles.bq, g * self.repeat, *x.shape[5:])
        return x[:, : self.tiles.t]

    def seen(self, i, j, *, by_place):
        """bool, broadcastable to [B, G, R, bq, bk]: which pairs of a tile the masks let through."""
        tiles = self.tiles
        queries = i * tiles.bq + lax.broadcasted_iota(jnp.int32, (tiles.bq, tiles.bk), 0)
        keys = j * tiles.bk + lax.broadcasted_iota(jnp.int32, (tiles.bq, tiles.bk), 1)
        masks = []
        if by_place:
            if tiles.causal:
                masks.append(keys <= queries)
            elif tiles.s % tiles.bk:
                masks.append(keys < tiles.s)
            if tiles.window is not None:
                masks.append(queries - keys < tiles.window)
        if self.segments is not None:
            one, other = self.segments
            masks.append((one[i][:, :, None] == other[j][:, None, :])[:, None, None])
        if self.block_mask is not None:
            nq, nk = self.block_mask.shape
            masks.append(self.block_mask[jnp.minimum(queries // (tiles.t // nq), nq - 1),
                                         jnp.minimum(keys // (tiles.s // nk), nk - 1)])
        return functools.reduce(jnp.logical_and, masks) if masks else None

    def mask(self, x, seen, fill):
        """`x` [B, G, R * bq, bk] where `seen`, else `fill`."""
        if seen is None:
            return x
        full = x.reshape(*x.shape[:2], self.repeat, self.tiles.bq, self.tiles.bk)
        return jnp.where(seen, full, fill).reshape(x.shape)

    def scores(self, q, j):
        scores = jnp.einsum("bgnk,bgsk->bgns", q, self.k[j], preferred_element_type=jnp.float32)
        scores = scores if self.scale == 1.0 else scores * self.scale
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)


def _forward(query, key, value, *masks, dtype, on_cpu, **options):
    width = value.shape[-1]
    sum_in_product = (on_cpu and width < _NARROW and width % _COLUMNS != 0
                      and query.shape[1] >= _ROWS)
    if sum_in_product:
        ones = jnp.ones((*value.shape[:-1], 1), value.dtype)
        value = jnp.concatenate([value, ones], axis=-1)
        value = jnp.pad(value, [(0, 0)] * 3 + [(0, -(width + 1) % _COLUMNS)])
    problem = _Problem(query, key, value, *masks, dtype=dtype, **options)
    tiles = problem.tiles

    def row(i):
        q = problem.q[i]

        def visit(j, carry, *, by_place):
            scores = problem.scores(q, j)
            seen = problem.seen(i, j, by_place=by_place)
            scores = problem.mask(scores, seen, MASKED)
            new = jnp.max(scores, axis=-1, initial=MASKED)
            if carry is not None:
                new = jnp.maximum(carry[0], new)
            weights = jnp.exp(scores - new[..., None])
            if seen is not None and problem.by_data:
                # Where a row has seen nothing yet, exp(MASKED - MASKED) is 1.
                weights = problem.mask(weights, seen, 0.0)
            o = jnp.einsum("bgns,bgsv->bgnv", weights.astype(problem.v.dtype), problem.v[j],
                           preferred_element_type=jnp.float32)
            sums = (o,) if sum_in_product else (o, jnp.sum(weights, axis=-1, keepdims=True))
            if carry is None:
                return new, sums
            shrink = jnp.exp(carry[0] - new)[..., None]
            return new, jax.tree.map(lambda old, x: old * shrink + x, carry[1], sums)

        inside = functools.partial(visit, by_place=False)
        edge = functools.partial(visit, by_place=True)
        if tiles.nk == 1:
            m, (o, *l) = edge(0, None)
        else:
            columns = (problem.v.shape[-1],) if sum_in_product else (width, 1)
            carry = (jnp.full(q.shape[:-1], MASKED, jnp.float32),
                     tuple(jnp.zeros((*q.shape[:-1], n), jnp.float32) for n in columns))
            start, whole, end = tiles.keys(i)
            m, (o, *l) = lax.fori_loop(whole, end, edge, lax.fori_loop(start, whole, inside, carry))
        l = l[0] if l else o[..., width : width + 1]
        o = o[..., :width] / jnp.where(l > 0, l, 1.0)
        return o.astype(dtype), m, l[..., 0]

    if tiles.nq == 1:
        o, m, l = jax.tree.map(lambda x: x[None], row(0))
    else:
        o, m, l = lax.map(row, jnp.arange(tiles.nq))
    return problem.unrows(o), problem.unrows(m), problem.unrows(l)


def _backward(*operands_and_rows, dtype, on_cpu, **options):
    *operands, lse, delta, d_o = operands_and_rows
    problem = _Problem(*operands, dtype=dtype, **options)
    tiles, kind = problem.tiles, operands[1].dtype
    lse, delta, d_o = problem.rows(lse), problem.rows(delta), problem.rows(d_o.astype(kind))
    d_q = jnp.zeros(problem.q.shape, jnp.float32)

    def over_queries(x):
        """(i, tile [B, G, R * bq, bk]) -> the product of its transpose and x[i], [B, G, bk, D]."""
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        if not on_cpu or x.shape[-1] > _NARROW:
            return lambda i, tile: product("bgns,bgnd->bgsd", tile, x[i])
        x = jnp.swapaxes(x, -1, -2)
        return lambda i, tile: jnp.swapaxes(product("bgdn,bgns->bgds", x[i], tile), -1, -2)

    with_q, with_d_o = over_queries(problem.q), over_queries(d_o)

    def column(d_q, j):
        def visit(i, carry):
            d_q, d_k, d_v = carry
            q, upstream = problem.q[i], d_o[i]
            scores = problem.scores(q, j)
            weights = jnp.exp(scores - lse[i][..., None])
            weights = problem.mask(weights, problem.seen(i, j, by_place=True), 0.0)
            d_v += with_d_o(i, weights.astype(kind))
            d_weights = jnp.einsum("bgnv,bgsv->bgns", upstream, problem.v[j],
                                   preferred_element_type=jnp.float32)
            d_scores = weights * (d_weights - delta[i][..., None])
            if problem.scale != 1.0:
                d_scores *= problem.scale
            if problem.softcap is not None:
                d_scores *= 1.0 - (scores / problem.softcap) ** 2
            d_scores = d_scores.astype(kind)
            d_k += with_q(i, d_scores)
            new = jnp.einsum("bgns,bgsk->bgnk", d_scores, problem.k[j],
                             preferred_element_type=jnp.float32)
            d_q = lax.dynamic_update_index_in_dim(
                d_q, lax.dynamic_index_in_dim(d_q, i, 0, False) + new, i, 0)
            return d_q, d_k, d_v

        carry = (d_q, jnp.zeros(problem.k.shape[1:], jnp.float32),
                 jnp.zeros(problem.v.shape[1:], jnp.float32))
        start, end = tiles.queries(j)
        if tiles.nq == 1:
            d_q, d_k, d_v = visit(0, carry)
        else:
            d_q, d_k, d_v = lax.fori_loop(start, end, visit, carry)
        return d_q, (d_k.astype(kind), d_v.astype(kind))

    if tiles.nk == 1:
        d_q, new = column(d_q, 0)
        d_k, d_v = jax.tree.map(lambda x: x[None], new)
    else:
        d_q, (d_k, d_v) = lax.scan(column, d_q, jnp.arange(tiles.nk))

    def join(x):
        """[nk, B, G, bk, D] as [B, S, G, D]."""
        x = jnp.transpose(x, (1, 0, 3, 2, 4))
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : tiles.s]

    d_q = problem.unrows(d_q) * problem.query_scale
    return d_q.astype(operands[0].dtype), join(d_k), join(d_v)


def _in_turn(run):
    """`run` for one key head after another where `in_turn`, else for all at once."""
    def by_heads(*operands, in_turn, **options):
        if not in_turn:
            return run(*operands, **options)
        query, key, value, query_segments, key_segments, block_mask, *rows = operands
        b, g = key.shape[0], key.shape[2]

        def cut(x):
            """[B, T, H, ...] as [B * G, 1, T, H / G, ...]."""
            x = jnp.moveaxis(x.reshape(*x.shape[:2], g, -1, *x.shape[3:]), 2, 1)
            return x.reshape(-1, 1, *x.shape[2:])

        def join(x):
            """The inverse."""
            x = jnp.moveaxis(x.reshape(b, g, *x.shape[2:]), 1, 2)
            return x.reshape(*x.shape[:2], -1, *x.shape[4:])

        segments = jax.tree.map(lambda x: jnp.repeat(x, g, axis=0)[:, None],
                                [query_segments, key_segments])

        def turn(parts):
            (query, key, value, *rows), segments = parts
            return run(query, key, value, *segments, block_mask, *rows, **options)

        return jax.tree.map(join, lax.map(turn, (
            [cut(x) for x in (query, key, value, *rows)], segments)))

    return by_heads


_attention = differentiable(_in_turn(_forward), _in_turn(_backward))


def attention(*operands, causal, block_q=None, block_k=None, **options):
    """See `pallas_kernels.attention.attention`.

    Where no tiles are given they are of `BLOCK_Q` and `BLOCK_K`. On CPUs they are larger if nothing
    is causal and a tile of all heads, or of the one whose turn it is, stays in the cache; under a
    diagonal smaller ones save more than they cost.
    """
    (b, t, h, _), (_, s, g, _) = (x.shape for x in operands[:2])
    in_turn, on_cpu = False, Target.ambient().platform == "cpu"
    if not causal and block_q is None and block_k is None and on_cpu:
        per_pair, tile = h // g, (t, s)
        if t * s * per_pair > _CACHED:
            rows = min(t, BLOCK_Q)
            tile = rows, min(s, max(BLOCK_K, _CACHED // (rows * per_pair)))
        scores = math.prod(tile) * per_pair
        in_turn = scores >= _IN_TURN
        # A batch of unknown size is exported for any.
        if in_turn or (isinstance(b, int) and b * g * scores <= _CACHED):
            block_q, block_k = tile
    return _attention(*operands, causal=causal, block_q=block_q or BLOCK_Q,
                      block_k=block_k or BLOCK_K, in_turn=in_turn,
                      on_cpu=on_cpu and all(x.dtype == jnp.float32 for x in operands[:3]),
                      **options)
