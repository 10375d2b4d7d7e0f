"""Position-wise MLPs, plain and gated (arXiv:2002.05202)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.linear import Linear

ACTIVATIONS: Mapping[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


@dataclasses.dataclass(frozen=True)
class Mlp:
    """``down(act(gate x) * up x)`` when `gated`, else ``down(act(up x))``.

    `hidden` is the inner width; `bias` puts biases on every map.
    """

    hidden: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False

    def __post_init__(self):
        if self.hidden < 1:
            raise ValueError(f"mlp.hidden is {self.hidden}; it must be at least 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"mlp.activation is {self.activation!r}; it must be one of {sorted(ACTIVATIONS)}"
            )

    def build(self, width: int, *, gain: float, key: jax.Array, dtype) -> "FeedForward":
        """The module; `gain` scales the initial output projection."""
        return FeedForward(self, width, gain=gain, key=key, dtype=dtype)

    def flops_per_token(self, width: int) -> int:
        """Forward multiply-adds of one token, times two."""
        return 2 * (3 if self.gated else 2) * width * self.hidden


class FeedForward(nnx.Module):
    """The module of an `Mlp` config."""

    def __init__(self, config: Mlp, width: int, *, gain: float, key: jax.Array, dtype):
        self.config = config
        up = {
            "expression": "btd,df->btf",
            "shape": (width, config.hidden),
            "axes": ("embed", "mlp"),
            "out_axes": ("batch", "seq", "mlp"),
            "bias": config.bias,
            "dtype": dtype,
        }
        keys = jax.random.split(key, 3)
        self.gate = Linear(**up, key=keys[0]) if config.gated else None
        self.up = Linear(**up, key=keys[1])
        self.down = Linear("btf,fd->btd", (config.hidden, width), ("mlp", "embed"),
                           ("batch", "seq", "embed"), bias=config.bias, gain=gain, key=keys[2],
                           dtype=dtype)

    def __call__(self, x: jax.Array, valid: jax.Array | None = None
                 ) -> tuple[jax.Array, dict[str, Any]]:
        """[B, T, D] -> [B, T, D], and what every MLP returns besides: auxiliary losses and
        statistics, of which this one has none. `valid` bool [B, T] makes no difference."""
        act = ACTIVATIONS[self.config.activation]
        hidden = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return self.down(hidden), {}
