"""Peers of a benchmark: processes of their own, which answer JSON lines with JSON lines."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

OURS = "parazoo"  # This project's side.
# Time for the other side's threads to fall asleep before a measurement.
PAUSE_SECONDS = 0.5


class Peer:
    """A peer, by the name of the module that serves it. Its first answer is `ready`.

    Raises RuntimeError where it cannot run.
    """

    def __init__(self, module: str, request: dict[str, Any]):
        self.process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
        self.ready = self.ask(request)

    def ask(self, request: dict[str, Any]) -> Any:
        """The result of one request."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the peer ended with status {self.process.wait()}; it needs the extra parity: "
                "pip install 'parazoo[parity]'")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"the peer cannot run: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve(make: Callable[[dict[str, Any]], Any]) -> None:
    """Answers a `Peer` until it closes.

    ``make(request)`` takes the first request and gives an object, whose attribute `ready` answers
    it; any other request names one of its methods under "do", with the method's arguments.
    """
    answers = sys.stdout
    sys.stdout = sys.stderr  # Libraries print; the answers stay clean.

    def reply(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        peer = make(json.loads(sys.stdin.readline()))
        reply(result=peer.ready)
        for line in sys.stdin:
            request = json.loads(line)
            reply(result=getattr(peer, request.pop("do"))(**request))
    except Exception as error:
        reply(error=f"{type(error).__name__}: {error}")
        raise


def in_turns(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side by name, one after another in each round, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for measured in range(rounds + 1):
        for name, measure in sides.items():
            time.sleep(PAUSE_SECONDS)
            found = measure()
            if measured:
                seconds[name].append(found)
    return seconds


@dataclasses.dataclass(frozen=True)
class Job:
    """What both sides are timed at.

    Attributes:
      count: units of throughput in a call.
      ours: a call of this project's side; it returns its seconds.
      peer: calls of the peer's, by the mode that it runs in.
    """

    count: int
    ours: Callable[[], float]
    peer: dict[str, Callable[[], float]] = dataclasses.field(default_factory=dict)


def compare(jobs: Mapping[str, Job], rounds: int, unit: str, title: str, console: Console
            ) -> dict[str, Any]:
    """Times jobs `in_turns` and prints a table: a peer counts by the best of its modes.

    Returns by job each side's units per second, medians, their ratio, and all seconds.
    """
    table = Table("job", f"{OURS} {unit}/s", f"peer {unit}/s", "peer's mode", "ratio", title=title)
    results: dict[str, Any] = {}
    for name, job in jobs.items():
        seconds = in_turns({OURS: job.ours, **job.peer}, rounds)
        speed = {side: job.count / statistics.median(times) for side, times in seconds.items()}
        best = max(job.peer, key=lambda side: speed[side], default=None)
        results[name] = {
            OURS: speed[OURS],
            "peer": {side: speed[side] for side in job.peer},
            "ratio": speed[OURS] / speed[best] if best else None,
            "seconds": seconds,
        }
        table.add_row(name, f"{speed[OURS]:.1f}", f"{speed[best]:.1f}" if best else "-",
                      best or "-", f"{results[name]['ratio']:.2f}" if best else "-")
    console.print(table)
    return results


class TorchTraining:
    """Training of a PyTorch model by fused AdamW, as it is and compiled: a peer's `train`."""

    MODES = ["eager", "compiled"]

    def __init__(self, torch: Any, make: Callable[[], Any], loss: Callable[[Any], Any],
                 learning_rate: float):
        """`make()` gives a model, ``loss(call)`` the loss of one, compiled or not, on the batch."""
        self.torch, self.loss, self.trained = torch, loss, {}
        for mode in self.MODES:
            model = make().train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
            call = torch.compile(model) if mode == "compiled" else model
            self.trained[mode] = (model, call, optimizer)

    def __call__(self, mode: str, steps: int) -> float:
        """The seconds of so many steps."""
        model, call, optimizer = self.trained[mode]
        started = time.perf_counter()
        for _ in range(steps):
            self.loss(call).backward()
            self.torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.torch.cuda.is_available():
            self.torch.cuda.synchronize()
        return time.perf_counter() - started
