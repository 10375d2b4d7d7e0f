"""The training loop, the same for every task: steps, metrics, evaluation, checkpoints, stopping."""

import contextlib
import dataclasses
import functools
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

import sharding
import zoo
from recipes import feed, metrics, nonfinite, progress, training, workdir
from recipes.tasks import Batch, Task
from zoo.checkpoint import Checkpointer

_STATUS = ("(ABORTED|CANCELLED|DATA_LOSS|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|"
           "RESOURCE_EXHAUSTED|UNAVAILABLE|UNKNOWN): ")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a run does when, in steps.

    Attributes:
      steps: of the whole run.
      log_every, eval_every, save_every: how often it logs, evaluates, saves; 0 only at its end.
      keep_last, keep_every: which checkpoints stay; see `Checkpointer`.
      profile: (first, last): a profile covers these steps and those between; or None.
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
                raise ValueError(f"{name} {getattr(self, name)}: it must be 0 (at the end) or more")
        if self.profile and not 0 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"profile {self.profile[0]}:{self.profile[1]}: it must be FIRST:LAST")

    def is_due(self, every: int, done: int) -> bool:
        """Whether something done so often is due after `done` steps."""
        return done == self.steps or (every > 0 and done % every == 0)


def train(program: training.Program, task: Task, batch_size: int, schedule: Schedule,
          folder: Path, source: training.Source | None = None, compare: Sequence[Path] = ()
          ) -> training.State:
    """Trains to the last step, or goes on from where the run in `folder` stands.

    A new run starts from the weights of `source`, or else from fresh ones. SIGTERM, to whichever
    process, makes all of them save after the same step and return. The pictures that are drawn at
    the end show the runs in `compare` too.

    Returns:
      The last state.

    Raises:
      ValueError: `folder` holds another run, or sizes do not fit the mesh.
      OSError: `folder` cannot be written.
      RuntimeError: a loss, a gradient or a running statistic is not finite, or another process is
        gone.
    """
    with contextlib.ExitStack() as exits:
        exits.enter_context(sharding.use(program.mesh, program.rules))
        exits.enter_context(_clear_failures())
        return _Run(program, task, batch_size, schedule, folder, source, compare, exits).run()


