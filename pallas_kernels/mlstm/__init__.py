"""The matrix LSTM of xLSTM over a whole (packed) sequence: a gated linear attention with a state.

Why it is an op: a step updates a K x V matrix, and T such matrices in memory cost K times the
traffic of what goes in and out. Chunkwise (TFLA, arXiv:2503.14376) the matrix moves once a chunk,
and inside a chunk scores stand in its place. Forward floor for chunks of L: H T (L (K + V) + 4 K V)
FLOPs (half of the first term for what the causal mask hides) and one read of q, k, v.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dims import Dims
from pallas_kernels.dispatch import op

_ROWS = ("batch", None, "heads")
_STATE = ("batch", "heads")

DIMS = Dims(
    operands=(
        *[(*_ROWS, None)] * 3,
        _ROWS,
        _ROWS,
        ("batch", None),
        (*_STATE, None, None),
        (*_STATE, None),
        _STATE,
    ),
    results=((*_ROWS, None), (*_STATE, None, None), (*_STATE, None), _STATE),
    shardable=frozenset({"batch", "heads"}),
)


@op(DIMS, cpu=("xla",), tpu=("tpu", "xla"), gpu=("gpu", "xla"))
def mlstm(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    input_gate: jax.Array,
    forget_gate: jax.Array,
    segment_ids: jax.Array | None = None,
    cell: jax.Array | None = None,
    normalizer: jax.Array | None = None,
    stabilizer: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    sigmoid_gate: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The recurrence that `step` defines, at every position (xLSTM, arXiv:2405.04517, section 2.3).

    Padding, segment 0, is as if it were not there: it leaves the state as it is, and its h is 0.
    A position whose segment differs from the last one that is not padding forgets the state
    first; the first of a row continues the state that is given.

    Args:
      query: [B, T, H, K]; differentiable. Scaled by K ** -0.5 here.
      key: [B, T, H, K]; differentiable.
      value: [B, T, H, V]; differentiable.
      input_gate, forget_gate: float32 [B, T, H], before their nonlinearity; differentiable. An
        input gate below -100 or so counts as closed, as does a forget gate below -256.
      segment_ids: int32 [B, T].
      cell, normalizer, stabilizer: the state (C, n, m) to continue, float32 [B, H, K, V],
        [B, H, K] and [B, H]; differentiable. All three, or none for zeros.
      eps: added to the denominator; > 0.
      sigmoid_gate: mLSTMsig (arXiv:2503.14376, section 4): a sigmoid in place of the input gate's
        exponential, which needs no stabilizer: that of the results is 0, a given one is not read.

    Returns:
      (h, C, n, m): h is [B, T, H, V] in value's dtype, the rest the state after the last position;
      accumulation is float32. C and n are in units of exp(m), so no gradient flows through the
      m of the results, on which nothing that is computed from all three depends but by eps.

    Raises:
      ValueError: shapes that do not fit together, part of a state, or eps <= 0.
      NotImplementedError: the named implementation cannot run them.
    """
    b, t, h, k = query.shape
    v = value.shape[-1]
    if key.shape != query.shape or value.shape[:-1] != (b, t, h):
        raise ValueError(f"mlstm: key {key.shape} and value {value.shape} must be {query.shape}, "
                         f"as query is, and {(b, t, h, 'V')}")
    if input_gate.shape != (b, t, h) or forget_gate.shape != (b, t, h):
        raise ValueError(f"mlstm: gates {input_gate.shape} and {forget_gate.shape} must be "
                         f"{(b, t, h)}, as query {query.shape} says")
    if segment_ids is not None and segment_ids.shape != (b, t):
        raise ValueError(f"mlstm: segment_ids {segment_ids.shape} must be {(b, t)}")
    state = cell, normalizer, stabilizer
    if any(x is None for x in state):
        if any(x is not None for x in state):
            raise ValueError("mlstm: give all of cell, normalizer and stabilizer, or none")
    elif tuple(x.shape for x in state) != ((b, h, k, v), (b, h, k), (b, h)):
        raise ValueError(f"mlstm: a state of {', '.join(str(x.shape) for x in state)} must be "
                         f"{(b, h, k, v)}, {(b, h, k)} and {(b, h)}")
    if not eps > 0:
        raise ValueError(f"mlstm: eps={eps} must be > 0; the default is 1e-6")


def step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    input_gate: jax.Array,
    forget_gate: jax.Array,
    cell: jax.Array,
    normalizer: jax.Array,
    stabilizer: jax.Array,
    *,
    eps: float = 1e-6,
    sigmoid_gate: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One position of `mlstm`, for decoding: ``C' = f C + i k v^T``, ``n' = f n + i k``,
    ``h = C'^T q / (max(|n' . q|, exp(-m')) + eps)``.

    There ``m' = max(log sigmoid(forget_gate) + m, input_gate)``,
    ``f = exp(log sigmoid(forget_gate) + m - m')`` and ``i = exp(input_gate - m')``, so that C and n
    stand for ``exp(m)`` times themselves (xLSTM, arXiv:2405.04517, equations 15 and 19 to 27).

    Args:
      query, key, value: [B, H, K] and [B, H, V].
      input_gate, forget_gate: float32 [B, H], before their nonlinearity.
      cell, normalizer, stabilizer: the state (C, n, m): float32 [B, H, K, V], [B, H, K], [B, H].
      eps, sigmoid_gate: as in `mlstm`.

    Returns:
      (h, C, n, m), as in `mlstm`; h is [B, H, V] in value's dtype.
    """
    kind = cell.dtype
    q, k, v = (x.astype(kind) for x in (query, key, value))
    forget = jax.nn.log_sigmoid(forget_gate.astype(kind))
    if sigmoid_gate:
        m, old = jnp.zeros_like(stabilizer), jnp.zeros_like(stabilizer)
        enter = jax.nn.log_sigmoid(input_gate.astype(kind))
    else:
        enter, old = input_gate.astype(kind), stabilizer
        m = lax.stop_gradient(jnp.maximum(forget + old, enter))
    f, i = jnp.exp(forget + old - m), jnp.exp(enter - m)
    cell = f[..., None, None] * cell + (i[..., None] * k)[..., None] * v[..., None, :]
    normalizer = f[..., None] * normalizer + i[..., None] * k
    q = q * query.shape[-1] ** -0.5
    total = jnp.abs(jnp.sum(normalizer * q, axis=-1))
    h = jnp.sum(cell * q[..., None], axis=-2) / (jnp.maximum(total, jnp.exp(-m)) + eps)[..., None]
    return h.astype(value.dtype), cell, normalizer, m
