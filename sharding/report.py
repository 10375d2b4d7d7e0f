"""What a compiled program costs: memory, collectives, kernels and a roofline, read off its HLO.

The scheduled HLO of one partition is the program that every device runs. A scan is one loop body
there, so everything inside is multiplied by the loop's trip count. TPU programs hide collectives
in fusions (a reduce-scatter is a fusion around an all-reduce, an asynchronous all-gather is spread
over several), in SparseCore calls and in chains of collective-permutes; the reader knows these
forms. Counts are exact on XLA:CPU; elsewhere the compiler chooses the form, so compare bytes.
"""

import dataclasses
import functools
import itertools
import math
import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sharding.mesh import ShardingError
from sharding.topology import Topology

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of one device, in bytes.

    Attributes:
      arguments, outputs, temporaries: buffers in device memory.
      aliases: outputs that take an argument's buffer (donation).
      code: the program itself, not part of `total`.
      host: buffers of all kinds in host memory.
      total: arguments + outputs - aliases + temporaries.
      capacity: memory of the described device, or None.
    """

    arguments: int
    outputs: int
    aliases: int
    temporaries: int
    code: int
    host: int
    total: int
    capacity: int | None

    @property
    def fits(self) -> bool | None:
        return None if self.capacity is None else self.total <= self.capacity


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same mesh axes.

    Attributes:
      kind: one of `COLLECTIVES`.
      axes: the mesh axes that the group spans, in the mesh's order.
      group_size: devices that take part in one.
      count: executions a step on each device, loops multiplied out.
      result_bytes: bytes of the whole arrays: reduced, gathered, scattered or exchanged.
      wire_bytes: bytes that each device sends under a ring algorithm.
      seconds: wire_bytes over the bandwidth between the group's devices; None without a topology.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    count: int
    result_bytes: int
    wire_bytes: int
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class CustomCall:
    """Calls of code that XLA does not generate itself: Pallas kernels and libraries.

    Attributes:
      target: "tpu_custom_call", "mosaic_gpu_v2", "__cublas$lt$matmul", ...
      name: the kernel's name for Pallas kernels, else "".
      count: executions a step on each device, loops multiplied out.
    """

    target: str
    name: str
    count: int


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds on the time of one step, each as if nothing else took any.

    Attributes:
      flops: model FLOPs of one device, as the caller gave them; None if it gave none.
      hbm_bytes: bytes between one device and its memory.
      hbm_bytes_source: "given", or "hlo" for the sum over the scheduled program.
      compute_seconds: flops over the bfloat16 peak.
      memory_seconds: hbm_bytes over the memory's bandwidth.
      collective_seconds: sum over all collectives, none of them overlapping another.
      limiting: "compute", "memory" or "collectives": the largest.
    """

    flops: float | None
    hbm_bytes: float
    hbm_bytes_source: str
    compute_seconds: float | None
    memory_seconds: float
    collective_seconds: float
    limiting: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Costs of one compiled program on one device of its mesh; `analyse` makes one.

    Attributes:
      topology: name of the described machine, or None.
      mesh: axis sizes.
      memory, collectives, custom_calls: see there.
      hbm_traffic_bytes: operands read and results written by the scheduled program, loops
        multiplied out; fast on-chip memory excluded where the compiler says so.
      compiler: XLA's own "flops", "bytes accessed" and "optimal_seconds", which count each loop
        body once and not the inside of a kernel; those that cannot be true are left out.
      roofline: None without a topology.
      notes: what the numbers leave out or could not find.
    """

    topology: str | None
    mesh: dict[str, int]
    memory: Memory
    collectives: tuple[Collective, ...]
    custom_calls: tuple[CustomCall, ...]
    hbm_traffic_bytes: int
    compiler: dict[str, float]
    roofline: Roofline | None
    notes: tuple[str, ...]

    def count(self, kind: str, *axes: str) -> int:
        """Executions a step of collectives of `kind`, over just `axes` if any are named."""
        return sum(c.count for c in self._select(kind, axes))

    def wire_bytes(self, kind: str, *axes: str) -> int:
        """Bytes that each device sends in collectives of `kind`, over just `axes` if named."""
        return sum(c.wire_bytes for c in self._select(kind, axes))

    def _select(self, kind: str, axes: tuple[str, ...]) -> list[Collective]:
        if kind not in COLLECTIVES:
            raise ValueError(f"collective {kind!r} is not one of {', '.join(COLLECTIVES)}")
        return [c for c in self.collectives
                if c.kind == kind and (not axes or set(c.axes) == set(axes))]

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values, with `memory.fits` beside the fields."""
        out = dataclasses.asdict(self)
        out["memory"]["fits"] = self.memory.fits
        return out


