"""Dims: what an op's operands and results mean, so that a caller can shard them."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Dims:
    """The logical axes of a per-shard op.

    Attributes:
      operands: per operand one logical axis, or None for a dimension that must be whole, each.
      results: the same for the results, as a pytree of tuples; or a function that makes it from
        the op's options, where they decide.
      shardable: the logical axes that may be sharded.
      communicates: logical axis -> the option by which the op takes the mesh axes it is sharded
        over (None where it is whole); only for ops that communicate between shards.
      aligned: pairs of logical axes whose shards belong together, so that both must be sharded
        over the same mesh axes.
      rowwise: the op computes each row of its first operand alone; the other operands and the
        results are laid out like it or whole. Axes that map to one mesh axis then share it as in
        `sharding.constrain`, and no gradient is summed over devices that all hold it: the op says
        by its results' manual axis types on which devices they differ.
    """

    operands: tuple[tuple[str | None, ...], ...]
    results: object
    shardable: frozenset[str]
    communicates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aligned: tuple[tuple[str, str], ...] = ()
    rowwise: bool = False
