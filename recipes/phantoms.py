"""CT-like phantoms of an abdomen: volumes with eight organs and the truth about every voxel.

A patient is drawn from a seed: build, posture and each organ's place, size, shape and uptake of
contrast agent. A scanner has a scale, an offset, a shading over the field of view, and noise that
is correlated between neighbours. Voxels that an organ fills in part have the mean of what is in
them; their label is what fills most of them.

Every number comes from a generator's bits by integer arithmetic or by single additions, products,
quotients and square roots in float64, so that volumes are the same to the bit on every machine.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping

import numpy as np

SHAPE = (24, 96, 96)
"""Slices from feet to head, rows from front to back, columns from the patient's right to left."""
SPACING = (8.0, 4.0, 4.0)
"""Millimetres between voxels along these axes."""
CLASSES = ("background", "aorta", "gallbladder", "left kidney", "right kidney", "liver",
           "pancreas", "spleen", "stomach")
"""By label, in the order of the Synapse challenge."""
_FINE = 2  # Points a voxel's edge at which tissue is looked up.


@dataclasses.dataclass(frozen=True)
class Scanner:
    """How tissue becomes numbers.

    Attributes:
      scale, offset: of Hounsfield units.
      shading: what is added at the field of view's edge, along x and y.
      noise: standard deviation.
    """

    scale: float
    offset: float
    shading: tuple[float, float]
    noise: float


SCANNERS = (
    Scanner(1.0, 0.0, (0.0, 0.0), 30.0),
    Scanner(1.06, -18.0, (12.0, -8.0), 36.0),
    Scanner(0.95, 14.0, (-10.0, 10.0), 26.0),
    Scanner(0.9, 30.0, (15.0, 12.0), 34.0),
)
"""The last one has seen no patient of the training set."""

# (patient, scanner) of each part: other patients are held out, and another scanner.
SPLITS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "train": tuple((i, i % 3) for i in range(150)),
    "validation": tuple((190 + i, i % 3) for i in range(3)),
    "heldout": tuple((200 + i, 3) for i in range(6)),
}


@dataclasses.dataclass(frozen=True)
class Phantom:
    """A volume.

    Attributes:
      image: int16 [Z, Y, X], Hounsfield units as the scanner gives them.
      labels: uint8 [Z, Y, X], indices into `CLASSES`.
    """

    image: np.ndarray
    labels: np.ndarray


class _Draw:
    """Random numbers whose stream no release of numpy may change: a generator's plain bits."""

    def __init__(self, *seed: int):
        self._bits = np.random.PCG64(np.random.SeedSequence(seed))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * (float(self._bits.random_raw() >> 11) / 2.0**53)

    def around(self, center: float, spread: float) -> float:
        return self.uniform(center - spread, center + spread)

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """About normal: float64 sums of four uniform numbers, of variance 1."""
        words = self._bits.random_raw(int(np.prod(shape)))
        total = sum(((words >> np.uint64(16 * i)) & np.uint64(0xFFFF)).astype(np.int64)
                    for i in range(4))
        # The variance of the sum is 4 * 65536^2 / 12.
        return (total - 2 * 65535).reshape(shape) / (65536.0 / 3.0**0.5)


Point = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Region:
    """Where a tissue is.

    Attributes:
      inside: of points (x, y, z) in millimetres from the body's centre.
      box: ((low, high) of x, of y, of z), beyond which nothing of it is.
    """

    inside: Callable[[Point], np.ndarray]
    box: tuple[tuple[float, float], ...] = ((-1e9, 1e9),) * 3

    def __and__(self, other: "_Region") -> "_Region":
        return _Region(lambda point: self.inside(point) & other.inside(point), self.box)


def _rotation(t: float) -> tuple[float, float]:
    """(cosine, sine) of twice the angle whose tangent is t."""
    return (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)