def analyse(
    compiled: jax.stages.Compiled,
    mesh: Mesh,
    topology: Topology | None = None,
    *,
    flops: float | None = None,
    hbm_bytes: float | None = None,
) -> Report:
    """Reads a compiled program's costs.

    Args:
      compiled: the result of ``jit(f).lower(...).compile()``.
      mesh: the mesh it was compiled for; its axes name the groups of the collectives.
      topology: the described machine, for capacity and roofline.
      flops: FLOPs of one step over all devices, by the model's own formula.
      hbm_bytes: bytes that one device moves to and from its memory in a step, if known better
        than the sum over the program.

    Raises:
      ShardingError: `mesh` is not made of the topology's devices.
    """
    if topology is not None and mesh.devices.flat[0].platform != topology.platform:
        raise ShardingError(
            f"the mesh is of {mesh.devices.flat[0].platform} devices, not of topology "
            f"{topology.name!r}: compile for topology.mesh(...)"
        )
    program = _Program(compiled.as_text())
    program.run()
    notes = list(program.notes)
    collectives = _collectives(program.collectives, mesh, topology)
    compiler = _compiler_estimates(compiled, notes)
    roofline = None
    if topology is not None:
        traffic = program.traffic if hbm_bytes is None else hbm_bytes
        times = {
            "compute": flops / mesh.size / topology.bf16_flops if flops is not None else None,
            "memory": traffic / topology.hbm_bandwidth,
            "collectives": math.fsum(c.seconds for c in collectives),
        }
        roofline = Roofline(
            flops=None if flops is None else flops / mesh.size,
            hbm_bytes=traffic,
            hbm_bytes_source="hlo" if hbm_bytes is None else "given",
            compute_seconds=times["compute"],
            memory_seconds=times["memory"],
            collective_seconds=times["collectives"],
            limiting=max(times, key=lambda name: times[name] or 0.0),
        )
    return Report(
        topology=None if topology is None else topology.name,
        mesh=dict(mesh.shape),
        memory=_memory(compiled, topology),
        collectives=collectives,
        custom_calls=_custom_calls(program.custom_calls),
        hbm_traffic_bytes=program.traffic,
        compiler=compiler,
        roofline=roofline,
        notes=tuple(notes),
    )


def gpu_architectures(compiled: jax.stages.Compiled) -> set[str]:
    """Architectures of the GPU binaries in a program compiled for described GPUs: {"sm_90a"}.

    That a program compiles does not show what for. This reads each embedded binary, XLA's own and
    those of Pallas kernels: the architecture that the assembler noted, or the number in the ELF
    header where it noted none. A program of library calls alone has no binaries: the set is empty.

    Raises:
      ValueError: the executable is stored in a form that this does not read.
    """
    found = set()
    for record in _records(compiled.runtime_executable().serialize()):
        starts = [m.start() for m in re.finditer(b"\x7fELF\x02\x01\x01", record)]
        for start, end in itertools.pairwise([*starts, len(record)]):
            machine, = struct.unpack_from("<H", record, start + 18)
            if machine != _EM_CUDA:
                continue
            noted = re.search(rb"-arch (sm_\d+[af]?)", record[start:end])
            if noted:
                found.add(noted[1].decode())
            else:
                flags, = struct.unpack_from("<I", record, start + 48)
                # Before version 8 of CUDA's ELF the number was in the lowest byte.
                found.add(f"sm_{(flags >> 8 if record[start + 8] >= 8 else flags) & 0xFF}")
    return found


# --- Memory and the compiler's own estimates


def _memory(compiled: jax.stages.Compiled, topology: Topology | None) -> Memory:
    stats = compiled.memory_analysis()
    # Not stats.peak_memory_in_bytes: it adds buffers in host memory.
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliases=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        host=stats.host_argument_size_in_bytes + stats.host_output_size_in_bytes
        - stats.host_alias_size_in_bytes + stats.host_temp_size_in_bytes,
        total=stats.argument_size_in_bytes + stats.output_size_in_bytes
        - stats.alias_size_in_bytes + stats.temp_size_in_bytes,
        capacity=None if topology is None else topology.hbm_bytes,
    )


