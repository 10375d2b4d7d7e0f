"""AdamW, Lion, Muon and SGD from optax, with schedules, and what axes say of each parameter."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

# Learning rates that suit small models at batches of thousands of tokens.
LEARNING_RATES = {"adamw": 1e-3, "lion": 2e-4, "muon": 0.02, "sgd": 0.01}
SCHEDULES = ("cosine", "linear", "poly", "wsd", "constant")
_WSD_DECAY = 0.2  # Of all steps, the last ones, in which `wsd` falls.
# With these limits an update of finite numbers is finite, since a gradient whose square does not
# overflow is below 2e19, and weight decay turns no weight's sign.
_LARGEST, _SMALLEST_CLIP = 1e15, 1e-15
_HEADS = ("heads", "kv_heads")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How parameters are updated; `build` makes it an optax transformation.

    Attributes:
      name: adamw (arXiv:1711.05101), lion (arXiv:2302.06675), muon (arXiv:2502.16982): Muon on the
        matrices of the blocks, AdamW on all else; or sgd, with momentum 0.9.
      learning_rate: the peak, at most 1e15; None for the optimizer's own default.
      adam_learning_rate: the peak for the parameters that muon leaves to AdamW.
      schedule: after the warm-up, cosine, linear or poly (to the power of 0.9) to 0, wsd (constant,
        then linear to 0 in the last fifth), or constant.
      warmup_steps: steps in which the learning rate climbs from 0 to its peak.
      steps: of the whole run.
      weight_decay: times the learning rate, on matrices only (see `decays`); with muon on its own,
        with sgd through the momentum, as a part of the gradient. At most 1 over the learning rate.
      grad_clip: gradients of a larger global norm are scaled down to it, 1e-15 to 1e15; None: not.
    """

    name: str = "adamw"
    learning_rate: float | None = None
    adam_learning_rate: float = 3e-3
    schedule: str = "cosine"
    warmup_steps: int = 50
    steps: int = 1000
    weight_decay: float = 0.1
    grad_clip: float | None = 1.0

    def __post_init__(self):
        if self.name not in LEARNING_RATES:
            raise ValueError(f"optimizer {self.name!r}: it must be one of {list(LEARNING_RATES)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r}: it must be one of {list(SCHEDULES)}")
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", LEARNING_RATES[self.name])
        for name in ("learning_rate", "adam_learning_rate"):
            if not 0 < getattr(self, name) <= _LARGEST:
                raise ValueError(f"{name} {getattr(self, name)}: it must be above 0, and at most "
                                 f"{_LARGEST:g}")
        for name in ("warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: it must be 0 or more, and finite")
        if self.steps < 1:
            raise ValueError(f"steps {self.steps}: it must be at least 1")
        largest = min(1 / self.learning_rate, _LARGEST)
        if self.weight_decay > largest:
            raise ValueError(f"weight_decay {self.weight_decay}: it must be at most {largest}, 1 "
                             f"over the learning rate {self.learning_rate}; more would turn the "
                             "sign of every matrix")
        if self.grad_clip is not None and not _SMALLEST_CLIP <= self.grad_clip <= _LARGEST:
            raise ValueError(f"grad_clip {self.grad_clip}: it must be {_SMALLEST_CLIP:g} to "
                             f"{_LARGEST:g}, or none")

    def learning_rates(self) -> Callable[[Any], Any]:
        """step -> learning rate."""
        return schedule(self.schedule, self.learning_rate, self.steps, self.warmup_steps)

    def build(self, axes: dict[str, Any]) -> optax.GradientTransformation:
        """The transformation for parameters of logical `axes` (see `zoo.protocol.axes`)."""
        rates = self.learning_rates()
        decay_mask = map_axes(decays, axes)
        if self.name == "adamw":
            update = optax.adamw(rates, b1=0.9, b2=0.95, weight_decay=self.weight_decay,
                                 mask=decay_mask)
        elif self.name == "lion":
            update = optax.lion(rates, b1=0.9, b2=0.99, weight_decay=self.weight_decay,
                                mask=decay_mask)
        elif self.name == "sgd":
            update = optax.chain(optax.add_decayed_weights(self.weight_decay, decay_mask),
                                 optax.sgd(rates, momentum=0.9))
        else:
            update = contrib.muon(
                rates, adam_b1=0.9, adam_b2=0.95,
                adam_learning_rate=schedule(self.schedule, self.adam_learning_rate, self.steps,
                                            self.warmup_steps),
                weight_decay=self.weight_decay, weight_decay_mask=decay_mask,
                muon_weight_dimension_numbers=map_axes(muon_dimensions, axes))
        if self.grad_clip is None:
            return update
        return optax.chain(optax.stateless(self._clip), update)

    def _clip(self, gradients: Any, params: Any) -> Any:
        """One factor for all: optax divides each number, and XLA keeps the quotients."""
        factor = jnp.minimum(1.0, self.grad_clip / optax.tree.norm(gradients))
        return jax.tree.map(lambda g: factor.astype(g.dtype) * g, gradients)


