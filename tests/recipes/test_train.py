"""The training step and the recipe: numerics, meshes, broken numbers, errors, loading."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
import zoo
from recipes import command, decode, feed, nonfinite, train, training
from recipes.optimizer import Optimizer
from recipes.tasks import lm
from tests import tiny
from tests.recipes import small_run
from tests.tolerances import EQUAL, EXACT, RESHARDED, assert_close
from zoo.checkpoint import Checkpointer

CONFIG = tiny.config("llama-60m", num_layers=2)
ROWS, LENGTH = 16, 12


def program(mesh: str = "data:1", explicit: bool = False, **changes) -> training.Program:
    fields = {
        "config": CONFIG, "mesh": sharding.mesh(mesh, explicit=explicit),
        "rules": sharding.rules("fsdp_tp"), "loss": lm.make_loss(1e-3),
        "optimizer": Optimizer(warmup_steps=2, steps=10, learning_rate=1e-2),
    }
    return training.Program(**{**fields, **changes})


def rows(step: int = 0) -> dict[str, np.ndarray]:
    """A batch in which a quarter of the rows has nearly all of the labels."""
    batch = tiny.batch(CONFIG.vocab_size, ROWS, LENGTH, seed=step)
    batch["weights"][np.arange(ROWS) % 8 < 2] = 0
    batch["weights"][np.arange(ROWS) % 8 < 6, 1:] = 0
    return batch


def take(program: training.Program, steps: int, state=None, batches=rows):
    """(state, metrics of each step) after some steps."""
    with sharding.use(program.mesh, program.rules):
        step_function = training.make_step(program)
        state = program.init() if state is None else state
        metrics = []
        for step in range(steps):
            placed = feed.place(lambda r, s=step: {n: x[r] for n, x in batches(s).items()}, ROWS,
                                program.batch_sharding)
            state, values = step_function(state, placed, feed.signals(program.mesh, step, False))
            metrics.append(jax.device_get(values))
    return state, metrics


@functools.cache
def reference():
    """What two plain steps on one device give."""
    state, metrics = take(program(), 2)
    assert all(m.pop("finite").all() for m in metrics)
    return jax.device_get(zoo.protocol.to_stacked(state)), metrics


def check(got, metrics):
    """Adam's first steps magnify what rounding does to gradients near 0: parameters are close."""
    state, expected = reference()
    assert all(m.pop("finite").all() for m in metrics)
    assert_close(metrics, expected, EQUAL)
    assert_close(zoo.protocol.to_stacked(got)["params"], state["params"], RESHARDED)


def test_a_step_is_the_plain_formula():
    """Against optax and the model, without anything of `training`."""
    import optax

    p = program()
    model = zoo.build(CONFIG, p.seed, stacked=False)
    definition, params = zoo.protocol.split(model)
    batch = rows()

    def loss(params):
        m = zoo.protocol.merge(definition, params)
        total, weight, _ = m.loss(m(batch, None, True), batch["labels"], batch["weights"],
                                  z_loss=1e-3)
        return total / weight

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    optimizer = p.optimizer.build(zoo.protocol.axes(model))
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    state, (metrics,) = take(p, 1)
    assert_close(metrics["loss"], value)
    assert_close(metrics["grad_norm"], optax.tree.norm(gradients))
    assert metrics["weight"] == batch["weights"].sum()
    assert_close(state["params"], optax.apply_updates(params, updates))
    assert int(state["step"]) == 1


@pytest.mark.parametrize("stacked", [False, True])
def test_microbatches_add_up_to_the_batch(stacked):
    definition, params = zoo.protocol.split(zoo.build(CONFIG, stacked=stacked))
    results = []
    for accumulate in (1, 4, 8):
        differentiate = training.make_gradients(program(accumulate=accumulate), definition)
        results.append(jax.jit(differentiate)(params, rows(), jax.random.key(0)))
    weights = rows()["weights"].reshape(-1, 8, LENGTH).sum((0, 2))
    assert weights.min() == 0 and weights.max() > 10  # As unequal as they may be.
    assert_close(results[1], results[0], EQUAL)
    assert_close(results[2], results[0], EQUAL)


def test_a_step_of_microbatches_is_a_step():
    check(*take(program(accumulate=4), 2))


