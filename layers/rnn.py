"""Recurrent layers with memory mixing: sLSTM (arXiv:2405.04517), and the LSTM, GRU and Elman cells.

Each position's gates read the one before through a matrix a head, so that nothing but the order of
the sequence computes it: training runs the op `pallas_kernels.rnn`, and the rows of a decoding
tree start one after another from the states that their parents left.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import sharding
from layers.conv import CausalConv
from layers.linear import Linear, fan_in_normal
from layers.mixer import Rows, State, check_at_least_1, refuse_context, rows_at, state
from layers.mlstm import SMALL, HeadNorm
from pallas_kernels import rnn as op

_CLASSICAL = ("lstm", "gru", "elman")


@dataclasses.dataclass(frozen=True)
class Rnn:
    """A config of a classical recurrent layer: ``y = W_out h``, with h of gates ``W x + R h + b``.

    Attributes:
      cell: "lstm", "gru" or "elman".
      num_heads: blocks along the diagonal of R; 1 for the textbook's full one.
      head_dim: elements of h a head.
    """

    cell: str
    num_heads: int
    head_dim: int

    def __post_init__(self):
        if self.cell not in _CLASSICAL:
            raise ValueError(f"rnn.cell is {self.cell!r}; it must be one of "
                             f"{', '.join(_CLASSICAL)}")
        check_at_least_1("rnn", self, "num_heads", "head_dim")

    def build(self, width: int, *, gain: float, depth: float | jax.Array = 0.0, key: jax.Array,
              dtype) -> "RnnMixer":
        """See `layers.mixer.MixerConfig`; layers of all depths start alike."""
        return RnnMixer(self, width, gain=gain, key=key, dtype=dtype)

    def flops_per_token(self, width: int, length: int) -> float:
        """Projections and the products with R."""
        h, d, gates = self.num_heads, self.head_dim, op.CELLS[self.cell].gates
        return 2 * h * d * (width * (gates + 1) + gates * d)


@dataclasses.dataclass(frozen=True)
class SLstm:
    """A config of an sLSTM: ``y = LayerNorm_head(h)``, heads as wide as the stream together.

    Gates i and f read the SiLU of a causal convolution of x, z and o read x itself, each by a
    matrix a head.

    Attributes:
      num_heads: of the stream's width.
      taps: inputs that the convolution reads.
      norm_eps: added to a head's variance; the norm's scale is stored as its distance from one.
    """

    num_heads: int
    taps: int = 4
    norm_eps: float = 1e-5

    def __post_init__(self):
        check_at_least_1("slstm", self, "num_heads", "taps")
        if not self.norm_eps > 0:
            raise ValueError(f"slstm.norm_eps is {self.norm_eps}; it must be positive, e.g. 1e-5")

    def build(self, width: int, *, gain: float, depth: float | jax.Array = 0.0, key: jax.Array,
              dtype) -> "SLstmMixer":
        """See `layers.mixer.MixerConfig`; there is no output projection that `gain` could scale,
        and the forget gates' biases go with `depth`."""
        if width % self.num_heads:
            raise ValueError(f"slstm.num_heads is {self.num_heads}; it must divide the width, "
                             f"{width}")
        return SLstmMixer(self, width, depth=depth, key=key, dtype=dtype)

    def flops_per_token(self, width: int, length: int) -> float:
        """Four gates' products with x and with h; the convolution is no matrix product."""
        return 2 * 4 * 2 * width * (width // self.num_heads)


@state
class RnnState(State):
    """What a cell remembers: float32 [B, S, H, D], h first; see `pallas_kernels.rnn.step`."""

    cell: jax.Array


class Cell(nnx.Module):
    """A cell's matrices and biases, under the methods of a mixer, without the layer around them.

    `inputs` [B, T, G, H, D] are what the gates read besides h; h is [B, T, H, D].
    """

    def __init__(self, cell: str, heads: int, head_dim: int, recurrent: Callable, bias: Callable,
                 *, key: jax.Array, dtype):
        """`recurrent` and `bias` are the initializers of [G, H, D, D] and [Gb, H, D]."""
        self.cell, self.sizes = cell, (heads, head_dim)
        kind = op.CELLS[cell]
        init = sharding.param(recurrent, None, "heads", None, None)
        self.recurrent = nnx.Param(
            init(key, (kind.gates, heads, head_dim, head_dim), dtype), axes=init.axes)
        init = sharding.param(bias, None, "heads", "head_dim")
        self.bias = nnx.Param(init(key, (kind.biases, heads, head_dim), dtype), axes=init.axes)

    def __call__(self, inputs: jax.Array, segment_ids: jax.Array | None,
                 state: RnnState | None = None) -> tuple[jax.Array, RnnState]:
        """(h, the state behind the last position)."""
        before = None if state is None else jnp.swapaxes(state.cell, 0, 1)
        h, after = sharding.local(op.rnn, inputs, self.recurrent[...], self.bias[...],
                                  segment_ids, before, cell=self.cell)
        return h, RnnState(jnp.swapaxes(after, 0, 1))

    def init_state(self, batch: int) -> RnnState:
        """Zeros."""
        zeros = jnp.zeros((batch, op.CELLS[self.cell].states, *self.sizes), jnp.float32)
        return RnnState(sharding.constrain(zeros, "batch", None, "heads", None))

    def absorb(self, inputs: jax.Array, valid: jax.Array, state: RnnState
               ) -> tuple[jax.Array, RnnState]:
        """(h, the state after a chunk)."""
        # One document, whose padding may stand anywhere.
        return self(inputs, valid.astype(jnp.int32), state)

    def step(self, inputs: jax.Array, tree: Rows, state: RnnState
             ) -> tuple[jax.Array, jax.Array]:
        """A tree of rows: (h, the rows' states [B, N, S, H, D])."""
        b, n = inputs.shape[:2]
        recurrent, bias = self.recurrent[...], self.bias[...]

        def row(states, item):
            i, inputs, parent, root = item
            above = rows_at(states, parent[:, None])[:, 0]
            above = jnp.where(root[:, None, None, None], state.cell, above)
            after = op.step(inputs, recurrent, bias, jnp.swapaxes(above, 0, 1), cell=self.cell)
            return lax.dynamic_update_index_in_dim(states, jnp.swapaxes(after, 0, 1), i, 1), None

        states = jnp.zeros((b, n, *state.cell.shape[1:]), state.cell.dtype)
        states, _ = lax.scan(row, states, (
            jnp.arange(n), jnp.swapaxes(inputs, 0, 1), tree.parent.T, (tree.depth == 0).T))
        return states[:, :, 0].astype(inputs.dtype), states

    def commit(self, state: RnnState, scratch: jax.Array, path: jax.Array, count: jax.Array
               ) -> RnnState:
        """Of one layer or, with a leading axis, of several."""
        if state.cell.ndim > 4:
            return jax.vmap(self.commit, in_axes=(0, 0, None, None))(state, scratch, path, count)
        last = jnp.take_along_axis(path, jnp.maximum(count - 1, 0)[:, None], axis=1)
        after = rows_at(scratch, last)[:, 0]
        return RnnState(jnp.where((count > 0)[:, None, None, None], after, state.cell))


class RnnMixer(nnx.Module):
    """The layer of `Rnn` under the mixer contract of `layers.mixer`."""

    def __init__(self, config: Rnn, width: int, *, gain: float, key: jax.Array, dtype):
        h, d, gates = config.num_heads, config.head_dim, op.CELLS[config.cell].gates
        keys = jax.random.split(key, 3)

        def bias(key, shape, dtype):
            start = jnp.zeros(shape, dtype)
            # An LSTM that remembers at first learns to do so more often.
            return start.at[1].set(1.0) if config.cell == "lstm" else start

        self.gates = Linear("btd,dghk->btghk", (width, gates, h, d),
                            ("embed", None, "heads", "head_dim"),
                            ("batch", "seq", None, "heads", "head_dim"), key=keys[0], dtype=dtype)
        self.cell = Cell(config.cell, h, d, fan_in_normal(d), bias, key=keys[1], dtype=dtype)
        self.out = Linear("bthk,hkd->btd", (h, d, width), ("heads", "head_dim", "embed"),
                          ("batch", "seq", "embed"), gain=gain, key=keys[2], dtype=dtype)

    def __call__(self, x, segment_ids, positions, context=None):
        refuse_context(context, "a recurrent cell")
        return self.out(self.cell(self.gates(x), segment_ids)[0])

    def init_state(self, batch, max_len, path=1, context=None):
        refuse_context(context, "a recurrent cell")
        return self.cell.init_state(batch)

    def absorb(self, x, valid, state):
        h, after = self.cell.absorb(self.gates(x), valid, state)
        return self.out(h), after

    def step(self, x, tree: Rows, state):
        h, scratch = self.cell.step(self.gates(x), tree, state)
        return self.out(h), scratch

    def commit(self, state, scratch, path, count):
        return self.cell.commit(state, scratch, path, count)


@state
class SLstmState(State):
    """`conv`: the convolution's last inputs [B, taps - 1, H, D]; `cell`: see `RnnState`."""

    conv: jax.Array
    cell: RnnState


class SLstmMixer(nnx.Module):
    """The layer of `SLstm` under the mixer contract of `layers.mixer`."""

    def __init__(self, config: SLstm, width: int, *, depth: float | jax.Array, key: jax.Array,
                 dtype):
        h, d = config.num_heads, width // config.num_heads
        self.sizes = h, d
        keys = jax.random.split(key, 5)

        def gate(key):
            return Linear("bthd,hde->bthe", (h, d, d), ("heads", None, None),
                          ("batch", "seq", "heads", "head_dim"), gain=SMALL * (d / width)**0.5,
                          key=key, dtype=dtype)

        def bias(key, shape, dtype):
            # Forget gates from open to shut, and the deeper the layer the more of them open.
            spread = jnp.linspace(0.0, 1.0, d) ** (0.3 + 1.3 * depth)
            return jnp.zeros(shape, dtype).at[1].set((5.0 - 12.0 * spread).astype(dtype))

        self.conv = CausalConv(config.taps, h, d, key=keys[0], dtype=dtype)
        self.input_gate = gate(keys[1])
        self.forget_gate = gate(keys[2])
        self.cell_input = gate(keys[3])
        self.output_gate = gate(keys[4])
        self.cell = Cell("slstm", h, d, jax.nn.initializers.zeros, bias, key=key, dtype=dtype)
        self.norm = HeadNorm(h, d, config.norm_eps, offset=1.0, key=key, dtype=dtype)

    def _heads(self, x):
        x = x.reshape(*x.shape[:2], *self.sizes)
        return sharding.constrain(x, "batch", "seq", "heads", "head_dim")

    def _inputs(self, x, c):
        c = jax.nn.silu(c)
        return jnp.stack([self.input_gate(c), self.forget_gate(c), self.cell_input(x),
                          self.output_gate(x)], axis=2)

    def _output(self, h):
        y = sharding.constrain(self.norm(h).astype(h.dtype), "batch", "seq", None, None)
        return sharding.constrain(y.reshape(*y.shape[:2], -1), "batch", "seq", "embed")

    def __call__(self, x, segment_ids, positions, context=None):
        refuse_context(context, "an sLSTM")
        x = self._heads(x)
        return self._output(self.cell(self._inputs(x, self.conv(x, segment_ids)), segment_ids)[0])

    def init_state(self, batch, max_len, path=1, context=None):
        refuse_context(context, "an sLSTM")
        return SLstmState(self.conv.init_state(batch), self.cell.init_state(batch))

    def absorb(self, x, valid, state):
        x = self._heads(x)
        c, conv = self.conv.absorb(x, valid, state.conv)
        h, cell = self.cell.absorb(self._inputs(x, c), valid, state.cell)
        return self._output(h), SLstmState(conv, cell)

    def step(self, x, tree: Rows, state):
        x = self._heads(x)
        c, conv = self.conv.step(x, tree, state.conv)
        h, cell = self.cell.step(self._inputs(x, c), tree, state.cell)
        return self._output(h), (conv, cell)

    def commit(self, state, scratch, path, count):
        return SLstmState(self.conv.commit(state.conv, scratch[0], path, count),
                          self.cell.commit(state.cell, scratch[1], path, count))
