"""Described machines: TPU slices and GPU nodes to compile for, where none is attached.

``describe("v5p:4x4x4")`` names a slice, ``describe("h200:8")`` a node. Its devices hold no
memory and run nothing; jax lowers and compiles for them on any CPU machine that has the
compilers, which are the wheels of the extra ``parazoo[aot]``. Start such a process with the
variables of `child_env`, and compile in a child process: some programs abort the compiler.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from sharding.mesh import ShardingError
from sharding.mesh import mesh as make_mesh

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do. Bytes and bytes/s are of a whole chip, not of a jax device.

    Attributes:
      platform: "tpu" or "gpu".
      devices: jax devices on one chip.
      hbm_bytes: device memory that a program may use.
      hbm_bandwidth: bytes/s between a chip and its memory.
      bf16_flops: peak dense bfloat16 FLOP/s.
      links: links to other chips.
      link_bandwidth: bytes/s that one link carries one way.
      network_bandwidth: bytes/s that one chip sends to another node, one way; 0 where every chip
        of a slice is reached over links.
    """

    platform: str
    devices: int
    hbm_bytes: int
    hbm_bandwidth: float
    bf16_flops: float
    links: int
    link_bandwidth: float
    network_bandwidth: float = 0.0

    @property
    def interconnect_bandwidth(self) -> float:
        """Bytes/s that a chip can send over all its links together."""
        return self.links * self.link_bandwidth


# TPUs: peak, memory bandwidth and links from Google's Cloud TPU pages for v4, v5e, v5p, v6e and
# TPU7x, and from Jouppi et al. 2023 (arXiv:2304.01433) for v4's links. A published bidirectional
# figure is halved, a per-chip one divided by the ports. hbm_bytes is what libtpu's compiler grants
# a program ("available HBM" in its out-of-memory error), 0.25 to 0.8 GiB under the nominal size.
#
# GPUs: NVIDIA's data sheets for the SXM/HGX parts, without sparsity; NVLink's figure is one way,
# over 18 links. hbm_bytes is the memory that the driver reports; a jax process takes three
# quarters of it unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise. Between nodes: one 400 Gb/s
# adapter a GPU, as in NVIDIA's DGX.
CHIPS = {
    "v4": Chip("tpu", 1, int(30.75 * GIB), 1228e9, 275e12, 6, 50e9),
    "v5e": Chip("tpu", 1, int(15.75 * GIB), 819e9, 197e12, 4, 50e9),
    "v5p": Chip("tpu", 1, int(95.73 * GIB), 2765e9, 459e12, 6, 100e9),
    "v6e": Chip("tpu", 1, int(31.24 * GIB), 1638e9, 918e12, 4, 100e9),
    "tpu7x": Chip("tpu", 2, 2 * int(94.74 * GIB), 7380e9, 2307e12, 6, 100e9),
    "h100": Chip("gpu", 1, 84_942_979_072, 3350e9, 989e12, 18, 25e9, 50e9),
    "h200": Chip("gpu", 1, 151_397_597_184, 4800e9, 989e12, 18, 25e9, 50e9),
    "b200": Chip("gpu", 1, 191_514_411_008, 7670e9, 2250e12, 18, 50e9, 50e9),
}

# The shapes in which TPU slices are sold. A torus closes where a slice is made of whole 4x4x4
# cubes (3-D), and along a dimension of 16 (2-D).
_SLICES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SLICES_3D = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_LARGEST = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "tpu7x": 9216}
_GPUS_PER_NODE = (1, 2, 4, 8)

