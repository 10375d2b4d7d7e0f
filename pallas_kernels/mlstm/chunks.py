"""What every chunkwise implementation shares: the gates of a chunk, and the gradient.

Inside a chunk, with b the running sum of the logarithms of the forget gates, row i reads column
j <= i with the weight ``exp(b_i - b_j + log input_j - m_i)`` and the state before the chunk with
``exp(b_i + m_before - m_i)``; m_i is the recurrence's own stabilizer, which a scan of scalars
gives for the whole sequence at once. (TFLA, arXiv:2503.14376, appendix A.)
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.dispatch import residual

# The exponent of a weight that is none.
NEVER = -1e30
# A logarithm of a forget gate is at least `_SHUT`, and `_RESET` between segments: far below what
# float32's exponential tells from 0, and small enough that sums of them are exact (see `Gates`).
_SHUT, _RESET = -256.0, -512.0
_STEPS = 64.0


class Gates(NamedTuple):
    """Per position and chunk, [B, H, chunks, L] but for `keep`, of the operands' precision.

    b is the sum of `coarse`, a multiple of 1 / 64 and hence exact in float32, and a rest smaller
    than L / 128. Differences of b lose nothing to it having become large: of b_i - b_j, `coarse`
    gives the first part exactly; `row` and `column` hold the rest.

    Attributes:
      coarse: the first part of b.
      row, column: row i reads column j with
        ``exp(coarse_i - coarse_j + row_i - column_j)``, the query's scale included.
      read: the weight of the state before the chunk, the query's scale included.
      write: the weight of a column in the state after the chunk.
      floor: of a row's denominator.
      keep: [B, H, chunks], the weight of the state before in the state after.
    """

    coarse: jax.Array
    row: jax.Array
    column: jax.Array
    read: jax.Array
    write: jax.Array
    floor: jax.Array
    keep: jax.Array


class Grads(NamedTuple):
    """What a backward pass over chunks gives.

    Attributes:
      query, key, value, cell, normalizer: the operands' gradients.
      rows, columns, written: [B, H, chunks, L], each the product of an operand's position and its
        gradient: of a query, of a key inside its chunk, of a key by way of the state. They must
        come of the same rounded scores, as most of rows and columns cancels.
      kept: [B, H, chunks], the product of the state before, as far as kept, and the gradient of
        the state after.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    cell: jax.Array
    normalizer: jax.Array
    rows: jax.Array
    columns: jax.Array
    written: jax.Array
    kept: jax.Array


def split(x, count: int, chunk: int, fill=0):
    """[B, H, T] as [B, H, chunks, L], where time is padded with `fill`."""
    short = count * chunk - x.shape[2]
    if short:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, short)), constant_values=fill)
    return x.reshape(*x.shape[:2], count, chunk)


