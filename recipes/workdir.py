"""A run's directory, and whether what it holds is the same run.

    workdir/
      config.json       what the result depends on; compared when the run is taken up again
      tokenizer/        its files, if it has any
      base/             what adapters stand on, if any are trained; see `zoo.checkpoint`
      checkpoints/      see `zoo.checkpoint`
      metrics.jsonl     every number logged
      loss.png          at the end; other tasks draw others
      preprocessing/    how images are made ready, of a model for segmentation; at its end there are
                        report.html, overlays/ and predictions/ too
      failure.json      the batch after which something was not finite
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recipes.optimizer import schedule

CONFIG = "config.json"
_SHOWN = 5
# Where the data is said to be matters less than what it is; steps matter as far as they bend the
# learning rate.
_FREE = ("data.spec", "tokenizer.name", "training.steps")


def read_config(folder: Path) -> dict[str, Any] | None:
    """What `write_config` wrote, or None where it has not. Raises ValueError for what is no JSON
    object."""
    path = folder / CONFIG
    if not path.exists():
        return None
    try:
        old = json.loads(path.read_text("utf-8"))
    except ValueError:
        old = None
    if not isinstance(old, dict):
        raise ValueError(f"{path} is no JSON object; restore it, or give another --workdir")
    return old


def check_config(folder: Path, record: Mapping[str, Any]) -> None:
    """Raises ValueError if the directory holds another run than the one `record` describes."""
    old = read_config(folder)
    if old is not None:
        check_same(folder, old, record)


def write_config(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes what `check_config` compares."""
    write_json(folder / CONFIG, record)


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    write(path, (json.dumps(value, indent=2) + "\n").encode())


def write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all. Raises OSError, which names the file."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def check_same(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises ValueError if two runs' records differ in what the result depends on."""
    before, after = _flat(old), _flat(new)
    names = [n for n in sorted(before.keys() | after.keys()) if n not in _FREE]
    changed = [f"{name}: {_short(before.get(name))} -> {_short(after.get(name))}"
               for name in names if before.get(name) != after.get(name)]
    if changed:
        more = [f"and {len(changed) - _SHOWN} more"] if len(changed) > _SHOWN else []
        raise ValueError(f"{folder} holds a run of another configuration ("
                         + ", ".join(changed[:_SHOWN] + more)
                         + "); give the old values, or another --workdir")


def check_steps(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any], done: int) -> None:
    """Raises ValueError if the number of steps cannot change as it does from one record to another.

    After `done` steps it cannot fall below them, and the learning rates so far must be the same.
    """
    before, after = old["training"], new["training"]
    if after["steps"] < done:
        raise ValueError(f"{folder} has {done} steps behind it already, more than --steps="
                         f"{after['steps']}; give more steps, or another --workdir")
    if before["steps"] == after["steps"]:
        return

    def rates(training):
        return np.asarray(schedule(training["schedule"], 1.0, training["steps"],
                                   training["warmup_steps"])(np.arange(done)))

    if not np.array_equal(rates(before), rates(after)):
        raise ValueError(
            f"{folder} is a run of {before['steps']} steps, of which {done} are done, and its "
            f"schedule {after['schedule']!r} would have been another for {after['steps']}; give "
            f"--steps={before['steps']}, or another --workdir (only --schedule=constant, and wsd "
            "before its end, can go on for longer)")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:11]}...{text[-6:]}"
