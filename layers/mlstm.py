"""mLSTM: a linear recurrence over a matrix per head, with exponential gates (arXiv:2405.04517).

Per head, from query, key, value and the pre-activations i, f of two scalar gates (section 2.3
there, stabilised as in its appendix A):

    m_t = max(log sigmoid(f_t) + m_{t-1}, i_t)
    f'  = exp(log sigmoid(f_t) + m_{t-1} - m_t)       i' = exp(i_t - m_t)
    C_t = f' C_{t-1} + i' k_t v_t^T                   n_t = f' n_{t-1} + i' k_t
    h_t = C_t^T q_t / (max(|n_t^T q_t|, exp(-m_t)) + 1e-6),   q_t scaled by K^-1/2

from C = n = m = 0. The layer around it is that of xLSTM 7B (arXiv:2503.13427): dense
projections of the normed stream, gates under a soft cap, and ``y = W_out (sigmoid(o_t) *
LayerNorm_head(h_t))``. `PreUpMLstm` is that of the first xLSTM (arXiv:2405.04517, figure 11),
which is a block by itself.

A tree of rows needs no matrix per row. The recurrence is linear: a row's h is a sum over its
ancestors, weighted by the gates between, and over the state before the tree, which is only read.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import sharding
from layers.conv import CausalConv
from layers.linear import Linear
from layers.mixer import Rows, State, check_at_least_1, refuse_context, rows_at, state
from pallas_kernels.mlstm import mlstm

EPS = 1e-6  # On the normaliser.
# Initial deviation, times the root of the width, of what reads the stream (arXiv:1910.05895).
SMALL = 0.4**0.5

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
        check_at_least_1("mlstm", self, "num_heads", "key_dim", "value_dim")
        for name, example in (("gate_softcap", 15), ("norm_eps", 1e-6)):
            if not getattr(self, name) > 0:
                raise ValueError(f"mlstm.{name} is {getattr(self, name)}; it must be positive, "
                                 f"e.g. {example}")

    def build(self, width: int, *, gain: float, depth: float | jax.Array = 0.0, key: jax.Array,
              dtype) -> "MLstmMixer":
        """See `layers.mixer.MixerConfig`; layers of all depths start alike."""
        return MLstmMixer(self, width, gain=gain, key=key, dtype=dtype)

    def flops_per_token(self, width: int, length: int) -> float:
        """Projections, and the recurrence as it is written: one product into C and one with it.

        n counts as one more column of C. How a kernel cuts the sequence into chunks does not
        count, nor does `length`.
        """
        h, k, v = self.num_heads, self.key_dim, self.value_dim
        projections = 2 * width * h * (2 * k + 3 * v + 2)
        return projections + 4 * h * k * (v + 1)


@dataclasses.dataclass(frozen=True)
class PreUpMLstm:
    """A config of an mLSTM between an up- and a down-projection (arXiv:2405.04517, figure 11).

    With u and z of ``x W_up``, c the SiLU of a causal convolution of u, queries and keys of c,
    values of u, all three by matrices of `block` x `block` along the diagonal, and gates of all
    three: ``y = W_down ((LayerNorm_head(h) + skip * c) * silu(z))``.

    Attributes:
      num_heads: matrices of state.
      head_dim: width of a head; of all together the inner width, twice the stream's there.
      taps: inputs that the convolution reads.
      block: width of the diagonal's blocks.
      norm_eps: added to a head's variance in the norm of its output, whose scale is stored as its
        distance from one.
    """

    num_heads: int
    head_dim: int
    taps: int = 4
    block: int = 4
    norm_eps: float = 1e-5

    def __post_init__(self):
        check_at_least_1("mlstm", self, "num_heads", "head_dim", "taps", "block")
        if self.head_dim % self.block:
            raise ValueError(f"mlstm.head_dim is {self.head_dim}; it must be a multiple of "
                             f"mlstm.block, {self.block}")
        if not self.norm_eps > 0:
            raise ValueError(f"mlstm.norm_eps is {self.norm_eps}; it must be positive, e.g. 1e-5")

    def build(self, width: int, *, gain: float, depth: float | jax.Array = 0.0, key: jax.Array,
              dtype) -> "PreUpMLstmMixer":
        """See `layers.mixer.MixerConfig`; the output projection has the deviation
        ``gain / sqrt(width)``, and layers of all depths start alike."""
        return PreUpMLstmMixer(self, width, gain=gain, key=key, dtype=dtype)

    def flops_per_token(self, width: int, length: int) -> float:
        """Projections, and the recurrence as in `MLstm`; the convolution is no matrix product."""
        h, k = self.num_heads, self.head_dim
        projections = 2 * h * k * (3 * width + 3 * self.block + 2 * 3 * h)
        return projections + 4 * h * k * (k + 1)


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
    """A gate's pre-activation per head, ``x @ kernel + bias``, perhaps under a soft cap.

    In float32 from the product on. The kernel is 0 at first, so that the bias alone decides.
    """

    def __init__(self, expression: str, shape: tuple[int, ...], axes: tuple[str | None, ...],
                 bias: jax.Array, softcap: float | None, *, key: jax.Array, dtype):
        """`expression`, `shape` and `axes` as in `Linear`; `bias` [H] is the initial one; the cap
        makes ``softcap * tanh(x / softcap)``."""
        self.expression, self.axes, self.softcap = expression, axes, softcap
        init = sharding.param(jax.nn.initializers.zeros, *axes)
        self.kernel = nnx.Param(init(key, shape, dtype), axes=init.axes)
        init = sharding.param(lambda key, shape, dtype: bias.astype(dtype), "heads")
        self.bias = nnx.Param(init(key, bias.shape, dtype), axes=init.axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] -> float32 [B, T, H]."""
        y = sharding.einsum(self.expression, x, self.kernel[...], weight=self.axes,
                            out=("batch", "seq", "heads"), preferred_element_type=jnp.float32)
        y = y + self.bias[...].astype(jnp.float32)
        return y if self.softcap is None else self.softcap * jnp.tanh(y / self.softcap)


