"""The language-model task: its loss, its held-out measure, its description and its picture."""

import dataclasses
import gzip
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
import zoo
from recipes import packing, training
from recipes.optimizer import Optimizer
from recipes.tasks.lm import LanguageModel, make_loss
from tests import tiny
from tests.recipes import small_run
from tests.tolerances import EQUAL, assert_close

CONFIG = tiny.config("llama-60m", vocab_size=264, num_layers=1)


@pytest.fixture
def corpus(tmp_path):
    return small_run.write_corpus(tmp_path)


def make(corpus, **changes) -> LanguageModel:
    options = {"seq_len": 16, "batch_size": 4, "heldout": 0.3, "data": str(corpus)}
    return LanguageModel(CONFIG, **{**options, **changes})


@pytest.mark.parametrize("train", [False, True])
def test_loss_is_cross_entropy_with_z_loss_in_training(train):
    model = zoo.build(CONFIG)
    batch = jax.tree.map(jnp.asarray, tiny.batch(40))
    total, weight, stats, _ = make_loss(0.1)(model, batch, jax.random.key(0), train)
    logits = model({n: batch[n] for n in ("tokens", "segment_ids", "positions")}).logits
    log_z = jax.nn.logsumexp(logits, -1)
    at_label = jnp.take_along_axis(logits, batch["labels"][..., None], -1)[..., 0]
    nats = jnp.sum(batch["weights"] * (log_z - at_label))
    assert_close(stats["nats_per_token"], nats)
    extra = 0.1 * jnp.sum(batch["weights"] * log_z**2) if train else 0.0
    assert_close(total, nats + extra)
    assert weight == batch["weights"].sum()


class WithAuxiliary:
    """A model with two auxiliary losses, a mean over the tokens that count and one over 5, and a
    statistic, which is no part of the loss."""

    def __init__(self, model):
        self.model, self.loss = model, model.loss

    def __call__(self, batch, key=None, train=False):
        weights = (batch["segment_ids"] > 0).astype(jnp.float32)
        size = jnp.sum(weights * batch["tokens"])
        losses = {"balance": (size, jnp.sum(weights)), "router_z": (jnp.float32(10), 5.0)}
        return dataclasses.replace(self.model(batch, key, train), losses=losses,
                                   stats={"load": (2 * size, jnp.sum(weights))})


def test_auxiliary_losses_are_added_as_means_in_training():
    model = zoo.build(CONFIG)
    batch = jax.tree.map(jnp.asarray, tiny.batch(40))
    plain, weight, _, _ = make_loss(0.0)(model, batch, jax.random.key(0), True)
    total, same, stats, _ = make_loss(0.0)(WithAuxiliary(model), batch, jax.random.key(0), True)
    balance = batch["tokens"][batch["segment_ids"] > 0].mean()
    assert same == weight
    assert_close(total / weight, plain / weight + balance + 2.0)
    assert_close(stats["balance"] / weight, balance)
    assert_close(stats["router_z"] / weight, 2.0)
    assert_close(stats["load"] / weight, 2 * balance)
    assert_close(stats["nats_per_token"], plain)
    nats, _, stats, _ = make_loss(0.0)(WithAuxiliary(model), batch, None, False)
    assert_close(nats, stats["nats_per_token"])
    assert set(stats) == {"nats_per_token"}


def test_auxiliary_losses_are_means_over_microbatches_of_any_weight():
    """Here the labels count as the auxiliary loss does, so that parts and whole must agree."""
    definition, params = zoo.protocol.split(zoo.build(CONFIG, stacked=False))
    batch = tiny.batch(40)
    batch["weights"] = (batch["segment_ids"] > 0).astype(np.float32)
    batch["segment_ids"][4:, 2:] = batch["weights"][4:, 2:] = 0

    def loss(model, *rest):
        return make_loss(0.0)(WithAuxiliary(model), *rest)

    found = []
    for accumulate in (1, 4):
        program = training.Program(
            config=CONFIG, mesh=sharding.mesh("data:1"), rules=sharding.rules("dp"), loss=loss,
            optimizer=Optimizer(), accumulate=accumulate)
        step = jax.jit(training.make_gradients(program, definition))
        found.append(step(params, batch, jax.random.key(0)))
    assert found[0][2].keys() == {"nats_per_token", "balance", "router_z", "load"}
    assert_close(found[1], found[0], EQUAL)


def test_evaluation_divides_nats_by_tokens_and_by_bytes(corpus):
    task = make(corpus)
    seen = []

    def measure(batch):
        seen.append(batch)
        return 2.0 * batch["weights"].sum(), float(batch["weights"].sum()), {}

    found = task.evaluate(measure, final=True)
    labels = sum(b["weights"].sum() for b in seen)
    size = sum(packing.label_bytes(b, np.array([1] * 256 + [0] * 8)) for b in seen)
    assert labels > size > 0  # The end of a document is a label without bytes.
    assert found["nats_per_token"] == pytest.approx(2.0)
    assert found["perplexity"] == pytest.approx(math.e**2)
    assert found["nats_per_byte"] == pytest.approx(2.0 * labels / size)
    assert found["bits_per_byte"] == pytest.approx(found["nats_per_byte"] / math.log(2))
    assert all(b["tokens"].shape == (4, 16) for b in seen)