@contextlib.contextmanager
def _clear_failures() -> Iterator[None]:
    """Says what the runtime's errors mean for a run."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        text = str(error).partition("\n")[0]
        # What fails on the calling thread is a ValueError that begins with the runtime's status.
        if isinstance(error, ValueError) and not re.match(_STATUS, text):
            raise
        if "RESOURCE_EXHAUSTED" in text:
            raise RuntimeError(
                f"out of device memory: {text}; lower --batch_size, raise --accumulate, take "
                "--remat=full, or a larger mesh") from error
        if jax.process_count() == 1:
            raise
        raise RuntimeError(
            "the exchange with the other processes failed, so one of them has probably died; start "
            f"the job again, and it goes on from the last checkpoint ({text})") from error


class _Stopped(Exception):
    """Ends an evaluation: a process was asked to stop, and all of them have learnt of it."""


class _Run:
    """A run in progress: all that the loop keeps, besides the model's state."""

    def __init__(self, program: training.Program, task: Task, batch_size: int,
                 schedule: Schedule, folder: Path, source: training.Source | None,
                 compare: Sequence[Path], exits: contextlib.ExitStack):
        program.check_batch(batch_size)
        for other in compare:
            if not (other / metrics.FILE).is_file():
                raise ValueError(f"there is no run in {other} to compare with: it has no "
                                 f"{metrics.FILE}; give a workdir of recipes.train")
        self.compare = compare
        self.program, self.task, self.batch_size = program, task, batch_size
        self.schedule, self.folder, self.source = schedule, folder, source
        self.record = training.describe_run(program, task, batch_size,
                                            source and source.fingerprint)
        self.is_first_process = jax.process_index() == 0
        self.line = progress.Line(schedule.steps, task.unit, silent=not self.is_first_process)
        self.clock = progress.Clock(task.unit, task.units_per_step, task.flops_per_step,
                                    progress.peak_flops(program.mesh))
        self.stop_requested = False
        self.profiling = False
        self.exits = exits
        before = signal.signal(signal.SIGTERM, self._request_stop)
        exits.callback(signal.signal, signal.SIGTERM, before)
        exits.callback(self.line.close)
        exits.callback(self._end_profile)
        self.checkpointer = exits.enter_context(Checkpointer(
            folder / "checkpoints", schedule.keep_last, schedule.keep_every))

    def _request_stop(self, *_) -> None:
        self.stop_requested = True

    def run(self) -> training.State:
        state, done, evaluated = self._start()
        if self.is_first_process:
            self.writer = metrics.Writer(self.folder, done)
            self.exits.callback(self.writer.close)
        unfinished, stopped = done < self.schedule.steps, False
        if unfinished and not evaluated and self.schedule.is_due(self.schedule.eval_every, done):
            stopped = not self._evaluate(state, done)
        if unfinished and not stopped:
            with contextlib.closing(feed.Feed(self._place, done, self.schedule.steps)) as batches:
                state, done, stopped = self._steps(state, done, batches)
        if stopped or not self._finish(state):
            self.line.say(f"stopped after step {done}, which is saved; the same command goes on "
                          "from there")
        return state

    def _start(self) -> tuple[training.State, int, bool]:
        """The state to go on from, the steps behind it, and if what was due then is evaluated."""
        workdir.check_config(self.folder, self.record)
        self.checkpointer.prepare()
        first, evaluated = self.checkpointer.latest(), True
        if first is None:
            given = self.source and self.source.load(self.program)
            first, state = 0, self.program.init(given)
            if self.source and (bad := training.not_finite(state)):
                raise ValueError(f"{self.source.directory}: {bad[0]} holds numbers that are not "
                                 "finite, and training would spread them; mend these weights")
            training.save_base(self.folder, self.program, state, self.record)
            if self.source:
                trained, base = (sum(x.size for x in jax.tree.leaves(part)) for part in (
                    zoo.protocol.divide(state["params"])[0], state["base"]))
                self.line.say(f"starting from the weights in {self.source.directory}; "
                              f"{trained:,} of {trained + base:,} numbers are trained")
        else:
            state, meta = training.restore(self.checkpointer, self.folder, self.program, first)
            workdir.check_same(self.folder, {name: meta.get(name) for name in self.record},
                               self.record)
            workdir.check_steps(self.folder, meta, self.record, first)
            evaluated = meta.get("evaluated", True)
            self.line.say(f"going on after step {first} of {self.folder}")
        if self.is_first_process:
            workdir.write_config(self.folder, self.record)
            self.task.keep(self.folder)
        return state, first, evaluated

    def _place(self, step: int) -> dict[str, jax.Array]:
        return feed.place(functools.partial(self.task.batch, step), self.batch_size,
                          self.program.batch_sharding)

    def _steps(self, state: training.State, first: int, batches: feed.Feed
               ) -> tuple[training.State, int, bool]:
        """Runs the steps; returns the state, how many are done, and whether it was told to stop."""
        take = training.make_step(self.program)
        began = time.monotonic()
        waiting = None  # The step before, whose metrics are fetched while the next one runs.
        for step in range(first, self.schedule.steps):
            batch = batches.next()
            signals = feed.signals(self.program.mesh, step, self.stop_requested)
            self._begin_profile(step)
            # Nothing but what is asked for here may move between host and devices: a transfer
            # that slips in would make the devices wait, every step.
            with jax.transfer_guard("disallow"):
                state, values = take(state, batch, signals)
            if self.profiling and step == self.schedule.profile[1]:
                jax.block_until_ready((state, values))  # It runs on while this goes on.
                self._end_profile()
            if step == first:
                jax.block_until_ready(values)
                self.clock.skip()
                self.line.say("compiled, and first step taken, in "
                              f"{time.monotonic() - began:.1f} s")
            stop = waiting is not None and self._conclude(state, *waiting)
            waiting, done = (step, values), step + 1
            last = done == self.schedule.steps
            evaluates = not last and self.schedule.is_due(self.schedule.eval_every, done)
            saves = self.schedule.is_due(self.schedule.save_every, done)
            if not (stop or evaluates or saves):
                continue
            stop |= self._conclude(state, *waiting)
            waiting = None
            # Who asks to stop may not wait for long: a run taken up again evaluates in its stead.
            evaluated = not evaluates or (not stop and self._evaluate(state, done))
            stop |= not evaluated
            if saves or stop:
                self._save(state, done, evaluated, wait=stop or last)
            if stop:
                return state, done, True
            self.clock.resume()
        self._end_profile()
        return state, self.schedule.steps, False

    def _conclude(self, state: training.State, step: int, values: dict[str, jax.Array]) -> bool:
        """Takes in the metrics of a step; returns whether any process was asked to stop."""
        numbers = jax.device_get(values)
        self.clock.count()
        finite, stop = numbers.pop("finite"), numbers.pop("stop")
        if not finite.all():
            self._fail(state, step, finite)
        done = step + 1
        if self.schedule.is_due(self.schedule.log_every, done):
            numbers = {name: float(x) for name, x in numbers.items()}
            times = self.clock.times()
            self._log({"step": done, "train": numbers, "time": times})
            self.line.show(done, numbers, times,
                           self.clock.remaining(self.schedule.steps - done))
        return bool(stop)

    def _log(self, record: dict[str, Any]) -> None:
        if self.is_first_process:
            self.writer.write(record)

    def _save(self, state: training.State, done: int, evaluated: bool, wait: bool) -> None:
        if self.is_first_process:
            self.writer.sync()
        training.save(self.checkpointer, self.program, state, done,
                      {**self.record, "evaluated": evaluated}, wait)

    @functools.cached_property
    def _loss(self):
        return training.make_evaluation(self.program)

    def _evaluate(self, state: training.State, done: int) -> bool:
        """Evaluates and logs, and returns True, or False where a process was asked to stop."""
        found = self._measure(state, done, final=False)
        if found:
            self.line.say(f"held out after step {done}: "
                          + ", ".join(f"{name} {x:.4g}" for name, x in found.items()))
        return found is not None

    def _measure(self, state: training.State, done: int, final: bool) -> dict[str, float] | None:
        """The held-out metrics, logged, or None where a process was asked to stop."""
        params, base = state.get("ema", state["params"]), state["base"]

        def measure(batch: Batch):
            placed = feed.place(lambda rows: {name: x[rows] for name, x in batch.items()},
                                self.batch_size, self.program.batch_sharding)
            signals = feed.signals(self.program.mesh, done, self.stop_requested)
            total, weight, stats, stop = jax.device_get(
                self._loss(params, base, placed, signals))
            if stop:
                raise _Stopped
            return float(total), float(weight), stats

        try:
            found = self.task.evaluate(measure, final)
        except _Stopped:
            return None
        if found:
            self._log({"step": done, "final" if final else "heldout": found,
                       "time": self.clock.times()})
        return found

    def _finish(self, state: training.State) -> bool:
        """The last evaluation and what is told of the run; False where it was asked to stop."""
        found = self._measure(state, self.schedule.steps, final=True)
        if found is None:
            return False
        if self.is_first_process:
            runs = [self.folder, *self.compare]
            self.task.draw(self.folder, {path.absolute().name: metrics.read(path / metrics.FILE)
                                         for path in runs})
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024)
        self.line.say(f"{self.task.summarize(found)}; {time.monotonic() - self.clock.began:.0f} s, "
                      f"{peak / 2**30:.2f} GiB of memory at the most; in {self.folder}")
        return True

    def _begin_profile(self, step: int) -> None:
        """Starts the profile that is due before `step`, or was due before a run was taken up."""
        if self.schedule.profile is None or self.profiling:
            return
        first, last = self.schedule.profile
        if first <= step <= last:
            jax.profiler.start_trace(self.folder / "profile")
            self.profiling = True

    def _end_profile(self) -> None:
        if self.profiling:
            jax.profiler.stop_trace()
            self.profiling = False
            self.line.say(f"profile in {self.folder / 'profile'}")

    def _fail(self, state: training.State, step: int, finite: Any) -> NoReturn:
        """Saves what is good, finds out what is not, and raises.

        The state is as it was before the failed step: the step function has kept it.
        """
        ids = self.task.ids(step)
        names = [name for name, good in zip(training.finite_names(self.program), finite,
                                            strict=True) if not good]
        self.checkpointer.wait()  # A save still under way is not listed yet.
        if step not in self.checkpointer.steps():
            self._save(state, step, evaluated=True, wait=True)
        self.line.say(f"step {step + 1}: {names[0]} is not finite; looking for the cause")
        try:
            first = self._find_nonfinite(state, step)
        except Exception as error:  # The failed step is the news, not a failed search.
            first = f"not found ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        if self.is_first_process:
            workdir.write_json(self.folder / "failure.json", {
                "after_step": step, "example_ids": ids, "not_finite": names, "first": first})
        count = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise RuntimeError(
            f"step {step + 1}, of examples {ids[0]} to {ids[-1]}: {names[0]}{count} not finite; "
            f"first non-finite tensor: {first}; the state before it is saved as step {step} in "
            f"{self.folder}; lower the learning rate, or look at these examples (failure.json)")

    def _find_nonfinite(self, state: training.State, step: int) -> str:
        program = self.program
        model = program.model(abstract=False)
        definition, fresh = zoo.protocol.split(model)
        differentiate = training.make_gradients(program, definition)

        def compute(params, base, batch):
            return differentiate(params, batch, training.step_key(program, step), base)

        batch = self._place(step)
        initial, base = program.begin(fresh)
        inputs = {"params": state["params"], "base": state["base"], "batch": batch}
        sound = jax.tree.map(lambda x: jnp.nan_to_num(x, posinf=0.0, neginf=0.0), batch)
        found = nonfinite.find(compute, inputs,
                               {"params": initial, "base": base, "batch": sound},
                               program.replicated)
        if found is None:  # Then a gradient is finite, but not its square.
            inputs = {"gradients": jax.jit(compute)(**inputs)[3]}
            found = nonfinite.find(training.squared_norms, inputs,
                                   jax.tree.map(jnp.zeros_like, inputs), program.replicated)
        return found or "none when computed one by one, so it overflowed within a fused operation"
