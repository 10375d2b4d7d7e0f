"""A mixture of experts in place of the MLP: top-k routing without dropped tokens.

Each token goes through the `top_k` experts that its router finds most probable, whatever their
load (arXiv:2101.03961, arXiv:2401.04088). Token-expert pairs are sorted by expert, and one ragged
matrix product per kernel serves all experts of a device. That stands inside `sharding.local`:
tokens stay on the devices that hold them, experts are spread by their hidden width or as wholes
(see `sharding.Rules`), and devices add up what they have.

What a ragged product costs is the compiler's affair. For TPUs XLA has a kernel that does no more
than is needed. For CPUs and GPUs it has none, takes every expert's product over all rows and masks
the rest: right, but slow for many experts, and on a GPU with E copies of the rows in memory.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import sharding
from layers.linear import Linear, fan_in_normal
from layers.mlp import ACTIVATIONS, Mlp
from pallas_kernels.dims import Dims
from sharding.ambient import PRODUCT


@dataclasses.dataclass(frozen=True)
class Moe:
    """Gated MLPs, of which each token takes `top_k`, weighted by the router's softmax.

    Attributes:
      num_experts: MLPs to choose from.
      top_k: how many a token takes.
      hidden: inner width of an expert.
      activation: in ``down(act(gate x) * up x)``; a name in `layers.mlp.ACTIVATIONS`.
      normalize: the chosen experts' probabilities are scaled to sum to one. (Which is the softmax
        of their logits alone.)
      shared_hidden: inner width of an expert that every token takes besides, times
        ``sigmoid(x @ shared_gate)``; None for none.
      balance_loss: coefficient of the load-balancing loss ``num_experts * sum_e f_e P_e``, f_e the
        share of tokens that take expert e, so that all f_e add up to top_k, and P_e its mean
        probability: top_k where the load is even. (arXiv:2101.03961, eq. 4, has f_e / top_k.)
      z_loss: coefficient of the router's mean squared log-normaliser (arXiv:2202.08906, eq. 5).
    """

    num_experts: int
    top_k: int
    hidden: int
    activation: str = "silu"
    normalize: bool = True
    shared_hidden: int | None = None
    balance_loss: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self):
        for name in ("num_experts", "hidden", "shared_hidden"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"mlp.{name} is {value}; it must be at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"mlp.top_k is {self.top_k}; it must be in 1..{self.num_experts}, the "
                             "number of experts")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"mlp.activation is {self.activation!r}; it must be one of {sorted(ACTIVATIONS)}")
        for name in ("balance_loss", "z_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"mlp.{name} is {getattr(self, name)}; it must be 0 (none) or "
                                 "more, and finite")

    def build(self, width: int, *, gain: float, key: jax.Array, dtype) -> "MixtureOfExperts":
        """The module; `gain` scales the initial output projections."""
        return MixtureOfExperts(self, width, gain=gain, key=key, dtype=dtype)

    def flops_per_token(self, width: int) -> int:
        """Forward multiply-adds of one token, times two: of the experts it takes and the router."""
        shared = 0 if self.shared_hidden is None else 3 * self.shared_hidden + 1
        return 2 * width * (3 * self.top_k * self.hidden + self.num_experts + shared)


class Kernel(nnx.Module):
    """A parameter `kernel` of deviation ``gain / sqrt(inputs)``, its last but one dimension."""

    def __init__(self, shape: Sequence[int], axes: Sequence[str], *, gain: float = 1.0,
                 key: jax.Array, dtype):
        init = sharding.param(fan_in_normal(shape[-2], gain), *axes)
        self.kernel = nnx.Param(init(key, shape, dtype), axes=init.axes)


class MixtureOfExperts(nnx.Module):
    """The module of a `Moe` config."""

    def __init__(self, config: Moe, width: int, *, gain: float, key: jax.Array, dtype):
        self.config = config
        e, f = config.num_experts, config.hidden
        keys = jax.random.split(key, 6)
        self.router = Kernel((width, e), ("embed", "experts"), key=keys[0], dtype=dtype)
        inner = ("experts", "embed", "mlp")
        self.gate = Kernel((e, width, f), inner, key=keys[1], dtype=dtype)
        self.up = Kernel((e, width, f), inner, key=keys[2], dtype=dtype)
        self.down = Kernel((e, f, width), ("experts", "mlp", "embed"), gain=gain, key=keys[3],
                           dtype=dtype)
        shared = config.shared_hidden
        self.shared = None if shared is None else Mlp(shared, config.activation).build(
            width, gain=gain, key=keys[4], dtype=dtype)
        self.shared_gate = None if shared is None else Linear(
            "btd,do->bto", (width, 1), ("embed", None), ("batch", "seq", None), key=keys[5],
            dtype=dtype)

    def __call__(self, x: jax.Array, valid: jax.Array | None = None
                 ) -> tuple[jax.Array, dict[str, Any]]:
        """[B, T, D] -> [B, T, D], and auxiliary losses and statistics.

        `valid` bool [B, T] marks real tokens, None: all; no expert computes the others.

        The second result holds, as pairs (sum over valid tokens, their number): under "losses",
        times their coefficients and only where these are not 0, "moe_balance" and "moe_z"; under
        "stats" "moe_max_load", the load of the busiest expert over the mean load, and
        "moe_entropy", of the router's probabilities in nats.
        """
        c = self.config
        # Whole on every device, whatever becomes of the experts.
        logits = sharding.einsum("btd,de->bte", x, self.router.kernel[...],
                                 weight=("embed", None), out=("batch", "seq", None),
                                 preferred_element_type=jnp.float32)
        weights, chosen = sharding.local(most_probable, jax.nn.softmax(logits), count=c.top_k)
        if c.normalize:
            weights /= jnp.sum(weights, axis=-1, keepdims=True)
        parts = sharding.local(mix, x, weights, chosen, valid, self.gate.kernel[...],
                               self.up.kernel[...], self.down.kernel[...],
                               activation=c.activation)
        y = sharding.constrain(jnp.sum(parts, axis=(0, 1)), "batch", "seq", "embed")
        if self.shared is not None:
            y += jax.nn.sigmoid(self.shared_gate(x)) * self.shared(x)[0]
        return y, self._aux(logits, chosen, valid)

    def _aux(self, logits, chosen, valid) -> dict[str, Any]:
        c = self.config
        live = jnp.ones(chosen.shape[:2]) if valid is None else valid.astype(jnp.float32)
        tokens = jnp.sum(live)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        log_probs = logits - normalizer[..., None]
        probs = jnp.exp(log_probs)
        takes = (chosen[..., None] == jnp.arange(c.num_experts)) * live[..., None, None]
        share = jnp.sum(takes, axis=(0, 1, 2)) / jnp.maximum(tokens, 1.0)
        losses = {}
        if c.balance_loss:
            total = jnp.sum(share * jnp.sum(probs * live[..., None], axis=(0, 1)))
            losses["moe_balance"] = c.balance_loss * c.num_experts * total, tokens
        if c.z_loss:
            losses["moe_z"] = c.z_loss * jnp.sum(jnp.square(normalizer) * live), tokens
        stats = {
            "moe_max_load": (jnp.max(share) * c.num_experts / c.top_k * tokens, tokens),
            "moe_entropy": (-jnp.sum(jnp.sum(probs * log_probs, axis=-1) * live), tokens),
        }
        return {"losses": losses, "stats": lax.stop_gradient(stats)}


# --- on each device ------------------------------------------------------------------------------

_ROW = ("batch", "seq", None)


def most_probable(probs: jax.Array, *, count: int) -> tuple[jax.Array, jax.Array]:
    """float32 [B, T, E] -> the `count` largest of each row and their int32 indices [B, T, K]."""
    return tuple(lax.top_k(probs, count))


most_probable.dims = Dims(operands=(_ROW,), results=(_ROW, _ROW),
                          shardable=frozenset({"batch", "seq"}), rowwise=True)


def mix(x: jax.Array, weights: jax.Array, chosen: jax.Array, valid: jax.Array | None,
        gate: jax.Array, up: jax.Array, down: jax.Array, *, activation: str,
        axis: str | tuple[str, ...] | None = None) -> jax.Array:
    """The weighted sum of each token's experts, as far as this device has them.

    Args:
      x: [B, T, D]; differentiable, as are weights and kernels.
      weights: float32 [B, T, K].
      chosen: int32 [B, T, K], in 0..E-1 of all experts.
      valid: bool [B, T]; the result is 0 elsewhere. None: all are.
      gate, up: [E, D, F].
      down: [E, F, D].
      activation: see `Moe`.
      axis: the mesh axes that the experts are sharded over, inside a shard_map.

    Returns:
      [1, 1, B, T, D]: devices that have other experts, or another part of F, hold summands.
    """
    width, experts, top_k = x.shape[-1], gate.shape[0], chosen.shape[-1]
    expert = chosen.reshape(-1)
    inside = None
    if valid is not None:
        expert = jnp.where(jnp.repeat(valid.reshape(-1), top_k), expert, -1)
    if axis is not None:
        expert = jnp.where(expert >= 0, expert - lax.axis_index(axis) * experts, -1)
    if valid is not None or axis is not None:
        # What belongs to no expert here is sorted behind what does.
        expert = jnp.where((expert >= 0) & (expert < experts), expert, experts)
    order = jnp.argsort(expert)
    inverse = jnp.argsort(order)
    sizes = jnp.sum(expert[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    if valid is not None or axis is not None:
        inside = jnp.arange(expert.size)[:, None] < jnp.sum(sizes)

    def only_inside(x):
        return x if inside is None else jnp.where(inside, x, jnp.zeros_like(x))

    def product(x, kernel):
        # Some back ends leave anything in rows of no group. Masked on both sides it goes nowhere,
        # nor does it in the backward pass, where the operand's mask is the result's.
        return checkpoint_name(only_inside(_product(only_inside(x), kernel, sizes)), PRODUCT)

    rows = _take(x.reshape(-1, width), order // top_k, inverse.reshape(-1, top_k))
    hidden = ACTIVATIONS[activation](product(rows, gate)) * product(rows, up)
    y = _take(product(hidden, down), inverse, order[:, None])
    y = y.reshape(*chosen.shape, width)
    y = jnp.sum(y.astype(jnp.float32) * weights[..., None], axis=2)
    return y.astype(x.dtype)[None, None]


mix.dims = Dims(
    operands=(_ROW, _ROW, _ROW, _ROW[:2], ("experts", None, "mlp"), ("experts", None, "mlp"),
              ("experts", "mlp", None)),
    results=("experts", "mlp", *_ROW),
    shardable=frozenset({"batch", "seq", "experts", "mlp"}),
    communicates={"experts": "axis"},
)


# Rows of a group times its matrix, over the last dimension of both; and the sum over a group's rows
# of the outer products of two arrays.
_ROWS = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
_OUTER = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
    """``x[i] @ kernel[e]`` for x [M, K], kernel [E, K, N] and rows sorted into groups of int32
    `sizes` [E].

    Forwards and for x backwards in the one form that XLA's kernel serves on every TPU: for a v5e,
    libtpu of jax 0.10 expands any other, which takes E times the FLOPs. (So it does with the
    gradient of `kernel`, of which there is but one form.) The transpose is not carried out.
    """
    return lax.ragged_dot_general(x, jnp.swapaxes(kernel, 1, 2), sizes, _ROWS)


def _product_forward(x, kernel, sizes):
    return _product(x, kernel, sizes), (x, kernel, sizes)


def _product_backward(operands, cotangent):
    x, kernel, sizes = operands
    d_x = lax.ragged_dot_general(cotangent, kernel, sizes, _ROWS)
    d_kernel = lax.ragged_dot_general(x, cotangent, sizes, _OUTER)
    return d_x, d_kernel.astype(kernel.dtype), None


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _take(x: jax.Array, index: jax.Array, back: jax.Array) -> jax.Array:
    """Rows `index` [M] of x [N, D], where rows ``back[i]`` of the result, [N, M / N], are the
    copies of x[i]. So the gradient is a gather too, where JAX's own is a scatter, which
    accelerators do slowly."""
    return jnp.take(x, index, axis=0, mode="clip")


def _take_forward(x, index, back):
    return _take(x, index, back), back


def _take_backward(back, cotangent):
    return jnp.sum(jnp.take(cotangent, back, axis=0, mode="clip"), axis=1), None, None


_take.defvjp(_take_forward, _take_backward)
