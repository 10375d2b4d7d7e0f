"""The authors' package flashrnn, its back end for any device, as a peer of the xlstm suite.

The first request says which call: batch, length, heads and width of an sLSTM.
"""

import time
from typing import Any

from recipes.benchmarks.peer import serve


class _FlashRnn:
    ready = None

    def __init__(self, setup: dict[str, Any]):
        import flashrnn
        import numpy as np
        import torch

        torch.set_num_threads(setup["threads"])
        self.torch, self.call = torch, flashrnn.flashrnn
        inputs, recurrent, bias = (torch.tensor(x) for x in np.load(setup["operands"]).values())
        # Theirs have the gate's element before that of h.
        self.operands = inputs, recurrent.transpose(2, 3).contiguous(), bias

    def _run(self):
        """h [B, T, H, D], the first of the states."""
        return self.call(*self.operands, function="slstm", backend="vanilla", dtype="float32")[0][0]

    def results(self) -> list:
        with self.torch.no_grad():
            return self._run().tolist()

    def forward(self) -> float:
        started = time.perf_counter()
        with self.torch.no_grad():
            self._run()
        return time.perf_counter() - started

    def both(self) -> float:
        started = time.perf_counter()
        for x in self.operands:
            x.requires_grad_().grad = None
        (self._run()**2).sum().backward()
        return time.perf_counter() - started


if __name__ == "__main__":
    serve(_FlashRnn)
