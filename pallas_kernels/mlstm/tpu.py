"""The matrix LSTM for TPUs: Pallas Mosaic kernels, forward and backward.

Why: XLA writes a chunk's scores and its state to HBM in every product. Here the state stays in VMEM
from chunk to chunk, as a TPU runs a head's chunks in turn anyway, and scores exist only as tiles:
the forward pass reads q, k and v once and writes h, and no state at all. The backward pass writes
the states between chunks in the operands' dtype and reads them from the last to the first.

Floor, of T L (K + V) half hidden by the causal mask: forward H T (L (K + V) + 4 K V) FLOPs and
T H (2 K + 2 V) elements; backward H T (L (3 K + 2 V) + 10 K V) FLOPs, T H (5 K + 4 V) elements and
2 T / L K V of states.

Inside a chunk, 128 rows at a time meet only the columns up to their own, so that a longer chunk
costs half of its square; positions' gates lie on lanes, eight to a tile, where columns of them
would fill 128 lanes each.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mlstm.chunks import NEVER, Grads, differentiable, split

LANES = 128

# A chunk's rows are what the state's products share a push of the state into the matrix unit for.
CHUNK = 256

_VMEM_BYTES = 56 << 20
# K x V: some eight copies of it stand in VMEM.
_LARGEST_STATE = 1 << 20


def supports(target, query, key, value, *rest, **options):
    """float32 or bfloat16 alike, and states that VMEM can hold."""
    dtypes = {jnp.dtype(x.dtype) for x in (query, key, value)}
    if len(dtypes) > 1 or dtypes - {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        names = ", ".join(sorted(str(d) for d in dtypes))
        return f"operands of {names} must be float32 or bfloat16 alike"
    k, v = (_round_up(x.shape[-1], LANES) for x in (key, value))
    if k * v > _LARGEST_STATE:
        return f"a state of {k} x {v} exceeds the {_LARGEST_STATE} elements that fit the VMEM"
    return None


def candidates(query, *operands, **options):
    """Chunks of other lengths."""
    longest = _round_up(query.shape[1], LANES)
    return [{"chunk": n} for n in (128, 256, 512) if n <= longest]


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _dot(a, b, contract):
    # By default the MXU rounds float32 operands to bfloat16.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision,
                           preferred_element_type=jnp.float32)


_NN, _NT, _TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


class _Columns:
    """A table of gates, [8, L] on lanes, as columns [L, 1] and as the rows it has."""

    def __init__(self, ref, names):
        self.lanes, self.names = ref[...], names
        self.columns = self.lanes.T

    def row(self, name, end):
        i = self.names.index(name)
        return self.lanes[i:i + 1, :end]

    def __getitem__(self, name):
        i = self.names.index(name)
        return self.columns[:, i:i + 1]

    @property
    def keep(self):
        """[1, 1]."""
        return self["keep"][:1]

    def weights(self, rows):
        """[128, end]: of the columns up to the last of `rows`."""
        exponent = (self["coarse"][rows] - self.row("coarse", rows.stop)) + (
            self["row"][rows] - self.row("column", rows.stop))
        i = rows.start + lax.broadcasted_iota(jnp.int32, exponent.shape, 0)
        j = lax.broadcasted_iota(jnp.int32, exponent.shape, 1)
        return jnp.exp(jnp.where(j <= i, exponent, NEVER))


def _blocks(chunk):
    return [slice(n, n + LANES) for n in range(0, chunk, LANES)]


def _advance(k, v, gates, cell, normalizer):
    """Updates the state's references by a chunk."""
    written = gates["write"] * k.astype(jnp.float32)
    cell[...] = gates.keep * cell[...] + _dot(written.astype(k.dtype), v, _TN)
    normalizer[...] = gates.keep * normalizer[...] + jnp.sum(written, axis=0, keepdims=True)


_FORWARD = ("coarse", "row", "column", "read", "write", "floor", "keep")


