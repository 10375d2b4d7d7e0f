"""Cross-entropy of a linear head against its float64 definition, on one device and eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from pallas_kernels.cross_entropy import cross_entropy, reference, xla
from sharding import Rules
from tests.tiny import MESH
from tests.tolerances import assert_close

KEYS = ("loss", "weight", "z_sum")


def operands(b=2, t=7, d=6, v=11, seed=0):
    """hidden, head, labels, weights; labels at both ends of the vocabulary, some weights 0."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, v, (b, t)).astype(np.int32)
    labels.flat[:2] = 0, v - 1
    weights = rng.random((b, t)) * (rng.random((b, t)) > 0.3)
    weights.flat[:2] = 1.0
    return rng.normal(size=(b, t, d)), rng.normal(size=(d, v)), labels, weights


def results(function, arrays, dtype=jnp.float32, factor=1.0):
    """The three sums, and the gradients of `factor` times the first one."""
    hidden, head, labels, weights = arrays
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32

    def loss(hidden, head, labels, weights):
        sums = tuple(jnp.sum(x) for x in function(hidden, head, labels, weights))
        return factor * sums[0], sums

    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (d_hidden, d_head), sums = run(
        jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), labels, jnp.asarray(weights, wide))
    named = dict(zip(KEYS, sums, strict=True))
    return jax.device_get({**named, "hidden": d_hidden, "head": d_head})


def expected(arrays, factor=1.0, **options):
    with jax.enable_x64(True):
        function = functools.partial(reference.cross_entropy, **options)
        return results(function, arrays, jnp.float64, factor)


