"""Two-way tables: which tensors of a checkpoint hold which parameters of a model, and how they lie.

A family's table is a list of `Rule`s. `Table` applies them to one model's parameters and finds,
for every tensor of the checkpoint, the parts of parameters that it holds, and the reverse. Arrays
are moved tensor by tensor: views and slices, never a whole model.
"""

import dataclasses
import difflib
import functools
import itertools
import re
import string
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import ml_dtypes
import numpy as np

from zoo.convert.safetensors import Tensor, Weights

SHOWN = 30  # problems in one message
BLOCK_BYTES = 16 << 20  # of what is copied at a time
DTYPES = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))
_INDEX = re.compile(r"\{(\w)\}")


class ConversionError(ValueError):
    """A checkpoint and a model that do not match; the message lists every problem."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor of a checkpoint, or one a layer, and what it holds.

    Attributes:
      theirs: its key. ``{l}`` stands for the layer, other letters for an index along that axis
        of the parameter, as ``experts.{e}.w1.weight``.
      ours: the parameter's path, within the block where `theirs` names a layer. Several ones stand
        one after another along `axis` of the tensor.
      axes: ``"(h k) d -> d h k"``: the tensor's axes and the parameter's, a letter each. A group
        is one axis that the parameter has as several.
      axis: see `ours`.
      pad: letters of axes of which the tensor has the beginning alone: the parameter goes on with
        zeros. How much the tensor has, `Table` is told.
      beside: a parameter that the block must have, too, where blocks of several kinds name theirs
        alike.
    """

    theirs: str
    ours: str | tuple[str, ...]
    axes: str
    axis: int = 0
    pad: str = ""
    beside: str = ""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a parameter as a part of a tensor.

    Attributes:
      key: of the tensor.
      path: of the parameter, in the stacked layout.
      at: the part's index along the parameter's leading axes, as (layer group, expert).
      groups: the letters of each of the tensor's axes.
      order: the letters of the parameter's axes after those of `at`.
      sizes: of the letters, as the tensor has them.
      axis, offset: where the part begins in the tensor, along which axis.
      padded: sizes in the parameter of letters that go on with zeros there.
    """

    key: str
    path: str
    at: tuple[int, ...]
    groups: tuple[tuple[str, ...], ...]
    order: tuple[str, ...]
    sizes: Mapping[str, int]
    axis: int
    offset: int
    padded: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part, as the parameter has it."""
        return tuple(self.padded.get(letter, self.sizes[letter]) for letter in self.order)

    @property
    def extent(self) -> tuple[int, ...]:
        """Of the part, as the tensor has it."""
        return tuple(int(np.prod([self.sizes[c] for c in group], dtype=np.int64))
                     for group in self.groups)

    def read(self, weights: Weights, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The part, or a box of it, in the parameter's order: a view, not contiguous.

        Only the bytes that hold it are read. Where it goes on with zeros it is a copy.
        """
        index = (slice(None),) * len(self.order) if index is None else index
        wanted = {c: range(*part.indices(size)) for c, part, size in
                  zip(self.order, index, self.shape, strict=True)}
        box = {c: range(min(r.start, self.sizes[c]), min(r.stop, self.sizes[c]))
               for c, r in wanted.items()}
        ranges, inner = [], []
        for axis, group in enumerate(self.groups):
            stride = int(np.prod([self.sizes[c] for c in group[1:]], dtype=np.int64))
            outer = box[group[0]] if group else range(1)
            start = (self.offset if axis == self.axis else 0) + outer.start * stride
            ranges.append(slice(start, start + len(outer) * stride))
            for i, c in enumerate(group):
                part = box[c]
                inner.append(slice(None) if i == 0 else slice(part.start, part.stop))
        shape = [len(box[c]) if i == 0 else self.sizes[c]
                 for group in self.groups for i, c in enumerate(group)]
        array = weights.read(self.key, tuple(ranges)).reshape(shape)[tuple(inner)]
        letters = list(itertools.chain.from_iterable(self.groups))
        array = _extended(array, [len(wanted[c]) for c in letters])
        return array.transpose([letters.index(c) for c in self.order])

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """The part as the tensor has it: a view where the axes allow one."""
        letters = list(itertools.chain.from_iterable(self.groups))
        array = array[tuple(slice(self.sizes[c] if c in self.padded else None)
                            for c in self.order)]
        return array.transpose([self.order.index(c) for c in letters])


def _extended(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The array, and zeros behind it up to `shape`."""
    if array.shape == tuple(shape):
        return array
    whole = np.zeros(shape, array.dtype)
    # numpy moves custom types one by one.
    plain = f"u{array.itemsize}"
    whole.view(plain)[tuple(map(slice, array.shape))] = array.view(plain)
    return whole


def _parse(text: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    theirs, ours = text.split("->")
    groups = tuple(tuple(found.strip("()").split())
                   for found in re.findall(r"\([^)]*\)|\w", theirs))
    return groups, tuple(ours.split())


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the parameters of one path within a block, or outside of all, are."""

    path: str
    lead: tuple[int, ...]  # sizes of the leading axes of layers: (groups,) or ()
    first: int  # layer of the first group
    period: int
    shape: tuple[int, ...]  # without `lead`


def _places(shapes: Mapping[str, tuple[int, ...]], period: int) -> dict[str, list[_Place]]:
    """Path within the block (with ``{l}`` before it), or the whole path -> where it stands."""
    found = defaultdict(list)
    groups = next((shape[0] for path, shape in shapes.items()
                   if path.startswith("stack/blocks/")), 0)
    for path, shape in shapes.items():
        match = re.fullmatch(r"stack/(blocks|tail)/(\d+)/(.*)", path)
        if match is None:
            found[path].append(_Place(path, (), 0, 0, shape))
        elif match[1] == "blocks":
            found["{l}/" + match[3]].append(
                _Place(path, shape[:1], int(match[2]), period, shape[1:]))
        else:
            found["{l}/" + match[3]].append(
                _Place(path, (), groups * period + int(match[2]), period, shape))
    return found


class Table:
    """A family's rules, applied to the parameters of one model.

    Attributes:
      tensors: key -> (shape, the pieces it holds, in their order along the tensor's `axis`).
      parameters: path -> the pieces it is made of.
    """

    def __init__(self, rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]], period: int,
                 keys: Iterable[str] | None = None, unpadded: Mapping[str, int] | None = None):
        """Args:
          rules: where several give one parameter, the first whose tensor is among `keys` holds, and
            of several for one tensor the first that has parameters to give.
          shapes: of all parameters, by path in the stacked layout.
          period: of the stack's pattern.
          keys: of the checkpoint; None: of one to be written, where a parameter's first rule holds.
          unpadded: sizes in tensors of the letters that rules pad.
        """
        places = _places(shapes, period)
        known = None if keys is None else set(keys)
        self.tensors: dict[str, tuple[tuple[int, ...], tuple[Piece, ...]]] = {}
        self.parameters: dict[str, list[Piece]] = {path: [] for path in shapes}
        done: set[tuple[str, tuple[int, ...]]] = set()
        late: list[tuple[str, list[Piece]]] = []
        for rule in rules:
            for key, pieces in self._apply(rule, places, shapes, unpadded or {}):
                if key in self.tensors or any((p.path, p.at) in done for p in pieces):
                    continue
                if known is not None and key not in known:
                    late.append((key, pieces))
                    continue
                self._add(key, pieces, done)
        for key, pieces in late:  # A missing tensor; the parameter's first rule names it.
            if not any((p.path, p.at) in done for p in pieces):
                self._add(key, pieces, done)
        self.unmapped = [path for path, pieces in self.parameters.items()
                         if sum(int(np.prod(p.shape, dtype=np.int64)) for p in pieces)
                         != int(np.prod(shapes[path], dtype=np.int64))]

    @classmethod
    def identity(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Tensors that are the parameters themselves, of the same names; layers piece by piece."""
        table = cls((), {}, 0)
        letters = string.ascii_letters
        for path, shape in shapes.items():
            layered = path.startswith("stack/blocks/")
            order = tuple(letters[:len(shape) - layered])
            sizes = dict(zip(order, shape[layered:], strict=True))
            groups = ((),) * layered + tuple((c,) for c in order)
            pieces = [Piece(path, path, (g,) * layered, groups, order, sizes, 0, g)
                      for g in range(shape[0] if layered else 1)]
            table.tensors[path] = shape, tuple(pieces)
            table.parameters[path] = pieces
        return table

    @functools.cached_property
    def _held(self) -> Mapping[tuple[str, tuple[int, ...]], list[Piece]]:
        """The pieces at each path and index, or at indices that begin with it, in their order."""
        found = defaultdict(list)
        for path, pieces in self.parameters.items():
            for piece in sorted(pieces, key=lambda piece: piece.at):
                for count in range(len(piece.at) + 1):
                    found[path, piece.at[:count]].append(piece)
        return dict(found)

    def read(self, weights: Weights, path: str, at: tuple[int, ...] = ()) -> Iterator[np.ndarray]:
        """A parameter's part at an index along its leading axes; views, not contiguous.

        One array; or several that follow one another along its first axis where that has a tensor
        for each index, as a layer's experts may.
        """
        known = next(count for count in range(len(at), -1, -1) if (path, at[:count]) in self._held)
        for piece in self._held[path, at[:known]]:
            rest = at[known:]
            index = [slice(i, i + 1) for i in rest] + [slice(None)] * (
                len(piece.order) - len(rest))
            part = piece.read(weights, tuple(index))[(0,) * len(rest)]
            yield part[(None,) * (len(piece.at) - len(at))]

    def _add(self, key, pieces, done) -> None:
        shape = list(pieces[0].extent)
        shape[pieces[0].axis:pieces[0].axis + 1] = [
            sum(p.extent[p.axis] for p in pieces)] if shape else []
        self.tensors[key] = tuple(shape), tuple(pieces)
        for piece in pieces:
            self.parameters[piece.path].append(piece)
            done.add((piece.path, piece.at))

    @staticmethod
    def _apply(rule: Rule, places, shapes, unpadded) -> Iterator[tuple[str, list[Piece]]]:
        """(key, pieces) for each tensor that a rule stands for."""
        groups, order = _parse(rule.axes)
        layered = "{l}" in rule.theirs
        letters = [c for c in _INDEX.findall(rule.theirs) if c != "l"]
        ours = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
        columns = [places.get(("{l}/" if layered else "") + path) for path in ours]
        if not all(columns):
            return
        for row in zip(*columns, strict=True):
            if rule.beside and row[0].path.removesuffix(ours[0]) + rule.beside not in shapes:
                continue
            if any(len(place.shape) != len(order) for place in row):
                raise ConversionError(f"the rule of {rule.theirs!r} has {rule.axes!r}, and the "
                                      f"parameter {row[0].path!r} the shape {row[0].shape}")
            sizes = [dict(zip(order, place.shape, strict=True)) for place in row]
            padded = [{c: size[c] for c in rule.pad} for size in sizes]
            for size in sizes:
                size.update((c, unpadded[c]) for c in rule.pad)
            indices = itertools.product(*(range(sizes[0][c]) for c in letters))
            for index in indices:
                named = dict(zip(letters, index, strict=True))
                lead = row[0].lead
                for g in range(lead[0] if lead else 1):
                    key = _INDEX.sub(lambda m, g=g, place=row[0], named=named: str(
                        place.first + g * place.period if m[1] == "l" else named[m[1]]),
                        rule.theirs)
                    pieces, offset = [], 0
                    for place, size, larger in zip(row, sizes, padded, strict=True):
                        kept = tuple(c for c in order if c not in letters)
                        # Letters in a key index the parameter's leading axes, in its order.
                        at = ((g,) if place.lead else ()) + tuple(
                            named[c] for c in order if c in letters)
                        piece = Piece(key, place.path, at, groups, kept, size, rule.axis, offset,
                                      larger)
                        pieces.append(piece)
                        offset += piece.extent[rule.axis] if groups else 0
                    yield key, pieces

    def problems(self, tensors: Mapping[str, Tensor], ignored: Iterable[str] = ()) -> list[str]:
        """What keeps a checkpoint's tensors from being this model's parameters."""
        found = [f"no rule makes the parameter {path}" for path in self.unmapped]
        tips: dict[int, tuple[str, list[str]]] = {}  # Problem -> where to look for the nearest key.
        skip = [re.compile(pattern) for pattern in ignored]
        spare = [key for key in tensors if key not in self.tensors
                 and not any(pattern.fullmatch(key) for pattern in skip)]
        for key, (shape, pieces) in self.tensors.items():
            tensor = tensors.get(key)
            if tensor is None:
                tips[len(found)] = key, spare
                found.append(f"{key!r} {list(shape)} is missing (for {pieces[0].path})")
            elif tensor.shape != shape:
                found.append(f"{key!r} is {list(tensor.shape)}; the config makes it {list(shape)}")
            elif tensor.dtype not in DTYPES:
                found.append(f"{key!r} is {tensor.dtype}; weights are float64, float32, float16 "
                             "or bfloat16 (quantised ones must be dequantised first)")
        absent = [key for key in self.tensors if key not in tensors]
        for key in spare:
            tips[len(found)] = key, absent
            found.append(f"{key!r} {list(tensors[key].shape)} has no place in the model")
        for i, (key, known) in tips.items():
            if i < SHOWN:  # It takes long where there are thousands.
                found[i] += _near(key, known)
        return found

    def check_complete(self) -> None:
        """Raises ConversionError for parameters that no rule makes."""
        if self.unmapped:
            raise ConversionError("no rule writes the parameters " + ", ".join(self.unmapped))

    def check(self, tensors: Mapping[str, Tensor], where: Any, ignored: Iterable[str] = ()) -> None:
        """Raises ConversionError with all `problems`."""
        if found := self.problems(tensors, ignored):
            more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise ConversionError(
                f"{where}: {len(found)} problem{'s' * (len(found) > 1)} with its tensors:\n  "
                + "\n  ".join(found[:SHOWN]) + more)


def _near(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) if len(known) < 5000 else []
    return f"; the nearest is {near[0]!r}" if near else ""


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array as contiguous pieces of its first axis, of about `BLOCK_BYTES`."""
    if not array.ndim or array.flags.c_contiguous:
        yield np.ascontiguousarray(array)
        return
    row = max(1, array.nbytes // max(1, array.shape[0]))
    # numpy moves custom types one by one.
    plain = array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array
    step = max(1, BLOCK_BYTES // row)
    for start in range(0, array.shape[0], step):
        part = plain[start : start + step]
        out = np.empty(part.shape, part.dtype)
        source = _coalesced(part)
        target = out.reshape(source.shape)
        # A few of the source's lines at a time: of each, a cache line is read where one is written.
        axis = int(np.argmax(source.strides))
        for i in range(0, source.shape[axis], 32):
            lines = (slice(None),) * axis + (slice(i, i + 32),)
            target[lines] = source[lines]
        yield out.view(array.dtype)


def _coalesced(x: np.ndarray) -> np.ndarray:
    """The same numbers in the same order, with as few axes as their strides allow; a view."""
    shape: list[int] = []
    strides: list[int] = []
    for size, stride in zip(x.shape, x.strides, strict=True):
        if size == 1:
            continue
        if shape and strides[-1] == stride * size:
            shape[-1], strides[-1] = shape[-1] * size, stride
        else:
            shape.append(size)
            strides.append(stride)
    return np.lib.stride_tricks.as_strided(x, shape or (1,), strides or (x.itemsize,),
                                           writeable=False)


def tensor_blocks(pieces: Iterable[Piece], get: Callable[[Piece], Iterable[np.ndarray]],
                  dtype: np.dtype) -> Iterator[np.ndarray]:
    """A tensor of a checkpoint in contiguous blocks.

    ``get(piece)`` gives a part of a parameter, perhaps in parts along its first axis.
    """
    pieces = tuple(pieces)
    if len(pieces) > 1 and pieces[0].axis > 0:
        parts = [piece.to_theirs(_whole(get(piece))).reshape(piece.extent) for piece in pieces]
        yield cast(np.concatenate(parts, axis=pieces[0].axis), dtype)
        return
    for piece in pieces:
        parts = get(piece)
        if next(filter(None, piece.groups), ())[:1] != piece.order[:1]:
            parts = [_whole(parts)]
        for part in parts:
            for block in blocks(piece.to_theirs(part)):
                yield cast(block, dtype)


def _whole(parts: Iterable[np.ndarray]) -> np.ndarray:
    first, *others = parts
    return np.concatenate([first, *others]) if others else first


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The numbers in another type, some of them infinite if it is too narrow."""
    with np.errstate(over="ignore", invalid="ignore"):  # What is not finite then is looked for.
        return array.astype(dtype, copy=False)


def all_finite(x: np.ndarray) -> bool:
    """Whether all of an array's floating-point numbers are; far faster than `np.isfinite`."""
    if not x.size:
        return True
    # As integers, infinities and NaNs lie above all other numbers of their sign.
    plus, minus = np.array([np.inf, -np.inf], x.dtype)
    size = x.itemsize
    return bool(x.view(f"i{size}").max() < plus.view(f"i{size}")
                and x.view(f"u{size}").max() < minus.view(f"u{size}"))
