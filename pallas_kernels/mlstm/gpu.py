"""The matrix LSTM on Hopper GPUs, by Mosaic GPU: the scores inside chunks, forward and backward.

Why: XLA's loop over chunks keeps a GPU busy with one chunk of each head at a time, and writes each
product's L x L scores to memory. Here all chunks run at once, each reading the state before it,
and scores and weights live in registers. The states between chunks are XLA's: one batched product,
and a scan that adds; they are K V / L numbers a position.

h and the gradients of query, key and value are one computation, run once for each: with weights
w_ij of a chunk and a state (or its gradient) S, ``out_i = sum_j w_ij (left_i . right_j + bias)
other_j + scale_i (left_i S)``. Floor for each: 2 T (L (D + E) + D E) FLOPs a head, for left of D
and other of E numbers, and one read of each operand and of T / L states; scores are made again for
each 128 columns of the result.

Two warpgroups hold 64 rows of a chunk each; a third one issues the copies.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as pg

from pallas_kernels import compat
from pallas_kernels.dispatch import interpreting
from pallas_kernels.mlstm.chunks import NEVER, Grads, differentiable, split
from pallas_kernels.wgmma import add_product

_CHIPS = ("h100", "h200")

_ROWS = 64  # of a warpgroup: wgmma's M
_WARPGROUPS = 2
_CHUNK = _ROWS * _WARPGROUPS
_DEPTH = 64  # of a copy: a row of 128 bytes, the widest swizzle
_STAGES = 3
_TILE = pg.Layout.WGMMA
_BY_ROW, _BY_COLUMN = _TILE.reduce(1), _TILE.reduce(0)
# Numbers of each position: "bias", of a query; "outer", which times `normalizer` adds to the
# result; "inner" is the state's part of a row's sum.
_VECTORS = ("coarse", "row", "column", "scale", "bias", "outer", "floor", "inner")


def supports(target, query, key, value, *rest, **options):
    """bfloat16, on Hopper."""
    if target.chip not in _CHIPS:
        return f"{target.chip} is not {' or '.join(_CHIPS)}, for whose wgmma it is written"
    dtypes = {str(x.dtype) for x in (query, key, value)}
    if dtypes != {"bfloat16"}:
        return f"operands of {', '.join(sorted(dtypes))} must all be bfloat16"
    return None


def _shared(shape, dtype):
    """Shared memory as wgmma and the copies of tiles want it."""
    tiling = pg.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
    return pg.SMEM(shape, dtype, transforms=(tiling, pg.SwizzleTransform(128)))


def _padded(x):
    """x [B, T, H, D], in whole chunks and depths."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % _CHUNK), (0, 0), (0, -x.shape[3] % _DEPTH)])


