"""FlashAttention on Hopper GPUs, forward and backward, by Mosaic GPU.

Why it exists: XLA writes every tile of scores to device memory, forward and backward; here they
live in registers (FlashAttention-2, arXiv:2307.08691; warpgroups share the work as in
FlashAttention-3, arXiv:2407.08608). HBM floor: forward one read of q, k, v and one write of o;
backward two reads of q, k, v, d_o and one write of the three gradients. FLOPs over P visible
pairs: 2 P (K + V) forward, 2 P (4 K + 3 V) backward, where the scores and d_o . v are made twice
so that no two blocks add to the same gradient (three times the scores where K + V > 256).

Each computing warpgroup keeps 64 rows of one side, and tiles of the other side stream past it:
keys past queries for o and d_query, queries past keys for d_key and d_value. One more warpgroup
issues the copies. Tiles that the masks hide are not visited.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as pg

from pallas_kernels import compat
from pallas_kernels.attention import MASKED
from pallas_kernels.attention.gradient import differentiable
from pallas_kernels.dispatch import interpreting
from pallas_kernels.wgmma import add_product

_CHIPS = ("h100", "h200")
_DTYPES = ("bfloat16", "float16")
_WIDEST = 256

# Rows of a warpgroup: wgmma's M.
_ROWS = 64
# Bytes of shared memory that a block can have, less what barriers and alignment may take.
_SHARED = 232_448 - 2048
_LOG2E = math.log2(math.e)

_TILE = pg.Layout.WGMMA
_BY_ROW, _BY_COLUMN = _TILE.reduce(1), _TILE.reduce(0)


def supports(target, query, key, value, query_segments, key_segments, block_mask, **options):
    """bfloat16 and float16 with head sizes up to 256, on Hopper."""
    if target.chip not in _CHIPS:
        return f"{target.chip} is not {' or '.join(_CHIPS)}, for whose wgmma it is written"
    dtypes = [str(x.dtype) for x in (query, key, value)]
    if len(set(dtypes)) > 1 or dtypes[0] not in _DTYPES:
        return (f"dtypes {', '.join(dtypes)} must all be {' or all '.join(_DTYPES)} (wgmma "
                "would round float32 to TF32)")
    k, v = query.shape[-1], value.shape[-1]
    if max(k, v) > _WIDEST:
        return (f"head sizes {k} and {v} must be at most {_WIDEST}, the widest whose sums fit "
                "registers")
    if block_mask is not None:
        blocks = _blocks(query.shape[1], key.shape[1], block_mask)
        if any(size % _ROWS for size in blocks):
            return f"mask blocks of {blocks[0]} x {blocks[1]} must be multiples of {_ROWS}"
    return None


def _blocks(t, s, block_mask):
    """Queries and keys of a block of the mask."""
    return t // block_mask.shape[0], s // block_mask.shape[1]


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Which column tiles the blocks of rows meet, and which of their pairs are seen.

    Attributes:
      t, s: queries and keys.
      queries: whether rows are queries and columns keys, rather than the reverse.
      rows, columns: of a block and of a tile.
      stages: tiles in flight.
      causal, window: of the op.
      segments: whether there are any.
      blocks: queries and keys of a block of the mask, or None.
    """

    t: int
    s: int
    queries: bool
    rows: int
    columns: int
    stages: int
    causal: bool
    window: int | None
    segments: bool
    blocks: tuple[int, int] | None

    def sides(self, pair):
        """(of rows, of columns), from what is (of queries, of keys), and back."""
        return pair if self.queries else pair[::-1]

    @property
    def warpgroups(self) -> int:
        """That compute, each on 64 rows."""
        return self.rows // _ROWS

    @property
    def counts(self) -> tuple[int, int]:
        """Blocks of rows and tiles of columns."""
        rows, columns = self.sides((self.t, self.s))
        return pl.cdiv(rows, self.rows), pl.cdiv(columns, self.columns)

    @property
    def pairs(self) -> int:
        """Those that the static masks let through."""
        if not self.causal:
            return self.t * self.s
        span = min(self.t, self.window or self.t)
        return span * (span + 1) // 2 + (self.t - span) * span

    def _place(self, i):
        """(start, whole, cut, end) of block i by the static masks.

        Its tiles are [start, end); what they hide lies in [start, whole) and [cut, end).
        """
        def div(x, n):
            return lax.div(x, jnp.int32(n))

        first, last = i * self.rows, i * self.rows + self.rows - 1
        start = whole = jnp.int32(0)
        end = cut = jnp.int32(self.counts[1])
        if self.queries:
            if self.causal:
                end = jnp.minimum(end, div(last, self.columns) + 1)
                cut = div(first + 1, self.columns)
            else:
                cut = jnp.int32(self.s // self.columns)
            if self.window is not None:
                start = div(jnp.maximum(first - self.window + 1, 0), self.columns)
                whole = div(jnp.maximum(last - self.window + self.columns, 0), self.columns)
        else:
            # Queries past the end need no mask: they are 0, and so are their gradients.
            if self.causal:
                start = div(first, self.columns)
                whole = div(last + self.columns - 1, self.columns)
            if self.window is not None:
                end = jnp.minimum(end, div(last + self.window - 1, self.columns) + 1)
                cut = div(first + self.window, self.columns)
        end = jnp.maximum(end, start)
        whole = jnp.clip(whole, start, end)
        return start, whole, jnp.clip(cut, whole, end), end

    def plan(self, segments, block_mask) -> dict[str, jax.Array]:
        """What the kernel reads to know its tiles, where the data have a say.

        From a block mask: for each row of it, how many blocks it sees, and a list that begins
        with them. Else from segments: (start, whole, cut, end) of every block [B, blocks, 4].
        Tiles that share a segment with a block lie together where segments stand in order, as
        packed documents do; where they do not, some tiles are visited in vain.
        """
        if block_mask is not None:
            return self._listed(block_mask)
        if segments is None:
            return {}
        n_rows, n_columns = self.counts
        (rows, columns) = self.sides(segments)
        low, high = (x[:, :, None] for x in _extremes(rows, n_rows, self.rows))
        low1, high1 = (x[:, None] for x in _extremes(columns, n_columns, self.columns))
        tiles = jnp.arange(n_columns, dtype=jnp.int32)

        def first(which):
            return jnp.min(jnp.where(which, tiles, n_columns), axis=2)

        meet = (low1 <= high) & (high1 >= low)
        same = (low == high) & (low1 == low) & (high1 == low)
        whole = first(same)
        cut = first(~same & (tiles >= whole[:, :, None]))
        place = jax.vmap(self._place)(jnp.arange(n_rows, dtype=jnp.int32))
        start = jnp.maximum(place[0], first(meet))
        end = jnp.maximum(start, jnp.minimum(
            place[3], jnp.max(jnp.where(meet, tiles + 1, 0), axis=2)))
        whole = jnp.clip(jnp.maximum(place[1], whole), start, end)
        cut = jnp.clip(jnp.minimum(place[2], cut), whole, end)
        return {"spans": jnp.stack([start, whole, cut, end], axis=-1)}

    def _listed(self, seen):
        first_query = self.blocks[0] * jnp.arange(seen.shape[0])[:, None]
        first_key = self.blocks[1] * jnp.arange(seen.shape[1])
        if self.causal:
            seen = seen & (first_key < first_query + self.blocks[0])
        if self.window is not None:
            seen = seen & (first_query - first_key - self.blocks[1] + 1 < self.window)
        if not self.queries:
            seen = seen.T
        return {"seen": jnp.sum(seen, axis=1, dtype=jnp.int32),
                "order": jnp.argsort(~seen, axis=1, stable=True).astype(jnp.int32)}

    def tiles(self, refs, b, i):
        """(steps, step -> tile, step -> whether masks may hide some of its pairs) of block i."""
        if self.blocks is not None:
            row_block, column_block = self.sides(self.blocks)
            row = lax.div(i * self.rows, jnp.int32(row_block))
            each = jnp.int32(column_block // self.columns)
            return (refs["seen"][row] * each,
                    lambda n: refs["order"][row, lax.div(n, each)] * each + lax.rem(n, each),
                    lambda n: jnp.bool_(True))
        if self.segments:
            start, whole, cut, end = (refs["spans"][b, i, n] for n in range(4))
        else:
            start, whole, cut, end = self._place(i)
        return (end - start, lambda n: start + n,
                lambda n: (start + n < whole) | (start + n >= cut))

    @property
    def masked(self) -> bool:
        """Whether there are pairs in visited tiles that masks hide."""
        ragged = self.queries and self.s % self.columns != 0
        return self.causal or self.segments or ragged

    def seen(self, rows, columns, row_segments, column_segments):
        """bool [64, columns]: which pairs of the given rows and columns are seen.

        Each argument is spread over the tile; without segments the last two are None.
        """
        query, key = self.sides((rows, columns))
        masks = []
        if self.causal:
            masks.append(key <= query)
        elif self.queries and self.s % self.columns:
            masks.append(key < self.s)
        if self.window is not None:
            masks.append(query - key < self.window)
        if self.segments:
            masks.append(row_segments == column_segments)
        return functools.reduce(jnp.logical_and, masks)


def _extremes(segments, tiles, size):
    """The least and the greatest segment of each tile, [B, tiles]."""
    cut = _lengthened(segments, size).reshape(-1, tiles, size)
    return jnp.min(cut, axis=2), jnp.max(cut, axis=2)


def _lengthened(segments, size):
    """Segments [B, T], T a multiple of `size` by repeating the last."""
    return jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % size)), mode="edge")


