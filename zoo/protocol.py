"""What a model is to the rest of the zoo: its output, its parameters as a tree, its decoding."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.stack import to_list, to_stacked

__all__ = [
    "STATISTICS", "Output", "Params", "Rows", "Step", "axes", "cast", "divide", "flat", "join",
    "merge", "num_params", "shardings", "split", "to_list", "to_stacked",
]

Params = dict[str, Any]
STATISTICS = "statistics"
"""The branch of a model's tree that holds what is averaged over steps instead of learned."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What ``model(batch, key, train)`` returns.

    Attributes:
      logits: the prediction, float32; for a language model [B, T, V], None when training (its
        loss is taken from `hidden`, so that the logits of all positions never exist at once).
      hidden: the last hidden states [B, T, D], where the loss needs them.
      losses: auxiliary losses by name, each (sum, weight).
      stats: statistics by name, such as those of routing, each (sum, weight) as well.
      statistics: in training what the running statistics become by this batch, in the nesting of
        the tree's branch `STATISTICS`, float32; empty where a model has none. Microbatches
        average it.
    """

    logits: jax.Array | None = None
    hidden: jax.Array | None = None
    losses: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stats: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """What ``model.step(tokens, tree, state)`` returns for N rows of each request.

    logits float32 [B, N, V], hidden [B, N, D], and scratch, which `commit` takes.
    """

    logits: jax.Array
    hidden: jax.Array
    scratch: Any


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a step, for ``model.emit(step, request, rows)``.

    Attributes:
      tokens: int32 [B, N], the token of each row.
      tree: how they hang together (`zoo.decode.tree.Tree`).
      position: int32 [B, N], absolute position of the token that follows each row.
      seen: bool [B, V], tokens of the prompt and of what was generated so far.
    """

    tokens: jax.Array
    tree: Any
    position: jax.Array
    seen: jax.Array


def _rename(tree: Any, rename) -> Any:
    if isinstance(tree, Mapping):
        return {rename(name): _rename(child, rename) for name, child in tree.items()}
    return tree


def _nest(flat: Mapping[tuple[str, ...], Any]) -> Params:
    found: Params = {}
    for (*parents, leaf), value in flat.items():
        node = found
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return found


def _paths(state: nnx.State) -> dict[tuple[str, ...], Any]:
    """A model's variables by their public paths."""
    return {(*((STATISTICS,) if isinstance(variable, nnx.BatchStat) else ()), *map(str, path)):
            variable for path, variable in nnx.to_flat_state(state)}


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A model as its (hashable) definition and its parameters, a nested dict of arrays.

    The dict's keys are the parameters' public paths: ``params["embed"]["table"]``. Running
    statistics stand in a branch of their own, `STATISTICS`, under the paths of their modules.
    """
    definition, state = nnx.split(model)
    return definition, _nest({path: x.get_value() for path, x in _paths(state).items()})


def merge(definition: nnx.GraphDef, params: Params) -> nnx.Module:
    """The inverse of `split`; cheap, also under jit."""
    def number(name):
        return int(name) if isinstance(name, str) and name.isdigit() else name

    learned, statistics = divide(params)
    return nnx.merge(definition, _rename(_united(learned, statistics), number))


def _united(one: Params, other: Params) -> Params:
    """Two trees without a leaf in common as one."""
    shared = {name: _united(one[name], other[name]) for name in one if name in other}
    return {**one, **other, **shared}


def divide(params: Params) -> tuple[Params, Params]:
    """(what is learned, the running statistics or {}) of a model's tree; see `join`."""
    return ({name: child for name, child in params.items() if name != STATISTICS},
            params.get(STATISTICS, {}))


def join(learned: Params, statistics: Params) -> Params:
    """The inverse of `divide`."""
    return {**learned, STATISTICS: statistics} if statistics else learned


def axes(model: nnx.Module) -> Params:
    """The logical axes of each parameter, in the nesting of `split`'s params.

    Parameters of a scanned stack have a leading ``"layers"`` axis.
    """
    def of(variable):
        names = tuple(variable.get_metadata()["axes"])
        rank = len(variable.get_value().shape)
        return ("layers",) * (rank - len(names)) + names

    return _nest({path: of(x) for path, x in _paths(nnx.state(model)).items()})


def shardings(mesh, rules, names: Params, params: Params) -> Params:
    """NamedShardings for `params` (arrays or ShapeDtypeStructs) of logical axes `names`."""
    return jax.tree.map(
        lambda a, x: rules.sharding(mesh, a, x.shape), names, params,
        is_leaf=lambda node: isinstance(node, tuple))


def flat(params: Params) -> dict[str, Any]:
    """Parameters by path, in the order of `jax.tree.leaves`: ``{"embed/table": array}``."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x
            for path, x in jax.tree_util.tree_leaves_with_path(params)}


def cast(params: Params, dtype) -> Params:
    """The floating-point parameters in `dtype`: mixed precision is a cast at the step's start.

    Running statistics, which small changes add up in, stay float32.
    """
    def one(path, x):
        kept = path and getattr(path[0], "key", None) == STATISTICS
        return x if kept or not jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def num_params(model: nnx.Module) -> int:
    """How many numbers the parameters hold, running statistics not among them."""
    return sum(x.size for x in jax.tree.leaves(divide(split(model)[1])[0]))
