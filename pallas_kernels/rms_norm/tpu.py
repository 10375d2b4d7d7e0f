"""RMSNorm and LayerNorm on TPU.

A tile of whole rows is read once, and everything that depends on it is written: forward the sum of
x and the residual and y, backward d_x and the tile's share of d_scale and d_bias. The rows'
statistics are made again in the backward pass, so nothing is kept between the two but the sum.

Floor, in passes over an array of x's size: forward 4 with a residual and 2 without; backward 4 with
one and 3 without. Some ten FLOPs an element forward and twenty backward: nothing to the VPU.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.rms_norm.gradient import differentiable, pull_back, standardise, statistics

# A tile's share of the smallest default limit (16 MiB), and how many float32 arrays of its size
# the compiler keeps next to the double-buffered blocks.
TILE_BYTES = 12 << 20
TEMPORARIES = 4
MAX_ROWS = 512
MAX_WIDTH = 16384
# Rows of a bfloat16 and of a float32 register.
PACKED, SUBLANES = 16, 8
# A v5p device is two cores, which share out a parallel grid axis.
CORES = 2


def supports(target, x, scale, residual, bias, **options):
    """bfloat16 and float32 rows of which sixteen fit in VMEM."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}, and it takes bfloat16 and float32"
    if x.shape[-1] > MAX_WIDTH:
        return f"a tile of rows of {x.shape[-1]} does not fit in VMEM; up to {MAX_WIDTH} do"
    return None


def _forward_kernel(*refs, present, eps, offset, centred):
    x, scale, residual, bias, y, total = _named(refs, present)
    rows = x[...]
    if residual is not None:
        rows = rows + residual[...]
        total[...] = rows
    rows = rows.astype(jnp.float32)
    out = standardise(rows, *statistics(rows, centred, eps))
    out = out * (offset + scale[...].astype(jnp.float32))
    if bias is not None:
        out = out + bias[...].astype(jnp.float32)
    y[...] = out.astype(y.dtype)


def _backward_kernel(*refs, present, eps, offset, centred, count):
    total, scale, d_y, d_total, d_x, d_scale, d_bias = _named(refs, present)
    block_rows, width = total.shape
    first = (pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)) * block_rows

    @pl.when(pl.program_id(1) == 0)
    def _():
        for sums in (d_scale, d_bias):
            if sums is not None:
                sums[...] = jnp.zeros_like(sums)

    # Of an odd number of tiles the second core has one fewer. In the step left over it holds its
    # last tile still.
    @pl.when(first < count)
    def _():
        rows, d_out = total[...].astype(jnp.float32), d_y[...].astype(jnp.float32)
        if count % block_rows:
            # Past the last row a tile holds anything.
            exists = first + jax.lax.broadcasted_iota(jnp.int32, (block_rows, 1), 0) < count
            rows, d_out = jnp.where(exists, rows, 0.0), jnp.where(exists, d_out, 0.0)
        mean, factor = statistics(rows, centred, eps)
        unit = standardise(rows, mean, factor)
        d_rows = pull_back(d_out * (offset + scale[...].astype(jnp.float32)), unit, factor, centred)
        if d_total is not None:
            d_rows = d_rows + d_total[...].astype(jnp.float32)
        d_x[...] = d_rows.astype(d_x.dtype)
        for sums, terms in ((d_scale, d_out * unit), (d_bias, d_out)):
            if sums is not None:
                # Registers are added to each other; the rows inside the last one are XLA's.
                sums[...] += jnp.sum(terms.reshape(-1, SUBLANES, width), axis=0)


def _named(refs, present):
    """A reference for each entry of `present` that is true, else None."""
    refs = iter(refs)
    return [next(refs) if there else None for there in present]