@pytest.mark.parametrize("changes", [
    {"stacked": False}, {"stacked": True, "remat": "full", "accumulate": 2},
    {"stacked": True, "explicit": True, "accumulate": 2},
], ids=["list", "stack", "explicit"])
def test_eight_devices_give_what_one_does(changes):
    check(*take(program(tiny.MESH, **changes), 2))


def test_key_heads_that_are_whole_give_the_same():
    config = tiny.config("llama3-8b", num_layers=1)  # Two key heads, on a tensor axis of four.
    one = take(program(config=config), 1)
    eight = take(program("fsdp:2,tensor:4", config=config, stacked=True,
                         rules=sharding.rules("fsdp_tp,kv_heads=none")), 1)
    assert_close(eight[1][0]["loss"], one[1][0]["loss"], EQUAL)
    assert_close(eight[0]["params"], zoo.protocol.to_stacked(one[0])["params"], RESHARDED)


@pytest.mark.parametrize("name", [pytest.param("lion", marks=pytest.mark.slow), "muon"])
def test_optimizers_give_the_same_on_eight_devices(name):
    optimizer = Optimizer(name, warmup_steps=0, steps=10, schedule="constant")
    config = dataclasses.replace(CONFIG, num_layers=1)
    one = take(program(optimizer=optimizer, config=config), 1)
    eight = take(program(tiny.MESH, optimizer=optimizer, config=config, stacked=True), 1)
    assert_close(zoo.protocol.to_stacked(one[0])["params"], eight[0]["params"], RESHARDED)


def test_optimizer_state_lies_as_its_parameters_do():
    state = program(tiny.MESH, ema=0.9, optimizer=Optimizer("muon"), stacked=True).abstract_state()
    leaves = jax.tree_util.tree_leaves_with_path(state)
    layout = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}
    kernel = "stack/blocks/0/mlp/up/kernel"
    same = [x for path, x in layout.items() if path.endswith(kernel)]
    assert len(same) == 3  # The parameter, its average, its momentum.
    spec = jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert all(x.sharding.spec == spec for x in same)
    tables = [x for path, x in layout.items() if path.endswith("embed/table")]
    assert len(tables) == 4 and len({x.sharding for x in tables}) == 1  # Adam keeps two moments.
    rest = [x for path, x in layout.items() if path.endswith(("count", "step", "ns_coeffs"))]
    assert rest and all(x.sharding.is_fully_replicated for x in rest)


def test_mixed_precision_keeps_float32_where_it_matters():
    state, metrics = take(program(compute_dtype="bfloat16", accumulate=2), 2)
    assert {x.dtype for x in jax.tree.leaves(state["params"])} == {jnp.dtype("float32")}
    assert_close(metrics[0]["loss"], reference()[1][0]["loss"], 0.02)
    small = dataclasses.replace(CONFIG, num_layers=1)
    state, metrics = take(program(dtype="bfloat16", compute_dtype="bfloat16", ema=0.5,
                                  config=small), 2)
    assert {x.dtype for x in jax.tree.leaves(state["params"])} == {jnp.dtype("bfloat16")}
    others = jax.tree.leaves((state["optimizer"], state["ema"]))
    assert {x.dtype for x in others} == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_the_average_follows_the_parameters():
    p = program(ema=0.15, config=dataclasses.replace(CONFIG, num_layers=1))
    first = jax.device_get(p.init()["params"])
    second = jax.device_get(take(p, 1)[0]["params"])
    state, _ = take(p, 2)
    third = jax.device_get(state["params"])
    # Its decays are (1 + t) / (10 + t), up to the one that was asked for.
    expected = jax.tree.map(
        lambda a, b, c: 0.15 * (0.1 * a + 0.9 * b) + 0.85 * c, first, second, third)
    assert_close(state["ema"], expected)


def test_dropout_depends_on_step_microbatch_and_seed_alone():
    config = dataclasses.replace(CONFIG, num_layers=1, dropout=0.3)
    definition, params = zoo.protocol.split(zoo.build(config, stacked=False))
    params = jax.device_get(params)

    def losses(**changes):
        p = program(config=config, stacked=False, **changes)
        with sharding.use(p.mesh, p.rules):
            differentiate = jax.jit(training.make_gradients(p, definition))
            return [float(differentiate(params, rows(), training.step_key(p, step))[0])
                    for step in (0, 1)]

    plain = losses()
    assert plain[0] != plain[1]
    assert losses(seed=1) != plain and losses(accumulate=2) != plain
    np.testing.assert_allclose(losses(mesh="data:4,tensor:2"), plain, rtol=1e-5)


