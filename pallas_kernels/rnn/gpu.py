"""Recurrent cells on Hopper GPUs, by Mosaic GPU: forward and backward.

Why: XLA's loop starts a product and a fusion a step, and reads the matrices again in each. Here a
block of threads holds the matrices of one head in shared memory from the first position to the
last, and its state in registers; a step is one round of wgmma and one meeting of the warpgroups.
Floor: T steps of that latency, whatever the batch; blocks are heads times tiles of 16 rows.

The batch is wgmma's N, so that few rows waste little: each warpgroup makes the gates of its own 64
elements of the state, as the rows of ``R^T h``. Of the backward pass, only what waits for the
next position is here: all products of the forward pass are made again in one, by XLA, and what
reaches the matrices is another.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as pg

from pallas_kernels import compat
from pallas_kernels.rnn.cells import (
    CELLS,
    PADDING,
    Cell,
    advanced,
    derivatives,
    differentiable,
    entered,
    left,
    parameter_gradients,
)

_CHIPS = ("h100", "h200")

_ROWS = 64  # of a warpgroup: wgmma's M
_BATCH = 16  # of a block: wgmma's N
_SWIZZLE = 32  # bytes: a row of the batch
_SHARED_BYTES = 227 << 10
_TILE = pg.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """A call of the op: in tiles of the batch, and heads in whole warpgroups."""

    b: int
    t: int
    h: int
    d: int
    cell: Cell
    marked: bool

    @property
    def warpgroups(self) -> int:
        return -(-self.d // _ROWS)

    @property
    def width(self) -> int:
        return self.warpgroups * _ROWS

    @property
    def tiles(self) -> int:
        return -(-self.b // _BATCH)

    @property
    def kept(self) -> int:
        """States beside h."""
        return self.cell.states - 1

    @property
    def forward_planes(self) -> int:
        """Inputs by gate, and marks."""
        return self.cell.gates + self.marked

    @property
    def backward_planes(self) -> int:
        """Gradients of h, h where it is all of the state, and marks."""
        return 1 + (not self.kept) + self.marked

    @property
    def shared_bytes(self) -> int:
        """Of shared memory, by the pass that takes more."""
        cell, position = self.cell, self.width * _BATCH
        matrices = cell.gates * self.width ** 2 * 2
        forward = 2 * self.forward_planes + 4 * cell.biases + 2 * 2 + 2
        backward = 2 * self.backward_planes + 4 * (cell.biases + self.kept) + 2 * 2 * cell.biases
        return matrices + position * max(forward, backward) + 1024

    def lay(self, x):
        """[B, ..., H, D] as [tiles, H, ..., D, 16]: a position of a block is contiguous."""
        x = jnp.pad(x, [(0, self.tiles * _BATCH - self.b)] + [(0, 0)] * (x.ndim - 2)
                    + [(0, self.width - self.d)])
        x = x.reshape(self.tiles, _BATCH, *x.shape[1:])
        return jnp.moveaxis(jnp.moveaxis(x, 1, -1), -3, 1)

    def unlay(self, x):
        """The inverse of `lay`."""
        x = jnp.moveaxis(jnp.moveaxis(x, 1, -3), -1, 1)
        return x.reshape(-1, *x.shape[2:])[:self.b, ..., :self.d]

    def with_marks(self, planes, marks):
        """[B, T, planes, H, D] with one more plane, where there are marks."""
        if marks is None:
            return planes
        shape = (self.b, self.t, 1, self.h, self.d)
        marks = jnp.broadcast_to(marks[:, :, None, None, None], shape).astype(planes.dtype)
        return jnp.concatenate([planes, marks], axis=2)

    def matrices(self, x):
        """[G, H, M, K] as [H, warpgroups, G, 64, K]."""
        more = self.width - self.d
        x = jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, more)))
        x = x.reshape(*x.shape[:2], self.warpgroups, _ROWS, self.width)
        return jnp.transpose(x, (1, 2, 0, 3, 4))

    def array(self, *planes, dtype):
        """Of the shape of `lay`."""
        return jax.ShapeDtypeStruct((self.tiles, self.h, *planes, self.width, _BATCH), dtype)

    def call(self, kernel, name, operands, results, scratch, products):
        """`products`: of the matrices, a position."""
        positions = self.tiles * _BATCH * self.t * self.h * self.width
        return pg.kernel(
            kernel,
            out_type=results,
            scratch_types=scratch,
            grid=(self.tiles, self.h),
            grid_names=("batch", "head"),
            num_threads=self.warpgroups,
            thread_name="warpgroup",
            kernel_name=name,
            compiler_params=pg.CompilerParams(
                approx_math=True, lowering_semantics=pg.LoweringSemantics.Lane),
            **compat.gpu_cost_estimate(
                flops=2 * positions * products * self.cell.gates * self.width,
                transcendentals=positions * self.cell.biases,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*operands, *results))),
        )(*operands)


def _sizes(inputs, cell, marks):
    b, t, _, h, d = inputs.shape
    return _Sizes(b, t, h, d, cell, marks is not None)


def supports(target, inputs, recurrent, bias, segment_ids=None, state=None, *, cell):
    """bfloat16, on Hopper, and heads whose matrices fit the shared memory."""
    if target.chip not in _CHIPS:
        return f"{target.chip} is not {' or '.join(_CHIPS)}, for whose wgmma it is written"
    dtypes = {str(x.dtype) for x in (inputs, recurrent)}
    if dtypes != {"bfloat16"}:
        return (f"inputs and recurrent of {', '.join(sorted(dtypes))} must both be bfloat16; use "
                "xla")
    sizes = _sizes(inputs, CELLS[cell], segment_ids)
    if sizes.shared_bytes > _SHARED_BYTES:
        return (f"a head of {sizes.d} has {sizes.cell.gates * sizes.width ** 2 * 2 / 1e6:.2f} MB "
                f"of matrices and needs {sizes.shared_bytes / 1e6:.2f} MB of shared memory, of "
                f"which a block has {_SHARED_BYTES / 1e6:.2f} MB; use xla, one matmul and one "
                "pointwise kernel a step")
    return None


def _shared(shape, dtype):
    """Shared memory as wgmma and the copies of tiles want it."""
    tiling = pg.TilingTransform((8, _SWIZZLE // jnp.dtype(dtype).itemsize))
    return pg.SMEM(shape, dtype, transforms=(tiling, pg.SwizzleTransform(_SWIZZLE)))


def _load(ref):
    return compat.gpu_load(ref, _TILE).astype(jnp.float32)


def _fetch(pairs, barrier):
    """Starts copies of planes: as many arrivals at the barrier."""
    for source, place in pairs:
        pg.copy_gmem_to_smem(source, place, barrier)


def _forward(inputs, recurrent, bias, marks, state, *, cell, save):
    sizes = _sizes(inputs, cell, marks)
    groups, width, planes = sizes.warpgroups, sizes.width, sizes.forward_planes
    dtype = inputs.dtype
    wide = jnp.broadcast_to(bias.astype(jnp.float32), (_BATCH, *bias.shape))
    operands = (
        sizes.lay(sizes.with_marks(inputs, marks)),
        sizes.matrices(jnp.swapaxes(recurrent, 2, 3)),
        dataclasses.replace(sizes, b=_BATCH).lay(wide)[0],
        sizes.lay(jnp.moveaxis(state, 0, 1)))
    # Of h, then of the state, and where they are saved of what each position starts from.
    results = [sizes.array(sizes.t, dtype=dtype), sizes.array(cell.states, dtype=jnp.float32)]
    if save:
        results += [sizes.array(sizes.t, dtype=dtype),
                    *[sizes.array(sizes.t, dtype=jnp.float32)] * sizes.kept]
    each = pg.Barrier(num_arrivals=cell.gates, num_barriers=groups)
    scratch = {
        "held": _shared((groups, cell.gates, _ROWS, width), dtype),
        "inputs": _shared((groups, planes, _ROWS, _BATCH), dtype),
        "biases": pg.SMEM((groups, cell.biases, _ROWS, _BATCH), jnp.float32),
        "hidden": _shared((2, width, _BATCH), dtype),
        "outgoing": _shared((groups, _ROWS, _BATCH), dtype),
        "ready": each,
        "biased": pg.Barrier(num_arrivals=cell.biases, num_barriers=groups),
        "arrived": pg.Barrier(num_arrivals=planes, num_barriers=groups),
        "met": pg.Barrier(num_arrivals=groups),
    }

    def kernel(x, matrices, bias, first, h, last, *saved, **shared):
        b, head, w = (lax.axis_index(axis) for axis in ("batch", "head", "warpgroup"))
        mine = pl.ds(w * _ROWS, _ROWS)
        arrived = shared["arrived"].at[w]

        def fetch(t):
            _fetch([(x.at[b, head, t, p, mine], shared["inputs"].at[w, p])
                    for p in range(planes)], arrived)

        _fetch([(matrices.at[head, w, g], shared["held"].at[w, g])
                for g in range(cell.gates)], shared["ready"].at[w])
        _fetch([(bias.at[head, p, mine], shared["biases"].at[w, p])
                for p in range(cell.biases)], shared["biased"].at[w])
        fetch(0)
        pg.barrier_wait(shared["ready"].at[w])
        pg.barrier_wait(shared["biased"].at[w])

        def multiply(h):
            def run(*sums):
                for g, total in enumerate(sums):
                    pg.wgmma(total, shared["held"].at[w, g], h)
                pg.wgmma_wait(0)
                return [total[...] for total in sums]

            return pl.run_scoped(run, *[pg.ACC((_ROWS, _BATCH), jnp.float32)] * cell.gates)

        def step(t, state):
            slot = lax.rem(t, jnp.int32(2))
            pg.barrier_wait(arrived)
            gates = [_load(shared["inputs"].at[w, p]) for p in range(planes)]
            mark = gates.pop() if sizes.marked else None
            start = entered(mark, state)
            pg.wait_smem_to_gmem(0, wait_read_only=True)
            shared["hidden"].at[slot, mine][...] = start[0].astype(dtype)
            pg.commit_smem()
            pl.when(t + 1 < sizes.t)(lambda: fetch(t + 1))
            if groups > 1:
                pg.barrier_arrive(shared["met"])
                pg.barrier_wait(shared["met"])
            if save:
                pg.copy_smem_to_gmem(shared["hidden"].at[slot, mine], saved[0].at[b, head, t, mine])
                for ref, value in zip(saved[1:], start[1:], strict=True):
                    ref.at[b, head, t, mine][...] = value
            products = multiply(shared["hidden"].at[slot])
            pre = cell.before(gates, products,
                              [_load(shared["biases"].at[w, p]) for p in range(cell.biases)])
            state = advanced(cell, mark, pre, start)
            shown = state[0] if mark is None else jnp.where(mark == PADDING, 0.0, state[0])
            outgoing = shared["outgoing"].at[w]
            outgoing[...] = shown.astype(dtype)
            pg.commit_smem()
            pg.copy_smem_to_gmem(outgoing, h.at[b, head, t, mine])
            return tuple(state)

        state = lax.fori_loop(0, sizes.t, step, tuple(
            compat.gpu_load(first.at[b, head, s, mine], _TILE, optimized=False)
            for s in range(cell.states)))
        for s, value in enumerate(state):
            last.at[b, head, s, mine][...] = value
        pg.wait_smem_to_gmem(0)

    h, last, *saved = sizes.call(kernel, "rnn", operands, results, scratch, 1)
    return sizes.unlay(h), jnp.moveaxis(sizes.unlay(last), 1, 0), saved


def _backward(inputs, recurrent, bias, marks, saved, d_h, d_state, *, cell):
    sizes = _sizes(inputs, cell, marks)
    groups, width, planes = sizes.warpgroups, sizes.width, sizes.backward_planes
    dtype = inputs.dtype
    start = sizes.unlay(saved[0])
    products = jnp.einsum("bthd,ghde->gbthe", start, recurrent, preferred_element_type=jnp.float32)
    pre = cell.before(jnp.moveaxis(inputs.astype(jnp.float32), 2, 0), products,
                      bias.astype(jnp.float32))
    pre = jnp.stack([jnp.broadcast_to(x, start.shape) for x in pre], axis=2)
    operands = (
        sizes.lay(sizes.with_marks(jnp.stack(
            [d_h.astype(dtype)] + ([] if sizes.kept else [start]), axis=2), marks)),
        sizes.lay(pre), sizes.matrices(recurrent), sizes.lay(jnp.moveaxis(d_state, 0, 1)),
        *saved[1:])
    results = [sizes.array(sizes.t, cell.biases, dtype=dtype),
               sizes.array(cell.states, dtype=jnp.float32)]
    copies = planes + cell.biases + sizes.kept
    scratch = {
        "held": _shared((groups, cell.gates, _ROWS, width), dtype),
        "planes": _shared((groups, planes, _ROWS, _BATCH), dtype),
        "wide": pg.SMEM((groups, cell.biases + sizes.kept, _ROWS, _BATCH), jnp.float32),
        "outgoing": _shared((2, cell.biases, width, _BATCH), dtype),
        "ready": pg.Barrier(num_arrivals=cell.gates, num_barriers=groups),
        "arrived": pg.Barrier(num_arrivals=copies, num_barriers=groups),
        "met": pg.Barrier(num_arrivals=groups),
    }

    def kernel(x, pre, matrices, d_last, *arrays, **shared):
        starts, (d_pre, d_first) = arrays[:sizes.kept], arrays[sizes.kept:]
        b, head, w = (lax.axis_index(axis) for axis in ("batch", "head", "warpgroup"))
        mine = pl.ds(w * _ROWS, _ROWS)
        arrived = shared["arrived"].at[w]

        def fetch(t):
            wide = [pre.at[b, head, t, p, mine] for p in range(cell.biases)]
            wide += [ref.at[b, head, t, mine] for ref in starts]
            _fetch([(x.at[b, head, t, p, mine], shared["planes"].at[w, p])
                    for p in range(planes)], arrived)
            _fetch([(ref, shared["wide"].at[w, i]) for i, ref in enumerate(wide)], arrived)

        _fetch([(matrices.at[head, w, g], shared["held"].at[w, g])
                for g in range(cell.gates)], shared["ready"].at[w])
        fetch(sizes.t - 1)
        pg.barrier_wait(shared["ready"].at[w])

        def multiply_back(d_products):
            def run(total):
                for g, p in enumerate(cell.products):
                    pg.wgmma(total, shared["held"].at[w, g], d_products.at[p])
                pg.wgmma_wait(0)
                return total[...]

            return pl.run_scoped(run, pg.ACC((_ROWS, _BATCH), jnp.float32))

        def step(i, d_state):
            t = sizes.t - 1 - i
            slot = lax.rem(i, jnp.int32(2))
            pg.barrier_wait(arrived)
            d_out, *h = (_load(shared["planes"].at[w, p]) for p in range(planes))
            mark = h.pop() if sizes.marked else None
            wide = [_load(shared["wide"].at[w, i]) for i in range(cell.biases + sizes.kept)]
            if mark is not None:
                d_out = jnp.where(mark == PADDING, 0.0, d_out)
            d_own, d_start = derivatives(
                cell, mark, wide[:cell.biases], h or [None, *wide[cell.biases:]],
                (d_state[0] + d_out, *d_state[1:]))
            pg.wait_smem_to_gmem(0, wait_read_only=True)
            for p, value in enumerate(d_own):
                shared["outgoing"].at[slot, p, mine][...] = value.astype(dtype)
            pg.commit_smem()
            pl.when(t > 0)(lambda: fetch(t - 1))
            if groups > 1:
                pg.barrier_arrive(shared["met"])
                pg.barrier_wait(shared["met"])
            for p in range(cell.biases):
                pg.copy_smem_to_gmem(shared["outgoing"].at[slot, p, mine],
                                     d_pre.at[b, head, t, p, mine])
            d_start[0] += multiply_back(shared["outgoing"].at[slot])
            return tuple(left(mark, d_start))

        d_state = lax.fori_loop(0, sizes.t, step, tuple(
            compat.gpu_load(d_last.at[b, head, s, mine], _TILE, optimized=False)
            for s in range(cell.states)))
        for s, value in enumerate(d_state):
            d_first.at[b, head, s, mine][...] = value
        pg.wait_smem_to_gmem(0)

    d_pre, d_first = sizes.call(kernel, "rnn_backward", operands, results, scratch, 1)
    d_pre = sizes.unlay(d_pre)
    return (d_pre[:, :, :cell.gates],
            *parameter_gradients(cell, start, [d_pre[:, :, p] for p in range(cell.biases)], "bth"),
            jnp.moveaxis(sizes.unlay(d_first), 1, 0))


_rnn = differentiable(_forward, _backward)


def rnn(*operands, **options):
    """See `pallas_kernels.rnn.rnn`; tiles are of 16 rows of the batch."""
    return _rnn(*operands, **options)