def _blob(draw: _Draw, center: tuple[float, float, float], radii: tuple[float, float, float], *,
          place: float, size: float = 0.12, shape: float = 0.25, tilt: float = 0.12) -> _Region:
    """A bent ellipsoid near `center` (x, y, z).

    It varies in place by so many millimetres, in size and shape by these parts of it, and turns in
    both planes through z.
    """
    cx, cy, cz = (draw.around(c, place) for c in center)
    grown = draw.around(1.0, size)
    rx, ry, rz = (grown * r * draw.around(1.0, size / 2) for r in radii)
    bends = [draw.around(0.0, shape) for _ in range(6)]
    (c1, s1), (c2, s2) = (_rotation(draw.around(0.0, tilt)) for _ in range(2))

    def inside(point: Point) -> np.ndarray:
        x, y, z = point[0] - cx, point[1] - cy, point[2] - cz
        x, z = c1 * x - s1 * z, s1 * x + c1 * z
        y, z = c2 * y - s2 * z, s2 * y + c2 * z
        x, y, z = x / rx, y / ry, z / rz
        squares = x * x + y * y + z * z
        bend = (bends[0] * x * y + bends[1] * y * z + bends[2] * z * x
                + bends[3] * x * x * y + bends[4] * y * y * z + bends[5] * z * z * x)
        return (squares + bend <= 1.0) & (squares <= 2.0)

    reach = 1.5 * max(rx, ry, rz)
    return _Region(inside, tuple((c - reach, c + reach) for c in (cx, cy, cz)))


def _tube(draw: _Draw, along: int, ends: tuple[float, float], path: tuple[tuple[float, ...], ...],
          radius: tuple[float, ...], *, place: float, bend: float) -> _Region:
    """A tube along an axis (0 for x, 2 for z).

    `path` has a polynomial of s for each of the other two axes, and `radius` one more; s goes from
    -1 to 1 between `ends`. Coefficients of the path vary by `place` (that of s^0) and `bend`.
    """
    low, high = ends
    curves = [[draw.around(c, place if i == 0 else bend) for i, c in enumerate(p)] for p in path]
    wide = [c * draw.around(1.0, 0.1) for c in radius]
    others = [axis for axis in range(3) if axis != along]

    def polynomial(coefficients, s):
        total = coefficients[-1]
        for c in reversed(coefficients[:-1]):
            total = total * s + c
        return total

    def inside(point: Point) -> np.ndarray:
        s = (point[along] - (low + high) / 2) / ((high - low) / 2)
        a, b = (point[axis] - polynomial(curve, s)
                for axis, curve in zip(others, curves, strict=True))
        r = polynomial(wide, s)
        return (a * a + b * b <= r * r) & (s * s <= 1.0)

    far = sum(abs(c) for curve in (*curves, wide) for c in curve)
    box = [(-far, far)] * 3
    box[along] = low, high
    return _Region(inside, tuple(box))


def _anatomy(draw: _Draw) -> list[tuple[int, float, _Region]]:
    """(label, Hounsfield units, region) of what a body holds; later ones lie over earlier ones."""
    contrast = draw.uniform(0.0, 1.0)  # How far it has gone: vessels first, then organs.
    cavity = _Region(lambda p: p[0] * p[0] / 140.0**2 + p[1] * p[1] / 92.0**2 <= 1.0)
    found: list[tuple[int, float, _Region]] = []

    def add(name: str | None, units: float, spread: float, region: _Region) -> None:
        label = 0 if name is None else CLASSES.index(name)
        found.append((label, draw.around(units, spread), region & cavity))

    found.append((0, draw.around(55.0, 10.0), _Region(  # Muscle
        lambda p: p[0] * p[0] / 160.0**2 + p[1] * p[1] / 110.0**2 <= 1.0)))
    found.append((0, draw.around(-95.0, 10.0), cavity))  # Fat
    loops = [(draw.around(0, 75), draw.around(-25, 30), draw.around(-50, 35)) for _ in range(14)]
    for loop in loops:  # The bowel, whose contents are like anything else
        size = draw.uniform(14, 22)
        add(None, 70.0, 55.0, _blob(draw, loop, (size, size, size * 1.3), place=8))
    add("liver", 95.0 + 25 * contrast, 12.0,
        _blob(draw, (-68, -12, 38), (80, 68, 58), place=8, size=0.1))
    add("spleen", 100.0 + 25 * contrast, 15.0,
        _blob(draw, (98, 30, 45), (30, 42, 40), place=8, size=0.18))
    stomach = _blob(draw, (52, -32, 38), (42, 34, 46), place=10, size=0.18)
    add("stomach", 45.0, 30.0, stomach)
    level = draw.uniform(-75.0, -50.0)  # Above which there is gas
    add("stomach", -300.0, 60.0, stomach & _Region(lambda p: p[1] < level))
    add("pancreas", 85.0 + 15 * contrast, 15.0, _tube(
        draw, 0, (-35.0, 70.0), ((8, 8, -10), (4, 18)), (13.0, -2.0), place=7, bend=5))
    add("gallbladder", 15.0, 12.0, _blob(draw, (-48, -38, 0), (15, 15, 27), place=9, size=0.2))
    add("left kidney", 160.0 + 25 * contrast, 15.0,
        _blob(draw, (62, 48, -8), (27, 25, 54), place=8))
    add("right kidney", 160.0 + 25 * contrast, 15.0,
        _blob(draw, (-62, 48, -18), (27, 25, 54), place=8))
    add(None, 130.0, 25.0, _tube(  # The vena cava
        draw, 2, (-100.0, 100.0), ((-20, -4, 3), (36, 0, -4)), (11.0, 1.0), place=4, bend=3))
    add("aorta", 190.0 - 40 * contrast, 15.0, _tube(
        draw, 2, (-100.0, 100.0), ((8, 2, 3), (40, -3, 4)), (10.5, 1.0), place=4, bend=3))
    for x, y, radius, units in ((0, 66, 21, 260.0), (0, 66, 15, 170.0), (0, 90, 9, 30.0)):
        add(None, units, 20.0, _tube(draw, 2, (-100.0, 100.0), ((x, 0, 0), (y, 0, 0)), (radius,),
                                     place=0, bend=0))
    return found


