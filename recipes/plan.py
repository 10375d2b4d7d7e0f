"""Says whether a model fits a machine and how fast it could run there, without the machine.

  python -m recipes.plan --model=llama3-8b --topology=v5p:4x4x4 --mesh=fsdp:16,tensor:4 \\
      --batch_size=64 --seq_len=4096
  python -m recipes.plan --model=qwen3-8b --topology=h200:8 --mode=decode --batch_size=32
  python -m recipes.plan --model=paratranscnn --topology=h200:8 --image_size=512 --batch_size=32

The step is compiled ahead of time by the machine's own compiler and its program is read. Numbers
are lower bounds on time, not predictions: each term of the roofline is what the step would take if
nothing else took any. Needs the compilers: pip install 'parazoo[aot]', best in an environment of
its own (make aot sets one up).
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from rich.console import Console
from rich.table import Table

import sharding
import zoo
from recipes import command
from recipes.optimizer import LEARNING_RATES, Optimizer, is_table
from recipes.tasks import Workload, lm, segment
from recipes.training import abstract_step
from sharding import report, topology
from zoo.decode import loop
from zoo.registry import check_kind

GIB = 1 << 30
# A second compile, to say what rematerialisation would change, is worth at most this long a wait.
SECOND_COMPILE_SECONDS = 75
MESHES = {"train": "fsdp:-1", "decode": "tensor:-1", "infer": "data:-1"}

with command.group("What"):
    MODEL = flags.DEFINE_string("model", None, "A preset; zoo.list() names them.")
    SET = flags.DEFINE_multi_string("set", [], "Config overrides, as in num_layers=4.")
    MODE = flags.DEFINE_enum("mode", "train", sorted(MESHES, reverse=True),
                             "A training step, segmenting a batch of images (infer), or decoding "
                             "one token of every request.")
    BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows or images of the whole machine's "
                                      "step, or requests decoded at once.")
    SEQ_LEN = flags.DEFINE_integer("seq_len", 4096, "Tokens of a row, or of each request's cache.")
    IMAGE_SIZE = flags.DEFINE_integer("image_size", 224, "Pixels of an image's sides.")
with command.group("Where"):
    TOPOLOGY = flags.DEFINE_string("topology", None, "The machine: a TPU slice such as "
                                   "v5e:4x4, v5p:4x4x4, v6e:16x16, or GPUs such as h200:8.")
    MESH = flags.DEFINE_string("mesh", "", "Axes over its devices, as in fsdp:16,tensor:4; "
                               "default all on fsdp (decode: on tensor, infer: on data).")
    RULES = flags.DEFINE_string("rules", "fsdp_tp", command.RULES_HELP)
with command.group("Training"):
    OPTIMIZER = flags.DEFINE_enum("optimizer", "adamw", sorted(LEARNING_RATES), "Which.")
    ACCUMULATE = flags.DEFINE_integer("accumulate", 1, "Microbatches of a step.")
    REMAT = flags.DEFINE_enum("remat", "none", ["none", "dots", "full"],
                              "What the backward pass computes again instead of keeping.")
    DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"],
                              "Of the parameters; default float32, without training bfloat16.")
with command.group("Output"):
    JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")


def _in_child() -> bool:
    return all(os.environ.get(k) == v for k, v in topology.child_env().items())


def _run_child() -> None:
    """Compiles in a process of its own: compilers can end the one they run in."""
    done = subprocess.run([sys.executable, "-m", "recipes.plan", *sys.argv[1:]],
                          env={**os.environ, **topology.child_env()}, stderr=subprocess.PIPE,
                          text=True)
    if not done.returncode:
        return  # Compilers chat on stderr even when all is well.
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    print(told[-1] if told else done.stderr, file=sys.stderr)
    if done.returncode < 0:
        raise RuntimeError(f"the compiler ended with signal {-done.returncode}")
    sys.exit(done.returncode)


def _workload(config: Any) -> Workload:
    """Of the task that models of this kind are trained for, in the sizes of the flags."""
    make, size = {"language": (lm.workload, SEQ_LEN),
                  "segmentation": (segment.workload, IMAGE_SIZE)}[config.kind]
    for flag in (SEQ_LEN, IMAGE_SIZE):
        if flag.present and flag is not size:
            raise ValueError(f"--{flag.name} is not of models for {config.kind}; give "
                             f"--{size.name} instead")
    return make(config, BATCH_SIZE.value, size.value)


def _compile_train(config: Any, mesh, rules, remat: str):
    step, arguments = abstract_step(
        config, mesh, rules, _workload(config), optimizer=Optimizer(OPTIMIZER.value),
        accumulate=ACCUMULATE.value, dtype=DTYPE.value or "float32", remat=remat)
    with sharding.use(mesh, rules):
        return step.lower(*arguments).compile(), arguments[0]["params"]


def _compile_infer(config: Any, mesh, rules):
    """The classes of whole images, by the running statistics."""
    shape, dtype = _workload(config).batch["images"]
    model = zoo.build(config, mesh=mesh, rules=rules, abstract=True,
                      dtype=jnp.dtype(DTYPE.value or "bfloat16"))
    definition, params = zoo.protocol.split(model)
    images = jax.ShapeDtypeStruct(shape, dtype, sharding=rules.sharding(
        mesh, (*segment.Segment.axes, None, None), shape))

    def classes(params, images):
        logits = zoo.protocol.merge(definition, params)({"images": images}).logits
        return jnp.argmax(logits, axis=-1).astype(jnp.uint8)

    with sharding.use(mesh, rules):
        return jax.jit(classes).lower(params, images).compile(), params


def _compile_decode(config: Any, mesh, rules, chunk: int):
    model = zoo.build(config, mesh=mesh, rules=rules, abstract=True,
                      dtype=jnp.dtype(DTYPE.value or "bfloat16"))
    definition, params = zoo.protocol.split(model)
    with sharding.use(mesh, rules):
        arguments = loop.abstract_run(model, BATCH_SIZE.value, SEQ_LEN.value)
        lowered = loop.run.lower(definition, loop.Plain(), chunk, *arguments)
        return lowered.compile(), params, arguments[2]


def _out_of_memory(error: jax.errors.JaxRuntimeError) -> tuple[float, float]:
    """(needed, available) bytes, where a compiler gave up because a program does not fit."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)",
                      str(error))
    if found is None:
        raise RuntimeError(f"the compiler failed: {str(error).splitlines()[0]}") from error
    scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    return float(found[1]) * scale[found[2]], float(found[3]) * scale[found[4]]


