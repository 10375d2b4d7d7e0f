"""Recurrent cells, position by position, and what every implementation of the op shares.

A cell is a function of its pre-activations and its state, and that function's derivatives, which
loops and kernels alike apply as pointwise arithmetic: JAX's own derivatives have operations that
Mosaic GPU does not compile.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.dispatch import residual

State = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of the op `rnn`.

    Attributes:
      gates: of `inputs` and of `recurrent`.
      biases: one a pre-activation.
      states: h, which the matrices multiply, and what else is carried.
      products: the pre-activation that each gate's product is added to; the inputs of a gate are
        added to that of its own number.
      activate: (pre-activations, state before, constant) -> state after, where ``constant(x)`` is
        x as what no gradient flows through.
      derive: (pre-activations, state before, gradients by the state after) -> (gradients by the
        pre-activations, by the state before but for the products).
    """

    gates: int
    biases: int
    states: int
    products: tuple[int, ...]
    activate: Callable[[Sequence, Sequence, Callable], State]
    derive: Callable[[Sequence, Sequence, Sequence], tuple[list, list]]

    def before(self, inputs: Sequence, products: Sequence, bias: Sequence) -> list[jax.Array]:
        """The pre-activations of given inputs and products by gate, and biases."""
        out = [b + inputs[i] if i < self.gates else b for i, b in enumerate(bias)]
        for i, product in zip(self.products, products, strict=True):
            out[i] = out[i] + product
        return out


def _elman(pre, state, constant):
    return (jnp.tanh(pre[0]),)


def _elman_derive(pre, state, d_state):
    h = jnp.tanh(pre[0])
    return [d_state[0] * (1 - h * h)], [0.0]


def _lstm(pre, state, constant):
    i, f, z, o = pre
    cell = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(z)
    return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


def _lstm_derive(pre, state, d_state):
    i, f, o = (jax.nn.sigmoid(pre[n]) for n in (0, 1, 3))
    z, (_, cell), (d_h, d_cell) = jnp.tanh(pre[2]), state, d_state
    shown = jnp.tanh(f * cell + i * z)
    d_cell = d_cell + d_h * o * (1 - shown * shown)
    return [d_cell * z * i * (1 - i), d_cell * cell * f * (1 - f), d_cell * i * (1 - z * z),
            d_h * shown * o * (1 - o)], [0.0, d_cell * f]


def _gru(pre, state, constant):
    r, z, n, hidden = pre
    z = jax.nn.sigmoid(z)
    return (z * state[0] + (1 - z) * jnp.tanh(n + jax.nn.sigmoid(r) * hidden),)


def _gru_derive(pre, state, d_state):
    r, z, hidden, (d_h,) = jax.nn.sigmoid(pre[0]), jax.nn.sigmoid(pre[1]), pre[3], d_state
    n = jnp.tanh(pre[2] + r * hidden)
    d_n = d_h * (1 - z) * (1 - n * n)
    return [d_n * hidden * r * (1 - r), d_h * (state[0] - n) * z * (1 - z), d_n, d_n * r], [d_h * z]


def _slstm_gates(pre, state, constant):
    """(stabilizer, what enters, the logarithm of what is kept)."""
    i, f, _, _ = pre
    _, _, normalizer, stabilizer = state
    # No log1p and no log-sigmoid: Mosaic GPU has none.
    log_forget = jnp.minimum(f, 0) - jnp.log(1 + jnp.exp(-jnp.abs(f))) + stabilizer
    # Cell and normalizer are in units of exp(stabilizer), on which h does not depend.
    stabilizer = constant(jnp.where(normalizer == 0, i, jnp.maximum(i, log_forget)))
    return stabilizer, jnp.exp(i - stabilizer), log_forget - stabilizer


def _kept(exponent):
    """Its exponential; it is above 0 only where there is nothing to keep."""
    return jnp.exp(jnp.where(exponent > 0, 0.0, exponent))


def _slstm(pre, state, constant):
    _, cell, normalizer, _ = state
    stabilizer, enter, exponent = _slstm_gates(pre, state, constant)
    keep = _kept(exponent)
    cell = keep * cell + enter * jnp.tanh(pre[2])
    normalizer = keep * normalizer + enter
    return jax.nn.sigmoid(pre[3]) * cell / normalizer, cell, normalizer, stabilizer


def _slstm_derive(pre, state, d_state):
    (_, cell, normalizer, _), (d_h, d_cell, d_normalizer, _) = state, d_state
    _, enter, exponent = _slstm_gates(pre, state, lambda x: x)
    keep, z, o = _kept(exponent), jnp.tanh(pre[2]), jax.nn.sigmoid(pre[3])
    inverse = 1 / (keep * normalizer + enter)
    ratio = (keep * cell + enter * z) * inverse
    d_sum = d_h * o * inverse
    d_cell, d_normalizer = d_cell + d_sum, d_normalizer - d_sum * ratio
    d_log = jnp.where(exponent > 0, 0.0, (d_cell * cell + d_normalizer * normalizer) * keep)
    return ([(d_cell * z + d_normalizer) * enter, d_log * jax.nn.sigmoid(-pre[1]),
             d_cell * enter * (1 - z * z), d_h * ratio * o * (1 - o)],
            [0.0, d_cell * keep, d_normalizer * keep, d_log])