def _tissue(draw: _Draw) -> tuple[np.ndarray, np.ndarray]:
    """(Hounsfield units float64, label uint8) of all fine points."""
    shift = [draw.around(0, 26), draw.around(0, 22), draw.around(0, 14)]
    size = [draw.around(1.0, 0.14), draw.around(1.0, 0.12), draw.around(1.0, 0.08)]
    cos, sin = _rotation(draw.around(0.0, 0.07))
    axes = [((np.arange(n * _FINE) + 0.5) / _FINE - n / 2) * step
            for n, step in zip(SHAPE, SPACING, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    x, y, z = x - shift[0], y - shift[1], (z - shift[2]) / size[2]
    x, y = (cos * x - sin * y) / size[0], (sin * x + cos * y) / size[1]
    units = np.full([n * _FINE for n in SHAPE], -1000.0)
    labels = np.zeros(units.shape, np.uint8)
    for label, value, region in _anatomy(draw):
        across, along = (np.nonzero(np.all(
            [(low <= p) & (p <= high) for p, (low, high) in near], axis=0))
            for near in (list(zip((x, y), region.box, strict=False)), [(z, region.box[2])]))
        if not len(across[0]) or not len(along[0]):
            continue
        box = (slice(along[0].min(), along[0].max() + 1),
               *(slice(i.min(), i.max() + 1) for i in across[1:]))
        flat = (slice(None), *box[1:])
        here = np.broadcast_to(
            region.inside((x[flat], y[flat], z[box[0]])), units[box].shape)
        units[box][here], labels[box][here] = value, label
    return units, labels


def _points(fine: np.ndarray) -> list[np.ndarray]:
    """Of each point of a voxel the array [Z, Y, X] of all voxels' values there."""
    return [fine[i::_FINE, j::_FINE, k::_FINE]
            for i, j, k in itertools.product(range(_FINE), repeat=3)]


def _blurred(x: np.ndarray) -> np.ndarray:
    """Each voxel's sum with its four neighbours in the slice, which count half."""
    y = 2.0 * x
    for axis in (1, 2):
        for by in (-1, 1):
            y = y + np.roll(x, by, axis)
    return y / 8.0**0.5  # Of variance 1 again


@functools.lru_cache(maxsize=64)
def make(patient: int, scanner: int) -> Phantom:
    """A patient's volume as one of `SCANNERS` gives it."""
    units, labels = _tissue(_Draw(1, patient))
    mean = functools.reduce(np.add, _points(units)) / _FINE**3
    counts = np.stack([functools.reduce(np.add, _points((labels == label).view(np.uint8)))
                       for label in range(len(CLASSES))])
    s = SCANNERS[scanner]
    y, x = (np.linspace(-1.0, 1.0, n)[shape] for n, shape in zip(
        SHAPE[1:], ((slice(None), None), (None, slice(None))), strict=True))
    noise = _blurred(_Draw(2, patient, scanner).normal(SHAPE))
    image = (s.scale * mean + s.offset + s.shading[0] * x + s.shading[1] * y + s.noise * noise)
    image = np.clip(np.rint(image), -1024, 3071).astype(np.int16)
    found = np.argmax(counts, axis=0).astype(np.uint8)
    for array in (image, found):
        array.setflags(write=False)  # They are shared between callers.
    return Phantom(image, found)


def load(split: str) -> list[Phantom]:
    """The phantoms of "train", "validation" or "heldout"."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(make, *zip(*SPLITS[split], strict=True)))
