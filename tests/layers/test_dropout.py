"""Dropout: a function of its key alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from layers.dropout import dropout, fold
from tests.tiny import MESH
from tests.tolerances import assert_close

KEY = jax.random.key(7)


def test_keeps_scales_and_drops():
    x = jnp.full((4, 50, 100), 3.0)
    y = np.asarray(dropout(x, 0.25, KEY))
    assert set(np.unique(y)) == {0.0, 4.0}
    assert np.mean(y == 0) == pytest.approx(0.25, abs=0.01)
    assert y.mean() == pytest.approx(3.0, abs=0.05)
    # No pattern along any axis.
    for axis in (0, 1, 2):
        assert np.mean(np.roll(y, 1, axis) == y) == pytest.approx(0.75**2 + 0.25**2, abs=0.01)


def test_is_determined_by_its_key():
    x = jnp.ones((2, 3, 64))
    first = dropout(x, 0.5, KEY)
    assert_close(dropout(x, 0.5, KEY), first, tol=0)
    assert (dropout(x, 0.5, fold(KEY, 0)) != first).any()
    assert (dropout(x, 0.5, fold(KEY, 0)) != dropout(x, 0.5, fold(KEY, 1))).any()
    assert_close(jax.jit(dropout, static_argnums=1)(x, 0.5, KEY), first, tol=0)


def test_off():
    x = jnp.ones((1, 2, 3))
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, KEY) is x
    assert fold(None, 3) is None


def test_gradient_is_the_mask():
    x = jnp.arange(1.0, 33).reshape(1, 2, 16)
    gradient = jax.grad(lambda x: jnp.sum(dropout(x, 0.5, KEY)))(x)
    assert_close(gradient * x, dropout(x, 0.5, KEY), tol=0)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("preset", ["dp", "fsdp_tp"])
def test_mask_does_not_depend_on_the_layout(preset, explicit):
    x = jnp.ones((8, 3, 16))
    expected = dropout(x, 0.5, KEY)
    mesh = sharding.mesh(MESH, explicit=explicit)
    with sharding.use(mesh, sharding.rules(preset)):
        sharded = jax.device_put(x, jax.NamedSharding(mesh, sharding.spec("batch", None, None)))
        assert_close(jax.jit(dropout, static_argnums=1)(sharded, 0.5, KEY), expected, tol=0)


def test_bfloat16_stays():
    assert dropout(jnp.ones((1, 2, 3), jnp.bfloat16), 0.5, KEY).dtype == jnp.bfloat16


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_refuses(rate):
    with pytest.raises(ValueError, match=r"dropout rate is .*must be in \[0, 1\)"):
        dropout(jnp.ones((1, 2, 3)), rate, KEY)