def _with_remat(config: Any, machine: topology.Topology, mesh, rules) -> str:
    """What --remat=full would change."""
    try:
        compiled, _ = _compile_train(config, mesh, rules, "full")
    except jax.errors.JaxRuntimeError as error:
        needed, _ = _out_of_memory(error)
        return f"--remat=full still needs {needed / GIB:.1f} GiB"
    memory = report.analyse(compiled, mesh, machine).memory
    return f"--remat=full needs {memory.total / GIB:.1f} GiB" + (
        ", which fits" if memory.fits else "")


def _too_large(config: Any, machine: topology.Topology, mesh, rules,
               error: jax.errors.JaxRuntimeError) -> dict[str, Any]:
    """The result where the compiler itself found that the step does not fit."""
    needed, available = _out_of_memory(error)
    advice = []
    if MODE.value == "train":
        if REMAT.value != "full":
            advice.append(_with_remat(config, machine, mesh, rules))
        advice += _training_advice(config, None)
    else:
        advice.append(_serving_advice())
    return {
        **_asked(config, machine, mesh), "advice": advice,
        "memory": {"total": needed, "capacity": available, "fits": False},
    }


def _asked(config: Any, machine: topology.Topology, mesh) -> dict[str, Any]:
    """What the flags say, as the first part of the result."""
    size = {"seq_len": SEQ_LEN.value} if config.kind == "language" else {
        "image_size": IMAGE_SIZE.value}
    return {"model": MODEL.value, "mode": MODE.value, "topology": machine.name,
            "mesh": dict(mesh.shape), "rules": RULES.value, "batch_size": BATCH_SIZE.value, **size}


def _shard_bytes(tree: Any) -> int:
    """Bytes of one device's shards."""
    return sum(jnp.dtype(x.dtype).itemsize * math.prod(x.sharding.shard_shape(x.shape))
               for x in jax.tree.leaves(tree))


def decode_reads(config: Any, params: Any, axes: Any, mesh, rules: sharding.Rules, batch: int
                 ) -> int:
    """Bytes of parameters that one device reads to decode a token of each of `batch` requests.

    Of a table in which rows are looked up these are the rows of its requests alone, unless the
    table is the head as well. Of experts they are as many as its requests can take, each others.
    """
    rows = rules.sharding(mesh, ("batch",), (batch,)).shard_shape((batch,))[0]

    def read(names, x):
        shape = list(x.sharding.shard_shape(x.shape))
        if is_table(names) and not (config.tie_embeddings and "vocab" in names):
            shape[0] = min(rows, shape[0])
        elif "experts" in names[:-1]:  # It stands last in the router, which is read whole.
            experts = names.index("experts")
            shape[experts] = min(rows * config.mlp.top_k, shape[experts])
        return jnp.dtype(x.dtype).itemsize * math.prod(shape)

    found = jax.tree.map(read, axes, params, is_leaf=lambda node: isinstance(node, tuple))
    return sum(jax.tree.leaves(found))


