"""Device meshes from a short text such as ``data:2,fsdp:2,tensor:2``."""

import difflib
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


class ShardingError(ValueError):
    """A mesh, rule or shape that cannot be laid out, with the remedy in its message."""


def parse_mesh(text: str, num_devices: int) -> dict[str, int]:
    """Reads ``"fsdp:4,tensor:2"`` into ``{"fsdp": 4, "tensor": 2}``.

    One size may be ``-1``: it takes the devices that the other axes leave. An empty text puts
    every device on ``fsdp``. Raises ShardingError for an unknown or repeated axis and a bad size.
    """
    if not text.strip():
        return {"fsdp": num_devices}
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, colon, size = part.strip().partition(":")
        if name not in AXES:
            near = difflib.get_close_matches(name, AXES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ShardingError(f"mesh axis {name!r} in {text!r} is not one of {AXES}{hint}")
        if name in sizes:
            raise ShardingError(f"mesh axis {name!r} stands twice in {text!r}; name each once")
        try:
            sizes[name] = int(size)
        except ValueError:
            raise ShardingError(
                f"mesh {text!r}: {part.strip()!r} is not NAME:SIZE, as in 'fsdp:4,tensor:2'"
            ) from None
        if not colon or (sizes[name] < 1 and sizes[name] != -1):
            raise ShardingError(
                f"mesh {text!r}: size {size} of {name!r} must be at least 1, or -1 for the rest"
            )
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ShardingError(f"mesh {text!r}: only one axis may be -1, not {open_axes}")
    if open_axes:
        rest = math.prod(size for size in sizes.values() if size != -1)
        if num_devices % rest:
            raise ShardingError(
                f"mesh {text!r}: {num_devices} devices do not divide by {rest}; "
                f"give {open_axes[0]!r} a size"
            )
        sizes[open_axes[0]] = num_devices // rest
    return sizes


def mesh(text: str = "", devices: Sequence | None = None, *, explicit: bool = False) -> Mesh:
    """Makes a mesh over `devices` (default: all of this job's).

    Args:
      text: axes and sizes in order, the first one slowest: ``"data:2,fsdp:2,tensor:2"``.
      devices: devices, described ones from `sharding.topology` included.
      explicit: True for JAX's Explicit axis types (shardings are part of array types and a bad
        rule is an error at trace time), False for Auto.

    Raises:
      ShardingError: the text is malformed, or needs another number of devices than there are
        (a single-process job may use fewer).
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = parse_mesh(text, len(devices))
    needed = math.prod(sizes.values())
    if needed > len(devices):
        forced = f", or set XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
        raise ShardingError(
            f"mesh {text!r} needs {needed} devices and there are {len(devices)}; use a smaller mesh"
            + (forced if devices[0].platform == "cpu" else "")
        )
    if needed < len(devices) and len({d.process_index for d in devices}) > 1:
        grown = ",".join(f"{n}:{-1 if n == next(iter(sizes)) else s}" for n, s in sizes.items())
        raise ShardingError(
            f"mesh {text!r} uses {needed} of {len(devices)} devices; a job of several processes "
            f"must use all of them, e.g. --mesh={grown}"
        )
    axis_type = AxisType.Explicit if explicit else AxisType.Auto
    shape = tuple(sizes.values())
    try:
        grid = mesh_utils.create_device_mesh(shape, devices[:needed])
    except (NotImplementedError, ValueError, AssertionError, AttributeError):
        # A shape that the physical torus has no layout for: keep the devices' own order.
        grid = np.asarray(devices[:needed]).reshape(shape)
    return Mesh(grid, tuple(sizes), axis_types=(axis_type,) * len(sizes))