class _Problem:
    """The operands as the kernels want them, and the mathematics of a tile."""

    def __init__(self, query, key, value, query_segments, key_segments, block_mask, *, scale,
                 causal, window, softcap):
        self.batch, self.t, self.heads, _ = query.shape
        self.s, self.groups = key.shape[1:3]
        self.query, self.key, self.value = (_widened(x) for x in (query, key, value))
        self.k, self.v, self.dtype = self.query.shape[-1], self.value.shape[-1], query.dtype
        self.segments = None if query_segments is None else (query_segments, key_segments)
        self.block_mask = block_mask
        self.scale, self.causal, self.window, self.softcap = scale, causal, window, softcap

    def walk(self, choices, row_width, column_width, *, queries) -> _Walk:
        """By the first of the `choices` (rows, columns) that fits memory, lengths and blocks.

        Args:
          row_width, column_width: elements that a block keeps of each row and a tile of each
            column.
        """
        lengths = self.t, self.s
        blocks = None if self.block_mask is None else _blocks(*lengths, self.block_mask)

        def fits(rows, columns):
            sizes = (rows, columns) if queries else (columns, rows)
            return rows in (_ROWS, 2 * _ROWS) and columns % 32 == 0 and all(
                size <= _ROWS or (size < length + _ROWS and block % size == 0)
                for size, length, block in zip(sizes, lengths, blocks or sizes, strict=True))

        for rows, columns in choices:
            # 128 bytes of a row are for results on their way out, 32 for vectors.
            free = _SHARED - rows * (row_width * self.dtype.itemsize + 128 + 32)
            stages = free // (columns * (column_width * self.dtype.itemsize + 32))
            if fits(rows, columns) and stages > 1:
                return _Walk(self.t, self.s, queries, rows, columns, min(stages, 4), self.causal,
                             self.window, self.segments is not None, blocks)
        raise ValueError(f"attention: none of the tiles {choices} (rows, columns) fits shared "
                         f"memory and the lengths {lengths} in blocks of {blocks}")

    def scores(self, products):
        """(x, factor > 0) such that exp(score) = exp2(factor * x), from the products q . k."""
        if self.softcap is not None:
            return _tanh(products * (self.scale / self.softcap)), self.softcap * _LOG2E
        if self.scale > 0:
            return products, self.scale * _LOG2E
        return products * (self.scale * _LOG2E), 1.0


