"""The language-model task: its loss, its held-out measure, its description and its picture."""

import gzip
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from recipes import packing
from recipes.tasks.lm import LanguageModel, make_loss
from tests import tiny
from tests.recipes import small_run
from tests.tolerances import assert_close

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
    total, weight, stats = make_loss(0.1)(model, batch, jax.random.key(0), train)
    logits = model({n: batch[n] for n in ("tokens", "segment_ids", "positions")}).logits
    log_z = jax.nn.logsumexp(logits, -1)
    at_label = jnp.take_along_axis(logits, batch["labels"][..., None], -1)[..., 0]
    nats = jnp.sum(batch["weights"] * (log_z - at_label))
    assert_close(stats["nats_per_token"], nats)
    extra = 0.1 * jnp.sum(batch["weights"] * log_z**2) if train else 0.0
    assert_close(total, nats + extra)
    assert weight == batch["weights"].sum()


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


def test_batches_and_ids_go_by_step(corpus):
    task = make(corpus)
    whole = task.batch(3, np.arange(4))
    assert_close(task.batch(3, np.array([1, 3])), {n: x[[1, 3]] for n, x in whole.items()})
    assert task.ids(3) == [12, 13, 14, 15]
    assert task.tokens_per_step == 64
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
        task.draw(tmp_path, records)
        picture = (tmp_path / "loss.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        sizes.append(len(picture))
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize(("options", "words"), [
    ({"seq_len": 65}, "seq_len 65: it must be in 1..64"),
    ({"seq_len": 0}, "seq_len 0"),
    ({"eval_batches": 0}, "eval_batches 0"),
    ({"tokenizer": "nothing"}, "tokenizer 'nothing'"),
    ({"heldout": 0.0}, "heldout fraction 0.0"),
])
def test_options_are_checked(corpus, options, words):
    with pytest.raises(ValueError, match=words):
        make(corpus, **options)


def test_a_tokenizer_that_the_model_cannot_hold_is_refused(corpus):
    with pytest.raises(ValueError, match="264 ids and the model only 40.*--set=vocab_size=264"):
        LanguageModel(tiny.config("llama-60m"), data=str(corpus), seq_len=16)