CELLS = {
    "elman": Cell(1, 1, 1, (0,), _elman, _elman_derive),
    "gru": Cell(3, 4, 1, (0, 1, 3), _gru, _gru_derive),
    "lstm": Cell(4, 4, 2, (0, 1, 2, 3), _lstm, _lstm_derive),
    "slstm": Cell(4, 4, 4, (0, 1, 2, 3), _slstm, _slstm_derive),
}

# What a position does to the state before it: nothing at all, use it, or forget it first.
PADDING, CONTINUES, RESETS = 0, 1, 2


def marks(segment_ids: jax.Array | None) -> jax.Array | None:
    """int32 [B, T]: `PADDING`, `CONTINUES` or `RESETS`; None where all continue."""
    if segment_ids is None:
        return None
    shown = segment_ids != 0
    place = jnp.where(shown, jnp.arange(segment_ids.shape[1]), -1)
    # Where the last position stands that is not padding, before each one.
    last = jnp.pad(lax.cummax(place, axis=1), ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    previous = jnp.take_along_axis(segment_ids, jnp.maximum(last, 0), axis=1)
    resets = (last >= 0) & (previous != segment_ids)
    return jnp.where(shown, jnp.where(resets, RESETS, CONTINUES), PADDING)


def entered(mark: jax.Array | None, state: Sequence[jax.Array]) -> State:
    """The state that a position starts from."""
    return tuple(state) if mark is None else tuple(
        jnp.where(mark == RESETS, 0.0, x) for x in state)


def advanced(cell: Cell, mark: jax.Array | None, pre: Sequence, state: Sequence) -> State:
    """The state after a position, of the one that it starts from."""
    new = cell.activate(pre, state, lambda x: x)
    return new if mark is None else tuple(
        jnp.where(mark == PADDING, x, y) for x, y in zip(state, new, strict=True))


def derivatives(cell: Cell, mark: jax.Array | None, pre: Sequence, state: Sequence,
                cotangents: Sequence) -> tuple[Sequence, list[jax.Array]]:
    """Those of `advanced`: by the pre-activations, and by the state but for the products."""
    d_pre, d_state = cell.derive(pre, state, cotangents)
    if mark is not None:
        d_pre = [jnp.where(mark == PADDING, 0.0, x) for x in d_pre]
        d_state = [jnp.where(mark == PADDING, x, y)
                   for x, y in zip(cotangents, d_state, strict=True)]
    return d_pre, d_state


def left(mark: jax.Array | None, d_state: Sequence[jax.Array]) -> State:
    """The derivatives by the state before a position, of those by the one that it starts from."""
    return entered(mark, d_state)


def parameter_gradients(cell: Cell, state: jax.Array, d_pre: Sequence[jax.Array], sums: str):
    """(by the recurrent matrices [G, H, D, D], by the biases [Gb, H, D]), in float32.

    Args:
      cell: the cell.
      state: h that each position starts from.
      d_pre: by the pre-activations, each of the shape of `state`.
      sums: the axes of both, e.g. "tbh": those of which "h" is one, before the last.
    """
    kind = jnp.promote_types(state.dtype, jnp.float32)
    matrices = [jnp.einsum(f"{sums}d,{sums}e->hde", state, d_pre[i], preferred_element_type=kind)
                for i in cell.products]
    biases = [jnp.einsum(f"{sums}d->hd", x.astype(kind)) for x in d_pre]
    return jnp.stack(matrices), jnp.stack(biases)


def differentiable(forward: Callable, backward: Callable) -> Callable:
    """Makes the op's function of its two passes.

    The products of the forward pass are made again by the backward pass: for all positions of a
    block at once they are one matrix product, and cheaper than the memory of the pre-activations.

    Args:
      forward: ``(inputs, recurrent, bias, marks, state, *, cell, save, **static) -> (h, state,
        saved)``: with `save`, whatever the backward pass wants, else None.
      backward: ``(inputs, recurrent, bias, marks, saved, d_h, d_state, *, cell, **static) ->
        (d_inputs, d_recurrent, d_bias, d_state)``.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
    def run(inputs, recurrent, bias, marks, state, static):
        return forward(inputs, recurrent, bias, marks, state, save=False, **dict(static))[:2]

    def run_forward(inputs, recurrent, bias, marks, state, static):
        h, state, saved = forward(inputs, recurrent, bias, marks, state, save=True, **dict(static))
        return (h, state), (inputs, recurrent, bias, marks, jax.tree.map(residual, saved))

    def run_backward(static, residuals, cotangents):
        inputs, recurrent, bias, marks, saved = residuals
        *grads, d_state = backward(inputs, recurrent, bias, marks, saved, *cotangents,
                                   **dict(static))
        d_marks = None if marks is None else np.zeros(marks.shape, jax.dtypes.float0)
        return *(g.astype(x.dtype) for g, x in zip(grads, (inputs, recurrent, bias), strict=True)
                 ), d_marks, d_state

    run.defvjp(run_forward, run_backward)

    def rnn(inputs, recurrent, bias, segment_ids, state, *, cell, **static):
        if state is None:
            batch, _, _, heads, width = inputs.shape
            state = jnp.zeros((CELLS[cell].states, batch, heads, width),
                              jnp.promote_types(inputs.dtype, jnp.float32))
        static["cell"] = CELLS[cell]
        return run(inputs, recurrent, bias, marks(segment_ids), state,
                   tuple(sorted(static.items())))

    return rnn
