"""safetensors in and out: against the library, against damage, within memory."""

import concurrent.futures
import errno
import json
import math
import os
import random
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors as library
import safetensors.numpy

from tests.zoo.convert import fuzz_safetensors
from zoo.convert import safetensors
from zoo.convert.safetensors import INDEX, Damaged, Weights, write

MIB = 1 << 20
DTYPES = [
    np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2, np.int64, np.int32, np.int16, np.int8, np.uint64, np.uint32, np.uint16,
    np.uint8, np.bool_,
]
SHAPES = [(), (0,), (1,), (3, 0, 2), (7,), (5, 3), (2, 3, 5), (1, 1, 1, 2)]


def random_array(rng: np.random.Generator, dtype, shape) -> np.ndarray:
    """Any bit pattern, NaNs among them."""
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    raw = np.frombuffer(rng.bytes(math.prod(shape) * dtype.itemsize), np.uint8)
    return raw.view(dtype).reshape(shape)


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert found.tobytes() == wanted.tobytes()


def write_arrays(folder: Path, arrays: dict[str, np.ndarray], **options) -> list[Path]:
    """`write`, each array in several pieces where it can be cut."""
    def pieces(name):
        array = arrays[name]
        yield from (array[:1], array[1:]) if array.ndim else (array,)

    specs = {name: (x.dtype, x.shape) for name, x in arrays.items()}
    return write(folder, specs, pieces, **options)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return {f"{np.dtype(dtype).name}.{number}": random_array(rng, dtype, shape)
            for number, shape in enumerate(SHAPES) for dtype in DTYPES}


# Round trips.


def test_reads_what_the_library_writes(tmp_path, arrays):
    library.numpy.save_file(arrays, tmp_path / "model.safetensors", {"format": "pt", "é": "😀"})
    with Weights(tmp_path) as weights:
        assert weights.keys() == arrays.keys()
        assert weights.metadata == {"format": "pt", "é": "😀"}
        assert weights.total_bytes == sum(x.nbytes for x in arrays.values())
        begins = [tensor.begin for tensor in weights.values()]
        assert begins == sorted(begins)
        for name, array in arrays.items():
            tensor = weights[name]
            assert (tensor.dtype, tensor.shape, tensor.nbytes) == (
                array.dtype, array.shape, array.nbytes)
            assert_same(weights.read(name), array)
            found = weights.read(name)
            assert found.flags.c_contiguous and found.flags.writeable


def test_library_reads_what_we_write(tmp_path, arrays):
    counted = []
    files = write_arrays(tmp_path, arrays, progress=counted.append)
    assert files == [tmp_path / "model.safetensors"] == list(tmp_path.iterdir())
    assert sum(counted) == sum(x.nbytes for x in arrays.values())
    data = files[0].read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    seen = dict(library.deserialize(data))
    assert seen.keys() == arrays.keys()
    for name, array in arrays.items():
        assert safetensors._DTYPES[seen[name]["dtype"]] == array.dtype
        assert tuple(seen[name]["shape"]) == array.shape
        assert bytes(seen[name]["data"]) == array.tobytes()
    with library.safe_open(files[0], "np") as file:
        assert file.metadata() == {"format": "pt"}
    with Weights(files[0]) as weights:
        for name, tensor in weights.items():
            assert tensor.begin % tensor.dtype.itemsize == 0  # readers may view it in place
            assert_same(weights.read(name), arrays[name])


@pytest.mark.parametrize("limit", [1, 100, 1000])
def test_shards(tmp_path, arrays, limit):
    files = write_arrays(tmp_path, arrays, max_shard_bytes=limit)
    count = len(files)
    assert count > 1
    assert [f.name for f in files] == [
        f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(x.nbytes for x in arrays.values())}
    assert index["weight_map"].keys() == arrays.keys()
    for file in files:
        seen = dict(library.deserialize(file.read_bytes()))
        assert {name for name, place in index["weight_map"].items() if place == file.name} == set(
            seen)
        nbytes = sum(len(tensor["data"]) for tensor in seen.values())
        assert nbytes <= limit or sum(bool(tensor["data"]) for tensor in seen.values()) == 1
        for name, tensor in seen.items():
            assert bytes(tensor["data"]) == arrays[name].tobytes()
    with Weights(tmp_path) as weights:
        assert weights.keys() == arrays.keys()
        assert {name: tensor.file.name for name, tensor in weights.items()} == index["weight_map"]
        for name, array in arrays.items():
            assert_same(weights.read(name), array)