def _pairs(name, left, right, other, state, vectors, *, by_query, turned, normalizer=None,
           eps=None, out_dtype=None):
    """The computation above, for all chunks: [B, T, H, E], in `_padded` sizes.

    Args:
      left, right: [B, T, H, D].
      other: [B, T, H, E].
      state: [B, H, chunks, D, E], or [B, H, chunks, E, D] where it is `turned`.
      vectors: float32 [B, H, 8, T], `_VECTORS`.
      by_query: whether rows are queries and columns keys, or the reverse.
      normalizer: float32 [B, H, chunks, E].
      eps: divide by the rows' sums; the result is then (h, sums [B, H, T]).
      out_dtype: of the result, by default that of the operands.
    """
    batch, t, heads, depth = left.shape
    dtype, wide = left.dtype, other.shape[3]
    out_dtype = jnp.dtype(out_dtype or dtype)
    piece = 128 // out_dtype.itemsize
    width = 128 if wide % 128 == 0 else _DEPTH
    steps, tiles, count = depth // _DEPTH, wide // width, t // _CHUNK
    operands = {"left": left, "right": right, "other": other, "state": state, "vectors": vectors}
    if normalizer is not None:
        operands["normalizer"] = normalizer
    results = {"out": jax.ShapeDtypeStruct(other.shape, out_dtype)}
    if eps is not None:
        results["sums"] = jax.ShapeDtypeStruct((batch, heads, t), jnp.float32)
    scratch = {
        "lefts": _shared((_STAGES, _WARPGROUPS, _ROWS, _DEPTH), dtype),
        "rights": _shared((_STAGES, _CHUNK, _DEPTH), dtype),
        "states": _shared((_STAGES, *((width, _DEPTH) if turned else (_DEPTH, width))), dtype),
        "others": _shared((_CHUNK, width), dtype),
        "numbers": pg.SMEM((len(_VECTORS), _CHUNK), jnp.float32),
        "outer": pg.SMEM((width,), jnp.float32),
        "outgoing": _shared((_WARPGROUPS, _ROWS, piece), out_dtype),
        "outgoing_sums": pg.SMEM((_WARPGROUPS, _ROWS), jnp.float32),
        "filled": pg.Barrier(num_arrivals=_WARPGROUPS + 2, num_barriers=_STAGES),
        "freed": pg.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_STAGES),
        "arrived": pg.Barrier(num_arrivals=2 if normalizer is None else 3),
    }
    if interpreting():
        scratch["staging"] = _shared((_WARPGROUPS, _ROWS, _CHUNK), dtype)

    def kernel(*arrays, **shared):
        gmem = dict(zip((*operands, *results), arrays, strict=True))
        b, head, part = (lax.axis_index(axis) for axis in ("batch", "head", "part"))
        chunk, tile = lax.div(part, jnp.int32(tiles)), lax.rem(part, jnp.int32(tiles))
        warpgroup = lax.axis_index("warpgroup")
        columns = pl.ds(tile * width, width)

        @pl.when(warpgroup == _WARPGROUPS)
        def _():
            pg.set_max_registers(40, action="decrease")
            everyone = pl.ds(chunk * _CHUNK, _CHUNK)
            pg.copy_gmem_to_smem(gmem["vectors"].at[b, head, :, everyone], shared["numbers"],
                                 shared["arrived"])
            pg.copy_gmem_to_smem(gmem["other"].at[b, everyone, head, columns], shared["others"],
                                 shared["arrived"])
            if normalizer is not None:
                pg.copy_gmem_to_smem(gmem["normalizer"].at[b, head, chunk, columns],
                                     shared["outer"], shared["arrived"])

            @pl.loop(0, steps)
            def _(n):
                slot = lax.rem(n, jnp.int32(_STAGES))
                pl.when(n >= _STAGES)(lambda: pg.barrier_wait(shared["freed"].at[slot]))
                filled, deep = shared["filled"].at[slot], pl.ds(n * _DEPTH, _DEPTH)
                for w in range(_WARPGROUPS):
                    rows = pl.ds(chunk * _CHUNK + w * _ROWS, _ROWS)
                    pg.copy_gmem_to_smem(gmem["left"].at[b, rows, head, deep],
                                         shared["lefts"].at[slot, w], filled)
                pg.copy_gmem_to_smem(gmem["right"].at[b, everyone, head, deep],
                                     shared["rights"].at[slot], filled)
                place = (columns, deep) if turned else (deep, columns)
                pg.copy_gmem_to_smem(gmem["state"].at[b, head, chunk, *place],
                                     shared["states"].at[slot], filled)

        @pl.when(warpgroup < _WARPGROUPS)
        def _():
            pg.set_max_registers(232, action="increase")

            def multiply(pairs, read):
                @pl.loop(0, steps)
                def _(n):
                    slot = lax.rem(n, jnp.int32(_STAGES))
                    pg.barrier_wait(shared["filled"].at[slot])
                    own, states = shared["lefts"].at[slot, warpgroup], shared["states"].at[slot]
                    pg.wgmma(pairs, own, shared["rights"].at[slot].transpose((1, 0)))
                    pg.wgmma(read, own, states.transpose((1, 0)) if turned else states)
                    pg.wgmma_wait(0)
                    pg.barrier_arrive(shared["freed"].at[slot])

                return pairs[...], read[...]

            pairs, read = pl.run_scoped(multiply, pg.ACC((_ROWS, _CHUNK), jnp.float32),
                                        pg.ACC((_ROWS, width), jnp.float32))
            pg.barrier_wait(shared["arrived"])
            mine = pl.ds(warpgroup * _ROWS, _ROWS)

            def of_row(name):
                return compat.gpu_load(shared["numbers"].at[_VECTORS.index(name), mine], _BY_ROW)

            def of_column(name):
                return compat.gpu_load(shared["numbers"].at[_VECTORS.index(name)], _BY_COLUMN)

            def spread(x, shape, axis):
                return lax.broadcast_in_dim(x, shape, [axis])

            shape = pairs.shape
            if by_query:
                queries, keys, of_query, of_key = 0, 1, of_row, of_column
            else:
                queries, keys, of_query, of_key = 1, 0, of_column, of_row
            exponent = (spread(of_query("coarse"), shape, queries)
                        - spread(of_key("coarse"), shape, keys)
                        + (spread(of_query("row"), shape, queries)
                           - spread(of_key("column"), shape, keys)))
            i = warpgroup * _ROWS + pg.broadcasted_iota(jnp.int32, shape, 0, layout=_TILE)
            j = pg.broadcasted_iota(jnp.int32, shape, 1, layout=_TILE)
            past = j <= i if by_query else i <= j
            weights = jnp.exp(jnp.where(past, exponent, NEVER))
            pairs = weights * (pairs + spread(of_query("bias"), shape, queries))
            out = read * spread(of_row("scale"), read.shape, 0)
            if normalizer is not None:
                out += spread(of_row("outer"), read.shape, 0) * spread(
                    compat.gpu_load(shared["outer"], _BY_COLUMN), read.shape, 1)
            sums = jnp.sum(pairs, axis=1) if eps is not None else None
            staging = shared["staging"].at[warpgroup] if "staging" in shared else None
            out = add_product(out, pairs.astype(dtype), shared["others"], staging)
            rows = pl.ds(chunk * _CHUNK + warpgroup * _ROWS, _ROWS)
            if eps is not None:
                sums += of_row("inner")
                inverse = 1.0 / (jnp.maximum(jnp.abs(sums), of_row("floor")) + eps)
                out *= spread(inverse, out.shape, 0)

                @pl.when(tile == 0)
                def _():
                    shared["outgoing_sums"].at[warpgroup][...] = sums
                    pg.commit_smem()
                    pg.copy_smem_to_gmem(shared["outgoing_sums"].at[warpgroup],
                                         gmem["sums"].at[b, head, rows])

            outgoing = shared["outgoing"].at[warpgroup]
            for first in range(0, width, piece):
                pg.wait_smem_to_gmem(0, wait_read_only=True)
                outgoing[...] = out[:, first:first + piece].astype(out_dtype)
                pg.commit_smem()
                pg.copy_smem_to_gmem(outgoing, gmem["out"].at[
                    b, rows, head, pl.ds(tile * width + first, piece)])
            pg.wait_smem_to_gmem(0)

    made = pg.kernel(
        kernel,
        out_type=list(results.values()),
        scratch_types=scratch,
        # Tiles of one chunk last, the fastest: they read the same rows at the same time.
        grid=(batch, heads, count * tiles),
        grid_names=("batch", "head", "part"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=pg.CompilerParams(
            approx_math=True, lowering_semantics=pg.LoweringSemantics.Lane),
        **compat.gpu_cost_estimate(
            flops=2 * batch * heads * t * (_CHUNK * (depth * tiles + wide) + depth * wide),
            transcendentals=batch * heads * t * _CHUNK * tiles,
            bytes_accessed=sum(x.size * x.dtype.itemsize
                               for x in (*operands.values(), *results.values()))),
    )(*operands.values())
    return made if eps is not None else made[0]


# Sums of one number a position: nothing is gained by rounding them to TF32.
_exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def _states(first, keep, added, *, reverse=False):
    """(those before each chunk, the last): ``S = keep S + added``, chunk by chunk."""
    def add(state, x):
        kept, new = x
        return (kept.reshape(kept.shape + (1,) * (state.ndim - 2)) * state + new, state)

    last, each = lax.scan(add, first, (jnp.moveaxis(keep, 2, 0), jnp.moveaxis(added, 2, 0)),
                          reverse=reverse)
    return jnp.moveaxis(each, 0, 2), last


class _Problem:
    """The operands as the kernels want them, and the states between chunks."""

    def __init__(self, query, key, value, cell, normalizer, gates):
        self.shapes = [x.shape for x in (query, key, value)]
        self.query, self.key, self.value = (_padded(x) for x in (query, key, value))
        self.dtype, self.gates = query.dtype, gates
        state = self.widened(cell, normalizer)
        self.cells, self.last_cell = self.cells_of(gates.write, self.key, self.value, state[0])
        self.normalizers, self.last_normalizer = _states(
            state[1], gates.keep, _exact("bhnl,bnlhk->bhnk", gates.write,
                                         self.chunks(self.key).astype(jnp.float32)))

    def widened(self, cell, normalizer):
        """A state in whole depths."""
        more = self.key.shape[3] - cell.shape[2], self.value.shape[3] - cell.shape[3]
        return (jnp.pad(cell, ((0, 0), (0, 0), (0, more[0]), (0, more[1]))),
                jnp.pad(normalizer, ((0, 0), (0, 0), (0, more[0]))))

    def narrowed(self, cell, normalizer):
        """The inverse of `widened`."""
        k, v = self.shapes[1][3], self.shapes[2][3]
        return cell[:, :, :k, :v], normalizer[:, :, :k]

    def chunks(self, x):
        return x.reshape(x.shape[0], -1, _CHUNK, *x.shape[2:])

    def weighed(self, weights, x):
        """[B, chunks, L, H, D]: rows of x by [B, H, chunks, L], in x's dtype."""
        weights = jnp.transpose(weights, (0, 2, 3, 1))[..., None]
        return (weights * self.chunks(x)).astype(x.dtype)

    def cells_of(self, weights, left, right, first, **options):
        """States between chunks, each adding ``sum weight left right^T``: (each, the last)."""
        added = jnp.einsum("bnlhk,bnlhv->bhnkv", self.weighed(weights, left), self.chunks(right),
                           preferred_element_type=jnp.float32)
        return _states(first, self.gates.keep, added, **options)

    def vectors(self, scale, **more):
        """float32 [B, H, 8, T]."""
        gates = self.gates
        more |= {"coarse": gates.coarse, "row": gates.row, "column": gates.column, "scale": scale,
                 "floor": gates.floor}
        rows = [more.get(n, jnp.zeros_like(scale)) for n in _VECTORS]
        return jnp.stack(rows, axis=2).reshape(*scale.shape[:2], len(_VECTORS), -1)


def _forward(query, key, value, cell, normalizer, gates, *, chunk, eps):
    problem = _Problem(query, key, value, cell, normalizer, gates)
    inner = gates.read * _exact(
        "bnlhk,bhnk->bhnl", problem.chunks(problem.query).astype(jnp.float32), problem.normalizers)
    h, sums = _pairs(
        "mlstm_forward", problem.query, problem.key, problem.value,
        problem.cells.astype(problem.dtype), problem.vectors(gates.read, inner=inner),
        by_query=True, turned=False, eps=eps)
    t, v = value.shape[1], value.shape[3]
    return (h[:, :t, :, :v], sums[:, :, :t],
            *problem.narrowed(problem.last_cell, problem.last_normalizer))


def _backward(query, key, value, cell, normalizer, gates, d_h, inverse, d_total, d_cell,
              d_normalizer, *, chunk):
    problem = _Problem(query, key, value, cell, normalizer, gates)
    q, k, v = problem.query, problem.key, problem.value
    inverse, d_total = (split(x, *gates.read.shape[2:]) for x in (inverse, d_total))
    d_out = problem.weighed(inverse, _padded(d_h.astype(v.dtype))).reshape(v.shape)
    last, last_normalizer = problem.widened(d_cell, d_normalizer)
    d_cells, d_first = problem.cells_of(gates.read, q, d_out, last, reverse=True)
    rounded = d_cells.astype(problem.dtype)
    d_normalizers, d_first_normalizer = _states(
        last_normalizer, gates.keep, _exact("bhnl,bnlhk->bhnk", gates.read * d_total,
                                   problem.chunks(q).astype(jnp.float32)), reverse=True)
    d_q = _pairs(
        "mlstm_d_query", d_out, v, k, problem.cells.astype(problem.dtype),
        problem.vectors(gates.read, bias=d_total, outer=gates.read * d_total),
        by_query=True, turned=True, normalizer=problem.normalizers, out_dtype=jnp.float32)
    by_key = problem.vectors(gates.write, bias=d_total, outer=gates.write)
    d_k = _pairs("mlstm_d_key", v, d_out, q, rounded, by_key, by_query=False, turned=True,
                 normalizer=d_normalizers, out_dtype=jnp.float32)
    d_v = _pairs("mlstm_d_value", k, q, d_out, rounded, problem.vectors(gates.write),
                 by_query=False, turned=False)

    def product(d_each, each, last):
        """Of the state after each chunk and its gradient."""
        after = jnp.concatenate([each[:, :, 1:], last[:, :, None]], axis=2)
        return jnp.sum(d_each.astype(jnp.float32) * after, tuple(range(3, each.ndim)))

    # The products of keys hold what reaches the state after their chunk too. As part of `columns`
    # it is subtracted for the gates up to its position; with the whole in `kept`, what remains is
    # that of the positions before.
    # As the kernels read it, the gradient is rounded; the state is not, or this would not cancel.
    kept = product(rounded, problem.cells, problem.last_cell) + product(
        d_normalizers, problem.normalizers, problem.last_normalizer)
    rows, columns = (
        _exact("bnlhk,bnlhk->bhnl", problem.chunks(x).astype(jnp.float32), problem.chunks(d_x))
        for x, d_x in ((q, d_q), (k, d_k)))
    grads = (x[:, :shape[1], :, :shape[3]].astype(problem.dtype)
             for x, shape in zip((d_q, d_k, d_v), problem.shapes, strict=True))
    return Grads(*grads, *problem.narrowed(d_first, d_first_normalizer), rows, columns,
                 jnp.zeros_like(columns), kept)


_mlstm = functools.partial(differentiable(_forward, _backward), chunk=_CHUNK)


def mlstm(*operands, **options):
    """See `pallas_kernels.mlstm.mlstm`; chunks are of 128."""
    return _mlstm(*operands, **options)
