"""metrics.jsonl and TensorBoard: every number that a run logs, by one process."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


class Writer:
    """Appends records to a run's metrics.jsonl, and their numbers to TensorBoard where installed.

    A record is ``{"step": 50, "train": {"loss": 2.1, ...}, "time": {...}}``. All that depends on
    the clock stands under "time", so that the rest is the same however often a run was stopped.
    """

    def __init__(self, folder: Path, step: int):
        """Goes on after `step` steps: what the file says of later ones, or of an end, goes."""
        path = folder / FILE
        kept = [r for r in read(path) if r["step"] <= step and "final" not in r]
        part = path.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            file.writelines(_line(record) for record in kept)
            _sync(file)
        os.replace(part, path)
        self._file = path.open("a", encoding="utf-8")
        self._board = _board(folder / "tensorboard", step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds one record."""
        self._file.write(_line(record))
        self._file.flush()
        if self._board is not None:
            for group, numbers in record.items():
                if isinstance(numbers, Mapping):
                    for name, value in numbers.items():
                        self._board.add_scalar(f"{group}/{name}", value, record["step"])

    def sync(self) -> None:
        """Returns when all records are on the disk: before a checkpoint that is past them."""
        _sync(self._file)

    def close(self) -> None:
        """Ends the writing."""
        _sync(self._file)
        self._file.close()
        if self._board is not None:
            self._board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, none if there is no such file.

    A last line that a killed process left unfinished is left out. Raises ValueError for any other
    line that is not a record.
    """
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = json.loads(line)
            record["step"] + 0
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path}:{number} is not a record of a run; mend or remove the line") from None
        records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _board(folder: Path, step: int):
    try:
        import tensorboardX
    except ImportError:
        return None
    return tensorboardX.SummaryWriter(str(folder), purge_step=step + 1)
