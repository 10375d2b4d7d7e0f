"""Text corpora as one flat array of token ids: the standard library, files, or a memory map."""

import dataclasses
import difflib
import glob
import gzip
import hashlib
import json
import logging
import math
import os
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from recipes.tokenizer import Bytes, Tokenizer

# What a directory is searched for; a file named by itself may have any other ending.
_TEXT_SUFFIXES = frozenset(
    (".txt", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".py", ".pyi", ".c", ".h", ".cc")
    + (".cpp", ".hpp", ".cu", ".js", ".ts", ".java", ".go", ".rs", ".rb", ".sh", ".sql", ".lua")
)
_CACHE_FORMAT = "corpus cache 2"
_CHUNK_BYTES = 1 << 24  # Text handed to the tokenizer at once.
_CHUNK_TOKENS = 1 << 22  # Tokens of a memory map looked at together.
# A single text is cut into about so many pieces, but of about so many bytes at most and at least:
# an evaluation takes whole pieces, and what follows a cut does not see what stands before it.
_PIECES, _LARGEST_PIECE, _SMALLEST_PIECE = 40, 1 << 16, 1 << 10

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents laid end to end as token ids.

    Document d is `tokens[starts[d]:starts[d + 1]]` and ends in `tokenizer.eos_id` (only the last
    one of a .bin file may lack it).

    Attributes:
      tokens: uint8, uint16 or uint32 [tokens]; a read-only memory map for a .bin file.
      starts: int64 [documents + 1].
      names: a name per document (path, path:line, or path@offset for a piece), None for a .bin
        file.
      document_bytes: int64 [documents], bytes of text of each document.
      document_hashes: uint64 [documents], of each document's text (of its ids for a .bin file).
      tokenizer: the tokenizer that made the ids.
      is_cut: whether the documents are the pieces of one text, in order.
      manifest: spec, kind, documents, tokens, bytes, sha256 (of tokens, then starts), and the
        tokenizer's fingerprint; JSON-able, to tell whether a resumed run has the same data.
    """

    tokens: np.ndarray
    starts: np.ndarray
    names: list[str] | None
    document_bytes: np.ndarray
    document_hashes: np.ndarray
    tokenizer: Tokenizer
    is_cut: bool
    manifest: dict[str, str | int]

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1

    @property
    def num_bytes(self) -> int:
        """Bytes of text of all documents."""
        return int(self.document_bytes.sum())

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of text per token, document ends included."""
        return self.num_bytes / len(self.tokens)

    def document(self, doc_id: int) -> np.ndarray:
        """Token ids of one document, its eos included."""
        return self.tokens[self.starts[doc_id] : self.starts[doc_id + 1]]

    def text(self, doc_id: int) -> bytes:
        """The text of one document (as decoded, where the tokenizer is not plain bytes)."""
        ids = self.document(doc_id)
        if isinstance(self.tokenizer, Bytes):
            return ids[ids < 256].astype(np.uint8).tobytes()
        return self.tokenizer.decode(ids).encode("utf-8")


def load(spec: str, tokenizer: Tokenizer, cache_dir: str | os.PathLike | None = None) -> Corpus:
    """Loads the documents that a spec names.

    Args:
      spec: comma separated. "stdlib" is the source of the running Python's standard library, a
        document per file. Anything else is a file, a directory (searched recursively for text
        and .jsonl files and, alone, a .bin) or a glob: .jsonl has a document per line in its
        field "text", .bin is a flat array of token ids with documents separated by the eos id
        (little-endian uint16, or as NAME.json beside NAME.bin says: {"dtype", "eos_id",
        "vocab_size"}), and any other file is UTF-8 text and one document. Where all there is is
        one text (of a kilobyte or two at least), it is cut into pieces where paragraphs or lines
        end, and these are the documents.
      tokenizer: from `recipes.tokenizer.load`; it must have an eos id.
      cache_dir: keeps the ids of tokenized text there, and what a pass over a .bin file found, for
        the next run. Plain bytes of text need no cache and use none.

    Raises:
      ValueError: one line that names the file and what is wrong with it: missing (with the nearest
        name that exists), empty, not text, a line without "text", an id outside the vocabulary.
    """
    if tokenizer.eos_id is None:
        raise ValueError(
            "tokenizer: it has no end-of-text token, which ends each document; name one as "
            '"eos_token" in a tokenizer_config.json beside the tokenizer.json'
        )
    sources = _find_sources(spec)
    binaries = [source for source in sources if source.kind == "bin"]
    if binaries and len(sources) > 1:
        raise ValueError(
            f"data {spec!r}: {binaries[0].name!r} is one of {len(sources)} files, and a .bin is "
            "read alone; join .bin files of one dtype with `cat`, or name one"
        )
    if binaries:
        return _load_binary(spec, binaries[0], tokenizer, cache_dir)
    return _load_text(spec, sources, tokenizer, cache_dir)


