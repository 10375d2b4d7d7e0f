"""The calls by which cross-entropy is tested, compiled and timed."""

import numpy as np

from pallas_kernels.cases import Case

TOLERANCE = {"float32": (1e-5, 1e-5), "bfloat16": (2e-2, 4e-2)}


def _make(b, t, d, v, weighted, words):
    def make(rng):
        weights = np.ones((b, t))
        if weighted:
            weights = rng.integers(0, 3, (b, t)) / 2.0
            weights[0, 0], weights[-1, -1] = 0.0, 1.5
        labels = rng.integers(0, words, (b, t))
        # Both ends of the vocabulary.
        labels.flat[-2:] = 0, words - 1
        return (rng.normal(size=(b, t, d)), rng.normal(size=(d, v)) * d**-0.5,
                labels.astype(np.int32), weights.astype(np.float32))

    return make


def _case(name, b, t, d, v, *, weighted=True, core=False, compiled=False, **options):
    make = _make(b, t, d, v, weighted, options.get("vocab_size", v))
    return Case(name, make, options, (0, 1), TOLERANCE, core, compiled)


CASES = [
    # Pairwise over the options.
    _case("plain", 2, 128, 64, 512, weighted=False, core=True),
    _case("z-loss-smoothing-odd", 3, 7, 24, 131, z_loss=1e-2, label_smoothing=0.1, core=True),
    _case("softcap-smoothing", 1, 160, 128, 600, softcap=3.0, label_smoothing=0.2,
          weighted=False, core=True),
    _case("softcap-z-loss-odd", 5, 31, 72, 264, softcap=2.0, z_loss=1e-2, core=True),
    _case("wide-odd", 1, 129, 200, 390, core=True),
    _case("filled-up", 2, 40, 48, 264, vocab_size=251, z_loss=1e-2, label_smoothing=0.1,
          softcap=2.0, core=True),
    # The rest of the product.
    _case("all", 2, 150, 96, 700, z_loss=1e-2, label_smoothing=0.1, softcap=4.0),
    _case("smoothing", 2, 64, 64, 512, label_smoothing=0.5),
    _case("z-loss", 2, 64, 64, 512, z_loss=0.1),
    _case("softcap-tight", 1, 64, 64, 384, softcap=0.5),
    _case("one-position", 1, 1, 64, 300, weighted=False, z_loss=1e-2),
    _case("two-words", 2, 40, 16, 2),
    _case("many-slices", 2, 1300, 32, 300, label_smoothing=0.1),
    _case("deep", 1, 64, 1100, 260, z_loss=1e-3),
    # The shapes of the presets, compiled ahead of time.
    _case("train-512-32000", 8, 512, 512, 32_000, compiled=True),
    _case("train-2048-128256", 2, 2048, 2048, 128_256, z_loss=1e-4, compiled=True),
    _case("train-4096-152064", 2, 2048, 4096, 152_064, label_smoothing=0.1, compiled=True),
    _case("train-2304-256000-softcap", 1, 2048, 2304, 256_000, softcap=30.0, compiled=True),
    _case("train-768-50257", 4, 1024, 768, 50_257, z_loss=1e-4, compiled=True),
    _case("train-320-264", 16, 256, 320, 264, compiled=True),
]

# The products that make both gradients.
BACKWARD = 2.0


def work(operands, options):
    """FLOPs of the logits; hidden and head pass through memory once."""
    hidden, head = operands[:2]
    return 2 * hidden.size * head.shape[1], hidden.nbytes + head.nbytes
