"""`recipes.bench`: small cases of the kernels suite on this CPU, its table, JSON and errors; what
the other suites share."""

import json

import pytest
from rich.console import Console

import pallas_kernels
from pallas_kernels import cases, tuned
from recipes import bench, command
from recipes.benchmarks import peer, xlstm
from recipes.benchmarks.peer import Peer
from tests.pallas_kernels import toy


def run(*flags):
    return command.execute(bench.main, ["bench", "--suite=kernels", "--rounds=1", *flags])


def test_times_a_case_against_its_definition(tmp_path, capsys):
    out = tmp_path / "result.json"
    assert run("--op=^toy$", "--case=cubes", "--compare=plain,jax", f"--out={out}") == 0
    printed = capsys.readouterr().out
    assert "CPU times say nothing" in printed and "toy cubes" in printed
    assert "jax: has no such call" in printed.replace("\n", " ")
    result = json.loads(out.read_text())
    assert result["chip"] == "cpu" and result["ceilings"]["flops"] > 1e8
    (row,) = result["results"]
    assert set(row["sides"]) == {"xla", "plain"}
    for side in row["sides"].values():
        assert 0 < side["forward_seconds"] < side["with_backward_seconds"] * 10
        assert side["forward_of_roofline"] == pytest.approx(
            row["floor_seconds"][0] / side["forward_seconds"])


def test_tuning_writes_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    assert run("--op=^toy$", "--case=squares", "--compare=", "--tune") == 0
    (entry,) = json.loads((tmp_path / "cpu.json").read_text())["entries"]
    assert entry["op"] == "toy" and entry["implementation"] == "xla"
    assert entry["milliseconds"] > 0
    assert "wrote 1 entries" in capsys.readouterr().out


def test_every_op_counts_its_work():
    for op in pallas_kernels.ops().values():
        module = op.module("cases")
        for case in cases.of(op):
            if not case.compiled:
                flops, size = module.work(case.operands("float32"), case.options)
                assert flops > 0 and size > 0
        assert module.BACKWARD >= 1


@pytest.mark.parametrize(("flags", "message"), [
    (["--compare=toch"], "--compare has toch; it takes"),
    (["--op=nosuch"], "no case matches op='nosuch'"),
    (["--op=^toy$", "--dtype=bfloat16"], "no case matches op='^toy$' case='' in bfloat16"),
    (["--suite=xlstm", "--cells=4x512x64"], "--cells has '4x512x64'; it takes batch, length"),
    (["--suite=xlstm", "--cells=0x5x1x4"], "--cells has '0x5x1x4'"),
    (["--suite=xlstm", "--cells=", "--lengths=8,0"], "--lengths=8,0: '0' is no positive number"),
    (["--suite=lm", "--decode_batches=a"], "--decode_batches=a: 'a' is no positive number"),
    (["--suite=lm", "--rounds=0"], "--rounds=0: it must be at least 1"),
    (["--suite=xlstm", "--model=lstm-tiny"], "--model=lstm-tiny is no xLSTM"),
    (["--suite=segment", "--model=llama-tiny"], "which is for language; give one for segmentation"),
    (["--suite=segment", "--train_steps=0"], "--train_steps=0: it must be at least 1"),
])
def test_errors_are_one_line(flags, message, capsys):
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_side_with_other_results_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(toy.toy.module("reference"), "toy", lambda x, scale: 2 * x)
    assert run("--op=^toy$", "--case=squares") == 2
    assert "plain and xla differ by more than" in capsys.readouterr().err


def test_cells_are_timed_without_their_peer(monkeypatch):
    monkeypatch.setattr(peer, "PAUSE_SECONDS", 0)
    found = xlstm._time_cells([(1, 3, 2, 4)], 1, False, Console())
    (passes,) = found.values()
    assert passes.keys() == {"forward", "both"}
    assert all(x["ratio"] is None and x["seconds"]["parazoo"] > 0 for x in passes.values())


@pytest.mark.parametrize(("ratios", "length"), [
    ({512: 0.8, 1024: 1.1, 2048: 1.3}, 1024),
    ({512: 1.2, 1024: 0.9, 2048: 1.3}, 2048),
    ({512: 1.2, 1024: 1.0}, 512),
    ({512: 1.2, 1024: 0.9}, None),
])
def test_crossover(ratios, length):
    """Ahead for good, not by chance in between."""
    assert xlstm.crossover(ratios) == length


def test_a_peer_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="the peer cannot run: .*Error: "):
        Peer("recipes.benchmarks.peer_flashrnn", {})


def test_a_peer_counts_by_its_best_mode(monkeypatch):
    monkeypatch.setattr(peer, "PAUSE_SECONDS", 0)
    modes = {"slow": lambda: 8.0, "fast": lambda: 2.0}
    jobs = {"train": peer.Job(8, lambda: 4.0, modes), "infer": peer.Job(8, lambda: 1.0)}
    console = Console(record=True, width=100)
    found = peer.compare(jobs, 3, "images", "title", console)
    assert found["train"]["peer"] == {"slow": 1.0, "fast": 4.0}
    assert (found["train"]["parazoo"], found["train"]["ratio"]) == (2.0, 0.5)
    assert (found["infer"]["parazoo"], found["infer"]["ratio"]) == (8.0, None)
    rows = [line.split("│")[1:-1] for line in console.export_text().splitlines() if "│" in line]
    assert ["train", "2.0", "4.0", "fast", "0.50"] in [[x.strip() for x in row] for row in rows]


def test_sides_take_turns(monkeypatch):
    monkeypatch.setattr(peer, "PAUSE_SECONDS", 0)
    order = []

    def side(name):
        return lambda: order.append(name) or len(order)

    assert peer.in_turns({"a": side("a"), "b": side("b")}, 2) == {"a": [3, 5], "b": [4, 6]}
    assert order == ["a", "b"] * 3