def split(corpus: Corpus, fraction: float = 0.05, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Document ids (train, heldout), int64, ascending.

    A document is held out if a hash of its text and the seed falls below `fraction`. So its side
    depends on nothing else, not on the other documents, and copies of it are on the same side. Of
    a single text that was cut the last pieces are held out, since neighbours are alike.

    Raises:
      ValueError: fraction is not 0 (which holds nothing out) nor in (0, 1), or one side would be
        empty.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"heldout fraction {fraction}: it must be 0, or lie between 0 and 1")
    if fraction == 0:
        return np.arange(corpus.num_documents), np.zeros(0, np.int64)
    if corpus.is_cut:
        pieces = np.arange(corpus.num_documents)
        ends, room = np.cumsum(corpus.document_bytes), (1 - fraction) * corpus.num_bytes
        kept = np.clip(np.searchsorted(ends, room, side="right"), 1, len(pieces) - 1)
        return pieces[:kept], pieces[kept:]
    if not 0 <= seed < 2**64:
        raise ValueError(f"split seed {seed}: it must lie in 0..2**64-1")
    key = _mix(np.array([seed], np.uint64))
    # The upper 53 bits, which a float64 holds exactly.
    draws = (_mix(corpus.document_hashes ^ key) >> np.uint64(11)) * 2.0**-53
    heldout = draws < fraction
    if heldout.any() and not heldout.all():
        return np.flatnonzero(~heldout), np.flatnonzero(heldout)
    distinct = np.unique(draws)
    if len(distinct) == 1:
        raise ValueError(
            f"data {corpus.manifest['spec']!r} holds 1 distinct document, and a split is by whole "
            "documents; give a longer text, several files, a .jsonl with a document per line, or "
            "--heldout=0"
        )
    side, enough = ("train", distinct[-2:]) if heldout.all() else ("heldout", distinct[:2])
    raise ValueError(
        f"heldout fraction {fraction}: no {side} document among the {corpus.num_documents} of "
        f"{corpus.manifest['spec']!r}; give more documents, or a fraction of {enough.mean():.4g}"
    )


def gzip_nats_per_byte(corpus: Corpus, doc_ids: Sequence[int] | np.ndarray) -> float:
    """What gzip -9 needs for these documents, each on its own: nats per byte of text.

    A baseline that a language model should beat: compressed bits * ln 2 / bytes.
    """
    compressed = total = 0
    for doc_id in doc_ids:
        text = corpus.text(doc_id)
        compressed += len(gzip.compress(text, compresslevel=9, mtime=0))
        total += len(text)
    if total == 0:
        raise ValueError(f"gzip baseline: {len(doc_ids)} documents without any text; give some")
    return compressed * 8 * math.log(2) / total