def plan(config: Any, machine: topology.Topology, mesh, rules) -> dict[str, Any]:
    """Compiles what the flags ask for and returns all its numbers, JSON-able, in named units."""
    started = time.perf_counter()
    batch, work = BATCH_SIZE.value, _workload(config)
    advice: list[str] = []
    if batch < 1:
        raise ValueError(f"batch_size {batch}: it must be at least 1")
    axes = zoo.protocol.axes(zoo.build(config, mesh=mesh, rules=rules, abstract=True))
    if MODE.value == "train":
        compiled, params = _compile_train(config, mesh, rules, REMAT.value)
        flops, units = 3 * work.flops, work.units
        found = program = report.analyse(compiled, mesh, machine, flops=flops)
        memory, seconds = found.memory, time.perf_counter() - started
        if not memory.fits:
            if REMAT.value != "full" and seconds < SECOND_COMPILE_SECONDS:
                advice.append(_with_remat(config, machine, mesh, rules))
            elif REMAT.value != "full":
                advice.append("--remat=full: far fewer activations, a third more FLOPs")
            advice += _training_advice(config, memory)
    elif MODE.value == "infer":
        compiled, params = _compile_infer(config, mesh, rules)
        flops, units = work.flops, work.units
        found = program = report.analyse(compiled, mesh, machine, flops=flops)
        memory, seconds = found.memory, time.perf_counter() - started
        if not memory.fits:
            advice.append(_serving_advice())
    else:
        # Memory and kernels are those of the whole engine, with its intake of prompts; a token's
        # costs are those of its loop alone.
        whole, params, progress = _compile_decode(config, mesh, rules, loop.CHUNK)
        program = report.analyse(whole, mesh, machine)
        memory = program.memory
        flops, units = batch * config.flops_at(SEQ_LEN.value), batch
        moved = (decode_reads(config, params, axes, mesh, rules, batch)
                 + _shard_bytes(progress.state))
        found = report.analyse(_compile_decode(config, mesh, rules, 0)[0], mesh, machine,
                               flops=flops, hbm_bytes=moved)
        seconds = time.perf_counter() - started
        if not memory.fits:
            advice.append(_serving_advice())
    roof = found.roofline
    assert roof is not None
    bound = max(roof.compute_seconds or 0.0, roof.memory_seconds, roof.collective_seconds)
    uneven = sorted({
        f"{axis} of size {size}"
        for names, x in zip(jax.tree.leaves(axes, is_leaf=lambda n: isinstance(n, tuple)),
                            jax.tree.leaves(params), strict=True)
        for axis, size in zip(names, x.shape, strict=True)
        if axis in rules.uneven(mesh, names, x.shape)})
    return {
        **_asked(config, machine, mesh),
        "parameters": sum(x.size for x in jax.tree.leaves(zoo.protocol.divide(params)[0])),
        "replicated_because_uneven": uneven,
        "flops_per_step": flops,
        "memory": {**found.as_dict()["memory"], **{
            k: getattr(memory, k) for k in ("arguments", "outputs", "aliases", "temporaries",
                                            "host", "total", "capacity", "fits")}},
        "hbm_traffic_bytes": found.hbm_traffic_bytes,
        "collectives": found.as_dict()["collectives"],
        "custom_calls": program.as_dict()["custom_calls"],
        "roofline": found.as_dict()["roofline"],
        f"{work.unit}_per_second_bound": units / bound,
        "mfu_bound": (roof.compute_seconds or 0.0) / bound,
        "compiler_estimates": found.compiler,
        "compile_seconds": seconds,
        "notes": list(found.notes),
        "advice": advice,
    }


def _serving_advice() -> str:
    if MODE.value == "decode":
        return "a wider tensor axis, a smaller --batch_size or a shorter --seq_len"
    return "a wider data axis, a smaller --batch_size or a smaller --image_size"


def _training_advice(config: Any, memory: report.Memory | None) -> list[str]:
    advice = []
    if memory is None or memory.temporaries > memory.arguments:
        advice += [f"--accumulate={2 * ACCUMULATE.value} halves the activations",
                   "a smaller --batch_size, or a " + (
                       "shorter --seq_len" if config.kind == "language"
                       else "smaller --image_size")]
    taken = "" if memory is None else (
        f": parameters and optimiser take {memory.arguments / GIB:.1f} GiB of each")
    advice.append("more devices on fsdp or tensor" + taken)
    if (DTYPE.value or "float32") == "float32":
        advice.append("--dtype=bfloat16 halves the parameters")
    return advice


