"""Runs that start from given weights: which these are, going on without them, errors."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from recipes import command, convert, decode, feed, training
from tests.recipes import small_run
from tests.tolerances import EQUAL, EXACT, assert_close
from zoo.checkpoint import Checkpointer, describe

STEPS = 6
SHORT = ("--seq_len=32", "--batch_size=8", "--heldout=0.4", "--eval_batches=2", "--log_every=1",
         "--mesh=fsdp:1", f"--steps={STEPS}", "--save_every=2", "--eval_every=0",
         "--warmup_steps=0")
LORA = ("--lora_rank=2", "--lora_targets=query,mlp/up", "--learning_rate=0.03", "--ema=0.5",
        "--set=dropout=0.1")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(corpus, workdir) of a run from the start."""
    folder = tmp_path_factory.mktemp("source")
    corpus = small_run.write_corpus(folder)
    assert small_run.run(*small_run.flags(corpus, folder / "run", *SHORT, "--set=dropout=0")) == 0
    return corpus, folder / "run"


def tune(corpus, workdir, given, *more):
    """The exit status of a run that starts from given weights."""
    flags = (f"--data={corpus}", f"--workdir={workdir}", f"--init_from={given}", *SHORT, *more)
    return small_run.run(*flags)


@pytest.fixture(scope="module")
def adapted(source, tmp_path_factory):
    """The workdir of a run of adapters that was never stopped."""
    workdir = tmp_path_factory.mktemp("adapted") / "run"
    assert tune(*source[:1], workdir, source[1], *LORA) == 0
    return workdir


def params(directory, **options):
    return zoo.protocol.to_stacked(
        zoo.protocol.split(training.load_model(directory, **options)[0])[1])


def arrays(workdir):
    """All that the last checkpoint holds."""
    held = describe(workdir / "checkpoints", STEPS)
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        return checkpointer.restore(
            {path: jax.ShapeDtypeStruct(*kind) for path, kind in held.items()}, STEPS)[0]


def final(workdir):
    return small_run.records(workdir)[-1]["final"]


def test_full_fine_tuning_starts_where_the_source_ends(source, tmp_path):
    corpus, given = source
    still = ("--steps=1", "--learning_rate=1e-30", "--weight_decay=0", "--seed=3")
    known = ("--model=llama-tiny", small_run.MODEL, "--set=dropout=0")  # That is the model there.
    assert tune(corpus, tmp_path / "run", given, *still, *known) == 0
    assert_close(final(tmp_path / "run"), final(given), EQUAL)
    assert_close(params(tmp_path / "run"), params(given), EQUAL)
    assert not (tmp_path / "run" / "base").exists()
    model, _, _ = training.load_model(given)
    assert training.load_model(tmp_path / "run")[0].config == model.config


def test_adapters_learn_and_are_merged(source, adapted, capsys):
    corpus, given = source
    assert final(adapted)["nats_per_byte"] < final(given)["nats_per_byte"] - 0.02
    merged, before = params(adapted), params(given)
    kernel = merged["stack"]["blocks"]["0"]["mixer"]["query"].pop("kernel")
    change = kernel - before["stack"]["blocks"]["0"]["mixer"]["query"].pop("kernel")
    assert np.linalg.matrix_rank(np.reshape(change[0], (32, 32)), 1e-4) == 2
    merged["stack"]["blocks"]["0"]["mlp"].pop("up")
    before["stack"]["blocks"]["0"]["mlp"].pop("up")
    assert_close(merged, before, EXACT)
    # Its checkpoints hold adapters alone.
    held = describe(adapted / "checkpoints", STEPS)
    assert {p.split("/")[-1] for p in held if p.startswith("params")} == {"a", "b"}
    assert sum(np.prod(s) for s, _ in held.values()) < 0.5 * sum(
        x.size for x in jax.tree.leaves(before))
    low = params(adapted, dtype="bfloat16", stacked=True)
    assert {x.dtype for x in jax.tree.leaves(low)} == {jnp.dtype("bfloat16")}
    decoding = ["decode", f"--checkpoint={adapted}", "--prompt=def ", "--max_new_tokens=3"]
    assert command.execute(decode.main, decoding) == 0


def test_adapters_are_merged_into_an_export(adapted, tmp_path, capsys):
    """And what was exported can be trained further."""
    out = tmp_path / "theirs"
    flags = [f"--source={adapted}", "--to=hf", f"--out={out}", "--check"]
    assert command.execute(convert.main, ["convert", *flags]) == 0
    assert "hold the same numbers" in capsys.readouterr().out
    exported = zoo.protocol.to_stacked(zoo.protocol.split(zoo.from_hf(out))[1])
    assert_close(exported, params(adapted), EXACT)


def test_a_run_of_adapters_can_be_the_next_source(source, adapted, tmp_path):
    still = ("--steps=1", "--learning_rate=1e-30", "--weight_decay=0")
    assert tune(source[0], tmp_path / "run", adapted, *still) == 0
    assert_close(final(tmp_path / "run"), final(adapted), EQUAL)


def test_going_on_needs_the_source_no_more(source, adapted, tmp_path, monkeypatch):
    """And is bit for bit what never stopping is, in a workdir that was moved, too."""
    corpus = source[0]
    given = shutil.copytree(source[1], tmp_path / "given")
    signals = feed.signals
    with monkeypatch.context() as patch:
        patch.setattr(feed, "signals", lambda mesh, step, stop: signals(mesh, step, step == 2))
        assert tune(corpus, tmp_path / "run", given, *LORA) == 0
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        assert max(checkpointer.steps()) < STEPS
    shutil.rmtree(given)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert tune(corpus, tmp_path / "moved", given, *LORA) == 0
    assert small_run.records(tmp_path / "moved") == small_run.records(adapted)
    assert_close(*(arrays(workdir) for workdir in (tmp_path / "moved", adapted)), EXACT)
    assert_close(params(tmp_path / "moved"), params(adapted), EXACT)


