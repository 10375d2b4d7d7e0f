"""Cases: the calls by which an op is tested, compiled and timed. Each op's stand in its cases.py:

  CASES: list[Case]                                 # the core ones run on every change
  def work(operands, options) -> (flops, bytes)     # the least that a forward pass can do
  BACKWARD = 2.5                                    # how many times that a backward pass does
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels.dims import Dims
from pallas_kernels.dispatch import Op


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
      name: unique within the op.
      make: ``(rng) -> operands``: float64, integer or boolean arrays, or None; float32 where the
        op wants that whatever the dtype. `rng` is a `numpy.random.Generator`, of which it uses
        `normal`, `random` and `integers`.
      options: of the op.
      differentiable: indices of the operands that have gradients.
      core: whether it runs on every change: small, and together the core cases cover the options.
      tolerance: dtype name -> (of results, of gradients), each relative to the reference's largest
        magnitude where that is above 1.
      compiled: whether it is a shape that the chips' own kernels should take, compiled ahead of
        time for each target.
      dims: in place of the op's, for one that takes operands of several ranks.
    """

    name: str
    make: Callable[[np.random.Generator], Sequence[Any]]
    options: Mapping[str, Any]
    differentiable: tuple[int, ...]
    tolerance: Mapping[str, tuple[float, float]]
    core: bool = False
    compiled: bool = False
    dims: Dims | None = None

    def operands(self, dtype: Any, seed: int = 0) -> tuple[np.ndarray | None, ...]:
        """The operands, float64 ones rounded to `dtype`."""
        made = self.make(np.random.default_rng(seed))
        return tuple(x if x is None or x.dtype != np.float64 else x.astype(dtype) for x in made)

    def avals(self, dtype: Any) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """Shapes and dtypes of `operands`, without their memory."""
        return tuple(
            x if x is None else jax.ShapeDtypeStruct(
                x.shape, dtype if x.dtype == np.float64 else x.dtype)
            for x in self.make(_ShapesOnly()))


class _ShapesOnly:
    """A random generator's stand-in, whose normal arrays repeat one element in memory."""

    def normal(self, loc=0.0, scale=1.0, size=None):
        return np.broadcast_to(np.float64(loc), size)

    def random(self, size=None):
        return np.full(size, 0.5)

    def integers(self, low, high=None, size=None):
        return np.full(size, low)


def of(op: Op) -> list[Case]:
    """The cases of an op."""
    return op.module("cases").CASES
