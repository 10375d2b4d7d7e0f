"""Recurrent cells for TPUs: Pallas Mosaic kernels, forward and backward.

Why: XLA's loop reads the recurrent matrices from HBM in every step, and starts several operations
a step. Here a program holds the matrices of some heads in VMEM from the first position to the last,
with their state beside them, while blocks of inputs stream in and h streams out.

Floor a step: the push of a program's matrices into the matrix unit, |R| / 2048 cycles whatever the
batch; so batches grow before programs do (see tiles.py). Heads narrower than 128 lanes stand on the
diagonal of one matrix. The backward pass makes the products of a block of positions again in one
product of all their rows, and its own loop has one product a step, by the transposed matrices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import Target
from pallas_kernels.rnn import tiles as tiling
from pallas_kernels.rnn.cells import (
    CELLS,
    CONTINUES,
    PADDING,
    advanced,
    derivatives,
    differentiable,
    entered,
    left,
    parameter_gradients,
)


def supports(target, inputs, recurrent, bias, segment_ids=None, state=None, *, cell):
    """float32 or bfloat16 alike, and heads whose matrices fit the VMEM."""
    dtypes = {jnp.dtype(x.dtype) for x in (inputs, recurrent)}
    if len(dtypes) > 1 or dtypes - {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        names = ", ".join(sorted(str(d) for d in dtypes))
        return f"inputs and recurrent of {names} must be float32 or bfloat16 alike"
    try:
        tiling.choose(tiling.of(inputs, CELLS[cell]), target.chip)
    except NotImplementedError as error:
        return str(error)
    return None


def candidates(inputs, *operands, cell):
    """Programs of fewer heads, and blocks of fewer positions."""
    chosen = tiling.choose(tiling.of(inputs, CELLS[cell]), Target.ambient().chip)
    groups = [n for n in range(1, chosen.groups + 1) if chosen.groups % n == 0]
    times = [n for n in (4, 16, 64) if n <= chosen.times]
    return [{"groups": g, "rows": chosen.rows, "times": t} for g in groups for t in times]


def _dot(a, b, contract=((1,), (0,))):
    # By default the MXU rounds float32 operands to bfloat16.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision,
                           preferred_element_type=jnp.float32)


def _mark(marks, t, lanes):
    """[rows, lanes] of a position, or None."""
    if marks is None:
        return None
    row = marks[t]
    return jnp.broadcast_to(row.T, (row.shape[1], lanes))


def _columns(matrices):
    """Of each group."""
    n, lanes, _ = matrices.shape
    return [slice(i * lanes, (i + 1) * lanes) for i in range(n)]


def _by_gate(x, lanes):
    return [x[:, i:i + lanes] for i in range(0, x.shape[1], lanes)]


def _wide(x):
    return x.astype(jnp.float32)


def _forward_kernel(inputs, matrices, bias, first, *refs, cell, marked, save):
    marks, refs = (refs[0], refs[1:]) if marked else (None, refs)
    h, last, *saved, state = refs
    lanes = matrices.shape[1]

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = first[...]

    def step(t, _):
        mark = _mark(marks, t, lanes)
        for n, own in enumerate(_columns(matrices)):
            start = entered(mark, [state[s, :, own] for s in range(cell.states)])
            products = _dot(start[0].astype(matrices.dtype), matrices[n])
            pre = cell.before([_wide(inputs[t, g, :, own]) for g in range(cell.gates)],
                              _by_gate(products, lanes),
                              [bias[p:p + 1, own] for p in range(cell.biases)])
            new = advanced(cell, mark, pre, start)
            for s, x in enumerate(new):
                state[s, :, own] = x
            shown = new[0] if mark is None else jnp.where(mark == PADDING, 0.0, new[0])
            h[t, :, own] = shown.astype(h.dtype)
            if save:
                for ref, x in zip(saved, start, strict=True):
                    ref[t, :, own] = x.astype(ref.dtype)
        return 0

    lax.fori_loop(0, inputs.shape[0], step, 0)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        last[...] = state[...]


def _backward_kernel(inputs, matrices, bias, d_last, *refs, cell, marked):
    marks, refs = (refs[0], refs[1:]) if marked else (None, refs)
    saved, (d_h, d_pre, d_first, products, d_state) = refs[:cell.states], refs[cell.states:]
    lanes, (times, rows, _) = matrices.shape[1], d_h.shape

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_state[...] = d_last[...]

    for n, own in enumerate(_columns(matrices)):
        products[n] = _dot(saved[0][:, :, own].reshape(times * rows, lanes), matrices[n])

    def step(i, _):
        t = times - 1 - i
        mark = _mark(marks, t, lanes)
        here = pl.ds(pl.multiple_of(t * rows, rows), rows)
        for n, own in enumerate(_columns(matrices)):
            pre = cell.before([_wide(inputs[t, g, :, own]) for g in range(cell.gates)],
                              _by_gate(products[n, here, :], lanes),
                              [bias[p:p + 1, own] for p in range(cell.biases)])
            start = [_wide(ref[t, :, own]) for ref in saved]
            d_out = _wide(d_h[t, :, own])
            if mark is not None:
                d_out = jnp.where(mark == PADDING, 0.0, d_out)
            after = [d_state[s, :, own] for s in range(cell.states)]
            after[0] += d_out
            d_own, d_start = derivatives(cell, mark, pre, start, after)
            d_products = jnp.concatenate([d_own[p] for p in cell.products], axis=1)
            d_start[0] += _dot(d_products.astype(matrices.dtype), matrices[n], ((1,), (1,)))
            for s, x in enumerate(left(mark, d_start)):
                d_state[s, :, own] = x
            for p, x in enumerate(d_own):
                d_pre[t, p, :, own] = x.astype(d_pre.dtype)
        return 0

    lax.fori_loop(0, times, step, 0)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        d_first[...] = d_state[...]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The op's sizes, its tiles, and its kernels' calls.

    Arrays are [T, gates, B, groups * lanes]: a position's rows are whole tiles.
    """

    sizes: tiling.Sizes
    tiles: tiling.Tiles
    vmem: int
    kind: jnp.dtype
    reverse: bool = False

    @property
    def grid(self):
        return (-(-self.sizes.groups // self.tiles.groups), -(-self.sizes.b // self.tiles.rows),
                -(-self.sizes.t // self.tiles.times))

    @property
    def rows(self):
        return self.grid[1] * self.tiles.rows

    @property
    def times(self):
        return self.grid[2] * self.tiles.times

    @property
    def across(self):
        """Lanes of all groups."""
        return self.sizes.groups * self.sizes.lanes

    def lay(self, x):
        """[..., H, D] as [..., groups * lanes]."""
        sizes = self.sizes
        more = sizes.groups * sizes.shared - sizes.h, sizes.width - sizes.d
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, n) for n in more])
        return x.reshape(*x.shape[:-2], -1)

    def unlay(self, x):
        """The inverse of `lay`."""
        return x.reshape(*x.shape[:-1], -1, self.sizes.width)[..., :self.sizes.h, :self.sizes.d]

    def over_time(self, x):
        """[B, T, ...] with time first, in whole tiles."""
        x = jnp.pad(x, [(0, self.rows - self.sizes.b), (0, self.times - self.sizes.t)]
                    + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x, 0, -2) if x.ndim > 2 else x.T

    def state(self, x):
        """[S, B, H, D] as [S, rows, groups * lanes]."""
        return jnp.pad(self.lay(x), ((0, 0), (0, self.rows - self.sizes.b), (0, 0)))

    def unstate(self, x):
        return self.unlay(x[:, :self.sizes.b])

    def matrices(self, x):
        """[G, H, D, D] as [groups, lanes, G * lanes]: a group's heads are blocks of a diagonal."""
        sizes = self.sizes
        more = sizes.width - sizes.d
        x = jnp.pad(x, ((0, 0), (0, sizes.groups * sizes.shared - sizes.h), (0, more), (0, more)))
        x = x.reshape(x.shape[0], sizes.groups, sizes.shared, sizes.width, sizes.width)
        x = jnp.einsum("gnpde,pq->npdgqe", x, jnp.eye(sizes.shared, dtype=x.dtype))
        return x.reshape(sizes.groups, sizes.lanes, -1)

    def table(self, marks):
        """float32 [tiles of rows, T, 1, rows], or None where no position differs."""
        if marks is None:
            if self.times == self.sizes.t:
                return None
            marks = jnp.full((self.sizes.b, self.sizes.t), CONTINUES)
        x = self.over_time(marks).astype(jnp.float32)
        return jnp.moveaxis(x.reshape(self.times, 1, self.grid[1], self.tiles.rows), 2, 0)

    def _spec(self, shape, index):
        def place(n, b, k):
            return index(n, b, self.grid[2] - 1 - k if self.reverse else k)

        return pl.BlockSpec(shape, place)

    @property
    def _wide(self):
        return self.tiles.groups * self.sizes.lanes

    def positions(self, *gates):
        """Of [T, (gates,) rows, lanes]."""
        return self._spec((self.tiles.times, *gates, self.tiles.rows, self._wide),
                          lambda n, b, k: (k, *(0 for _ in gates), b, n))

    @property
    def states(self):
        return self._spec((self.sizes.cell.states, self.tiles.rows, self._wide),
                          lambda n, b, k: (0, b, n))

    def on_time(self, *gates, dtype=None):
        return jax.ShapeDtypeStruct((self.times, *gates, self.rows, self.across),
                                    dtype or self.kind)

    def call(self, kernel, name, inputs, recurrent, bias, marks, state, more, more_specs, out_specs,
             out_shape, scratch, products):
        """`products`: how many times the matrices are multiplied by each row."""
        sizes, cell = self.sizes, self.sizes.cell
        table = self.table(marks)
        operands = [self.over_time(self.lay(inputs)), self.matrices(recurrent),
                    self.lay(bias.astype(jnp.float32)), self.state(state)]
        specs = [self.positions(cell.gates),
                 self._spec((self.tiles.groups, sizes.lanes, cell.gates * sizes.lanes),
                            lambda n, b, k: (n, 0, 0)),
                 self._spec((cell.biases, self._wide), lambda n, b, k: (0, n)), self.states]
        if table is not None:
            operands.append(table)
            specs.append(self._spec((None, self.tiles.times, 1, self.tiles.rows),
                                    lambda n, b, k: (b, k, 0, 0)))
        operands += more
        rows = self.times * self.rows
        return pl.pallas_call(
            functools.partial(kernel, cell=cell, marked=table is not None),
            name=name,
            grid=self.grid,
            in_specs=[*specs, *more_specs],
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=self.vmem),
            cost_estimate=pl.CostEstimate(
                flops=products * 2 * rows * cell.gates * sizes.lanes * self.across,
                transcendentals=products * rows * cell.biases * self.across,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*operands, *out_shape))),
        )(*operands)

    @property
    def carry(self):
        return pltpu.VMEM((self.sizes.cell.states, self.tiles.rows, self._wide), jnp.float32)

    @property
    def state_out(self):
        return jax.ShapeDtypeStruct((self.sizes.cell.states, self.rows, self.across), jnp.float32)


