"""Fuzzing of the safetensors reader, with the library `safetensors` as its judge.

python -m tests.zoo.convert.fuzz_safetensors --inputs=100000 --seed=0

Each input is a sound file or index with some mutations. Nothing but `Damaged` may come out of the
reader; what it accepts the library must accept and see alike; what it refuses though the library
accepts must be one of the things in which it is stricter on purpose.
"""

import argparse
import collections
import json
import math
import random
import re
import tempfile
import time
from pathlib import Path

import safetensors as library

from zoo.convert import safetensors

FILE = Path("fuzzed.safetensors")
ITEMSIZES = {name: dtype.itemsize for name, dtype in safetensors._DTYPES.items()}
STRICTER = re.compile(
    r"twice"  # a key; the library keeps the last one
    r"|not an object of dtype, shape and data_offsets"  # a field more
    r"|not an object of strings"  # __metadata__ is null
    r"|too few for a safetensors file"
    r"|no JSON object after the first 8 bytes"  # space before the brace
    r"|empty or with control characters"
    r"|has dtype "  # complex numbers, packed and rarer 8-bit floats
    r"|not at most 32 integers"
    r"|over 2\*\*63 bytes"  # of an empty tensor, without its empty axis
)


class Members(list):
    """A JSON object as (key, value) pairs, so that keys may stand twice."""


class Literal(str):
    """Text that goes into the JSON as it is."""


NASTY = [
    -1, 0, 1, 2, 7, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**19,
    *map(Literal, (
        "-0", "0.0", "1.0", "1e0", "1e400", "-1.5", "NaN", "Infinity", "-Infinity", "true",
        "false", "null", "01", "+1", "0x1", "1" * 30, "1" * 6000, "", "[]", "{}", '[{"a":[]}]',
        "[[]]", "[" * 50 + "]" * 50, "[" * 5000 + "]" * 5000, '{"a":' * 2000 + "1" + "}" * 2000,
        '"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\\x41"', '"\n"', "'a'",
        '"\\u00e9"',
    )),
    "", "F32", "f32", "BF16", "F4", "C64", "F8_E8M0", "I128", "\x00", "\x7f", "..", "a/b", "é",
    "😀", "__metadata__", "dtype", "shape", "data_offsets", "w" * 300,
]


def encode(node) -> str:
    match node:
        case Literal():
            return str(node)
        case Members():
            return "{" + ",".join(f"{encode(key)}:{encode(value)}" for key, value in node) + "}"
        case list():
            return "[" + ",".join(map(encode, node)) + "]"
        case _:
            return json.dumps(node, ensure_ascii=False)


def sound_header(rng: random.Random) -> tuple[Members, int]:
    """The header of a file that every reader must accept, and how many bytes of data it wants."""
    entries, end = Members(), 0
    for name in rng.sample(["a", "b.weight", "é", "layers.0.w", "😀", "'", "\\", '"', " ", "z"],
                           rng.choice([0, 1, 1, 2, 3, 5])):
        dtype = rng.choice(list(ITEMSIZES))
        shape = [rng.choice([0, 1, 1, 2, 3, 5]) for _ in range(rng.choice([0, 1, 1, 2, 2, 4]))]
        begin, end = end, end + math.prod(shape) * ITEMSIZES[dtype]
        fields = [("dtype", dtype), ("shape", shape), ("data_offsets", [begin, end])]
        rng.shuffle(fields)
        entries.append((name, Members(fields)))
    rng.shuffle(entries)
    if rng.random() < 0.3:
        keys = rng.sample(["format", "x"], rng.choice([0, 1, 2]))
        metadata = Members((key, rng.choice(["pt", "", "é"])) for key in keys)
        entries.insert(rng.randint(0, len(entries)), ("__metadata__", metadata))
    return entries, end


def sound_index(rng: random.Random) -> Members:
    shards = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    places = Members((f"layers.{i}.w", rng.choice(shards)) for i in range(rng.randint(1, 5)))
    return Members([("metadata", Members([("total_size", 12)])), ("weight_map", places)])


def containers(node) -> list[list]:
    """All objects and arrays in a tree."""
    found = []
    if isinstance(node, list):
        found.append(node)
        for child in node:
            found += containers(child[1] if isinstance(node, Members) else child)
    return found


def mutate_tree(rng: random.Random, root: Members) -> None:
    """One change somewhere in the tree."""
    parent = rng.choice(containers(root))
    at = rng.randrange(len(parent)) if parent else 0
    is_object = isinstance(parent, Members)
    change = rng.choice(["value", "value", "nudge", "key", "delete", "double", "swap", "insert",
                         "wrap"])
    if change == "insert" or not parent:
        parent.insert(at, (rng.choice(["a", "dtype", "x", ""]), rng.choice(NASTY)) if is_object
                      else rng.choice(NASTY))
        return
    key, value = parent[at] if is_object else (None, parent[at])
    match change:
        case "value":
            value = rng.choice(NASTY)
        case "nudge" if isinstance(value, int):
            value = rng.choice([value + 1, value - 1, -value, value * 2, value + 2**32,
                                value + 2**64])
        case "key" if is_object:
            key = rng.choice([*NASTY, rng.choice(parent)[0]])
            key = key if isinstance(key, str) else str(key)
        case "wrap":
            value = rng.choice([[value], Members([("a", value)])])
        case "delete":
            del parent[at]
            return
        case "double":
            parent.insert(rng.randint(0, len(parent)), parent[at])
            return
        case "swap":
            other = rng.randrange(len(parent))
            parent[at], parent[other] = parent[other], parent[at]
            return
    parent[at] = (key, value) if is_object else value


