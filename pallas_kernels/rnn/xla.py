"""Recurrent cells for any XLA back end: a loop over positions, a product and a fusion each.

This is FlashRNN's alternating form, for heads of any size. Heads come first in the loops, whose
products are batched by them: nothing is transposed a step.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import refuse_other_than_floats
from pallas_kernels.rnn.cells import (
    PADDING,
    advanced,
    derivatives,
    differentiable,
    entered,
    left,
    parameter_gradients,
)

# Positions that a round of the loops holds. More gain nothing on CPUs, and compile for longer.
UNROLL = 1


def supports(target, inputs, recurrent, bias, segment_ids=None, state=None, **options):
    """Floats."""
    return refuse_other_than_floats(inputs=inputs, recurrent=recurrent, bias=bias)


def candidates(inputs, *operands, **options):
    """Fewer or more positions a round."""
    return [{"unroll": n} for n in (1, 2, 4, 8, 16) if n <= inputs.shape[1]]


class _Problem:
    """The operands by time, gate and head."""

    def __init__(self, inputs, recurrent, bias, marks, kind):
        g, h, d, _ = recurrent.shape
        self.kind = kind
        self.by_gate = jnp.transpose(inputs, (1, 2, 3, 0, 4))  # [T, G, H, B, D]
        # [H, D, G D]: a head's gates in one product.
        self.matrices = jnp.transpose(recurrent, (1, 2, 0, 3)).reshape(h, d, g * d)
        self.bias = bias.astype(kind)[:, :, None]
        self.marks = None if marks is None else marks.T[:, None, :, None]

    def multiply(self, h):
        """[G] of h's shape, [H, rows, D]: the gates' products."""
        products = jnp.einsum("hbd,hdk->hbk", h.astype(self.matrices.dtype), self.matrices,
                              preferred_element_type=self.kind)
        return jnp.split(products, self.matrices.shape[-1] // h.shape[-1], axis=-1)

    def multiplier_back(self):
        """The transpose of `multiply`, summed, as a function."""
        # Transposed once: left in the product, the transposition is done again every step.
        matrices = lax.optimization_barrier(jnp.swapaxes(self.matrices, 1, 2))

        def multiply(d_products):
            return jnp.einsum("hbk,hkd->hbd",
                              jnp.concatenate(d_products, axis=-1).astype(matrices.dtype),
                              matrices, preferred_element_type=self.kind)

        return multiply


def _forward(inputs, recurrent, bias, marks, state, *, cell, save, unroll):
    problem = _Problem(inputs, recurrent, bias, marks, state.dtype)
    kept = jnp.result_type(inputs, recurrent)

    def visit(state, x):
        gates, mark = x
        start = entered(mark, state)
        pre = cell.before(gates.astype(problem.kind), problem.multiply(start[0]), problem.bias)
        state = advanced(cell, mark, pre, start)
        h = state[0] if mark is None else jnp.where(mark == PADDING, 0.0, state[0])
        return state, (h.astype(inputs.dtype),
                       (start[0].astype(kept), *start[1:]) if save else None)

    state, (h, saved) = lax.scan(visit, tuple(jnp.swapaxes(state, 1, 2)),
                                 (problem.by_gate, problem.marks), unroll=unroll)
    return jnp.transpose(h, (2, 0, 1, 3)), jnp.swapaxes(jnp.stack(state), 1, 2), saved


def _backward(inputs, recurrent, bias, marks, saved, d_h, d_state, *, cell, unroll):
    problem = _Problem(inputs, recurrent, bias, marks, d_state.dtype)
    t, h, b, d = saved[0].shape
    products = [jnp.swapaxes(x.reshape(h, t, b, d), 0, 1) for x in problem.multiply(
        jnp.swapaxes(saved[0], 0, 1).reshape(h, t * b, d))]

    multiply_back = problem.multiplier_back()

    def visit(d_state, x):
        gates, products, start, d_h, mark = x
        if mark is not None:
            d_h = jnp.where(mark == PADDING, 0, d_h)
        pre = cell.before(gates.astype(problem.kind), products, problem.bias)
        start = [s.astype(problem.kind) for s in start]
        d_state = d_state[0] + d_h.astype(problem.kind), *d_state[1:]
        d_pre, (d_start, *others) = derivatives(cell, mark, pre, start, d_state)
        d_start += multiply_back([d_pre[i] for i in cell.products])
        return left(mark, (d_start, *others)), [x.astype(inputs.dtype) for x in d_pre]

    d_h = jnp.transpose(d_h, (1, 2, 0, 3))
    d_state, d_pre = lax.scan(visit, tuple(jnp.swapaxes(d_state, 1, 2)),
                              (problem.by_gate, products, saved, d_h, problem.marks),
                              reverse=True, unroll=unroll)
    d_inputs = jnp.stack(d_pre[:cell.gates], axis=1)
    return (jnp.transpose(d_inputs, (3, 0, 1, 2, 4)),
            *parameter_gradients(cell, saved[0], d_pre, "thb"),
            jnp.swapaxes(jnp.stack(d_state), 1, 2))


_rnn = differentiable(_forward, _backward)


def rnn(*operands: jax.Array, unroll: int = UNROLL, **options):
    """See `pallas_kernels.rnn.rnn`."""
    return _rnn(*operands, unroll=min(unroll, operands[0].shape[1]), **options)
