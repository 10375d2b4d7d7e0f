"""Peers of a benchmark: processes of their own, which answer JSON lines with JSON lines."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

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
