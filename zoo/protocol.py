"""What a model is to the rest of the zoo: its output, its parameters as a tree, its decoding."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.stack import to_list, to_stacked

__all__ = [
    "Output", "Params", "Rows", "Step", "axes", "cast", "flat", "merge", "num_params", "shardings",
    "split", "to_list", "to_stacked",
]

Params = dict[str, Any]


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
    """

    logits: jax.Array | None = None
    hidden: jax.Array | None = None
    losses: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stats: Mapping[str, Any] = dataclasses.field(default_factory=dict)


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


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A model as its (hashable) definition and its parameters, a nested dict of arrays.

    The dict's keys are the parameters' public paths: ``params["embed"]["table"]``.
    """
    definition, state = nnx.split(model)
    return definition, _rename(nnx.to_pure_dict(state), str)


def merge(definition: nnx.GraphDef, params: Params) -> nnx.Module:
    """The inverse of `split`; cheap, also under jit."""
    def number(name):
        return int(name) if isinstance(name, str) and name.isdigit() else name

    return nnx.merge(definition, _rename(params, number))


def axes(model: nnx.Module) -> Params:
    """The logical axes of each parameter, in the nesting of `split`'s params.

    Parameters of a scanned stack have a leading ``"layers"`` axis.
    """
    def of(variable):
        names = tuple(variable.get_metadata()["axes"])
        rank = len(variable.get_value().shape)
        return ("layers",) * (rank - len(names)) + names

    found: Params = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        *parents, leaf = (str(part) for part in path)
        node = found
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = of(variable)
    return found


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
    """The floating-point parameters in `dtype`: mixed precision is a cast at the step's start."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)


def num_params(model: nnx.Module) -> int:
    """How many numbers the parameters hold."""
    return sum(x.size for x in jax.tree.leaves(split(model)[1]))