OPTIONS = {
    "plain": {},
    "z-loss": {"z_loss": 0.1},
    "softcap": {"softcap": 1.5},
    "both": {"z_loss": 0.05, "softcap": 2.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_its_definition(options):
    arrays = operands(b=3, t=17)
    op = functools.partial(cross_entropy, **options)
    assert_close(results(op, arrays, factor=-2.5), expected(arrays, factor=-2.5, **options))


@pytest.mark.parametrize(("b", "t"), [(1, 1), (1, 2), (4, 3), (2, 31), (3, 64)])
def test_any_length(monkeypatch, b, t):
    """One position, primes that no slice divides, slices of one position of a wide batch."""
    monkeypatch.setattr(xla, "MIN_TOKENS", 4)
    monkeypatch.setattr(xla, "SLICE_LOGITS", 1)
    arrays = operands(b=b, t=t)
    op = functools.partial(cross_entropy, z_loss=0.1)
    assert_close(results(op, arrays), expected(arrays, z_loss=0.1))


@pytest.mark.parametrize("batch", [1, 3, 8, 700])
@pytest.mark.parametrize("time", [1, 2, 5, 97, 1024, 4099])
@pytest.mark.parametrize("vocab", [7, 264, 32_000, 152_064])
def test_slices_cover_the_sequence(batch, time, vocab):
    """Equal slices, at least two of them, within the bound on logits, and little padding."""
    length = xla.slice_length(batch, time, vocab)
    slices = -(-time // length)
    assert 1 <= length <= time
    assert slices >= min(2, time)
    assert slices * length - time < slices  # less than one position of padding a slice
    tokens = max(xla.MIN_TOKENS, xla.SLICE_LOGITS // vocab)
    assert length == 1 or batch * length <= tokens


def test_weight_zero_hides_a_position():
    hidden, head, labels, weights = operands()
    weights[:, 3:] = 0
    other = labels.copy()
    other[:, 3:] = -100  # as some data sets mark what has no label
    first = results(cross_entropy, (hidden, head, labels, weights))
    assert_close(results(cross_entropy, (hidden, head, other, weights)), first, tol=0)
    assert not first["hidden"][:, 3:].any()
    assert_close(first["weight"], weights.sum())


def test_no_weight_at_all():
    hidden, head, labels, weights = operands()
    nothing = results(cross_entropy, (hidden, head, labels, 0 * weights))
    assert all(not x.any() for x in nothing.values())


def test_extreme_logits():
    """Logits of about +-1e4: the loss is a difference of large numbers, yet finite and right."""
    hidden, head, labels, weights = operands()
    arrays = (100 * hidden, 100 * head, labels, weights)
    assert_close(results(cross_entropy, arrays), expected(arrays))


def test_only_the_loss_has_a_gradient():
    hidden, head, labels, weights = (jnp.asarray(x) for x in operands())
    for index in (1, 2):
        gradients = jax.grad(
            lambda h, w, index=index: cross_entropy(h, w, labels, weights)[index][0], (0, 1)
        )(hidden, head)
        assert all(not g.any() for g in gradients)


def test_bfloat16():
    hidden, head, labels, weights = operands(t=13, d=16)
    hidden, head = (
        np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (hidden, head / 4))
    arrays = hidden, head, labels, weights
    actual = results(functools.partial(cross_entropy, z_loss=0.1), arrays, jnp.bfloat16)
    assert actual["hidden"].dtype == actual["head"].dtype == jnp.bfloat16
    assert actual["loss"].dtype == np.float32
    assert_close(actual, expected(arrays, z_loss=0.1), tol=2e-2)


@pytest.mark.parametrize("mesh", ["", "data:2,tensor:2"])
def test_never_holds_all_logits(mesh):
    """Neither the forward nor the backward pass has room for [B, T, V] float32."""
    b, t, d, v = 8, 1024, 8, 4096
    shapes = [((b, t, d), jnp.float32), ((d, v), jnp.float32), ((b, t), jnp.int32),
              ((b, t), jnp.float32)]
    all_logits = 4 * b * t * v

    def temporaries(function):
        gradient = jax.grad(lambda *x: jnp.sum(function(*x)[0]), (0, 1))
        avals = [jax.ShapeDtypeStruct(*s) for s in shapes]
        return jax.jit(gradient).lower(*avals).compile().memory_analysis().temp_size_in_bytes

    if mesh:
        parts = 4
        with sharding.use(sharding.mesh(mesh, jax.devices()[:4]), sharding.rules("fsdp_tp")):
            held = temporaries(functools.partial(sharding.local, cross_entropy))
    else:
        parts = 1
        held = temporaries(cross_entropy)
        assert temporaries(reference.cross_entropy) >= all_logits
    assert held < 0.6 * all_logits / parts


RULES = {
    "replicated": Rules(batch=None),
    "batch over data": Rules(batch="data"),
    "batch over two": Rules(),
    "vocabulary": Rules(batch=None, vocab="tensor"),
    "vocabulary over two": Rules(batch="data", vocab=("fsdp", "tensor")),
    "both": Rules(vocab="tensor"),
}


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", RULES)
def test_eight_devices_equal_one(name, explicit):
    arrays = operands(b=4, t=5, v=12)
    options = {"z_loss": 0.1, "softcap": 2.0}
    one = results(functools.partial(cross_entropy, **options), arrays, factor=3.0)
    with sharding.use(sharding.mesh(MESH, explicit=explicit), RULES[name]):
        eight = results(
            functools.partial(sharding.local, cross_entropy, **options), arrays, factor=3.0)
    assert_close(eight, one)


@pytest.mark.parametrize("shape", [{"v": 13}, {"b": 3}, {"b": 1, "v": 7}], ids=str)
def test_what_does_not_divide_is_whole(shape):
    """An odd vocabulary or batch is replicated, and its loss is counted once."""
    arrays = operands(**{"b": 4, "t": 5, "v": 12, **shape})
    one = results(cross_entropy, arrays)
    with sharding.use(sharding.mesh(MESH), sharding.rules("fsdp_tp")):
        eight = results(functools.partial(sharding.local, cross_entropy), arrays)
    assert_close(eight, one)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 4), (5, 6), (2, 3), (2, 3)), r"hidden \(2, 3, 4\) and head \(5, 6\)"),
        (((2, 3, 4), (4, 6), (2, 4), (2, 3)), r"labels \(2, 4\)"),
        (((2, 3, 4), (4, 6), (2, 3), (3, 2)), r"weights \(3, 2\)"),
        (((2, 3, 4), (4,), (2, 3), (2, 3)), r"must be \[B, T, D\] and \[D, V\]"),
    ],
)
def test_refuses_shapes_that_do_not_fit(shapes, message):
    hidden, head, labels, weights = (jnp.zeros(s) for s in shapes)
    with pytest.raises(ValueError, match=message):
        cross_entropy(hidden, head, labels.astype(jnp.int32), weights)