def test_a_non_finite_gradient_leaves_everything_as_it_was():
    p = program(ema=0.9)
    state, _ = take(p, 1)
    before = jax.device_get(state)

    def poisoned(step):  # Step 0 is stale here too: the state is at step 1.
        batch = rows(step)
        if step == 1:
            batch["weights"] = np.where(batch["weights"] > 0, np.inf, 0).astype(np.float32)
        return batch

    state, metrics = take(p, 4, state, poisoned)
    assert_close(jax.device_get(state), before, EXACT)
    assert metrics[0]["finite"].all() and not metrics[1]["finite"].all()
    assert metrics[2]["finite"].all()  # And yet the state has waited.
    assert len(training.finite_names(p)) == len(metrics[1]["finite"])


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
def test_what_is_made_of_the_largest_gradients_is_finite(name, clip):
    p = program(ema=0.9, optimizer=Optimizer(
        name, learning_rate=1e15, adam_learning_rate=1e15, warmup_steps=0, schedule="constant",
        weight_decay=1e-15, grad_clip=clip))
    update, state = jax.jit(training.make_update(p, zoo.protocol.axes(p.model()))), p.init()
    # The largest whose square is finite, and none.
    gradients = jax.tree.map(
        lambda x: jnp.full(x.shape, 1.8e19 / x.size**0.5).at[..., 0].set(0.0), state["params"])
    assert all(map(jnp.isfinite, training.squared_norms(gradients)))
    for _ in range(3):
        state = update(gradients, {}, state)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))


def test_a_gradient_whose_square_overflows_is_named():
    inputs = {"gradients": {"a": jnp.ones(3), "b": jnp.full(3, 1e20)}}
    found = nonfinite.find(training.squared_norms, inputs, jax.tree.map(jnp.zeros_like, inputs))
    assert found.startswith("inf in the result of ") and "with gradients/b" in found


@pytest.mark.parametrize("clip", [None, 1.0])
def test_gradients_too_large_to_be_added_up_are_not_taken(clip, monkeypatch):
    """Each one's square is finite, all of theirs is not."""
    made = training.make_gradients

    def large(*given):
        differentiate = made(*given)

        def run(*x):
            loss, weight, stats, gradients, statistics = differentiate(*x)
            return loss, weight, stats, jax.tree.map(
                lambda g: jnp.full(g.shape, 1.8e19 / g.size**0.5), gradients), statistics

        return run

    monkeypatch.setattr(training, "make_gradients", large)
    p = program(optimizer=Optimizer(grad_clip=clip))
    before = jax.device_get(p.init())
    state, (metrics,) = take(p, 1)
    assert not metrics["finite"][1:].any() and metrics["finite"][0]
    assert_close(jax.device_get(state), before, EXACT)


def test_any_process_can_ask_to_stop():
    p = program(tiny.MESH)
    with sharding.use(p.mesh, p.rules):
        step, state = training.make_step(p), p.init()
        batch = feed.place(lambda r: {n: x[r] for n, x in rows().items()}, ROWS, p.batch_sharding)
        asks = np.zeros((8, 2), np.int32)
        asks[5, 1] = 1
        signals = jax.device_put(asks, training.signal_sharding(p.mesh))
        _, metrics = step(state, batch, signals)
    assert metrics["stop"] == 1


def test_a_batch_reaches_devices_row_by_row():
    whole = rows()
    for mesh in ("data:1", tiny.MESH, "tensor:4,data:2", "fsdp:8"):
        placed = feed.place(lambda r: {n: x[r] for n, x in whole.items()}, ROWS,
                            program(mesh).batch_sharding)
        assert_close(placed, whole, EXACT)


def test_transfers_within_a_step_are_refused(tmp_path, monkeypatch, capsys):
    corpus = small_run.write_corpus(tmp_path)
    monkeypatch.setattr(feed, "signals", lambda mesh, step, stop: np.array([[step, stop]] * 8))
    with pytest.raises(jax.errors.JaxRuntimeError, match="isallowed"):
        small_run.run(*small_run.flags(corpus, tmp_path / "run", "--steps=2"))


