"""LoRA: low-rank adapters beside kernels that stay as they are (arXiv:2106.09685)."""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import sharding
import zoo
from recipes.optimizer import is_table, sides

ALL = "all-linear"  # In place of names: every matrix of the blocks.
_STREAM = 0x4C6F5241  # Of random numbers, apart from those of the parameters and of dropout.


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which kernels W are replaced by ``W + alpha / rank * a @ b``, of which a and b are trained.

    The adapters are a tree nested as the model's parameters, with {"a", "b"} in the place of each
    such kernel: a float32 [layers.., inputs.., rank], b float32 [layers.., rank, outputs..].

    Attributes:
      rank: of the product.
      alpha: the product counts alpha / rank times.
      targets: names of the kernels, of those that `names` gives.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))

    def axes(self, axes: Mapping) -> dict[str, Any]:
        """The adapters' logical axes, of the model's; see `zoo.protocol.axes`."""
        return _nest((path, _halves(names, names, "rank")) for path, names in self._kernels(axes))

    def abstract(self, params: Mapping, axes: Mapping, mesh: jax.sharding.Mesh,
                 rules: sharding.Rules) -> dict[str, Any]:
        """ShapeDtypeStructs of the adapters of a model's `params`, which lie as their sides do."""
        def place(names, shape):
            layout = rules.sharding(mesh, [None if n == "rank" else n for n in names], shape)
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout)

        found = []
        for path, names in self._kernels(axes):
            shapes = _halves(names, _at(params, path).shape, self.rank)
            halves = _halves(names, names, "rank")
            found.append((path, {half: place(halves[half], shapes[half]) for half in shapes}))
        return _nest(found)

    def init(self, seed: int, params: Mapping, axes: Mapping) -> dict[str, Any]:
        """Fresh adapters: a normal, of variance 1 / inputs, and b zero, so that nothing changes.

        `params` and `axes` are of the stacked form, so that both forms start alike.
        """
        key = jax.random.fold_in(jax.random.key(seed), _STREAM)
        found = []
        for i, (path, names) in enumerate(self._kernels(axes)):
            shape = _at(params, path).shape
            a, b = _halves(names, shape, self.rank).values()
            spread = math.prod(shape[d] for d in sides(names)[0]) ** -0.5
            found.append((path, {
                "a": spread * jax.random.normal(jax.random.fold_in(key, i), a, jnp.float32),
                "b": jnp.zeros(b, jnp.float32)}))
        return _nest(found)

    def adapt(self, base: Mapping, adapters: Mapping, dtype: Any) -> dict[str, Any]:
        """The model's parameters in `dtype`, for `zoo.protocol.merge`; what counts is the sum.

        Adapted kernels are made where a layer reads them. So their gradients never exist for a
        whole stack; nor do they themselves, where the backward pass computes blocks again.
        """
        found = {}
        for name, child in base.items():
            if name not in adapters:
                found[name] = zoo.protocol.cast(child, dtype)
            elif isinstance(child, Mapping):
                found[name] = self.adapt(child, adapters[name], dtype)
            else:
                found[name] = _Adapted(child, **adapters[name], scale=self.alpha / self.rank,
                                       dtype=jnp.dtype(dtype))
        return found

    def merge(self, base: Mapping, adapters: Mapping, dtype: Any) -> dict[str, Any]:
        """The model's parameters in `dtype`, as arrays."""
        return jax.tree.map(lambda x: x[...], self.adapt(base, adapters, dtype),
                            is_leaf=lambda x: isinstance(x, _Adapted))

    def _kernels(self, axes: Mapping) -> list[tuple[tuple[str, ...], tuple]]:
        return [(path, names) for path, names in _matrices(axes) if _name(path) in self.targets]


