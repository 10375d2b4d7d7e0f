"""The xlstm suite: xLSTM and its cells against their authors' packages, and over the length."""

import functools
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import zoo
from pallas_kernels.rnn import rnn
from recipes.benchmarks import lm
from recipes.benchmarks.lm import Ours
from recipes.benchmarks.peer import OURS, Peer, in_turns

# 58M parameters each, so that a CPU takes minutes; the other one's size is llama-60m's.
MODEL, TRANSFORMER = "xlstm-165m", "llama-60m"
SIZE = {"width": 512, "num_layers": 8, "vocab_size": 32000, "mlstm.key_dim": 64,
        "mlstm.value_dim": 128, "mlp.hidden": 1408}
TOLERANCE = 1e-4


def run(*, model: str | None, overrides: dict, peers: bool, rounds: int, cells: Sequence[str],
        lengths: Sequence[int], new_tokens: int, **options: Any) -> dict[str, Any]:
    """Times each part and prints its table; see `recipes.bench`.

    Returns the settings and the numbers of each part; of those left out, None.
    Raises ValueError for sizes that are none, RuntimeError where results differ.
    """
    calls = [_parse(cell) for cell in cells]
    console = Console()
    if model is None:
        model, overrides = MODEL, {**SIZE, **overrides}
    config = zoo.config(model, **overrides)
    if not hasattr(config, "mlstm"):
        raise ValueError(f"--model={model} is no xLSTM, which this suite times; leave it out, or "
                         "give one, such as xlstm-tiny")
    found = {"suite": "xlstm", "model": model, "rounds": rounds}
    models = lm.run(
        model=model, overrides=overrides, rounds=rounds, new_tokens=new_tokens,
        peer="xlstm" if peers and _installed("xlstm", console) else None, **options)
    with_flashrnn = bool(calls) and peers and _installed("flashrnn", console)
    return {**found, "models": models,
            "cells": _time_cells(calls, rounds, with_flashrnn, console) if calls else None,
            "lengths": _time_lengths(config, sorted(lengths), rounds, new_tokens, console)
            if lengths else None}


def _installed(package: str, console: Console) -> bool:
    there = importlib.util.find_spec(package) is not None
    if not there:
        console.print(f"{package} is not installed and is left out; it is in the extra parity: "
                      "pip install 'parazoo\\[parity]'")
    return there


def _parse(cell: str) -> tuple[int, ...]:
    """(B, T, H, D) of ``BxTxHxD``."""
    parts = cell.split("x")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--cells has {cell!r}; it takes batch, length, heads and width of a "
                         "head, as in 4x512x12x64")
    return tuple(map(int, parts))


def _time_cells(calls: list[tuple[int, ...]], rounds: int, with_flashrnn: bool, console: Console
                ) -> dict[str, Any]:
    """sLSTM, forward and with the backward pass, against flashrnn."""
    table = Table("sLSTM", "pass", f"{OURS} ms", "flashrnn ms", "ratio",
                  title="The op rnn against flashrnn's vanilla back end, float32, median of "
                        f"{rounds} interleaved rounds")
    found: dict[str, Any] = {}
    for call in calls:
        b, t, heads, width = call
        rng = np.random.default_rng(0)
        operands = [x.astype(np.float32) for x in (
            rng.normal(size=(b, t, 4, heads, width)),
            rng.normal(size=(4, heads, width, width)) * width**-0.5,
            rng.normal(size=(4, heads, width)))]
        name = "x".join(map(str, call))
        found[name] = {}
        theirs = _flashrnn(operands) if with_flashrnn else None
        passes = _passes(operands)
        if theirs is not None:
            difference = float(np.abs(np.asarray(passes["forward"]())
                                      - np.array(theirs.ask({"do": "results"}))).max())
            if difference > TOLERANCE:
                raise RuntimeError(f"sLSTM {name} differs from flashrnn's by {difference:.2e}, "
                                   f"over {TOLERANCE}; timings would compare different cells")
        for kind, ours in passes.items():
            sides: dict[str, Callable[[], float]] = {OURS: functools.partial(_seconds, ours)}
            if theirs is not None:
                sides["flashrnn"] = functools.partial(theirs.ask, {"do": kind})
            seconds = {side: statistics.median(times)
                       for side, times in in_turns(sides, rounds).items()}
            ratio = seconds["flashrnn"] / seconds[OURS] if theirs is not None else None
            found[name][kind] = {"seconds": seconds, "ratio": ratio}
            table.add_row(name, kind, f"{1e3 * seconds[OURS]:.2f}",
                          f"{1e3 * seconds['flashrnn']:.2f}" if ratio else "-",
                          f"{ratio:.2f}" if ratio else "-")
        if theirs is not None:
            theirs.close()
    console.print(table)
    return found


