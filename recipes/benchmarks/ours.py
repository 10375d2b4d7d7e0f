"""This project's side of a benchmark: training in this process, on one device."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import sharding
from recipes.optimizer import Optimizer
from recipes.training import Program, make_step

LEARNING_RATE = 1e-4


class Training:
    """Training by AdamW, as `recipes.train` does it."""

    def __init__(self, config: Any, loss: Callable, batch: Mapping[str, np.ndarray],
                 axes: tuple[str | None, ...], compute_dtype: str = "float32"):
        """`loss` and `axes` are those of a `recipes.tasks.Task`, of whose kind `batch` is one."""
        self.mesh = sharding.mesh("data:1", jax.devices()[:1])
        self.rules = sharding.rules("dp")
        optimizer = Optimizer("adamw", LEARNING_RATE, schedule="constant", warmup_steps=0)
        self.program = Program(config, self.mesh, self.rules, loss, optimizer,
                               compute_dtype=compute_dtype, batch_axes=axes)
        with sharding.use(self.mesh, self.rules):
            self._step = make_step(self.program)
            self._state = self.program.init()
        self._batch = jax.device_put(dict(batch), self.program.batch_sharding)
        self._count = 0

    def __call__(self, steps: int) -> float:
        """The seconds of so many steps."""
        started = time.perf_counter()
        with sharding.use(self.mesh, self.rules):
            for _ in range(steps):
                signals = jax.device_put(np.array([[self._count, 0]], np.int32))
                self._state, metrics = self._step(self._state, self._batch, signals)
                self._count += 1
            jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - started