# --- finding what is not finite ------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [False, True])
def test_the_first_non_finite_tensor_is_named(stacked):
    model = zoo.build(CONFIG, stacked=stacked, remat="full" if stacked else "none")
    definition, params = zoo.protocol.split(model)
    differentiate = training.make_gradients(program(stacked=stacked), definition)

    def find(params):
        inputs = {"batch": rows(), "key": jax.random.key(0)}
        return nonfinite.find(differentiate, {"params": params, **inputs},
                              {"params": sound, **inputs})

    sound = params
    assert find(params) is None
    path = ("blocks", "0") if stacked else ("layers", "1", "0")
    where = (1, 2, 3) if stacked else (2, 3)
    for value, words in ((3e38, "inf in the result of"), (np.nan, "nan in params/stack/")):
        bad = jax.tree.map(jnp.copy, params)
        block = bad["stack"]
        for name in path:
            block = block[name]
        kernel = block["mlp"]["up"]["kernel"]
        # Times 64, in float32: the product overflows, the parameter does not.
        block["mlp_norm"]["scale"] = 64 * block["mlp_norm"]["scale"]
        block["mlp"]["up"]["kernel"] = kernel.at[where].set(value)
        found = find(bad)
        assert words in found and ("round 1 of 2" in found) == (stacked and value == 3e38), found
        if value == 3e38:
            assert "layers/linear.py" in found and "mlp/up/kernel" in found


def test_an_infinity_that_is_meant_to_be_is_not_named():
    def f(x):
        gate = jnp.where(x > 0, 0.0, -jnp.inf)
        return jnp.log(jnp.exp(gate) + jnp.exp(x)).sum()

    x = jnp.array([-1.0, 2.0])
    assert nonfinite.find(f, {"x": x}, {"x": x}) is None
    assert "exp" in nonfinite.find(f, {"x": 100 * x}, {"x": x})


# --- the recipe ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(corpus, workdir, output) of a run to its end."""
    folder = tmp_path_factory.mktemp("finished")
    corpus = small_run.write_corpus(folder)
    done = small_run.start(*small_run.flags(
        corpus, folder / "run", "--steps=10", "--ema=0.5", "--keep_every=8", "--keep_last=1",
        "--log_every=4", "--profile=5:6"))
    output, _ = done.communicate(timeout=120)
    assert done.returncode == 0, output
    return corpus, folder / "run", output


def test_a_run_leaves_what_it_should(finished):
    _, workdir, output = finished
    names = {path.name for path in workdir.iterdir()}
    assert names >= {"config.json", "checkpoints", "metrics.jsonl", "loss.png", "profile"}
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {
        "step_00000008", "step_00000010"}
    found = small_run.records(workdir)
    assert [(r["step"], *(k for k in r if k != "step")) for r in found] == [
        (4, "train"), (4, "heldout"), (8, "train"), (8, "heldout"), (10, "train"), (10, "final")]
    assert found[-1]["final"]["gzip_nats_per_byte"] > 0
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    assert "compiled, and first step taken" in output and "ETA" in output
    last = output.strip().splitlines()[-1]
    assert "held-out loss" in last and "gzip" in last and "GiB" in last


def test_a_finished_run_can_be_asked_again(finished):
    corpus, workdir, _ = finished
    before = small_run.records(workdir)
    again = ["--steps=10", "--ema=0.5", "--keep_every=8", "--keep_last=1", "--log_every=4"]
    assert small_run.run(*small_run.flags(corpus, workdir, "--mesh=fsdp:1", *again)) == 0
    assert_close(small_run.records(workdir)[-1]["final"], before[-1]["final"], EQUAL)
    assert len(small_run.records(workdir)) == len(before)


def test_a_model_is_loaded_with_its_averaged_parameters(finished):
    _, workdir, _ = finished
    model, tokenizer, meta = training.load_model(workdir)
    assert tokenizer.vocab_size == 264 and meta["step"] == 10 and model.config.num_layers == 2
    stacked = zoo.build(model.config, abstract=True, stacked=True)
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        stored, _, _ = checkpointer.restore({"ema": zoo.protocol.split(stacked)[1]})
    params = zoo.protocol.split(model)[1]
    assert_close(zoo.protocol.to_stacked(params), stored["ema"], EXACT)
    for mesh in ("data:1", "fsdp:2,tensor:2"):
        other, _, _ = training.load_model(workdir / "checkpoints", sharding.mesh(mesh),
                                          sharding.rules("fsdp_tp"), dtype="bfloat16", step=8)
        kernel = jax.tree.leaves(zoo.protocol.split(other)[1])[0]
        assert kernel.dtype == jnp.bfloat16 and len(kernel.sharding.device_set) == (
            1 if mesh == "data:1" else 4)