# GPU model name, compute capability, multiprocessors, clock (GHz), L2 bytes, tensor-core bf16
# multiply-adds a clock and core (4 cores a multiprocessor).
_GPU_MODELS = {
    "h100": ("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 50 << 20, 512),
    "h200": ("NVIDIA H200", (9, 0), 132, 1.98, 50 << 20, 512),
    "b200": ("NVIDIA B200", (10, 0), 148, 1.965, 132_644_864, 1024),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A described TPU slice or group of GPU nodes; `describe` makes one.

    Attributes:
      name: canonical, e.g. "v5p:4x4x4" or "h200:2x8".
      kind: a key of `CHIPS`.
      shape: the torus (TPU), or nodes and GPUs a node (GPU).
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def platform(self) -> str:
        return self.chip.platform

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        """How many devices jax sees: on TPU7x two a chip, elsewhere one."""
        return self.num_chips * self.chip.devices

    @property
    def hbm_bytes(self) -> int:
        """Memory of one jax device."""
        return self.chip.hbm_bytes // self.chip.devices

    @property
    def hbm_bandwidth(self) -> float:
        """Memory bandwidth of one jax device, bytes/s."""
        return self.chip.hbm_bandwidth / self.chip.devices

    @property
    def bf16_flops(self) -> float:
        """Peak of one jax device, FLOP/s."""
        return self.chip.bf16_flops / self.chip.devices

    def devices(self) -> list[Any]:
        """The described devices; the same objects at every call. Loads the compiler.

        Raises:
          ShardingError: the compiler's wheels are missing, or it refuses the description.
        """
        return list(_devices(self))

    def mesh(self, text: str = "", *, explicit: bool = False) -> Mesh:
        """A mesh over all described devices, e.g. ``"fsdp:16,tensor:4"``: see `sharding.mesh`."""
        return make_mesh(text, self.devices(), explicit=explicit)

    def bandwidth(self, group: Sequence[Any]) -> float:
        """Bytes/s that each device of `group` can send while all of them run one collective.

        On a TPU each torus dimension that the group spans carries a ring: both of its links where
        the group closes the torus, one where it is a line. On a GPU the group is limited by
        NVLink within a node and by the network adapter across nodes. Two devices of one chip
        exchange data through its memory.

        Args:
          group: described devices of one replica group.
        """
        chip = self.chip
        if self.platform == "gpu":
            nodes = {device.id // self.shape[-1] for device in group}
            return chip.network_bandwidth if len(nodes) > 1 else chip.interconnect_bandwidth
        links = 0
        for axis, size in enumerate(self.shape):
            spanned = len({device.coords[axis] for device in group})
            if spanned > 1:
                links += 2 if spanned == size and self._closes(size) else 1
        if not links:
            return self.hbm_bandwidth
        return links * chip.link_bandwidth / chip.devices

    def _closes(self, size: int) -> bool:
        if len(self.shape) == 2:
            return size == 16
        return all(n % 4 == 0 for n in self.shape)


def describe(name: str) -> Topology:
    """Reads ``"v5p:4x4x4"`` (a TPU slice), ``"h200:8"`` (a node) or ``"h200:2x8"`` (two nodes).

    Loads nothing: the compiler is loaded by `Topology.devices`.

    Raises:
      ShardingError: the chip or the shape is unknown; the message says what is allowed.
    """
    kind, _, text = name.strip().lower().partition(":")
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ShardingError(
            f"topology {name!r}: chip {kind!r} is not one of {', '.join(CHIPS)}{hint}"
        )
    try:
        shape = tuple(int(n) for n in text.split("x"))
    except ValueError:
        shape = ()
    problem = _gpu_problem(shape) if CHIPS[kind].platform == "gpu" else _tpu_problem(kind, shape)
    if problem:
        given = f"shape {text!r}" if text else "no shape"
        raise ShardingError(f"topology {name!r}: {given}; {kind} needs {problem}")
    if CHIPS[kind].platform == "gpu":
        nodes, gpus = (1, *shape)[-2:]
        return Topology(f"{kind}:{gpus}" if nodes == 1 else f"{kind}:{nodes}x{gpus}", kind,
                        (nodes, gpus))
    return Topology(f"{kind}:{'x'.join(map(str, shape))}", kind, shape)


def child_env() -> dict[str, str]:
    """Environment variables for a process that compiles for described devices.

    The host stays on its CPU; libtpu neither asks a metadata server what machine this is nor
    takes the lock that keeps a second process out. The rest stops it complaining that it could
    not find out: none of it changes what is compiled.
    """
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_MIN_LOG_LEVEL": "2",
        "TPU_STDERR_LOG_LEVEL": "2",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def _tpu_problem(kind: str, shape: tuple[int, ...]) -> str | None:
    """What a slice of `kind` may look like, or None if `shape` is one."""
    if kind in ("v5e", "v6e"):
        if shape in _SLICES_2D:
            return None
        return "one of " + ", ".join("x".join(map(str, s)) for s in _SLICES_2D)
    cubes = len(shape) == 3 and all(n >= 4 and n % 4 == 0 for n in shape)
    if shape in _SLICES_3D or (cubes and math.prod(shape) <= _LARGEST[kind]):
        return None
    return (
        "one of " + ", ".join("x".join(map(str, s)) for s in _SLICES_3D)
        + f", or AxBxC in multiples of 4 of at most {_LARGEST[kind]} chips"
    )


def _gpu_problem(shape: tuple[int, ...]) -> str | None:
    """How GPUs may be arranged, or None if `shape` is such an arrangement."""
    if len(shape) in (1, 2) and shape[-1] in _GPUS_PER_NODE and shape[0] >= 1:
        return None
    return f"GPUs or NODESxGPUS with {', '.join(map(str, _GPUS_PER_NODE))} GPUs a node"


@functools.cache
def _devices(topology: Topology) -> tuple[Any, ...]:
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    try:
        if topology.platform == "tpu":
            # libtpu builds slices out of hosts of 2x2x1 chips; smaller ones are one host. On v4 it
            # gives one device a core unless told to join them, as real v4 slices do.
            host = tuple(min(n, m) for n, m in zip((*topology.shape, 1)[:3], (2, 2, 1),
                                                   strict=True))
            found = topologies.get_topology_desc(
                topology.name, "tpu", chips_per_host_bounds=host,
                **({"chip_config_name": "megacore"} if topology.kind == "v4" else {}),
            )
        else:
            nodes, gpus = topology.shape
            found = topologies.get_topology_desc(
                topology.kind, "cuda", target_config=gpu_target_config(topology.kind),
                topology=f"{nodes}x1x{gpus}",
            )
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, JaxRuntimeError):
            first = str(error).partition("\n")[0]
            raise ShardingError(f"topology {topology.name!r}: the compiler says {first}") from None
        wheels = "libtpu" if topology.platform == "tpu" else "jax's CUDA 13 plugin"
        raise ShardingError(
            f"topology {topology.name!r} needs the compiler in {wheels}, which is not installed or "
            "does not load; install it with: pip install 'parazoo[aot]'"
        ) from error
    if len(found.devices) != topology.num_devices:
        raise ShardingError(
            f"topology {topology.name!r}: the compiler describes {len(found.devices)} devices, "
            f"not {topology.num_devices}"
        )
    return tuple(found.devices)


def gpu_target_config(kind: str) -> str:
    """XLA's description of one GPU: a ``GpuTargetConfigProto`` in text form.

    The numbers steer tiling, fusion and the choice of collective kernels; the compute capability
    with its accelerated features makes the code generator emit ``sm_90a`` or ``sm_100a``.
    """
    model, (major, minor), cores, clock, l2_bytes, rate = _GPU_MODELS[kind]
    chip = CHIPS[kind]
    # The rate of the tensor cores by element type (10 is half, 16 bfloat16, 11 float as TF32),
    # at the clock that the peak in the data sheet implies.
    tensor_clock = chip.bf16_flops / (2 * 4 * rate * cores) / 1e9
    matrix = " ".join(
        f"rate_infos {{ key: {dtype} value {{ clock_rate_ghz: {tensor_clock:.4f} "
        f"units_per_core: 4 ops_per_clock: {ops} }} }}"
        for dtype, ops in ((10, rate), (11, rate // 2), (16, rate))
    )
    return f"""
gpu_device_info {{
  name: "{model}"
  cuda_compute_capability {{
    major: {major} minor: {minor} feature_extension: ACCELERATED_FEATURES
  }}
  core_count: {cores}
  fpus_per_core: 128
  clock_rate_ghz: {clock}
  device_memory_size: {chip.hbm_bytes}
  memory_bandwidth: {int(chip.hbm_bandwidth)}
  l2_cache_size: {l2_bytes}
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  matrix_unit_description {{ {matrix} }}
  device_interconnect_info {{ active_links: {chip.links} }}
}}
platform_name: "CUDA"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 20 }}
device_description_str: "{model}"
"""
