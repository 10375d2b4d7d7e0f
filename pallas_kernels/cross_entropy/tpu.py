"""Cross-entropy for TPUs: the softmax's statistics in the epilogue of the logits' matmul.

Why: XLA writes a slice's float32 logits and reads them for the normaliser and in both gradients'
products: 16 bytes a logit. Here a tile of logits leaves five numbers a row, and where gradients are
wanted its exponentials, in the operands' dtype and relative to the tile's own maximum: no coarser
than the cotangents, which a second kernel makes in their place. With bfloat16 that is 10 bytes a
logit, and a slice of twice the rows in the same room, so that the head's gradient is added up half
as often. Without gradients no logit is written, where XLA writes and reads 8 bytes.

Floor: 2 R D V FLOPs and one read of hidden [R, D] and head [D, V] a slice; with gradients
R V written, and read and written again. The gradients' products are XLA's: with their operand in
memory there is nothing left to fuse.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.cross_entropy.slices import differentiable, merge_tiles, rows_per_slice

# Exponentials held at once: about so many, but never so few rows that re-reading the head and
# adding up its gradient dominate; 896 rows make 896 FLOPs a byte of the head.
SLICE_LOGITS = 1 << 27
FEWEST_ROWS = 896

LANES = 128
STRIP = 32  # rows whose logits fit in registers
DEPTH = 512  # of one step of the contraction
VMEM_BYTES = 60 << 20  # of the 64 MiB and more that every chip since v5e has


def supports(target, hidden, head, labels, weights, *, vocab_size=None, **options):
    """bfloat16 and float32, of one dtype."""
    if target.chip == "v4":
        return "v4 has 16 MiB of vector memory, and its tiles are for chips with 64 and more"
    if hidden.dtype != head.dtype or hidden.dtype not in (jnp.bfloat16, jnp.float32):
        return (f"hidden is {hidden.dtype} and head {head.dtype}; both must be bfloat16 or both "
                "float32")
    if vocab_size is not None:
        return f"vocab_size={vocab_size} hides columns, which its tiles do not; xla does"
    if not _fits(LANES, LANES, hidden.shape[-1], hidden.dtype.itemsize):
        return f"D={hidden.shape[-1]}: tiles of {LANES} rows and columns exceed the vector memory"
    return None


def candidates(hidden, head, labels, weights, **options):
    """Slices and tiles of other sizes."""
    positions, depth, size = labels.size, hidden.shape[-1], hidden.dtype.itemsize
    return [{"rows": rows_per_slice(positions, rows, LANES), "block_rows": block_rows,
             "block_columns": block_columns}
            for rows in (1024, 2048) for block_rows in (512, 1024) for block_columns in (256, 512)
            if _fits(block_rows, block_columns, depth, size)]


def _fits(block_rows, block_columns, depth, size):
    """Whether the tiles of the first kernel fit: double buffers, sums, and some room."""
    buffers = 2 * size * (depth * (block_rows + block_columns) + block_rows * block_columns)
    scratch = 4 * block_rows * (block_columns + LANES)
    return buffers + scratch < VMEM_BYTES - (8 << 20)


def _tiles(rows, columns, depth, size):
    """The largest tile that fits, rows first: each row tile reads the whole head."""
    columns = pl.cdiv(columns, LANES) * LANES
    for block_rows in (1024, 512, 256, LANES):
        # Tiles of one size, lest the last be mostly padding.
        each = pl.cdiv(rows, pl.cdiv(rows, block_rows))
        for block_columns in (512, 256, LANES):
            tile = pl.cdiv(each, LANES) * LANES, min(block_columns, columns)
            if _fits(*tile, depth, size):
                return tile
    raise AssertionError("`supports` has refused it")


def _strips(count, visit):
    """Calls `visit` with every strip of `count` rows."""
    def step(i, _):
        visit(pl.ds(pl.multiple_of(i * STRIP, STRIP), STRIP))
        return 0

    lax.fori_loop(0, count // STRIP, step, 0)


def _statistics_kernel(hidden, head, labels, found, *rest, columns, softcap):
    *kept, logits, table = rest
    depth, (block_rows, width) = hidden.shape[1], logits.shape
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)

    def accumulate(k, _):
        part = pl.ds(pl.multiple_of(k * DEPTH, DEPTH), DEPTH)
        logits[...] += dot(hidden[:, part], head[part, :])
        return 0

    whole = depth // DEPTH
    if depth % DEPTH:
        logits[...] = dot(hidden[:, whole * DEPTH:], head[whole * DEPTH:, :])
    else:
        logits[...] = jnp.zeros(logits.shape, jnp.float32)
    lax.fori_loop(0, whole, accumulate, 0)

    first_column = pl.program_id(1) * width
    column = first_column + lax.broadcasted_iota(jnp.int32, (STRIP, width), 1)
    lane = lax.broadcasted_iota(jnp.int32, (STRIP, LANES), 1)

    def visit(strip):
        x = logits[strip, :]
        if softcap is not None:
            x = softcap * jnp.tanh(x / softcap)
        inside = x
        if columns % width:
            # What the last tile reads beyond the vocabulary is garbage.
            x = jnp.where(column < columns, x, -1e30)
            inside = jnp.where(column < columns, x, 0.0)
        top = jnp.max(x, axis=1, keepdims=True)
        exponentials = jnp.exp(x - top)
        if kept:
            kept[0][strip, :] = exponentials.astype(kept[0].dtype)
        # float32 holds every column's number, and has a minimum on all chips.
        first = jnp.min(jnp.where(x == top, column.astype(jnp.float32), float(1 << 24)), axis=1,
                        keepdims=True)
        values = (top, first, jnp.sum(exponentials, axis=1, keepdims=True),
                  jnp.sum(jnp.where(column == labels[strip, :], inside, 0.0), axis=1,
                          keepdims=True),
                  jnp.sum(inside, axis=1, keepdims=True))
        row = jnp.zeros((STRIP, LANES), jnp.float32)
        for i, value in enumerate(values):
            row = jnp.where(lane == i, value, row)
        table[strip, :] = row

    _strips(block_rows, visit)
    # Rows on lanes: a column of numbers would take 128 times its room in memory.
    found[...] = table[...].T[:8, :]


def _statistics(hidden, head, labels, *, softcap, keep, block_rows, block_columns):
    (rows, depth), columns = hidden.shape, head.shape[1]
    size = hidden.dtype.itemsize
    grid = pl.cdiv(rows, block_rows), pl.cdiv(columns, block_columns)
    tile = pl.BlockSpec((block_rows, block_columns), lambda i, j: (i, j))
    shapes = [jax.ShapeDtypeStruct((grid[1], 8, rows), jnp.float32)]
    specs = [pl.BlockSpec((None, 8, block_rows), lambda i, j: (j, 0, i))]
    if keep:
        shapes.append(jax.ShapeDtypeStruct((rows, columns), hidden.dtype))
        specs.append(tile)
    found, *exponentials = pl.pallas_call(
        functools.partial(_statistics_kernel, columns=columns, softcap=softcap),
        name="cross_entropy_statistics",
        grid=grid,
        in_specs=[pl.BlockSpec((block_rows, depth), lambda i, j: (i, 0)),
                  pl.BlockSpec((depth, block_columns), lambda i, j: (0, j)),
                  pl.BlockSpec((block_rows, 1), lambda i, j: (i, 0))],
        out_specs=specs,
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM((block_rows, block_columns), jnp.float32),
                        pltpu.VMEM((block_rows, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * depth * columns,
            bytes_accessed=size * (rows * depth + grid[0] * depth * columns)
            + size * rows * columns * keep + 32 * grid[1] * rows,
            transcendentals=rows * columns * (1 if softcap is None else 2)),
    )(hidden, head, labels[:, None])
    parts = [found[:, i] for i in range(5)]
    parts[1] = parts[1].astype(jnp.int32)
    return merge_tiles(*parts), (exponentials[0], found[:, 0]) if keep else None


def _cotangents_kernel(table, exponentials, out, columns_of, *, softcap):
    block_rows, width = out.shape
    columns_of[...] = table[...].T
    column = pl.program_id(1) * width + lax.broadcasted_iota(jnp.int32, (STRIP, width), 1)

    def visit(strip):
        values = columns_of[strip, :]
        factor, hit, spread, label, tile_top, at_label = (values[:, i:i + 1] for i in range(6))
        kept = exponentials[strip, :].astype(jnp.float32)
        is_label = column == label.astype(jnp.int32)
        d = kept * factor - jnp.where(is_label, hit, 0.0) - spread
        if softcap is not None:
            # Where the exponential has vanished, so has the cotangent, but for the label's.
            x = tile_top + jnp.log(jnp.maximum(kept, jnp.finfo(jnp.float32).tiny))
            x = jnp.where(is_label, at_label, x)
            d = d * (1.0 - (x / softcap) ** 2)
        out[strip, :] = d.astype(out.dtype)

    _strips(block_rows, visit)


def _cotangents(kept, labels, own, coefficients, *, softcap, block_rows, block_columns):
    exponentials, tile_top = kept
    rows, columns = exponentials.shape
    grid = pl.cdiv(rows, block_rows), pl.cdiv(columns, block_columns)
    factor = coefficients.exponential * jnp.exp(tile_top - own.top)
    same = (coefficients.hit, coefficients.spread, labels.astype(jnp.float32))
    lanes = [factor, *(jnp.broadcast_to(x, factor.shape) for x in same), tile_top,
             jnp.broadcast_to(own.at_label, factor.shape)]
    table = jnp.stack([*lanes, *[jnp.zeros_like(factor)] * (8 - len(lanes))], axis=1)
    tile = pl.BlockSpec((block_rows, block_columns), lambda i, j: (i, j))
    return pl.pallas_call(
        functools.partial(_cotangents_kernel, softcap=softcap),
        name="cross_entropy_cotangents",
        grid=grid,
        in_specs=[pl.BlockSpec((None, 8, block_rows), lambda i, j: (j, 0, i)), tile],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(exponentials.shape, exponentials.dtype),
        # The interpreter would return the ragged edges too.
        input_output_aliases={} if dispatch.interpreting() else {1: 0},
        scratch_shapes=[pltpu.VMEM((block_rows, 8), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=5 * rows * columns,
            bytes_accessed=2 * exponentials.nbytes + table.nbytes,
            transcendentals=0 if softcap is None else rows * columns),
    )(table, exponentials)


_cross_entropy = differentiable(_statistics, _cotangents)


def cross_entropy(hidden, head, labels, weights, *, rows=None, block_rows=None,
                  block_columns=None, **options):
    """See `pallas_kernels.cross_entropy.cross_entropy`."""
    (depth, columns), size = head.shape, head.dtype.itemsize
    if rows is None:
        rows = rows_per_slice(labels.size, max(FEWEST_ROWS, SLICE_LOGITS // columns), LANES)
    # A tuned tile may be that of a narrower head in the same bucket.
    if block_rows is None or not _fits(block_rows, block_columns, depth, size):
        block_rows, block_columns = _tiles(rows, columns, depth, size)
    return _cross_entropy(hidden, head, labels, weights, rows=rows, block_rows=block_rows,
                          block_columns=block_columns, **options)