def _flashrnn(operands: list[np.ndarray]) -> Peer:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "operands.npz"
        np.savez(path, *operands)
        return Peer("recipes.benchmarks.peer_flashrnn",
                    {"operands": str(path), "threads": os.cpu_count()})


def _passes(operands: list[np.ndarray]) -> dict[str, Callable[[], Any]]:
    """Compiled: h, and the gradients of its squares' sum."""
    def forward(*x):
        return rnn(*x, cell="slstm")[0]

    def loss(*x):
        return jnp.sum(forward(*x)**2)

    arrays = [jnp.asarray(x) for x in operands]
    return {"forward": functools.partial(jax.jit(forward), *arrays),
            "both": functools.partial(jax.jit(jax.grad(loss, (0, 1, 2))), *arrays)}


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started


def _time_lengths(config: Any, lengths: list[int], rounds: int, new_tokens: int, console: Console
                  ) -> dict[str, Any]:
    """Training on one row of a length, and decoding behind a prompt of it, of both families."""
    longest = lengths[-1] + 2 * new_tokens
    configs = {
        "xlstm": zoo.override(config, {"max_length": longest}),
        "transformer": zoo.config(TRANSFORMER, max_length=longest, vocab_size=config.vocab_size)}
    table = Table("tokens", "xLSTM train tokens/s", f"{TRANSFORMER}", "ratio",
                  "xLSTM decode tokens/s", f"{TRANSFORMER}", "ratio",
                  title=f"Of this project, over the length, median of {rounds} interleaved rounds")
    found: dict[str, Any] = {"train": {}, "decode": {}}
    for length in lengths:
        models = {name: Ours(c, 1, length) for name, c in configs.items()}
        jobs = {
            "train": (length, {name: functools.partial(ours.train, 1)
                               for name, ours in models.items()}),
            "decode": (new_tokens, {
                name: functools.partial(_decode_after, ours.model, length, new_tokens)
                for name, ours in models.items()})}
        row = [str(length)]
        for job, (count, sides) in jobs.items():
            seconds = in_turns(sides, rounds)
            speed = {name: count / statistics.median(times) for name, times in seconds.items()}
            speed["ratio"] = speed["xlstm"] / speed["transformer"]
            found[job][length] = speed
            row += [f"{speed['xlstm']:.1f}", f"{speed['transformer']:.1f}", f"{speed['ratio']:.2f}"]
        table.add_row(*row)
        # The longest take minutes, and a run that is ended keeps what it has said.
        console.print(f"{length} tokens: xLSTM trains {row[1]} and decodes {row[4]} tokens/s, "
                      f"{TRANSFORMER} {row[2]} and {row[5]}", soft_wrap=True)
    console.print(table)
    speeds = [found["train"][length]["xlstm"] for length in lengths]
    found["slowest_over_fastest"] = max(speeds) / min(speeds)
    console.print(f"A token of training takes xLSTM between {1e3 / max(speeds):.3f} and "
                  f"{1e3 / min(speeds):.3f} ms: at most {found['slowest_over_fastest']:.2f} times "
                  "as long at one length as at another.")
    sizes = {name: zoo.protocol.num_params(zoo.build(c, abstract=True))
             for name, c in configs.items()}
    console.print(f"The xLSTM has {sizes['xlstm'] / 1e6:.1f}M parameters, {TRANSFORMER} "
                  f"{sizes['transformer'] / 1e6:.1f}M.")
    for job in jobs:
        found[f"{job}_crossover"] = crossover(
            {length: speed["ratio"] for length, speed in found[job].items()})
        first = found[f"{job}_crossover"]
        where = "at none of these lengths" if first is None else f"from {first} tokens on"
        console.print(f"{job}: xLSTM is the faster one {where}")
    return found


def crossover(ratios: dict[int, float]) -> int | None:
    """The length from which on all ratios are at least 1."""
    ahead = None
    for length in sorted(ratios, reverse=True):
        if ratios[length] < 1:
            break
        ahead = length
    return ahead


def _decode_after(model: Any, length: int, new_tokens: int) -> float:
    """Seconds for `new_tokens` that follow a prompt and as many tokens."""
    prompt = list(np.arange(length) % model.config.vocab_size)
    pieces = zoo.stream(model, [prompt], 2 * new_tokens, every=new_tokens)
    next(pieces)
    started = time.perf_counter()
    assert len(next(pieces).tokens[0]) == new_tokens
    return time.perf_counter() - started