def test_loading_says_what_is_missing(finished, tmp_path):
    _, workdir, _ = finished
    with pytest.raises(FileNotFoundError, match="no such directory"):
        training.load_model(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no step 9"):
        training.load_model(workdir, step=9)


def test_a_step_compiles_for_machines_that_are_only_described():
    """Here for forced CPU devices; tests/aot does it for TPUs and GPUs."""
    mesh = sharding.mesh(tiny.MESH)
    step, arguments = training.abstract_step(
        CONFIG, mesh, sharding.rules("fsdp_tp"), lm.workload(CONFIG, ROWS, LENGTH),
        optimizer=Optimizer("muon"), accumulate=2, remat="dots", stacked=True)
    leaves = jax.tree.leaves(arguments)
    assert all(isinstance(x, jax.ShapeDtypeStruct) and x.sharding.mesh == mesh for x in leaves)
    with sharding.use(mesh, sharding.rules("fsdp_tp")):
        compiled = step.lower(*arguments).compile()
    state = arguments[0]
    held = sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
               for x in jax.tree.leaves(state))
    assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(held, rel=0.05)


def test_a_failed_step_is_told_and_kept(tmp_path, capsys):
    corpus, workdir = small_run.write_corpus(tmp_path), tmp_path / "run"
    wild = ["--steps=20", "--learning_rate=1e15", "--warmup_steps=0", "--weight_decay=0",
            "--grad_clip=0"]
    assert small_run.run(*small_run.flags(corpus, workdir, *wild)) == 2
    error = capsys.readouterr().err.strip()
    step = int(error.removeprefix("error: step ").partition(",")[0])  # Numbers overflow gradually.
    examples = range(8 * (step - 1), 8 * step)
    assert 2 <= step <= 4 and f", of examples {examples[0]} to {examples[-1]}: the " in error
    assert "more not finite" in error and "\n" not in error
    assert "first non-finite tensor: inf in" in error or "first non-finite tensor: nan in" in error
    failure = json.loads((workdir / "failure.json").read_text())
    assert failure["after_step"] == step - 1 and failure["example_ids"] == list(examples)
    assert set(small_run.losses(workdir)) == set(range(1, step))
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        assert checkpointer.latest() == step - 1


def test_nothing_held_out(tmp_path, capsys):
    corpus, workdir = small_run.write_corpus(tmp_path), tmp_path / "run"
    assert small_run.run(*small_run.flags(corpus, workdir, "--steps=4", "--heldout=0")) == 0
    assert "none held out" in capsys.readouterr().out
    assert [set(r) for r in small_run.records(workdir)] == [{"step", "train"}] * 4
    assert (workdir / "loss.png").exists()


def test_a_profile_ends_with_the_last_of_its_steps(tmp_path, monkeypatch):
    """After it and before the next one, and not before the devices are through with it."""
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    make_step, wait = training.make_step, jax.block_until_ready

    def counted(program):
        step = make_step(program)

        def take(state, batch, signals):
            seen.append(int(jax.device_get(signals)[0, 0]))
            return step(state, batch, signals)

        return take

    def waited(x):
        seen.extend(["wait"] if isinstance(x, tuple) and "params" in x[0] else [])
        return wait(x)

    monkeypatch.setattr(training, "make_step", counted)
    monkeypatch.setattr(jax, "block_until_ready", waited)
    corpus = small_run.write_corpus(tmp_path)
    flags = ("--mesh=fsdp:1", "--heldout=0", "--schedule=constant")

    def run(*more):
        seen.clear()
        assert small_run.run(*small_run.flags(corpus, tmp_path / "run", *flags, *more)) == 0
        return list(seen)

    assert run("--steps=4", "--profile=1:2") == [0, "start", 1, 2, "wait", "stop", 3]
    # Taken up within its steps, a run profiles the rest; and one that ends first, up to there.
    assert run("--steps=7", "--profile=2:5") == ["start", 4, 5, "wait", "stop", 6]
    assert run("--steps=9", "--profile=8:20") == [7, "start", 8, "stop"]
    assert run("--steps=11", "--profile=2:5") == [9, 10]


