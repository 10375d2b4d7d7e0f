"""Stopping and going on: bit for bit the same as never having stopped."""

import json
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from recipes import feed, loop, metrics, packing
from tests.recipes import small_run
from tests.tolerances import EXACT, RESHARDED, assert_close
from zoo.checkpoint import Checkpointer, describe

STEPS = 14
OPTIONS = (f"--steps={STEPS}", "--ema=0.9", "--accumulate=2", "--warmup_steps=3",
           "--learning_rate=0.01", "--keep_last=2")


def restore(workdir, step=STEPS):
    """All arrays of a checkpoint."""
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        target = {path: jax.ShapeDtypeStruct(shape, dtype)
                  for path, (shape, dtype) in describe(workdir / "checkpoints", step).items()}
        nested: dict = {}
        for path, leaf in target.items():
            *parents, name = path.split("/")
            node = nested
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = leaf
        return checkpointer.restore(nested, step)[0]


def check_same(workdir, expected, step=STEPS):
    assert small_run.records(workdir) == small_run.records(expected)
    assert_close(restore(workdir, step), restore(expected, step), EXACT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(corpus, workdir) of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    corpus = small_run.write_corpus(folder)
    done = small_run.start(*small_run.flags(corpus, folder / "run", *OPTIONS))
    output, _ = done.communicate(timeout=120)
    assert done.returncode == 0, output
    return corpus, folder / "run"


def launch(corpus, workdir, *more, devices=1):
    return small_run.start(*small_run.flags(corpus, workdir, *OPTIONS, *more), devices=devices)


def kill_and_go_on(corpus, workdir, rounds, seed):
    """Runs to the end through so many SIGKILLs at random moments; returns how many hit."""
    rng, hits = random.Random(seed), 0
    for _ in range(rounds):
        child = launch(corpus, workdir)
        while not (workdir / "metrics.jsonl").exists() and child.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 1.5))
        child.kill()
        output, _ = child.communicate()
        hits += child.returncode == -signal.SIGKILL
        assert child.returncode in (0, -signal.SIGKILL), output
    child = launch(corpus, workdir)
    output, _ = child.communicate(timeout=120)
    assert child.returncode == 0, output
    return hits


