"""Gated and plain MLPs against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from layers.mlp import ACTIVATIONS, Mlp
from tests.tolerances import assert_close

FORMULAS = {
    "silu": lambda x: x * scipy.special.expit(x),
    "gelu": lambda x: x * 0.5 * (1 + scipy.special.erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def test_every_activation_has_a_formula_here():
    assert FORMULAS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_activation(name):
    x = np.linspace(-6, 6, 101)
    assert_close(ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), FORMULAS[name](x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_formula(gated, bias):
    rng = np.random.default_rng(0)
    layer = Mlp(5, "silu", gated, bias).build(3, gain=1.0, key=jax.random.key(0), dtype=jnp.float32)
    weights = {}
    for name in ("gate", "up", "down") if gated else ("up", "down"):
        linear = getattr(layer, name)
        kernel = rng.normal(size=linear.kernel.shape)
        linear.kernel[...] = jnp.asarray(kernel, jnp.float32)
        offset = 0.0
        if bias:
            offset = rng.normal(size=kernel.shape[1])
            linear.bias[...] = jnp.asarray(offset, jnp.float32)
        weights[name] = kernel, offset
    assert (layer.gate is not None) == gated
    x = rng.normal(size=(2, 4, 3))

    def apply(name, x):
        kernel, offset = weights[name]
        return x @ kernel + offset

    silu = FORMULAS["silu"]
    hidden = silu(apply("gate", x)) * apply("up", x) if gated else silu(apply("up", x))
    y, aux = layer(jnp.asarray(x, jnp.float32))
    assert_close(y, apply("down", hidden))
    assert aux == {}


def test_initial_scale():
    """Kernels start with deviation 1 / sqrt(inputs), the last one times `gain`; biases at 0."""
    layer = Mlp(400, bias=True).build(300, gain=0.25, key=jax.random.key(0), dtype=jnp.float32)
    for linear, deviation in ((layer.gate, 300**-0.5), (layer.up, 300**-0.5),
                              (layer.down, 0.25 * 400**-0.5)):
        kernel = np.asarray(linear.kernel[...])
        assert kernel.std() == pytest.approx(deviation, rel=0.02)
        assert abs(kernel).max() < 3.1 * deviation  # cut at three
        assert not linear.bias[...].any()
    gate, up = (np.ravel(linear.kernel[...]) for linear in (layer.gate, layer.up))
    assert abs(np.corrcoef(gate, up)[0, 1]) < 0.02


def test_flops():
    assert Mlp(5).flops_per_token(3) == 2 * 3 * 3 * 5
    assert Mlp(5, gated=False).flops_per_token(3) == 2 * 2 * 3 * 5


def test_refuses():
    with pytest.raises(ValueError, match="mlp.hidden is 0; it must be at least 1"):
        Mlp(0)
    with pytest.raises(ValueError, match="mlp.activation is 'swish'; it must be one of .*'silu'"):
        Mlp(4, "swish")
