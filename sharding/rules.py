"""Rules: which mesh axes each logical axis of a parameter or an activation is laid over."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence

from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.mesh import AXES, ShardingError

MeshAxes = str | tuple[str, ...] | None

# An odd vocabulary (GPT-2's 50257) is replicated rather than refused: nothing else can be done
# with published weights. So is an odd batch, as of one prompt on a mesh; training refuses one. An
# image's height is halved from level to level, and the lowest may have too few rows.
REPLICATE_IF_UNEVEN = frozenset({"vocab", "batch", "height"})


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes per logical axis; None leaves the axis whole on every device.

    `embed` is the model width. Parameters shard it (ZeRO-3); in an activation the batch already
    owns those mesh axes, so `constrain` leaves the width whole there.

    `experts` are those of a mixture. The presets leave them whole and lay each one's hidden width
    (`mlp`) over the mesh, which balances however tokens are routed; ``experts=tensor,mlp=none``
    gives each device whole experts instead, for all tokens of its part of the batch.
    """

    batch: MeshAxes = ("data", "fsdp")
    seq: MeshAxes = None
    embed: MeshAxes = None
    heads: MeshAxes = None
    kv_heads: MeshAxes = None
    head_dim: MeshAxes = None
    mlp: MeshAxes = None
    experts: MeshAxes = None
    vocab: MeshAxes = None
    layers: MeshAxes = None
    state: MeshAxes = None
    codebook: MeshAxes = None
    channels: MeshAxes = None
    height: MeshAxes = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            names = (value,) if isinstance(value, str) else () if value is None else value
            if not isinstance(names, tuple) or not all(n in AXES for n in names):
                raise ShardingError(f"rules.{field.name} is {value!r}; it must be one of {AXES}, "
                                    "a tuple of them, or None")
            if len(set(names)) < len(names):
                raise ShardingError(f"rules.{field.name} is {value!r}; name each mesh axis once")

    def mesh_axes(self, axis: str | None, mesh) -> tuple[str, ...]:
        """The mesh axes of more than one device that `axis` is laid over in `mesh`."""
        if axis is None:
            return ()
        names = getattr(self, axis)
        names = (names,) if isinstance(names, str) else names or ()
        return tuple(n for n in names if mesh.shape.get(n, 1) > 1)

    def spec(
        self, *axes: str | None, mesh, shape: Sequence[int] | None = None, shared: bool = False
    ) -> P:
        """The PartitionSpec of an array whose dimensions are the logical `axes`.

        Args:
          axes: one logical axis, or None, per dimension.
          mesh: a Mesh or AbstractMesh; its axes of size 1, and axes it lacks, are dropped.
          shape: the array's shape, to check that every sharded dimension divides. An uneven
            vocabulary or batch is replicated; any other uneven dimension is an error.
          shared: what to do when two dimensions map to one mesh axis: False refuses (parameters),
            True leaves the later dimension whole (activations).

        Raises:
          ShardingError: a mesh axis is used twice, or a dimension does not divide.
        """
        taken: dict[str, str] = {}
        entries: list = []
        for position, axis in enumerate(axes):
            names = self.mesh_axes(axis, mesh)
            if shared:
                names = tuple(n for n in names if n not in taken)
            for name in names:
                if name in taken:
                    raise ShardingError(
                        f"mesh axis {name!r} would shard both {taken[name]!r} and {axis!r} of "
                        f"{axes}; set one of these two fields of the rules to None"
                    )
            if names and shape is not None:
                parts = math.prod(mesh.shape[n] for n in names)
                if shape[position] % parts:
                    if axis not in REPLICATE_IF_UNEVEN:
                        over = ",".join(f"{n}:{mesh.shape[n]}" for n in names)
                        raise ShardingError(
                            f"{axis} of size {shape[position]} does not divide over the mesh "
                            f"axes {over}; use sizes that divide it, or rules that leave it whole, "
                            f"as in --rules=fsdp_tp,{axis}=none"
                        )
                    names = ()
            taken.update(dict.fromkeys(names, axis))
            entries.append(names[0] if len(names) == 1 else names or None)
        return P(*entries)

    def sharding(
        self, mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]
    ) -> NamedSharding:
        """The NamedSharding of a parameter of `shape` with the logical `axes`."""
        return NamedSharding(mesh, self.spec(*axes, mesh=mesh, shape=shape))

    def uneven(self, mesh, axes: Sequence[str | None], shape: Sequence[int]) -> tuple[str, ...]:
        """The logical axes that stay whole only because their size does not divide."""
        found = []
        for axis, size in zip(axes, shape, strict=True):
            names = self.mesh_axes(axis, mesh)
            if names and size % math.prod(mesh.shape[n] for n in names):
                found.append(axis)
        return tuple(found)


_SHARDED_WIDTHS = {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}

RULES: Mapping[str, Rules] = {
    "dp": Rules(),
    "fsdp": Rules(embed="fsdp"),
    "tp": Rules(**_SHARDED_WIDTHS),
    "fsdp_tp": Rules(embed="fsdp", **_SHARDED_WIDTHS),
}


def rules(text: str) -> Rules:
    """A preset: dp (batch only), fsdp (ZeRO-3), tp (Megatron), fsdp_tp (both).

    Fields may be replaced: ``"fsdp_tp,kv_heads=none"`` leaves key heads whole on every device,
    where there are fewer of them than the tensor axis is wide; ``"dp,mlp=fsdp+tensor"`` lays one
    over two mesh axes.

    Raises:
      ShardingError: an unknown preset, field or mesh axis.
    """
    name, *changes = (part.strip() for part in text.split(","))
    if name not in RULES:
        raise ShardingError(f"rules {name!r} are not one of {sorted(RULES)}{_near(name, RULES)}")
    fields: dict[str, MeshAxes] = {}
    for change in changes:
        field, _, value = (part.strip() for part in change.partition("="))
        if field not in Rules.__dataclass_fields__ or not value:
            raise ShardingError(
                f"rules {text!r}: {change!r} is not FIELD=AXIS, as in kv_heads=none; the fields "
                f"are {list(Rules.__dataclass_fields__)}{_near(field, Rules.__dataclass_fields__)}")
        axes = tuple(axis.strip() for axis in value.split("+"))
        fields[field] = None if value.lower() == "none" else axes[0] if len(axes) == 1 else axes
    return dataclasses.replace(RULES[name], **fields)


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