def _widened(x):
    """x [B, T, H, K], padded to whole tiles of 8 rows and 32 columns, as wgmma wants them."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % 8), (0, 0), (0, -x.shape[3] % 32)])


def _by_head(x, multiple):
    """[B, T, H] as [B, H, T], T a multiple."""
    return jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0), (0, 0), (0, -x.shape[1] % multiple)])


def _tanh(x):
    # tanh.approx errs by 5e-4, which a cap of 50 makes 0.025 of a score.
    reciprocal = lax.rsqrt(1.0 + jnp.exp2(2 * _LOG2E * x))
    return 1.0 - 2.0 * reciprocal * reciprocal


def _full(shape, value, layout):
    return pg.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _multiply(a, b, meanwhile=lambda: None):
    """a b^T in registers, from shared memory; `meanwhile()` runs before the wait for it."""
    def multiply(sums):
        pg.wgmma(sums, a, b.transpose((1, 0)))
        meanwhile()
        return sums[...]

    return pl.run_scoped(multiply, pg.ACC((a.shape[0], b.shape[0]), jnp.float32))


def _shared(shape, dtype, swizzle):
    """Shared memory as wgmma and the copies of tiles want it."""
    tiling = pg.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return pg.SMEM(shape, dtype, transforms=(tiling, pg.SwizzleTransform(swizzle)))


def _part(ref, b, head, first, size):
    """Rows of a matrix [B, T, H, K], or elements of a vector [B, H, T] or [B, T]."""
    span = pl.ds(first, size)
    return ref.at[{4: (b, span, head), 3: (b, head, span), 2: (b, span)}[len(ref.shape)]]


@dataclasses.dataclass(frozen=True)
class _Block:
    """What a computing warpgroup works on.

    Attributes:
      walk: of the kernel.
      refs: by name: in shared memory what stays and what streams, in GMEM the results.
      warpgroup: its number.
      b, head, row: its place: the batch index, the head of the rows, the first row.
      steps, tile, hides: as from `_Walk.tiles`.
      repeat: how often these steps run, for as many heads of the columns.
    """

    walk: _Walk
    refs: Mapping[str, object]
    warpgroup: jax.Array
    b: jax.Array
    head: jax.Array
    row: jax.Array
    steps: jax.Array
    tile: Callable
    hides: Callable
    repeat: int

    def run(self, step: Callable, carry):
        """``carry = step(slot, hide, carry)`` for every tile.

        `hide(x, fill)` is x [64, columns] with `fill` where the masks hide a pair; the tile's
        first stream must be there.
        """
        def visit(n, carry):
            slot = lax.rem(n, jnp.int32(self.walk.stages))
            n = n if self.repeat == 1 else lax.rem(n, self.steps)
            return step(slot, functools.partial(self._hide, n, slot), carry)

        return lax.fori_loop(0, self.steps * self.repeat, visit, carry)

    def _hide(self, n, slot, x, fill):
        if not self.walk.masked:
            return x

        def hidden():
            def spread(vector, axis):
                return lax.broadcast_in_dim(vector, x.shape, [axis])

            rows = self.row + pg.broadcasted_iota(jnp.int32, (_ROWS,), 0, layout=_BY_ROW)
            columns = self.tile(n) * self.walk.columns + pg.broadcasted_iota(
                jnp.int32, (self.walk.columns,), 0, layout=_BY_COLUMN)
            segments = None, None
            if self.walk.segments:
                segments = (spread(self.load("row_segments", None, _BY_ROW), 0),
                            spread(self.load("column_segments", slot, _BY_COLUMN), 1))
            seen = self.walk.seen(spread(rows, 0), spread(columns, 1), *segments)
            return jnp.where(seen, x, fill)

        return lax.cond(self.hides(n), hidden, lambda: x)

    def own(self, name):
        """The warpgroup's part of what stays."""
        # Behind the barrier, wgmma's descriptors of it are made at each step. The compiler would
        # rather keep all of them, in up to 64 registers.
        return self.refs[name].at[lax.optimization_barrier(self.warpgroup)]

    def load(self, name, slot, layout):
        """A vector of the rows (no slot) or of a tile's columns."""
        return compat.gpu_load(self.refs[name].at[self.warpgroup if slot is None else slot], layout)

    def wait(self, stream, slot):
        """Until a tile of the stream is there."""
        pg.barrier_wait(self.refs[f"filled{stream}"].at[slot])

    def free(self, stream, slot):
        """Lets the next tile of the stream come."""
        pg.barrier_arrive(self.refs[f"freed{stream}"].at[slot])

    def add_product(self, total, a, b):
        staging = self.refs.get("staging")
        return add_product(total, a, b,
                           None if staging is None else staging.at[self.warpgroup])

    def store(self, name, value):
        """Writes registers [64, n] as rows of a result, a few columns at a time."""
        outgoing = self.refs["outgoing"].at[self.warpgroup]
        width = outgoing.shape[-1]
        rows = pl.ds(self.row, _ROWS)
        for first in range(0, value.shape[-1], width):
            pg.wait_smem_to_gmem(0, wait_read_only=True)
            outgoing[...] = value[:, first:first + width].astype(outgoing.dtype)
            pg.commit_smem()
            pg.copy_smem_to_gmem(
                outgoing, self.refs[name].at[self.b, rows, self.head, pl.ds(first, width)])

    def store_vector(self, name, value):
        """Writes registers [64], of the rows, to a result [B, H, T]."""
        outgoing = self.refs[f"outgoing_{name}"].at[self.warpgroup]
        outgoing[...] = value
        pg.commit_smem()
        pg.copy_smem_to_gmem(
            outgoing, _part(self.refs[name], self.b, self.head, self.row, _ROWS))