def test_no_tensors(tmp_path):
    write(tmp_path, {}, pytest.fail)
    assert library.numpy.load_file(tmp_path / "model.safetensors") == {}
    with Weights(tmp_path) as weights:
        assert (len(weights), weights.total_bytes, weights.metadata) == (0, 0, {"format": "pt"})


def test_tensors_are_produced_in_order(tmp_path):
    specs = {name: (np.float32, (3,)) for name in ("z", "a", "m", "b")}
    asked = []

    def produce(name):
        asked.append(name)
        return [np.zeros(3, np.float32)]

    write(tmp_path, specs, produce, max_shard_bytes=24)
    assert asked == list(specs)


# Reading parts.


def random_index(rng: random.Random, shape) -> tuple:
    index = []
    for size in shape[:rng.randint(0, len(shape))]:
        ends = [None, *range(-size - 1, size + 2)]
        if size and rng.random() < 0.3:
            index.append(rng.randrange(-size, size))
        else:
            index.append(slice(rng.choice(ends), rng.choice(ends), rng.choice([None, 1])))
    return tuple(index)


@pytest.mark.parametrize(("gap", "block"), [(1 << 16, 1 << 24), (0, 1 << 24), (24, 100), (8, 1)])
def test_parts_equal_numpys(tmp_path, monkeypatch, gap, block):
    monkeypatch.setattr(safetensors, "_GAP", gap)
    monkeypatch.setattr(safetensors, "_BLOCK", block)
    generator, rng = np.random.default_rng(1), random.Random(1)
    shapes = [*SHAPES, (4, 5, 6, 7), (9, 1, 8), (1, 6, 1, 5), (3, 2, 1, 2, 3), (40, 11)]
    arrays = {str(shape): random_array(generator, dtype, shape)
              for shape, dtype in zip(shapes, DTYPES, strict=False)}
    write_arrays(tmp_path, arrays)
    with Weights(tmp_path) as weights:
        for name, array in arrays.items():
            for _ in range(150):
                index = random_index(rng, array.shape)
                found = weights.read(name, index)
                assert_same(found, np.asarray(array[index]))
                assert found.flags.c_contiguous and found.flags.writeable


@pytest.fixture
def reads(monkeypatch):
    """(offset, bytes) of each read from now on."""
    calls = []
    preadv = os.preadv

    def counted(handle, blocks, offset):
        got = preadv(handle, blocks, offset)
        calls.append((offset, got))
        return got

    monkeypatch.setattr(os, "preadv", counted)
    return calls


@pytest.mark.parametrize(
    ("index", "most_calls"),
    [
        ((), 1),
        ((slice(100, 200),), 1),
        ((3, slice(5, 7)), 1),
        ((slice(None), 3), 1024),  # 2 KiB out of each 512 KiB
        ((slice(None), slice(0, 64)), 1024),
        ((slice(0, 8), slice(None), slice(1, 3)), 1),  # gaps of 2 KiB are read, too
        ((slice(0, 8), slice(3, 250), slice(1, 3)), 1),
        ((5, slice(None), 0), 1),
        ((slice(8), slice(10, 12), slice(0, 1)), 8),
        ((slice(3, 3),), 0),
    ],
)
def test_a_part_reads_hardly_more_than_itself(tmp_path, reads, index, most_calls):
    shape = (64, 256, 1024)
    with open(tmp_path / "model.safetensors", "wb") as file:  # sparse
        text = json.dumps({"x": {"dtype": "F16", "shape": shape, "data_offsets": [0, 32 * MIB]}})
        file.write(len(text).to_bytes(8, "little") + text.encode())
        file.truncate(file.tell() + 32 * MIB)
    with Weights(tmp_path) as weights:
        assert sum(got for _, got in reads) < 1000  # the header
        reads.clear()
        part = weights.read("x", index)
        within = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)[index]
        covered = 0
        if part.size:
            runs = 1 + np.count_nonzero(np.diff(within.reshape(-1)) > 1)
            assert sum(got for _, got in reads) <= part.nbytes + (runs - 1) * 65536
            # ... and nothing before or behind it.
            begin = weights["x"].begin
            assert min(offset for offset, _ in reads) == begin + 2 * within.min()
            assert max(sum(read) for read in reads) == begin + 2 * within.max() + 2
            covered = len(reads)
        assert covered == len(reads) <= most_calls


