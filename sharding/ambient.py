"""The ambient mesh and rules, and what reads them: constrain, param, einsum, local."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from sharding.mesh import ShardingError
from sharding.product import product
from sharding.rules import RULES, Rules

# A user context is part of jit's cache key. A plain context variable is not: the second call
# of a jitted function would keep the shardings of the first.
_RULES = jax.make_user_context(default_value=RULES["fsdp_tp"])


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules | None = None):
    """Makes `mesh` and `rules` (default: the fsdp_tp preset) ambient. Not inside jit."""
    with jax.set_mesh(mesh), _RULES(RULES["fsdp_tp"] if rules is None else rules):
        yield mesh


def ambient_rules() -> Rules:
    """The rules of the innermost `use`; the fsdp_tp preset outside of any."""
    return _RULES.value


def ambient_mesh():
    """The abstract mesh of the innermost `use`, or None. Axes already manual do not count."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(t == AxisType.Manual for t in mesh.axis_types):
        return None
    return mesh


@contextlib.contextmanager
def ensure_mesh(tree: Any = None):
    """Enters a mesh where none is ambient: that of `tree`'s arrays, else of the first device.

    Dispatch reads its compile target off the ambient mesh, so there always is one.
    """
    layouts = (getattr(x, "sharding", None) for x in jax.tree.leaves(tree))
    mesh = next((s.mesh for s in layouts if isinstance(s, jax.NamedSharding)), None)
    if jax.sharding.get_abstract_mesh().empty:
        if mesh is None:
            device = jax.local_devices()[0]
            mesh = Mesh(np.asarray([device]), ("data",), axis_types=(AxisType.Auto,))
        with jax.set_mesh(mesh):
            yield
        return
    ambient = jax.sharding.get_mesh()
    if mesh is not None and set(mesh.devices.flat) != set(ambient.devices.flat):
        raise ShardingError(
            f"the arrays live on the mesh {dict(mesh.shape)}, and the ambient mesh is "
            f"{dict(ambient.shape)}, of other devices; use the mesh that the model was built on")
    yield


def _explicit(mesh) -> bool:
    return any(t == AxisType.Explicit for t in mesh.axis_types)


