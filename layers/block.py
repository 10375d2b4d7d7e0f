"""The residual block: norm, mixer, residual; perhaps norm, MLP or mixture of experts, residual."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import sharding
from layers.dropout import dropout, fold
from layers.mixer import MixerConfig
from layers.mlp import Mlp
from layers.moe import Moe
from layers.norm import Norm, Normalize


class Block(nnx.Module):
    """A pre-norm residual block around one sequence mixer."""

    def __init__(self, mixer: MixerConfig, mlp: Mlp | Moe | None, norm: Norm, width: int, *,
                 post_norms: bool = False, dropout: float, gain: float,
                 depth: float | jax.Array = 0.0, key: jax.Array, dtype=jnp.float32):
        """`gain` scales the initial output projections of the mixer and of the MLP; `depth` is
        where the block stands, from 0 to 1; `post_norms` norms what the two return before it is
        added."""
        keys = jax.random.split(key, 2)
        self.dropout = dropout

        def normalize(wanted=True):
            return Normalize(norm, width, key=key, dtype=dtype) if wanted else None

        self.mixer_norm = normalize()
        self.mixer = mixer.build(width, gain=gain, depth=depth, key=keys[0], dtype=dtype)
        self.mixer_post_norm = normalize(post_norms)
        self.mlp_norm = normalize(mlp is not None)
        self.mlp = None if mlp is None else mlp.build(width, gain=gain, key=keys[1], dtype=dtype)
        self.mlp_post_norm = normalize(post_norms and mlp is not None)

    def _residual(self, x, mixed, valid, key=None):
        if self.mixer_post_norm is not None:
            mixed = self.mixer_post_norm(mixed)
        mixed = dropout(mixed, self.dropout, fold(key, 0))
        if self.mlp is None:
            return sharding.constrain(x + mixed, "batch", "seq", "embed"), {}
        y, x = self.mlp_norm(mixed, x)
        y, aux = self.mlp(y, valid)
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