def _compiler_estimates(compiled: jax.stages.Compiled, notes: list[str]) -> dict[str, float]:
    costs = compiled.cost_analysis() or {}
    kept = {}
    for name in ("flops", "bytes accessed", "optimal_seconds"):
        value = costs.get(name)
        if value is None:
            continue
        # libtpu sums unknown costs as negative numbers.
        if math.isfinite(value) and value >= 0:
            kept[name] = float(value)
        else:
            notes.append(f"the compiler's {name!r} of {value:g} cannot be true and is left out")
    return kept


# --- Collectives


def _collectives(
    raw: dict[tuple[str, str], list[int]], mesh: Mesh, topology: Topology | None
) -> tuple[Collective, ...]:
    merged: dict[tuple[str, tuple[str, ...], int], list[float]] = {}
    for (kind, groups), (count, total) in raw.items():
        group = _group(kind, groups, mesh)
        if len(group) < 2:
            continue
        where = np.unravel_index(group, mesh.devices.shape)
        axes = tuple(
            name for name, at in zip(mesh.axis_names, where, strict=True) if np.ptp(at) > 0
        )
        n = len(group)
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0,
                 "collective-broadcast": 1.0}.get(kind, (n - 1) / n)
        wire = share * total
        seconds = 0.0
        if topology is not None:
            seconds = wire / topology.bandwidth([mesh.devices.flat[i] for i in group])
        entry = merged.setdefault((kind, axes, n), [0, 0, 0.0, 0.0])
        for i, value in enumerate((count, total, wire, seconds)):
            entry[i] += value
    return tuple(
        Collective(kind, axes, n, int(count), round(total), round(wire),
                   None if topology is None else seconds)
        for (kind, axes, n), (count, total, wire, seconds) in sorted(merged.items())
    )


def _group(kind: str, text: str, mesh: Mesh) -> np.ndarray:
    """Positions in the flattened mesh of the devices in one group (the first)."""
    if kind == "collective-permute":
        pairs = np.array(re.findall(r"\{(\d+),(\d+)\}", text), int).reshape(-1, 2)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        if not len(pairs):
            return np.zeros(0, int)
        # Every device on the axes along which data moves, those of the first sender included.
        source = np.array(np.unravel_index(pairs[:, 0], mesh.devices.shape))
        target = np.array(np.unravel_index(pairs[:, 1], mesh.devices.shape))
        moves = (source != target).any(axis=1)
        line = tuple(slice(None) if m else int(at) for m, at in zip(moves, source[:, 0],
                                                                    strict=True))
        return np.arange(mesh.size).reshape(mesh.devices.shape)[line].ravel()
    if text.startswith("mesh["):
        return _mesh_groups(text)[0]
    iota = re.match(r"\[([\d,]+)\]<=(\S+)", text)
    if iota:
        return _iota(iota[2]).reshape(_ints(iota[1]))[0]
    lists = [_ints(g) for g in re.findall(r"\{([\d,]+)\}", text)]
    return np.array(max(lists, key=len)) if lists else np.arange(mesh.size)


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(text: str) -> np.ndarray:
    """Reads ``[4,2]T(1,0)``: the numbers 0..7 as 4x2, transposed."""
    dims, _, perm = text.partition("T")
    shape = _ints(dims.strip("[]"))
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_ints(perm.strip("()"))) if perm else ids


