"""mLSTM: a linear recurrence over a matrix per head, with exponential gates (arXiv:2405.04517).

Per head, from query, key, value and the pre-activations i, f of two scalar gates (section 2.3
there, stabilised as in its appendix A):

    m_t = max(log sigmoid(f_t) + m_{t-1}, i_t)
    f'  = exp(log sigmoid(f_t) + m_{t-1} - m_t)       i' = exp(i_t - m_t)
    C_t = f' C_{t-1} + i' k_t v_t^T                   n_t = f' n_{t-1} + i' k_t
    h_t = C_t^T q_t / (max(|n_t^T q_t|, exp(-m_t)) + 1e-6),   q_t scaled by K^-1/2

from C = n = m = 0. The layer around it is that of xLSTM 7B (arXiv:2503.13427): dense
projections of the normed stream, gates under a soft cap, and ``y = W_out (sigmoid(o_t) *
LayerNorm_head(h_t))``.

A tree of rows needs no matrix per row. The recurrence is linear: a row's h is a sum over its
ancestors, weighted by the gates between, and over the state before the tree, which is only read.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import sharding
from layers.linear import Linear
from layers.mixer import Rows, State, state
from pallas_kernels.mlstm import mlstm

EPS = 1e-6  # On the normaliser.

# The state is float32, and products with it are too, whatever a matrix unit would do by default.
_EXACT = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class MLstm:
    """A config of an mLSTM.

    Attributes:
      num_heads: matrices of state.
      key_dim: width of a query or key head, the rows of a matrix.
      value_dim: width of a value head, its columns.
      gate_softcap: gate pre-activations become ``gate_softcap * tanh(x / gate_softcap)``.
      norm_eps: added to a head's variance in the norm of its output.
      sigmoid_gate: i' is sigmoid(i) and there is no m, so that the denominator is
        ``max(|n^T q|, 1) + 1e-6`` (mLSTMsig, arXiv:2503.14376).
    """

    num_heads: int
    key_dim: int
    value_dim: int
    gate_softcap: float = 15.0
    norm_eps: float = 1e-6
    sigmoid_gate: bool = False

    def __post_init__(self):
        for name in ("num_heads", "key_dim", "value_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"mlstm.{name} is {getattr(self, name)}; it must be >= 1")
        for name, example in (("gate_softcap", 15), ("norm_eps", 1e-6)):
            if not getattr(self, name) > 0:
                raise ValueError(f"mlstm.{name} is {getattr(self, name)}; it must be positive, "
                                 f"e.g. {example}")

    def build(self, width: int, *, gain: float, key: jax.Array, dtype) -> "MLstmMixer":
        """The module; `gain` scales the initial output projection."""
        return MLstmMixer(self, width, gain=gain, key=key, dtype=dtype)

    def flops_per_token(self, width: int, length: int) -> float:
        """Projections, and the recurrence as it is written: one product into C and one with it.

        n counts as one more column of C. How a kernel cuts the sequence into chunks does not
        count, nor does `length`.
        """
        h, k, v = self.num_heads, self.key_dim, self.value_dim
        projections = 2 * width * h * (2 * k + 3 * v + 2)
        return projections + 4 * h * k * (v + 1)


@state
class MLstmState(State):
    """What an mLSTM remembers, float32, of the same size at any length.

    Attributes:
      cell: C, [B, H, K, V]. A stack's has a leading layer axis.
      normalizer: n, [B, H, K].
      stabilizer: m, [B, H]; C and n are stored times exp(-m).
    """

    cell: jax.Array
    normalizer: jax.Array
    stabilizer: jax.Array


class Gate(nnx.Module):
    """A gate's pre-activation per head, ``softcap * tanh((x @ kernel + bias) / softcap)``.

    In float32 from the product on. The kernel is 0 at first, so that the bias alone decides.
    """

    def __init__(self, width: int, bias: jax.Array, softcap: float, *, key: jax.Array, dtype):
        """`bias` [H] is the initial one."""
        self.softcap = softcap
        init = sharding.param(jax.nn.initializers.zeros, "embed", "heads")
        self.kernel = nnx.Param(init(key, (width, *bias.shape), dtype), axes=init.axes)
        init = sharding.param(lambda key, shape, dtype: bias.astype(dtype), "heads")
        self.bias = nnx.Param(init(key, bias.shape, dtype), axes=init.axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, H]."""
        y = sharding.einsum("btd,dh->bth", x, self.kernel[...], weight=("embed", "heads"),
                            out=("batch", "seq", "heads"), preferred_element_type=jnp.float32)
        y = y + self.bias[...].astype(jnp.float32)
        return self.softcap * jnp.tanh(y / self.softcap)


