"""RMSNorm and LayerNorm against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.norm import Norm, Normalize
from tests.tolerances import assert_close


def make(norm, width, dtype=jnp.float32):
    """A layer with random scale and bias, and these two."""
    layer = Normalize(norm, width, key=jax.random.key(0), dtype=dtype)
    rng = np.random.default_rng(0)
    scale, bias = rng.normal(size=width), rng.normal(size=width)
    layer.scale[...] = jnp.asarray(scale, dtype)
    if norm.bias:
        layer.bias[...] = jnp.asarray(bias, dtype)
    return layer, scale, bias if norm.bias else 0.0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_formula(kind, bias):
    eps = 0.05  # large enough to be seen
    layer, scale, offset = make(Norm(kind, eps, bias), 6)
    x = 0.3 + np.random.default_rng(1).normal(size=(2, 3, 6))
    centred = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    variance = (centred**2).mean(-1, keepdims=True)
    expected = centred / np.sqrt(variance + eps) * scale + offset
    assert_close(layer(jnp.asarray(x, jnp.float32)), expected)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_offset(kind):
    """The scale is a distance from the offset, also where a residual is added first."""
    layer, scale, _ = make(Norm(kind, 0.05, offset=1.0), 6)
    x, residual = np.random.default_rng(1).normal(size=(2, 4, 3, 6)).astype(np.float32)
    for total, y in ((x, layer(x)), (x + residual, layer(x, residual)[0])):
        total = total - total.mean(-1, keepdims=True) if kind == "layer" else total
        expected = total / np.sqrt((total**2).mean(-1, keepdims=True) + 0.05) * (1 + scale)
        assert_close(y, expected)


@pytest.mark.parametrize("offset", [0.0, 1.0, 0.25])
def test_starts_as_the_identity_on_unit_rows(offset):
    x = np.random.default_rng(1).normal(size=(4, 1, 64))
    x /= np.sqrt((x**2).mean(-1, keepdims=True))
    layer = Normalize(Norm(bias=True, offset=offset), 64, key=jax.random.key(0))
    assert (layer.scale[...] == 1 - offset).all()
    assert_close(layer(jnp.asarray(x, jnp.float32)), x)


def test_bfloat16_is_computed_in_float32():
    """A sum of 4096 squares in bfloat16 would stop growing at 256 of them."""
    layer = Normalize(Norm(), 4096, key=jax.random.key(0), dtype=jnp.bfloat16)
    x = jnp.full((1, 1, 4096), 3.0, jnp.bfloat16)
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    assert_close(y, jnp.ones((1, 1, 4096)), tol=1e-2)


def test_zeros_stay_finite():
    layer = Normalize(Norm("layer"), 8, key=jax.random.key(0))
    x = jnp.zeros((2, 1, 8))
    assert not layer(x).any()
    assert np.isfinite(jax.grad(lambda x: layer(x).sum())(x)).all()


def test_refuses():
    with pytest.raises(ValueError, match="norm.kind is 'batch'; it must be 'rms' or 'layer'"):
        Norm("batch")
    for eps in (0.0, -1e-6, float("nan")):
        with pytest.raises(ValueError, match=r"norm.eps is .*positive, e\.g\. 1e-6"):
            Norm(eps=eps)
    with pytest.raises(ValueError, match=r"norm.offset is inf; it must be finite, e\.g\. 0 or 1"):
        Norm(offset=float("inf"))
