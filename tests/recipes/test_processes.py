"""Jobs of several processes on this machine: training, resuming, stopping and dying together."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.recipes import small_run
from tests.tolerances import RESHARDED, assert_close

STEPS = 8
OPTIONS = ("--set=num_layers=1", "--ema=0.9", "--learning_rate=0.01", "--warmup_steps=3",
           "--schedule=constant")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


class Job:
    """`recipes.train` in `count` processes with a device each; a log for each."""

    def __init__(self, folder: Path, corpus: Path, count: int, *more: str):
        joined = [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
        self.logs = [folder / f"log.{count}.{i}" for i in range(count)]
        flags = small_run.flags(corpus, folder / "run", *OPTIONS, *more)
        self.processes = [
            small_run.start(*flags, *((*joined, f"--process_id={i}") if count > 1 else ()),
                            log=log)
            for i, log in enumerate(self.logs)]

    def output(self) -> str:
        return "\n".join(f"[{log.name}]\n{log.read_text()}" for log in self.logs)

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit statuses of all."""
        deadline = time.monotonic() + timeout
        try:
            return [p.wait(deadline - time.monotonic()) for p in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s\n{self.output()}") from None
        finally:
            for process in self.processes:
                process.kill()

    def wait_for_steps(self) -> None:
        """Returns once a few steps have been taken."""
        deadline = time.monotonic() + 120
        while not any(line.startswith("step") for line in self.logs[0].read_text().splitlines()):
            assert time.monotonic() < deadline, self.output()
            assert all(p.poll() is None for p in self.processes), self.output()
            time.sleep(0.05)


@pytest.fixture
def corpus(tmp_path):
    return small_run.write_corpus(tmp_path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    job = Job(folder, small_run.write_corpus(folder), 1, f"--steps={STEPS}")
    assert job.wait() == [0], job.output()
    return small_run.losses(folder / "run")


def check(workdir, expected):
    got = small_run.losses(workdir)
    assert list(got) == list(expected)
    assert_close(np.array(list(got.values())), np.array(list(expected.values())), RESHARDED)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(folder, corpus, job) of the first half of the run, in two processes."""
    folder = tmp_path_factory.mktemp("pair")
    corpus = small_run.write_corpus(folder)
    job = Job(folder, corpus, 2, f"--steps={STEPS // 2}")
    assert job.wait() == [0, 0], job.output()
    return folder, corpus, job


def test_two_processes_train_as_one_does(pair, alone):
    folder, _, job = pair
    check(folder / "run", {s: x for s, x in alone.items() if s <= STEPS // 2})
    # One of them shows and writes; the other is silent.
    lines = [x for x in job.logs[1].read_text().splitlines() if not x.startswith("[Gloo]")]
    assert lines == []


def test_two_processes_resume(pair, alone):
    folder, corpus, _ = pair
    job = Job(folder, corpus, 2, f"--steps={STEPS}")
    assert job.wait() == [0, 0], job.output()
    assert f"going on after step {STEPS // 2}" in job.output()
    check(folder / "run", alone)


def test_sigterm_to_one_saves_the_same_step_on_both(tmp_path, corpus, alone):
    job = Job(tmp_path, corpus, 2, "--steps=100000", "--eval_every=0", "--save_every=0")
    job.wait_for_steps()
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.wait(60) == [0, 0], job.output()
    stopped = int(job.output().partition("stopped after step ")[2].partition(",")[0])
    folder = tmp_path / "run" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == [f"step_{stopped:08d}"]
    assert len(list((folder / f"step_{stopped:08d}").glob("manifest-*-of-00002.json"))) == 2
    got = small_run.losses(tmp_path / "run")
    assert max(got) == stopped
    common = sorted(got.keys() & alone.keys())
    assert_close(np.array([got[s] for s in common]), np.array([alone[s] for s in common]),
                 RESHARDED)


def test_sigterm_to_one_ends_the_final_evaluation_of_both(tmp_path):
    corpus = small_run.write_corpus(tmp_path, documents=4000)
    job = Job(tmp_path, corpus, 2, "--steps=1", "--heldout=0.95")
    job.wait_for_steps()
    began = time.monotonic()
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.wait(60) == [0, 0], job.output()
    assert "stopped after step 1, which is saved" in job.logs[0].read_text(), job.output()
    assert all("final" not in record for record in small_run.records(tmp_path / "run"))
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("victim", [0, 1])
def test_sigkill_of_one_ends_the_other_with_a_message(tmp_path, corpus, victim):
    job = Job(tmp_path, corpus, 2, "--steps=100000")
    job.wait_for_steps()
    job.processes[victim].kill()
    statuses = job.wait(60)
    assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] not in (0, -signal.SIGKILL)
    survivor = job.logs[1 - victim].read_text()
    assert "one of them has probably died" in survivor or "another task died" in survivor


def read_ids(count, corpus):
    """The digests that `count` processes print; they must agree."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu",
                   "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    child, port = Path(__file__).with_name("processes_child.py"), str(free_port())
    children = [
        subprocess.Popen([sys.executable, str(child), port, str(count), str(i), str(corpus)],
                         env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True)
        for i in range(count)]
    outputs = [c.communicate(timeout=120) for c in children]
    assert all(c.returncode == 0 for c in children), outputs
    digests = {out.split()[-1] for out, _ in outputs}
    assert len(digests) == 1
    return digests.pop()


def test_any_number_of_processes_sees_the_same_examples(corpus):
    assert read_ids(2, corpus) == read_ids(1, corpus) == read_ids(4, corpus)


@pytest.mark.slow
def test_a_run_goes_from_two_processes_to_one_to_four(tmp_path, corpus, alone):
    for count, steps in ((2, 3), (1, 5), (4, STEPS)):
        job = Job(tmp_path, corpus, count, f"--steps={steps}")
        assert job.wait(240) == [0] * count, job.output()
    check(tmp_path / "run", alone)