def make(rank: int, alpha: float | None, targets: Sequence[str], params: Mapping, axes: Mapping
         ) -> Lora:
    """Adapters for a model.

    Args:
      rank: of the adapters.
      alpha: see `Lora`; None: twice the rank.
      targets: names of kernels or of modules around them, with * for anything, as "query",
        "mlp/up", "mlp" or "mlp/*"; or "all-linear", every matrix of the blocks.
      params, axes: the model's, arrays or ShapeDtypeStructs and logical axes.

    Raises:
      ValueError: a rank or alpha that is not positive, a rank above what a kernel has, or a
        target that matches no kernel.
    """
    alpha = 2.0 * rank if alpha is None else float(alpha)
    if rank < 1:
        raise ValueError(f"lora rank {rank}: it must be at least 1, such as 8")
    if not 0 < alpha < math.inf:
        raise ValueError(f"lora alpha {alpha}: it must be above 0, and finite, such as {2 * rank}")
    known = {_name(path): names for path, names in _matrices(axes)}
    found: dict[str, None] = {}
    for target in targets:
        if target == ALL:
            matches = [name for name, names in known.items() if "vocab" not in names]
        else:
            matches = [name for name in known if fnmatch.fnmatchcase(f"/{name}/", f"*/{target}/*")]
        if not matches:
            raise ValueError(f"lora target {target!r} matches no kernel; give {ALL}, or the names "
                             f"of some of {', '.join(known)}")
        found.update(dict.fromkeys(matches))
    adapters = Lora(rank, alpha, tuple(sorted(found)))
    smallest, name = min(
        (math.prod(_at(params, path).shape[d] for d in side), _name(path))
        for path, names in adapters._kernels(axes) for side in sides(names))
    if rank > smallest:
        raise ValueError(f"lora rank {rank} is above {smallest}, the smaller side of {name}; give "
                         f"at most {smallest}")
    return adapters


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b"],
                   meta_fields=["scale", "dtype"])
@dataclasses.dataclass(frozen=True)
class _Adapted:
    """Stands for a kernel in a tree of parameters; indexed, as layers do, it is the array."""

    base: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float
    dtype: Any

    def __getitem__(self, index: Any) -> jax.Array:
        return _sum(self.base, self.a, self.b, self.scale, self.dtype)[index]


@functools.partial(jax.checkpoint, static_argnums=(3, 4), prevent_cse=False)
def _sum(base, a, b, scale, dtype):
    batch = a.ndim + b.ndim - base.ndim - 2  # Dimensions that all three have in front: layers.
    over = tuple(range(batch))
    # At full precision where float32 products are otherwise rounded: it costs next to nothing.
    product = jax.lax.dot_general(a, b, (((a.ndim - 1,), (batch,)), (over, over)),
                                  precision=jax.lax.Precision.HIGHEST)
    return (base.astype(jnp.float32) + scale * product).astype(dtype)


def _matrices(axes: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], tuple]]:
    """(path, logical axes) of each kernel that is a matrix, or a batch of them by layers."""
    if isinstance(axes, Mapping):
        for name, child in axes.items():
            yield from _matrices(child, (*path, name))
    elif len(sides(axes)) == 2 and not is_table(axes):
        yield path, axes


def _name(path: Sequence[str]) -> str:
    """A kernel's name whatever its layer and the form of the stack: "stack/mixer/query"."""
    kept = [part for part, after in zip(path, (*path[1:], ""), strict=True)
            if not part.isdigit() and not (part in ("blocks", "layers", "tail")
                                           and after.isdigit())]
    return "/".join(kept[:-1] if kept[-1] == "kernel" else kept)


def _halves(names: Sequence[str | None], values: Sequence, rank: Any) -> dict[str, tuple]:
    """What `values` says of a kernel's dimensions, of logical axes `names`, for its a and b."""
    inputs, outputs = sides(tuple(names))
    batch = [i for i in range(len(names)) if i not in (*inputs, *outputs)]

    def pick(dims):
        return tuple(values[i] for i in dims)

    return {"a": (*pick(batch), *pick(inputs), rank), "b": (*pick(batch), rank, *pick(outputs))}


def _at(tree: Mapping, path: Sequence[str]) -> Any:
    return functools.reduce(lambda node, name: node[name], path, tree)


def _nest(items: Any) -> dict[str, Any]:
    """{path: value} pairs as nested dicts."""
    found: dict[str, Any] = {}
    for (*parents, name), value in items:
        node = found
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return found
