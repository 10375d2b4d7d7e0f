"""Layers of images against their plain definitions, and over eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from layers.image import (
    _CHANNELS,
    BatchNorm,
    Conv,
    ConvNorm,
    PatchEmbed,
    PatchExpand,
    SqueezeExcite,
    convolve,
)
from tests.tolerances import assert_close
from zoo import protocol

KEY = jax.random.key(0)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution(size, stride):
    """As PyTorch counts: output i reads inputs from i stride - size // 2 on."""
    x, conv = draw(2, 7, 6, 3), Conv(3, 4, size, stride=stride, bias=True, key=KEY)
    conv.bias[...] = jnp.arange(4.0)
    around = size // 2
    padded = np.pad(x, ((0, 0), (around, around), (around, around), (0, 0)))
    kernel = np.asarray(conv.kernel[...])
    expected = np.zeros((2, -(-7 // stride), -(-6 // stride), 4), np.float64)
    for i in range(expected.shape[1]):
        for j in range(expected.shape[2]):
            patch = padded[:, i * stride:i * stride + size, j * stride:j * stride + size]
            expected[:, i, j] = np.einsum("bpqc,pqcd->bd", patch, kernel) + np.arange(4)
    assert_close(conv(x), expected)


@pytest.mark.parametrize("sides", [(7, 6), (1, 1), (4, 5)], ids=["7x6", "1x1", "4x5"])
def test_wide_convolutions_on_a_cpu(sides):
    """The form in fewer products, and its gradients, are those of the definition."""
    x, kernel = draw(2, *sides, _CHANNELS), draw(3, 3, _CHANNELS, _CHANNELS + 2, seed=1)
    cotangent = draw(2, *sides, _CHANNELS + 2, seed=2)

    def definition(x, kernel):
        around = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return sum(jnp.einsum("bhwc,cd->bhwd", around[:, i:i + sides[0], j:j + sides[1]],
                              kernel[i, j]) for i in range(3) for j in range(3))

    y, pull = jax.vjp(jax.jit(convolve), x, kernel)
    expected, their_pull = jax.vjp(definition, x, kernel)
    assert "conv_general" not in str(jax.make_jaxpr(convolve)(x, kernel))
    assert_close(y, expected)
    assert_close(pull(cotangent), their_pull(cotangent))


def test_patches():
    """Vector (i, j) is made of patch (i, j), and makes one."""
    x = draw(2, 8, 12, 3)
    embed = PatchEmbed(3, 5, 4, key=KEY, dtype=jnp.float32)
    kernel = np.asarray(embed.patch.kernel[...])
    y = embed(x)
    assert y.shape == (2, 2, 3, 5)
    assert_close(y[:, 1, 2], np.einsum("bpqc,pqcd->bd", x[:, 4:8, 8:12], kernel))
    expand = PatchExpand(3, 5, 2, key=KEY, dtype=jnp.float32)
    expand.bias[...] = jnp.arange(5.0)
    y, kernel = expand(x), np.asarray(expand.kernel[...])
    assert y.shape == (2, 16, 24, 5)
    assert_close(y[:, 6:8, 10:12], np.einsum("bc,pqcd->bpqd", x[:, 3, 5], kernel) + np.arange(5))


def test_squeeze_and_excitation():
    x, excite = draw(2, 3, 4, 32), SqueezeExcite(32, key=KEY, dtype=jnp.float32)
    down, up = (np.asarray(m.kernel[...]) for m in (excite.down, excite.up))
    assert down.shape == (32, 2)
    gate = 1 / (1 + np.exp(-np.maximum(x.mean((1, 2)) @ down, 0) @ up))
    assert_close(excite(x), x * gate[:, None, None])


def batch_norm():
    norm = BatchNorm(4)
    norm.scale[...], norm.bias[...] = draw(4, seed=1), draw(4, seed=2)
    norm.mean[...], norm.variance[...] = draw(4, seed=3), 1 + draw(4, seed=4) ** 2
    return norm


def test_batch_norm():
    x, norm = 5 + 2 * draw(3, 4, 5, 4), batch_norm()
    scale, bias, mean, variance = (np.asarray(v[...], np.float64) for v in (
        norm.scale, norm.bias, norm.mean, norm.variance))
    y, new = norm(x, False)
    assert new == {}
    assert_close(y, (x - mean) / np.sqrt(variance + 1e-5) * scale + bias)
    y, new = norm(x, True)
    wide = x.astype(np.float64).reshape(-1, 4)
    assert_close(y.reshape(-1, 4),
                 (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5) * scale + bias)
    assert_close(new, {"mean": 0.9 * mean + 0.1 * wide.mean(0),
                       "variance": 0.9 * variance + 0.1 * wide.var(0, ddof=1)})
    assert_close(norm.mean[...], mean, tol=0)  # No call changes them.


def test_batch_norm_of_one_pixel():
    y, new = batch_norm()(draw(1, 1, 1, 4), True)
    assert np.isfinite(y).all() and all(np.isfinite(x).all() for x in new.values())


def test_batch_norm_keeps_statistics_in_float32():
    half = BatchNorm(4, dtype=jnp.bfloat16)
    y, new = half(draw(2, 3, 3, 4).astype(jnp.bfloat16), True)
    assert y.dtype == half.scale[...].dtype == jnp.bfloat16
    assert {x.dtype for x in (*new.values(), half.mean[...])} == {jnp.dtype(jnp.float32)}


def test_eight_devices_equal_one():
    """Values, statistics and gradients, with the batch, the height and the channels spread."""
    layer = ConvNorm(8, 8, stride=2, key=KEY, dtype=jnp.float32)
    definition, params = protocol.split(layer)
    names, x, weights = protocol.axes(layer), draw(4, 12, 6, 8), draw(4, 6, 3, 8, seed=1)
    results = []
    for devices, text, rules in ((1, "data:1", "dp"), (8, "data:2,fsdp:2,tensor:2",
                                                       "fsdp,channels=tensor"),
                                 (8, "data:4,tensor:2", "dp,height=tensor")):
        mesh, rules = sharding.mesh(text, jax.devices()[:devices]), sharding.rules(rules)
        with sharding.use(mesh, rules):
            layout = rules.sharding(mesh, ("batch", "height", None, None), x.shape)

            def loss(params, x):
                y, new = protocol.merge(definition, params)(x, True)
                return jnp.sum(jnp.tanh(y) * weights), (y, new)

            run = jax.jit(functools.partial(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)))
            placed = jax.device_put(params, protocol.shardings(mesh, rules, names, params))
            results.append(jax.device_get(run(placed, jax.device_put(x, layout))))
    for result in results[1:]:
        assert_close(result, results[0])
