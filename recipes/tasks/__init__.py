"""Tasks: what a model is trained on and for. The loop is the same for all."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

Batch = dict[str, np.ndarray]
# One global batch -> its (sum of losses, weight, statistics), by the model as it stands.
Measure = Callable[[Batch], tuple[float, float, Mapping[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a step of a task computes, without its data.

    Attributes:
      unit, axes, loss: see `Task`.
      units: how many a step takes.
      flops: of the step's forward pass.
      batch: shape and dtype of the arrays of a batch.
    """

    unit: str
    axes: tuple[str | None, ...]
    loss: Callable
    units: int
    flops: float
    batch: Mapping[str, tuple[tuple[int, ...], Any]]


class Task(Protocol):
    """What the loop asks of a task.

    Attributes:
      unit: what throughput counts, in the plural, as "tokens".
      units_per_step: how many a step takes.
      flops_per_step: of forward and backward together, for the MFU.
      axes: logical axes of the first dimensions of a batch's arrays, as ("batch", "seq").
    """

    unit: str
    units_per_step: int
    flops_per_step: float
    axes: tuple[str | None, ...]

    def batch(self, step: int, rows: np.ndarray) -> Batch:
        """The given rows of a step's global batch: a pure function of its arguments."""

    def ids(self, step: int) -> list[int]:
        """Which examples a step's batch holds, in order."""

    def loss(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None, train: bool
             ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array], Mapping[str, Any]]:
        """(sum, weight, statistics as weighted sums, the model's `Output.statistics`). Traced.

        Microbatches add the first three. Where it does not train the statistics may be anything
        that `evaluate` then makes use of, arrays too.
        """

    def evaluate(self, measure: Measure, final: bool) -> dict[str, float]:
        """Held-out metrics by name, none where nothing is held out.

        The last evaluation of a run is the `final` one.
        """

    def keep(self, folder: Path) -> None:
        """Writes what using the trained model takes besides its checkpoints."""

    def draw(self, folder: Path, runs: Mapping[str, list[Mapping[str, Any]]]) -> None:
        """Writes pictures of a run. `runs` are the records of its metrics.jsonl, under its name,
        and after it those of runs to compare it with.
        """

    def summarize(self, metrics: Mapping[str, float]) -> str:
        """The final evaluation in a few words."""

    def describe(self) -> dict[str, Any]:
        """What of the task a run's result depends on, as JSON."""