def test_sigkill_at_random_moments_changes_nothing(whole, tmp_path):
    corpus, expected = whole
    assert kill_and_go_on(corpus, tmp_path / "run", rounds=1, seed=0)
    check_same(tmp_path / "run", expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_sigkill_at_many_random_moments_changes_nothing(whole, tmp_path, seed):
    corpus, expected = whole
    assert kill_and_go_on(corpus, tmp_path / "run", rounds=6, seed=seed)
    check_same(tmp_path / "run", expected)


def test_sigterm_saves_and_succeeds(whole, tmp_path):
    corpus, expected = whole
    child = launch(corpus, tmp_path / "run", "--log_every=1")
    for line in child.stdout:
        if line.startswith("step  2/"):
            break
    child.terminate()
    output = child.stdout.read()
    assert child.wait(timeout=60) == 0, output
    stopped = int(output.partition("stopped after step ")[2].partition(",")[0])
    saved = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved[-1] == f"step_{stopped:08d}"
    child = launch(corpus, tmp_path / "run")
    output, _ = child.communicate(timeout=120)
    assert child.returncode == 0 and f"going on after step {stopped}" in output
    check_same(tmp_path / "run", expected)


EVALUATED = ("--steps=6", "--mesh=fsdp:1", "--heldout=0.4", "--eval_batches=8")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(corpus, workdir) of a short run that was never stopped, in this process."""
    folder = tmp_path_factory.mktemp("evaluated")
    corpus = small_run.write_corpus(folder)
    assert small_run.run(*small_run.flags(corpus, folder / "run", *EVALUATED)) == 0
    return corpus, folder / "run"


@pytest.fixture
def batches(monkeypatch):
    """The batches that evaluations have asked for; `batches.stop_at` of them, SIGTERM comes."""
    class Batches(list):
        stop_at = None

    found, whole = Batches(), packing.eval_batches

    def eval_batches(*args):
        for batch in whole(*args):
            if len(found) == found.stop_at:
                signal.raise_signal(signal.SIGTERM)
            found.append(batch)
            yield batch

    monkeypatch.setattr(packing, "eval_batches", eval_batches)
    return found


@pytest.mark.parametrize(("stop_at", "step"), [(2, 4), (10, 6)], ids=["held out", "final"])
def test_sigterm_ends_an_evaluation(evaluated, tmp_path, capsys, batches, stop_at, step):
    """With the batch at hand, and what it leaves out is made up for."""
    corpus, expected = evaluated
    flags = small_run.flags(corpus, tmp_path / "run", *EVALUATED)
    batches.stop_at = stop_at
    assert small_run.run(*flags) == 0
    assert len(batches) == stop_at + 1  # The one that brought the news, and no more.
    assert f"stopped after step {step}, which is saved" in capsys.readouterr().out
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        assert checkpointer.latest() == step
    done = [r for r in small_run.records(expected) if r["step"] <= step]
    assert small_run.records(tmp_path / "run") == done[:-1]
    batches.stop_at = None
    assert small_run.run(*flags) == 0
    check_same(tmp_path / "run", expected, 6)


def test_sigterm_saves_instead_of_evaluating(evaluated, tmp_path, monkeypatch, batches):
    """The step after which it is learnt of is one after which an evaluation is due."""
    corpus, expected = evaluated
    flags = small_run.flags(corpus, tmp_path / "run", *EVALUATED)
    signals = feed.signals
    with monkeypatch.context() as patch:
        patch.setattr(feed, "signals",
                      lambda mesh, step, stop: signals(mesh, step, stop or step == 3))
        assert small_run.run(*flags) == 0
    assert not batches
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        assert checkpointer.steps() == [4]
    assert small_run.run(*flags) == 0
    check_same(tmp_path / "run", expected, 6)


@pytest.fixture
def stopped(whole, tmp_path):
    """(corpus, workdir) of a copy of the run as it stood after step 12."""
    corpus, workdir = whole
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}")
    return corpus, tmp_path / "run"


def go_on(corpus, workdir, *more):
    return small_run.run(*small_run.flags(corpus, workdir, *OPTIONS, *more))


def test_going_on_otherwise_laid_out_gives_the_same_to_rounding(stopped, whole):
    corpus, workdir = stopped
    assert go_on(corpus, workdir, "--mesh=data:2,tensor:2", "--stacked=true") == 0
    got, expected = small_run.losses(workdir), small_run.losses(whole[1])
    assert got.keys() == expected.keys()
    assert_close(np.array(list(got.values())), np.array(list(expected.values())), RESHARDED)
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        assert checkpointer.latest() == STEPS


def test_a_damaged_checkpoint_is_passed_over_aloud(whole, tmp_path, capsys, monkeypatch):
    corpus, workdir = tmp_path / "corpus.jsonl", tmp_path / "run"
    shutil.copy(whole[0], corpus)
    shutil.copytree(whole[1], workdir)
    newest = max((workdir / "checkpoints").iterdir())
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    monkeypatch.setattr(loop._Run, "_steps", lambda *_: (None, 12, True))  # No need to compile.
    assert go_on(corpus, workdir, "--mesh=fsdp:1") == 0
    output = capsys.readouterr()
    assert f"going on after step 12 of {workdir}" in output.out
    assert "is damaged" in output.err and "newest whole" in output.err


CHANGES = [
    (["--set=num_layers=3"], "model.num_layers: 2 -> 3"),
    (["--learning_rate=0.02"], "training.learning_rate: 0.01 -> 0.02"),
    (["--seed=5"], "training.seed: 0 -> 5"),
    (["--batch_size=16"], "training.batch_size: 8 -> 16"),
    (["--accumulate=1"], "training.accumulate: 2 -> 1"),
    (["--optimizer=lion"], 'training.optimizer: "adamw" -> "lion"'),
    (["--ema=0"], "training.ema: 0.9 -> null"),
    (["--seq_len=16"], "data.seq_len: 32 -> 16"),
    (["--z_loss=0.1"], "task.z_loss: 0.0 -> 0.1"),
    (["--compute_dtype=bfloat16"], 'training.compute_dtype: "float32" -> "bfloat16"'),
    (["--steps=20"], "is a run of 14 steps, of which 14 are done"),
    (["--steps=10"], "has 14 steps behind it already"),
]


@pytest.mark.parametrize(("flags", "words"), CHANGES, ids=[flags[0] for flags, _ in CHANGES])
def test_another_configuration_is_refused_with_the_difference(whole, flags, words, capsys):
    corpus, workdir = whole
    before = sorted((p, p.stat().st_mtime_ns) for p in workdir.rglob("*") if p.is_file())
    assert go_on(corpus, workdir, "--mesh=fsdp:1", *flags) == 2
    error = capsys.readouterr().err
    assert words in error and "another --workdir" in error and error.count("\n") == 1
    assert sorted((p, p.stat().st_mtime_ns) for p in workdir.rglob("*") if p.is_file()) == before


def test_another_corpus_is_refused_with_the_difference(whole, tmp_path, capsys):
    other = small_run.write_corpus(tmp_path, documents=61)
    assert go_on(other, whole[1], "--mesh=fsdp:1") == 2
    error = capsys.readouterr().err
    assert "data.documents: 60 -> 61" in error and "data.sha256: " in error


def test_the_same_corpus_elsewhere_is_the_same(whole, tmp_path, capsys, monkeypatch):
    shutil.copytree(whole[1], tmp_path / "run")
    monkeypatch.setattr(loop._Run, "_finish", lambda *_: True)
    moved = shutil.copy(whole[0], tmp_path / "moved.jsonl")
    assert go_on(moved, tmp_path / "run", "--mesh=fsdp:1") == 0


@pytest.mark.parametrize("contents", ["[1]", "null", '"text"', "{", ""])
def test_a_config_that_is_no_object_is_refused(whole, tmp_path, capsys, contents):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(contents)
    assert go_on(whole[0], tmp_path / "run", "--mesh=fsdp:1") == 2
    error = capsys.readouterr().err
    assert "config.json is no JSON object; restore it" in error and error.count("\n") == 1
    assert (tmp_path / "run" / "config.json").read_text() == contents


def test_the_checkpoint_itself_knows_its_run(whole, tmp_path, capsys):
    shutil.copytree(whole[1], tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    assert go_on(whole[0], tmp_path / "run", "--mesh=fsdp:1", "--seed=5") == 2
    assert "training.seed: 0 -> 5" in capsys.readouterr().err


def test_a_constant_schedule_can_go_on_for_longer(tmp_path):
    corpus = small_run.write_corpus(tmp_path)

    def run(name, steps):
        flags = small_run.flags(corpus, tmp_path / name, f"--steps={steps}", "--save_every=0",
                                "--schedule=constant", "--mesh=fsdp:1", "--eval_every=0")
        assert small_run.run(*flags) == 0
        return small_run.records(tmp_path / name)

    run("part", 3)
    assert run("part", 6) == run("whole", 6)


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    writer = metrics.Writer(tmp_path, 0)
    for step in range(1, 6):
        writer.write({"step": step, "train": {"loss": 1 / step}, "time": {}})
    writer.write({"step": 5, "final": {"loss": 0.1}, "time": {}})
    writer.close()
    path = tmp_path / metrics.FILE
    with path.open("a") as file:
        file.write('{"step": 6, "tra')  # As a killed process leaves it.
    assert len(metrics.read(path)) == 6
    metrics.Writer(tmp_path, 5).close()
    assert [r["step"] for r in metrics.read(path)] == [1, 2, 3, 4, 5]
    metrics.Writer(tmp_path, 3).close()
    assert [r["step"] for r in metrics.read(path)] == [1, 2, 3]
    path.write_text("not json\n" + json.dumps({"step": 1}) + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl:1 is not a record"):
        metrics.Writer(tmp_path, 3)
    assert path.read_text().startswith("not json")


def test_tensorboard_gets_the_numbers(whole):
    pytest.importorskip("tensorboardX")
    events = list((whole[1] / "tensorboard").glob("events.*"))
    assert events and sum(p.stat().st_size for p in events) > 1000
