"""Language modelling: packed text, next-token loss, held-out nats per byte, a loss curve."""

import functools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from recipes import corpus as corpora
from recipes import packing
from recipes.tasks import Batch, Measure, Workload
from recipes.tokenizer import load as load_tokenizer
from zoo.registry import check_kind

TOKENIZER = "tokenizer"  # The directory in a workdir that holds the tokenizer's files.
# The arrays of a batch, all [batch, time]; see `recipes.packing`.
BATCH = {"tokens": np.int32, "segment_ids": np.int32, "positions": np.int32, "labels": np.int32,
         "weights": np.float32}


def make_loss(z_loss: float, accuracy: bool = False) -> Callable:
    """A `Task.loss`: the labels' cross-entropy, in training with a z-loss of that coefficient and
    the model's auxiliary losses. The model's statistics are reported with them, and where asked
    for how often a label is the likeliest token; in evaluation that is by position, [time].

    An auxiliary loss or statistic is a mean of its own. Times the labels' weight it can be added
    to their sum: what the total is divided by in the end, and microbatches, then leave it the mean
    it is.
    """
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss {z_loss}: it must be 0 (none) or more, and finite")

    def loss(model, batch, key, train):
        inputs = {name: batch[name] for name in ("tokens", "segment_ids", "positions")}
        output = model(inputs, key, train)
        total, weight, stats = model.loss(output, batch["labels"], batch["weights"],
                                          z_loss=z_loss if train else 0.0)
        found = {"nats_per_token": stats["nll"]}
        if accuracy and train:
            found["accuracy"] = stats["correct"]
        elif accuracy:
            right = jnp.argmax(output.logits, axis=-1) == batch["labels"]
            found["accuracy"] = jnp.sum(right * batch["weights"], axis=0)
        if train:
            for name, (extra, count) in {**output.losses, **output.stats}.items():
                found[name] = extra / jnp.maximum(count, 1e-30) * weight
            total += sum(found[name] for name in output.losses)
        return total, weight, found, output.statistics

    return loss


def check_length(config: Any, seq_len: int) -> None:
    """Raises ValueError for sequences, or anything else, that the model is not made for."""
    check_kind(config, "language")
    if seq_len < 1:
        raise ValueError(f"seq_len {seq_len}: it must be at least 1")
    if seq_len > config.max_length:
        raise ValueError(
            f"seq_len {seq_len}: it must be in 1..{config.max_length}, the model's max_length; "
            f"lower it, or give --set=max_length={seq_len}")


def workload(config: Any, batch_size: int, seq_len: int) -> Workload:
    """Of so many rows. Raises ValueError for sequences that the model is not made for."""
    check_length(config, seq_len)
    tokens = batch_size * seq_len
    return Workload(
        unit="tokens", axes=LanguageModel.axes, loss=make_loss(0.0), units=tokens,
        flops=tokens * config.flops_per_token(seq_len),
        batch={name: ((batch_size, seq_len), kind) for name, kind in BATCH.items()})


