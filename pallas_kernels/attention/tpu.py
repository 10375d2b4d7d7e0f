"""Attention for TPUs: Pallas Mosaic kernels, forward and backward.

Why: scores, weights and their gradients exist only as tiles in VMEM, so that a pass reads q, k and
v and writes o, where XLA moves every T x S tile through HBM several times. Floor, for P visible
pairs: forward T H (K + V) + S G (K + V) elements of HBM and 2 P H (K + V) FLOPs; backward twice the
elements and 2 P H (4 K + 3 V) FLOPs, as each of its two kernels makes the scores again. The matrix
and vector units limit it long before HBM does.

How it differs from a textbook kernel:

- Heads stay where the projections leave them, side by side on the lanes of [B, T, H * K]; a tile is
  a slice of lanes, so nothing is transposed in HBM. A head of 64 lanes shares its 128 with its
  neighbour: two key heads are one operand, whose query rows are zero on the lanes of the other.
- The query heads of a key head are stacked as rows of one tile, so that k and v are read once.
- The grid runs over a list of (query tile, key tile) visits in SMEM, which holds no tile that the
  causal mask, the window or a block mask empties. Whether segments empty a tile, or let all of it
  through, is decided by their ranges at run time.
- Row statistics and segment ids lie on lanes in HBM, where a column would fill 128 of them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import MASKED
from pallas_kernels.attention.gradient import differentiable

LANES = 128

# Rows (queries times heads) and keys of a tile, at most, in bfloat16. The compiler's schedule for a
# v5e gives a tile of 1024 x 1024 0.71 (forward), 0.76 and 0.81 of the cycles of four of 512 x 512.
# In float32 a product is six passes, so that half suffices; more takes minutes to compile.
BLOCK = 1024

# Of VMEM, which every chip since v5e has 64 MiB and more of; and of one operand's tile.
_VMEM_BYTES = 56 << 20
_TILE_BYTES = 1 << 20

# A visit is one int32: query tile, key tile, flags.
_TILE_BITS = 13
_FIRST, _LAST, _RUN, _EDGE = (1 << (2 * _TILE_BITS + n) for n in range(4))
# What SMEM holds besides the rest.
_MAX_VISITS = 1 << 17

# Above the score of a masked pair and below any other, so that exp(score - maximum) of a masked
# pair is 0 even where a row has seen nothing yet.
_LOWEST = 0.5 * MASKED
_LOG2_E = math.log2(math.e)


def supports(target, query, key, value, query_segments=None, key_segments=None, block_mask=None,
             **options):
    """float32 or bfloat16 alike, a positive scale, and mask blocks that tiles can divide."""
    if target.chip == "v4":
        return "v4 has 16 MiB of vector memory, and its tiles are for chips with 64 and more"
    dtypes = {jnp.dtype(x.dtype) for x in (query, key, value)}
    if len(dtypes) > 1 or dtypes - {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        names = ", ".join(sorted(str(d) for d in dtypes))
        return f"operands of {names} must be float32 or bfloat16 alike"
    if not options["scale"] > 0:
        return f"scale={options['scale']} must be positive"
    if block_mask is not None:
        lengths = query.shape[1], key.shape[1]
        for name, n, blocks in zip(("queries", "keys"), lengths, block_mask.shape, strict=True):
            if blocks > 1 and n // blocks % LANES:
                return (f"blocks of {n // blocks} {name} in block_mask must be a multiple of "
                        f"{LANES}")
    plan = _plan(query, key, value, block_mask, causal=options["causal"],
                 window=options["window"])
    if plan.lanes_k + plan.lanes_v > 2048:
        return f"heads of {plan.k} and {plan.v} must fit 2048 lanes together"
    if max(plan.nq, plan.nk) > 1 << _TILE_BITS or plan.visits().shape[1] > _MAX_VISITS:
        return (f"{plan.t} queries and {plan.s} keys make more than {_MAX_VISITS} tiles of "
                f"{plan.bq} x {plan.bk}")
    return None


def candidates(query, key, value, query_segments=None, key_segments=None, block_mask=None,
               **options):
    """Tile sizes worth timing, each of which gives other tiles."""
    found = {}
    for block_k in (512, 1024, 2048, 256):
        for block_rows in (1024, 512, 2048):
            if block_rows * block_k > _block(query) ** 2:
                continue
            plan = _plan(query, key, value, block_mask, causal=options["causal"],
                         window=options["window"], block_rows=block_rows, block_k=block_k)
            found.setdefault((plan.bq, plan.bk, plan.heads),
                             {"block_rows": block_rows, "block_k": block_k})
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How heads and lengths are cut into tiles.

    Attributes:
      b, t, s, h, g, k, v: the op's sizes.
      packed: whether two heads of 64 share 128 lanes.
      heads: query heads whose rows are stacked into one tile.
      bq, bk: queries of a head, and keys, of a tile.
    """

    b: int
    t: int
    s: int
    h: int
    g: int
    k: int
    v: int
    packed: bool
    heads: int
    bq: int
    bk: int
    causal: bool
    window: int | None

    @property
    def rows(self) -> int:
        return self.heads * self.bq

    @property
    def nq(self) -> int:
        return -(-self.t // self.bq)

    @property
    def nk(self) -> int:
        return -(-self.s // self.bk)

    @property
    def lanes_k(self) -> int:
        """Lanes of a query or key tile's operand: one padded head, or a packed pair."""
        return LANES if self.packed else _round_up(self.k, LANES)

    @property
    def lanes_v(self) -> int:
        return LANES if self.packed else _round_up(self.v, LANES)

    @property
    def head_tiles(self) -> int:
        """Tiles that the query heads make."""
        return self.h // self.heads

    @property
    def key_tiles(self) -> int:
        """Tiles that the key heads make."""
        return self.g // 2 if self.packed else self.g

    @property
    def shared(self) -> int:
        """Head tiles that share a key tile."""
        return self.head_tiles // self.key_tiles

    @property
    def stacked(self) -> bool:
        return self.heads > 1

    @property
    def has_edges(self) -> bool:
        """Whether a pair's place may hide it from a tile that runs."""
        return self.causal or self.s % self.bk > 0

    def visits(self) -> np.ndarray:
        """int [3, N]: the query tile, the key tile, and whether a mask cuts through the pair."""
        i, j = (x.ravel() for x in np.meshgrid(np.arange(self.nq), np.arange(self.nk),
                                               indexing="ij"))
        oldest = i * self.bq - (j * self.bk + self.bk - 1)
        newest = i * self.bq + self.bq - 1 - j * self.bk
        live = np.ones(i.shape, bool)
        edge = np.zeros(i.shape, bool)
        if self.causal:
            live &= newest >= 0
            edge |= oldest < 0
        else:
            edge |= j * self.bk + self.bk > self.s
        if self.window is not None:
            live &= oldest < self.window
            edge |= newest >= self.window
        return np.stack((i, j, edge))[:, live]

    def schedule(self, block_mask, *, by_key: bool):
        """int32 [N]: the visits, those of one query tile (or key tile) in turn."""
        i, j, edge = self.visits()
        if by_key:
            order = np.argsort(j, kind="stable")
            i, j, edge = i[order], j[order], edge[order]
        starts = np.diff(j if by_key else i, prepend=-1) != 0
        words = i | j << _TILE_BITS | edge * _EDGE
        if block_mask is None:
            ends = np.roll(starts, -1)
            return (words | starts * _FIRST | ends * _LAST | _RUN).astype(np.int32)
        # The tiles that the mask lets through come first; every tile keeps one visit, to be
        # written at all. The rest repeats the last visit and so moves and computes nothing.
        nq, nk = block_mask.shape
        run = block_mask[i * self.bq * nq // self.t, j * self.bk * nk // self.s]
        keep = run | starts
        count = jnp.sum(keep)
        place = np.arange(len(words))
        order = jnp.argsort(~keep, stable=True)[jnp.minimum(place, count - 1)]
        used = place < count
        starts = jnp.asarray(starts)[order] & used
        ends = (jnp.roll(starts, -1) | (place == count - 1)) & used
        run = run[order] & used
        words = jnp.asarray(words.astype(np.int32))[order]
        return words | starts * _FIRST | ends * _LAST | run * _RUN

    def flat(self, x, tile: int):
        """[B, T, heads, K] as [B, T, heads * lanes], padded to whole tiles and lanes."""
        b, t, heads, width = x.shape
        lanes = width if self.packed else _round_up(width, LANES)
        x = _pad(x, (0, _round_up(t, tile) - t, 0, lanes - width))
        return x.reshape(b, x.shape[1], heads * lanes)

    def unflat(self, x, t: int, width: int):
        """The inverse of `flat`."""
        lanes = width if self.packed else _round_up(width, LANES)
        return x.reshape(*x.shape[:2], -1, lanes)[:, :t, :, :width]

    def on_lanes(self, x):
        """Row statistics [B, T, H] as [B, head tiles, heads, T], padded to whole tiles."""
        x = jnp.swapaxes(_pad(x, (0, self.nq * self.bq - self.t, 0)), 1, 2)
        return x.reshape(self.b, self.head_tiles, self.heads, -1)

    def off_lanes(self, x):
        """The inverse of `on_lanes`."""
        return jnp.swapaxes(x.reshape(self.b, self.h, -1), 1, 2)[:, : self.t]

    def stack(self, x):
        """A tile [bq, heads * lanes] as rows [heads * bq, lanes]."""
        if not self.packed:
            lanes = x.shape[1] // self.heads
            return _concatenate([x[:, n * lanes:(n + 1) * lanes] for n in range(self.heads)], 0)
        low = _low_half((self.bq, LANES))
        rows = []
        for n in range(self.heads):
            own, there = n % 2, 2 * n // self.heads
            pair = x[:, n // 2 * LANES:(n // 2 + 1) * LANES]
            pair = pair if own == there else _swap_halves(pair)
            rows.append(jnp.where(low == (there == 0), pair, 0))
        return _concatenate(rows, 0)

    def unstack(self, x):
        """The inverse of `stack`, for rows whose other half may hold anything."""
        parts = [x[n * self.bq:(n + 1) * self.bq] for n in range(self.heads)]
        if self.packed:
            halves = [part if n % 2 == 2 * n // self.heads else _swap_halves(part)
                      for n, part in enumerate(parts)]
            low = _low_half((self.bq, LANES))
            parts = [jnp.where(low, a, b) for a, b in zip(halves[::2], halves[1::2], strict=True)]
        return _concatenate(parts, 1)


def _block(query) -> int:
    return BLOCK * 2 // query.dtype.itemsize


def _plan(query, key, value, block_mask, *, causal, window, block_rows=None, block_k=None
          ) -> _Plan:
    b, t, h, k = query.shape
    s, g, v = value.shape[1:]
    repeat = h // g
    # VMEM holds some ten tiles of operands, their copies and sums.
    widest = query.dtype.itemsize * _round_up(max(k, v), LANES)
    block_rows, block_k = (min(n or _block(query), _TILE_BYTES // widest)
                           for n in (block_rows, block_k))
    # A packed pair stacks the rows of two key heads, which must not be too many.
    packed = k == v == LANES // 2 and g % 2 == 0 and repeat <= 8
    if packed:
        heads = 2 * repeat
    else:
        heads = max(n for n in range(1, repeat + 1)
                    if repeat % n == 0 and n <= max(1, block_rows // LANES))
    most_q, most_k = max(block_rows // heads, LANES), max(block_k, LANES)
    if window is not None:
        # Larger tiles would mostly lie outside a short window.
        reach = max(_round_up(window, LANES), 2 * LANES)
        most_q, most_k = min(most_q, reach), min(most_k, reach)
    nq, nk = (1, 1) if block_mask is None else block_mask.shape
    return _Plan(b, t, s, h, g, k, v, packed, heads, _tile(t, nq, most_q), _tile(s, nk, most_k),
                 causal, window)


def _tile(length: int, blocks: int, most: int) -> int:
    """The tile size up to `most` that leaves little padding; a divisor of a mask's block."""
    if blocks > 1:
        size = length // blocks
        return max(n for n in range(LANES, size + 1, LANES) if size % n == 0 and n <= most)
    most = most // LANES * LANES
    return _round_up(-(-length // -(-length // most)), LANES)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _pad(x, after, **mode):
    return jnp.pad(x, [(0, n) for n in after], **mode) if any(after) else x


def _concatenate(parts, axis):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _low_half(shape):
    return lax.broadcasted_iota(jnp.int32, shape, 1) < LANES // 2


def _swap_halves(x):
    # Rotations are of 32-bit lanes.
    return pltpu.roll(x.astype(jnp.float32), LANES // 2, 1).astype(x.dtype)


def _dot(a, b, contract):
    # By default the MXU rounds float32 operands to bfloat16.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision,
                           preferred_element_type=jnp.float32)


_NN, _NT = ((1,), (0,)), ((1,), (1,))


def _wide(x, lanes):
    """A statistic [rows, LANES], the same on all lanes, on `lanes` of them."""
    return x if lanes == LANES else jnp.tile(x, (1, lanes // LANES))


def _column(x):
    """[1, n] on lanes as [n, LANES], the same on all of them."""
    return jnp.broadcast_to(x.T, (x.shape[1], LANES))


class _Step:
    """What a kernel does at its place of the grid, and the scores of a tile.

    Attributes:
      first, last: whether this is the first or last visit of the tile that is being summed.
    """

    def __init__(self, plan, scalars, segments, *, scale, softcap):
        self.plan, self.segments = plan, segments
        # Scores are kept in units of `unit`: raw products, or tanh where they are capped.
        self.softcap, self.inner = softcap, None if softcap is None else scale / softcap
        self.unit = scale if softcap is None else softcap
        word = scalars[0][pl.program_id(2)]
        self.i, self.j = _tiles_of(word)
        self.first, self.last = word & _FIRST != 0, word & _LAST != 0
        run, masked = word & _RUN != 0, word & _EDGE != 0
        if segments:
            low_q, high_q, low_k, high_k = scalars[1:]
            i, j = (pl.program_id(0) * n + x for n, x in ((plan.nq, self.i), (plan.nk, self.j)))
            low, high = lax.min(low_q[i], low_k[j]), lax.max(high_q[i], high_k[j])
            run &= (low_q[i] <= high_k[j]) & (low_k[j] <= high_q[i])
            masked |= low != high
        self._clean, self._masked = run & ~masked, run & masked

    def visit(self, tile):
        """Runs ``tile(masked)`` once, unmasked where every pair is visible, if any is."""
        pl.when(self._clean)(functools.partial(tile, False))
        if self.segments or self.plan.has_edges:
            pl.when(self._masked)(functools.partial(tile, True))

    def scores(self, a, b):
        x = _dot(a, b, _NT)
        return x if self.softcap is None else jnp.tanh(x * self.inner)

    def _seen(self, queries_on):
        """bool [bq, bk], or [bk, bq] where `queries_on` is 1: which pairs are visible."""
        plan = self.plan
        shape = (plan.bq, plan.bk) if queries_on == 0 else (plan.bk, plan.bq)
        queries = self.i * plan.bq + lax.broadcasted_iota(jnp.int32, shape, queries_on)
        keys = self.j * plan.bk + lax.broadcasted_iota(jnp.int32, shape, 1 - queries_on)
        masks = []
        if plan.causal:
            masks.append(keys <= queries)
        elif plan.s % plan.bk:
            masks.append(keys < plan.s)
        if plan.window is not None:
            masks.append(queries - keys < plan.window)
        if self.segments:
            of_queries, of_keys = (ref[...] for ref in self.segments)
            if queries_on == 0:
                of_queries = of_queries.T
            else:
                of_keys = of_keys.T
            masks.append(of_queries == of_keys)
        return functools.reduce(jnp.logical_and, masks)

    def mask(self, x, queries_on):
        """Scores whose axis `queries_on` is that of the stacked rows; MASKED where not visible."""
        seen, bq = self._seen(queries_on), self.plan.bq
        parts = [lax.slice_in_dim(x, n * bq, (n + 1) * bq, axis=queries_on)
                 for n in range(self.plan.heads)]
        return _concatenate([jnp.where(seen, part, MASKED) for part in parts], queries_on)


def _tiles_of(word):
    low = (1 << _TILE_BITS) - 1
    return word & low, (word >> _TILE_BITS) & low


def _unpack(plan, refs, segmented):
    """The scalars, the segments' references, and the rest."""
    scalars, segments = (5, 2) if segmented else (1, 0)
    return refs[:scalars], refs[scalars:scalars + segments], refs[scalars + segments:]


def _rows(plan, ref, stacked_ref, first):
    """A query-sided tile as rows; `stacked_ref` keeps them over the visits of a query tile."""
    if not plan.stacked:
        return lambda: ref[...]

    @pl.when(first)
    def _():
        stacked_ref[...] = plan.stack(ref[...])

    return lambda: stacked_ref[...]


def _forward_kernel(*refs, plan, segmented, **scoring):
    scalars, segments, refs = _unpack(plan, refs, segmented)
    q_ref, k_ref, v_ref, o_ref, m_out, l_out, m_ref, l_ref, acc_ref, *stacked = refs
    step = _Step(plan, scalars, segments, **scoring)

    @pl.when(step.first)
    def _():
        m_ref[...] = jnp.full_like(m_ref, _LOWEST)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    q = _rows(plan, q_ref, *stacked or (None,), step.first)
    to_base_2 = step.unit * _LOG2_E

    @step.visit
    def _(masked):
        x = step.scores(q(), k_ref[...])
        if masked:
            x = step.mask(x, 0)
        old = m_ref[...]
        new = jnp.maximum(old, jnp.max(x, axis=1, keepdims=True))
        weights = jnp.exp2((x - _wide(new, plan.bk)) * to_base_2)
        shrink = jnp.exp2((old - new) * to_base_2)
        m_ref[...] = new
        # Sums stay spread over the lanes until the last visit.
        parts = [weights[:, n:n + LANES] for n in range(0, plan.bk, LANES)]
        l_ref[...] = l_ref[...] * shrink + functools.reduce(jnp.add, parts)
        acc_ref[...] = acc_ref[...] * _wide(shrink, plan.lanes_v) + _dot(
            weights.astype(v_ref.dtype), v_ref[...], _NN)

    @pl.when(step.last)
    def _():
        total = jnp.sum(l_ref[...], axis=1, keepdims=True)
        seen = total > 0
        o = acc_ref[...] * jnp.where(seen, 1.0 / jnp.where(seen, total, 1.0), 0.0)
        o_ref[...] = plan.unstack(o).astype(o_ref.dtype)
        m = jnp.where(seen, m_ref[:, :1] * step.unit, MASKED)
        for n in range(plan.heads):
            rows = slice(n * plan.bq, (n + 1) * plan.bq)
            m_out[n:n + 1, :], l_out[n:n + 1, :] = m[rows].T, total[rows].T


def _d_query_kernel(*refs, plan, segmented, **scoring):
    scalars, segments, refs = _unpack(plan, refs, segmented)
    (q_ref, k_ref, v_ref, lse_row, delta_row, d_o_ref, d_q_ref, lse_ref, delta_ref, acc_ref,
     *stacked) = refs
    step = _Step(plan, scalars, segments, **scoring)

    @pl.when(step.first)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        for n in range(plan.heads):
            rows = slice(n * plan.bq, (n + 1) * plan.bq)
            lse_ref[rows, :] = _column(lse_row[n:n + 1, :] * _LOG2_E)
            delta_ref[rows, :] = _column(delta_row[n:n + 1, :])

    q_stacked, d_o_stacked = stacked or (None, None)
    q = _rows(plan, q_ref, q_stacked, step.first)
    d_o = _rows(plan, d_o_ref, d_o_stacked, step.first)

    @step.visit
    def _(masked):
        x = step.scores(q(), k_ref[...])
        shown = step.mask(x, 0) if masked else x
        weights = jnp.exp2(shown * (step.unit * _LOG2_E) - _wide(lse_ref[...], plan.bk))
        d_weights = _dot(d_o(), v_ref[...], _NT)
        d_x = weights * (d_weights - _wide(delta_ref[...], plan.bk))
        if step.softcap is not None:
            d_x *= 1.0 - x * x
        acc_ref[...] += _dot(d_x.astype(k_ref.dtype), k_ref[...], _NN)

    @pl.when(step.last)
    def _():
        d_q_ref[...] = plan.unstack(acc_ref[...] * scoring["scale"]).astype(d_q_ref.dtype)


def _d_key_kernel(*refs, plan, segmented, **scoring):
    scalars, segments, refs = _unpack(plan, refs, segmented)
    (q_ref, k_ref, v_ref, lse_row, delta_row, d_o_ref, d_k_ref, d_v_ref, d_k_acc, d_v_acc) = refs
    step = _Step(plan, scalars, segments, **scoring)
    sharer = pl.program_id(3)

    @pl.when(step.first & (sharer == 0))
    def _():
        d_k_acc[...] = jnp.zeros_like(d_k_acc)
        d_v_acc[...] = jnp.zeros_like(d_v_acc)

    def on_lanes(ref):
        return _concatenate([ref[n:n + 1, :] for n in range(plan.heads)], 1)

    @step.visit
    def _(masked):
        # Transposed, [bk, rows]: statistics are used as they lie, and no weights are transposed.
        q, d_o = plan.stack(q_ref[...]), plan.stack(d_o_ref[...])
        x = step.scores(k_ref[...], q)
        shown = step.mask(x, 1) if masked else x
        weights = jnp.exp2(shown * (step.unit * _LOG2_E) - on_lanes(lse_row) * _LOG2_E)
        d_v_acc[...] += _dot(weights.astype(d_o.dtype), d_o, _NN)
        d_weights = _dot(v_ref[...], d_o, _NT)
        d_x = weights * (d_weights - on_lanes(delta_row))
        if step.softcap is not None:
            d_x *= 1.0 - x * x
        d_k_acc[...] += _dot(d_x.astype(q.dtype), q, _NN)

    @pl.when(step.last & (sharer == plan.shared - 1))
    def _():
        d_k_ref[...] = (d_k_acc[...] * scoring["scale"]).astype(d_k_ref.dtype)
        d_v_ref[...] = d_v_acc[...].astype(d_v_ref.dtype)


class _Call:
    """A kernel's operands in their layout, its blocks, and the call itself."""

    def __init__(self, query, key, value, query_segments, key_segments, block_mask, *, causal,
                 window, block_rows, block_k, by_key=False, **scoring):
        plan = self.plan = _plan(query, key, value, block_mask, causal=causal, window=window,
                                 block_rows=block_rows, block_k=block_k)
        self.scoring, self.by_key, self.kind = scoring, by_key, query.dtype
        self.operands = (plan.flat(query, plan.bq), plan.flat(key, plan.bk),
                         plan.flat(value, plan.bk))
        self.scalars = [plan.schedule(block_mask, by_key=by_key)]
        self.segments = []
        if query_segments is not None:
            # Padding must not widen the range of its tile.
            self.segments = [
                _pad(x, (0, n * tile - x.shape[1]), mode="edge")
                for x, n, tile in ((query_segments, plan.nq, plan.bq),
                                   (key_segments, plan.nk, plan.bk))]
            for x, n in zip(self.segments, (plan.nq, plan.nk), strict=True):
                x = x.reshape(plan.b * n, -1)
                self.scalars += [jnp.min(x, axis=1), jnp.max(x, axis=1)]
            self.segments = [x[:, None] for x in self.segments]

    def blocks(self):
        """Block specs of: q, k, v, o, row statistics, query segments, key segments."""
        plan = self.plan

        def spec(shape, index):
            """`index(head tile, key tile of heads, query tile, key tile)` after the batch."""
            def place(b, outer, visit, *rest):
                if self.by_key:
                    head, key_head = outer * plan.shared + rest[0], outer
                else:
                    head, key_head = outer, lax.div(outer, plan.shared)
                scalars = rest[1:] if self.by_key else rest
                return b, *index(head, key_head, *_tiles_of(scalars[0][visit]))

            return pl.BlockSpec((None, *shape), place)

        def on_queries(h, g, i, j):
            return i, h

        def on_keys(h, g, i, j):
            return j, g

        return (
            spec((plan.bq, plan.heads * plan.lanes_k if not plan.packed else
                  plan.heads // 2 * LANES), on_queries),
            spec((plan.bk, plan.lanes_k), on_keys),
            spec((plan.bk, plan.lanes_v), on_keys),
            spec((plan.bq, plan.heads * plan.lanes_v if not plan.packed else
                  plan.heads // 2 * LANES), on_queries),
            spec((None, plan.heads, plan.bq), lambda h, g, i, j: (h, 0, i)),
            spec((1, plan.bq), lambda h, g, i, j: (0, i)),
            spec((1, plan.bk), lambda h, g, i, j: (0, j)),
        )

    def __call__(self, kernel, name, products, operands, in_specs, out_specs, out_shape, scratch):
        """`products`: matrix products of a tile, as the width that each contracts or makes."""
        plan = self.plan
        *_, query_segments, key_segments = self.blocks()
        if self.segments:
            in_specs = [query_segments, key_segments, *in_specs]
        grid = (plan.b, plan.head_tiles, len(self.scalars[0]))
        semantics = ("parallel", "parallel", "arbitrary")
        if self.by_key:
            grid = (plan.b, plan.key_tiles, grid[2], plan.shared)
            semantics = (*semantics, "arbitrary")
        pairs = plan.b * plan.h * grid[2] * plan.bq * plan.bk
        tiles = plan.b * plan.head_tiles * grid[2]
        moved = tiles * plan.bk * (plan.lanes_k + plan.lanes_v) * self.kind.itemsize
        moved += sum(x.size * x.dtype.itemsize for x in (*operands, *out_shape))
        return pl.pallas_call(
            functools.partial(kernel, plan=plan, segmented=bool(self.segments), **self.scoring),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(self.scalars), grid=grid, in_specs=in_specs,
                out_specs=out_specs, scratch_shapes=scratch),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=semantics, vmem_limit_bytes=_VMEM_BYTES),
            cost_estimate=pl.CostEstimate(
                flops=2 * pairs * sum(products), bytes_accessed=moved, transcendentals=pairs),
            name=name,
        )(*self.scalars, *self.segments, *operands)


def _float(*shape):
    return pltpu.VMEM(shape, jnp.float32)


def _forward(*operands, dtype, **static):
    call = _Call(*operands, **static)
    plan = call.plan
    q, k, v, o, row, *_ = call.blocks()
    width = plan.h * (plan.v if plan.packed else plan.lanes_v)
    padded = plan.nq * plan.bq
    statistic = jax.ShapeDtypeStruct((plan.b, plan.head_tiles, plan.heads, padded), jnp.float32)
    scratch = [_float(plan.rows, LANES), _float(plan.rows, LANES), _float(plan.rows, plan.lanes_v)]
    if plan.stacked:
        scratch.append(pltpu.VMEM((plan.rows, plan.lanes_k), call.kind))
    out, largest, total = call(
        _forward_kernel, "attention", (plan.k, plan.v), call.operands, [q, k, v], [o, row, row],
        [jax.ShapeDtypeStruct((plan.b, padded, width), dtype), statistic, statistic], scratch)
    return plan.unflat(out, plan.t, plan.v), plan.off_lanes(largest), plan.off_lanes(total)


def _backward(*operands_and_rows, dtype, **static):
    *operands, lse, delta, d_o = operands_and_rows
    call = _Call(*operands, **static)
    plan = call.plan
    flat_q, flat_k, flat_v = call.operands
    inputs = (*call.operands, plan.on_lanes(lse), plan.on_lanes(delta),
              plan.flat(d_o.astype(call.kind), plan.bq))

    def like(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    q, k, v, o, row, *_ = call.blocks()
    scratch = [_float(plan.rows, LANES), _float(plan.rows, LANES), _float(plan.rows, plan.lanes_k)]
    if plan.stacked:
        scratch += [pltpu.VMEM((plan.rows, n), call.kind) for n in (plan.lanes_k, plan.lanes_v)]
    d_query, = call(_d_query_kernel, "attention_d_query", (plan.k, plan.v, plan.k), inputs,
                    [q, k, v, row, row, o], [q], [like(flat_q)], scratch)

    call = _Call(*operands, by_key=True, **static)
    q, k, v, o, row, *_ = call.blocks()
    d_key, d_value = call(
        _d_key_kernel, "attention_d_key", (plan.k, plan.v, plan.v, plan.k), inputs,
        [q, k, v, row, row, o], [k, v], [like(flat_k), like(flat_v)],
        [_float(plan.bk, plan.lanes_k), _float(plan.bk, plan.lanes_v)])
    return (plan.unflat(d_query, plan.t, plan.k), plan.unflat(d_key, plan.s, plan.k),
            plan.unflat(d_value, plan.s, plan.v))


_attention = differentiable(_forward, _backward)


def attention(*operands, block_rows=None, block_k=None, **options):
    """See `pallas_kernels.attention.attention`; tiles have `BLOCK` rows and keys by default."""
    return _attention(*operands, block_rows=block_rows, block_k=block_k, **options)
