"""Weights as safetensors, streamed: parts of tensors into host memory, files out piece by piece.

A file is 8 bytes, the length of its header (little-endian); the header, a JSON object that gives
each tensor's dtype, shape and byte offsets; and the tensors' bytes, without a gap. Files come from
anywhere, so a header is believed only after every check, and all headers are checked before any
tensor is read. Nothing is unpickled or mapped into memory.
Format: https://huggingface.co/docs/safetensors.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import math
import operator
import os
import re
import reprlib
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
_ONE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TENSORS = 1_000_000  # in a file, and in an index
_MAX_JSON_NODES = 10 * MAX_TENSORS  # brackets and commas: bounds what parsing may allocate
_MAX_RANK = 32
_MAX_INT = 2**63 - 1
# A gap this small between two runs of wanted bytes is read too: cheaper than another read.
_GAP = 1 << 16
_BLOCK = 1 << 24  # bytes of scratch memory
_DTYPES = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "I64": np.dtype("<i8"), "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"), "I8": np.dtype("i1"), "U64": np.dtype("<u8"), "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"), "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NOT_BARE = re.compile(r"[/\\\x00-\x1f\x7f-\x9f]")
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple = 3, 6, 8, 8
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 100
_FROM_PICKLE = (
    "a pickle can run any code and is never loaded; where it can be trusted, convert it with "
    "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
)
_AGAIN = "it is damaged: fetch or convert it again"
# transformers refuses files that do not say which framework they are for.
_PYTORCH = MappingProxyType({"format": "pt"})


class Damaged(ValueError):
    """Input that cannot be trusted: the one-line message names the file, the value, the remedy."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """What a header says of one tensor; its bytes are `begin` to `end` of `file`, row-major."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class Weights(Mapping[str, Tensor]):
    """The tensors of a file or directory of safetensors: name -> Tensor, in file order.

    In a directory, `model.safetensors.index.json` names the files if it is there; else it is
    `model.safetensors`, or the only *.safetensors. Opening checks all headers and reads no tensor.
    The files stay open until `close`; reading from several threads is safe.

    Attributes:
      metadata: the files' `__metadata__`; of a key that several have, the first file's value.
      total_bytes: of all tensors.

    Raises:
      Damaged: anything is not as the format says, or a link or an index leads out of the directory
        (links into the blobs of a Hugging Face cache are welcome).
    """

    def __init__(self, directory_or_file: str | os.PathLike):
        source = Path(directory_or_file)
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[Path, tuple[io.FileIO, os.stat_result]] = {}
        self.metadata: dict[str, str] = {}
        try:
            if source.is_dir():
                self._open_directory(source)
            else:
                self._open(source, source)
        except BaseException:
            self.close()
            raise
        self.total_bytes = sum(tensor.nbytes for tensor in self._tensors.values())

    def _open_directory(self, folder: Path) -> None:
        # Where there is both, transformers takes the one file, and leaves the index alone.
        if os.path.lexists(folder / _ONE_FILE) or not os.path.lexists(folder / INDEX):
            name = _only_file(folder)
            self._open(folder / name, locate(folder, name))
            return
        stream, status = _open_regular(folder / INDEX, locate(folder, INDEX))
        with stream:
            if status.st_size > MAX_HEADER_BYTES:
                raise _damaged(folder / INDEX, f"has {status.st_size:,} bytes, over "
                               f"{MAX_HEADER_BYTES:,}; {_AGAIN}")
            raw = _read_bytes(stream, 0, status.st_size, folder / INDEX)
        index = _parse_index(raw, folder / INDEX)
        names = sorted(set(index.values()))
        places = [locate(folder, name) for name in names]  # all, before any is opened
        for name, place in zip(names, places, strict=True):
            self._open(folder / name, place, index)
        for name, shard in index.items():
            if name not in self._tensors:
                raise _damaged(folder / shard, f"does not hold tensor {_show(name)}, which {INDEX} "
                               "places there; fetch the directory again")

    def _open(self, file: Path, place: Path, index: Mapping[str, str] | None = None) -> None:
        """Checks one file's header, against the index if there is one, and keeps it open."""
        stream, status = _open_regular(file, place)
        self._files[file] = stream, status
        tensors, metadata = _read_header(
            lambda offset, count: _read_bytes(stream, offset, count, file), status.st_size, file)
        for tensor in tensors:
            if index is not None and index.get(tensor.name) != file.name:
                listed = index.get(tensor.name)
                raise _damaged(file, f"holds tensor {_show(tensor.name)}, which {INDEX} "
                               + ("does not list" if listed is None else f"places in {listed}")
                               + "; fetch the directory again")
            self._tensors[tensor.name] = tensor
        self.metadata = metadata | self.metadata

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; what was read stays, reading more is an error."""
        for stream, _ in self._files.values():
            stream.close()

    def read(self, name: str, index: tuple[slice | int, ...] = ()) -> np.ndarray:
        """x[index] of tensor `name` as a new C-contiguous array, reading hardly more than that.

        Bytes that lie apart by at most 64 KiB are read in one go, through 16 MiB of scratch
        memory; besides, memory is the result's.

        Args:
          name: one of the tensors.
          index: slices of step 1 and ints, as NumPy takes them; further axes are whole.

        Raises:
          KeyError: no such tensor.
          IndexError: `index` does not fit the shape.
          Damaged: the file was changed or cut off since it was opened, or a BOOL is not 0 or 1.
        """
        tensor = self[name]
        shape, rank, itemsize = tensor.shape, len(tensor.shape), tensor.dtype.itemsize
        bounds = _bounds(tensor, index)
        counts = [stop - start for start, stop in bounds]
        out = np.empty(counts, tensor.dtype)
        flat = _bytes_of(out)
        if out.size:
            strides = [math.prod(shape[axis + 1:]) * itemsize for axis in range(rank)]
            begin = tensor.begin + sum(
                start * stride for (start, _), stride in zip(bounds, strides, strict=True))
            # From axis `lead` on the part is one run of bytes: at most that axis is cut.
            whole = rank
            while whole and counts[whole - 1] == shape[whole - 1]:
                whole -= 1
            lead = max(whole - 1, 0)
            # spans[a]: bytes from the first to the last wanted, all indices before axis a fixed.
            spans = [itemsize] * (rank + 1)
            for axis in reversed(range(rank)):
                spans[axis] = (counts[axis] - 1) * strides[axis] + spans[axis + 1]
            # From axis `first` on the runs are read together with the gaps between them.
            first = lead
            while first and strides[first - 1] <= _BLOCK and (
                    counts[first - 1] == 1 or strides[first - 1] - spans[first] <= _GAP):
                first -= 1
            rows = 0  # of axis `first` that fit into the scratch memory
            if first < lead:
                rows = 1 + max(0, _BLOCK - spans[first + 1]) // strides[first]
                rows = min(rows, counts[first])
                scratch = np.empty((rows - 1) * strides[first] + spans[first + 1], np.uint8)
            done = 0
            for outer in np.ndindex(*counts[:first]):
                at = begin + sum(map(operator.mul, outer, strides))
                if first == lead:
                    self._fill(tensor, flat[done:done + spans[first]], at)
                    done += spans[first]
                    continue
                for row in range(0, counts[first], rows):
                    taken = min(rows, counts[first] - row)
                    used = scratch[:(taken - 1) * strides[first] + spans[first + 1]]
                    self._fill(tensor, used, at + row * strides[first])
                    out[(*outer, slice(row, row + taken))] = np.ndarray(
                        (taken, *counts[first + 1:]), tensor.dtype, used, 0, strides[first:])
            self._check_unchanged(tensor)
        if tensor.dtype == np.bool_ and flat.size and flat.max() > 1:
            raise _damaged(tensor.file, f"tensor {_show(name)} is BOOL but holds the byte "
                           f"{flat.max()}, not 0 or 1; {_AGAIN}")
        # An int drops its axis.
        return out.reshape([count for axis, count in enumerate(counts)
                            if axis >= len(index) or isinstance(index[axis], slice)])

    def checksum(self, name: str) -> str:
        """BLAKE2b (16 bytes, hexadecimal) of a tensor's bytes, through 16 MiB of memory."""
        tensor = self[name]
        digest = hashlib.blake2b(digest_size=16)
        scratch = np.empty(min(_BLOCK, tensor.nbytes), np.uint8)
        for at in range(tensor.begin, tensor.end, _BLOCK):
            block = scratch[:tensor.end - at]
            self._fill(tensor, block, at)
            digest.update(block)
        self._check_unchanged(tensor)
        return digest.hexdigest()

    def _fill(self, tensor: Tensor, block: np.ndarray, offset: int) -> None:
        stream, _ = self._files[tensor.file]
        got = _read_into(stream, memoryview(block), offset)
        if got < block.size:
            raise _damaged(tensor.file, f"ends at byte {offset + got:,}, within tensor "
                           f"{_show(tensor.name)}: it was cut off since it was opened; run again")

    def _check_unchanged(self, tensor: Tensor) -> None:
        stream, before = self._files[tensor.file]
        now = os.fstat(stream.fileno())
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise _damaged(tensor.file, "was changed while it was read; run again")