def _launch(kernel_name: str, problem: _Problem, walk: _Walk, compute: Callable, *,
            stay: Mapping[str, jax.Array], streams: Sequence[Mapping[str, jax.Array]],
            results: Mapping[str, jax.ShapeDtypeStruct], scratch: Mapping[str, object],
            products: int) -> dict[str, jax.Array]:
    """Runs `compute(block)` on every block of rows.

    Args:
      stay: by name, of which a block keeps its rows; arrays are as `_part` takes them.
      streams: those whose tiles stream past, grouped by the barriers that they share.
      results: in GMEM; matrices of one dtype, and vectors.
      scratch: more shared memory and barriers, by name.
      products: multiply-adds per visible pair and query head, for the cost estimate.
    """
    stay, streams = dict(stay), [dict(stream) for stream in streams]
    if problem.segments is not None:
        rows, columns = walk.sides(problem.segments)
        stay["row_segments"] = _lengthened(rows, walk.rows)
        streams[0]["column_segments"] = _lengthened(columns, walk.columns)
    streamed = {name: x for stream in streams for name, x in stream.items()}
    operands = {**stay, **streamed, **walk.plan(problem.segments, problem.block_mask)}
    group = problem.heads // problem.groups
    heads, repeat = (problem.heads, 1) if walk.queries else (problem.groups, group)

    # Of all operands of wgmma, and so no more than the narrowest of them has bytes.
    swizzle = min(128, problem.dtype.itemsize * math.gcd(walk.columns, problem.k, problem.v))

    def buffer(x, *shape):
        if x.ndim == 4:
            return _shared((*shape, x.shape[-1]), x.dtype, swizzle)
        return pg.SMEM(shape, x.dtype)

    # In shared memory, all that stays and streams goes by its name with this mark.
    local = "{}_".format
    scratch = {
        **scratch,
        **{local(name): buffer(x, walk.warpgroups, _ROWS) for name, x in stay.items()},
        **{local(name): buffer(x, walk.stages, walk.columns) for name, x in streamed.items()},
        "arrived": pg.Barrier(num_arrivals=len(stay), num_barriers=walk.warpgroups),
    }
    for n, stream in enumerate(streams):
        scratch[f"filled{n}"] = pg.Barrier(num_arrivals=len(stream), num_barriers=walk.stages)
        scratch[f"freed{n}"] = pg.Barrier(num_arrivals=walk.warpgroups, num_barriers=walk.stages)
    for name, x in results.items():
        if len(x.shape) == 4:
            width = swizzle // x.dtype.itemsize
            scratch["outgoing"] = _shared((walk.warpgroups, _ROWS, width), x.dtype, swizzle)
        else:
            scratch[f"outgoing_{name}"] = pg.SMEM((walk.warpgroups, _ROWS), x.dtype)
    if interpreting():
        scratch["staging"] = _shared((walk.warpgroups, _ROWS, walk.columns), problem.dtype, swizzle)

    def kernel(*arrays, **shared):
        gmem = dict(zip((*operands, *results), arrays, strict=True))
        i, b, head = (lax.axis_index(axis) for axis in ("block", "batch", "head"))
        if walk.queries and walk.causal:
            # The later the queries, the more they see: longest first leaves the shortest tail.
            i = walk.counts[0] - 1 - i
        steps, tile, hides = walk.tiles(gmem, b, i)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < walk.warpgroups)
        def _():
            if walk.warpgroups > 1:
                pg.set_max_registers(240, action="increase")
            row = i * walk.rows + warpgroup * _ROWS
            arrived = shared["arrived"].at[warpgroup]
            for name in stay:
                pg.copy_gmem_to_smem(_part(gmem[name], b, head, row, _ROWS),
                                     shared[local(name)].at[warpgroup], arrived)
            pg.barrier_wait(arrived)
            refs = {**shared, **{name: shared[local(name)] for name in (*stay, *streamed)},
                    **{name: gmem[name] for name in results}}
            compute(_Block(walk, refs, warpgroup, b, head, row, steps, tile, hides, repeat))
            pg.wait_smem_to_gmem(0)

        @pl.when(warpgroup == walk.warpgroups)
        def _():
            if walk.warpgroups > 1:
                pg.set_max_registers(24, action="decrease")

            def fetch(turn, step):
                n = turn * steps + step
                slot = lax.rem(n, jnp.int32(walk.stages))
                other = lax.div(head, jnp.int32(group)) if walk.queries else head * repeat + turn
                first = tile(step) * walk.columns
                for number, stream in enumerate(streams):
                    @pl.when(n >= walk.stages)
                    def _(number=number):
                        pg.barrier_wait(shared[f"freed{number}"].at[slot])

                    for name in stream:
                        pg.copy_gmem_to_smem(
                            _part(gmem[name], b, other, first, walk.columns),
                            shared[local(name)].at[slot], shared[f"filled{number}"].at[slot])

            pl.loop(0, repeat)(lambda turn: pl.loop(0, steps)(functools.partial(fetch, turn)))

    pairs = problem.batch * problem.heads * walk.pairs
    moved = [*operands.values(), *results.values()]
    arrays = pg.kernel(
        kernel,
        out_type=list(results.values()),
        scratch_types=scratch,
        # Heads last, the fastest: those of a group read the same keys at the same time.
        grid=(walk.counts[0], problem.batch, heads),
        grid_names=("block", "batch", "head"),
        num_threads=walk.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name=kernel_name,
        # Layouts are all given here, and their inference fails for some masks.
        compiler_params=pg.CompilerParams(
            approx_math=True, lowering_semantics=pg.LoweringSemantics.Lane),
        **compat.gpu_cost_estimate(
            flops=2 * products * pairs, transcendentals=pairs,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in moved)),
    )(*operands.values())
    return dict(zip(results, arrays, strict=True))


