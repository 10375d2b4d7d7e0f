"""Packs documents into fixed-length rows; the order is a pure function of (seed, example id)."""

import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from recipes.corpus import Corpus

# Which of an epoch's two permutations a random stream is for.
_DOCUMENTS, _WINDOWS = 0, 1


class Packing:
    """The endless sequence of training examples of some documents.

    In epoch e the documents are permuted, laid end to end, and cut into `examples_per_epoch`
    windows of `seq_len` tokens, which are permuted in turn: neighbouring windows mostly come from
    one document, and a batch of them would be little more than one sample. Example i is window
    i % examples_per_epoch of epoch i // examples_per_epoch. The last window is padded, not dropped,
    so each token is seen exactly once an epoch. Both permutations depend on (seed, e) alone, and
    any example can be had without those before it.

    Arrays of an example, all [T]:
      tokens int32: token ids; 0 in padding.
      segment_ids int32: documents of the row count 1, 2, ...; 0 in padding.
      positions int32: restart at 0 with each document, and at the start of the row.
      labels int32: the next token of the same document, also past the row's end; 0 without one.
      weights float32: 1, or 0 for a document's last token and for padding.

    Attributes:
      tokens_per_epoch: tokens of the documents.
      examples_per_epoch: windows of one epoch.
    """

    def __init__(
        self,
        corpus: Corpus,
        doc_ids: Sequence[int] | np.ndarray,
        seq_len: int,
        seed: int,
        shuffle: bool = True,
    ):
        """Packs documents `doc_ids` of a corpus, in that order if not `shuffle`.

        Raises:
          ValueError: seq_len < 1, seed < 0, a document id outside the corpus, or documents that
            do not fill one row.
        """
        if seed < 0:
            raise ValueError(f"seed {seed}: it must not be negative")
        self._corpus, self._seq_len, self._seed, self._shuffle = corpus, seq_len, seed, shuffle
        self._doc_ids = _check_documents(corpus, doc_ids, seq_len)
        self._lengths = _lengths(corpus, self._doc_ids)
        self.tokens_per_epoch = int(self._lengths.sum())
        if self.tokens_per_epoch < seq_len:
            raise ValueError(
                f"seq_len {seq_len}: the {len(self._doc_ids)} training documents hold only "
                f"{self.tokens_per_epoch} tokens; lower seq_len, or give more data"
            )
        self.examples_per_epoch = -(-self.tokens_per_epoch // seq_len)
        # A batch may straddle two epochs.
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)

    def ids(self, step: int, batch_size: int) -> np.ndarray:
        """Global example ids of a step, int64 [batch_size]."""
        if step < 0 or batch_size < 1:
            raise ValueError(f"step {step}, batch_size {batch_size}: they must be >= 0 and >= 1")
        return step * batch_size + np.arange(batch_size, dtype=np.int64)

    def example(self, global_index: int) -> dict[str, np.ndarray]:
        """One example, arrays [T]."""
        batch = self._gather(np.array([global_index], np.int64))
        return {name: array[0] for name, array in batch.items()}

    def batch(self, step: int, batch_size: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """A step's examples, arrays [rows, T].

        Args:
          step: the step, from 0.
          batch_size: examples of all processes together.
          rows: the rows this process feeds; None for all.
        """
        ids = self.ids(step, batch_size)
        return self._gather(ids if rows is None else ids[rows])

    def _gather(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        epochs, within = np.divmod(ids, self.examples_per_epoch)
        parts = []
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            doc_ids, bounds, windows = self._epoch(int(epoch))
            begins = windows[within[chosen]] * self._seq_len
            batch = _cut(self._corpus, doc_ids, bounds, begins, self._seq_len)
            if chosen.all():
                return batch
            parts.append((chosen, batch))
        whole = _zeros(len(ids), self._seq_len)
        for chosen, batch in parts:
            for name, array in whole.items():
                array[chosen] = batch[name]
        return whole

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(document ids in stream order, their stream bounds, windows in example order)."""
        order = self._permute(epoch, _DOCUMENTS, len(self._doc_ids))
        windows = self._permute(epoch, _WINDOWS, self.examples_per_epoch)
        return self._doc_ids[order], _bounds(self._lengths[order]), windows

    def _permute(self, epoch: int, stream: int, size: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(size)
        # Sorting raw 64-bit draws: NumPy keeps a bit generator's stream fixed across versions, but
        # not what Generator.permutation makes of it.
        generator = np.random.Philox(np.random.SeedSequence([self._seed, epoch, stream]))
        return np.argsort(generator.random_raw(size), kind="stable")


def eval_batches(
    corpus: Corpus,
    doc_ids: Sequence[int] | np.ndarray,
    seq_len: int,
    batch_size: int,
    limit: int | None = None,
    rows: slice | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches that cover each token of the documents once, in order; arrays as of `Packing`.

    Args:
      corpus, doc_ids: the documents; fewer tokens than one row are padded.
      seq_len: row length T.
      batch_size: examples of all processes together; the last batch is padded with empty rows.
      limit: stops after this many batches; None for all.
      rows: the rows this process feeds; None for all.
    """
    doc_ids = _check_documents(corpus, doc_ids, seq_len)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size {batch_size}, limit {limit}: they must be at least 1")
    bounds = _bounds(_lengths(corpus, doc_ids))
    windows = -(-int(bounds[-1]) // seq_len)
    begins = np.arange(-(-windows // batch_size) * batch_size) * seq_len
    batches = begins.reshape(-1, batch_size)[:limit]
    return (
        _cut(corpus, doc_ids, bounds, row_begins if rows is None else row_begins[rows], seq_len)
        for row_begins in batches
    )


def label_bytes(batch: Mapping[str, np.ndarray], token_lengths: np.ndarray) -> int:
    """Bytes of text that a batch's labels stand for: what to divide its summed nats by.

    Nats per byte compare models of different tokenizers. The first token of a document is no
    label, so its bytes are in neither sum.

    Args:
      batch: of `Packing` or `eval_batches`.
      token_lengths: int32 [vocab_size], the tokenizer's.
    """
    return int(token_lengths[batch["labels"][batch["weights"] > 0]].sum(dtype=np.int64))


def _check_documents(
    corpus: Corpus, doc_ids: Sequence[int] | np.ndarray, seq_len: int
) -> np.ndarray:
    if seq_len < 1:
        raise ValueError(f"seq_len {seq_len}: it must be at least 1")
    ids = np.asarray(doc_ids, np.int64)
    if ids.size == 0:
        raise ValueError("doc_ids: there are no documents to pack; give some")
    if ids.min() < 0 or ids.max() >= corpus.num_documents:
        raise ValueError(
            f"doc_ids: {ids.min()}..{ids.max()} is not within the corpus' "
            f"0..{corpus.num_documents - 1}; take them from `split`"
        )
    return ids


def _lengths(corpus: Corpus, doc_ids: np.ndarray) -> np.ndarray:
    return corpus.starts[doc_ids + 1] - corpus.starts[doc_ids]


def _bounds(lengths: np.ndarray) -> np.ndarray:
    """Where each document of a stream begins, and last the stream's length: int64 [documents+1]."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _zeros(rows: int, seq_len: int) -> dict[str, np.ndarray]:
    names = ("tokens", "segment_ids", "positions", "labels")
    batch = {name: np.zeros((rows, seq_len), np.int32) for name in names}
    return batch | {"weights": np.zeros((rows, seq_len), np.float32)}


def _cut(
    corpus: Corpus, doc_ids: np.ndarray, bounds: np.ndarray, begins: np.ndarray, seq_len: int
) -> dict[str, np.ndarray]:
    """Rows [begin, begin + seq_len) of the stream of documents, padded past its end.

    Args:
      doc_ids: int64 [documents], in stream order.
      bounds: int64 [documents + 1], their bounds in the stream.
      begins: int64 [rows], multiples of seq_len.
    """
    stops = np.minimum(begins + seq_len, bounds[-1])
    begins = np.minimum(begins, stops)
    # A segment is the part of one document in one row; `which` counts a row's segments from 0.
    first = np.searchsorted(bounds, begins, side="right") - 1
    counts = np.searchsorted(bounds, stops, side="left") - first
    row = np.repeat(np.arange(len(begins)), counts)
    which = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    rank = first[row] + which
    low = np.maximum(bounds[rank], begins[row])
    lengths = np.minimum(bounds[rank + 1], stops[row]) - low
    document = doc_ids[rank]
    source = corpus.starts[document] + low - bounds[rank]

    def spread(per_segment: np.ndarray) -> np.ndarray:
        return np.repeat(per_segment, lengths)

    positions = np.arange(lengths.sum()) - spread(np.cumsum(lengths) - lengths)
    index = spread(source) + positions
    # The label is the next token even past the row's end, so a cut costs no label.
    has_label = index + 1 < spread(corpus.starts[document + 1])
    flat = {
        "tokens": corpus.tokens[index],
        "segment_ids": spread(which + 1),
        "positions": positions,
        "labels": np.where(has_label, corpus.tokens[index + has_label], 0),
        "weights": has_label,
    }
    batch = _zeros(len(begins), seq_len)
    filled = np.arange(seq_len) < (stops - begins)[:, None]
    padded = not filled.all()
    for name, array in batch.items():
        if padded:
            array[filled] = flat[name]
        else:  # A plain copy is several times faster than a masked one.
            array.reshape(-1)[:] = flat[name]
    return batch