def write(
    folder: str | os.PathLike,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    produce: Callable[[str], Iterable[np.ndarray]],
    *,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] = _PYTORCH,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Writes tensors that never need stand whole in memory; returns the safetensors files.

    One file `model.safetensors` if all fit into `max_shard_bytes`, else
    `model-00001-of-00002.safetensors` and so on with an index, in the order of `tensors`; a larger
    tensor gets a file of its own. Within a file wider dtypes come first, as readers expect: every
    tensor starts at a multiple of its item size. All headers are made and checked before the first
    byte is written. What was written is removed if anything fails.

    Args:
      folder: an existing directory without safetensors. The caller makes it atomic.
      tensors: name -> (dtype, shape).
      produce: called once a tensor, in the order they are written; yields C-contiguous arrays of
        its dtype, of any shapes, whose bytes in sequence are the tensor's.
      max_shard_bytes: of tensors in one file.
      metadata: for each file's `__metadata__`.
      progress: called with the number of bytes, after each array.

    Raises:
      ValueError: a name, dtype or shape the format does not allow; arrays that do not add up to
        the tensor; a directory that already holds safetensors.
      OSError: from the disk, such as no space left.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a directory; make it first")
    if present := [f.name for f in folder.iterdir() if f.name.endswith((".safetensors", INDEX))]:
        raise ValueError(f"{folder} already holds {min(present)}; give a new directory")
    shards = _plan(tensors, max_shard_bytes)
    count = len(shards)
    files = [folder / (_ONE_FILE if count == 1 else
                       f"model-{number:05}-of-{count:05}.safetensors")
             for number in range(1, count + 1)]
    headers = [_header(shard, metadata, file) for shard, file in zip(shards, files, strict=True)]
    written = []
    try:
        for file, header, shard in zip(files, headers, shards, strict=True):
            with open(file, "xb", buffering=0) as stream:
                written.append(file)
                _write_all(stream, header)
                for name, (dtype, shape) in shard.items():
                    left = math.prod(shape) * dtype.itemsize
                    for array in produce(name):
                        left -= _check_produced(name, array, dtype, left)
                        _write_all(stream, _bytes_of(array))
                        if progress is not None:
                            progress(array.nbytes)
                    array = None  # Or it would be there still while the next tensor is made.
                    if left:
                        raise ValueError(f"tensor {_show(name)} of shape {shape} was given "
                                         f"{left:,} bytes too few; produce all of it")
                os.fsync(stream.fileno())
        if count > 1:
            places = {name: file.name for file, shard in zip(files, shards, strict=True)
                      for name in shard}
            total = sum(map(_nbytes, tensors.values()))
            index = {"metadata": {"total_size": total}, "weight_map": places}
            with open(folder / INDEX, "xb", buffering=0) as stream:
                written.append(folder / INDEX)
                _write_all(stream, json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")
                os.fsync(stream.fileno())
        sync(folder)
    except BaseException:
        for file in written:
            file.unlink(missing_ok=True)
        raise
    return files


_Specs = dict[str, tuple[np.dtype, tuple[int, ...]]]


def _nbytes(spec: tuple[np.dtype, tuple[int, ...]]) -> int:
    return math.prod(spec[1]) * np.dtype(spec[0]).itemsize


def _plan(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], limit: int) -> list[_Specs]:
    """The tensors of each file, in the order they are written."""
    shards: list[_Specs] = [{}]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        dtype = np.dtype(dtype)
        if dtype not in _DTYPE_NAMES:
            raise ValueError(f"tensor {_show(name)} is {dtype}, which safetensors does not have; "
                             f"cast it to one of {', '.join(map(str, _DTYPE_NAMES))}")
        spec = dtype, tuple(map(operator.index, shape))
        size = _nbytes(spec)
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += size
    return [dict(sorted(shard.items(), key=lambda item: -item[1][0].itemsize)) for shard in shards]