def test_wrong_indices(tmp_path):
    write_arrays(tmp_path, {"x": np.zeros((2, 3), np.float32)})
    with Weights(tmp_path) as weights:
        with pytest.raises(IndexError, match=r"index 2 is outside an axis of 2 of tensor 'x'"):
            weights.read("x", (2,))
        with pytest.raises(IndexError, match="steps must be 1"):
            weights.read("x", (slice(None, None, 2),))
        with pytest.raises(IndexError, match="3 indices for tensor 'x' of shape"):
            weights.read("x", (0, 0, 0))
        with pytest.raises(KeyError, match="y"):
            weights.read("y")
    with pytest.raises(ValueError, match="closed"):
        weights.read("x")


def test_threads_read_at_once(tmp_path):
    x = np.random.default_rng(0).random((256, 256), np.float32)
    write_arrays(tmp_path, {"x": x})
    parts = [(slice(i, i + 128), slice(i // 2, i)) for i in range(128)] * 4
    with Weights(tmp_path) as weights, concurrent.futures.ThreadPoolExecutor(8) as pool:
        for part, found in zip(parts, pool.map(lambda p: weights.read("x", p), parts), strict=True):
            assert_same(found, x[part])


def test_checksum_is_of_the_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "_BLOCK", 64)
    x = np.arange(100, dtype=np.float32)
    write_arrays(tmp_path, {"a": x, "b": x.reshape(10, 10), "c": x + 1, "d": x[:0]})
    with Weights(tmp_path) as weights:
        sums = {name: weights.checksum(name) for name in weights}
    assert sums["a"] == sums["b"]
    assert len(set(sums.values())) == 3
    assert sums["d"] == "cae66941d9efbd404e4d88758ea67670"  # BLAKE2b-128 of nothing


# Memory.


def peak_bytes(work) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_bounded(tmp_path):
    rows, chunk = 64 * 1024, np.ones((1024, 256), np.float32)  # 64 MiB in all

    def produce(name):
        return (chunk for _ in range(rows // len(chunk)))

    assert peak_bytes(
        lambda: write(tmp_path, {"x": (np.float32, (rows, 256))}, produce)) < MIB
    with Weights(tmp_path) as weights:
        assert peak_bytes(lambda: weights.read("x", (slice(None), slice(5, 9)))) < 18 * MIB
        assert peak_bytes(lambda: weights.read("x", (slice(0, 32 * 1024),))) < 33 * MIB
        assert peak_bytes(lambda: weights.checksum("x")) < 17 * MIB


def test_scratch_is_bounded_where_rows_are_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "_BLOCK", 1 << 16)
    write_arrays(tmp_path, {"x": np.zeros((3, MIB), np.uint8)})
    with Weights(tmp_path) as weights:
        assert peak_bytes(lambda: weights.read("x", (slice(None), slice(1, None)))) < 3.1 * MIB


# Damaged files.


def file_bytes(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw_entry(field: str, text: str) -> bytes:
    """A header of one tensor that has one field spelled out."""
    fields = {"dtype": '"F32"', "shape": "[1]", "data_offsets": "[0,4]", field: text}
    return ('{"a":{' + ",".join(f'"{k}":{v}' for k, v in fields.items()) + "}}").encode()


FOUR = bytes(4)
HOSTILE = {
    "empty file": (b"", "has 0 bytes, too few"),
    "no header": (bytes(8), "has 8 bytes, too few"),
    "noise": (b"0123456789" * 10, "no JSON object after the first 8 bytes"),
    "header of 0 bytes": (file_bytes(b"{", length=0), "is not valid JSON"),
    "header beyond the file": (file_bytes({}, length=100), "cut off: its header is 100 bytes long"),
    "billion-entry header": (file_bytes({}, length=10**9), "header of 1,000,000,000 bytes, over"),
    "largest length": (file_bytes({}, length=2**64 - 1), "header of 18,446,744,073,709,551,615"),
    "pickle": (b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s.", "a pickle.*weights_only=True"),
    "framed pickle": (b"\x80\x04\x95\x1a\0\0\0\0\0\0\0}\x94.", "not safetensors but a pickle"),
    "torch.save": (b"PK\x03\x04" + bytes(30), "not safetensors but a pickle"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "not UTF-8": (file_bytes(b'{"\xff":1}'), "not UTF-8"),
    "UTF-8 of a surrogate": (file_bytes(b'{"\xed\xa0\x80":1}'), "not UTF-8"),
    "escaped surrogate": (file_bytes(b'{"\\ud800":1}'), "not UTF-8"),
    "not JSON": (file_bytes(b"{]"), "is not valid JSON"),
    "trailing text": (file_bytes(b"{}x"), "is not valid JSON"),
    "array": (file_bytes(b"[]"), "no JSON object after the first 8 bytes"),
    "deep array": (file_bytes(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "deep object": (file_bytes(b'{"a":' * 100_000), "nested too deeply"),
    "deep and whole": (file_bytes(b'{"a":' + b"[" * 600 + b"]" * 600 + b"}"), r"\[\[\[\.\.\.\]"),
    "very many values": (file_bytes(b'{"a":[' + b"[]," * 6_000_000), "values in its JSON, over"),
    "NaN": (file_bytes(raw_entry("shape", "[NaN]"), FOUR), "NaN is not a number of JSON"),
    "Infinity": (file_bytes(raw_entry("shape", "[-Infinity]"), FOUR), "-Infinity is not a number"),
    "long integer": (file_bytes(raw_entry("shape", f"[{'9' * 6000}]"), FOUR), r"shape \[inf\]"),
    "negative dim": (file_bytes({"a": entry(shape=[-1])}, FOUR), r"shape \[-1\], not at most 32"),
    "two negative dims": (file_bytes({"a": entry(shape=[-1, -1])}, FOUR), r"shape \[-1, -1\], not"),
    "minus zero": (file_bytes(raw_entry("shape", "[-0]")), r"shape \[-0\.0\]"),
    "boolean dim": (file_bytes({"a": entry(shape=[True])}, FOUR), r"shape \[True\]"),
    "float dim": (file_bytes({"a": entry(shape=[1.0])}, FOUR), r"shape \[1\.0\]"),
    "huge dim": (file_bytes({"a": entry(shape=[2**63, 0])}), r"shape \[9223372036854775808, 0\]"),
    "no shape": (file_bytes({"a": entry(shape=None)}), "shape None"),
    "too many dims": (file_bytes({"a": entry(shape=[1] * 33)}, FOUR), "not at most 32"),
    "product over 2**64": (file_bytes({"a": entry(shape=[2**32, 2**32])}, FOUR), r"over 2\*\*63"),
    "product 2**64 + 1": (
        file_bytes({"a": entry("U8", [274177, 67280421310721], [0, 1])}, b"1"), r"over 2\*\*63"),
    "empty yet too large": (
        file_bytes({"a": entry(shape=[2**62, 4, 0], offsets=[0, 0])}), r"over 2\*\*63"),
    "negative offset": (file_bytes({"a": entry(offsets=[-4, 0])}, FOUR), r"offsets \[-4, 0\], not"),
    "boolean offset": (
        file_bytes({"a": entry("U8", [1], [False, True])}, b"1"), r"offsets \[False, True\]"),
    "float offset": (file_bytes({"a": entry(offsets=[0.0, 4])}, FOUR), r"data_offsets \[0\.0, 4\]"),
    "one offset": (file_bytes({"a": entry(offsets=[0])}, FOUR), r"data_offsets \[0\], not two"),
    "huge offsets": (file_bytes({"a": entry(offsets=[2**64, 2**64 + 4])}, FOUR), "not two inte"),
    "reversed offsets": (file_bytes({"a": entry(offsets=[4, 0])}, FOUR), "has 4 bytes"),
    "wrong size": (file_bytes({"a": entry(offsets=[0, 8])}, FOUR * 2), r"shape \[1\] has 4 bytes"),
    "truncated": (file_bytes({"a": entry()}, b"123"), "cut off: .* its tensors end at byte"),
    "bytes behind": (file_bytes({"a": entry()}, b"12345"), "hole: 1 bytes after its last tensor"),
    "offsets out of range": (file_bytes({"a": entry(offsets=[96, 100])}, FOUR), "hole: 96 bytes"),
    "hole": (file_bytes({"a": entry(), "b": entry(offsets=[8, 12])}, FOUR * 3),
             "hole: 4 bytes before tensor 'b'"),
    "overlap": (file_bytes({"a": entry("F32", [2], [0, 8]), "b": entry(offsets=[4, 8])}, FOUR * 2),
                "tensors 'a' and 'b' overlap by 4 bytes"),
    "same bytes twice": (file_bytes({"a": entry(), "b": entry()}, FOUR), "'a' and 'b' overlap"),
    "unknown dtype": (file_bytes({"a": entry("F4", [8])}, FOUR), "tensor 'a' has dtype 'F4'.*F64,"),
    "dtype no string": (file_bytes({"a": entry(["F32"])}, FOUR), r"has dtype \['F32'\]"),
    "same name twice": (file_bytes(b'{"a":1,"a":2}'), "key 'a' twice"),
    "same field twice": (file_bytes(raw_entry("x", '1,"shape":[1]'), FOUR), "key 'shape' twice"),
    "name spelled differently": (file_bytes(b'{"a":1,"\\u0061":2}'), "key 'a' twice"),
    "field missing": (file_bytes({"a": {"dtype": "F32", "shape": [1]}}, FOUR), "not an object of"),
    "field too many": (file_bytes({"a": entry() | {"x": 1}}, FOUR), "not an object of dtype"),
    "entry no object": (file_bytes({"a": [1]}), r"tensor 'a' is \[1\], not an object"),
    "empty name": (file_bytes({"": entry()}, FOUR), "the name '', empty or with control"),
    "NUL in a name": (file_bytes({"a\0b": entry()}, FOUR), r"the name 'a\\x00b'"),
    "newline in a name": (file_bytes({"a\nb": entry()}, FOUR), r"the name 'a\\nb'"),
    "metadata no object": (file_bytes({"__metadata__": ["pt"]}), r"__metadata__ is \['pt'\]"),
    "metadata no strings": (file_bytes({"__metadata__": {"a": 1}}), r"__metadata__ is \{'a': 1\}"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_file(tmp_path, case):
    data, match = HOSTILE[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Damaged, match=match) as caught:
        Weights(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/model.safetensors ")
    assert message.isprintable() and len(message) < 1000
    assert len(os.listdir("/proc/self/fd")) == before


def test_very_many_values_are_refused_unparsed(tmp_path):
    raw = b'{"a":[' + b"[]," * 6_000_000

    def parse():
        with pytest.raises(Damaged, match="values in its JSON"):
            safetensors._parse_header(raw, 8 + len(raw), Path("x"))

    assert peak_bytes(parse) < MIB


def test_too_many_tensors(tmp_path, monkeypatch):
    sharded(tmp_path)
    (tmp_path / "x").mkdir()
    write(tmp_path / "x", {str(i): (np.int8, (0,)) for i in range(4)}, lambda name: [])
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 1)
    Weights(tmp_path / "s1.safetensors").close()
    with pytest.raises(Damaged, match="index.json lists 2 tensors, over 1"):
        Weights(tmp_path)
    with pytest.raises(Damaged, match="model.safetensors has 4 tensors, over 1"):
        Weights(tmp_path / "x")


def test_bool_that_is_neither(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(
        file_bytes({"a": entry("BOOL", [3], [0, 3])}, b"\0\1\7"))
    with Weights(tmp_path) as weights:
        assert weights.read("a", (slice(2),)).tolist() == [False, True]
        with pytest.raises(Damaged, match="'a' is BOOL but holds the byte 7"):
            weights.read("a")


def test_file_cut_off_while_open(tmp_path):
    x = np.arange(1000, dtype=np.float32)
    (file,) = write_arrays(tmp_path, {"x": x})
    with Weights(tmp_path) as weights:
        os.truncate(file, weights["x"].begin + 400)
        with pytest.raises(Damaged, match="within tensor 'x': it was cut off"):
            weights.read("x")
        with pytest.raises(Damaged, match="changed while it was read"):
            weights.read("x", (slice(50),))
        with pytest.raises(Damaged, match="within tensor 'x': it was cut off"):
            weights.checksum("x")


def test_file_rewritten_while_open(tmp_path):
    (file,) = write_arrays(tmp_path, {"x": np.zeros(10, np.float32)})
    with Weights(tmp_path) as weights:
        weights.read("x")
        with open(file, "r+b") as stream:
            stream.seek(-4, os.SEEK_END)
            stream.write(b"1234")
        os.utime(file, ns=(0, 0))  # a clock tick may be longer than this test
        with pytest.raises(Damaged, match="changed while it was read"):
            weights.read("x")


def test_file_replaced_while_open(tmp_path):
    (file,) = write_arrays(tmp_path, {"x": np.ones(10, np.float32)})
    with Weights(tmp_path) as weights:
        (tmp_path / "new").write_bytes(b"else")
        (tmp_path / "new").replace(file)
        assert weights.read("x").sum() == 10  # the file that was checked


# Directories.


def sharded(folder: Path, **weight_map) -> None:
    """Two shards, s1 with a and s2 with b, and an index with changes."""
    places = {"a": "s1.safetensors", "b": "s2.safetensors"} | weight_map
    for name, file in (("a", "s1"), ("b", "s2")):
        (folder / f"{file}.safetensors").write_bytes(file_bytes({name: entry()}, FOUR))
    (folder / INDEX).write_text(json.dumps(
        {"weight_map": {name: place for name, place in places.items() if place is not None}}))


def test_index_decides(tmp_path):
    sharded(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"left alone")
    with Weights(tmp_path) as weights:
        assert [tensor.file.name for tensor in weights.values()] == [
            "s1.safetensors", "s2.safetensors"]


def test_first_metadata_wins(tmp_path):
    sharded(tmp_path)
    for name, file, metadata in (("a", "s1", {"x": "1"}), ("b", "s2", {"x": "2", "y": "3"})):
        (tmp_path / f"{file}.safetensors").write_bytes(
            file_bytes({"__metadata__": metadata, name: entry()}, FOUR))
    with Weights(tmp_path) as weights:
        assert weights.metadata == {"x": "1", "y": "3"}


def test_only_file_of_a_directory(tmp_path):
    (tmp_path / "any.safetensors").write_bytes(file_bytes({"a": entry()}, FOUR))
    with Weights(tmp_path) as weights:
        assert list(weights) == ["a"]
    (tmp_path / "other.safetensors").write_bytes(b"")
    with pytest.raises(Damaged, match="2 safetensors files and no .*: any.safetensors, other"):
        Weights(tmp_path)
    with Weights(tmp_path / "any.safetensors") as weights:
        assert list(weights) == ["a"]


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "x.pkl"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02.")
    with pytest.raises(Damaged, match=f"only '{name}': a pickle .*never loaded.*save_file"):
        Weights(tmp_path)
    with pytest.raises(Damaged):
        Weights(tmp_path / name)


def test_nothing_there(tmp_path):
    with pytest.raises(Damaged, match="no safetensors file; give"):
        Weights(tmp_path)
    with pytest.raises(Damaged, match="nowhere cannot be opened .No such file"):
        Weights(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "place",
    ["../s2.safetensors", "/etc/passwd", "sub/s2.safetensors", "..", ".", "", "..\\s2.safetensors",
     "C:\\s2", "./s2.safetensors", "s2\0", "s2\n", 7, None, ["s2.safetensors"], {"x": 1}],
)
def test_index_with_no_bare_name(tmp_path, place):
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {"a": "s1.safetensors", "b": place}}))
    with pytest.raises(Damaged, match="places tensor 'b' in .*, not the bare name"):
        Weights(tmp_path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "has the weight_map None"),
        ('{"weight_map":{}}', r"has the weight_map \{\}"),
        ('{"weight_map":[]}', r"has the weight_map \[\]"),
        ('{"weight_map":{"a":"s1.safetensors","a":"s2.safetensors"}}', "key 'a' twice"),
        ('{"weight_map":{},"weight_map":{}}', "key 'weight_map' twice"),
        ('{"x":' * 50_000, "nested too deeply"),
        ('{"x":NaN}', "NaN is not"),
        ("\ufeff{}", "is not valid JSON"),
    ],
)
def test_damaged_index(tmp_path, text, match):
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(Damaged, match=match) as caught:
        Weights(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / INDEX} ")


def test_large_index(tmp_path):
    sharded(tmp_path)
    os.truncate(tmp_path / INDEX, 10**9)
    with pytest.raises(Damaged, match="has 1,000,000,000 bytes, over 100,000,000"):
        Weights(tmp_path)


def test_index_and_shards_disagree(tmp_path):
    sharded(tmp_path, c="s1.safetensors")
    with pytest.raises(Damaged, match="s1.safetensors does not hold tensor 'c'"):
        Weights(tmp_path)
    sharded(tmp_path, b=None, c="s2.safetensors")
    with pytest.raises(Damaged, match="s2.safetensors holds tensor 'b', which .* does not list"):
        Weights(tmp_path)
    sharded(tmp_path)
    (tmp_path / "s2.safetensors").write_bytes(
        file_bytes({"b": entry(), "a": entry(offsets=[4, 8])}, FOUR * 2))  # a is in both
    with pytest.raises(Damaged, match="s2.safetensors holds tensor 'a', which .* in s1.safetens"):
        Weights(tmp_path)


def test_missing_shard(tmp_path):
    sharded(tmp_path)
    (tmp_path / "s2.safetensors").unlink()
    with pytest.raises(Damaged, match="s2.safetensors is missing"):
        Weights(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
def test_shard_that_is_no_file(tmp_path, make):
    sharded(tmp_path)
    (tmp_path / "s2.safetensors").unlink()
    make(tmp_path / "s2.safetensors")
    with pytest.raises(Damaged, match="s2.safetensors is not a regular file"):
        Weights(tmp_path)


@pytest.mark.parametrize("name", ["s2.safetensors", INDEX])
def test_link_out_of_the_directory(tmp_path, name):
    (tmp_path / "x").mkdir()
    sharded(tmp_path / "x")
    (tmp_path / "x" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "x" / name).symlink_to("../elsewhere")
    with pytest.raises(Damaged, match=f"{name} is a link that leads outside the directory"):
        Weights(tmp_path / "x")
    (tmp_path / "x" / name).unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "x" / "within")
    (tmp_path / "x" / name).symlink_to("within")
    Weights(tmp_path / "x").close()


def test_only_file_that_is_a_link_out(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "there").write_bytes(file_bytes({"a": entry()}, FOUR))
    (tmp_path / "x" / "model.safetensors").symlink_to(tmp_path / "there")
    with pytest.raises(Damaged, match="leads outside the directory"):
        Weights(tmp_path / "x")
    Weights(tmp_path / "x" / "model.safetensors").close()  # the user's own words


@pytest.mark.parametrize("target", ["s2.safetensors", "nowhere"])
def test_link_that_leads_nowhere(tmp_path, target):
    sharded(tmp_path)
    (tmp_path / "s2.safetensors").unlink()
    (tmp_path / "s2.safetensors").symlink_to(target)
    with pytest.raises(Damaged, match=r"s2.safetensors (is missing|cannot be found)"):
        Weights(tmp_path)


def test_hugging_face_cache(tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    sharded(snapshot)
    for number, file in enumerate(list(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    with Weights(snapshot) as weights:
        assert list(weights) == ["a", "b"]
    (tmp_path / "here").symlink_to(snapshot)
    Weights(tmp_path / "here").close()
    # ... which is no leave to go anywhere else.
    (snapshot / "s1.safetensors").unlink()
    (blobs / "1").rename(repository / "1")
    (snapshot / "s1.safetensors").symlink_to("../../1")
    with pytest.raises(Damaged, match="leads outside the directory"):
        Weights(snapshot)


# Writing what cannot be written.


@pytest.mark.parametrize(
    ("specs", "match"),
    [
        ({"x": (np.complex128, (1,))}, "tensor 'x' is complex128, which safetensors does not"),
        ({"x": (np.dtype(">f4"), (1,))}, "tensor 'x' is >f4"),
        ({"x": (np.float32, (-1,))}, r"shape \[-1\], .*; change what is to be written"),
        ({"": (np.float32, (1,))}, "the name ''"),
        ({"a\n": (np.float32, (1,))}, r"the name 'a\\n'"),
        ({"\ud800": (np.float32, (1,))}, "not UTF-8"),
        ({"__metadata__": (np.float32, (1,))}, "no tensor can have the name '__metadata__'"),
        ({1: (np.float32, (1,))}, "no tensor can have the name 1"),
        ({"x": (np.float32, (1,) * 33)}, "not at most 32"),
        ({"x": (np.float32, (2**40, 2**40))}, r"over 2\*\*63"),
    ],
)
def test_wrong_specs_write_nothing(tmp_path, specs, match):
    with pytest.raises(ValueError, match=match):
        write(tmp_path, {"first": (np.float32, (1,)), **specs}, pytest.fail, max_shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ([np.zeros(3, np.float32)], "given 4 bytes too few"),
        ([], "given 16 bytes too few"),
        ([np.zeros(3, np.float32), np.zeros(2, np.float32)], "given 4 bytes too many"),
        ([np.zeros(2, np.float64)], "given float64"),
        ([np.zeros((4, 2), np.float32)[:, 0]], "produce C-contiguous arrays of float32"),
        ([[0.0] * 4], "given list"),
    ],
)
def test_wrong_arrays_leave_nothing(tmp_path, arrays, match):
    produced = {"a": [np.zeros(2, np.float32)], "b": arrays}
    with pytest.raises(ValueError, match=match):
        write(tmp_path, {"a": (np.float32, (2,)), "b": (np.float32, (2, 2))}, produced.get,
              max_shard_bytes=8)
    assert list(tmp_path.iterdir()) == []


def test_directory_that_is_taken(tmp_path):
    write_arrays(tmp_path, {"x": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match="already holds model.safetensors"):
        write_arrays(tmp_path, {"x": np.ones(1, np.float32)})
    with Weights(tmp_path) as weights:
        assert weights.read("x") == 0
    with pytest.raises(ValueError, match="is not a directory"):
        write_arrays(tmp_path / "nowhere", {})


def test_files_reach_the_disk(tmp_path, monkeypatch):
    synced = {}
    monkeypatch.setattr(os, "fsync", lambda handle: synced.update(
        {os.readlink(f"/proc/self/fd/{handle}"): os.fstat(handle).st_size}))
    files = write_arrays(tmp_path, {str(i): np.zeros(9) for i in range(3)}, max_shard_bytes=80)
    assert synced.keys() == {str(tmp_path), *(str(file) for file in tmp_path.iterdir())}
    assert all(synced[str(file)] == file.stat().st_size for file in [*files, tmp_path / INDEX])


def test_full_disk(tmp_path, monkeypatch):
    left = 5000
    os_write = os.write

    def write_some(handle, data):
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = os_write(handle, data[:min(left, 700)])  # short writes, as on a disk that fills up
        left -= done
        return done

    monkeypatch.setattr(os, "write", write_some)
    arrays = {str(i): np.full(300, i, np.float32) for i in range(3)}
    handles = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space left") as caught:
        write_arrays(tmp_path, {**arrays, "last": np.zeros(2000, np.float32)}, max_shard_bytes=1200)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == handles
    left = 10**6
    write_arrays(tmp_path, arrays)
    with Weights(tmp_path) as weights:
        for name, array in arrays.items():
            assert_same(weights.read(name), array)


# Fuzzing; the script runs more.


def test_fuzzing():
    ends = fuzz_safetensors.run(3000, seed=1)
    for end in ("file: accepted by both", "file: refused by both", "index: accepted",
                "index: refused"):
        assert ends[end] > 50


def test_one_file_goes_before_an_index(tmp_path):
    """As in transformers: a directory that was saved again in one piece keeps its old index."""
    for name, value in (("model.safetensors", 1.0), ("model-00001-of-00001.safetensors", 2.0)):
        library.numpy.save_file({"a": np.full(4, value, np.float32)}, tmp_path / name)
    (tmp_path / INDEX).write_text(json.dumps(
        {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with Weights(tmp_path) as weights:
        assert weights.read("a").tolist() == [1.0] * 4