def _forward_kernel(q, k, v, table, cell_in, normalizer_in, h, total_out, cell_out, normalizer_out,
                    cell, normalizer, total, *, eps):
    @pl.when(pl.program_id(2) == 0)
    def _():
        cell[...], normalizer[...] = cell_in[...], normalizer_in[...]

    gates = _Columns(table, _FORWARD)
    before, sums = cell[...].astype(q.dtype), normalizer[...]
    for rows in _blocks(q.shape[0]):
        own = q[rows, :]
        scores = _dot(own, k[:rows.stop, :], _NT) * gates.weights(rows)
        read = gates["read"][rows]
        denominator = jnp.sum(scores, axis=1, keepdims=True) + read * jnp.sum(
            own.astype(jnp.float32) * sums, axis=1, keepdims=True)
        inverse = 1.0 / (jnp.maximum(jnp.abs(denominator), gates["floor"][rows]) + eps)
        out = _dot(scores.astype(q.dtype), v[:rows.stop, :], _NN) + read * _dot(own, before, _NN)
        h[rows, :] = (out * inverse).astype(h.dtype)
        total[rows, :] = denominator
    total_out[...] = total[...].T
    _advance(k[...], v[...], gates, cell, normalizer)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        cell_out[...], normalizer_out[...] = cell[...], normalizer[...]


_STATES = ("write", "keep")


def _states_kernel(k, v, table, cell_in, normalizer_in, cells, normalizers, cell, normalizer):
    @pl.when(pl.program_id(2) == 0)
    def _():
        cell[...], normalizer[...] = cell_in[...], normalizer_in[...]

    cells[...], normalizers[...] = cell[...].astype(cells.dtype), normalizer[...]
    _advance(k[...], v[...], _Columns(table, _STATES), cell, normalizer)


_BACKWARD = ("coarse", "row", "column", "read", "write", "keep", "inverse", "d_total")