def test_gzip_is_measured_on_the_documents_evaluated(corpus):
    task, texts = make(corpus), []

    def measure(batch):
        texts.append(batch)
        return 0.0, 1.0, {}

    found = task.evaluate(measure, final=True)
    flat = np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in texts])
    documents = [bytes(part[part < 256].astype(np.uint8)) for part in
                 np.split(flat, np.flatnonzero(flat == 257) + 1) if len(part)]
    packed = sum(len(gzip.compress(d, 9, mtime=0)) for d in documents)
    expected = packed * 8 * math.log(2) / sum(map(len, documents))
    assert found["gzip_nats_per_byte"] == pytest.approx(expected)


def test_a_shorter_evaluation_takes_the_same_whole_documents_every_time(corpus):
    task = make(corpus, eval_batches=6, seed=1)

    def documents(task, final):
        batches = []
        task.evaluate(lambda b: batches.append(b) or (0.0, 1.0, {}), final)
        flat = np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in batches])
        assert flat[-1] == 257
        return [tuple(d) for d in np.split(flat, np.flatnonzero(flat == 257) + 1)[:-1]]

    few, all_of_them = documents(task, False), documents(task, True)
    assert few == all_of_them[: len(few)] and 0 < len(few) < len(all_of_them)
    assert sum(map(len, few)) <= 6 * 4 * 16
    assert documents(make(corpus, eval_batches=6, seed=2), False) == few


def test_nothing_held_out_is_nothing_evaluated(corpus, tmp_path):
    task = make(corpus, heldout=0.0)
    assert task.evaluate(lambda batch: pytest.fail("there is nothing to measure"), True) == {}
    assert "none held out" in task.summarize({})
    task.draw(tmp_path, {"a": [{"step": 1, "train": {"nats_per_token": 3.0}}]})
    assert (tmp_path / "loss.png").exists()


def test_a_single_text_trains_and_is_evaluated_at_its_end(tmp_path):
    text = "".join(f"line {i} of a book\n" for i in range(2000))
    (tmp_path / "book.txt").write_text(text)
    task = make(tmp_path / "book.txt", heldout=0.05, eval_batches=10**6)
    batches = []
    task.evaluate(lambda b: batches.append(b) or (0.0, 1.0, {}), False)
    seen = {int(line.split()[1]) for b in batches
            for line in bytes(t for t in b["tokens"].flat if t < 256).decode().splitlines()
            if line.count(" ") == 4 and line.startswith("line ")}
    assert min(seen) > 1850 and len(seen) > 80


def test_batches_and_ids_go_by_step(corpus):
    task = make(corpus)
    whole = task.batch(3, np.arange(4))
    assert_close(task.batch(3, np.array([1, 3])), {n: x[[1, 3]] for n, x in whole.items()})
    assert task.ids(3) == [12, 13, 14, 15]
    assert task.units_per_step == 64
    assert task.flops_per_step == 3 * 64 * CONFIG.flops_per_token(16)


def test_the_description_is_json_and_tells_data_apart(corpus, tmp_path):
    first = make(corpus).describe()
    assert json.loads(json.dumps(first)) == first
    assert make(corpus).describe() == first
    (tmp_path / "other").mkdir()
    other = make(small_run.write_corpus(tmp_path / "other", seed=1)).describe()
    assert other["data"]["sha256"] != first["data"]["sha256"]
    assert make(corpus, z_loss=0.5).describe() != first


def test_the_picture_takes_any_records(corpus, tmp_path):
    task = make(corpus)
    train = [{"step": i, "train": {"nats_per_token": 3 / (i + 1)}} for i in range(30)]
    held = [{"step": 20, "heldout": {"nats_per_byte": 0.3}}, {"step": 30, "final": {
        "nats_per_byte": 0.2, "gzip_nats_per_byte": 1.0}}]
    sizes = []
    for records in ([], train, train + held):
        task.draw(tmp_path, {"a": records, "b": records})
        picture = (tmp_path / "loss.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        sizes.append(len(picture))
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize(("options", "words"), [
    ({"seq_len": 65}, "seq_len 65: it must be in 1..64"),
    ({"seq_len": 0}, "seq_len 0: it must be at least 1$"),
    ({"eval_batches": 0}, "eval_batches 0"),
    ({"tokenizer": "nothing"}, "tokenizer 'nothing'"),
    ({"heldout": 1.0}, "heldout fraction 1.0"),
    ({"z_loss": math.nan}, "z_loss nan: it must be 0"),
    ({"z_loss": -1.0}, "z_loss -1.0: it must be 0"),
])
def test_options_are_checked(corpus, options, words):
    with pytest.raises(ValueError, match=words):
        make(corpus, **options)


def test_a_tokenizer_that_the_model_cannot_hold_is_refused(corpus):
    with pytest.raises(ValueError, match="264 ids and the model only 40.*--set=vocab_size=264"):
        LanguageModel(tiny.config("llama-60m"), data=str(corpus), seq_len=16)
