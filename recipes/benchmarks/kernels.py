"""The kernels suite: every case of every op on this device, against peers and the roofline."""

import functools
import os
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import pallas_kernels
from pallas_kernels import cases, tuned
from pallas_kernels.dispatch import Op, Target
from recipes.benchmarks import kernel_peers

# A measurement runs the call until so many seconds have passed, and at least once.
SECONDS = 0.1
# Peers' results may differ from ours by rounding: this much of the largest value.
AGREEMENT = {"float32": 1e-3, "bfloat16": 5e-2}
# Cases that take a CPU longer than this even at its roofline run only when --case names them.
CPU_SECONDS = 0.2


def _seconds(call: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Seconds a call, from calls in a row that wait once at the end."""
    started = time.perf_counter()
    wait(call())
    once = time.perf_counter() - started
    count = max(1, int(SECONDS / max(once, 1e-7)))
    if count == 1:
        return once
    started = time.perf_counter()
    for _ in range(count):
        result = call()
    wait(result)
    return (time.perf_counter() - started) / count


def ceilings(dtype: Any) -> dict[str, float]:
    """What this device reaches at best: FLOP/s of a large product, bytes/s of a large copy."""
    n = 8192 if Target.ambient().platform != "cpu" else 2048
    x = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
    product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32).astype(dtype))
    large = jnp.zeros(n * n * 8, jnp.float32)
    copy = jax.jit(lambda x: x + 1)

    def best(function, x):
        jax.block_until_ready(function(x))
        return min(_seconds(lambda: function(x), jax.block_until_ready) for _ in range(5))

    return {"flops": 2 * n**3 / best(product, x), "bytes": 2 * large.nbytes / best(copy, large)}


def _passes(function: Callable, operands: list, differentiable: tuple[int, ...]):
    """Compiled calls of no arguments: the forward pass, and it with the backward pass.

    Raises CannotRun for want of memory.
    """
    arguments = [x for x in operands if x is not None]

    def full(arguments):
        iterator = iter(arguments)
        return [None if x is None else next(iterator) for x in operands]

    def loss(chosen, arguments):
        merged = full(arguments)
        for i, x in zip(differentiable, chosen, strict=True):
            merged[i] = x
        # A sum alone would let the compiler make the cotangent of ones away.
        return sum(jnp.vdot(y, y) for y in jax.tree.leaves(function(*merged))
                   if jnp.issubdtype(y.dtype, jnp.floating)).astype(jnp.float32)

    def compiled(function, *arguments):
        found = jax.jit(function).lower(*arguments).compile()
        room = found.memory_analysis().temp_size_in_bytes
        if room > _memory() // 2:
            raise kernel_peers.CannotRun(f"needs {room / 1e9:.0f} GB of temporaries, over half of "
                                         f"the {_memory() / 1e9:.0f} GB here")
        return functools.partial(found, *arguments)

    chosen = [operands[i] for i in differentiable]
    return (compiled(lambda arguments: function(*full(arguments)), arguments),
            compiled(jax.value_and_grad(loss), chosen, arguments))


def _memory() -> int:
    """Bytes that this device can hold."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return device.memory_stats()["bytes_limit"]


def _sides(op: Op, case: cases.Case, operands: list, compare: list[str], tune: bool,
           console: Console) -> dict[str, tuple[Callable, Callable, Callable]]:
    """Name -> (forward, forward and backward, wait), of what can run this case here."""
    bound, options = op.bind(*operands, **case.options)
    sides: dict[str, tuple[Callable, Callable, Callable]] = {}

    def add(label, make):
        try:
            made = make()
            if not isinstance(made, tuple):
                made = (*_passes(made, operands, case.differentiable), jax.block_until_ready)
            sides[label] = made
        except (kernel_peers.CannotRun, jax.errors.JaxRuntimeError) as error:
            reason = str(error).partition("\n")[0]
            console.print(f"{op.__name__} {case.name}: {label}: {reason}", style="dim",
                          markup=False)

    for candidate in op.candidates(Target.ambient(), *bound, **options):
        if candidate.reason is not None:
            continue
        module = op.module(candidate.name)
        sizes = [dict(candidate.parameters)]
        if tune and hasattr(module, "candidates"):
            sizes = module.candidates(*bound, **options)
        for parameters in sizes:
            def run(*x, name=candidate.name, parameters=parameters):
                full, settings = op.bind(*x, **case.options)
                return getattr(op.module(name), op.__name__)(*full, **settings, **parameters)

            label = candidate.name + "".join(f" {k}={v}" for k, v in parameters.items())
            add(label, lambda run=run: run)
    for peer in compare:
        if peer not in op.names:
            add(peer, lambda peer=peer: kernel_peers.make(peer, op, case, operands))
    return sides


def _differs(ours: Any, theirs: Any, tolerance: float) -> bool:
    """Whether results are not finite in other places, or differ where they are."""
    def close(a, b):
        fine = np.isfinite(a)
        return np.array_equal(fine, np.isfinite(b)) and np.abs(a[fine] - b[fine]).max(
            initial=0.0) <= tolerance * np.abs(a[fine]).max(initial=1.0)

    return not all(close(a, b) for a, b in
                   zip(kernel_peers.host(ours), kernel_peers.host(theirs), strict=False))


def run(*, op: str, case: str, dtype: str | None, compare: list[str], rounds: int, tune: bool
        ) -> dict[str, Any]:
    """Times the cases whose name matches and prints a table; see `recipes.bench`.

    Args:
      op: a regular expression of ops' names.
      case: one of cases' names.
      dtype: "float32" or "bfloat16"; default: what this device computes in.
      compare: peers, by the names in `recipes.benchmarks.kernel_peers`.
      rounds: timed rounds; sides run in turn, medians count.
      tune: time every candidate tile size, and write the best into the tuned table.

    Returns the ceilings and per case and side seconds, share of the roofline and ratio to ours.
    """
    console = Console()
    target = Target.ambient()
    ops = pallas_kernels.ops()
    known = {*kernel_peers.PEERS, *(name for one in ops.values() for name in one.names)}
    if unknown := set(compare) - known:
        raise ValueError(f"--compare has {', '.join(sorted(unknown))}; it takes "
                         f"{', '.join(sorted(known))}")
    if dtype is None:
        dtype = "float32" if target.platform == "cpu" else "bfloat16"
    chosen = [(o, c) for name, o in ops.items() if re.search(op, name)
              for c in cases.of(o) if re.search(case, c.name) and dtype in c.tolerance]
    if not chosen:
        raise ValueError(f"no case matches op={op!r} case={case!r} in {dtype}; ops: "
                         f"{', '.join(ops)}")
    top = ceilings(jnp.dtype(dtype))
    console.print(f"{target.chip}, {dtype}: products reach {top['flops'] / 1e12:.3g} TFLOP/s, "
                  f"copies {top['bytes'] / 1e9:.4g} GB/s")
    if target.platform == "cpu":
        console.print("[yellow]CPU times say nothing of the TPU and GPU kernels, which do not run "
                      "here.[/yellow]")
    table = Table("case", "side", "forward ms", "of roofline", "with backward ms", "of roofline",
                  "its time / ours", title=f"median of {rounds} rounds, sides in turn")
    results, entries = [], []
    for one, its_case in chosen:
        operands = [None if x is None else jnp.asarray(x)
                    for x in its_case.operands(jnp.dtype(dtype))]
        module = one.module("cases")
        flops, size = module.work(operands, its_case.options)
        floor = max(flops / top["flops"], size / top["bytes"])
        floors = floor, floor * (1 + module.BACKWARD)
        if target.platform == "cpu" and floor > CPU_SECONDS and not case:
            console.print(f"{one.__name__} {its_case.name}: takes {floor:.1f} s at the roofline of "
                          "this CPU; runs where --case names it", style="dim", markup=False)
            continue
        console.print(f"{one.__name__} {its_case.name}", style="dim", markup=False)
        sides = _sides(one, its_case, operands, compare, tune, console)
        ours = next((name for name in sides if name.split()[0] in one.names), None)
        if ours is None:
            continue
        outcome = sides[ours][0](), sides[ours][1]()
        times: dict[str, tuple[list, list]] = {}
        for name, (forward, both, wait) in list(sides.items()):
            result = forward()
            gradients = both()
            wait((result, gradients))
            if _differs(outcome[0], result, AGREEMENT[dtype]) or _differs(
                    outcome[1], gradients, AGREEMENT[dtype]):
                raise RuntimeError(f"{one.__name__} {its_case.name}: {name} and {ours} differ by "
                                   f"more than {AGREEMENT[dtype]}; their times are of different "
                                   "things")
            times[name] = ([], [])
        for _ in range(rounds):
            for name, (forward, both, wait) in sides.items():
                times[name][0].append(_seconds(forward, wait))
                times[name][1].append(_seconds(both, wait))
        medians = {name: tuple(map(statistics.median, pair)) for name, pair in times.items()}
        row = {"op": one.__name__, "case": its_case.name, "dtype": dtype,
               "floor_seconds": floors, "sides": {}}
        for i, (name, (forward, both)) in enumerate(medians.items()):
            ratio = forward / medians[ours][0], both / medians[ours][1]
            row["sides"][name] = {
                "forward_seconds": forward, "with_backward_seconds": both,
                "forward_of_roofline": floors[0] / forward,
                "with_backward_of_roofline": floors[1] / both,
                "rounds": times[name]}
            table.add_row(
                f"{one.__name__} {its_case.name}" if i == 0 else "", name,
                f"{forward * 1e3:.3f}", f"{floors[0] / forward:.0%}", f"{both * 1e3:.3f}",
                f"{floors[1] / both:.0%}",
                "" if name == ours else f"{ratio[0]:.2f}, {ratio[1]:.2f}")
        results.append(row)
        if tune:
            entries += _entries(one, its_case, operands, medians)
    console.print(table)
    if tune:
        console.print(f"wrote {len(entries)} entries to {tuned.write(target.chip, entries)}")
    return {"suite": "kernels", "chip": target.chip, "dtype": dtype, "ceilings": top,
            "rounds": rounds, "results": results}


def _entries(op, case, operands, medians) -> list[dict]:
    """Tuned-table entries: of each implementation the tile sizes that trained fastest."""
    bound, options = op.bind(*operands, **case.options)
    best: dict[str, tuple[float, str]] = {}
    for label, (_, both) in medians.items():
        name = label.split()[0]
        if name in op.names and both < best.get(name, (float("inf"), ""))[0]:
            best[name] = both, label
    return [{"op": op.__name__, "implementation": name, "bucket": tuned.bucket(bound, options),
             "dtype": str(operands[0].dtype), "jax": jax.__version__,
             "milliseconds": round(1e3 * seconds, 4),
             "parameters": {k: int(v) for k, v in
                            (item.split("=") for item in label.split()[1:])}}
            for name, (seconds, label) in best.items()]