def _plan(inputs, cell, static, **options):
    groups, rows, times, vmem = static
    return _Plan(tiling.of(inputs, cell), tiling.Tiles(groups, rows, times), vmem, inputs.dtype,
                 **options)


def _forward(inputs, recurrent, bias, marks, state, *, cell, save, tiles):
    plan = _plan(inputs, cell, tiles)
    saved = [plan.on_time(), *[plan.on_time(dtype=jnp.float32)] * (cell.states - 1)] if save else []
    h, last, *saved = plan.call(
        functools.partial(_forward_kernel, save=save), "rnn", inputs, recurrent, bias, marks, state,
        [], [], [plan.positions(), plan.states, *[plan.positions()] * len(saved)],
        [plan.on_time(), plan.state_out, *saved], [plan.carry], 1)
    h = jnp.moveaxis(plan.unlay(h[:plan.sizes.t, :plan.sizes.b]), 1, 0)
    return h, plan.unstate(last), saved


def _backward(inputs, recurrent, bias, marks, saved, d_h, d_state, *, cell, tiles):
    plan = _plan(inputs, cell, tiles, reverse=True)
    products = plan.tiles.times * plan.tiles.rows, cell.gates * plan.sizes.lanes
    d_pre, d_first = plan.call(
        _backward_kernel, "rnn_backward", inputs, recurrent, bias, marks, d_state,
        [*saved, plan.over_time(plan.lay(d_h))], [plan.positions()] * (cell.states + 1),
        [plan.positions(cell.biases), plan.states], [plan.on_time(cell.biases), plan.state_out],
        [pltpu.VMEM((plan.tiles.groups, *products), jnp.float32), plan.carry], 2)
    t, b = plan.sizes.t, plan.sizes.b
    d_pre = plan.unlay(d_pre[:t, :, :b])
    return (jnp.moveaxis(d_pre[:, :cell.gates], 2, 0),
            *parameter_gradients(cell, plan.unlay(saved[0][:t, :b]),
                                 [d_pre[:, p] for p in range(cell.biases)], "tbh"),
            plan.unstate(d_first))


_rnn = differentiable(_forward, _backward)


def rnn(inputs, *operands, cell, groups=None, rows=None, times=None):
    """See `pallas_kernels.rnn.rnn`; a program holds `groups` of heads, `rows` of the batch, and
    `times` positions of them at once, which `tiles.choose` chooses."""
    chip = Target.ambient().chip
    if None in (groups, rows, times):
        best = tiling.choose(tiling.of(inputs, CELLS[cell]), chip)
        groups, rows, times = groups or best.groups, rows or best.rows, times or best.times
    return _rnn(inputs, *operands, cell=cell, tiles=(groups, rows, times, tiling.vmem(chip)))