class HeadNorm(nnx.Module):
    """LayerNorm (arXiv:1607.06450) of each head alone, without bias, in float32.

    `offset` is added to the scale that is stored.
    """

    def __init__(self, heads: int, width: int, eps: float, *, offset: float = 0.0, key: jax.Array,
                 dtype):
        self.eps, self.offset = eps, offset
        init = sharding.param(jax.nn.initializers.constant(1.0 - offset), "heads", "head_dim")
        self.scale = nnx.Param(init(key, (heads, width), dtype), axes=init.axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, H, V] -> float32 [B, T, H, V]."""
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x * (self.scale[...].astype(jnp.float32) + self.offset)


@dataclasses.dataclass(frozen=True)
class Memory:
    """C, n and m under the methods of a mixer, without the layer around them.

    `operands` are queries and keys [B, T, H, K], values [B, T, H, V] and the pre-activations of
    the gates i and f, float32 [B, T, H]; h is [B, T, H, V]. The fields are those of `MLstm`.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    sigmoid_gate: bool = False

    def __call__(self, operands, segment_ids, state: MLstmState | None = None):
        """The parallel form: (h, the state behind the last position)."""
        before = (None,) * 3 if state is None else (
            state.cell, state.normalizer, state.stabilizer)
        h, *after = sharding.local(mlstm, *operands, segment_ids, *before, eps=EPS,
                                   sigmoid_gate=self.sigmoid_gate)
        return h, MLstmState(*after)

    def init_state(self, batch: int) -> MLstmState:
        """Zeros."""
        def zeros(*shape):
            x = jnp.zeros((batch, self.num_heads, *shape), jnp.float32)
            return sharding.constrain(x, "batch", "heads", *(None for _ in shape))

        return MLstmState(zeros(self.key_dim, self.value_dim), zeros(self.key_dim), zeros())

    def absorb(self, operands, valid: jax.Array, state: MLstmState):
        """(h, the state after a chunk)."""
        # One document, whose padding may stand anywhere.
        return self(operands, valid.astype(jnp.int32), state)

    def step(self, operands, tree: Rows, state: MLstmState):
        """`operands` [B, N, ...] of a tree of rows -> (h, scratch)."""
        query, key, value, i, f = operands
        i = jax.nn.log_sigmoid(i) if self.sigmoid_gate else i
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
        q = q * self.key_dim**-0.5

        def product(expression, *operands):
            return jnp.einsum(expression, *operands, precision=_EXACT)

        weights = weights * product("bhnk,bhjk->bhnj", q, k)
        above = product("bhnj,bhjv->bhnv", weights, v) + carried[..., None] * product(
            "bhnk,bhkv->bhnv", q, state.cell)
        below = jnp.sum(weights, axis=-1) + carried * product(
            "bhnk,bhk->bhn", q, state.normalizer)
        h = above / (jnp.maximum(jnp.abs(below), jnp.exp(-m)) + EPS)[..., None]
        return jnp.swapaxes(h, 1, 2).astype(value.dtype), (key, value, i, f)

    def _stabilizer(self, carried, weights):
        """m [...] for logarithms of what is left of the state [...] and of rows [..., J]."""
        if self.sigmoid_gate:
            return jnp.zeros_like(carried)
        return jnp.maximum(carried, jnp.max(weights, axis=-1))

    def commit(self, state: MLstmState, scratch, path: jax.Array, count: jax.Array) -> MLstmState:
        """Of one layer or, with a leading axis, of several."""
        if state.cell.ndim > 4:  # a stack's
            return jax.vmap(self.commit, in_axes=(0, 0, None, None))(state, scratch, path, count)
        kept = (jnp.arange(path.shape[1]) < count[:, None])[..., None]
        key, value, i, f = (rows_at(y, path) for y in scratch)
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