def save_tokenizer(folder):
    """A tokenizer.json whose end of text only the file beside it names."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "END", "def", "return", "self", "None", "import", "x", "y", "="]
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(words)}, "<unk>"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder.mkdir()
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "END"}))
    return folder


def test_a_workdir_can_be_moved_with_its_tokenizer(tmp_path, capsys):
    given = save_tokenizer(tmp_path / "given")
    corpus = small_run.write_corpus(tmp_path)
    flags = small_run.flags(corpus, tmp_path / "run", "--steps=1", f"--tokenizer={given}",
                            "--set=vocab_size=16", "--heldout=0")
    assert small_run.run(*flags) == 0
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    (tmp_path / "run").rename(moved)
    given.rename(tmp_path / "gone")
    assert str(tmp_path) not in (moved / "tokenizer" / "tokenizer_config.json").read_text()
    for folder in (moved, moved / "checkpoints"):
        _, tokenizer, _ = training.load_model(folder)
        assert tokenizer.encode("def x") == [2, 7] and tokenizer.eos_id == 1
    decoding = ["decode", f"--checkpoint={moved}", "--prompt=def x", "--max_new_tokens=3", "--json"]
    assert command.execute(decode.main, decoding) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"]) <= 3
    (moved / "tokenizer" / "tokenizer.json").write_bytes(
        (moved / "tokenizer" / "tokenizer.json").read_bytes() + b"\n")
    with pytest.raises(ValueError, match="is not the one that .* was trained with"):
        training.load_model(moved)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, {"x": np.zeros(2)}, {"step": 1})
    with pytest.raises(ValueError, match="does not say which model it holds.*a training run's"):
        training.load_model(tmp_path)


def test_help_shows_the_groups(capsys):
    assert small_run.run("--help") == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())
    assert "python -m recipes.train --model=llama-tiny" in text
    for title in ("Model:", "Data:", "Optimization:", "Run:", "Devices:"):
        assert f"\n{title}\n" in text
    assert "--steps=1000" in text and "float32|" not in text
    assert "fsdp_tp,kv_heads=none" in words and "A single text is cut" in words


ERRORS = [
    (["--stepz=3"], "unknown flag --stepz; did you mean --steps?"),
    (["--model=lama-tiny"], "did you mean 'llama-tiny'?"),
    (["--model=Llama-Tiny"], "did you mean 'llama-tiny'?"),
    (["--set=attention.rope.theta=x"], "attention.rope.theta is 'x'; it must be float"),
    (["--set=attention.rope.theta=inf"], "attention.rope.theta is inf; it must be finite"),
    *((f"--{name}={value}".split(), f"--{name}={value}: it must be finite")
      for name in ("weight_decay", "learning_rate", "adam_learning_rate", "grad_clip", "z_loss",
                   "ema", "heldout")
      for value in ("nan", "inf")),
    (["--set=num_layer=3"], "did you mean 'num_layers'?"),
    (["--set=num_layers"], "--set=num_layers: it must be FIELD=VALUE"),
    (["--set=attention.num_kv_heads=3"], "does not divide by attention.num_kv_heads = 3"),
    (["--rules=fspd"], "did you mean 'fsdp'?"),
    (["--rules=fsdp_tp,kv_head=none"], "did you mean 'kv_heads'?"),
    (["--mesh=tensor:4"], "as in --rules=fsdp_tp,kv_heads=none"),
    (["--mesh=fdsp:2"], "did you mean 'fsdp'?"),
    (["--mesh=fsdp:16"], "needs 16 devices and there are 8"),
    (["--mesh=fsdp:8", "--set=width=36"], "embed of size 36 does not divide"),
    (["--batch_size=0"], "batch_size 0: it must be at least 1"),
    (["--seq_len=0"], "seq_len 0: it must be at least 1"),
    (["--batch_size=12", "--mesh=fsdp:8"], "batch_size 12 does not divide by 8"),
    (["--batch_size=8", "--accumulate=3"], "batch_size 8 does not divide by 24"),
    (["--accumulate=0"], "accumulate 0: it must be at least 1"),
    (["--seq_len=4096"], "seq_len 4096: it must be in 1..2048"),
    (["--set=vocab_size=100"], "has 264 ids and the model only 100"),
    (["--tokenizer=none.json"], "no such file 'none.json'"),
    (["--data=nowhere.txt"], "no such file or directory"),
    (["--optimizer=adam"], "optimizer 'adam': it must be one of"),
    (["--schedule=step"], "schedule 'step': it must be one of"),
    (["--steps=abc"], "flag --steps=abc"),
    (["--steps=0"], "steps 0: it must be at least 1"),
    (["--ema=2"], "ema 2.0: it must lie between 0 and 1"),
    (["--heldout=1.5"], "heldout fraction 1.5"),
    (["--profile=3"], "--profile=3: it must be FIRST:LAST"),
    (["--keep_last=0"], "keep_last=0"),
    (["--dtype=float16"], "flag --dtype=float16"),
    (["--process_id=1"], "need --coordinator=HOST:PORT"),
    (["--coordinator=here:1", "--num_processes=2", "--process_id=2"], "must be in 0..1"),
    (["--flagfile=nothing.flags"], "there is no such file"),
    (["more"], "'more' is no flag"),
    (["--workdir="], "--workdir is needed"),
]


@pytest.mark.parametrize(("flags", "words"), ERRORS, ids=[" ".join(flags) for flags, _ in ERRORS])
def test_an_error_is_one_line(flags, words, tmp_path, capsys):
    corpus = small_run.write_corpus(tmp_path)
    assert small_run.run(*small_run.flags(corpus, tmp_path / "run", *flags)) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert words in output.err and output.out == ""
    assert not (tmp_path / "run" / "checkpoints" / "step_00000000").exists()


@pytest.mark.parametrize(("contents", "words"), [
    (b"", "the file is empty"), (b"\x00\x01", "is not UTF-8 text"),
    (b"one document", "1 distinct document")])
def test_bad_data_is_one_line(contents, words, tmp_path, capsys):
    path = tmp_path / "bad.txt"
    path.write_bytes(contents)
    assert small_run.run(*small_run.flags(path, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path, capsys):
    corpus = small_run.write_corpus(tmp_path)
    (tmp_path / "file").write_text("in the way")
    assert small_run.run(*small_run.flags(corpus, tmp_path / "file")) == 2
    error = capsys.readouterr().err
    assert "cannot write checkpoints to" in error and error.count("\n") == 1


def test_a_run_without_a_workdir_is_kept_under_its_model_s_name(tmp_path, monkeypatch, capsys):
    corpus = small_run.write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = [flag for flag in small_run.flags(corpus, tmp_path) if not flag.startswith("--workdir")]
    assert small_run.run(*flags, "--steps=1") == 0
    assert (tmp_path / "runs/llama-tiny/metrics.jsonl").is_file()
    assert small_run.run(*flags, "--init_from=runs/llama-tiny") == 2
    assert "--workdir is needed" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch, capsys):
    def broken():
        return int("not raised by this project")

    monkeypatch.setattr(broken, "__module__", "tests.recipes.test_train")
    with pytest.raises(ValueError, match="invalid literal"):
        command.execute(broken, ["broken"])
    assert capsys.readouterr().err == ""


def test_flag_files_are_found_by_name_and_later_flags_win(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_FLAG_FILES", tmp_path)
    (tmp_path / "known.flags").write_text("# a comment\n--steps=7\n--seq_len=9\n")
    seen = {}

    def look():
        seen.update(steps=command.FLAGS.steps, seq_len=command.FLAGS.seq_len,
                    batch_size=command.FLAGS.batch_size)

    monkeypatch.setattr(look, "__module__", train.__name__)
    for name in ("known", "known.flags", "recipes/flags/known.flags"):
        assert command.execute(look, ["x", f"--flagfile={name}", "--seq_len=5"]) == 0
        assert seen == {"steps": 7, "seq_len": 5, "batch_size": 16}


def test_settings_read_paths_and_values():
    assert command.settings(["a=1, b.c=x=y", "d=2"]) == {"a": "1", "b.c": "x=y", "d": "2"}
    assert command.settings(["a.b=1,ab.c=1", "a=none"]) == {"ab.c": "1", "a": "none"}
    assert command.settings(["a=none", "a.b=1"]) == {"a": "none", "a.b": "1"}