def _units(value: float, unit: str) -> str:
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"),
                           (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _print(result: dict[str, Any]) -> None:
    console = Console(width=100, highlight=False)
    mesh = ", ".join(f"{k}:{v}" for k, v in result["mesh"].items())
    what = {"train": "training step", "infer": "segmentation",
            "decode": "decoding of one token a request"}[result["mode"]]
    size = (f"x {result['seq_len']} tokens" if "seq_len" in result
            else "of images {0} x {0}".format(result["image_size"]))
    console.print(f"[bold]{result['model']}[/bold] on {result['topology']} ({mesh}; rules "
                  f"{result['rules']}): {what}, batch {result['batch_size']} {size}")
    table = Table(show_header=False, box=None, pad_edge=False)
    memory, roof = result["memory"], result.get("roofline")
    if "parameters" in result:
        table.add_row("parameters", f"{result['parameters']:,}")
    if result.get("replicated_because_uneven"):
        uneven = ", ".join(result["replicated_because_uneven"])
        table.add_row("replicated", f"{uneven}: does not divide over the mesh" + (
            " (--set=vocab_multiple=128 makes it)" if "vocab" in uneven else ""))
    room = memory["capacity"] - memory["total"]
    verdict = (f"fits, {room / GIB:.1f} GiB free" if room >= 0
               else f"[bold red]does not fit, {-room / GIB:.1f} GiB over[/bold red]")
    table.add_row("memory of a device", f"{memory['total'] / GIB:.2f} of "
                  f"{memory['capacity'] / GIB:.1f} GiB: {verdict}")
    for name in ("arguments", "outputs", "aliases", "temporaries"):
        if name not in memory:  # The compiler gave up before it laid memory out.
            continue
        sign = "-" if name == "aliases" else "+"
        table.add_row(f"  {sign} {name}", f"{memory[name] / GIB:.2f} GiB")
    for line in result["advice"]:
        table.add_row("  would help", line)
    if roof is None:
        console.print(table)
        return
    table.add_row("model FLOPs", f"{_units(result['flops_per_step'], 'FLOP')} a step, "
                  f"{_units(roof['flops'], 'FLOP')} a device")
    table.add_row("memory traffic", f"{_units(roof['hbm_bytes'], 'B')} a device"
                  + ("" if roof["hbm_bytes_source"] == "given" else ", read off the program"))
    console.print(table)
    collectives = Table("collective", "over", "count", "arrays", "sent by a device", "at least",
                        box=None, pad_edge=False, title_justify="left")
    for c in result["collectives"]:
        collectives.add_row(c["kind"], "x".join(c["axes"]), str(c["count"]),
                            _units(c["result_bytes"], "B"), _units(c["wire_bytes"], "B"),
                            f"{1e3 * (c['seconds'] or 0):.3f} ms")
    if result["collectives"]:
        console.print(collectives)
    else:
        console.print("no collectives")
    kernels = ", ".join(f"{c['count']} x {c['name'] or c['target']}"
                        for c in result["custom_calls"])
    with_prompts = " (with the intake of prompts)" if result["mode"] == "decode" else ""
    console.print(f"kernels{with_prompts}: {kernels or 'none; all of it is XLA code'}")
    bound = Table("roofline", "at least", "", box=None, pad_edge=False)
    for name, key in (("compute", "compute_seconds"), ("memory", "memory_seconds"),
                      ("collectives", "collective_seconds")):
        mark = "[bold]limits[/bold]" if roof["limiting"] == name else ""
        bound.add_row(name, f"{1e3 * (roof[key] or 0):.3f} ms", mark)
    console.print(bound)
    per = ", at a full cache" if result["mode"] == "decode" else ""
    unit = "tokens" if "seq_len" in result else "images"
    console.print(f"at most {result[f'{unit}_per_second_bound']:,.0f} {unit}/s, "
                  f"{100 * result['mfu_bound']:.0f}% of the peak FLOPs{per}; compiled in "
                  f"{result['compile_seconds']:.0f} s")
    for note in result["notes"]:
        console.print(f"note: {note}")


def main() -> None:
    """Plans what the flags say."""
    for flag in (MODEL, TOPOLOGY):
        if flag.value is None:
            raise ValueError(f"--{flag.name} is missing; see --help for an example")
    config = zoo.config(MODEL.value, **command.settings(SET.value))
    machine = topology.describe(TOPOLOGY.value)
    if MODE.value != "train":
        check_kind(config, "language" if MODE.value == "decode" else "segmentation")
    axes = MESH.value or MESHES[MODE.value]
    sharding.parse_mesh(axes, machine.num_devices)
    rules = sharding.rules(RULES.value)
    _workload(config)
    if not _in_child():
        _run_child()
        return
    mesh = machine.mesh(axes)
    try:
        result = plan(config, machine, mesh, rules)
    except jax.errors.JaxRuntimeError as error:
        result = _too_large(config, machine, mesh, rules, error)
    if JSON.value:
        print(json.dumps(result, indent=1))
    else:
        _print(result)


if __name__ == "__main__":
    command.run(main)
