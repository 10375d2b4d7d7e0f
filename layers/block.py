"""The residual block: norm, mixer, residual; norm, MLP, residual."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import sharding
from layers.dropout import dropout, fold
from layers.mixer import MixerConfig
from layers.mlp import Mlp
from layers.norm import Norm, Normalize


class Block(nnx.Module):
    """A pre-norm residual block around one sequence mixer."""

    def __init__(self, mixer: MixerConfig, mlp: Mlp, norm: Norm, width: int, *, dropout: float,
                 gain: float, key: jax.Array, dtype=jnp.float32):
        """`gain` scales the initial output projections of the mixer and of the MLP."""
        keys = jax.random.split(key, 2)
        self.dropout = dropout
        self.mixer_norm = Normalize(norm, width, key=key, dtype=dtype)
        self.mixer = mixer.build(width, gain=gain, key=keys[0], dtype=dtype)
        self.mlp_norm = Normalize(norm, width, key=key, dtype=dtype)
        self.mlp = mlp.build(width, gain=gain, key=keys[1], dtype=dtype)

    def _residual(self, x, mixed, key=None):
        y, x = self.mlp_norm(dropout(mixed, self.dropout, fold(key, 0)), x)
        x = x + dropout(self.mlp(y), self.dropout, fold(key, 1))
        return sharding.constrain(x, "batch", "seq", "embed")

    def __call__(self, x, segment_ids, positions, key=None, context=None) -> jax.Array:
        """Training form: [B, T, D] -> [B, T, D]; `key` turns dropout on."""
        mixed = self.mixer(self.mixer_norm(x), segment_ids, positions, context)
        return self._residual(x, mixed, key)

    def init_state(self, batch: int, max_len: int, path: int = 1, context=None) -> Any:
        """The mixer's state."""
        return self.mixer.init_state(batch, max_len, path, context)

    def absorb(self, x, valid, state) -> tuple[jax.Array, Any]:
        """See `layers.mixer`."""
        mixed, update = self.mixer.absorb(self.mixer_norm(x), valid, state)
        return self._residual(x, mixed), update

    def step(self, x, tree, state) -> tuple[jax.Array, Any]:
        """See `layers.mixer`."""
        mixed, scratch = self.mixer.step(self.mixer_norm(x), tree, state)
        return self._residual(x, mixed), scratch

    def commit(self, state, scratch, path, count) -> Any:
        """See `layers.mixer`."""
        return self.mixer.commit(state, scratch, path, count)