class HeadNorm(nnx.Module):
    """LayerNorm (arXiv:1607.06450) of each head alone, without bias, in float32."""

    def __init__(self, heads: int, width: int, eps: float, *, key: jax.Array, dtype):
        self.eps = eps
        init = sharding.param(jax.nn.initializers.ones, "heads", "head_dim")
        self.scale = nnx.Param(init(key, (heads, width), dtype), axes=init.axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, H, V] -> float32 [B, T, H, V]."""
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x * self.scale[...].astype(jnp.float32)


class MLstmMixer(nnx.Module):
    """The mLSTM layer under the mixer contract of `layers.mixer`."""

    def __init__(self, config: MLstm, width: int, *, gain: float, key: jax.Array, dtype):
        self.config = config
        h, k, v = config.num_heads, config.key_dim, config.value_dim
        keys = jax.random.split(key, 5)

        def project(size, key):
            return Linear("btd,dhk->bthk", (width, h, size), ("embed", "heads", "head_dim"),
                          ("batch", "seq", "heads", "head_dim"), key=key, dtype=dtype)

        self.query = project(k, keys[0])
        self.key = project(k, keys[1])
        self.value = project(v, keys[2])
        self.output_gate = project(v, keys[3])
        # Almost shut, and open: the memory starts long and takes in little (arXiv:2503.13427).
        self.input_gate = Gate(width, jnp.full(h, -10.0), config.gate_softcap, key=key,
                               dtype=dtype)
        self.forget_gate = Gate(width, jnp.linspace(3.0, 6.0, h), config.gate_softcap, key=key,
                                dtype=dtype)
        self.norm = HeadNorm(h, v, config.norm_eps, key=key, dtype=dtype)
        self.out = Linear("bthv,hvd->btd", (h, v, width), ("heads", "head_dim", "embed"),
                          ("batch", "seq", "embed"), gain=gain, key=keys[4], dtype=dtype)

    def _project(self, x):
        """Queries and keys [B, T, H, K], values [B, T, H, V], gates i and f float32 [B, T, H]."""
        return (self.query(x), self.key(x), self.value(x), self.input_gate(x),
                self.forget_gate(x))

    def _recur(self, *operands):
        return sharding.local(mlstm, *operands, eps=EPS, sigmoid_gate=self.config.sigmoid_gate)

    def _output(self, x, h):
        gate = jax.nn.sigmoid(self.output_gate(x).astype(jnp.float32))
        return self.out((gate * self.norm(h)).astype(x.dtype))

    def __call__(self, x, segment_ids, positions, context=None):
        _refuse(context)
        h, *_ = self._recur(*self._project(x), segment_ids, None, None, None)
        return self._output(x, h)

    def init_state(self, batch, max_len, path=1, context=None):
        _refuse(context)
        c = self.config

        def zeros(*shape):
            x = jnp.zeros((batch, c.num_heads, *shape), jnp.float32)
            return sharding.constrain(x, "batch", "heads", *(None for _ in shape))

        return MLstmState(zeros(c.key_dim, c.value_dim), zeros(c.key_dim), zeros())

    def absorb(self, x, valid, state):
        # One document, whose padding may stand anywhere.
        h, *after = self._recur(*self._project(x), valid.astype(jnp.int32), state.cell,
                                state.normalizer, state.stabilizer)
        return self._output(x, h), MLstmState(*after)

    def step(self, x, tree: Rows, state):
        query, key, value, i, f = self._project(x)
        i = jax.nn.log_sigmoid(i) if self.config.sigmoid_gate else i
        f = jax.nn.log_sigmoid(f)
        seen = tree.ancestors & tree.valid[:, None, :]
        # What is left of the state at row n, and of row j there, as logarithms [B, H, N(, J)].
        left = jnp.einsum("bnj,bjh->bhn", seen.astype(jnp.float32), f, precision=_EXACT)
        carried = left + state.stabilizer[..., None]
        weights = left[..., :, None] - left[..., None, :] + jnp.swapaxes(i, 1, 2)[..., None, :]
        weights = jnp.where(seen[:, None], weights, -jnp.inf)
        m = self._stabilizer(carried, weights)
        carried, weights = jnp.exp(carried - m), jnp.exp(weights - m[..., None])

        q, k, v = (jnp.swapaxes(y, 1, 2).astype(jnp.float32) for y in (query, key, value))
        q = q * self.config.key_dim**-0.5

        def product(expression, *operands):
            return jnp.einsum(expression, *operands, precision=_EXACT)

        weights = weights * product("bhnk,bhjk->bhnj", q, k)
        above = product("bhnj,bhjv->bhnv", weights, v) + carried[..., None] * product(
            "bhnk,bhkv->bhnv", q, state.cell)
        below = jnp.sum(weights, axis=-1) + carried * product(
            "bhnk,bhk->bhn", q, state.normalizer)
        h = above / (jnp.maximum(jnp.abs(below), jnp.exp(-m)) + EPS)[..., None]
        h = jnp.swapaxes(h, 1, 2).astype(x.dtype)
        return self._output(x, h), (key, value, i, f)

    def _stabilizer(self, carried, weights):
        """m [...] for logarithms of what is left of the state [...] and of rows [..., J]."""
        if self.config.sigmoid_gate:
            return jnp.zeros_like(carried)
        return jnp.maximum(carried, jnp.max(weights, axis=-1))

    def commit(self, state, scratch, path, count):
        if state.cell.ndim > 4:  # a stack's
            return jax.vmap(self.commit, in_axes=(0, 0, None, None))(state, scratch, path, count)
        kept = (jnp.arange(path.shape[1]) < count[:, None])[..., None]
        key, value, i, f = (
            jnp.take_along_axis(y, path.reshape(*path.shape, *(1,) * (y.ndim - 2)), axis=1)
            for y in scratch)
        f = jnp.where(kept, f, 0.0)
        # What the tokens behind each one leave of it.
        left = lax.cumsum(f, axis=1, reverse=True) - f
        carried = jnp.sum(f, axis=1) + state.stabilizer
        weights = jnp.where(kept, left + i, -jnp.inf)
        m = self._stabilizer(carried, jnp.swapaxes(weights, 1, 2))
        carried, weights = jnp.exp(carried - m), jnp.exp(weights - m[:, None])
        key = weights[..., None] * key.astype(jnp.float32)
        added = jnp.einsum("bphk,bphv->bhkv", key, value.astype(jnp.float32), precision=_EXACT)
        return MLstmState(carried[..., None, None] * state.cell + added,
                          carried[..., None] * state.normalizer + jnp.sum(key, axis=1), m)


def _refuse(context) -> None:
    if context is not None:
        raise ValueError("an mLSTM reads no context; give the decoder's cross-attention another "
                         "mixer, such as attention")
