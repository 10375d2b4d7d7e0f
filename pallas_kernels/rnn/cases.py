"""The calls by which the recurrent cells are tested, compiled and timed."""

import numpy as np

from pallas_kernels.cases import Case
from pallas_kernels.rnn.cells import CELLS

TOLERANCE = {"float32": (2e-5, 5e-5), "bfloat16": (2e-2, 4e-2)}


def _make(cell, b, t, h, d, *, segments=None, state=False):
    """`segments`: documents a row, with padding at the end and in between."""

    def make(rng):
        kind = CELLS[cell]
        inputs = rng.normal(size=(b, t, kind.gates, h, d))
        # Of a spectral radius below 1: longer sequences tell a matrix as well as short ones.
        recurrent = rng.normal(0.0, 0.7 / d**0.5, size=(kind.gates, h, d, d))
        bias = rng.normal(size=(kind.biases, h, d))
        ids, states = None, None
        if segments is not None:
            ids = np.sort(rng.integers(1, segments + 1, (b, t)), axis=1)
            ids[:, t - t // 8:] = 0
            ids[-1, t // 3: t // 3 + 5] = 0
            ids[0, 0] = 0
            ids = ids.astype(np.int32)
        if state:
            states = rng.normal(size=(kind.states, b, h, d)).astype(np.float32)
            if cell == "slstm":
                # A normalizer is a sum of positive numbers.
                states = np.stack([*states[:2], 1 + abs(states[2]), states[3]])
        return inputs, recurrent, bias, ids, states

    return make


def _case(name, cell, *shape, core=False, compiled=False, segments=None, state=False):
    return Case(name, _make(cell, *shape, segments=segments, state=state), {"cell": cell},
                (0, 1, 2, *((4,) if state else ())), TOLERANCE, core, compiled)


CASES = [
    # Pairwise over cells, lengths, widths, segments and states.
    _case("lstm-state-odd-64", "lstm", 2, 9, 2, 64, state=True, core=True),
    _case("gru-segments-state-64", "gru", 2, 12, 3, 64, segments=2, state=True, core=True),
    _case("elman-segments-odd-48", "elman", 3, 11, 2, 48, segments=2, core=True),
    _case("slstm-segments-state-odd-64", "slstm", 2, 13, 2, 64, segments=3, state=True, core=True),
    _case("slstm-128", "slstm", 1, 8, 1, 128, core=True),
    # The rest of the product.
    _case("lstm-segments-128", "lstm", 2, 23, 2, 128, segments=2, state=True),
    _case("gru-odd-200", "gru", 1, 17, 1, 200, state=True),
    _case("elman-state-odd-32", "elman", 1, 15, 5, 32, state=True),
    _case("slstm-odd-256", "slstm", 1, 9, 1, 256, state=True),
    _case("lstm-one-position", "lstm", 1, 1, 2, 64, state=True),
    # The shapes of the presets and of FlashRNN's own measurements, compiled ahead of time.
    _case("train-lstm-64", "lstm", 8, 1024, 12, 64, compiled=True),
    _case("train-gru-128", "gru", 8, 1024, 6, 128, segments=4, compiled=True),
    _case("train-slstm-64", "slstm", 8, 1024, 12, 64, segments=4, compiled=True),
    _case("train-elman-128", "elman", 8, 1024, 6, 128, state=True, compiled=True),
]

# Products by the transposed matrices, and those that are the matrices' own gradients.
BACKWARD = 2.0


def work(operands, options):
    """FLOPs of the products, and one pass of memory."""
    inputs, recurrent = operands[:2]
    h = inputs.size // inputs.shape[2] * inputs.dtype.itemsize
    moved = sum(x.size * x.dtype.itemsize for x in (inputs, recurrent)) + h
    return 2 * inputs.size * inputs.shape[-1], moved