def _mix(x: np.ndarray) -> np.ndarray:
    """The SplitMix64 finalizer (Steele, Lea & Flood, 2014), a bijection of uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# Finding files.


@dataclasses.dataclass(frozen=True)
class _Source:
    """A file: `kind` is "stdlib", "text", "jsonl" or "bin"."""

    name: str
    path: Path
    kind: str
    named: bool  # By itself in the spec: then it is an error for it to be empty or not text.


def _find_sources(spec: str) -> list[_Source]:
    pieces = [piece.strip() for piece in spec.split(",") if piece.strip()]
    if not pieces:
        raise ValueError(f"data {spec!r} names nothing; give 'stdlib', files, directories or globs")
    found: dict[Path, _Source] = {}
    for piece in pieces:
        for source in _find_piece(piece):
            found.setdefault(source.path.resolve(), source)
    return list(found.values())


def _find_piece(piece: str) -> list[_Source]:
    if piece == "stdlib":
        return _find_stdlib()
    path = Path(piece).expanduser()
    if path.is_file():
        return [_Source(piece, path, _kind(path), named=True)]
    if path.is_dir():
        sources = _find_in_directory(path)
        if not sources:
            raise ValueError(
                f"data {piece!r}: the directory holds no text, .jsonl or .bin file; name files of "
                "other endings one by one or with a glob"
            )
        return sources
    if not glob.has_magic(piece):
        raise ValueError(f"data {piece!r}: no such file or directory{_suggest(path)}")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    sources = []
    for match in matches:
        if match.is_file():
            sources.append(_Source(str(match), match, _kind(match), named=False))
    if not sources:
        raise ValueError(f"data {piece!r}: the pattern matches no file; check it with `ls`")
    return sources


def _kind(path: Path) -> str:
    return {".jsonl": "jsonl", ".bin": "bin"}.get(path.suffix.lower(), "text")


def _find_in_directory(root: Path) -> list[_Source]:
    sources = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for file in files:
            path = Path(folder, file)
            wanted = _kind(path) != "text" or path.suffix.lower() in _TEXT_SUFFIXES
            if wanted and not file.startswith("."):
                sources.append(_Source(str(path), path, _kind(path), named=False))
    return sorted(sources, key=lambda source: source.path.relative_to(root).as_posix())


def _find_stdlib() -> list[_Source]:
    """Sources of the standard library, without installed packages, tests and build settings."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    sources = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name not in skipped and not name.startswith("config-")
        ]
        for file in files:
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                path = Path(folder, file)
                name = path.relative_to(root).as_posix()
                sources.append(_Source(name, path, "stdlib", named=False))
    if not sources:
        raise ValueError(
            f"data 'stdlib': this Python has no library sources in {str(root)!r}; give text files"
        )
    return sorted(sources, key=lambda source: source.name)


