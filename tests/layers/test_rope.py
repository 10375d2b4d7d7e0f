"""Rotary embedding against complex rotation, and frequency scalings against their papers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from layers.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling
from tests.tolerances import assert_close


def test_rotation():
    """Pair (i, i + K/2) as a complex number, times exp(i position theta^(-2i/K))."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8))
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 0, 1, 100]])
    angle = positions[..., None, None] * 100.0 ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    actual = Rope(theta=100.0)(jnp.asarray(x, jnp.float32), jnp.asarray(positions))
    assert_close(actual, expected)


def test_scores_depend_on_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(m, n):
        at = [Rope()(x, jnp.array([[p]])) for x, p in ((q, m), (k, n))]
        return float(jnp.sum(at[0] * at[1]))

    assert score(0, 0) == pytest.approx(float(jnp.sum(q * k)), abs=1e-5)
    assert score(105, 100) == pytest.approx(score(5, 0), abs=1e-4)
    assert score(5, 0) != pytest.approx(score(0, 5), abs=1e-2)


def test_bfloat16_angles_are_float32():
    """At position 1000 a bfloat16 angle would be off by radians."""
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    y = Rope()(x, jnp.array([[1001]]))
    assert y.dtype == jnp.bfloat16
    expected = [np.cos(1001) - np.sin(1001), np.cos(10.01) - np.sin(10.01),
                np.cos(1001) + np.sin(1001), np.cos(10.01) + np.sin(10.01)]
    assert_close(y[0, 0, 0], np.array(expected), tol=1e-2)


def test_linear_scaling():
    """A position counts as a `factor`-th of it."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 2, 8)), jnp.float32)
    positions = jnp.array([[0, 8, 80, 400]])
    scaled = Rope(100.0, LinearScaling(8.0))(x, positions)
    assert_close(scaled, Rope(100.0)(x, positions // 8))
    assert LinearScaling(8.0).amplitude == 1.0


def llama3_by_wavelength(theta, size, factor, low, high, original):
    """Llama 3.1's rule, one frequency at a time, as its report and released code put it."""
    scaled = []
    for i in range(0, size, 2):
        frequency = theta ** (-i / size)
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            scaled.append(frequency)
        elif wavelength > original / low:
            scaled.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(scaled)


@pytest.mark.parametrize(
    ("theta", "size", "values"),
    [(5e5, 128, (8.0, 1.0, 4.0, 8192)), (5e5, 64, (32.0, 1.0, 4.0, 8192)),
     (1e4, 16, (2.0, 0.5, 8.0, 64))],
)
def test_llama3_scaling(theta, size, values):
    rope = Rope(theta, Llama3Scaling(*values))
    expected = llama3_by_wavelength(theta, size, *values)
    np.testing.assert_allclose(rope.frequencies(size), expected, rtol=1e-12)
    plain = Rope(theta).frequencies(size)
    assert (rope.frequencies(size) <= plain).all()
    assert rope.frequencies(size)[0] == plain[0]
    assert rope.frequencies(size)[-1] == pytest.approx(plain[-1] / values[0])


def yarn_by_rotations(theta, size, factor, fast, slow, original):
    """YaRN's "NTK-by-parts" (section 3.2): the ramp is linear in the dimension, between those
    that turn `fast` and `slow` times over the original length, rounded outwards."""
    turns = [original * theta ** (-i / size) / (2 * math.pi) for i in range(0, size, 2)]
    exact = [size / 2 * math.log(turns[0] / t) / math.log(theta) for t in (fast, slow)]
    low, high = max(math.floor(exact[0]), 0), min(math.ceil(exact[1]), size - 1)
    scaled = []
    for j, t in enumerate(turns):
        frequency = 2 * math.pi * t / original
        ramp = min(max((j - low) / (high - low), 0.0), 1.0)
        scaled.append(frequency / factor * ramp + frequency * (1 - ramp))
    return np.array(scaled)


@pytest.mark.parametrize(
    ("theta", "size", "values"),
    [(1e6, 128, (4.0, 32.0, 1.0, 32768)), (1e4, 64, (16.0, 32.0, 1.0, 4096)),
     (1e4, 16, (2.0, 4.0, 1.0, 64))],
)
def test_yarn_scaling(theta, size, values):
    rope = Rope(theta, YarnScaling(*values))
    np.testing.assert_allclose(
        rope.frequencies(size), yarn_by_rotations(theta, size, *values), rtol=1e-12)
    assert rope.scaling.amplitude == pytest.approx(0.1 * math.log(values[0]) + 1)
    x = jnp.ones((1, 1, 1, size))
    length = float(jnp.linalg.norm(rope(x, jnp.array([[3]]))))
    assert length == pytest.approx(rope.scaling.amplitude * math.sqrt(size), rel=1e-5)


def test_pinned_frequencies():
    """Frequencies 0, 28, 29, 34, 35 and 63 of 64, from Hugging Face transformers 5.23 (float32)."""
    chosen = [0, 28, 29, 34, 35, 63]
    llama = Rope(5e5, Llama3Scaling(8.0, 1.0, 4.0, 8192)).frequencies(128)[chosen]
    yarn = Rope(1e6, YarnScaling(4.0, 32.0, 1.0, 32768)).frequencies(128)[chosen]
    np.testing.assert_allclose(
        llama, [1, 3.211446e-3, 2.166571e-3, 1.785078e-4, 9.556212e-5, 3.068926e-7], rtol=1e-5)
    np.testing.assert_allclose(
        yarn, [1, 1.848277e-3, 1.405112e-3, 3.342406e-4, 2.462584e-4, 3.102344e-7], rtol=1e-5)
    assert YarnScaling(4.0).amplitude == pytest.approx(1.138629436111989)


def test_refuses():
    with pytest.raises(ValueError, match="rope.theta is 1.0; it must be over 1, e.g. 10000"):
        Rope(theta=1.0)
    with pytest.raises(ValueError, match="needs factor >= 1"):
        LinearScaling(0.5)
    with pytest.raises(ValueError, match="needs factor >= 1, 0 < low < high"):
        Llama3Scaling(low=4.0, high=1.0)
    with pytest.raises(ValueError, match="needs factor >= 1, 0 < slow < fast"):
        YarnScaling(factor=0.5)