class MLstmMixer(nnx.Module):
    """The mLSTM layer under the mixer contract of `layers.mixer`."""

    def __init__(self, config: MLstm, width: int, *, gain: float, key: jax.Array, dtype):
        self.memory = Memory(config.num_heads, config.key_dim, config.value_dim,
                             config.sigmoid_gate)
        h, k, v = config.num_heads, config.key_dim, config.value_dim
        keys = jax.random.split(key, 5)

        def project(size, key):
            return Linear("btd,dhk->bthk", (width, h, size), ("embed", "heads", "head_dim"),
                          ("batch", "seq", "heads", "head_dim"), key=key, dtype=dtype)

        def gate(bias):
            return Gate("btd,dh->bth", (width, h), ("embed", "heads"), bias, config.gate_softcap,
                        key=key, dtype=dtype)

        self.query = project(k, keys[0])
        self.key = project(k, keys[1])
        self.value = project(v, keys[2])
        self.output_gate = project(v, keys[3])
        # Almost shut, and open: the memory starts long and takes in little (arXiv:2503.13427).
        self.input_gate = gate(jnp.full(h, -10.0))
        self.forget_gate = gate(jnp.linspace(3.0, 6.0, h))
        self.norm = HeadNorm(h, v, config.norm_eps, key=key, dtype=dtype)
        self.out = Linear("bthv,hvd->btd", (h, v, width), ("heads", "head_dim", "embed"),
                          ("batch", "seq", "embed"), gain=gain, key=keys[4], dtype=dtype)

    def _project(self, x):
        """What `Memory` takes."""
        return (self.query(x), self.key(x), self.value(x), self.input_gate(x),
                self.forget_gate(x))

    def _output(self, x, h):
        gate = jax.nn.sigmoid(self.output_gate(x).astype(jnp.float32))
        return self.out((gate * self.norm(h)).astype(x.dtype))

    def __call__(self, x, segment_ids, positions, context=None):
        refuse_context(context, "an mLSTM")
        return self._output(x, self.memory(self._project(x), segment_ids)[0])

    def init_state(self, batch, max_len, path=1, context=None):
        refuse_context(context, "an mLSTM")
        return self.memory.init_state(batch)

    def absorb(self, x, valid, state):
        h, after = self.memory.absorb(self._project(x), valid, state)
        return self._output(x, h), after

    def step(self, x, tree: Rows, state):
        h, scratch = self.memory.step(self._project(x), tree, state)
        return self._output(x, h), scratch

    def commit(self, state, scratch, path, count):
        return self.memory.commit(state, scratch, path, count)


