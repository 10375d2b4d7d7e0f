"""What a run shows while it trains: one live line on a terminal, plain lines elsewhere."""

import sys
import time

import jax

from sharding.topology import CHIPS

# What jax calls a device -> a key of sharding.topology.CHIPS.
_CHIPS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
    "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x", "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200", "NVIDIA B200": "b200",
}


def peak_flops(mesh: jax.sharding.Mesh) -> float | None:
    """Peak dense bfloat16 FLOP/s of a mesh's devices together, or None where it is not known."""
    name = _CHIPS.get(mesh.devices.flat[0].device_kind)
    if name is None:
        return None
    return mesh.size * CHIPS[name].bf16_flops / CHIPS[name].devices


class Clock:
    """Time spent in steps, and what follows from it.

    Evaluations, checkpoints and the first step, which compiles, are left out of the speed.
    """

    def __init__(self, unit: str, units_per_step: int, flops_per_step: float, peak: float | None):
        """`unit` is what is counted, as "tokens"."""
        self._speed, self._units = f"{unit}_per_second", units_per_step
        self._flops, self._peak = flops_per_step, peak
        self.began = self._mark = time.monotonic()
        self._steps = self._seconds = 0.0
        self._skips = False

    def resume(self) -> None:
        """What follows are steps again."""
        self._mark = time.monotonic()

    def skip(self) -> None:
        """The next step that is counted does not count: it compiled."""
        self._skips = True

    def count(self) -> None:
        """One more step is done."""
        now = time.monotonic()
        if self._skips:
            self._mark, self._skips = now, False
            return
        # Old steps fade, about 50 count: what is shown follows a machine that slows down.
        self._steps = 0.98 * self._steps + 1
        self._seconds = 0.98 * self._seconds + now - self._mark
        self._mark = now

    def times(self) -> dict[str, float]:
        """seconds since the start and, once known, tokens_per_second (or of what) and mfu."""
        found = {"seconds": time.monotonic() - self.began}
        if self._seconds:
            speed = self._steps / self._seconds
            found[self._speed] = speed * self._units
            if self._peak:
                found["mfu"] = speed * self._flops / self._peak
        return found

    def remaining(self, steps: int) -> float | None:
        """Seconds that so many steps take at the present speed, or None where it is unknown."""
        return steps * self._seconds / self._steps if self._steps else None


class Line:
    """Shows where a run of `steps` steps stands."""

    def __init__(self, steps: int, unit: str, silent: bool = False):
        """`unit` is what speed counts; `silent` are a job's processes that leave it to another."""
        self._steps, self._unit, self._silent, self._live = steps, unit, silent, None
        if not silent and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._live = Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(),
                                  TextColumn("{task.description}", markup=False))
            self._bar = self._live.add_task("compiling", total=steps)
            self._live.start()

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif not self._silent:
            print(text, flush=True)

    def show(self, step: int, numbers: dict[str, float], times: dict[str, float],
             remaining: float | None) -> None:
        """Shows how things are after `step` steps."""
        parts = [f"loss {numbers['loss']:.4f}", f"norm {numbers['grad_norm']:.2f}"]
        speed = times.get(f"{self._unit}_per_second")
        if speed is not None:
            parts.append(f"{speed:,.0f} {self._unit}/s")
        if "mfu" in times:
            parts.append(f"MFU {100 * times['mfu']:.1f}%")
        if remaining is not None:
            parts.append(f"ETA {_duration(remaining)}")
        if self._live is not None:
            self._live.update(self._bar, completed=step, description="  ".join(parts))
        else:
            self.say("  ".join([f"step {step:{len(str(self._steps))}d}/{self._steps}", *parts]))

    def close(self) -> None:
        """Ends the live line."""
        if self._live is not None:
            self._live.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Bytes:
    """Shows how much of `total` bytes has been moved, how fast, and how long the rest takes."""

    def __init__(self, what: str, total: int):
        self._what, self._total, self._done, self._live = what, total, 0, None
        self._began = self._said = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._live = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(),
                TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
            self._bar = self._live.add_task(what, total=total)
            self._live.start()

    def __enter__(self) -> "Bytes":
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        if self._live is not None:
            self._live.stop()
        if error is not None:
            return
        seconds = time.monotonic() - self._began
        print(f"{self._what}: {self._done / 1e6:,.0f} MB in {_duration(seconds)}, "
              f"{self._done / 1e6 / max(seconds, 1e-9):,.0f} MB/s", file=sys.stderr, flush=True)

    def add(self, count: int) -> None:
        """`count` more bytes are done."""
        self._done += count
        now = time.monotonic()
        if self._live is not None:
            self._live.update(self._bar, completed=self._done)
        elif now - self._said > 5:
            self._said = now
            rate = self._done / (now - self._began)
            rest = max(0, self._total - self._done) / max(rate, 1)
            print(f"{self._what}: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB  "
                  f"{rate / 1e6:,.0f} MB/s  ETA {_duration(rest)}", file=sys.stderr, flush=True)
