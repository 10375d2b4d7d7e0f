"""Packing: exact accounting of tokens and labels, and an order that depends on nothing but ids."""

import itertools
import json
import time

import numpy as np
import pytest

from recipes import corpus as corpus_lib
from recipes import packing
from recipes import tokenizer as tokenizer_lib

EOS = 257


@pytest.fixture
def make(tmp_path):
    """Makes a corpus of random documents with the given numbers of tokens."""

    def make_corpus(lengths):
        bits = np.random.Philox(np.random.SeedSequence(0))
        documents = [[*(bits.random_raw(n - 1) % 256), EOS] for n in lengths]
        np.concatenate(documents).astype("<u2").tofile(tmp_path / "x.bin")
        return corpus_lib.load(str(tmp_path / "x.bin"), tokenizer_lib.load("bytes"))

    return make_corpus


LENGTHS = [5, 1, 40, 1, 1, 9, 100, 2, 16, 3, 8]


def _check_batch(batch, seq_len):
    assert set(batch) == {"tokens", "segment_ids", "positions", "labels", "weights"}
    for name, array in batch.items():
        assert array.ndim == 2 and array.shape[1] == seq_len
        assert array.dtype == (np.float32 if name == "weights" else np.int32)
    padding = batch["segment_ids"] == 0
    for name in ("tokens", "positions", "labels", "weights"):
        assert not batch[name][padding].any()


def _pieces(batch):
    """The (tokens, labels, weights) of each segment of each row, after checking its numbering."""
    for r in range(len(batch["tokens"])):
        row = {name: array[r] for name, array in batch.items()}
        used = int((row["segment_ids"] > 0).sum())
        assert not row["segment_ids"][used:].any()  # Padding is at the end.
        segments = row["segment_ids"][:used]
        assert used == 0 or (segments[0] == 1 and set(np.diff(segments)) <= {0, 1})
        for segment in range(1, int(segments.max(initial=0)) + 1):
            inside = np.flatnonzero(row["segment_ids"] == segment)
            np.testing.assert_array_equal(row["positions"][inside], np.arange(len(inside)))
            yield [row[name][inside] for name in ("tokens", "labels", "weights")]


def _check_whole(corpus, doc_ids, batches):
    """Every token, and every label, of each document is in `batches` exactly once."""
    expected_tokens, expected_pairs = [], []
    for doc_id in doc_ids:
        document = corpus.document(doc_id).tolist()
        expected_tokens += document
        expected_pairs += itertools.pairwise(document)
    tokens, pairs = [], []
    for batch in batches:
        for piece_tokens, labels, weights in _pieces(batch):
            tokens += piece_tokens.tolist()
            assert set(weights.tolist()) <= {0.0, 1.0}
            # Within a row a label is the next token of the segment, and only its last may lack one.
            np.testing.assert_array_equal(labels[:-1], piece_tokens[1:])
            assert weights[:-1].all() and weights[-1] == (piece_tokens[-1] != EOS)
            assert labels[-1] == 0 or weights[-1]
            scored = weights > 0
            pairs += zip(piece_tokens[scored].tolist(), labels[scored].tolist(), strict=True)
    assert sorted(tokens) == sorted(expected_tokens)
    assert sorted(pairs) == sorted(expected_pairs)