def _backward_kernel(q, k, v, d_h, table, cells, normalizers, d_cell_in, d_normalizer_in, d_q, d_k,
                     d_v, found, d_cell_out, d_normalizer_out, d_cell, d_normalizer, d_k_sum,
                     d_v_sum, products):
    @pl.when(pl.program_id(2) == 0)
    def _():
        d_cell[...], d_normalizer[...] = d_cell_in[...], d_normalizer_in[...]

    gates, kind = _Columns(table, _BACKWARD), q.dtype
    before, sums = cells[...], normalizers[...]
    after, d_sums = d_cell[...].astype(kind), d_normalizer[...]

    def wide(ref):
        return ref[...].astype(jnp.float32)

    d_out = (gates["inverse"] * wide(d_h)).astype(kind)
    d_k_sum[...] = jnp.zeros_like(d_k_sum)
    d_v_sum[...] = _dot((gates["write"] * wide(k)).astype(kind), after, _NN)
    for rows in _blocks(q.shape[0]):
        own, upstream, to = q[rows, :], d_out[rows, :], slice(0, rows.stop)
        d_total, read = gates["d_total"][rows], gates["read"][rows]
        weights = gates.weights(rows)
        scores = (_dot(own, k[to, :], _NT) * weights).astype(kind)
        d_scores = (weights * (_dot(upstream, v[to, :], _NT) + d_total)).astype(kind)
        new = _dot(d_scores, k[to, :], _NN) + read * (
            _dot(upstream, before, _NT) + d_total * sums)
        d_q[rows, :] = new.astype(d_q.dtype)
        d_k_sum[to, :] += _dot(d_scores, own, _TN)
        d_v_sum[to, :] += _dot(scores, upstream, _TN)
        products[rows, :] = jnp.sum(own.astype(jnp.float32) * new, axis=1, keepdims=True)
    d_k_written = gates["write"] * (_dot(v[...], after, _NT) + d_sums)
    columns = jnp.sum(wide(k) * d_k_sum[...], axis=1, keepdims=True)
    written = jnp.sum(wide(k) * d_k_written, axis=1, keepdims=True)
    kept = gates.keep * (
        jnp.sum(jnp.sum(d_cell[...] * before.astype(jnp.float32), axis=1, keepdims=True), axis=0,
                keepdims=True) + jnp.sum(d_sums * sums, axis=1, keepdims=True))
    lane = lax.broadcasted_iota(jnp.int32, (q.shape[0], 8), 1)
    found[...] = jnp.where(
        lane == 0, products[...],
        jnp.where(lane == 1, columns, jnp.where(lane == 2, written, kept))).T
    d_k[...] = (d_k_sum[...] + d_k_written).astype(d_k.dtype)
    d_v[...] = d_v_sum[...].astype(d_v.dtype)
    q_read = gates["read"] * wide(q)
    d_cell[...] = gates.keep * d_cell[...] + _dot(q_read.astype(kind), d_out, _TN)
    d_normalizer[...] = gates.keep * d_sums + jnp.sum(gates["d_total"] * q_read, axis=0,
                                                      keepdims=True)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        d_cell_out[...], d_normalizer_out[...] = d_cell[...], d_normalizer[...]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The op's sizes, its blocks, and its kernels' calls.

    Attributes:
      b, t, h, k, v: the op's sizes; lanes of K and V are rounded up to 128 each.
      chunk, count: positions of a chunk, and chunks.
      kind: the operands' dtype.
      reverse: whether chunks run from the last to the first.
    """

    b: int
    t: int
    h: int
    k: int
    v: int
    chunk: int
    kind: jnp.dtype
    reverse: bool = False

    @classmethod
    def of(cls, query, value, chunk, **options):
        return cls(*query.shape, value.shape[-1], chunk, query.dtype, **options)

    @property
    def count(self) -> int:
        return -(-self.t // self.chunk)

    @property
    def lanes_k(self) -> int:
        return _round_up(self.k, LANES)

    @property
    def lanes_v(self) -> int:
        return _round_up(self.v, LANES)

    def flat(self, x):
        """[B, T, H, K] as [B, chunks * L, H * lanes]: heads stay where projections leave them."""
        lanes = _round_up(x.shape[-1], LANES)
        widths = (0, self.count * self.chunk - self.t, 0, lanes - x.shape[-1])
        if any(widths):
            x = jnp.pad(x, [(0, n) for n in widths])
        return x.reshape(*x.shape[:2], -1)

    def unflat(self, x, width):
        """The inverse of `flat`."""
        return x.reshape(*x.shape[:2], self.h, -1)[:, :self.t, :, :width]

    def state(self, cell, normalizer):
        """The state in whole lanes: [B, H, K, V] and [B, H, 1, K]."""
        more_k, more_v = self.lanes_k - self.k, self.lanes_v - self.v
        if more_k or more_v:
            cell = jnp.pad(cell, ((0, 0), (0, 0), (0, more_k), (0, more_v)))
            normalizer = jnp.pad(normalizer, ((0, 0), (0, 0), (0, more_k)))
        return cell, normalizer[:, :, None]

    def unstate(self, cell, normalizer):
        """The inverse of `state`."""
        return cell[:, :, :self.k, :self.v], normalizer[:, :, 0, :self.k]

    def table(self, gates, names, **more):
        """float32 [B, H, 8, chunks * L]: gates by name, each on lanes."""
        more["keep"] = jnp.broadcast_to(gates.keep[..., None], gates.read.shape)
        rows = [more.get(n, getattr(gates, n, None)) for n in names]
        rows += [jnp.zeros_like(gates.read)] * (8 - len(rows))
        x = jnp.stack(rows, axis=2)
        return x.reshape(self.b, self.h, 8, -1)

    def _spec(self, shape, index):
        def place(b, h, n):
            return index(b, h, self.count - 1 - n if self.reverse else n)

        return pl.BlockSpec(shape, place)

    @property
    def on_k(self):
        return self._spec((None, self.chunk, self.lanes_k), lambda b, h, n: (b, n, h))

    @property
    def on_v(self):
        return self._spec((None, self.chunk, self.lanes_v), lambda b, h, n: (b, n, h))

    def on_lanes(self, rows):
        """Of what lies on lanes, [B, H, rows, chunks * L]."""
        return self._spec((None, None, rows, self.chunk), lambda b, h, n: (b, h, 0, n))

    @property
    def whole(self):
        """Specs of a state [B, H, K, V] and [B, H, 1, K]."""
        return [self._spec((None, None, *tail), lambda b, h, n: (b, h, 0, 0))
                for tail in ((self.lanes_k, self.lanes_v), (1, self.lanes_k))]

    @property
    def each(self):
        """Specs of the states between chunks: with chunks after heads."""
        return [self._spec((None, None, None, *tail), lambda b, h, n: (b, h, n, 0, 0))
                for tail in ((self.lanes_k, self.lanes_v), (1, self.lanes_k))]

    def out(self, *shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((self.b, *shape), dtype)

    @property
    def state_out(self):
        return [self.out(self.h, self.lanes_k, self.lanes_v), self.out(self.h, 1, self.lanes_k)]

    @property
    def state_scratch(self):
        return [pltpu.VMEM((self.lanes_k, self.lanes_v), jnp.float32),
                pltpu.VMEM((1, self.lanes_k), jnp.float32)]

    def call(self, kernel, name, products, operands, in_specs, out_specs, out_shape, scratch):
        """`products`: K- and V-sized products of scores, and K x V ones, that a row takes part
        in."""
        on_k, on_v, on_state = products
        rows = self.b * self.h * self.count * self.chunk
        seen = (self.chunk + LANES) // 2
        flops = 2 * rows * (seen * (on_k * self.lanes_k + on_v * self.lanes_v)
                            + on_state * self.lanes_k * self.lanes_v)
        return pl.pallas_call(
            kernel,
            name=name,
            grid=(self.b, self.h, self.count),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=[*self.state_scratch, *scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=_VMEM_BYTES),
            cost_estimate=pl.CostEstimate(
                flops=flops, transcendentals=rows * seen if on_k else 0,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*operands, *out_shape))),
        )(*operands)


def _forward(query, key, value, cell, normalizer, gates, *, chunk, eps):
    plan = _Plan.of(query, value, chunk)
    flat = [plan.flat(x) for x in (query, key, value)]
    state = plan.state(cell, normalizer)
    padded = plan.count * chunk
    h, total, *state = plan.call(
        functools.partial(_forward_kernel, eps=eps), "mlstm", (1, 1, 2),
        (*flat, plan.table(gates, _FORWARD), *state),
        [plan.on_k, plan.on_k, plan.on_v, plan.on_lanes(8), *plan.whole],
        [plan.on_v, plan.on_lanes(1), *plan.whole],
        [jax.ShapeDtypeStruct(flat[2].shape, value.dtype), plan.out(plan.h, 1, padded),
         *plan.state_out],
        [pltpu.VMEM((chunk, 1), jnp.float32)])
    return plan.unflat(h, plan.v), total[:, :, 0, :plan.t], *plan.unstate(*state)


def _backward(query, key, value, cell, normalizer, gates, d_h, inverse, d_total, d_cell,
              d_normalizer, *, chunk):
    plan = _Plan.of(query, value, chunk)
    q, k, v, d_h = (plan.flat(x) for x in (query, key, value, d_h.astype(value.dtype)))
    states = plan.call(
        _states_kernel, "mlstm_states", (0, 0, 1),
        (k, v, plan.table(gates, _STATES), *plan.state(cell, normalizer)),
        [plan.on_k, plan.on_v, plan.on_lanes(8), *plan.whole], plan.each,
        [plan.out(plan.h, plan.count, plan.lanes_k, plan.lanes_v, dtype=plan.kind),
         plan.out(plan.h, plan.count, 1, plan.lanes_k)], [])
    plan = dataclasses.replace(plan, reverse=True)
    padded = plan.count * chunk
    inverse, d_total = (split(x, plan.count, chunk) for x in (inverse, d_total))
    d_q, d_k, d_v, found, *d_state = plan.call(
        _backward_kernel, "mlstm_backward", (3, 2, 4),
        (q, k, v, d_h, plan.table(gates, _BACKWARD, inverse=inverse, d_total=d_total), *states,
         *plan.state(d_cell, d_normalizer)),
        [plan.on_k, plan.on_k, plan.on_v, plan.on_v, plan.on_lanes(8), *plan.each, *plan.whole],
        [plan.on_k, plan.on_k, plan.on_v, plan.on_lanes(8), *plan.whole],
        [*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)),
         plan.out(plan.h, 8, padded), *plan.state_out],
        [pltpu.VMEM((chunk, plan.lanes_k), jnp.float32),
         pltpu.VMEM((chunk, plan.lanes_v), jnp.float32),
         pltpu.VMEM((chunk, 1), jnp.float32)])
    rows, columns, written, kept = (
        found[:, :, i].reshape(gates.read.shape) for i in range(4))
    return Grads(plan.unflat(d_q, plan.k), plan.unflat(d_k, plan.k), plan.unflat(d_v, plan.v),
                 *plan.unstate(*d_state), rows, columns, written, kept[..., 0])


_mlstm = differentiable(_forward, _backward)


def mlstm(*operands, chunk=None, **options):
    """See `pallas_kernels.mlstm.mlstm`; chunks are multiples of 128."""
    if chunk is None:
        chunk = min(CHUNK * 2 // operands[0].dtype.itemsize,
                    _round_up(operands[0].shape[1], LANES))
    return _mlstm(*operands, chunk=chunk, **options)
