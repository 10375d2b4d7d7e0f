"""Dims: what an op's operands and results mean, so that a caller can shard them."""

import dataclasses
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Dims:
    """The logical axes of a per-shard op.

    Attributes:
      operands: per operand one logical axis, or None for a dimension that must be whole, each.
      results: the same for the results, as a pytree of tuples.
      shardable: the logical axes that may be sharded.
      communicates: logical axis -> the option by which the op takes the mesh axes it is sharded
        over (None where it is whole); only for ops that communicate between shards.
      aligned: pairs of logical axes whose shards belong together, so that both must be sharded
        over the same mesh axes.
    """

    operands: tuple[tuple[str | None, ...], ...]
    results: object
    shardable: frozenset[str]
    communicates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aligned: tuple[tuple[str, str], ...] = ()


def op(dims: Dims) -> Callable:
    """Declares a function to be a per-shard op with these `dims`."""

    def declare(function):
        function.dims = dims
        return function

    return declare