@pytest.mark.parametrize("seq_len", [1, 7, 16, 186])
@pytest.mark.parametrize("shuffle", [False, True])
def test_each_epoch_has_every_token_and_label_once(make, seq_len, shuffle):
    corpus = make(LENGTHS)
    doc_ids = np.arange(len(LENGTHS))
    pack = packing.Packing(corpus, doc_ids, seq_len, seed=3, shuffle=shuffle)
    assert pack.tokens_per_epoch == sum(LENGTHS)
    assert pack.examples_per_epoch == -(-sum(LENGTHS) // seq_len)
    for epoch in range(3):
        batches = [pack.batch(epoch, pack.examples_per_epoch)]
        _check_batch(batches[0], seq_len)
        _check_whole(corpus, doc_ids, batches)


def test_unshuffled_rows_literally(make):
    corpus = make([3, 1, 5])
    a, b, eos, _, c, d, e, f, _ = corpus.tokens.tolist()
    pack = packing.Packing(corpus, [0, 1, 2], 4, seed=0, shuffle=False)
    batch = pack.batch(0, 3)
    assert eos == EOS
    assert batch["tokens"].tolist() == [[a, b, EOS, EOS], [c, d, e, f], [EOS, 0, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 0, 0]]
    # The label of f stands in the next row.
    assert batch["labels"].tolist() == [[b, EOS, 0, 0], [d, e, f, EOS], [0, 0, 0, 0]]
    assert batch["weights"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]


def test_only_the_chosen_documents(make):
    corpus = make(LENGTHS)
    pack = packing.Packing(corpus, [8, 2], 10, seed=0)
    _check_whole(corpus, [8, 2], [pack.batch(5, pack.examples_per_epoch)])


def test_long_document_continues_in_the_next_rows(make):
    corpus = make([1000])
    pack = packing.Packing(corpus, [0], 64, seed=0, shuffle=False)
    batch = pack.batch(0, 16)
    np.testing.assert_array_equal(batch["tokens"].reshape(-1)[:1000], corpus.tokens)
    np.testing.assert_array_equal(batch["labels"].reshape(-1)[:999], corpus.tokens[1:])
    assert batch["weights"].sum() == 999
    assert (batch["segment_ids"][:15] == 1).all()
    assert (batch["positions"][:15] == np.arange(64)).all()


def test_documents_of_one_token(make):
    corpus = make([1] * 10)
    batch = packing.Packing(corpus, range(10), 5, seed=0).batch(0, 2)
    assert (batch["tokens"] == EOS).all() and not batch["weights"].any()
    assert (batch["segment_ids"] == [1, 2, 3, 4, 5]).all() and not batch["positions"].any()


def _concatenate(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _assert_same(a, b):
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_processes_share_a_step(make):
    """2, then 1, then 4 processes feed the same rows; so do single examples in any order."""
    corpus = make(LENGTHS)
    batch_size = 12  # More than half an epoch: some steps straddle two.

    def fresh():
        return packing.Packing(corpus, range(len(LENGTHS)), 9, seed=5)

    steps = []
    for step, processes in enumerate([2, 2, 1, 1, 4, 4]):
        per_process = batch_size // processes
        rows = [slice(p * per_process, (p + 1) * per_process) for p in range(processes)]
        steps.append(_concatenate([fresh().batch(step, batch_size, r) for r in rows]))
    alone = fresh()
    assert len(steps) * batch_size % alone.examples_per_epoch != 0
    for step in reversed(range(6)):
        _assert_same(steps[step], alone.batch(step, batch_size))
        for row, i in enumerate(alone.ids(step, batch_size)):
            _assert_same({k: v[row] for k, v in steps[step].items()}, alone.example(int(i)))
    # The batch size is no part of the order either.
    _assert_same(_concatenate(steps), fresh().batch(0, 72))
    assert alone.ids(3, 5).tolist() == [15, 16, 17, 18, 19]


def test_rows_may_be_any_slice(make):
    pack = packing.Packing(make(LENGTHS), range(len(LENGTHS)), 9, seed=5)
    whole = pack.batch(1, 30)
    for rows in (slice(1, None, 3), slice(None, None, -1), slice(4, 4)):
        _assert_same(pack.batch(1, 30, rows), {k: v[rows] for k, v in whole.items()})


def test_order_is_pinned(make):
    """The order is part of the checkpoint format: a change breaks every resume."""
    corpus = make([2] * 12)
    pack = packing.Packing(corpus, range(12), 2, seed=7)
    firsts = {int(corpus.tokens[2 * d]): d for d in range(12)}
    assert len(firsts) == 12
    order = [firsts[int(t)] for t in pack.batch(0, 24)["tokens"][:, 0]]
    assert order[:12] == [6, 7, 0, 1, 8, 4, 2, 9, 10, 3, 5, 11]
    assert order[12:] == [3, 0, 8, 9, 2, 1, 11, 6, 7, 5, 4, 10]
    other = packing.Packing(corpus, range(12), 2, seed=8).batch(0, 12)["tokens"][:, 0]
    assert [firsts[int(t)] for t in other] != order[:12]


def test_neighbouring_windows_are_apart(make):
    """A batch is not one stretch of one document."""
    corpus = make([1000] * 20)
    pack = packing.Packing(corpus, range(20), 10, seed=0)
    begins = {corpus.tokens[i : i + 10].tobytes(): i for i in range(0, len(corpus.tokens), 10)}
    tokens = pack.batch(0, 16)["tokens"].astype(np.uint16)
    assert len({begins[row.tobytes()] // 1000 for row in tokens}) >= 8


@pytest.mark.parametrize("seq_len, batch_size", [(7, 3), (16, 4), (500, 2)])
def test_eval_covers_everything_once(make, seq_len, batch_size):
    corpus = make(LENGTHS)
    doc_ids = [6, 0, 1, 9]
    batches = list(packing.eval_batches(corpus, doc_ids, seq_len, batch_size))
    for batch in batches:
        _check_batch(batch, seq_len)
        assert len(batch["tokens"]) == batch_size
    _check_whole(corpus, doc_ids, batches)
    whole = _concatenate(batches)
    flat = whole["tokens"][whole["segment_ids"] > 0]
    np.testing.assert_array_equal(flat, np.concatenate([corpus.document(d) for d in doc_ids]))
    limited = list(packing.eval_batches(corpus, doc_ids, seq_len, batch_size, limit=1))
    assert len(limited) == 1
    _assert_same(limited[0], batches[0])
    part = packing.eval_batches(corpus, doc_ids, seq_len, batch_size, rows=slice(1, 2))
    for ours, theirs in zip(part, batches, strict=True):
        _assert_same(ours, {name: array[1:2] for name, array in theirs.items()})


def test_bytes_of_labels(tmp_path, make):
    corpus = make(LENGTHS)
    lengths = corpus.tokenizer.token_lengths
    batches = packing.eval_batches(corpus, range(len(LENGTHS)), 16, 4)
    total = sum(packing.label_bytes(batch, lengths) for batch in batches)
    longer = sum(n > 1 for n in LENGTHS)  # Those lose their first byte, which nothing predicts.
    assert total == corpus.num_bytes - longer

    tokenizers = pytest.importorskip("tokenizers")
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "two": 1, "words": 2}))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tok.add_special_tokens(["</s>"])
    tok.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "y.jsonl").write_text(json.dumps({"text": "two words two words"}))
    corpus = corpus_lib.load(str(tmp_path / "y.jsonl"), tokenizer_lib.load(str(tmp_path)))
    (batch,) = packing.eval_batches(corpus, [0], 8, 1)
    assert packing.label_bytes(batch, corpus.tokenizer.token_lengths) == len(" words two words")