def spec(*axes: str | None, shape: Sequence[int] | None = None) -> P:
    """The ambient PartitionSpec of an activation with the logical `axes`."""
    mesh = ambient_mesh()
    if mesh is None:
        return P(*(None for _ in axes))
    return ambient_rules().spec(*axes, mesh=mesh, shape=shape, shared=True)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lays an activation out by the ambient rules; without a mesh, returns it unchanged.

    Where two of its dimensions map to one mesh axis the first one takes it, so an activation
    whose batch is sharded over `fsdp` keeps its width whole, as ZeRO-3 wants.
    """
    if len(axes) != x.ndim:
        raise ShardingError(f"{len(axes)} logical axes {axes} for an array of shape {x.shape}")
    mesh = ambient_mesh()
    if mesh is None or mesh.size == 1:
        return x
    layout = spec(*axes, shape=x.shape)
    if _explicit(mesh):
        return jax.sharding.reshard(x, layout)
    return jax.lax.with_sharding_constraint(x, layout)


@dataclasses.dataclass(frozen=True)
class ShardedInit:
    """An initializer that knows the logical axes of what it makes."""

    init: Callable
    axes: tuple[str | None, ...]

    def __call__(self, key: jax.Array, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
        if len(shape) != len(self.axes):
            raise ShardingError(f"logical axes {self.axes} for a parameter of shape {shape}")
        # Drawn in float32 whatever the dtype: bfloat16 would draw from 256 values.
        return self.init(key, tuple(shape), jnp.float32).astype(dtype)


def param(init: Callable, *axes: str | None) -> ShardedInit:
    """Marks an initializer ``(key, shape, dtype) -> array`` with one logical axis a dimension."""
    for axis in axes:
        if axis is not None and axis not in Rules.__dataclass_fields__:
            raise ShardingError(
                f"logical axis {axis!r} is not a field of Rules: {list(Rules.__dataclass_fields__)}"
            )
    return ShardedInit(init, axes)


def gathered(w: jax.Array, *axes: str | None) -> jax.Array:
    """A parameter as the computation wants it: its `embed` axis whole (ZeRO-3's all-gather)."""
    return constrain(w, *(None if a == "embed" else a for a in axes))


# Remat policies keep products by this name: what stands inside a custom_vjp they do not see.
PRODUCT = "product"
_named = functools.partial(checkpoint_name, name=PRODUCT)


def einsum(
    expression: str,
    x: jax.Array,
    w: jax.Array,
    *,
    weight: Sequence[str | None],
    out: Sequence[str | None],
    preferred_element_type=None,
) -> jax.Array:
    """``jnp.einsum`` of an activation and a parameter, laid out by the ambient rules.

    Args:
      expression: the einsum, e.g. ``"btd,dhk->bthk"``.
      x: the activation.
      w: the parameter, of logical axes `weight`.
      out: the logical axes of the result.
    """
    mesh = ambient_mesh()
    if mesh is None or mesh.size == 1:
        return _named(product(expression, x, w, preferred_element_type, whole=True))
    if _explicit(mesh):
        w = gathered(w, *weight)
        # Not checked against the shape: an uneven vocabulary is whole in `w` already.
        sizes = dict(zip(expression.partition("->")[0].replace(",", ""), x.shape + w.shape,
                         strict=True))
        shape = [sizes[c] for c in expression.partition("->")[2]]
        return _named(jnp.einsum(
            expression, x, w,
            preferred_element_type=preferred_element_type,
            out_sharding=spec(*out, shape=shape),
        ))
    return _named(constrain(product(expression, x, w, preferred_element_type, whole=False), *out))


def lookup(table: jax.Array, ids: jax.Array, *out: str | None) -> jax.Array:
    """Rows of a parameter [V, D] by int ids [...]; `out` names the result's axes.

    Ids outside read the nearest row. With Explicit axis types the rows are whole on every device
    (JAX has no rule for a gather along a sharded axis there); with Auto ones they stay sharded.
    """
    mesh = ambient_mesh()
    if mesh is None or mesh.size == 1:
        return jnp.take(table, ids, axis=0, mode="clip")
    if _explicit(mesh):
        table = jax.sharding.reshard(table, P(None, None))
        layout = spec(*out, shape=ids.shape + table.shape[1:])
        # `get` would count a negative id from the end, whatever the mode; `take` does not.
        return table.at[jnp.maximum(ids, 0)].get(mode="clip", out_sharding=layout)
    return constrain(jnp.take(table, ids, axis=0, mode="clip"), *out)


def first(x: jax.Array, size: int, *axes: str | None) -> jax.Array:
    """The first `size` entries along the last axis of an activation with the logical `axes`.

    With Auto axis types the axis stays sharded, whatever `size`; with Explicit ones it is whole on
    every device, since JAX has no rule for shards of several sizes there.
    """
    mesh = ambient_mesh()
    if size < x.shape[-1] and mesh is not None and _explicit(mesh):
        x = constrain(x, *axes[:-1], None)
    return x[..., :size]


def local(op: Callable, *operands: Any, rules: Rules | None = None, dims: Any = None,
          **options: Any) -> Any:
    """Runs a per-shard op on each device's shards: the project's only ``shard_map``.

    It stands outside the op's ``custom_vjp``, so JAX itself sums the gradients of operands that
    are replicated over a mesh axis.

    Args:
      op: a function with an attribute `dims` (see `pallas_kernels.dims.Dims`): the logical axes
        of its operands and results, which of them may be sharded, and which of them the op
        communicates over (it then takes the mesh axes' names as an option).
      operands: arrays, or None for an operand left out.
      rules: in place of the ambient ones.
      dims: in place of the op's, for one that takes operands of several ranks.
      options: passed to the op as they are.

    Raises:
      ShardingError: the rules shard an axis that the op cannot be sharded on, shard two axes
        differently that the op needs alike, or a dimension does not divide.
    """
    mesh = ambient_mesh()
    if mesh is None or mesh.size == 1:
        return op(*operands, **options)
    rules = ambient_rules() if rules is None else rules
    dims = op.dims if dims is None else dims
    for one, other in dims.aligned:
        here, there = rules.mesh_axes(one, mesh), rules.mesh_axes(other, mesh)
        if here != there:
            raise ShardingError(
                f"{op.__name__} needs {one!r} and {other!r} over the same mesh axes, and the rules "
                f"lay them over {here} and {there}; set rules.{other} to rules.{one}"
            )

    def layout(axes, shape=None):
        for axis in axes:
            if axis is not None and axis not in dims.shardable and rules.mesh_axes(axis, mesh):
                raise ShardingError(
                    f"{op.__name__} cannot be sharded over {axis!r}, which the rules lay over "
                    f"{rules.mesh_axes(axis, mesh)}; it can over {sorted(dims.shardable)}"
                )
        return rules.spec(*axes, mesh=mesh, shape=shape, shared=dims.rowwise)

    if len(operands) > len(dims.operands):
        raise TypeError(
            f"{op.__name__} takes {len(dims.operands)} operands, not {len(operands)}")
    present = [i for i, x in enumerate(operands) if x is not None]
    in_specs = tuple(layout(dims.operands[i], operands[i].shape) for i in present)
    # What stays whole in the operands because it does not divide is whole in the results too.
    uneven = {axis for i in present
              for axis in rules.uneven(mesh, dims.operands[i], operands[i].shape)}
    rules = dataclasses.replace(rules, **dict.fromkeys(uneven))
    results = dims.results(options) if callable(dims.results) else dims.results
    out_specs = jax.tree.map(
        layout, results, is_leaf=lambda n: isinstance(n, tuple) and _axes_only(n)
    )
    for axis, option in dims.communicates.items():
        position = [(i, dims.operands[i].index(axis)) for i in present
                    if axis in dims.operands[i]][0]
        entry = in_specs[present.index(position[0])][position[1]]
        options[option] = entry

    varying = frozenset().union(*map(_mesh_axes, in_specs))

    @functools.wraps(op)
    def on_shards(*shards):
        full: list = [None] * len(operands)
        for i, shard, spec in zip(present, shards, in_specs, strict=True):
            # Only the transpose of this cast sums a gradient.
            missing = varying - _mesh_axes(spec) if dims.rowwise else ()
            if missing:
                shard = jax.lax.pcast(shard, tuple(sorted(missing)), to="varying")
            full[i] = shard
        return op(*full, **options)

    arrays = [operands[i] for i in present]
    if _explicit(mesh):
        arrays = [jax.sharding.reshard(x, s) for x, s in zip(arrays, in_specs, strict=True)]
    return jax.shard_map(
        on_shards, in_specs=in_specs, out_specs=out_specs, check_vma=dims.rowwise
    )(*arrays)


def _mesh_axes(spec: P) -> frozenset[str]:
    return frozenset(name for entry in spec if entry is not None
                     for name in (entry if isinstance(entry, tuple) else (entry,)))


def _axes_only(node: tuple) -> bool:
    return all(n is None or isinstance(n, str) for n in node)


def shards(axis: str) -> int:
    """Over how many devices the ambient rules lay `axis`."""
    mesh = ambient_mesh()
    if mesh is None:
        return 1
    return math.prod(mesh.shape[n] for n in ambient_rules().mesh_axes(axis, mesh))
