"""RMSNorm and LayerNorm on Hopper GPUs (Mosaic GPU).

A warpgroup takes a row into its registers, once, and writes all that depends on it: forward the sum
of x and the residual and y, backward d_x. Its share of d_scale and d_bias stays in shared memory
over all its rows. The rows' statistics are made again in the backward pass.

Floor, in passes over an array of x's size: forward 4 with a residual and 2 without; backward 4 with
one and 3 without. Some ten FLOPs an element forward and twenty backward.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as pg

from pallas_kernels.compat import gpu_cost_estimate, gpu_load
from pallas_kernels.rms_norm.gradient import differentiable

# The lanes of a warpgroup. Rows are padded to a multiple of them.
LANES = 128
# More elements than that, and as many of the cotangent, leave the registers.
MAX_WIDTH = 8192
# Each block sums its own d_scale, so there are fewer than rows: four a processor of an H200.
BLOCKS = 4 * 132


def supports(target, x, scale, residual, bias, **options):
    """bfloat16 and float32 rows that fit in the registers of a warpgroup of an H100 or H200."""
    if target.chip not in ("h100", "h200"):
        return f"the chip is {target.chip}, and it takes h100 and h200"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}, and it takes bfloat16 and float32"
    if x.shape[-1] > MAX_WIDTH:
        return f"rows of {x.shape[-1]} do not fit in registers; up to {MAX_WIDTH} do"
    return None


def _each_row(count, blocks, visit):
    """Calls `visit` with every row of this block."""
    block = lax.axis_index("block")

    @pl.loop(0, pl.cdiv(count, blocks))
    def _(step):
        row = step * blocks + block
        pl.when(row < count)(lambda: visit(row))


def _load(ref):
    """A row or vector, in float32; whatever its dtype, each lane gets the same elements."""
    lane = ref.shape[0] // LANES
    together = next(n for n in (4, 2, 1) if lane % n == 0)
    return gpu_load(ref, pg.Layout.WG_STRIDED(ref.shape, together)).astype(jnp.float32)


def _distances(rows, inside, width, centred):
    """Distances of a padded row from its mean, or from zero; 0 in the padding."""
    if not centred:
        return rows
    distances = rows - jnp.sum(rows) / width
    return distances if inside is None else distances * _load(inside)


def _forward_kernel(x, scale, residual, bias, inside, y, total, *, blocks, width, eps, offset,
                    centred):
    def visit(row):
        rows = _load(x.at[row])
        if residual is not None:
            rows = (rows + _load(residual.at[row])).astype(total.dtype)
            total[row] = rows
            rows = rows.astype(jnp.float32)
        rows = _distances(rows, inside, width, centred)
        out = rows * lax.rsqrt(jnp.sum(rows * rows) / width + eps)
        out = out * (offset + _load(scale))
        if bias is not None:
            out = out + _load(bias)
        y[row] = out.astype(y.dtype)

    _each_row(x.shape[0], blocks, visit)


def _backward_kernel(total, scale, d_y, d_total, inside, d_x, d_scale, d_bias, scale_sums,
                     bias_sums, *, blocks, width, eps, offset, centred):
    sums = [(scale_sums, d_scale), *([] if d_bias is None else [(bias_sums, d_bias)])]
    for here, _ in sums:
        here[...] = jnp.zeros(here.shape, jnp.float32)

    def visit(row):
        rows = _distances(_load(total.at[row]), inside, width, centred)
        factor = lax.rsqrt(jnp.sum(rows * rows) / width + eps)
        unit = rows * factor
        d_out = _load(d_y.at[row])
        # Every lane meets only its own elements here. First, for d_out then leaves the registers.
        scale_sums[...] = _load(scale_sums) + d_out * unit
        if d_bias is not None:
            bias_sums[...] = _load(bias_sums) + d_out
        d_unit = d_out * (offset + _load(scale))
        d_rows = d_unit - unit * (jnp.sum(d_unit * unit) / width)
        if centred:
            d_rows = d_rows - jnp.sum(d_unit) / width
        d_rows = d_rows * factor
        if d_total is not None:
            d_rows = d_rows + _load(d_total.at[row])
        d_x[row] = d_rows.astype(d_x.dtype)

    _each_row(total.shape[0], blocks, visit)
    for here, there in sums:
        there[lax.axis_index("block")] = _load(here)


def _call(kernel, name, blocks, operands, results, scratch, flops):
    """Runs a kernel on operands, shapes of results and scratch, some of them None.

    Returns the results, None in the place of None.
    """
    everything = (*operands, *results, *scratch)
    given, made, kept = ([x for x in xs if x is not None] for xs in (operands, results, scratch))

    def body(*refs):
        refs = iter(refs)
        kernel(*(None if x is None else next(refs) for x in everything))

    body.__name__ = name
    moved = sum(x.size * x.dtype.itemsize for x in (*given, *made))
    out = iter(pg.kernel(
        body, out_type=made, scratch_types=kept, grid=(blocks,), grid_names=("block",),
        **gpu_cost_estimate(flops, moved, blocks))(*given))
    return [None if x is None else _spread(next(out), given[0]) for x in results]


def _spread(x, like):
    """`x`, said to differ between the devices between which `like` does, inside a shard_map.

    Unlike `pallas_call`, `pg.kernel` takes no notice of its results' manual axis types.
    """
    here, there = (jax.typeof(a).manual_axis_type.varying for a in (x, like))
    return lax.pcast(x, tuple(sorted(there - here)), to="varying") if there - here else x


def _padded(x):
    """Rows [..., D] as [N, D], a vector as [D]; D a multiple of LANES, with zeros at its end."""
    if x is None:
        return None
    x = x if x.ndim == 1 else x.reshape(-1, x.shape[-1])
    short = -x.shape[-1] % LANES
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)]) if short else x


def _inside(width, centred):
    """1 where a padded row is its own, 0 in the padding; None where that does not matter."""
    return _padded(jnp.ones(width, jnp.float32)) if centred and width % LANES else None


def _forward(x, scale, residual, bias, *, blocks, centred, **static):
    rows, width = _padded(x), x.shape[-1]
    blocks = min(blocks, rows.shape[0])
    like = jax.ShapeDtypeStruct(rows.shape, x.dtype)
    y, total = _call(
        functools.partial(_forward_kernel, blocks=blocks, width=width, centred=centred, **static),
        "norm_forward", blocks,
        (rows, _padded(scale), _padded(residual), _padded(bias), _inside(width, centred)),
        (like, None if residual is None else like), (), 10 * x.size)

    def cut(rows):
        return rows[:, :width].reshape(x.shape)

    return cut(y), x if residual is None else cut(total), ()


def _backward(total, scale, bias, kept, d_y, d_total, *, blocks, centred, **static):
    rows, width = _padded(total), total.shape[-1]
    count, padded = rows.shape
    blocks = min(blocks, count)
    shared = pg.SMEM((padded,), jnp.float32)
    like = jax.ShapeDtypeStruct(rows.shape, total.dtype)
    sums = jax.ShapeDtypeStruct((blocks, padded), jnp.float32)
    d_x, d_scale, d_bias = _call(
        functools.partial(_backward_kernel, blocks=blocks, width=width, centred=centred, **static),
        "norm_backward", blocks,
        (rows, _padded(scale), _padded(d_y), _padded(d_total), _inside(width, centred)),
        (like, sums, None if bias is None else sums),
        (shared, None if bias is None else shared), 20 * total.size)
    return (d_x[:, :width].reshape(total.shape), jnp.sum(d_scale[:, :width], axis=0),
            None if bias is None else jnp.sum(d_bias[:, :width], axis=0))


_normalise = differentiable(_forward, _backward)


def normalise(*operands, centred, eps, offset, blocks=BLOCKS):
    """See `pallas_kernels.rms_norm.rms_norm`; `blocks` share the rows."""
    return _normalise(*operands, centred=centred, eps=eps, offset=offset, blocks=blocks)


def candidates(x, scale, residual, bias, **options):
    """Numbers of blocks to try."""
    return [{"blocks": n} for n in (BLOCKS // 2, BLOCKS, 2 * BLOCKS, 4 * BLOCKS)]


rms_norm = functools.partial(normalise, centred=False)