def _forward(*operands, dtype, block_q, block_k, block_q_dq, block_k_dq, block_q_dkv, block_k_dkv,
             **options):
    problem = _Problem(*operands, **options)
    # Sums of 64 x 256 and scores of 64 x 128 do not fit registers together.
    widths = (128, 64) if problem.v <= 128 else (64,)
    walk = problem.walk(_named([(r, c) for r in (128, 64) for c in widths], block_q, block_k),
                        problem.k, problem.k + problem.v, queries=True)
    pingpong = walk.warpgroups == 2

    def compute(block):
        def take_turns():
            if pingpong:
                pg.barrier_arrive(block.refs["turn"])
                pg.barrier_wait(block.refs["turn"])

        def step(slot, hide, carry):
            o, m, l = carry
            block.wait(0, slot)
            x, factor = problem.scores(
                _multiply(block.own("query"), block.refs["key"].at[slot], take_turns))
            # The maximum stays finite, so that hidden pairs weigh 0 in any row.
            x = hide(x, -jnp.inf)
            block.free(0, slot)
            new = jnp.maximum(m, jnp.max(x, axis=1) * factor)
            weights = jnp.exp2(x * factor - lax.broadcast_in_dim(new, x.shape, [0]))
            shrink = jnp.exp2(m - new)
            l = l * shrink + jnp.sum(weights, axis=1)
            o = o * lax.broadcast_in_dim(shrink, o.shape, [0])
            # The softmax is done before the other warpgroup's turn at it.
            o, l, weights = lax.optimization_barrier((o, l, weights.astype(problem.dtype)))
            take_turns()
            block.wait(1, slot)
            o = block.add_product(o, weights, block.refs["value"].at[slot])
            block.free(1, slot)
            return o, new, l

        if pingpong:
            # One warpgroup multiplies while the other takes the softmax.
            pl.when(block.warpgroup == 1)(take_turns)
        o, m, l = block.run(step, (_full((_ROWS, problem.v), 0.0, _TILE),
                                   _full((_ROWS,), MASKED, _BY_ROW),
                                   _full((_ROWS,), 0.0, _BY_ROW)))
        if pingpong:
            pl.when(block.warpgroup == 0)(take_turns)
        some = l > 0
        inverse = 1.0 / jnp.where(some, l, 1.0)
        block.store("o", o * lax.broadcast_in_dim(inverse, o.shape, [0]))
        block.store_vector("m", jnp.where(some, m * (1 / _LOG2E), MASKED))
        block.store_vector("l", l)

    vector = jax.ShapeDtypeStruct((problem.batch, problem.heads, walk.counts[0] * walk.rows),
                                  jnp.float32)
    out = _launch(
        "attention_forward", problem, walk, compute,
        stay={"query": problem.query}, streams=[{"key": problem.key}, {"value": problem.value}],
        results={"o": jax.ShapeDtypeStruct((*problem.query.shape[:3], problem.v), dtype),
                 "m": vector, "l": vector},
        products=problem.k + problem.v,
        scratch={"turn": pg.Barrier(num_arrivals=2)} if pingpong else {})
    m, l = (jnp.swapaxes(out[name][..., :problem.t], 1, 2) for name in ("m", "l"))
    return out["o"][:, :problem.t, :, :operands[2].shape[-1]], m, l