@state
class PreUpMLstmState(State):
    """`conv`: the convolution's last inputs [B, taps - 1, H, K]; `memory`: see `MLstmState`."""

    conv: jax.Array
    memory: MLstmState


class PreUpMLstmMixer(nnx.Module):
    """The layer of `PreUpMLstm` under the mixer contract of `layers.mixer`."""

    def __init__(self, config: PreUpMLstm, width: int, *, gain: float, key: jax.Array, dtype):
        h, k = config.num_heads, config.head_dim
        self.memory, self.block = Memory(h, k, k), config.block
        keys = jax.random.split(key, 8)
        heads = ("batch", "seq", "heads", "head_dim")

        def project(key):
            return Linear("btd,dhk->bthk", (width, h, k), ("embed", "heads", "head_dim"), heads,
                          gain=SMALL, key=key, dtype=dtype)

        def diagonal(key):
            return Linear("bthci,hcio->bthco", (h, k // config.block, config.block, config.block),
                          ("heads", None, None, None), (*heads, None),
                          gain=SMALL * (config.block / width)**0.5, key=key, dtype=dtype)

        def gate(bias):
            return Gate("btshk,shkg->btg", (3, h, k, h), (None, "heads", "head_dim", None), bias,
                        None, key=key, dtype=dtype)

        self.up = project(keys[0])
        self.gate = project(keys[1])
        self.conv = CausalConv(config.taps, h, k, key=keys[2], dtype=dtype)
        self.query = diagonal(keys[3])
        self.key = diagonal(keys[4])
        self.value = diagonal(keys[5])
        self.input_gate = gate(0.1 * jax.random.normal(keys[6], (h,)))
        self.forget_gate = gate(jnp.linspace(3.0, 6.0, h))
        self.norm = HeadNorm(h, k, config.norm_eps, offset=1.0, key=key, dtype=dtype)
        init = sharding.param(jax.nn.initializers.ones, "heads", "head_dim")
        self.skip = nnx.Param(init(key, (h, k), dtype), axes=init.axes)
        self.out = Linear("bthk,hkd->btd", (h, k, width), ("heads", "head_dim", "embed"),
                          ("batch", "seq", "embed"), gain=gain * (h * k / width)**0.5, key=keys[7],
                          dtype=dtype)

    def _project(self, u, c):
        """What `Memory` takes."""
        def diagonal(linear, x):
            return linear(x.reshape(*x.shape[:-1], -1, self.block)).reshape(x.shape)

        three = diagonal(self.query, c), diagonal(self.key, c), diagonal(self.value, u)
        stacked = jnp.stack(three, axis=2)
        return *three, self.input_gate(stacked), self.forget_gate(stacked)

    def _output(self, x, c, h):
        skip = sharding.gathered(self.skip[...], "heads", "head_dim").astype(jnp.float32)
        y = (self.norm(h) + skip * c) * jax.nn.silu(self.gate(x).astype(jnp.float32))
        return self.out(y.astype(x.dtype))

    def __call__(self, x, segment_ids, positions, context=None):
        refuse_context(context, "an mLSTM")
        u = self.up(x)
        c = jax.nn.silu(self.conv(u, segment_ids))
        return self._output(x, c, self.memory(self._project(u, c), segment_ids)[0])

    def init_state(self, batch, max_len, path=1, context=None):
        refuse_context(context, "an mLSTM")
        return PreUpMLstmState(self.conv.init_state(batch), self.memory.init_state(batch))

    def absorb(self, x, valid, state):
        u = self.up(x)
        c, conv = self.conv.absorb(u, valid, state.conv)
        c = jax.nn.silu(c)
        h, memory = self.memory.absorb(self._project(u, c), valid, state.memory)
        return self._output(x, c, h), PreUpMLstmState(conv, memory)

    def step(self, x, tree: Rows, state):
        u = self.up(x)
        c, conv = self.conv.step(u, tree, state.conv)
        c = jax.nn.silu(c)
        h, memory = self.memory.step(self._project(u, c), tree, state.memory)
        return self._output(x, c, h), (conv, memory)

    def commit(self, state, scratch, path, count):
        return PreUpMLstmState(self.conv.commit(state.conv, scratch[0], path, count),
                               self.memory.commit(state.memory, scratch[1], path, count))