def _suggest(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir():
        path, folder = folder, folder.parent
    try:
        names = [str(folder / name) for name in sorted(os.listdir(folder))]
    except OSError as error:
        return f" ({_reason(error)})"
    if str(folder) == ".":
        names.append("stdlib")
    nearest = difflib.get_close_matches(str(path), names, n=1, cutoff=0.0)
    return f"; nearest is {nearest[0]!r}" if nearest else f"; {str(folder)!r} is empty"


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


# Text and .jsonl.


def _load_text(
    spec: str, sources: list[_Source], tokenizer: Tokenizer, cache_dir: str | os.PathLike | None
) -> Corpus:
    cache = None
    if cache_dir is not None and not isinstance(tokenizer, Bytes):
        files = [[s.name, s.kind, s.named, _file_sha256(s.path)] for s in sources]
        cache = _Cache(cache_dir, [tokenizer.fingerprint, tokenizer.eos_id, files])
    entry = cache.read() if cache else None
    if entry is None:
        entry = _tokenize(sources, tokenizer)
        if not len(entry.document_bytes):
            raise ValueError(f"data {spec!r}: {len(sources)} files, none with any text; give some")
        if cache:
            cache.write(entry)
    kinds = "+".join(sorted({source.kind for source in sources}))
    is_cut = _is_alone(sources) and len(entry.document_bytes) > 1
    return _corpus(spec, kinds, tokenizer, entry.tokens, entry, is_cut)


def _is_alone(sources: list[_Source]) -> bool:
    return len(sources) == 1 and sources[0].kind == "text"


def _tokenize(sources: list[_Source], tokenizer: Tokenizer) -> "_Entry":
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    parts: list[np.ndarray] = []
    names: list[str] = []
    document_bytes: list[int] = []
    hashes: list[int] = []
    chunk: list[bytes] = []
    chunk_bytes = 0

    def encode_chunk() -> None:
        eos = np.array([tokenizer.eos_id], dtype)
        for ids in tokenizer.encode_batch(chunk):
            parts.extend((ids.astype(dtype), eos))
        chunk.clear()

    for name, text in _read_documents(sources):
        names.append(name)
        document_bytes.append(len(text))
        hashes.append(_hash(text))
        chunk.append(text)
        chunk_bytes += len(text)
        if chunk_bytes >= _CHUNK_BYTES:
            encode_chunk()
            chunk_bytes = 0
    encode_chunk()
    lengths = [len(ids) + len(eos) for ids, eos in zip(parts[::2], parts[1::2], strict=True)]
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    return _Entry(
        starts=starts,
        document_bytes=np.array(document_bytes, np.int64),
        document_hashes=np.array(hashes, np.uint64),
        sha256=_sha256(tokens, starts),
        names=names,
        tokens=tokens,
    )


def _read_documents(sources: list[_Source]) -> Iterator[tuple[str, bytes]]:
    """Yields (name, UTF-8 text) of each document; those without text are left out."""
    for source in sources:
        if source.kind == "jsonl":
            yield from _read_jsonl(source)
            continue
        text = _read_file(source.path)
        offset = _binary_offset(text)
        if offset is not None:
            if source.kind == "stdlib":
                continue
            what = "a NUL byte" if text[offset] == 0 else f"byte 0x{text[offset]:02x}"
            raise ValueError(
                f"{source.name}: {what} at offset {offset} is not UTF-8 text; convert the file, or "
                "leave it out"
            )
        if text and _is_alone(sources):
            yield from _cut(source.name, text)
        elif text:
            yield source.name, text
        elif source.named:
            raise ValueError(f"{source.name}: the file is empty; leave it out")


def _cut(name: str, text: bytes) -> Iterator[tuple[str, bytes]]:
    """Yields (name, piece) of a text: one that is too short for two pieces is its only piece."""
    size = min(max(len(text) // _PIECES, _SMALLEST_PIECE), _LARGEST_PIECE)
    begin = 0
    while begin < len(text):
        end = len(text)
        if end - begin > 1.5 * size:  # The rest is at least half a piece too.
            end = _boundary(text, begin + size // 2, begin + size)
        yield name if end - begin == len(text) else f"{name}@{begin}", text[begin:end]
        begin = end


def _boundary(text: bytes, first: int, last: int) -> int:
    """The best place in first..last to cut a UTF-8 text: after a paragraph, a line, or a word."""
    for mark in (b"\n\n", b"\n", b" "):
        at = text.rfind(mark, first, last)
        if at >= 0:
            return at + len(mark)
    while text[last] & 0xC0 == 0x80:  # Within a character.
        last -= 1
    return last


def _read_jsonl(source: _Source) -> Iterator[tuple[str, bytes]]:
    documents = 0
    try:
        with open(source.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.isspace():
                    continue
                name = f"{source.name}:{number}"
                documents += 1
                if text := _parse_line(name, line):
                    yield name, text
    except OSError as error:
        raise ValueError(f"{source.name}: cannot be read: {_reason(error)}") from error
    if source.named and not documents:
        raise ValueError(f"{source.name}: the file has no documents; leave it out")


def _parse_line(name: str, line: bytes) -> bytes:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 at byte {error.start} of the line") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON ({error}); each line must be one object") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{name}: no string in field "text"; each line needs {{"text": "..."}}')
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f'{name}: field "text" holds a lone surrogate; repair the line') from error


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {_reason(error)}") from error


def _binary_offset(data: bytes) -> int | None:
    """Offset of the first byte that no text file has: a NUL, or what is not UTF-8."""
    nul = data.find(0)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start if nul < 0 else min(nul, error.start)
    return None if nul < 0 else nul


# Flat token files.


def _load_binary(
    spec: str, source: _Source, tokenizer: Tokenizer, cache_dir: str | os.PathLike | None
) -> Corpus:
    path = source.path
    dtype, eos_id = _read_sidecar(path, tokenizer)
    try:
        stat = path.stat()
        if stat.st_size == 0:
            raise ValueError(f"{path}: the file is empty; it should hold {dtype.name} token ids")
        if stat.st_size % dtype.itemsize:
            raise ValueError(
                f"{path}: {stat.st_size} bytes is no multiple of {dtype.itemsize} (dtype "
                f"{dtype.name}); the file is cut short, or {path.stem}.json should name its dtype"
            )
        # The plain array view spares the memory map's Python overhead on each indexing.
        tokens = np.asarray(np.memmap(path, dtype, mode="r"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {_reason(error)}") from error
    cache = None
    if cache_dir is not None:
        identity = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, dtype.name, eos_id]
        cache = _Cache(cache_dir, [tokenizer.fingerprint, identity])
    entry = cache.read() if cache else None
    if entry is None:
        entry = _index_binary(path, tokens, eos_id, tokenizer)
        if cache:
            cache.write(entry)
    return _corpus(spec, "bin", tokenizer, tokens, entry, is_cut=False)


def _read_sidecar(path: Path, tokenizer: Tokenizer) -> tuple[np.dtype, int]:
    """(dtype, eos id) of a .bin file, checked against the tokenizer."""
    dtypes = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return dtypes["uint16"], tokenizer.eos_id
    try:
        stated = json.loads(_read_file(sidecar))
    except ValueError as error:
        raise ValueError(f"{sidecar}: not JSON ({error}); it describes {path.name}") from error
    if not isinstance(stated, dict):
        raise ValueError(f'{sidecar}: not an object; it should be like {{"dtype": "uint16"}}')
    name = stated.get("dtype", "uint16")
    if name not in dtypes:
        raise ValueError(f"{sidecar}: dtype {name!r} is not one of {', '.join(dtypes)}")
    for field, own in (("eos_id", tokenizer.eos_id), ("vocab_size", tokenizer.vocab_size)):
        value = stated.get(field, own)
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{sidecar}: {field} {value!r} is not a natural number")
        if value > own or (field == "eos_id" and value != own):
            raise ValueError(
                f"{sidecar}: {field} {value}, but the tokenizer has {own}; give the tokenizer that "
                f"{path.name} was made with"
            )
    return dtypes[name], tokenizer.eos_id


def _index_binary(path: Path, tokens: np.ndarray, eos_id: int, tokenizer: Tokenizer) -> "_Entry":
    """One pass over a token file, a chunk at a time: checks ids, finds documents and digests."""
    lengths = tokenizer.token_lengths
    digest = hashlib.sha256()
    ends, bytes_before = [], []
    total_bytes = 0
    for first in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = tokens[first : first + _CHUNK_TOKENS]
        digest.update(chunk)
        outside = chunk >= tokenizer.vocab_size
        if outside.any():
            at = int(outside.argmax())
            raise ValueError(
                f"{path}: token id {chunk[at]} at position {first + at} is outside the vocabulary "
                f"of {tokenizer.vocab_size}; give the tokenizer and dtype the file was made with"
            )
        eos = np.flatnonzero(chunk == eos_id)
        sums = np.cumsum(lengths[chunk], dtype=np.int64)
        ends.append(first + eos + 1)
        bytes_before.append(total_bytes + sums[eos])
        total_bytes += int(sums[-1])
    if tokens[-1] != eos_id:
        ends.append(np.array([len(tokens)]))
        bytes_before.append(np.array([total_bytes]))
    starts = np.concatenate([[0], *ends]).astype(np.int64)
    digest.update(starts)
    bounds = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    hashes = [_hash_ids(tokens[begin:end]) for begin, end in bounds]
    return _Entry(
        starts=starts,
        document_bytes=np.diff(np.concatenate(bytes_before), prepend=0).astype(np.int64),
        document_hashes=np.array(hashes, np.uint64),
        sha256=digest.hexdigest(),
        names=None,
        tokens=None,
    )


# Digests and the cache.


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _hash_ids(ids: np.ndarray) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for first in range(0, len(ids), _CHUNK_TOKENS):  # A document may be larger than memory.
        digest.update(ids[first : first + _CHUNK_TOKENS].astype("<u4"))
    return int.from_bytes(digest.digest(), "little")


def _sha256(tokens: np.ndarray, starts: np.ndarray) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(tokens))
    digest.update(starts)
    return digest.hexdigest()


def _file_sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {_reason(error)}") from error


def _corpus(
    spec: str, kind: str, tokenizer: Tokenizer, tokens: np.ndarray, entry: "_Entry", is_cut: bool
) -> Corpus:
    manifest = {
        "spec": spec,
        "kind": kind,
        "documents": len(entry.document_bytes),
        "tokens": len(tokens),
        "bytes": int(entry.document_bytes.sum()),
        "sha256": entry.sha256,
        "tokenizer": tokenizer.fingerprint,
    }
    tokens.flags.writeable = False
    return Corpus(
        tokens=tokens,
        starts=entry.starts,
        names=entry.names,
        document_bytes=entry.document_bytes,
        document_hashes=entry.document_hashes,
        tokenizer=tokenizer,
        is_cut=is_cut,
        manifest=manifest,
    )


@dataclasses.dataclass(frozen=True)
class _Entry:
    """What is worth keeping of a corpus; `tokens` is None where the source itself is the array."""

    starts: np.ndarray
    document_bytes: np.ndarray
    document_hashes: np.ndarray
    sha256: str
    names: list[str] | None
    tokens: np.ndarray | None


class _Cache:
    """One corpus in a directory: KEY.npz for the index and, for text, KEY.npy for the tokens."""

    def __init__(self, cache_dir: str | os.PathLike, identity: list):
        self._folder = Path(cache_dir).expanduser()
        key = hashlib.sha256(json.dumps([_CACHE_FORMAT, *identity]).encode()).hexdigest()[:32]
        self._index, self._tokens = self._folder / f"{key}.npz", self._folder / f"{key}.npy"

    def read(self) -> _Entry | None:
        """The entry, or None if there is none or it is damaged."""
        if not self._index.is_file():
            return None
        try:
            with np.load(self._index, allow_pickle=False) as index:
                tokens = None
                if "names" in index:
                    tokens = np.asarray(np.load(self._tokens, mmap_mode="r", allow_pickle=False))
                    if _sha256(tokens, index["starts"]) != str(index["sha256"]):
                        raise ValueError("its checksum differs")
                return _Entry(
                    starts=index["starts"],
                    document_bytes=index["document_bytes"],
                    document_hashes=index["document_hashes"],
                    sha256=str(index["sha256"]),
                    names=json.loads(index["names"].tobytes()) if "names" in index else None,
                    tokens=tokens,
                )
        except Exception as error:  # Whatever a damaged file raises, the remedy is the same.
            _log.warning("%s: damaged (%s), made again", self._index, error)
            return None

    def write(self, entry: _Entry) -> None:
        arrays = {
            "starts": entry.starts,
            "document_bytes": entry.document_bytes,
            "document_hashes": entry.document_hashes,
            "sha256": np.array(entry.sha256),
        }
        if entry.names is not None:
            arrays["names"] = np.frombuffer(json.dumps(entry.names).encode(), np.uint8)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if entry.tokens is not None:
                self._write_file(self._tokens, lambda file: np.save(file, entry.tokens))
            self._write_file(self._index, lambda file: np.savez(file, **arrays))
        except OSError as error:
            raise ValueError(
                f"cache_dir {str(self._folder)!r}: cannot be written: {_reason(error)}; give a "
                "writable directory, or none"
            ) from error

    def _write_file(self, path: Path, save) -> None:
        """Writes beside `path` and renames: other processes see a whole file or none."""
        handle, temporary = tempfile.mkstemp(dir=self._folder, prefix=path.stem)
        try:
            with os.fdopen(handle, "wb") as file:
                save(file)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