def _named(choices, rows, columns):
    """The choices (rows, columns) of a tile, but for what the caller named."""
    return list(dict.fromkeys((rows or r, columns or c) for r, c in choices))


def _gradients(kernel_name, problem, walk, rows, columns, lse, delta, wanted):
    """Gradients of the rows, which sum over the columns: {wanted: [B, rows, heads, size]}.

    Args:
      rows: (query, d_o) or (key, value), of which the first makes the scores and the second
        d_weights, with ..
      columns: .. these, (key, value) or (query, d_o).
      lse, delta: [B, T, H], as `differentiable` gives them.
      wanted: "scores", sums of d_scores times columns[0], and "weights", sums of weights times
        columns[1], or either.
    """
    multiple = walk.rows if walk.queries else walk.columns
    vectors = {"lse": _by_head(lse * _LOG2E, multiple)}
    stay, streams = {"row0": rows[0]}, [{"column0": columns[0]}, {"column1": columns[1]}]
    if "scores" in wanted:
        stay["row1"] = rows[1]
        vectors["delta"] = _by_head(delta, multiple)
    (stay if walk.queries else streams[0]).update(vectors)
    widths = {"scores": columns[0].shape[-1], "weights": columns[1].shape[-1]}

    def compute(block):
        def vector(name, slot):
            slot, layout, axis = (None, _BY_ROW, 0) if walk.queries else (slot, _BY_COLUMN, 1)
            return lax.broadcast_in_dim(
                block.load(name, slot, layout), (_ROWS, walk.columns), [axis])

        def step(slot, hide, sums):
            sums = dict(sums)
            first, second = (block.refs[f"column{n}"].at[slot] for n in range(2))
            block.wait(0, slot)
            x, factor = problem.scores(_multiply(block.own("row0"), first))
            weights = hide(jnp.exp2(x * factor - vector("lse", slot)), 0.0)
            block.wait(1, slot)
            if "weights" in wanted:
                sums["weights"] = block.add_product(
                    sums["weights"], weights.astype(problem.dtype), second)
            if "scores" in wanted:
                d_scores = weights * (_multiply(block.own("row1"), second) - vector("delta", slot))
                if problem.softcap is not None:
                    d_scores *= 1.0 - x * x
            block.free(1, slot)
            if "scores" in wanted:
                sums["scores"] = block.add_product(
                    sums["scores"], d_scores.astype(problem.dtype), first)
            block.free(0, slot)
            return sums

        sums = block.run(step, {name: _full((_ROWS, widths[name]), 0.0, _TILE) for name in wanted})
        for name in wanted:
            block.store(name, sums[name] * problem.scale if name == "scores" else sums[name])

    products = {"scores": problem.k + problem.v, "weights": problem.v}
    return _launch(
        kernel_name, problem, walk, compute, stay=stay, streams=streams, scratch={},
        results={name: jax.ShapeDtypeStruct((*rows[0].shape[:3], widths[name]), problem.dtype)
                 for name in wanted},
        products=problem.k + sum(products[name] for name in wanted))


