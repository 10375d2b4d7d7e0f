"""Attention against its float64 definition, and on eight devices against one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from pallas_kernels.attention import attention, merge, reference, xla
from sharding import Rules
from tests.tiny import MESH
from tests.tolerances import assert_close

NAMES = ("query", "key", "value")


def operands(b, t, h, g, k, v, *, s=None, segments=False, seed=0):
    """Queries, keys, values and a cotangent in float64; segment ids, padding among them."""
    rng = np.random.default_rng(seed)
    s = t if s is None else s
    arrays = [rng.normal(size=x) for x in ((b, t, h, k), (b, s, g, k), (b, s, g, v), (b, t, h, v))]
    ids = None
    if segments:
        ids = np.sort(rng.integers(1, 4, (b, t)), axis=1).astype(np.int32)
        ids[:, t - t // 4 :] = 0
    return arrays, ids


def results(function, arrays, ids, dtype=jnp.float32):
    """Value and gradients of `function(q, k, v, ids, ids)` for the cotangent that comes last."""
    q, k, v, cotangent = (jnp.asarray(x, dtype) for x in arrays)
    ids = None if ids is None else jnp.asarray(ids)

    @jax.jit
    def run(q, k, v, cotangent):
        def loss(*x):
            out = function(*x, ids, ids)
            return jnp.sum(out * cotangent), out

        gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return {"value": out, **dict(zip(NAMES, gradients, strict=True))}

    return jax.device_get(run(q, k, v, cotangent))


def expected(arrays, ids, **options):
    options = {"causal": True, "window": None, "softcap": None, **options}
    with jax.enable_x64(True):
        return results(
            functools.partial(reference.attention, **options), arrays, ids, jnp.float64)


CASES = {
    "multi-head": ({"b": 2, "t": 7, "h": 3, "g": 3, "k": 4, "v": 4}, {}),
    "grouped": ({"b": 2, "t": 9, "h": 6, "g": 2, "k": 4, "v": 4}, {}),
    "multi-query, values wider": ({"b": 1, "t": 8, "h": 4, "g": 1, "k": 4, "v": 6}, {}),
    "window": ({"b": 2, "t": 13, "h": 4, "g": 2, "k": 4, "v": 3}, {"window": 4}),
    "window of one": ({"b": 1, "t": 5, "h": 2, "g": 2, "k": 4, "v": 4}, {"window": 1}),
    "softcap, segments": (
        {"b": 3, "t": 11, "h": 4, "g": 2, "k": 4, "v": 4, "segments": True}, {"softcap": 1.5}),
    "window, segments": (
        {"b": 2, "t": 14, "h": 2, "g": 1, "k": 4, "v": 5, "segments": True}, {"window": 3}),
    "all keys": ({"b": 2, "t": 5, "s": 9, "h": 4, "g": 2, "k": 4, "v": 3}, {"causal": False}),
    "one token": ({"b": 1, "t": 1, "h": 2, "g": 1, "k": 4, "v": 4}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_its_definition(name):
    shapes, options = CASES[name]
    arrays, ids = operands(**shapes)
    options = {"scale": shapes["k"] ** -0.5, **options}
    op = functools.partial(attention, **options)
    assert_close(results(op, arrays, ids), expected(arrays, ids, **options))


@pytest.mark.parametrize("tiles", [(8, 8), (4, 16), (16, 4), (8, 45)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 5}, {"window": 21, "softcap": 2.0}, {"causal": False}],
    ids=str,
)
@pytest.mark.parametrize("segments", [False, True], ids=["", "segments"])
def test_many_tiles(options, tiles, segments):
    """Odd lengths over small tiles, windows within a tile and over several."""
    arrays, ids = operands(2, 45, 4, 2, 4, 3, segments=segments)

    def op(q, k, v, one, other):
        bound, settings = attention.bind(q, k, v, one, other, scale=0.5, **options)
        return xla.attention(*bound, **settings, block_q=tiles[0], block_k=tiles[1])

    assert_close(results(op, arrays, ids), expected(arrays, ids, scale=0.5, **options))


@pytest.mark.parametrize("tile", [5, 16])
@pytest.mark.parametrize(("shapes", "options"), [
    ({}, {}), ({"segments": True}, {"softcap": 2.0}), ({"s": 9}, {}),
    ({}, {"block_mask": np.array([[1, 0], [1, 1]], bool)})], ids=str)
def test_heads_in_turn(shapes, options, tile, monkeypatch):
    """Four key heads of two rows of the batch, one after the other, in one tile or several."""
    for name, value in (("_CACHED", 2 * tile**2), ("_IN_TURN", 0), ("BLOCK_Q", tile),
                        ("BLOCK_K", 1)):
        monkeypatch.setattr(xla, name, value)
    arrays, ids = operands(2, 12, 4, 2, 4, 3, **shapes)
    options = {"scale": 0.5, "causal": False, **options}
    op = functools.partial(attention, **options)
    program = jax.make_jaxpr(lambda *x: op(*x))(*arrays[:3])
    assert str(program).count("length=4") == 1
    assert_close(results(op, arrays, ids), expected(arrays, ids, **options))


@pytest.mark.parametrize("partial", [False, True], ids=["", "partial"])
@pytest.mark.parametrize("width", [1, 15, 16, 17])
def test_narrow_values(width, partial):
    """Some rows see nothing, in a block mask's empty row and as a segment of their own."""
    arrays, ids = operands(2, 72, 4, 2, 4, width, segments=True)
    options = {"scale": 0.5, "softcap": 2.0, "causal": False, "window": None, "partial": partial,
               "block_mask": np.array([[0, 0], [1, 1]], bool)}

    def whole(op):
        """`op` as one result: l is a row's sum."""
        def run(*x):
            out = op(*x, **options)
            return out[2] + out[1][..., None] if partial else out

        return run

    with jax.enable_x64(True):
        definition = results(whole(reference.attention), arrays, ids, jnp.float64)
    assert_close(results(whole(attention), arrays, ids), definition)


