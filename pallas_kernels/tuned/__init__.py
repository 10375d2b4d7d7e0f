"""Measured times and tile sizes: one JSON table per chip, written by ``recipes.bench --tune``.

An entry: op, implementation, bucket (shapes and options), dtype, jax (version), milliseconds,
parameters (the implementation's tile sizes). Dispatch prefers the fastest that was measured.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def bucket(operands: Sequence[Any], options: Mapping[str, Any]) -> str:
    """The bucket of a call: sizes rounded up to powers of two, and the options that are set.

    Of an option that is a whole number the size counts too, rounded like those. What another
    number, such as a scale, or the name of a mesh axis says does not change the time.
    """
    def rounded(n):
        return str(1 << max(0, n - 1).bit_length())

    def sizes(x):
        return "-" if x is None else "x".join(map(rounded, x.shape))

    settings = (f"{name}={rounded(x)}" if type(x) is int else name
                for name, x in sorted(options.items())
                if x not in (None, False) and not isinstance(x, str | tuple))
    return f"{','.join(map(sizes, operands))};{','.join(settings)}"


@functools.cache
def _table(path: Path) -> dict[tuple[str, str, str], dict[str, dict]]:
    entries: dict[tuple[str, str, str], dict[str, dict]] = {}
    if path.exists():
        for entry in json.loads(path.read_text())["entries"]:
            key = entry["op"], entry["bucket"], entry["dtype"]
            entries.setdefault(key, {})[entry["implementation"]] = entry
    return entries


def entries(op: str, chip: str, operands: Sequence[Any], options: Mapping[str, Any]
            ) -> dict[str, dict]:
    """Implementation -> its entry, for a call's bucket and the first operand's dtype."""
    key = op, bucket(operands, options), str(operands[0].dtype)
    return _table(FOLDER / f"{chip}.json").get(key, {})


def write(chip: str, new: Sequence[Mapping[str, Any]]) -> Path:
    """Adds entries to a chip's table, in place of those of the same call and implementation."""
    path = FOLDER / f"{chip}.json"
    old = json.loads(path.read_text())["entries"] if path.exists() else []

    def key(entry):
        return tuple(entry[k] for k in ("op", "bucket", "dtype", "implementation"))

    merged = {key(entry): dict(entry) for entry in (*old, *new)}
    lines = ",\n".join(json.dumps(merged[k]) for k in sorted(merged))
    path.write_text(f'{{"entries": [\n{lines}\n]}}\n')
    _table.cache_clear()
    return path
