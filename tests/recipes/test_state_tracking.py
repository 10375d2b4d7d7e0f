"""The strings of state tracking, what is measured of them, and what is refused."""

import numpy as np
import pytest

import zoo
from recipes import command, train
from recipes.tasks.state_tracking import StateTracking, strings


def make(**options):
    return StateTracking(zoo.config("llama-tiny", max_length=64), **{
        "seq_len": 10, "batch_size": 4, **options})


def test_labels_are_the_parity_so_far_and_padding_has_none():
    batch = strings(3, range(50), 12)
    lengths = set()
    for row in range(50):
        length = int(batch["weights"][row].sum())
        lengths.add(length)
        text = bytes(batch["tokens"][row, :length].astype(np.uint8)).decode()
        assert set(text) <= {"0", "1"}
        for end in range(1, length + 1):
            assert batch["labels"][row, end - 1] - ord("0") == text[:end].count("1") % 2
        for name, fill in (("tokens", 0), ("segment_ids", 0), ("positions", 0), ("weights", 0)):
            assert (batch[name][row, length:] == fill).all()
        assert (batch["segment_ids"][row, :length] == 1).all()
        assert (batch["positions"][row, :length] == np.arange(length)).all()
    assert min(lengths) >= 1 and max(lengths) == 12 and len(lengths) > 8


def test_a_string_depends_on_seed_and_number_alone():
    task = make()
    whole, part = task.batch(2, np.arange(4)), task.batch(2, np.array([1, 3]))
    for name, x in whole.items():
        np.testing.assert_array_equal(x[[1, 3]], part[name])
    assert task.ids(2) == [8, 9, 10, 11]
    assert (task.batch(1, np.arange(4))["tokens"] != whole["tokens"]).any()
    assert (make(seed=1).batch(2, np.arange(4))["tokens"] != whole["tokens"]).any()
    held = strings(0, [0], 10, np.array([10]), stream=1)
    assert (held["tokens"] != strings(0, [0], 10, np.array([10]))["tokens"]).any()


def test_accuracy_is_by_ranges_of_positions():
    task, seen = make(eval_batches=2), []

    def right_up_to_25(batch):
        seen.append(batch["tokens"])
        weights = batch["weights"]
        right = weights * (np.arange(weights.shape[1]) < 25)
        return 0.0, float(weights.sum()), {"accuracy": right.sum(axis=0)}

    found = task.evaluate(right_up_to_25, final=False)
    assert found == {"accuracy_10": 1.0, "accuracy_20": 1.0, "accuracy_30": 0.5,
                     "accuracy_40": 0.0, "accuracy_50": 0.0, "accuracy_60": 0.0}
    assert {x.shape for x in seen} == {(4, 60)}
    assert len(np.unique(np.concatenate(seen), axis=0)) == 8
    assert "100.0% of positions 1 to 10" in task.summarize(found)
    assert "0.0% of positions 51 to 60" in task.summarize(found)


def test_the_picture_shows_all_runs(tmp_path):
    task, sizes = make(), []
    run = [{"step": 1, "train": {}}, {"step": 2, "final": {"accuracy_10": 1.0, "accuracy_20": 0.5}}]
    for runs in ({"a": []}, {"a": run}, {"a": run, "b": run}):
        task.draw(tmp_path, runs)
        picture = (tmp_path / "accuracy.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        sizes.append(len(picture))
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize(("options", "words"), [
    ({"seq_len": 65}, "seq_len 65: it must be in 1..64"),
    ({"eval_batches": 0}, "eval_batches 0: it must be at least 1"),
])
def test_sizes_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)


def test_flags_of_other_tasks_and_runs_that_are_not_there_are_refused(tmp_path, capsys):
    def run(*flags):
        return command.execute(train.main, [
            "train", "--task=state_tracking", f"--workdir={tmp_path / 'a'}", *flags])

    assert run("--data=stdlib") == 2
    assert "--data is of --task=lm and segment; leave it out" in capsys.readouterr().err
    assert run("--seq_len=16", f"--compare={tmp_path}") == 2
    assert "there is no run in" in capsys.readouterr().err
    assert run("--set=vocab_size=100") == 2
    assert "vocab_size 100: the strings are bytes" in capsys.readouterr().err
    assert not (tmp_path / "a" / "config.json").exists()


def test_it_is_trained_as_other_tasks_are(tmp_path, capsys):
    small = "--set=num_layers=1,width=16,attention.num_heads=2,attention.num_kv_heads=2," \
            "attention.head_dim=8,mlp.hidden=16"
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, more in zip(folders, ([], [f"--compare={folders[0]}"]), strict=True):
        assert command.execute(train.main, [
            "train", "--task=state_tracking", small, "--seq_len=8", "--batch_size=8", "--steps=4",
            "--eval_every=2", "--eval_batches=1", f"--workdir={folder}", *more]) == 0
        assert "of positions 1 to 8, the lengths of training, and at" in capsys.readouterr().out
    sizes = [(folder / "accuracy.png").stat().st_size for folder in folders]
    assert sizes[1] > sizes[0]