def schedule(name: str, peak: float, steps: int, warmup_steps: int) -> optax.Schedule:
    """step -> learning rate: a linear climb to `peak`, then as `name` says; see `Optimizer`."""
    rest = max(1, steps - warmup_steps)
    if name == "cosine":
        after = optax.cosine_decay_schedule(peak, rest)
    elif name == "linear":
        after = optax.linear_schedule(peak, 0.0, rest)
    elif name == "poly":
        after = optax.polynomial_schedule(peak, 0.0, 0.9, rest)
    elif name == "wsd":
        fall = max(1, round(_WSD_DECAY * steps))
        after = optax.linear_schedule(peak, 0.0, fall, max(0, rest - fall))
    else:
        after = optax.constant_schedule(peak)
    # The first step already moves: a step at rate 0 would be a wasted one.
    climb = optax.linear_schedule(peak / max(1, warmup_steps), peak, max(1, warmup_steps - 1))
    return optax.join_schedules([climb, after], [warmup_steps])


def map_axes(function: Callable[[tuple], Any], axes: dict[str, Any]) -> dict[str, Any]:
    """`function` of each parameter's tuple of logical axes, in the same nesting."""
    return jax.tree.map(function, axes, is_leaf=lambda node: isinstance(node, tuple))


def sides(axes: tuple[str | None, ...]) -> list[tuple[int, ...]]:
    """A parameter's dimensions, inputs before outputs, as those of a matrix would be.

    A head's number and its width are one side: ("layers", "embed", "heads", "head_dim") gives
    [(1,), (2, 3)], and behind a cell's gates ("embed", None, "heads", "head_dim") gives
    [(0,), (1, 2, 3)]. A bias or a scale has one side. Layers, and the experts or the nameless axis
    that come first, as that of a cell's gates, are a batch of matrices.
    """
    found: list[tuple[int, ...]] = []
    for i, axis in enumerate(axes):
        if axis == "layers" or (axis in ("experts", None) and not found):
            continue
        within_head = axis == "head_dim" and found and axes[i - 1] in _HEADS
        of_gates = axis in _HEADS and len(found) > 1 and axes[i - 1] is None
        if within_head or of_gates:
            found[-1] = (*found[-1], i)
        else:
            found.append((i,))
    return found


def is_table(axes: tuple[str | None, ...]) -> bool:
    """Whether rows are looked up in it: tokens or absolute positions by width."""
    return axes[-1] == "embed" and axes[0] in ("vocab", None)


def decays(axes: tuple[str | None, ...]) -> bool:
    """Whether weight decay applies: to matrices, not to embeddings, biases and norms."""
    return len(sides(axes)) >= 2 and not is_table(axes)


def muon_dimensions(axes: tuple[str | None, ...]) -> contrib.MuonDimensionNumbers | None:
    """Which dimensions Muon takes for the matrix's inputs and outputs; None: not for Muon.

    For matrices of the blocks, whose layers and experts are a batch; not for tables and the head.
    """
    found = sides(axes)
    if len(found) != 2 or "vocab" in axes or is_table(axes):
        return None
    return contrib.MuonDimensionNumbers(*found)