def test_memory_is_linear_in_the_length():
    """Temporaries of value and gradients: twice the length, about twice the bytes."""
    def temporaries(t):
        x = jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32)
        gradient = jax.grad(lambda *x: jnp.sum(attention(*x, scale=0.5)), (0, 1, 2))
        return jax.jit(gradient).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    one, two, four = (temporaries(n * 2048) for n in (1, 2, 4))
    assert four - two < 2.2 * (two - one)


def parts(q, k, v, ids, cut):
    """The parts over keys before and after `cut`, of queries that all come later."""
    ones = jnp.ones(q.shape[:2], jnp.int32)
    return [attention(q, k[:, x], v[:, x], ones, ids[:, x], scale=0.5, causal=False, softcap=3.0,
                      partial=True) for x in (slice(0, cut), slice(cut, None))]


def test_merged_parts_equal_the_whole():
    """Value and gradients; one request sees nothing in the first part, one nothing at all."""
    arrays, _ = operands(3, 5, 4, 2, 4, 3, s=11)
    ids = np.ones((3, 11), np.int32)
    ids[1, :7], ids[2] = 0, 0

    def merged(q, k, v, *_):
        _, l, o = merge(*parts(q, k, v, jnp.asarray(ids), 7))
        return o / jnp.where(l > 0, l, 1)[..., None]

    def whole(q, k, v, *_):
        ones = jnp.ones(q.shape[:2], jnp.int32)
        return attention(q, k, v, ones, jnp.asarray(ids), scale=0.5, causal=False, softcap=3.0)

    assert_close(results(merged, arrays, None), results(whole, arrays, None))


def test_documents_do_not_see_each_other():
    """A packed row equals its documents alone; what stands in the padding changes nothing."""
    (q, k, v, _), _ = operands(1, 12, 2, 1, 4, 4)
    ids = np.array([[1] * 4 + [2] * 5 + [0] * 3], np.int32)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    packed = attention(q, k, v, ids, ids, scale=0.5)
    alone = [attention(q[:, i:j], k[:, i:j], v[:, i:j], scale=0.5) for i, j in ((0, 4), (4, 9))]
    assert_close(packed[:, :9], jnp.concatenate(alone, axis=1))
    other = attention(q, k.at[:, 9:].set(1e9), v.at[:, 9:].set(-1e9), ids, ids, scale=0.5)
    assert_close(packed[:, :9], other[:, :9], tol=0)


def test_row_without_keys_is_zero():
    arrays, _ = operands(1, 4, 2, 1, 4, 4)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays[:3])
    ours, theirs = jnp.array([[1, 1, 5, 1]]), jnp.array([[1, 1, 1, 1]])

    def run(q, k, v):
        return attention(q, k, v, ours, theirs, scale=0.5)

    assert not run(q, k, v)[0, 2].any()
    gradients = jax.grad(lambda *x: jnp.sum(run(*x) ** 2), (0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in gradients)
    assert not gradients[0][0, 2].any()  # nothing seen, nothing learned


def test_extreme_scores():
    """Scores of +-1e4, where a softmax without its maximum would overflow."""
    (q, k, v, cotangent), _ = operands(1, 6, 2, 1, 4, 4)
    arrays = (100 * q, 100 * k, v, cotangent)
    actual = results(functools.partial(attention, scale=0.5), arrays, None)
    reference_results = expected(arrays, None, scale=0.5)
    assert_close(actual["value"], reference_results["value"], tol=1e-4)
    assert all(np.isfinite(x).all() for x in actual.values())


def test_bfloat16():
    arrays, ids = operands(2, 9, 4, 2, 8, 8, segments=True)
    arrays = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in arrays]
    actual = results(functools.partial(attention, scale=0.3), arrays, ids, jnp.bfloat16)
    assert all(x.dtype == jnp.bfloat16 for x in actual.values())
    assert_close(actual, expected(arrays, ids, scale=0.3), tol=2e-2)


