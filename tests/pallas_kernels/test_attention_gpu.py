"""Which tiles the GPU kernels of attention visit, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Target
from pallas_kernels.attention import attention, gpu


def seen(t, s, causal, window, query_segments, key_segments, block_mask):
    """bool [B, T, S], by the op's definition."""
    age = np.arange(t)[:, None] - np.arange(s)
    pairs = np.ones((1, t, s), bool)
    if causal:
        pairs &= age >= 0
    if window is not None:
        pairs &= age < window
    if query_segments is not None:
        pairs = pairs & (query_segments[:, :, None] == key_segments[:, None])
    if block_mask is not None:
        blocks = np.repeat(block_mask, t // block_mask.shape[0], axis=0)
        pairs = pairs & np.repeat(blocks, s // block_mask.shape[1], axis=1)
    return pairs


def documents(rng, b, t, count):
    return np.sort(rng.integers(1, count + 1, (b, t)), axis=1).astype(np.int32)


def case(name):
    """(t, s, causal, window, query_segments, key_segments, block_mask, visits nothing in vain)."""
    rng = np.random.default_rng(0)
    packed = documents(rng, 2, 1000, 5)
    return {
        "full": (300, 200, False, None, None, None, None, True),
        "causal": (600, 600, True, None, None, None, None, True),
        "window of one": (600, 600, True, 1, None, None, None, True),
        "window": (1000, 1000, True, 200, None, None, None, True),
        "window of a tile": (512, 512, True, 64, None, None, None, True),
        "window over all": (256, 256, True, 5000, None, None, None, True),
        "packed": (1000, 1000, True, None, packed, packed, None, False),
        "packed window": (1000, 1000, True, 100, packed, packed, None, False),
        "whole documents": (512, 512, False, None, *2 * [np.arange(512)[None] // 128], None, True),
        "unordered": (1000, 1000, True, None, *2 * [rng.permuted(packed, axis=1)], None, False),
        "nothing in common": (256, 256, False, None, packed[:, :256], packed[:, :256] + 9, None,
                              True),
        "blocks": (512, 1024, False, None, None, None, rng.random((4, 4)) < 0.4, True),
        "causal blocks": (1024, 1024, True, None, None, None, rng.random((8, 4)) < 0.5, False),
        "window blocks": (1024, 1024, True, 300, None, None, rng.random((8, 8)) < 0.7, False),
    }[name]


@pytest.mark.parametrize("queries", [True, False])
@pytest.mark.parametrize("name", [
    "full", "causal", "window of one", "window", "window of a tile", "window over all", "packed",
    "packed window", "whole documents", "unordered", "nothing in common", "blocks",
    "causal blocks", "window blocks"])
def test_tiles_hold_what_is_seen(name, queries):
    t, s, causal, window, query_segments, key_segments, block_mask, tight = case(name)
    blocks = None if block_mask is None else (t // block_mask.shape[0], s // block_mask.shape[1])
    walk = gpu._Walk(t, s, queries, 128, 64, 2, causal, window, query_segments is not None, blocks)
    segments = None if query_segments is None else (
        jnp.asarray(query_segments), jnp.asarray(key_segments))
    plan = walk.plan(segments, None if block_mask is None else jnp.asarray(block_mask))

    @jax.jit
    def block(b, i):
        steps, tile, hides = walk.tiles(plan, b, i)
        n = jnp.arange(walk.counts[1], dtype=jnp.int32)
        return steps, jax.vmap(lambda n: (tile(n), hides(n)))(n)

    pairs = seen(t, s, causal, window, query_segments, key_segments, block_mask)
    for b, of_rows in enumerate(pairs if queries else pairs.swapaxes(1, 2)):
        for i in range(walk.counts[0]):
            rows = of_rows[128 * i:128 * i + 128]
            steps, (tiles, hides) = jax.device_get(block(jnp.int32(b), jnp.int32(i)))
            visited = tiles[:steps].tolist()
            assert len(set(visited)) == len(visited)
            for j in range(walk.counts[1]):
                part = rows[:, 64 * j:64 * j + 64]
                if j not in visited:
                    assert not part.any(), (i, j)
                    continue
                assert part.any() or not tight, (i, j)
                if not (hides[visited.index(j)] and walk.masked):
                    assert part.all(), (i, j)
                    # What lies past the last key is hidden too.
                    assert part.shape[1] == 64 or not queries, (i, j)


def shapes(k=64, v=64, t=256, dtype=jnp.bfloat16, **masks):
    array = jax.ShapeDtypeStruct
    made = [array((1, t, 2, size), dtype) for size in (k, k, v)]
    for name in ("query_segments", "key_segments", "block_mask"):
        shape = masks.get(name)
        made.append(None if shape is None else array(
            shape, bool if name == "block_mask" else jnp.int32))
    return made


GPU, CUDNN = "gpu", "cudnn"
SEGMENTS = {"query_segments": (1, 256), "key_segments": (1, 256)}


@pytest.mark.parametrize(("implementation", "chip", "operands", "options", "reason"), [
    (GPU, "h200", {}, {}, None),
    (GPU, "h100", {"k": 192, "v": 128, "t": 77, "dtype": jnp.float16}, {"partial": True}, None),
    (GPU, "h200", SEGMENTS, {"softcap": 50.0, "window": 9}, None),
    (GPU, "h200", {"block_mask": (2, 4)}, {}, None),
    (GPU, "b200", {}, {}, "b200"),
    (GPU, "h200", {"dtype": jnp.float32}, {}, "float32"),
    (GPU, "h200", {"v": 288}, {}, "288"),
    (GPU, "h200", {"block_mask": (2, 8)}, {}, "128 x 32"),
    (CUDNN, "h200", {"t": 77}, {"window": 9}, None),
    (CUDNN, "a100", {"k": 72, "v": 72}, {"causal": False}, None),
    (CUDNN, "mi300", {}, {}, "mi300"),
    (CUDNN, "h200", {"dtype": jnp.float32}, {}, "float32"),
    (CUDNN, "h200", {"k": 36, "v": 36}, {}, "36"),
    (CUDNN, "h200", {"k": 192, "v": 192}, {}, "192"),
    (CUDNN, "h200", {"k": 128}, {}, "128 of keys and 64"),
    (CUDNN, "h200", SEGMENTS, {}, "segments"),
    (CUDNN, "h200", {"block_mask": (2, 2)}, {}, "block_mask"),
    (CUDNN, "h200", {}, {"softcap": 5.0}, "softcap=5.0"),
    (CUDNN, "h200", {}, {"partial": True}, "partial"),
])
def test_supports(implementation, chip, operands, options, reason):
    operands, options = attention.bind(*shapes(**operands), scale=0.1, **options)
    said = attention.module(implementation).supports(Target.parse(chip), *operands, **options)
    assert said is None if reason is None else reason in said


def test_refuses_tiles_that_do_not_fit():
    operands, options = attention.bind(*shapes(k=256, v=256), scale=0.1)
    with pytest.raises(ValueError, match="none of the tiles"):
        jax.eval_shape(lambda *x: gpu.attention(*x, None, None, None, **options, block_k=192),
                       *operands[:3])
