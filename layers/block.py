"""The residual block: norm, mixer, residual; norm, MLP or mixture of experts, residual."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import sharding
from layers.dropout import dropout, fold
from layers.mixer import MixerConfig
from layers.mlp import Mlp
from layers.moe import MixtureOfExperts, Moe
from layers.norm import Norm, Normalize


class Block(nnx.Module):
    """A pre-norm residual block around one sequence mixer."""

    def __init__(self, mixer: MixerConfig, mlp: Mlp | Moe, norm: Norm, width: int, *,
                 post_norms: bool = False, dropout: float, gain: float, key: jax.Array,
                 dtype=jnp.float32):
        """`gain` scales the initial output projections of the mixer and of the MLP; `post_norms`
        norms what these two return before it is added."""
        keys = jax.random.split(key, 2)
        self.dropout = dropout

        def normalize():
            return Normalize(norm, width, key=key, dtype=dtype)

        self.mixer_norm = normalize()
        self.mixer = mixer.build(width, gain=gain, key=keys[0], dtype=dtype)
        self.mixer_post_norm = normalize() if post_norms else None
        self.mlp_norm = normalize()
        self.mlp = mlp.build(width, gain=gain, key=keys[1], dtype=dtype)
        self.mlp_post_norm = normalize() if post_norms else None

    def _residual(self, x, mixed, valid, key=None):
        if self.mixer_post_norm is not None:
            mixed = self.mixer_post_norm(mixed)
        y, x = self.mlp_norm(dropout(mixed, self.dropout, fold(key, 0)), x)
        routed = isinstance(self.mlp, MixtureOfExperts)
        y, aux = self.mlp(y, valid) if routed else (self.mlp(y), {})
        if self.mlp_post_norm is not None:
            y = self.mlp_post_norm(y)
        x = x + dropout(y, self.dropout, fold(key, 1))
        return sharding.constrain(x, "batch", "seq", "embed"), aux

    def __call__(self, x, segment_ids, positions, key=None, context=None
                 ) -> tuple[jax.Array, dict[str, Any]]:
        """Training form: [B, T, D] -> ([B, T, D], auxiliary losses and statistics).

        `key` turns dropout on. The second result is ``{"losses": {name: (sum, weight)}, "stats":
        {name: (sum, weight)}}``, or empty where the block has none.
        """
        mixed = self.mixer(self.mixer_norm(x), segment_ids, positions, context)
        valid = None if segment_ids is None else segment_ids != 0
        return self._residual(x, mixed, valid, key)

    def init_state(self, batch: int, max_len: int, path: int = 1, context=None) -> Any:
        """The mixer's state."""
        return self.mixer.init_state(batch, max_len, path, context)

    def absorb(self, x, valid, state) -> tuple[jax.Array, Any]:
        """See `layers.mixer`."""
        mixed, update = self.mixer.absorb(self.mixer_norm(x), valid, state)
        return self._residual(x, mixed, valid)[0], update

    def step(self, x, tree, state) -> tuple[jax.Array, Any]:
        """See `layers.mixer`."""
        mixed, scratch = self.mixer.step(self.mixer_norm(x), tree, state)
        return self._residual(x, mixed, tree.valid)[0], scratch

    def commit(self, state, scratch, path, count) -> Any:
        """See `layers.mixer`."""
        return self.mixer.commit(state, scratch, path, count)
