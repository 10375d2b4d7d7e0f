"""Cross-entropy on Hopper GPUs, by Mosaic GPU: statistics in the epilogue of the logits' matmul.

Why: XLA writes a slice's float32 logits and reads them for the maximum, the normaliser and the
cotangents: with those, 22 bytes a logit. Here a tile of logits stays in registers; it leaves five
numbers a row, and where gradients are wanted its exponentials, in the operands' dtype and relative
to the tile's own maximum: no coarser than the cotangents that XLA makes of them in one pass, 10
bytes in all. Without gradients no logit is written.

Floor: 2 R D V FLOPs and one read of hidden [R, D] and head [D, V] a slice, and R V written where
gradients are wanted. Their products are XLA's: cuBLAS adds to the head's in place.

Two warpgroups hold 64 rows of a tile each; a third one issues the copies.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as pg

from pallas_kernels import compat
from pallas_kernels.cross_entropy.slices import differentiable, merge_tiles, rows_per_slice

_CHIPS = ("h100", "h200")
_DTYPES = ("bfloat16", "float16")

# Exponentials held at once: about so many, but never so few rows that adding up the head's
# gradient in memory dominates.
SLICE_LOGITS = 1 << 27
FEWEST_ROWS = 1024

_ROWS = 64  # of a warpgroup: wgmma's M
_WARPGROUPS = 2
_DEPTH = 64  # of a copy: a row of 128 bytes, the widest swizzle
_STAGES = 4
_PART = 64  # columns of exponentials on their way out
_TILE = pg.Layout.WGMMA
_BY_ROW = _TILE.reduce(1)
_STATISTICS = 5


def supports(target, hidden, head, labels, weights, *, vocab_size=None, **options):
    """bfloat16 or float16 operands, on Hopper."""
    if target.chip not in _CHIPS:
        return f"{target.chip} is not {' or '.join(_CHIPS)}, for whose wgmma it is written"
    if hidden.dtype != head.dtype or str(hidden.dtype) not in _DTYPES:
        return (f"hidden is {hidden.dtype} and head {head.dtype}; both must be one of "
                f"{', '.join(_DTYPES)} (wgmma would round float32 to TF32)")
    if vocab_size is not None:
        return f"vocab_size={vocab_size} hides columns, which its tiles do not; xla does"
    return None


def candidates(hidden, head, labels, weights, **options):
    """Slices and tiles of other sizes."""
    return [{"rows": rows_per_slice(labels.size, rows, _ROWS * _WARPGROUPS),
             "block_columns": columns}
            for rows in (1024, 2048, 4096) for columns in (128, 256)]


def _shared(shape, dtype, swizzle=128):
    """Shared memory as wgmma and the copies of tiles want it, in swizzled rows of so many bytes."""
    tiling = pg.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return pg.SMEM(shape, dtype, transforms=(tiling, pg.SwizzleTransform(swizzle)))


def _capped(x, softcap):
    if softcap is None:
        return x
    # tanh.approx errs by 5e-4, which a cap of 30 makes 0.015 of a logit.
    reciprocal = lax.rsqrt(1.0 + jnp.exp(x * (2.0 / softcap)))
    return softcap - 2.0 * softcap * reciprocal * reciprocal


def _statistics_kernel(hidden, head, labels, found, *rest, columns, block_columns, softcap, keep):
    (kept,), rest = (rest[:1], rest[1:]) if keep else ((None,), rest)
    a, b, targets, numbers, outgoing, filled, freed, arrived = rest
    steps = hidden.shape[1] // _DEPTH
    tile, block = lax.axis_index("columns"), lax.axis_index("rows")
    warpgroup = lax.axis_index("warpgroup")
    first_column = tile * block_columns

    @pl.when(warpgroup == _WARPGROUPS)
    def _():
        pg.set_max_registers(40, action="decrease")

        @pl.loop(0, steps)
        def _(n):
            slot = lax.rem(n, jnp.int32(_STAGES))
            pl.when(n >= _STAGES)(lambda: pg.barrier_wait(freed.at[slot]))
            depth = pl.ds(n * _DEPTH, _DEPTH)
            for w in range(_WARPGROUPS):
                rows = pl.ds((block * _WARPGROUPS + w) * _ROWS, _ROWS)
                pg.copy_gmem_to_smem(hidden.at[rows, depth], a.at[slot, w], filled.at[slot])
            pg.copy_gmem_to_smem(head.at[depth, pl.ds(first_column, block_columns)], b.at[slot],
                                 filled.at[slot])

    @pl.when(warpgroup < _WARPGROUPS)
    def _():
        pg.set_max_registers(232, action="increase")
        rows = pl.ds((block * _WARPGROUPS + warpgroup) * _ROWS, _ROWS)
        pg.copy_gmem_to_smem(labels.at[rows], targets.at[warpgroup], arrived.at[warpgroup])

        def multiply(sums):
            @pl.loop(0, steps)
            def _(n):
                slot = lax.rem(n, jnp.int32(_STAGES))
                pg.barrier_wait(filled.at[slot])
                pg.wgmma(sums, a.at[slot, warpgroup], b.at[slot])
                # All but the last product are done, so its predecessor's slot is free.
                pg.wgmma_wait(1)
                before = lax.rem(n + _STAGES - 1, jnp.int32(_STAGES))
                pl.when(n > 0)(lambda: pg.barrier_arrive(freed.at[before]))

            return sums[...]

        x = pl.run_scoped(multiply, pg.ACC((_ROWS, block_columns), jnp.float32))
        # A few columns at a time, and their numbers counted from there: registers have no room
        # for another tile.
        shape = (_ROWS, _PART)
        across = pg.broadcasted_iota(jnp.int32, shape, 1, layout=_TILE)
        starts = range(0, block_columns, _PART)
        parts = [x[:, start:start + _PART] for start in starts]
        if columns % block_columns:
            # What the last tile has beyond the vocabulary.
            left = columns - first_column
            parts = [jnp.where(across < left - start, part, -1e30)
                     for start, part in zip(starts, parts, strict=True)]
        largest = functools.reduce(jnp.maximum, (jnp.max(part, axis=1) for part in parts))
        top = _capped(largest, softcap)
        wide = lax.broadcast_in_dim(top, shape, [0])
        pg.barrier_wait(arrived.at[warpgroup])
        target = compat.gpu_load(targets.at[warpgroup], _BY_ROW) - first_column
        backwards = -across.astype(jnp.float32)
        staging = outgoing.at[warpgroup]

        def visit(start, part):
            # The first column of the largest, as a maximum: float32 holds every column's number.
            is_largest = part == lax.broadcast_in_dim(largest, shape, [0])
            first = jnp.max(jnp.where(is_largest, backwards, -float(1 << 24)), axis=1)
            inside = part = _capped(part, softcap)
            if columns % block_columns:
                inside = jnp.where(across < left - start, part, 0.0)
                part = jnp.where(across < left - start, part, -1e30)
            exponentials = jnp.exp(part - wide)
            if keep:
                pg.wait_smem_to_gmem(0, wait_read_only=True)
                staging[...] = exponentials.astype(staging.dtype)
                pg.commit_smem()
                pg.copy_smem_to_gmem(staging, kept.at[rows, pl.ds(first_column + start, _PART)])
            is_label = across == lax.broadcast_in_dim(target - start, shape, [0])
            return (first - float(start), jnp.sum(exponentials, axis=1),
                    jnp.sum(jnp.where(is_label, part, 0.0), axis=1), jnp.sum(inside, axis=1))

        first, *sums = visit(starts[0], parts[0])
        for start, part in zip(starts[1:], parts[1:], strict=True):
            other, *more = visit(start, part)
            first = jnp.maximum(first, other)
            sums = [one + two for one, two in zip(sums, more, strict=True)]
        first = first_column.astype(jnp.float32) - first
        for i, value in enumerate((top, first, *sums)):
            numbers[warpgroup, i] = value
        pg.commit_smem()
        pg.copy_smem_to_gmem(numbers.at[warpgroup], found.at[tile, :, rows])
        pg.wait_smem_to_gmem(0)


def _statistics(hidden, head, labels, *, softcap, keep, block_columns):
    rows, columns, dtype = hidden.shape[0], head.shape[1], hidden.dtype
    # Copies move whole swizzled pieces.
    deep, wide = -hidden.shape[1] % _DEPTH, -columns % _PART
    if deep or wide:
        hidden = jnp.pad(hidden, ((0, 0), (0, deep)))
        head = jnp.pad(head, ((0, deep), (0, wide)))
    depth, width = head.shape
    tiles = pl.cdiv(columns, block_columns)
    out = [jax.ShapeDtypeStruct((tiles, _STATISTICS, rows), jnp.float32)]
    if keep:
        out.append(jax.ShapeDtypeStruct((rows, width), dtype))
    vectors = functools.partial(pg.SMEM, (_WARPGROUPS, _STATISTICS, _ROWS))
    found, *exponentials = pg.kernel(
        functools.partial(_statistics_kernel, columns=columns, block_columns=block_columns,
                          softcap=softcap, keep=keep),
        out_type=out,
        scratch_types=[
            _shared((_STAGES, _WARPGROUPS, _ROWS, _DEPTH), dtype),
            _shared((_STAGES, _DEPTH, block_columns), dtype),
            pg.SMEM((_WARPGROUPS, _ROWS), jnp.int32),
            vectors(jnp.float32),
            _shared((_WARPGROUPS, _ROWS, _PART), dtype, 2 * _PART),
            pg.Barrier(num_arrivals=_WARPGROUPS + 1, num_barriers=_STAGES),
            pg.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_STAGES),
            pg.Barrier(num_barriers=_WARPGROUPS)],
        # Rows last, the fastest: the blocks of one tile of the head run at the same time.
        grid=(tiles, rows // (_ROWS * _WARPGROUPS)),
        grid_names=("columns", "rows"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="cross_entropy_statistics",
        compiler_params=pg.CompilerParams(approx_math=True),
        **compat.gpu_cost_estimate(
            flops=2 * rows * depth * width,
            bytes_accessed=dtype.itemsize * (rows * depth + depth * width + rows * width * keep)
            + 4 * _STATISTICS * tiles * rows,
            transcendentals=rows * columns * (1 if softcap is None else 3)),
    )(hidden, head, labels)
    parts = [found[:, i] for i in range(_STATISTICS)]
    parts[1] = parts[1].astype(jnp.int32)
    return merge_tiles(*parts), (exponentials[0], found[:, 0], columns) if keep else None


def _cotangents(kept, labels, own, coefficients, *, softcap, block_columns):
    exponentials, tile_top, columns = kept

    def of_logits(x):
        """[tiles, R] for every logit."""
        return jnp.repeat(x.T, block_columns, axis=1)[:, :columns]

    weight = exponentials[:, :columns].astype(jnp.float32)
    is_label = labels[:, None] == lax.broadcasted_iota(jnp.int32, (1, columns), 1)
    d_logits = (weight * of_logits(coefficients.exponential * jnp.exp(tile_top - own.top))
                - jnp.where(is_label, coefficients.hit[:, None], 0.0)
                - coefficients.spread[:, None])
    if softcap is not None:
        # Where the exponential has vanished, so has the cotangent, but for the label's.
        x = of_logits(tile_top) + jnp.log(jnp.maximum(weight, jnp.finfo(jnp.float32).tiny))
        x = jnp.where(is_label, own.at_label[:, None], x)
        d_logits = d_logits * (1.0 - (x / softcap) ** 2)
    return d_logits.astype(exponentials.dtype)


_cross_entropy = differentiable(_statistics, _cotangents)


def cross_entropy(hidden, head, labels, weights, *, rows=None, block_columns=128, **options):
    """See `pallas_kernels.cross_entropy.cross_entropy`."""
    if rows is None:
        rows = rows_per_slice(labels.size, max(FEWEST_ROWS, SLICE_LOGITS // head.shape[1]),
                              _ROWS * _WARPGROUPS)
    return _cross_entropy(hidden, head, labels, weights, rows=rows, block_columns=block_columns,
                          **options)
