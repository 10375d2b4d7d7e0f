"""A causal depthwise convolution over the sequence, in parallel and incremental form.

    y_t = bias + sum_{s=0}^{W-1} kernel_{W-1-s} * x_{t-s}

per channel, with zeros before the start of a document. What decoding remembers are the last W - 1
inputs. It is a sum of W shifted products: back ends compute a convolution of one channel in and
one out as many small ones.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import sharding
from layers.mixer import Rows, rows_at


class CausalConv(nnx.Module):
    """W taps and a bias per channel, the channels as heads [H, D]; see the module's docstring.

    Its methods are those of a mixer (`layers.mixer`) on [B, T, H, D]; the state is an array, the
    last W - 1 inputs [B, W - 1, H, D], the oldest first.
    """

    def __init__(self, taps: int, heads: int, head_dim: int, *, key: jax.Array, dtype):
        self.shape = taps, heads, head_dim

        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -(taps**-0.5), taps**-0.5)

        init = sharding.param(uniform, None, "heads", "head_dim")
        self.kernel = nnx.Param(init(key, self.shape, dtype), axes=init.axes)
        init = sharding.param(jax.nn.initializers.zeros, "heads", "head_dim")
        self.bias = nnx.Param(init(key, self.shape[1:], dtype), axes=init.axes)

    @property
    def _before(self) -> int:
        """How many inputs before its own a position reads."""
        return self.shape[0] - 1

    def _sum(self, shifted) -> jax.Array:
        """The result for inputs [B, T, H, D] of 0, 1, ... positions before."""
        kernel = sharding.gathered(self.kernel[...], None, "heads", "head_dim")
        y = sharding.gathered(self.bias[...], "heads", "head_dim")
        for s, x in enumerate(shifted):
            y = y + kernel[self._before - s] * x
        return sharding.constrain(y, "batch", "seq", "heads", "head_dim")

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """[B, T, H, D] -> [B, T, H, D]. The tokens of a document stand next to each other."""
        t = x.shape[1]

        def shift(y, s):
            return jnp.pad(y, ((0, 0), (s, 0), *((0, 0),) * (y.ndim - 2)))[:, :t]

        shifted, same = [x], None
        for s in range(1, self._before + 1):
            y = shift(x, s)
            if segment_ids is not None:
                here = shift(segment_ids, s) == segment_ids
                same = here if same is None else here & same
                y = jnp.where(same[..., None, None], y, 0)
            shifted.append(y)
        return self._sum(shifted)

    def init_state(self, batch: int) -> jax.Array:
        """[B, W - 1, H, D] zeros, of the parameters' type, which is that of the inputs."""
        zeros = jnp.zeros((batch, self._before, *self.shape[1:]), self.kernel[...].dtype)
        return sharding.constrain(zeros, "batch", None, "heads", "head_dim")

    def absorb(self, x: jax.Array, valid: jax.Array, state: jax.Array
               ) -> tuple[jax.Array, jax.Array]:
        """(y [B, T, H, D], the state after a chunk whose real tokens are where `valid` is)."""
        order = jnp.argsort(~valid, axis=1, stable=True)
        inputs = jnp.concatenate([state, rows_at(x, order).astype(state.dtype)], axis=1)
        t, before = x.shape[1], self._before
        y = self._sum([inputs[:, before - s : before - s + t] for s in range(before + 1)])
        rank = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        return rows_at(y, rank), self._last(inputs, jnp.sum(valid, axis=1))

    def step(self, x: jax.Array, tree: Rows, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(y [B, N, H, D], scratch for `commit`): a row follows its ancestors."""
        inputs = jnp.concatenate([state, x.astype(state.dtype)], axis=1)
        row = jnp.broadcast_to(jnp.arange(x.shape[1]), tree.depth.shape)
        shifted = [x]
        for s in range(1, self._before + 1):
            row = jnp.take_along_axis(tree.parent, row, axis=1)
            shifted.append(rows_at(inputs, self._before + jnp.where(
                tree.depth >= s, row, tree.depth - s)))
        return self._sum(shifted), x.astype(state.dtype)

    def commit(self, state: jax.Array, scratch: jax.Array, path: jax.Array, count: jax.Array
               ) -> jax.Array:
        """The last inputs behind `count` [B] rows of `path` [B, P]; of one layer, or of several
        with a leading axis."""
        if state.ndim > 4:
            return jax.vmap(self.commit, in_axes=(0, 0, None, None))(state, scratch, path, count)
        return self._last(jnp.concatenate([state, rows_at(scratch, path)], axis=1), count)

    def _last(self, inputs: jax.Array, count: jax.Array) -> jax.Array:
        """Of a state and what follows it, the state after the first `count` that follow."""
        return rows_at(inputs, count[:, None] + jnp.arange(self._before))
