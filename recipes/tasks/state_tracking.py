"""State tracking: the parity of random bits, in training and at positions far beyond it.

The word problem of the group of two elements (Merrill et al., arXiv:2404.08819). A model solves it
at any length only if it carries a state through all positions, each a nonlinear function of the
last: a recurrence like sLSTM's does (xLSTM, arXiv:2405.04517, section 4.1), attention and linear
recurrences with positive gates do not.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes.tasks import Batch, Measure
from recipes.tasks.lm import TOKENIZER, check_length, make_loss
from recipes.tokenizer import Bytes

LENGTHS = 8  # Evaluated are positions up to so many times the length of training.
_TRAIN, _HELDOUT = 0, 1  # Streams of random numbers.


def strings(seed: int, ids: Sequence[int], width: int, lengths: np.ndarray | None = None,
            stream: int = _TRAIN) -> Batch:
    """Strings of bits and their parities as a batch of `recipes.tasks.lm.BATCH`, [rows, width].

    String number i of a stream depends on the seed and i alone. Its length is lengths[i], or
    uniform in 1..width; behind it is padding. Tokens are the characters 0 and 1; the label of a
    position is the parity of the bits up to there, as such a character.
    """
    bits = np.zeros((len(ids), width), np.int32)
    valid = np.zeros((len(ids), width), bool)
    for row, index in enumerate(ids):
        rng = np.random.Generator(np.random.Philox(key=[seed % 2**64, 2 * int(index) + stream]))
        length = rng.integers(1, width, endpoint=True) if lengths is None else lengths[row]
        bits[row] = rng.integers(0, 2, width)
        valid[row, :length] = True
    parity = np.cumsum(bits, axis=1) % 2
    return {
        "tokens": np.where(valid, ord("0") + bits, 0).astype(np.int32),
        "segment_ids": valid.astype(np.int32),
        "positions": np.where(valid, np.arange(width), 0).astype(np.int32),
        "labels": np.where(valid, ord("0") + parity, 0).astype(np.int32),
        "weights": valid.astype(np.float32),
    }


class StateTracking:
    """Parity at every position; a `recipes.tasks.Task`."""

    unit, axes = "tokens", ("batch", "seq")

    def __init__(self, config: Any, *, seq_len: int = 40, batch_size: int = 64, seed: int = 0,
                 eval_batches: int = 4):
        """Makes the held-out strings.

        Args:
          config: of a language model, whose vocabulary holds bytes.
          seq_len: training strings have 1 to so many bits.
          batch_size: strings of a step, of all processes together.
          seed: of the training strings; those of the evaluation do not depend on it.
          eval_batches: an evaluation takes so many batches of strings.

        Raises:
          ValueError: sizes that do not fit the model.
        """
        check_length(config, seq_len)
        if config.vocab_size < 256:
            raise ValueError(f"vocab_size {config.vocab_size}: the strings are bytes, so it must "
                             "be at least 256; give --set=vocab_size=264")
        if eval_batches < 1:
            raise ValueError(f"eval_batches {eval_batches}: it must be at least 1")
        self._seq_len, self._batch_size, self._seed = seq_len, batch_size, seed
        self._eval_batches = eval_batches
        # The ends of the ranges of positions that are reported.
        self._ends = [seq_len * n for n in range(1, LENGTHS + 1)
                      if seq_len * n <= config.max_length]
        self.loss = make_loss(0.0, accuracy=True)
        self.units_per_step = batch_size * seq_len
        self.flops_per_step = 3 * config.flops_per_token(seq_len) * self.units_per_step

    def describe(self) -> dict[str, Any]:
        """See `Task`."""
        return {"data": {"spec": "parity of random bits", "seq_len": self._seq_len},
                "tokenizer": {"name": "bytes", "fingerprint": Bytes().fingerprint},
                "task": {"name": "state_tracking"}}

    def keep(self, folder: Path) -> None:
        """Writes the tokenizer, bytes."""
        Bytes().save(folder / TOKENIZER)

    def ids(self, step: int) -> list[int]:
        """See `Task`."""
        return list(range(step * self._batch_size, (step + 1) * self._batch_size))

    def batch(self, step: int, rows: np.ndarray) -> Batch:
        """See `Task`."""
        return strings(self._seed, [self.ids(step)[row] for row in rows], self._seq_len)

    def evaluate(self, measure: Measure, final: bool) -> dict[str, float]:
        """The accuracy of single positions by ranges of them: "accuracy_40" is of the first 40,
        "accuracy_80" of positions 41 to 80.
        """
        longest = self._ends[-1]
        correct = np.zeros(longest)
        for index in range(self._eval_batches):
            ids = range(index * self._batch_size, (index + 1) * self._batch_size)
            batch = strings(0, ids, longest, np.full(len(ids), longest), _HELDOUT)
            correct += measure(batch)[2]["accuracy"]
        accuracy = correct / (self._eval_batches * self._batch_size)
        return {f"accuracy_{end}": float(accuracy[end - self._seq_len:end].mean())
                for end in self._ends}

    def summarize(self, metrics: Mapping[str, float]) -> str:
        """See `Task`."""
        trained, longest = self._ends[0], self._ends[-1]
        text = (f"parity right at {metrics[f'accuracy_{trained}']:.1%} of positions 1 to "
                f"{trained}, the lengths of training")
        if longest == trained:
            return text
        return text + (f", and at {metrics[f'accuracy_{longest}']:.1%} of positions "
                       f"{longest - trained + 1} to {longest}")

    def draw(self, folder: Path, runs: Mapping[str, list[Mapping[str, Any]]]) -> None:
        """Writes accuracy.png: the final accuracy of each run over the position."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
        for name, records in runs.items():
            found = next((r["final"] for r in reversed(records) if "final" in r), {})
            points = sorted((int(key.removeprefix("accuracy_")), value)
                            for key, value in found.items() if key.startswith("accuracy_"))
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=name)
        axes.axvspan(0, self._seq_len, color="gray", alpha=0.15, label="lengths of training")
        axes.axhline(0.5, color="gray", linestyle="--", label="guessing")
        axes.set(xlabel="position, in strings of random bits", ylabel="accuracy of the parity",
                 ylim=(0.45, 1.02), xlim=(0, self._ends[-1] * 1.02))
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(folder / "accuracy.png", dpi=120)
        pyplot.close(figure)