def mutate_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """One change somewhere in the bytes; `other` is for splicing."""
    changed = bytearray(data)
    at = rng.randint(0, len(changed))
    to = min(len(changed), at + rng.choice([1, 1, 2, 4, 16, 1000]))
    match rng.choice(["flip", "set", "delete", "double", "insert", "splice", "number"]):
        case "flip" if at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        case "set" if at < len(changed):
            changed[at] = rng.choice(b'\x00 \t\n"\\{}[],:0123456789-+.eE\x7f\x80\xc3\xff')
        case "delete":
            del changed[at:to]
        case "double":
            changed[at:at] = changed[at:to]
        case "insert":
            changed[at:at] = rng.choice([b"\x00", b" ", b"\xef\xbb\xbf", b"{", b"}", b"\\u0000",
                                         b"\xed\xa0\x80", b"/**/", b",", b"\r\n", rng.randbytes(4)])
        case "splice":
            start = rng.randint(0, len(other))
            changed[at:] = other[start:]
        case "number":
            if numbers := list(re.finditer(rb"\d+", data)):
                number = rng.choice(numbers)
                changed[number.start():number.end()] = encode(rng.choice(NASTY)).encode(
                    errors="replace")
    return bytes(changed)


def make_file(rng: random.Random) -> bytes:
    """A file with between no and several mutations."""
    entries, size = sound_header(rng)
    for _ in range(rng.choice([0, 0, 1, 1, 1, 2])):
        mutate_tree(rng, entries)
    text = encode(entries).encode(errors="replace")
    for _ in range(rng.choice([0, 0, 0, 0, 1, 1, 2, 4])):
        text = mutate_bytes(rng, text, encode(sound_header(rng)[0]).encode())
    text += b" " * rng.choice([0, 0, 1, -len(text) % 8])
    length = len(text)
    if rng.random() < 0.06:
        length = rng.choice([0, 1, length - 1, length + 1, length + 8, 2**31, 2**63, 2**64 - 1,
                             100_000_001, rng.getrandbits(64)]) % 2**64
    if rng.random() < 0.06:
        size = max(0, size + rng.choice([-8, -1, 1, 8, 100]))
    data = length.to_bytes(8, "little") + text + rng.randbytes(size)
    if rng.random() < 0.03:
        data = mutate_bytes(rng, data, make_file(rng))
    if rng.random() < 0.01:
        data = rng.randbytes(rng.randint(0, 40))
    return data


def make_index(rng: random.Random) -> bytes:
    index = sound_index(rng)
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        mutate_tree(rng, index)
    text = encode(index).encode(errors="replace")
    for _ in range(rng.choice([0, 0, 1, 2])):
        text = mutate_bytes(rng, text, encode(sound_index(rng)).encode())
    return text


def check_file(data: bytes, scratch: Path) -> str:
    """What became of an input; AssertionError if that may not be."""
    try:
        tensors, metadata = safetensors._read_header(
            lambda offset, count: data[offset:offset + count], len(data), FILE)
    except safetensors.Damaged as error:
        message = str(error)
        assert message.isprintable() and len(message) < 2000, message
        try:
            library.deserialize(data)
        except library.SafetensorError:
            return "file: refused by both"
        assert STRICTER.search(message), f"only we refuse: {message}"
        return "file: refused by us alone: " + STRICTER.search(message)[0]
    theirs = dict(library.deserialize(data))
    assert theirs.keys() == {tensor.name for tensor in tensors}
    for tensor in tensors:
        seen = theirs[tensor.name]
        assert safetensors._DTYPES[seen["dtype"]] == tensor.dtype
        assert tuple(seen["shape"]) == tensor.shape
        assert bytes(seen["data"]) == data[tensor.begin:tensor.end]
    scratch.unlink(missing_ok=True)
    scratch.write_bytes(data)
    with library.safe_open(scratch, "np") as file:
        assert set(file.keys()) == theirs.keys()
        assert (file.metadata() or {}) == metadata
    return "file: accepted by both"


def check_index(data: bytes) -> str:
    try:
        places = safetensors._parse_index(data, FILE)
    except safetensors.Damaged as error:
        assert str(error).isprintable() and len(str(error)) < 2000, str(error)
        return "index: refused"
    assert places == json.loads(data.decode(), parse_int=float)["weight_map"]
    assert all(Path(place).name == place not in ("", ".", "..") for place in places.values())
    return "index: accepted"


def run(inputs: int, seed: int) -> collections.Counter:
    """How many of the inputs met which end."""
    ends = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(inputs):
            rng = random.Random(f"{seed}/{number}")
            is_index = number % 10 == 9
            data = make_index(rng) if is_index else make_file(rng)
            try:
                ends[check_index(data) if is_index
                     else check_file(data, Path(folder) / FILE.name)] += 1
            except BaseException as error:
                error.add_note(f"input {number} of seed {seed}: {data[:2000]!r}")
                raise
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzzes the safetensors reader.")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.monotonic()
    ends = run(options.inputs, options.seed)
    for end, count in ends.most_common():
        print(f"{count:8,}  {end}")
    print(f"{options.inputs:,} inputs in {time.monotonic() - start:.0f} s: nothing wrong")


if __name__ == "__main__":
    main()