def test_bad_arguments(make):
    corpus = make([4, 5])
    with pytest.raises(ValueError, match="seq_len 10: the 2 training documents hold only 9 tokens"):
        packing.Packing(corpus, [0, 1], 10, seed=0)
    assert len(list(packing.eval_batches(corpus, [0, 1], 10, 2))) == 1
    with pytest.raises(ValueError, match="seq_len 0"):
        packing.Packing(corpus, [0], 0, seed=0)
    with pytest.raises(ValueError, match="seed -1"):
        packing.Packing(corpus, [0], 2, seed=-1)
    with pytest.raises(ValueError, match="no documents"):
        packing.Packing(corpus, [], 2, seed=0)
    with pytest.raises(ValueError, match=r"0\.\.2 is not within the corpus' 0\.\.1"):
        packing.eval_batches(corpus, [0, 2], 2, 1)
    with pytest.raises(ValueError, match="limit 0"):
        packing.eval_batches(corpus, [0], 2, 1, limit=0)
    with pytest.raises(ValueError, match="step -1"):
        packing.Packing(corpus, [0], 2, seed=0).batch(-1, 4)


@pytest.mark.parametrize("batch_size, seq_len, limit_ms", [(16, 256, 1.0), (8, 4096, 4.0)])
def test_batches_are_fast(batch_size, seq_len, limit_ms):
    corpus = corpus_lib.load("stdlib", tokenizer_lib.load("bytes"))
    pack = packing.Packing(corpus, np.arange(corpus.num_documents), seq_len, seed=0)
    times = []
    for step in range(100):
        begin = time.perf_counter()
        pack.batch(step, batch_size)
        times.append((time.perf_counter() - begin) * 1e3)
    assert min(times) < limit_ms  # The minimum, since other processes share the machine.
