"""Which blocks of heads, batch and time a program of the TPU kernels holds, and whether any fit."""

import dataclasses
import itertools
import math

import jax.numpy as jnp

from pallas_kernels.rnn.cells import Cell

LANES = 128

# Per core, in MiB; and the cores that a device splits its programs over.
_VMEM = {"v4": 16, "v5e": 128, "v5p": 64, "v6e": 128, "tpu7x": 64}
_CORES = {"v4": 2, "v5p": 2}
_USABLE = 0.8  # The rest is for what the compiler itself puts there.

# Cycles of a step that no work fills: of a product's and a few functions' latencies.
_LATENCY = 500
_MOST_ROWS = 256
_MOST_GROUPS = 8  # A step's code is written out for each.
_TIMES = (64, 32, 16, 8, 4, 2, 1)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A call of the op, in whole lanes.

    Heads narrower than 128 lanes share them, as blocks of one matrix: a product of 128 x 128 costs
    the same whatever is in it.

    Attributes:
      b, t, h, d: the op's sizes.
      itemsize: of the operands, in bytes.
      cell: the cell.
    """

    b: int
    t: int
    h: int
    d: int
    itemsize: int
    cell: Cell

    @property
    def width(self) -> int:
        """Lanes of a head: a power of two below 128, or a multiple of it."""
        if self.d < LANES:
            return 1 << (self.d - 1).bit_length()
        return -(-self.d // LANES) * LANES

    @property
    def shared(self) -> int:
        """Heads of a group."""
        return max(1, LANES // self.width)

    @property
    def lanes(self) -> int:
        """Of a group."""
        return self.shared * self.width

    @property
    def groups(self) -> int:
        """Of heads."""
        return -(-self.h // self.shared)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What a program holds: groups of heads, rows of the batch, and positions at a time."""

    groups: int
    rows: int
    times: int


def needed(sizes: Sizes, tiles: Tiles) -> int:
    """Bytes of VMEM of the backward pass, which holds more than the forward one."""
    cell, item, lanes = sizes.cell, sizes.itemsize, sizes.lanes
    matrices = tiles.groups * lanes * cell.gates * lanes * item
    row = tiles.rows * tiles.groups * lanes
    kept = item + 4 * (cell.states - 1)
    # The inputs, what was saved, the gradients of h and of the pre-activations.
    position = row * ((cell.gates + 1 + cell.biases) * item + kept) + 8 * LANES * 4
    products = tiles.times * row * cell.gates * 4
    states = row * cell.states * 4
    # Blocks are double: one is copied while the other is used.
    return 2 * (matrices + tiles.times * position + 2 * states) + products + states


def _cost(sizes, tiles, cores):
    """Cycles of all positions, about: each gate's matrices are pushed again in each step."""
    programs = (-(-sizes.groups // tiles.groups)) * (-(-sizes.b // tiles.rows))
    pushes = tiles.groups * (sizes.lanes // LANES) ** 2 * sizes.cell.gates * LANES * 0.5
    pointwise = tiles.groups * sizes.lanes * tiles.rows * sizes.cell.biases * 16 / 4096
    return -(-programs // cores) * (_LATENCY + max(pushes, pointwise)), -tiles.times


def choose(sizes: Sizes, chip: str) -> Tiles:
    """The fastest tiles that fit.

    Raises:
      NotImplementedError: none do; with the bytes that are needed and there.
    """
    unit = 32 // sizes.itemsize
    whole = -(-sizes.b // unit) * unit
    rows = sorted({-(-math.ceil(sizes.b / n) // unit) * unit
                   for n in range(1, whole // unit + 1)})
    rows = [n for n in rows if n <= _MOST_ROWS]
    groups = [n for n in range(1, min(sizes.groups, _MOST_GROUPS) + 1) if sizes.groups % n == 0]
    longest = 1 << (sizes.t - 1).bit_length()
    times = [n for n in _TIMES if n <= longest]
    room = int(_VMEM.get(chip, 16) * _USABLE * 2**20)
    fit = [tiles for tiles in itertools.starmap(Tiles, itertools.product(groups, rows, times))
           if needed(sizes, tiles) <= room]
    if not fit:
        least = needed(sizes, Tiles(1, rows[0], 1))
        matrix = sizes.lanes ** 2 * sizes.cell.gates * sizes.itemsize
        raise NotImplementedError(
            f"a head of {sizes.d} has {matrix / 1e6:.1f} MB of matrices and needs "
            f"{least / 1e6:.1f} MB of VMEM, of which {chip} has {room / 1e6:.1f} MB; use xla, one "
            "matmul and one pointwise kernel a step")
    cores = _CORES.get(chip, 1)
    return min(fit, key=lambda tiles: _cost(sizes, tiles, cores))


def of(inputs, cell: Cell) -> Sizes:
    """Of the op's inputs [B, T, G, H, D]."""
    b, t, _, h, d = inputs.shape
    return Sizes(b, t, h, d, jnp.dtype(inputs.dtype).itemsize, cell)


def vmem(chip: str) -> int:
    """Bytes that a kernel may ask for."""
    return int(_VMEM.get(chip, 16) * 0.92 * 2**20)