def _mesh_groups(text: str) -> np.ndarray:
    """Reads ``mesh['a'=4,'b'=2], device_ids=([8]) {'a':(2)2,'b'}`` into groups [G, N].

    ``'a':(2)2`` is the part of size 2 of axis a that has a part of size 2 before it.
    """
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", text)}
    ids = np.arange(math.prod(axes.values()))
    order = re.search(r"device_ids=\((.*?)\) \{", text)
    if order:
        ids = (_iota(order[1]).ravel() if order[1].startswith("[") else np.array(_ints(order[1])))
    chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", text[text.rindex("{"):])
    spans = {name: (int(before or 1), int(size or axes[name])) for name, before, size in chosen}
    shape: list[int] = []
    for name, size in axes.items():
        before, inside = spans.get(name, (size, 1))
        shape += before, inside, size // before // inside
    grouped = [3 * list(axes).index(name) + 1 for name in spans]
    rest = [i for i in range(len(shape)) if i not in grouped]
    members = math.prod(inside for _, inside in spans.values())
    return ids.reshape(shape).transpose(rest + grouped).reshape(-1, members)


def _custom_calls(raw: dict[tuple[str, str], int]) -> tuple[CustomCall, ...]:
    return tuple(CustomCall(target, name, n) for (target, name), n in sorted(raw.items()))


# --- HLO text


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str  # "operands), attributes"

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([^\s,()]+)", self.rest.partition(")")[0])

    def attribute(self, name: str) -> str:
        """A called computation's name, without its %; "" if there is none."""
        found = re.search(rf"\b{name}=%?([^\s,}}]+)", self.rest)
        return found[1] if found else ""

    def called(self) -> list[str]:
        """Every computation that this instruction runs."""
        names = []
        for several, one in _CALLED.findall(self.rest):
            names += re.findall(r"%([^\s,{}]+)", several) if several else [one]
        return names


