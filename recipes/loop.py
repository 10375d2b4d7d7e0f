"""The training loop, the same for every task: steps, metrics, evaluation, checkpoints, stopping."""

import contextlib
import dataclasses
import functools
import resource
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sharding
import zoo
from recipes import feed, metrics, nonfinite, progress, training, workdir
from recipes.tasks import Task
from zoo.checkpoint import Checkpointer


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When a run does what, in steps; 0 is never.

    Attributes:
      steps: of the whole run.
      log_every, eval_every, save_every: how often it logs, evaluates, saves. It also does all
        three at its end.
      keep_last, keep_every: which checkpoints stay; see `Checkpointer`.
      profile: (first, last) step that a profile covers, or None.
    """

    steps: int
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    keep_last: int = 3
    keep_every: int | None = None
    profile: tuple[int, int] | None = None

    def __post_init__(self):
        for name in ("log_every", "eval_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: it must be 0 (never) or more")
        if self.profile and not 0 <= self.profile[0] < self.profile[1]:
            raise ValueError(f"profile {self.profile[0]}:{self.profile[1]}: it must be FIRST:LAST "
                             "with FIRST < LAST")


def train(program: training.Program, task: Task, batch_size: int, schedule: Schedule,
          folder: Path) -> training.State:
    """Trains to the last step, or goes on from where the run in `folder` stands.

    Returns the last state. SIGTERM to any process makes all of them save after the same step and
    return.

    Raises:
      ValueError: `folder` holds another run.
      OSError: it cannot be written.
      RuntimeError: a loss or a gradient is not finite, or another process is gone.
    """
    run = _Run(program, task, batch_size, schedule, folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(sharding.use(program.mesh, program.rules))
        stack.enter_context(_stop_requests(run))
        stack.enter_context(_named_failures(folder))
        stack.enter_context(run.checkpointer)
        stack.callback(run.line.close)
        return run.run()


class _Run:
    """The state of the loop, besides the model's."""

    def __init__(self, program: training.Program, task: Task, batch_size: int,
                 schedule: Schedule, folder: Path):
        program.check_batch(batch_size)
        self.program, self.task, self.batch_size = program, task, batch_size
        self.schedule, self.folder = schedule, folder
        self.stop_requested = False
        self.record = training.describe_run(program, task, batch_size)
        self.checkpointer = Checkpointer(folder / "checkpoints", schedule.keep_last,
                                         schedule.keep_every)
        self.first_process = jax.process_index() == 0
        self.line = progress.Line(schedule.steps, silent=not self.first_process)
        self.clock = progress.Clock(task.tokens_per_step, task.flops_per_step,
                                    progress.peak_flops(program.mesh))
        self.writer: metrics.Writer | None = None

    def run(self) -> training.State:
        began = time.monotonic()
        workdir.open_run(self.folder, self.record)
        self.checkpointer.prepare()
        state, first = self._start()
        if self.first_process:
            self.writer = metrics.Writer(self.folder, first)
        steps = self.schedule.steps
        if first < steps:
            batches = feed.Feed(self._place, first, steps)
            try:
                state, stopped = self._steps(state, first, batches)
            finally:
                batches.close()
                self._end_profile()
            if stopped:
                return state
        self._finish(state, began)
        return state