def _header(shard: _Specs, metadata: Mapping[str, str], file: Path) -> bytes:
    """The file's bytes before the tensors', known to be readable."""
    ends = list(itertools.accumulate(map(_nbytes, shard.values()), initial=0))
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for (name, (dtype, shape)), offsets in zip(
            shard.items(), itertools.pairwise(ends), strict=True):
        if name == "__metadata__" or not isinstance(name, str):
            raise ValueError(f"no tensor can have the name {_show(name)}; rename it")
        entries[name] = {
            "dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    try:
        _read_header(lambda offset, count: header[offset:offset + count],
                     len(header) + ends[-1], file)
    except Damaged as error:
        problem = str(error).removesuffix(_AGAIN)
        raise ValueError(f"{problem}change what is to be written") from None
    return header


def _check_produced(name: str, array: np.ndarray, dtype: np.dtype, left: int) -> int:
    """The array's bytes, if they may be the tensor's next ones."""
    if (not isinstance(array, np.ndarray) or array.dtype != dtype
            or not array.flags.c_contiguous):
        found = getattr(array, "dtype", type(array).__name__)
        raise ValueError(f"tensor {_show(name)} was given {found} "
                         f"{getattr(array, 'shape', '')}; produce C-contiguous arrays of {dtype}")
    if array.nbytes > left:
        raise ValueError(f"tensor {_show(name)} was given {array.nbytes - left:,} bytes too many; "
                         "produce exactly its shape")
    return array.nbytes


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """The memory of a C-contiguous array, uint8 [nbytes]."""
    return array.reshape(-1).view(np.uint8)


def _write_all(stream: io.FileIO, data: bytes | np.ndarray) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(stream.fileno(), left):]


