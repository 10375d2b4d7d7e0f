"""Recurrent cells with memory mixing over a whole (packed) sequence: LSTM, GRU, Elman and sLSTM.

Why it is an op: each position needs the one before it, so that a step is a small product and a few
pointwise operations, whose launches and reads of the same matrices cost more than their arithmetic.
A kernel holds a head's matrices on the chip from the first position to the last (FlashRNN,
arXiv:2412.07752). Forward floor: 2 B T G H D^2 FLOPs, T steps of latency each, one read of the
inputs and the matrices, and one write of h.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dims import Dims
from pallas_kernels.dispatch import op
from pallas_kernels.rnn.cells import CELLS

_STATE = (None, "batch", "heads", None)

DIMS = Dims(
    operands=(
        ("batch", None, None, "heads", None),
        (None, "heads", None, None),
        (None, "heads", None),
        ("batch", None),
        _STATE,
    ),
    results=(("batch", None, "heads", None), _STATE),
    shardable=frozenset({"batch", "heads"}),
)


@op(DIMS, cpu=("xla",), tpu=("tpu", "xla"), gpu=("gpu", "xla"))
def rnn(
    inputs: jax.Array,
    recurrent: jax.Array,
    bias: jax.Array,
    segment_ids: jax.Array | None = None,
    state: jax.Array | None = None,
    *,
    cell: str,
) -> tuple[jax.Array, jax.Array]:
    """The recurrence that `step` defines, at every position (FlashRNN, arXiv:2412.07752).

    Padding, segment 0, is as if it were not there: it leaves the state as it is, and its h is 0.
    A position whose segment differs from the last one that is not padding starts from a state of
    zeros; the first of a row continues the state that is given.

    Args:
      inputs: [B, T, G, H, D] by batch, time, gate, head and width, what the gates read besides the
        last h; differentiable.
      recurrent: [G, H, D, D] by gate, head, h's element and the gate's; differentiable.
      bias: [Gb, H, D]; differentiable.
      segment_ids: int32 [B, T].
      state: the state to continue, float32 [S, B, H, D]; differentiable; zeros by default.
      cell: a name in `CELLS`, which has its G, Gb and S; `step` says in what order.

    Returns:
      (h, state): h is [B, T, H, D] in inputs' dtype, state the one after the last position.
      Products are of operands in recurrent's dtype; sums and the state are float32. No gradient
      flows through the stabilizer m of the results (see `step`).

    Raises:
      ValueError: an unknown cell, shapes that do not fit together, segment ids that are no
        integers, or a state that is not float32.
      NotImplementedError: the named implementation cannot run them.
    """
    kind = _find(cell)
    if inputs.ndim != 5 or inputs.shape[2] != kind.gates:
        raise ValueError(f"rnn: inputs {inputs.shape} must be (B, T, {kind.gates}, H, D): {cell} "
                         f"has {kind.gates} gate{'s' * (kind.gates > 1)}")
    b, t, g, h, d = inputs.shape
    for name, x, shape in (("recurrent", recurrent, (g, h, d, d)),
                           ("bias", bias, (kind.biases, h, d)),
                           ("segment_ids", segment_ids, (b, t)),
                           ("state", state, (kind.states, b, h, d))):
        if x is not None and x.shape != shape:
            raise ValueError(f"rnn: {name} {x.shape} must be {shape}, as {cell} and inputs "
                             f"{inputs.shape} say")
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"rnn: segment_ids are {segment_ids.dtype}; they must be integers")
    if state is not None and (not jnp.issubdtype(state.dtype, jnp.floating)
                              or state.dtype.itemsize < 4):
        raise ValueError(f"rnn: the state is {state.dtype}; it must be float32, as the recurrence "
                         "is carried in it")


def step(
    inputs: jax.Array, recurrent: jax.Array, bias: jax.Array, state: jax.Array, *, cell: str
) -> jax.Array:
    """One position of `rnn`, for decoding.

    With a gate's ``g~ = inputs + R h + bias``, its sigmoid written g, ``x'`` the new x:

      elman: ``h' = tanh(g~)``; state (h).
      lstm: gates i, f, z, o; ``c' = f c + i tanh(z~)``, ``h' = o tanh(c')``; state (h, c).
      gru: gates r, z, n; biases r, z, n and that of h in n;
        ``n = tanh(inputs_n + bias_n + r (R_n h + bias_hn))``, ``h' = z h + (1 - z) n``; state (h).
      slstm: gates i, f, z, o; ``c' = f' c + i' tanh(z~)``, ``n' = f' n + i'``, ``h' = o c' / n'``
        where ``f' = exp(log f + m - m')``, ``i' = exp(i~ - m')`` and
        ``m' = max(log f + m, i~)``, or i~ where n is 0 (xLSTM, arXiv:2405.04517, section 2.2);
        state (h, c, n, m). c and n are in units of exp(m), and no gradient flows through m'.

    Args:
      inputs: [..., G, H, D].
      recurrent, bias, cell: as in `rnn`.
      state: float32 [S, ..., H, D].

    Returns:
      The new state; h is its first.

    Raises:
      ValueError: an unknown cell, or shapes that do not fit together.
    """
    kind = _find(cell)
    *rows, g, heads, d = inputs.shape
    if (g, state.shape) != (kind.gates, (kind.states, *rows, heads, d)):
        raise ValueError(f"rnn: inputs {inputs.shape} and a state {state.shape} must be [..., "
                         f"{kind.gates}, H, D] and [{kind.states}, ..., H, D] for {cell}")
    h = state[0].astype(recurrent.dtype)
    products = jnp.einsum("...hd,ghde->g...he", h, recurrent, preferred_element_type=state.dtype)
    by_gate = jnp.moveaxis(inputs.astype(state.dtype), -3, 0)
    pre = kind.before(by_gate, products, bias.astype(state.dtype))
    pre = [jnp.broadcast_to(x, state[0].shape) for x in pre]
    return jnp.stack(kind.activate(pre, state, lax.stop_gradient))


def _find(cell):
    if cell not in CELLS:
        raise ValueError(f"rnn: cell={cell!r} must be one of {', '.join(sorted(CELLS))}")
    return CELLS[cell]
