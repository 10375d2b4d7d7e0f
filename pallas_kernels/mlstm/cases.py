"""The calls by which the matrix LSTM is tested, compiled and timed."""

import numpy as np

from pallas_kernels.cases import Case

TOLERANCE = {"float32": (2e-5, 5e-5), "bfloat16": (2e-2, 4e-2)}


def _make(b, t, h, k, v, *, segments=None, state=False, extreme=False):
    """`segments`: documents a row, with padding at the end and in between."""

    def make(rng):
        arrays = [rng.normal(size=(b, t, h, n)) for n in (k, k, v)]
        gates = [rng.normal(loc, 1.0, size=(b, t, h)) for loc in (0.0, 2.0)]
        if extreme:
            # Rows whose sums stay clear of 0, where any precision would lose them.
            arrays[:2] = [abs(x) for x in arrays[:2]]
            draw = rng.random((b, t, h))
            gates[0] = np.select([draw < 0.1, draw < 0.2, draw < 0.3], [15.0, -15.0, -1e30],
                                 gates[0])
            draw = rng.random((b, t, h))
            gates[1] = np.select([draw < 0.1, draw < 0.2, draw < 0.25], [-20.0, 30.0, -1e30],
                                 gates[1])
        ids = None
        if segments is not None:
            ids = np.sort(rng.integers(1, segments + 1, (b, t)), axis=1)
            ids[:, t - t // 8:] = 0
            ids[-1, t // 3: t // 3 + 5] = 0
            ids[0, 0] = 0
            ids = ids.astype(np.int32)
        states = None, None, None
        if state:
            states = [x.astype(np.float32) for x in (
                rng.normal(size=(b, h, k, v)), rng.normal(size=(b, h, k)),
                rng.normal(size=(b, h)))]
        return (*arrays, *(x.astype(np.float32) for x in gates), ids, *states)

    return make


def _case(name, *shape, core=False, compiled=False, segments=None, state=False, extreme=False,
          tolerance=TOLERANCE, **options):
    differentiable = (0, 1, 2, 3, 4, *((6, 7, 8) if state else ()))
    return Case(name, _make(*shape, segments=segments, state=state, extreme=extreme), options,
                differentiable, tolerance, core, compiled)


CASES = [
    # Pairwise over the options, at most two chunks long.
    _case("one-chunk-64", 1, 128, 2, 64, 64, core=True),
    _case("state-segments-64-128", 1, 160, 2, 64, 128, segments=3, state=True, core=True),
    _case("odd-state-128-96", 1, 131, 3, 128, 96, state=True, core=True),
    _case("sigmoid-state-segments-odd", 2, 77, 2, 64, 64, segments=2, state=True,
          sigmoid_gate=True, core=True),
    _case("extreme-gates", 1, 256, 2, 64, 128, extreme=True, core=True),
    _case("sigmoid-eps-128", 1, 140, 2, 128, 64, eps=0.1, sigmoid_gate=True, core=True),
    # The rest of the product.
    _case("one-position", 1, 1, 2, 64, 64, state=True),
    _case("chunks-odd", 1, 777, 2, 64, 64),
    _case("wide-256-512", 1, 300, 1, 256, 512, state=True),
    _case("extreme-segments-state", 2, 333, 2, 64, 64, segments=5, state=True, extreme=True),
    _case("sigmoid-extreme", 1, 300, 2, 64, 64, extreme=True, sigmoid_gate=True),
    # The shapes of the presets, compiled ahead of time.
    _case("train-256-512", 2, 2048, 8, 256, 512, segments=4, compiled=True),
    _case("train-128-256", 2, 2048, 8, 128, 256, segments=4, compiled=True),
    _case("train-64-128", 4, 2048, 4, 64, 128, segments=4, compiled=True),
    _case("train-sigmoid-256-512", 1, 4096, 8, 256, 512, sigmoid_gate=True, compiled=True),
]

# The products of the state with a row: two forward, four backward and its making again.
BACKWARD = 2.5


def work(operands, options):
    """FLOPs of the recurrence (a rank-one update and a read a step), and one pass of memory."""
    query, key, value, input_gate, forget_gate = operands[:5]
    rows, k, v = input_gate.size, query.shape[-1], value.shape[-1]
    moved = 2 * value.size * value.dtype.itemsize + 2 * query.size * query.dtype.itemsize
    return 4 * rows * k * v, moved + input_gate.nbytes + forget_gate.nbytes
