"""Rotary position embedding (arXiv:2104.09864), with linear, Llama 3 and YaRN frequency
scaling."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (arXiv:2306.15595): every frequency is divided by `factor`."""

    factor: float = 8.0

    def __post_init__(self):
        if not self.factor >= 1:
            raise ValueError(f"{self}: needs factor >= 1")

    def frequencies(self, frequencies: np.ndarray, theta: float, size: int) -> np.ndarray:
        return frequencies / self.factor

    @property
    def amplitude(self) -> float:
        """Factor on the rotated vectors."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: wavelengths over `original_length / low` are stretched by `factor`,
    those under `original_length / high` are kept, and those between blend linearly."""

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        if not (self.factor >= 1 and 0 < self.low < self.high and self.original_length > 0):
            raise ValueError(f"{self}: needs factor >= 1, 0 < low < high, original_length > 0")

    def frequencies(self, frequencies: np.ndarray, theta: float, size: int) -> np.ndarray:
        turns = self.original_length * frequencies / (2 * math.pi)
        keep = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return frequencies * (keep + (1 - keep) / self.factor)

    @property
    def amplitude(self) -> float:
        """Factor on the rotated vectors."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071): frequencies that turn fewer than `slow` times within
    `original_length` are divided by `factor`, those over `fast` turns are kept, a linear ramp
    over the dimension between; vectors grow by ``0.1 ln(factor) + 1``."""

    factor: float = 4.0
    fast: float = 32.0
    slow: float = 1.0
    original_length: int = 32768

    def __post_init__(self):
        if not (self.factor >= 1 and 0 < self.slow < self.fast and self.original_length > 0):
            raise ValueError(f"{self}: needs factor >= 1, 0 < slow < fast, original_length > 0")

    def frequencies(self, frequencies: np.ndarray, theta: float, size: int) -> np.ndarray:
        def dimension(turns):
            length = self.original_length / (turns * 2 * math.pi)
            return size * math.log(length) / (2 * math.log(theta))

        low = max(math.floor(dimension(self.fast)), 0)
        high = min(math.ceil(dimension(self.slow)), size - 1)
        ramp = np.clip((np.arange(size // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
        return frequencies * ((1 - ramp) + ramp / self.factor)

    @property
    def amplitude(self) -> float:
        """Factor on the rotated vectors (YaRN, section 3.4)."""
        return 0.1 * math.log(self.factor) + 1.0


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotation of pairs (i, i + size/2) by ``position * theta ** (-2 i / size)``."""

    theta: float = 10_000.0
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

    def __post_init__(self):
        if not self.theta > 1:
            raise ValueError(f"rope.theta is {self.theta}; it must be over 1, e.g. 10000")

    def frequencies(self, size: int) -> np.ndarray:
        """float64 [size / 2], radians per position."""
        plain = self.theta ** (-np.arange(0, size, 2) / size)
        return plain if self.scaling is None else self.scaling.frequencies(plain, self.theta, size)

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotates x [B, T, H, K] by positions int [B, T]; float32 inside, x's dtype outside."""
        frequencies = jnp.asarray(self.frequencies(x.shape[-1]), jnp.float32)
        angle = positions[..., None, None].astype(jnp.float32) * frequencies
        amplitude = 1.0 if self.scaling is None else self.scaling.amplitude
        return _rotate(x, jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude)


@jax.custom_vjp
def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x.dtype)


def _rotate_forward(x, cos, sin):
    return _rotate(x, cos, sin), (cos, sin)


def _rotate_backward(angles, cotangent):
    # The transpose of a rotation is the rotation back; positions have no gradient.
    cos, sin = angles
    return _rotate(cotangent, cos, -sin), jnp.zeros_like(cos), jnp.zeros_like(sin)


_rotate.defvjp(_rotate_forward, _rotate_backward)