def test_a_killed_start_is_made_good(source, adapted, tmp_path, monkeypatch, capsys):
    """The base is saved and no checkpoint yet; then it is saved no second time."""
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(training, "make_step", lambda program: {}["killed"])
        tune(source[0], tmp_path / "run", source[1], *LORA)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    base = tmp_path / "run" / "base" / "step_00000000" / "meta.json"
    written = base.stat().st_mtime_ns
    assert tune(source[0], tmp_path / "run", source[1], *LORA, "--steps=1") == 0
    assert base.stat().st_mtime_ns == written
    # Where all else is lost, it still knows what it is.
    (tmp_path / "run" / "config.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    capsys.readouterr()
    assert tune(source[0], tmp_path / "run", adapted, *LORA) == 2
    error = capsys.readouterr().err
    assert "base holds a run of another configuration (init_from: " in error
    assert not (tmp_path / "run" / "config.json").exists()


def test_weights_are_known_by_what_they_hold(source, adapted, tmp_path, capsys):
    corpus, given = source
    moved = shutil.copytree(given, tmp_path / "moved")
    assert tune(corpus, adapted, moved, *LORA) == 0
    other = shutil.copytree(given, tmp_path / "other")
    shutil.rmtree(other / "checkpoints" / f"step_{STEPS:08d}")  # Then step 4 is what it holds.
    capsys.readouterr()
    for changed, flags, words in ((other, LORA, "init_from: "),
                                  (given, (*LORA, "--lora_rank=3"), "lora.rank: 2 -> 3"),
                                  (given, LORA[2:], "lora.alpha: 4.0 -> null")):
        assert tune(corpus, adapted, changed, *flags) == 2
        error = capsys.readouterr().err
        assert "holds a run of another configuration" in error and words in error


def test_weights_that_are_not_finite_are_refused(source, tmp_path, capsys):
    corpus, given = source
    model, _, _ = training.load_model(given)
    model.embed.table[...] = model.embed.table[...].at[3, 4].set(jnp.nan)
    zoo.save(model, tmp_path / "model")
    for flags in ((), LORA):
        assert tune(corpus, tmp_path / "run", tmp_path / "model", *flags) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / 'model'}: embed/table holds numbers that are not finite" in error
        assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(("write", "stacked"), [("save", "true"), ("to_hf", "false")])
def test_a_directory_of_a_model_will_do(source, tmp_path, write, stacked):
    corpus, given = source
    model, _, _ = training.load_model(given)
    getattr(zoo, write)(model, tmp_path / "model")
    still = ("--steps=1", "--learning_rate=1e-30", "--weight_decay=0", f"--stacked={stacked}",
             *LORA[:2])
    assert tune(corpus, tmp_path / "run", tmp_path / "model", *still) == 0
    assert_close(final(tmp_path / "run"), final(given), EQUAL)
    again, tokenizer, meta = training.load_model(tmp_path / "model")
    assert tokenizer.vocab_size == 264 and meta == {}
    assert_close(zoo.protocol.split(again)[1], zoo.protocol.split(model)[1], EXACT)
    # Its checksums are those beside its files, and their own where none are.
    one = training.find_source(tmp_path / "model", tmp_path).fingerprint
    (tmp_path / "model" / "manifest.json").unlink(missing_ok=True)
    assert training.find_source(tmp_path / "model", tmp_path).fingerprint == one
    weights = next((tmp_path / "model").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert training.find_source(tmp_path / "model", tmp_path).fingerprint != one


ERRORS = [
    (["--lora_rank=-1"], "lora rank -1: it must be at least 1"),
    (["--lora_rank=40"], "lora rank 40 is above 16, the smaller side of"),
    (["--lora_rank=2", "--lora_targets=qeury"], "lora target 'qeury' matches no kernel"),
    (["--lora_alpha=2"], "--lora_alpha and --lora_targets need adapters"),
    (["--model=llama-60m"], "--model=llama-60m is another model than the one in"),
    (["--set=width=64"], "--set would make embed/table (264, 64), which is (264, 32) in"),
    (["--set=tie_embeddings=false"], "--set would make head (32, 264), which is absent in"),
    (["--set=max_length=16"], "seq_len 32: it must be in 1..16"),
    (["--init_from=nowhere"], "--init_from=nowhere: there is no model; give a training run's"),
    (["--init_from=.", "--lora_rank=2"], "--init_from=.: there is no model"),
]


@pytest.mark.parametrize(("flags", "words"), ERRORS, ids=[" ".join(f) for f, _ in ERRORS])
def test_an_error_is_one_line(source, flags, words, tmp_path, capsys):
    assert tune(source[0], tmp_path / "run", source[1], *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not (tmp_path / "run" / "config.json").exists()


def test_adapters_need_weights(source, tmp_path, capsys):
    for flag in ("--lora_rank=2", "--lora_alpha=1", "--lora_targets=query"):
        assert small_run.run(*small_run.flags(source[0], tmp_path / "run", flag)) == 2
        name = flag.partition("=")[0]
        assert f"error: {name} needs weights to adapt" in capsys.readouterr().err


def test_a_config_that_keeps_the_shapes_may_change(source, tmp_path):
    flags = ("--steps=1", "--set=dropout=0.3,max_length=64")
    assert tune(source[0], tmp_path / "run", source[1], *flags) == 0
    model, _, _ = training.load_model(tmp_path / "run")
    assert model.config.dropout == 0.3 and model.config.max_length == 64