class LanguageModel:
    """Predicting the next token of documents packed into rows; a `recipes.tasks.Task`."""

    unit, axes = "tokens", ("batch", "seq")

    def __init__(self, config: Any, *, data: str = "stdlib", tokenizer: str = "bytes",
                 seq_len: int = 256, batch_size: int = 16, seed: int = 0, heldout: float = 0.05,
                 z_loss: float = 0.0, eval_batches: int = 32, final_eval_batches: int = 1000,
                 cache_dir: str | os.PathLike | None = None):
        """Loads the data.

        Args:
          config: of the model.
          data, tokenizer: see `recipes.corpus.load` and `recipes.tokenizer.load`.
          seq_len: tokens of a row.
          batch_size: rows of a step, of all processes together.
          seed: of the order of the examples.
          heldout: the part of the documents that is kept for evaluation, 0 for none. Which these
            are does not depend on the seed.
          z_loss: coefficient of log(Z)^2 in the training loss.
          eval_batches: the evaluations during training take held-out documents, always the same,
            of about so many batches.
          final_eval_batches: and so many the one after training.
          cache_dir: for tokenized text.

        Raises:
          ValueError: data that cannot be read, or that does not fit the model.
        """
        work = workload(config, batch_size, seq_len)
        for name, value in (("eval_batches", eval_batches),
                            ("final_eval_batches", final_eval_batches)):
            if value < 1:
                raise ValueError(f"{name} {value}: it must be at least 1")
        self._tokenizer = load_tokenizer(tokenizer)
        if self._tokenizer.vocab_size > config.vocab_size:
            size = self._tokenizer.vocab_size
            raise ValueError(
                f"tokenizer {tokenizer!r} has {size} ids and the model only {config.vocab_size}; "
                f"give --set=vocab_size={size}, or another tokenizer")
        self._corpus = corpora.load(data, self._tokenizer, cache_dir)
        train, self._heldout = corpora.split(self._corpus, heldout)
        self._packing = packing.Packing(self._corpus, train, seq_len, seed)
        self._seq_len, self._batch_size = seq_len, batch_size
        self._eval_batches, self._final_eval_batches = eval_batches, final_eval_batches
        self.loss = make_loss(z_loss)
        self.units_per_step, self.flops_per_step = work.units, 3 * work.flops
        self._description = {
            "data": {**self._corpus.manifest, "heldout": heldout, "seq_len": seq_len},
            "tokenizer": {"name": tokenizer, "fingerprint": self._tokenizer.fingerprint},
            "task": {"name": "lm", "z_loss": z_loss},
        }

    def describe(self) -> dict[str, Any]:
        """See `Task`."""
        return self._description

    def keep(self, folder: Path) -> None:
        """Writes the tokenizer, so that the directory can be moved and its model still decodes."""
        self._tokenizer.save(folder / TOKENIZER)

    def batch(self, step: int, rows: np.ndarray) -> Batch:
        """See `Task`."""
        return self._packing.batch(step, self._batch_size, rows)

    def ids(self, step: int) -> list[int]:
        """See `Task`."""
        return self._packing.ids(step, self._batch_size).tolist()

    def evaluate(self, measure: Measure, final: bool) -> dict[str, float]:
        """Nats per token and per byte of held-out documents, and gzip's after training."""
        if not len(self._heldout):
            return {}
        documents = self._select(self._final_eval_batches if final else self._eval_batches)
        nats = tokens = size = 0.0
        for batch in packing.eval_batches(self._corpus, documents, self._seq_len,
                                          self._batch_size):
            total, weight, _ = measure(batch)
            nats, tokens = nats + total, tokens + weight
            size += packing.label_bytes(batch, self._tokenizer.token_lengths)
        per_token, per_byte = nats / max(tokens, 1.0), nats / max(size, 1.0)
        found = {"nats_per_byte": per_byte, "bits_per_byte": per_byte / math.log(2),
                 "nats_per_token": per_token, "perplexity": math.exp(min(per_token, 700.0))}
        if final:
            found["gzip_nats_per_byte"] = self._gzip
        return found

    def summarize(self, metrics: Mapping[str, float]) -> str:
        """See `Task`."""
        if not metrics:
            return "trained on all documents, with none held out"
        return (f"held-out loss {metrics['nats_per_byte']:.4f} nats per byte "
                f"({metrics['bits_per_byte']:.3f} bits); gzip needs "
                f"{metrics['gzip_nats_per_byte']:.4f}")

    @functools.cached_property
    def _gzip(self) -> float:
        return corpora.gzip_nats_per_byte(self._corpus, self._select(self._final_eval_batches))

    def _select(self, batches: int) -> np.ndarray:
        """Held-out documents of about so many batches: whole ones, drawn by their hashes."""
        order = self._heldout[np.argsort(self._corpus.document_hashes[self._heldout],
                                         kind="stable")]
        lengths = self._corpus.starts[order + 1] - self._corpus.starts[order]
        room = batches * self._batch_size * self._seq_len
        return order[:max(1, int(np.searchsorted(np.cumsum(lengths), room, side="right")))]

    def draw(self, folder: Path, runs: Mapping[str, list[Mapping[str, Any]]]) -> None:
        """Writes loss.png: nats per byte in training and held out over steps, and gzip's.

        Of other runs it shows the held-out ones.
        """
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
        (name, records), *others = runs.items()
        train = [(r["step"], r["train"]["nats_per_token"]) for r in records if "train" in r]
        if train:
            steps, losses = np.array(train, np.float64).T
            losses = losses / self._corpus.bytes_per_token
            smooth = _smooth(losses)
            axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth, color="tab:blue", label=f"train ({smooth[-1]:.3f})")
        held = _heldout(records)
        if held:
            axes.plot(*zip(*held, strict=True), "o-", color="tab:orange", markersize=4,
                      label=f"{f'{name}, ' if others else ''}held out ({held[-1][1]:.3f})")
        for other, (name, found) in enumerate(others):
            points = _heldout(found)
            if points:
                axes.plot(*zip(*points, strict=True), "s-", color=f"C{2 + other}", markersize=3,
                          label=f"{name}, held out ({points[-1][1]:.3f})")
        if len(self._heldout):
            axes.axhline(self._gzip, color="gray", linestyle="--",
                         label=f"gzip -9 ({self._gzip:.3f})")
            # The first steps would squeeze all the rest into a corner.
            lowest = min([self._gzip, *(y for _, y in held)])
            axes.set_ylim(0.9 * lowest, 2.6 * lowest)
        axes.set(xlabel="step", ylabel="nats per byte", title=self._corpus.manifest["spec"])
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(folder / "loss.png", dpi=120)
        pyplot.close(figure)


def _heldout(records: list[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(step, nats per byte) of a run's evaluations."""
    return [(r["step"], r[kind]["nats_per_byte"]) for kind in ("heldout", "final")
            for r in records if "nats_per_byte" in r.get(kind, {})]


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over the last twentieth of all values, to see a trend in noise."""
    width = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - width, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)