def _backward(*operands_and_rows, dtype, block_q, block_k, block_q_dq, block_k_dq, block_q_dkv,
              block_k_dkv, **options):
    *operands, lse, delta, d_o = operands_and_rows
    problem = _Problem(*operands, **options)
    queries = problem.query, _widened(d_o.astype(problem.dtype))
    keys = problem.key, problem.value
    # Beside sums of 64 x 256, registers hold narrow tiles only.
    columns = 64 if max(problem.k, problem.v) <= 192 else 32
    choices, both = [(128, columns), (64, columns)], problem.k + problem.v

    walk = problem.walk(_named(choices, block_q_dq, block_k_dq), both, both, queries=True)
    d_query = _gradients("attention_d_query", problem, walk, queries, keys, lse, delta,
                         ("scores",))["scores"]

    walk = problem.walk(_named(choices, block_k_dkv, block_q_dkv), both, both, queries=False)
    kernels = {"attention_d_key_value": ("scores", "weights")}
    if both > 256:
        # And no two of more than that together.
        kernels = {"attention_d_key": ("scores",), "attention_d_value": ("weights",)}
    sums = {}
    for name, wanted in kernels.items():
        sums |= _gradients(name, problem, walk, keys, queries, lse, delta, wanted)

    gradients = d_query, sums["scores"], sums["weights"]
    return tuple(x[:, :y.shape[1], :, :y.shape[3]]
                 for x, y in zip(gradients, operands[:3], strict=True))


_attention = differentiable(_forward, _backward)


def attention(*operands, block_q=None, block_k=None, block_q_dq=None, block_k_dq=None,
              block_q_dkv=None, block_k_dkv=None, **options):
    """See `pallas_kernels.attention.attention`.

    The sizes are those of a tile: of the forward pass, of d_query, and of d_key and d_value; by
    default what fits the heads. What stays (queries, and keys for d_key and d_value) comes in 64
    or 128, what streams in multiples of 32.
    """
    return _attention(*operands, block_q=block_q, block_k=block_k, block_q_dq=block_q_dq,
                      block_k_dq=block_k_dq, block_q_dkv=block_q_dkv, block_k_dkv=block_k_dkv,
                      **options)


def candidates(*operands, **options) -> list[dict[str, int]]:
    """Tile sizes worth timing: blocks of 64 rows make more blocks, for few heads or short rows."""
    forward, backward = {"block_q": 64}, {"block_q_dq": 64, "block_k_dkv": 64}
    return [{}, forward, backward, forward | backward]