RULES = {
    "replicated": Rules(batch=None),
    "batch over data": Rules(batch="data"),
    "batch over two": Rules(),
    "heads": Rules(batch=None, heads="tensor", kv_heads="tensor"),
    "heads over two": Rules(batch="data", heads=("fsdp", "tensor"), kv_heads=("fsdp", "tensor")),
    "both": Rules(heads="tensor", kv_heads="tensor"),
}


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", RULES)
def test_eight_devices_equal_one(name, explicit):
    arrays, ids = operands(4, 9, 8, 4, 4, 3, segments=True)
    options = {"scale": 0.5, "window": 6, "softcap": 2.0}
    one = results(functools.partial(attention, **options), arrays, ids)
    with sharding.use(sharding.mesh(MESH, explicit=explicit), RULES[name]):
        eight = results(functools.partial(sharding.local, attention, **options), arrays, ids)
    assert_close(eight, one)


def test_batch_that_does_not_divide_is_whole():
    arrays, ids = operands(3, 5, 4, 2, 4, 4)
    one = results(functools.partial(attention, scale=0.5), arrays, ids)
    with sharding.use(sharding.mesh(MESH), sharding.rules("fsdp_tp")):
        eight = results(functools.partial(sharding.local, attention, scale=0.5), arrays, ids)
    assert_close(eight, one)


@pytest.mark.parametrize("rules", [Rules(heads="tensor"), Rules(kv_heads="tensor")], ids=["h", "g"])
def test_heads_sharded_apart_from_their_keys_are_refused(rules):
    """A shard would pair its query heads with the wrong key heads, silently."""
    (q, k, v, _), _ = operands(4, 5, 8, 2, 4, 4)
    with (
        sharding.use(sharding.mesh(MESH), rules),
        pytest.raises(sharding.ShardingError, match="'heads' and 'kv_heads' over the same mesh"),
    ):
        sharding.local(attention, q, k, v, None, None, scale=0.5)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([(2, 4, 4, 8), (2, 4, 3, 8), (2, 4, 3, 8)], {}, "4 query heads do not divide by 3"),
        ([(2, 4, 4, 8), (2, 4, 2, 6), (2, 4, 2, 8)], {}, r"key \(2, 4, 2, 6\)"),
        ([(2, 4, 4, 8), (1, 4, 2, 8), (1, 4, 2, 8)], {}, "B=2"),
        ([(2, 4, 4, 8), (2, 4, 2, 8), (2, 5, 2, 8)], {}, r"value \(2, 5, 2, 8\)"),
        ([(2, 4, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8)], {}, "as many keys as queries, not 5 and 4"),
        ([(2, 4, 4, 8)] * 3, {"causal": False, "window": 2},
         "window=2 must be >= 1 and needs causal"),
        ([(2, 4, 4, 8)] * 3 + [(2, 4)], {}, "both queries and keys, or for neither"),
        ([(4, 4, 8)] * 3, {}, r"query \(4, 4, 8\), .* must be \[B, T, H, K\]"),
        ([(2, 4, 4, 8)] * 3, {"softcap": 0.0}, "softcap=0.0 must be > 0; None turns it off"),
        ([(2, 4, 4, 8)] * 3, {"softcap": float("nan")}, "softcap=nan must be > 0"),
        ([(0, 4, 4, 8)] * 3, {}, r"float32\[0, 4, 4, 8\].*every dimension must be at least 1"),
        ([(2, 0, 4, 8)] * 3, {}, "every dimension must be at least 1"),
        ([(2, 4, 4, 8), (2, 0, 4, 8), (2, 0, 4, 8)], {"causal": False},
         "every dimension must be at least 1"),
        ([(2, 4, 4, 8), (2, 4, 0, 8), (2, 4, 0, 8)], {}, "every dimension must be at least 1"),
    ],
)
def test_refuses_shapes_that_do_not_fit(shapes, options, message):
    arrays = [jnp.zeros(s, jnp.float32 if len(s) > 2 else jnp.int32) for s in shapes]
    with pytest.raises(ValueError, match=message):
        attention(*arrays, scale=1.0, **options)


def test_refuses_masks_of_other_dtypes():
    """A kernel takes an integer's bits for a mask's, and the wrong tiles are visited."""
    q = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="block_mask is int32; it must be bool"):
        attention(q, q, q, None, None, jnp.ones((2, 2), jnp.int32), scale=1.0)
    with pytest.raises(ValueError, match="segments are float32 and int32; they must be integers"):
        attention(q, q, q, jnp.ones((1, 4)), jnp.ones((1, 4), jnp.int32), scale=1.0)