def _call(kernel, name, grid, semantics, operands, results, flops):
    """Runs a kernel on pairs of (operand, block) and (shape of a result, block), some of them None.

    Returns the results, None in the place of None.
    """
    given, made = ([pair for pair in pairs if pair[0] is not None]
                   for pairs in (operands, results))
    present = [x is not None for x, _ in (*operands, *results)]
    moved = sum(x.size * x.dtype.itemsize for x, _ in (*given, *made))
    out = iter(pl.pallas_call(
        functools.partial(kernel, present=present), grid=grid, name=name,
        in_specs=[block for _, block in given], out_specs=[block for _, block in made],
        out_shape=[x for x, _ in made],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
    )(*(x for x, _ in given)))
    return [None if x is None else next(out) for x, _ in results]


def _block_rows(x, blocks, block_rows):
    """Rows a tile of `blocks` arrays like x [N, D]: as asked for, as far as they fit."""
    width = -(-x.shape[1] // 128) * 128
    fit = TILE_BYTES // (width * (2 * blocks * x.dtype.itemsize + 4 * TEMPORARIES))
    rows = max(PACKED, min(fit, block_rows or MAX_ROWS) // PACKED * PACKED)
    return min(rows, pl.cdiv(x.shape[0], PACKED) * PACKED)


def _flat(x):
    """The rows [..., D] of an array as [N, D], a vector as [1, D]."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def _shape(shape, dtype, like):
    # Inside a shard_map a result differs between devices where the rows do.
    return jax.ShapeDtypeStruct(shape, dtype,
                                manual_axis_type=jax.typeof(like).manual_axis_type)


def _forward(x, scale, residual, bias, *, block_rows, **static):
    rows = _flat(x)
    count, width = rows.shape
    size = _block_rows(rows, 2 if residual is None else 4, block_rows)
    tile = pl.BlockSpec((size, width), lambda i: (i, 0))
    vector = pl.BlockSpec((1, width), lambda i: (0, 0))
    like = _shape(rows.shape, x.dtype, x)
    y, total = _call(
        functools.partial(_forward_kernel, **static), "norm_forward", (pl.cdiv(count, size),),
        ("parallel",),
        [(rows, tile), (_flat(scale), vector), (_flat(residual), tile), (_flat(bias), vector)],
        [(like, tile), (None if residual is None else like, tile)], 10 * x.size)
    return y.reshape(x.shape), x if residual is None else total.reshape(x.shape), ()


def _backward(total, scale, bias, kept, d_y, d_total, *, block_rows, **static):
    rows = _flat(total)
    count, width = rows.shape
    size = _block_rows(rows, 3 if d_total is None else 4, block_rows)
    tiles = pl.cdiv(count, size)
    cores = min(CORES, tiles)
    steps = pl.cdiv(tiles, cores)
    tile = pl.BlockSpec((size, width), lambda c, i: (jnp.minimum(c * steps + i, tiles - 1), 0))
    vector = pl.BlockSpec((1, width), lambda c, i: (0, 0))
    sums = pl.BlockSpec((SUBLANES, width), lambda c, i: (c, 0))
    sums_shape = _shape((cores * SUBLANES, width), jnp.float32, total)
    d_x, d_scale, d_bias = _call(
        functools.partial(_backward_kernel, count=count, **static), "norm_backward",
        (cores, steps), ("parallel", "arbitrary"),
        [(rows, tile), (_flat(scale), vector), (_flat(d_y), tile), (_flat(d_total), tile)],
        [(_shape(rows.shape, total.dtype, total), tile), (sums_shape, sums),
         (None if bias is None else sums_shape, sums)], 20 * total.size)
    return (d_x.reshape(total.shape), jnp.sum(d_scale, axis=0),
            None if bias is None else jnp.sum(d_bias, axis=0))


_normalise = differentiable(_forward, _backward)


def normalise(*operands, centred, eps, offset, block_rows=None):
    """See `pallas_kernels.rms_norm.rms_norm`; `block_rows` a tile, by default as many as fit."""
    return _normalise(*operands, centred=centred, eps=eps, offset=offset, block_rows=block_rows)


def candidates(x, scale, residual, bias, **options):
    """Tile heights to try."""
    return [{}, *({"block_rows": n} for n in (32, 64, 128, 256)
                  if n < _block_rows(_flat(x), 4, None))]


rms_norm = functools.partial(normalise, centred=False)
