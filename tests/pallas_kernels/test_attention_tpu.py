"""Attention's TPU kernels beyond the shared cases: many small tiles, their schedule, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Target, cases
from pallas_kernels.attention import attention, splash, tpu
from tests.pallas_kernels.test_cases import expected, results
from tests.tolerances import assert_close

V5P = Target.parse("v5p")


def operands(b, t, h, g, k, v, *, s=None, segments=0, blocks=None, seed=0):
    rng = np.random.default_rng(seed)
    s = t if s is None else s
    arrays = [rng.normal(size=x).astype(np.float32)
              for x in ((b, t, h, k), (b, s, g, k), (b, s, g, v))]
    ids, mask = (None, None), None
    if segments:
        # In no order: tiles must not be skipped that a later key of the segment lies in.
        ids = [rng.integers(0, segments, (b, n)).astype(np.int32) for n in (t, s)]
        ids[0][:, : t // 3], ids[1][:, : s // 3] = 7, 7
        ids[0][:, -3:] = 9  # sees nothing
    if blocks is not None:
        mask = rng.random(blocks) < 0.5
        mask[1], mask[:, 0] = False, False
    return (*arrays, *ids, mask)


SMALL = {
    "a group in two tiles": (
        {"b": 2, "t": 384, "h": 4, "g": 1, "k": 128, "v": 128, "segments": 2},
        {}, {"block_rows": 256, "block_k": 128}),
    "pairs of heads, window": (
        {"b": 1, "t": 512, "h": 4, "g": 4, "k": 64, "v": 64},
        {"window": 150}, {"block_rows": 256, "block_k": 128}),
    "pairs of odd groups, long key tiles": (
        {"b": 1, "t": 300, "h": 6, "g": 2, "k": 64, "v": 64, "segments": 2},
        {"softcap": 3.0}, {"block_rows": 768, "block_k": 256}),
    "block mask with empty rows and columns": (
        {"b": 1, "t": 512, "h": 4, "g": 1, "k": 32, "v": 160, "s": 384, "blocks": (4, 3)},
        {"causal": False}, {"block_rows": 256, "block_k": 128}),
    "odd full": (
        {"b": 1, "t": 200, "h": 1, "g": 1, "k": 128, "v": 128, "s": 420},
        {"causal": False}, {"block_rows": 128, "block_k": 256}),
}


@pytest.mark.parametrize("name", SMALL)
def test_many_tiles_equal_the_definition(name):
    shape, options, tiles = SMALL[name]
    made = operands(**shape)
    options = {"scale": 0.2, **options}
    case = cases.Case(name, lambda rng: made, options, (0, 1, 2), {})
    bound, full = attention.bind(*made, **options)
    with pallas_kernels.interpret("v5p"):
        assert tpu.supports(V5P, *bound, **full) is None
        value, gradients = results(
            lambda *x: tpu.attention(*x, **full, **tiles), made, (0, 1, 2), "float32")
    value0, gradients0 = expected(attention, case, made, "float32")
    assert_close(value, value0, 2e-5)
    assert_close(gradients, gradients0, 5e-5)


def plan(t, s, block_rows, block_k, *, blocks=None, **masks):
    avals = [jax.ShapeDtypeStruct((1, n, 1, 128), jnp.float32) for n in (t, s, s)]
    return tpu._plan(*avals, blocks, causal=masks.get("causal", True),
                     window=masks.get("window"), block_rows=block_rows, block_k=block_k)


@pytest.mark.parametrize(("t", "s", "block_rows", "block_k", "masks"), [
    (1024, 1024, 256, 128, {}),
    (1024, 1024, 128, 512, {}),
    (900, 900, 256, 384, {}),
    (1024, 1024, 256, 256, {"window": 300}),
    (1024, 1024, 512, 256, {"window": 1}),
    (640, 640, 128, 256, {"window": 700}),
    (500, 900, 256, 256, {"causal": False}),
    (512, 512, 256, 256, {"causal": False}),
])
def test_visits_are_the_tiles_that_hold_a_visible_pair(t, s, block_rows, block_k, masks):
    made = plan(t, s, block_rows, block_k, **masks)
    age = np.arange(made.nq * made.bq)[:, None] - np.arange(made.nk * made.bk)
    seen = np.broadcast_to(np.arange(made.nk * made.bk) < s, age.shape)
    if masks.get("causal", True):
        # The keys of padding come after every query.
        seen = age >= 0
    if "window" in masks:
        seen = seen & (age < masks["window"])
    tiles = seen.reshape(made.nq, made.bq, made.nk, made.bk).swapaxes(1, 2)
    some, all_ = tiles.any((2, 3)), tiles.all((2, 3))
    visits = made.visits()
    assert {tuple(v) for v in visits[:2].T} == set(zip(*map(list, np.nonzero(some)), strict=True))
    assert len(set(map(tuple, visits[:2].T))) == visits.shape[1]
    assert all(bool(edge) == (not all_[i, j]) for i, j, edge in visits.T)


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_schedule_of_a_block_mask_runs_its_tiles_and_writes_all(by_key, density):
    rng = np.random.default_rng(3)
    mask = rng.random((4, 8)) < density
    made = plan(1024, 1024, 256, 128, blocks=mask, causal=False)
    words = np.asarray(jax.jit(lambda m: made.schedule(m, by_key=by_key))(jnp.asarray(mask)))
    i, j = (np.asarray(x) for x in tpu._tiles_of(words))
    first, last, run = (words & flag != 0 for flag in (tpu._FIRST, tpu._LAST, tpu._RUN))
    assert {(a, b) for a, b in zip(i[run], j[run], strict=True)} == set(
        zip(*map(list, np.nonzero(mask)), strict=True))
    assert run.sum() == mask.sum()
    outer = j if by_key else i
    used = np.flatnonzero(last)[-1] + 1
    # Each tile is begun once, ended once, and what is between is its own.
    assert list(outer[first]) == list(outer[last]) == list(range(8 if by_key else 4))
    np.testing.assert_array_equal(np.cumsum(first[:used]) - 1, outer[:used])
    # The rest moves nothing.
    assert (i[used:] == i[used - 1]).all() and (j[used:] == j[used - 1]).all()
    assert not (first | run)[used:].any()


def refusal(module, made, **options):
    bound, full = attention.bind(*made, **{"scale": 0.1, **options})
    return module.supports(V5P, *bound, **full)


def avals(t=256, h=2, g=2, k=64, v=64, dtype=jnp.bfloat16, s=None, blocks=None):
    s = t if s is None else s
    shapes = (1, t, h, k), (1, s, g, k), (1, s, g, v)
    mask = None if blocks is None else jax.ShapeDtypeStruct(blocks, bool)
    return (*(jax.ShapeDtypeStruct(x, dtype) for x in shapes), None, None, mask)


def test_tpu_refuses_by_name():
    refuse = functools.partial(refusal, tpu)
    assert refuse(avals()) is None
    assert "float16 must be" in refuse(avals(dtype=jnp.float16))
    assert "scale=-1.0 must be positive" in refuse(avals(), scale=-1.0)
    bound, full = attention.bind(*avals(), scale=0.1)
    assert "v4 has 16 MiB" in tpu.supports(Target.parse("v4"), *bound, **full)
    assert "blocks of 64 queries in block_mask" in refuse(avals(blocks=(4, 1)))
    assert "blocks of 32 keys in block_mask" in refuse(avals(blocks=(1, 8)))
    assert refuse(avals(t=301, blocks=(1, 1))) is None
    assert "heads of 4096 and 64" in refuse(avals(k=4096))
    assert "tiles of" in refuse(avals(t=1 << 20))


def test_splash_refuses_by_name():
    refuse = functools.partial(refusal, splash)
    assert refuse(avals()) is None
    assert "float32 must be bfloat16" in refuse(avals(dtype=jnp.float32))
    assert "block_mask must be None" in refuse(avals(blocks=(2, 2)))
    assert "partial=True must be False" in refuse(avals(), partial=True)
    assert "300 keys must be a multiple of 128" in refuse(avals(t=300), causal=False)


@pytest.mark.parametrize("case", [c for c in cases.of(attention) if not c.compiled],
                         ids=lambda c: c.name)
def test_splash_equals_the_definition(case, request):
    made = case.operands(jnp.bfloat16)
    bound, options = attention.bind(*made, **case.options)
    refused = splash.supports(V5P, *bound, **options)
    if refused is not None:
        pytest.skip(refused)
    with pallas_kernels.interpret("v5p"):
        value, gradients = results(
            lambda *x: splash.attention(*x, **options), made, case.differentiable, "bfloat16")
    value0, gradients0 = expected(attention, case, made, "bfloat16")
    assert_close(value, value0, case.tolerance["bfloat16"][0])
    assert_close(gradients, gradients0, case.tolerance["bfloat16"][1])


@pytest.mark.parametrize("module", [tpu, splash])
def test_candidates_differ(module):
    bound, options = attention.bind(*avals(t=4096, h=8, g=2, k=128, v=128), scale=0.1)
    sizes = module.candidates(*bound, **options)
    assert len(sizes) > 2
    assert len({tuple(sorted(x.items())) for x in sizes}) == len(sizes)
    bound, options = attention.bind(*avals(t=128), scale=0.1)
    assert len(module.candidates(*bound, **options)) == 1

