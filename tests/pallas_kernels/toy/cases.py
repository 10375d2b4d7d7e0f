"""The calls by which the toy op is tested."""

from pallas_kernels.cases import Case

CASES = [
    Case("squares", lambda rng: (rng.normal(size=(16, 128)), rng.normal(size=128)), {}, (0, 1),
         {"float32": (1e-6, 1e-5)}, core=True),
    Case("cubes", lambda rng: (rng.normal(size=(3, 5)), rng.normal(size=5)), {"power": 3}, (0, 1),
         {"float32": (1e-6, 1e-5)}, core=True),
]

BACKWARD = 2.0


def work(operands, options):
    """Two multiplications an element; x and the result pass through memory once."""
    return 2 * operands[0].size, 2 * operands[0].nbytes
