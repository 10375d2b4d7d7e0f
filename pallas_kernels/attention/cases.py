"""The calls by which attention is tested, compiled and timed."""

import numpy as np

from pallas_kernels.cases import Case

TOLERANCE = {"float32": (2e-5, 5e-5), "bfloat16": (2e-2, 4e-2)}


def _make(b, t, h, g, k, v=None, *, s=None, segments=None, blocks=None):
    """`segments`: how many documents share a row, the last of which sees nothing elsewhere."""

    def make(rng):
        keys = t if s is None else s
        shapes = (b, t, h, k), (b, keys, g, k), (b, keys, g, k if v is None else v)
        arrays = [rng.normal(size=shape) for shape in shapes]
        ids = (None, None)
        if segments is not None:
            one = np.sort(rng.integers(1, segments + 1, (b, max(t, keys))), axis=1)
            ids = tuple(one[:, :n].astype(np.int32) for n in (t, keys))
            # Queries of a segment that no key belongs to.
            ids[0][-1, t - t // 5:] = segments + 1
        mask = None
        if blocks is not None:
            mask = rng.random(blocks) < 0.6
            mask[-1] = blocks[0] == 1
        return (*arrays, *ids, mask)

    return make


def _case(name, *shape, core=False, compiled=False, segments=None, blocks=None, s=None,
          **options):
    k = shape[4]
    return Case(name, _make(*shape, s=s, segments=segments, blocks=blocks),
                {"scale": k**-0.5, **options}, (0, 1, 2), TOLERANCE, core, compiled)


CASES = [
    # Pairwise over the options, at most two tiles long.
    _case("causal-64", 1, 256, 2, 2, 64, core=True),
    _case("causal-gqa-segments-128", 2, 160, 4, 2, 128, segments=3, core=True),
    _case("full-mqa-96-odd", 1, 131, 3, 1, 96, s=197, causal=False, segments=2, core=True),
    _case("window-softcap-192-128", 1, 256, 2, 1, 192, 128, window=40, softcap=8.0, core=True),
    _case("block-mask-256", 1, 256, 2, 1, 256, blocks=(2, 2), core=True),
    _case("partial-64-gqa-segments", 1, 256, 4, 2, 64, segments=2, partial=True, core=True),
    _case("partial-full-blocks-128", 1, 128, 2, 2, 128, s=256, causal=False, partial=True,
          blocks=(1, 2), softcap=4.0, core=True),
    # The rest of the product.
    _case("one-token", 1, 1, 2, 1, 64),
    _case("window-of-one", 1, 130, 2, 2, 64, window=1),
    _case("window-segments", 2, 384, 2, 1, 128, window=100, segments=4),
    _case("window-blocks", 1, 512, 2, 2, 64, window=200, blocks=(4, 4)),
    _case("three-tiles-odd", 1, 777, 2, 1, 64),
    _case("values-wider", 1, 300, 2, 2, 64, 128),
    _case("values-narrower", 1, 300, 4, 2, 256, 64, segments=3),
    _case("scale", 1, 200, 2, 2, 64, scale=0.3),
    _case("partial-window", 1, 300, 2, 1, 96, window=50, partial=True),
    _case("full-long-keys", 2, 64, 4, 1, 128, s=640, causal=False),
    # The shapes of the presets, compiled ahead of time.
    *(_case(f"train-{k}", 2, 2048, 8, 4, k, segments=4, compiled=True)
      for k in (64, 96, 128, 192, 256)),
    _case("train-mha-64", 2, 2048, 12, 12, 64, segments=4, compiled=True),
    _case("train-window-128", 1, 4096, 8, 2, 128, segments=2, window=1024, compiled=True),
    _case("train-softcap-256", 1, 2048, 8, 4, 256, segments=2, softcap=50.0, compiled=True),
    _case("train-192-128", 1, 2048, 8, 8, 192, 128, segments=2, compiled=True),
    _case("partial-128", 1, 2048, 8, 2, 128, segments=2, causal=False, partial=True,
          compiled=True),
    # Shapes that other kernels' times are published for, and long ones.
    _case("8x2048x16x128", 8, 2048, 16, 16, 128, compiled=True),
    _case("8x2048x32x64", 8, 2048, 32, 32, 64, compiled=True),
    _case("32x4096x32/8x128", 32, 4096, 32, 8, 128, compiled=True),
    *(_case(f"1x{t}x8x64", 1, t, 8, 8, 64, compiled=True) for t in (2048, 4096, 8192, 16384)),
    _case("blocks-128", 1, 2048, 8, 2, 128, causal=False, blocks=(8, 8), compiled=True),
]

# Two products forward, five backward, one of them the scores again.
BACKWARD = 2.5


def work(operands, options):
    """FLOPs of the pairs that the causal mask and window let through, and one pass of memory."""
    query, key, value = operands[:3]
    b, t, h, k = query.shape
    s, v = key.shape[1], value.shape[-1]
    pairs = t * s
    if options.get("causal", True):
        window = min(options.get("window") or t, t)
        pairs = window * (window + 1) // 2 + (t - window) * window
    return (2 * b * h * pairs * (k + v),
            query.dtype.itemsize * (query.size + key.size + value.size + b * t * h * v))