_HEADER = re.compile(r"(ENTRY )?%?(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|called_computations|branch_computations|true_computation"
    r"|false_computation)=(?:(\{[^}]*\})|%([^\s,}]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_COPIES = ("copy", "bitcast", "convert", "reshape", "broadcast", "copy-done", "opt-barrier")
# What moves no data of its own.
_FREE = frozenset((
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "opt-barrier", "partition-id", "replica-id", "add-dependency", "domain",
))
# Custom calls by which the TPU compiler talks to itself; no code stands behind them.
_BOOKKEEPING = frozenset((
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone", "AsyncCollectiveStart",
    "ConcatBitcast", "GatherScatterIndicesBitpacked", "PrepareAsyncCallDone",
    "PrepareAsyncCallStart",
))
_EM_CUDA = 190  # the machine number of an ELF file with CUDA code
_RIEGELI = bytes.fromhex("83af70d10d884a3f00000000000000004000000000000000")


def _bytes(shape: str, hbm_only: bool = False) -> int:
    """Bytes of all arrays in a shape; with `hbm_only`, of those not in on-chip memory."""
    total = 0.0
    for _, bits, dims, layout in _ARRAY.findall(shape):
        # A layout's S(n) names the memory space; 0 is the device's main memory.
        if hbm_only and "S(" in layout and "S(0)" not in layout:
            continue
        count = math.prod(int(d.lstrip("<=")) for d in dims.split(",")) if dims else 1
        total += count * (int(bits) if bits else 8) / 8
    return math.ceil(total)


def _elements(shape: str) -> list[str]:
    """The elements of a tuple shape, or the shape itself."""
    if not shape.startswith("("):
        return [shape]
    parts, depth, start = [], 0, 1
    for i, char in enumerate(shape):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        if (char == "," and depth == 1) or depth == 0:
            parts.append(re.sub(r"/\*.*?\*/", "", shape[start:i]).strip())
            start = i + 1
    return parts


def _result(instruction: _Instruction) -> str:
    """The shape that a collective makes, for the -start form of an asynchronous one as well.

    A start's shape is (operands, results, contexts...), save that an all-reduce's may be its
    results alone.
    """
    if not instruction.opcode.endswith("-start"):
        return instruction.shape
    parts = _elements(instruction.shape)
    if instruction.opcode == "all-reduce-start" and not parts[0].startswith("("):
        return instruction.shape
    return parts[1]


class _Program:
    """One pass over HLO text, then a walk from the entry that multiplies loops out."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.roots: dict[str, _Instruction] = {}
        self.entry = ""
        self._parse(text)
        self.loops: dict[str, tuple[str, _Instruction]] = {}  # body or condition -> its while
        self.collectives: dict[tuple[str, str], list[int]] = {}
        self.custom_calls: dict[tuple[str, str], int] = {}
        self.traffic = 0
        self.notes: list[str] = []
        self._communicates = {
            name: [i for i in body.values() if _kind(i.opcode)]
            for name, body in self.computations.items()
        }
        # Collectives that TPUs run in steps, one step in each of several fusions.
        self._stepped = {
            _channel(i)
            for name, body in self.computations.items() if _starts(body)
            for i in self._communicates[name]
        }
        self._unknown_loops = 0
        self._branches = 0

    def _parse(self, text: str) -> None:
        current: dict[str, _Instruction] = {}
        name = ""
        for line in text.splitlines():
            if not line or line[0] == "}":
                continue
            if line[0] != " ":
                header = _HEADER.match(line)
                if header:
                    name = header[2]
                    current = self.computations[name] = {}
                    if header[1]:
                        self.entry = name
                continue
            found = _INSTRUCTION.match(line)
            if found:
                instruction = _Instruction(found[2], found[3], found[4], found[5])
                current[instruction.name] = instruction
                if found[1]:
                    self.roots[name] = instruction

    def run(self) -> None:
        """Fills collectives, custom_calls, traffic and notes."""
        self._visit(self.entry, 1)
        if self._unknown_loops:
            self.notes.append(
                f"{self._unknown_loops} loop(s) of unknown length are counted as one iteration"
            )
        if self._branches:
            self.notes.append(f"every branch of {self._branches} conditional(s) is counted")

    def _visit(self, name: str, times: int) -> None:
        for i in self.computations[name].values():
            opcode = i.opcode
            if opcode.endswith(("-done", "-update")):
                continue
            if opcode not in _FREE:
                self.traffic += times * self._traffic(name, i)
            if _kind(opcode):
                self._collective(name, i, _kind(opcode), times)
            elif opcode == "while":
                trips = self._trip_count(name, i)
                if trips is None:
                    self._unknown_loops += 1
                self._visit(i.attribute("body"), times * (1 if trips is None else trips))
            elif opcode in ("fusion", "fusion-start"):
                for called in i.called():
                    self._fused(called, times)
            elif opcode == "custom-call":
                self._custom_call(i, times)
            elif opcode in ("call", "conditional") or opcode.endswith("-start"):
                self._branches += opcode == "conditional"
                for called in i.called():
                    self._visit(called, times)

    def _fused(self, name: str, times: int) -> None:
        """Collectives and kernels inside a fusion."""
        body = self.computations[name]
        for i in self._communicates[name]:
            if _channel(i) in self._stepped and not _starts(body):
                continue
            # An all-reduce of which each device keeps its slice is a reduce-scatter.
            scatters = name.startswith("all-reduce-scatter")
            self._collective(name, i, "reduce-scatter" if scatters else _kind(i.opcode), times)
        for i in body.values():
            if i.opcode == "custom-call":
                self._custom_call(i, times)
            elif i.opcode == "fusion":
                for called in i.called():
                    self._fused(called, times)

    def _collective(self, name: str, i: _Instruction, kind: str, times: int) -> None:
        groups = re.search(
            r"(?:replica_groups|source_target_pairs)=(mesh\[.*?\](?:, device_ids=\(.*?\))? "
            r"\{[^}]*\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|\{(?:\{[\d,]*\},?)*\})", i.rest
        )
        if kind == "reduce-scatter":
            # The result is one device's share; the whole array is the operand.
            body = self.computations[name]
            size = sum(_bytes(body[operand].shape) for operand in i.operands)
        else:
            size = _bytes(_result(i))
        entry = self.collectives.setdefault((kind, groups[1] if groups else "{}"), [0, 0])
        entry[0] += times
        entry[1] += times * size

    def _custom_call(self, i: _Instruction, times: int) -> None:
        target = _target(i)
        name = ""
        if target == "tpu_custom_call":
            name = re.sub(r"\.\d+$", "", i.name)
        elif target.startswith("mosaic_gpu"):
            scope = re.search(r'op_name="[^"]*?([^"/]*)/[^"/]*"', i.rest)
            name = scope[1] if scope else ""
        if target not in _BOOKKEEPING:
            key = (target, name)
            self.custom_calls[key] = self.custom_calls.get(key, 0) + times

    def _trip_count(self, name: str, loop: _Instruction) -> int | None:
        """How often a while loop in computation `name` runs; None if that is not a constant."""
        known = _TRIPS.search(loop.rest)
        body, condition = loop.attribute("body"), loop.attribute("condition")
        self.loops[body] = self.loops[condition] = (name, loop)
        if known:
            return int(known[1])
        test = self.roots[condition]
        direction = re.search(r"direction=(\w\w)", test.rest)
        if test.opcode != "compare" or not direction:
            return None
        counter = self.computations[condition].get(test.operands[0])
        bound = self._constant(condition, test.operands[1])
        if counter is None or counter.opcode != "get-tuple-element" or bound is None:
            return None
        index = int(re.search(r"index=(\d+)", counter.rest)[1])
        start = self._initial(condition, index)
        step = self._step(body, index)
        if start is None or not step:
            return None
        distance = bound - start
        if direction[1] in ("LE", "GE"):
            distance += 1 if step > 0 else -1
        elif direction[1] not in ("LT", "GT", "NE"):
            return None
        return max(0, -(-distance // step))

    def _step(self, body: str, index: int) -> int | None:
        """By how much one iteration changes element `index` of a loop's state."""
        root = self.roots[body]
        if root.opcode != "tuple":
            return None
        last = self.computations[body].get(root.operands[index])
        if last is None or last.opcode not in ("add", "subtract"):
            return None
        a, b = last.operands
        amount = self._constant(body, b)
        if amount is None and last.opcode == "add":
            amount = self._constant(body, a)
        return -amount if amount is not None and last.opcode == "subtract" else amount

    def _initial(self, part: str, index: int) -> int | None:
        """Element `index` of the state with which the loop around computation `part` starts."""
        outside, loop = self.loops[part]
        state = self.computations[outside].get(loop.operands[0])
        if state is None or state.opcode != "tuple":
            return None
        return self._constant(outside, state.operands[index])

    def _constant(self, name: str, value: str) -> int | None:
        """The integer that a scalar holds, if it is one that the text tells.

        Follows copies, tuples and loop state; only a constant put into the state by XLA itself
        (which does so to save registers) is asked for there, so its first value is its value.
        """
        i = self.computations[name].get(value)
        while i is not None and i.opcode in _COPIES:
            i = self.computations[name].get(i.operands[0])
        if i is None:
            return None
        if i.opcode == "constant":
            found = re.match(r"-?\d+\)", i.rest)
            return int(found[0][:-1]) if found else None
        if i.opcode != "get-tuple-element":
            return None
        index = int(re.search(r"index=(\d+)", i.rest)[1])
        source = self.computations[name].get(i.operands[0])
        if source is not None and source.opcode == "tuple":
            return self._constant(name, source.operands[index])
        if source is not None and source.opcode == "parameter" and name in self.loops:
            return self._initial(name, index)
        return None

    # What an instruction reads and writes in device memory.

    def _traffic(self, name: str, i: _Instruction) -> int:
        body = self.computations[name]
        operands = [body[o] for o in i.operands if o in body]
        if i.opcode in ("fusion", "fusion-start"):
            called = i.called()[0]
            return self._written(called, _result(i)) + sum(
                self._read(called, number, operand.shape) for number, operand in enumerate(operands)
            )
        if i.opcode == "custom-call" and _target(i) in _BOOKKEEPING:
            return 0
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _bytes(i.shape, hbm_only=True)
        if i.opcode == "dynamic-update-slice":
            return 2 * _bytes(operands[1].shape, hbm_only=True)
        if i.opcode.endswith("-start") and i.called():
            return 0  # counted inside what it calls
        return _bytes(_result(i), hbm_only=True) + sum(
            _bytes(operand.shape, hbm_only=True) for operand in operands
        )

    def _read(self, fused: str, number: int, shape: str) -> int:
        """Bytes that a fusion reads of its operand `number`: only slices, if it only slices it."""
        whole = _bytes(shape, hbm_only=True)
        if not whole:
            return 0
        body = self.computations[fused]
        parameter = next(
            (i.name for i in body.values()
             if i.opcode == "parameter" and i.rest.startswith(f"{number})")), None
        )
        users = self._users(fused)
        total, pending = 0, [parameter]
        while pending:
            value = pending.pop()
            for user in users.get(value, ()):
                if user.opcode in ("bitcast", "get-tuple-element"):
                    pending.append(user.name)
                elif user.opcode in ("dynamic-slice", "slice", "gather") \
                        and user.operands[0] == value:
                    total += _bytes(user.shape)
                elif user.opcode == "dynamic-update-slice" and user.operands[0] == value:
                    continue  # updated in place
                elif user.opcode == "fusion":
                    inner = user.called()[0]
                    total += sum(
                        self._read(inner, at, shape)
                        for at, operand in enumerate(user.operands) if operand == value
                    )
                else:
                    return whole
        return min(total, whole)

    def _written(self, fused: str, shape: str) -> int:
        """Bytes that a fusion writes: only the slices, where it updates a buffer in place."""
        body, total = self.computations[fused], 0
        root = self.roots[fused]
        results = root.operands if root.opcode == "tuple" else [root.name]
        for value, part in zip(results, _elements(shape), strict=False):
            i = body.get(value)
            while i is not None and i.opcode in ("bitcast", "copy"):
                i = body.get(i.operands[0])
            if i is not None and i.opcode == "dynamic-update-slice" and i.operands[1] in body:
                part = body[i.operands[1]].shape
            elif i is not None and i.opcode == "fusion":
                total += self._written(i.called()[0], part)
                continue
            total += _bytes(part, hbm_only=True)
        return total

    @functools.cache  # noqa: B019 - lives as long as the one report that is being made
    def _users(self, name: str) -> dict[str, list[_Instruction]]:
        users: dict[str, list[_Instruction]] = {}
        for i in self.computations[name].values():
            for operand in dict.fromkeys(i.operands):
                users.setdefault(operand, []).append(i)
        return users


def _kind(opcode: str) -> str:
    """The collective that an opcode is, "" if none; the -done half of a pair does not count."""
    base = opcode.removesuffix("-start")
    return base if base in COLLECTIVES else ""


def _channel(i: _Instruction) -> str:
    found = re.search(r"channel_id=(\d+)", i.rest)
    return found[1] if found else i.name


def _target(i: _Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', i.rest)
    return found[1] if found else ""


def _starts(body: dict[str, _Instruction]) -> bool:
    """Whether a fused computation begins a collective that later fusions carry on."""
    return any(i.opcode == "custom-call" and _target(i) == "AsyncCollectiveStart"
               for i in body.values())


# --- Serialized executables


def _records(data: bytes) -> Iterator[bytes]:
    """The records of every Riegeli file within `data`, files within records included.

    XLA stores a GPU executable as such a file, its records packed by Snappy.
    See Google's riegeli/records_file_format.md.
    """
    start = data.find(_RIEGELI)
    if start < 0:
        yield data
        return
    position, end = start, len(data)

    def take(count: int) -> bytes:
        """The next bytes of the file, without the header that opens each block of 64 KiB."""
        nonlocal position
        parts = []
        while count > 0:
            if (position - start) % 65536 == 0:
                position += 24
            size = min(count, 65536 - (position - start) % 65536)
            parts.append(data[position:position + size])
            position += size
            count -= size
        return b"".join(parts)

    while position < end:
        header = take(40)
        if len(header) < 40:
            return
        _, size, _, kind, _ = struct.unpack("<5Q", header)
        if kind & 0xFF not in b"sr" or size > end - position:
            return  # behind the file's last record
        chunk = take(size)
        if kind & 0xFF == ord("s"):  # the file's signature
            continue
        sizes_length, at = _varint(chunk, 1)
        packed = chunk[at + sizes_length:]
        if chunk[0] == ord("s"):
            _, at = _varint(packed, 0)
            packed = _snappy(packed[at:])
        elif chunk[0] != 0:
            raise ValueError(
                f"the executable is packed by {chr(chunk[0])!r} and only Snappy is read; check its "
                "architecture with XLA_FLAGS=--xla_dump_to=DIR instead"
            )
        yield from _records(packed)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A base-128 integer, least significant group first, and the position behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _snappy(data: bytes) -> bytes:
    """Unpacks one Snappy block (google/snappy, format_description.txt)."""
    length, at = _varint(data, 0)
    out = bytearray()
    while at < len(data):
        tag = data[at]
        at += 1
        if tag & 3 == 0:  # literal
            size = tag >> 2
            if size >= 60:
                width = size - 59
                size = int.from_bytes(data[at:at + width], "little")
                at += width
            out += data[at:at + size + 1]
            at += size + 1
            continue
        width = (1, 2, 4)[(tag & 3) - 1]
        offset = int.from_bytes(data[at:at + width], "little")
        at += width
        size = 1 + (tag >> 2)
        if width == 1:
            size, offset = 4 + (tag >> 2 & 7), tag >> 5 << 8 | offset
        begin = len(out) - offset
        if not 0 <= begin < len(out):
            break
        # A copy may overlap what it makes: then it repeats.
        period = bytes(out[begin:begin + size])
        out += (period * (size // len(period) + 1))[:size]
    if len(out) != length:
        raise ValueError(f"a Snappy block of {length} bytes unpacks to {len(out)}: it is damaged")
    return bytes(out)