def sync(folder: Path) -> None:
    """Waits until the disk has the names of a directory's files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bounds(tensor: Tensor, index: tuple[slice | int, ...]) -> list[tuple[int, int]]:
    """(start, stop) on each axis, 0 <= start <= stop <= size."""
    if len(index) > len(tensor.shape):
        raise IndexError(f"{len(index)} indices for tensor {_show(tensor.name)} of shape "
                         f"{tensor.shape}; give at most one an axis")
    bounds = []
    for size, part in itertools.zip_longest(tensor.shape, index, fillvalue=slice(None)):
        if isinstance(part, slice):
            start, stop, step = part.indices(size)
            if step != 1:
                raise IndexError(f"{part} of tensor {_show(tensor.name)}: steps must be 1; "
                                 "read the range and take the steps from that")
            bounds.append((start, max(start, stop)))
        else:
            at = operator.index(part)
            if not -size <= at < size:
                raise IndexError(f"index {at} is outside an axis of {size} of tensor "
                                 f"{_show(tensor.name)}, shape {tensor.shape}")
            bounds.append((at % size, at % size + 1))
    return bounds


def _show(value: object) -> str:
    """The value on one line of bounded length, whatever is in it."""
    return _SHORT.repr(value).encode("ascii", "backslashreplace").decode()


def _damaged(file: Path, problem: str) -> Damaged:
    name = str(file)
    return Damaged(f"{name if name.isprintable() else ascii(name)} {problem}")


def _only_file(folder: Path) -> str:
    """The name of the safetensors file of a directory without an index."""
    names = sorted(path.name for path in folder.iterdir())
    found = [name for name in names if name.endswith(".safetensors")]
    if _ONE_FILE in found:
        return _ONE_FILE
    if len(found) == 1:
        return found[0]
    if found:
        raise _damaged(folder, f"holds {len(found)} safetensors files and no {INDEX}: {found[0]}, "
                       f"{found[1]}, ...; fetch the index, or name one file")
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        raise _damaged(folder, f"holds no safetensors file, only {_show(pickles[0])}: "
                       f"{_FROM_PICKLE}")
    raise _damaged(folder, "holds no safetensors file; give the directory of a checkpoint")


def locate(folder: Path, name: str) -> Path:
    """Where folder/name lies, links followed, provided that it does not lie elsewhere."""
    home = folder.resolve()
    try:
        place = (home / name).resolve(strict=True)
    except FileNotFoundError:
        raise _damaged(folder / name, "is missing; fetch the directory again") from None
    except (OSError, RuntimeError) as error:  # such as a link to itself
        raise _damaged(folder / name, f"cannot be found ({error}); fetch the directory again"
                       ) from None
    # A Hugging Face cache: <repository>/snapshots/<revision>/NAME -> <repository>/blobs/<hash>.
    snapshots = next((path for path in home.parents if path.name == "snapshots"), None)
    in_cache = snapshots is not None and place.parent == snapshots.parent / "blobs"
    if not in_cache and not place.is_relative_to(home):
        raise _damaged(folder / name, f"is a link that leads outside the directory, to "
                       f"{_show(str(place))}; put the file itself there")
    return place


def _open_regular(file: Path, place: Path) -> tuple[io.FileIO, os.stat_result]:
    """Opens `place`, which messages call `file`."""
    try:
        # Without O_NONBLOCK opening a named pipe would wait for its writer.
        handle = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _damaged(file, f"cannot be opened ({getattr(error, 'strerror', error)}); give a "
                       "readable file or directory") from None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise _damaged(file, "is not a regular file; put the file itself there")
    return io.FileIO(handle), status


def _read_into(stream: io.FileIO, block: memoryview, offset: int) -> int:
    """Fills `block` from `offset` on; the bytes read, fewer only where the file ends."""
    done = 0
    while done < len(block):
        got = os.preadv(stream.fileno(), [block[done:]], offset + done)
        if not got:
            break
        done += got
    return done


def _read_bytes(stream: io.FileIO, offset: int, count: int, file: Path) -> bytearray:
    data = bytearray(count)
    if _read_into(stream, memoryview(data), offset) < count:
        raise _damaged(file, "was cut off while it was read; run again")
    return data


def _read_header(
    read: Callable[[int, int], bytes | bytearray], size: int, file: Path
) -> tuple[list[Tensor], dict[str, str]]:
    """The tensors in file order and the metadata of a file of `size` bytes.

    `read(offset, count)` gives some of them.
    """
    start = bytes(read(0, min(size, 9)))
    if size < 9:
        raise _damaged(file, f"has {size} bytes, too few for a safetensors file; {_AGAIN}")
    if start[8:] != b"{":
        if start[:2] == b"PK" or (start[0] == 0x80 and start[1] in range(2, 6)):
            raise _damaged(file, f"is not safetensors but a pickle: {_FROM_PICKLE}")
        if start[:8] == b"version ":
            raise _damaged(file, "is a pointer of Git LFS, not the file; run `git lfs pull`")
        raise _damaged(file, "is not safetensors: no JSON object after the first 8 bytes; give a "
                       "safetensors file")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _damaged(file, f"has a header of {length:,} bytes, over {MAX_HEADER_BYTES:,}; "
                       f"{_AGAIN}")
    if length > size - 8:
        raise _damaged(file, f"is cut off: its header is {length:,} bytes long, the file {size:,}; "
                       "fetch it again")
    return _parse_header(read(8, length), size, file)


def _parse_header(
    raw: bytes | bytearray, size: int, file: Path
) -> tuple[list[Tensor], dict[str, str]]:
    begin = 8 + len(raw)
    header = _parse_json(raw, file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(file, f"__metadata__ is {_show(metadata)}, not an object of strings; "
                       f"{_AGAIN}")
    if len(header) > MAX_TENSORS:
        raise _damaged(file, f"has {len(header):,} tensors, over {MAX_TENSORS:,}; {_AGAIN}")
    tensors = [_parse_tensor(name, entry, begin, file) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    before, at = None, begin
    for tensor in tensors:
        if tensor.begin < at:
            raise _damaged(file, f"tensors {_show(before)} and {_show(tensor.name)} overlap by "
                           f"{at - tensor.begin:,} bytes; {_AGAIN}")
        if tensor.begin > at:
            raise _damaged(file, f"has a hole: {tensor.begin - at:,} bytes before tensor "
                           f"{_show(tensor.name)} belong to none; {_AGAIN}")
        before, at = tensor.name, tensor.end
    if at > size:
        raise _damaged(file, f"is cut off: {size:,} bytes long, its tensors end at byte {at:,}; "
                       "fetch it again")
    if at < size:
        raise _damaged(file, f"has a hole: {size - at:,} bytes after its last tensor belong to "
                       f"none; {_AGAIN}")
    return tensors, metadata


def _parse_tensor(name: str, entry: object, begin: int, file: Path) -> Tensor:
    def refuse(problem: str) -> Damaged:
        return _damaged(file, f"tensor {_show(name)} {problem}; {_AGAIN}")

    if not name or _CONTROL.search(name):
        raise _damaged(file, f"has a tensor with the name {_show(name)}, empty or with control "
                       f"characters; {_AGAIN}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"is {_show(entry)}, not an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _damaged(file, f"tensor {_show(name)} has dtype {_show(dtype)}; convert it to one of "
                       f"{', '.join(_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(map(_is_size, shape)):
        raise refuse(f"has shape {_show(shape)}, not at most {_MAX_RANK} integers from 0 to 2**63")
    dtype = _DTYPES[dtype]
    # NumPy counts the other axes of an empty array, too.
    if math.prod(filter(None, shape)) * dtype.itemsize > _MAX_INT:
        raise refuse(f"has shape {_show(shape)}, over 2**63 bytes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise refuse(f"has data_offsets {_show(offsets)}, not two integers from 0 to 2**63")
    needed = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise refuse(f"has data_offsets {_show(offsets)}, but {dtype} of shape {_show(shape)} has "
                     f"{needed:,} bytes")
    return Tensor(name, dtype, tuple(shape), file, begin + offsets[0], begin + offsets[1])


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INT


def _parse_index(raw: bytes | bytearray, file: Path) -> dict[str, str]:
    """Tensor name -> file name, each a bare one."""
    places = _parse_json(raw, file).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise _damaged(file, f"has the weight_map {_show(places)}, not an object that gives each "
                       f"tensor's file; {_AGAIN}")
    if len(places) > MAX_TENSORS:
        raise _damaged(file, f"lists {len(places):,} tensors, over {MAX_TENSORS:,}; {_AGAIN}")
    for name, shard in places.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or _NOT_BARE.search(shard):
            raise _damaged(file, f"places tensor {_show(name)} in {_show(shard)}, not the bare "
                           "name of a file in the directory; fetch it again")
    return places


def _parse_json(raw: bytes | bytearray, file: Path) -> dict[str, object]:
    """A JSON object with unique keys, of bounded size."""
    nodes = sum(raw.count(mark) for mark in (b"{", b"[", b","))
    if nodes > _MAX_JSON_NODES:
        raise _damaged(file, f"has {nodes:,} values in its JSON, over {_MAX_JSON_NODES:,}; "
                       f"{_AGAIN}")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_int=_integer,
                           parse_constant=_refuse_constant)
    except RecursionError:
        raise _damaged(file, f"has JSON nested too deeply; {_AGAIN}") from None
    except UnicodeError as error:
        raise _damaged(file, f"has JSON that is not UTF-8 ({error.reason}); {_AGAIN}") from None
    except ValueError as error:
        raise _damaged(file, f"is not valid JSON ({error}); {_AGAIN}") from None
    if not isinstance(value, dict):
        raise _damaged(file, f"is not a JSON object but {_show(value)}; {_AGAIN}")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {_show(double)} twice")
    for pair in pairs:
        for text in pair:
            if isinstance(text, str) and not text.isascii():
                text.encode()  # an unpaired surrogate, which JSON can spell, is no text
    return members


def _integer(text: str) -> int | float:
    # As JSON has it, -0 is no natural number. Python refuses to parse very long integers.
    return float(text) if text == "-0" or len(text) > 20 else int(text)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number of JSON")