def _gates(log_input, log_forget, stabilizer, levels, shown, *, chunk, width, sigmoid_gate
           ) -> Gates:
    t = levels.shape[2]
    count = -(-t // chunk)
    shown = split(shown, count, chunk, False)
    log_input = split(log_input, count, chunk, NEVER)
    log_forget = split(log_forget, count, chunk)
    # Past the end the last one goes on.
    short = count * chunk - t
    levels = jnp.pad(levels, ((0, 0), (0, 0), (0, short)), mode="edge")
    levels = levels.reshape(*levels.shape[:2], count, chunk)
    coarse = jnp.round(log_forget * _STEPS) / _STEPS
    rest = jnp.cumsum(log_forget - coarse, axis=-1)
    coarse = jnp.cumsum(coarse, axis=-1)
    last = levels[..., -1]
    before = jnp.concatenate([stabilizer[..., None], last[..., :-1]], axis=-1)
    scale = -0.5 * np.log(width)
    end, end_rest = coarse[..., -1:], rest[..., -1:]
    return Gates(
        coarse,
        jnp.where(shown, rest - levels + scale, NEVER),
        rest - log_input,
        jnp.where(shown, jnp.exp(coarse + (before[..., None] - levels) + (rest + scale)), 0.0),
        jnp.exp((end - coarse) + (end_rest - rest) + (log_input - last[..., None])),
        jnp.where(shown, 1.0 if sigmoid_gate else jnp.exp(-levels), 1.0),
        jnp.exp(end[..., 0] + (before - last) + end_rest[..., 0]),
    )


def differentiable(forward: Callable, backward: Callable) -> Callable:
    """Makes the op's function from its two passes over chunks.

    Args:
      forward: ``(query, key, value, cell, normalizer, gates, *, chunk, eps, **static) ->
        (h, total, cell, normalizer)``, with total [B, H, T] the denominators before floor and eps.
      backward: ``(query, key, value, cell, normalizer, gates, d_h, inverse, d_total, d_cell,
        d_normalizer, *, chunk, **static) -> Grads``: the cotangents are those of h, of the rows'
        sums (after the denominator, `inverse`, is out of h), and of the last state. `inverse` and
        `d_total` are [B, H, T].
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(10,))
    def run(query, key, value, cell, normalizer, log_input, log_forget, stabilizer, levels, shown,
            static):
        return run_forward(query, key, value, cell, normalizer, log_input, log_forget, stabilizer,
                           levels, shown, static)[0]

    def run_forward(*operands_and_static):
        *operands, static = operands_and_static
        static = dict(static)
        query, key, value, cell, normalizer, *scalars = operands
        gates = _gates(*scalars, chunk=static["chunk"], width=query.shape[-1],
                       sigmoid_gate=static.pop("sigmoid_gate"))
        h, total, *state = forward(query, key, value, cell, normalizer, gates, **static)
        h, total = residual(h), residual(total)
        return (h, *state), (operands, h, total)

    def run_backward(static, residuals, cotangents):
        operands, h, total = residuals
        query, key, value, cell, normalizer, *scalars = operands
        d_h, d_cell, d_normalizer = cotangents
        static = dict(static)
        eps = static.pop("eps")
        gates = _gates(*scalars, chunk=static["chunk"], width=query.shape[-1],
                       sigmoid_gate=static.pop("sigmoid_gate"))
        t = total.shape[2]
        floor = gates.floor.reshape(*total.shape[:2], -1)[..., :t]
        inverse = 1.0 / (jnp.maximum(jnp.abs(total), floor) + eps)
        product = jnp.einsum("bthv,bthv->bht", d_h.astype(total.dtype), h.astype(total.dtype))
        d_total = jnp.where(jnp.abs(total) > floor, -product * inverse * jnp.sign(total), 0.0)
        grads = backward(query, key, value, cell, normalizer, gates, d_h, inverse, d_total, d_cell,
                         d_normalizer, **static)

        def positions(x):
            return x.reshape(*x.shape[:2], -1)[..., :t]

        # Scaling a row i by exp(b_i) scales all that its query gives, and so on; b_i holds the
        # gates up to i of its chunk, and the chunk's last b what is handed on.
        after = jnp.flip(jnp.cumsum(jnp.flip(grads.rows - grads.columns, -1), -1), -1)
        earlier = jnp.cumsum(grads.written, -1) - grads.written
        d_forget = positions(after + earlier + grads.kept[..., None])
        d_input = positions(grads.columns + grads.written)
        d_stabilizer = jnp.sum(grads.cell * cell, (2, 3)) + jnp.sum(grads.normalizer * normalizer,
                                                                    2)
        levels, shown = scalars[-2:]
        return (grads.query, grads.key, grads.value, grads.cell, grads.normalizer, d_input,
                d_forget, d_stabilizer, jnp.zeros_like(levels),
                np.zeros(shown.shape, jax.dtypes.float0))

    run.defvjp(run_forward, run_backward)

    def mlstm(query, key, value, input_gate, forget_gate, segment_ids, cell, normalizer,
              stabilizer, *, sigmoid_gate, **static):
        b, t, h, k = query.shape
        kind = jnp.promote_types(value.dtype, jnp.float32)
        if cell is None:
            cell, normalizer, stabilizer = (jnp.zeros(shape, kind) for shape in (
                (b, h, k, value.shape[-1]), (b, h, k), (b, h)))
        log_input, log_forget, shown = _logarithms(
            *(jnp.swapaxes(x, 1, 2).astype(kind) for x in (input_gate, forget_gate)), segment_ids,
            sigmoid_gate)
        if sigmoid_gate:
            stabilizer = jnp.zeros_like(stabilizer)
            levels = jnp.zeros_like(log_input)
        else:
            levels = _levels(*lax.stop_gradient((log_input, log_forget, stabilizer)))
        static["sigmoid_gate"] = sigmoid_gate
        out, cell, normalizer = run(query, key, value, cell, normalizer, log_input, log_forget,
                                    stabilizer, levels, shown, tuple(sorted(static.items())))
        return out, cell, normalizer, levels[..., -1]

    return mlstm


def _logarithms(input_gate, forget_gate, segment_ids, sigmoid_gate):
    """(log input, log forget, shown), each [B, H, T]: of the gates, once segments had their say."""
    log_forget = jnp.maximum(jax.nn.log_sigmoid(forget_gate), _SHUT)
    log_input = jax.nn.log_sigmoid(input_gate) if sigmoid_gate else input_gate
    log_input = jnp.maximum(log_input, NEVER)
    if segment_ids is None:
        return log_input, log_forget, jnp.ones(log_input.shape, bool)
    shown = segment_ids != 0
    place = jnp.where(shown, jnp.arange(segment_ids.shape[1]), -1)
    # Where the last position stands that is not padding, before each one.
    last = jnp.pad(lax.cummax(place, axis=1), ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    previous = jnp.take_along_axis(segment_ids, jnp.maximum(last, 0), axis=1)
    resets = shown & (last >= 0) & (previous != segment_ids)
    shown, resets = (jnp.broadcast_to(x[:, None], log_input.shape) for x in (shown, resets))
    log_forget = jnp.where(resets, _RESET, jnp.where(shown, log_forget, 0.0))
    return jnp.where(shown, log_input, NEVER), log_forget, shown


def _levels(log_input, log_forget, stabilizer):
    """m [B, H, T]: ``m_t = max(log forget_t + m_{t-1}, log input_t)``."""
    def join(one, two):
        return one[0] + two[0], jnp.maximum(one[1] + two[0], two[1])

    sums, tops = lax.associative_scan(join, (log_forget, log_input), axis=2)
    return jnp.maximum(sums + stabilizer[..., None], tops)
