"""Tokenizers of the text recipes: plain bytes, or a Hugging Face `tokenizer.json`."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from zoo.convert.directory import CARRIED

# Files beside a tokenizer.json that name its special tokens; the later one wins.
_NAMING = ("special_tokens_map.json", "tokenizer_config.json")


def load(name_or_path: str = "bytes") -> "Tokenizer":
    """Returns the tokenizer of a name or path.

    Args:
      name_or_path: "bytes", a `tokenizer.json`, or a directory that holds one.

    Raises:
      ValueError: unknown name, missing or unreadable file, or the library `tokenizers` is missing.
    """
    if name_or_path == "bytes":
        return Bytes()
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"tokenizer {name_or_path!r}: no such file {str(path)!r}; give 'bytes', a "
            "tokenizer.json, or a directory that holds one"
        )
    return HuggingFace(path)


class Tokenizer:
    """What both kinds of tokenizer offer.

    Attributes:
      vocab_size: ids are in 0..vocab_size-1; some may be unused.
      bos_id, eos_id, pad_id: ids of the special tokens, None where the tokenizer has none.
      fingerprint: sha256 (hex) of what defines the tokenizer.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    fingerprint: str
    special_tokens: Mapping[str, str] = MappingProxyType({})

    def save(self, folder: Path) -> None:
        """Writes the files from which `load` makes the tokenizer again, if it takes any."""

    def encode(self, text: str | bytes, special: bool = False) -> list[int]:
        """Token ids of a text, with no bos or eos added.

        `special=True` turns the spelling of a special token (as in a chat template) into its id;
        otherwise it is text like any other, so that data cannot forge a document's end.

        Raises:
          ValueError: the text is not valid UTF-8 (`bytes` takes any byte string).
        """
        raise NotImplementedError

    def encode_prompt(self, text: str | bytes) -> list[int]:
        """`encode` with the special tokens that the tokenizer itself puts around a text, as bos."""
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """`encode` of each text, as unsigned integer arrays [T]; much faster for many texts."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids; special and unknown ids are skipped, bad UTF-8 becomes U+FFFD."""
        raise NotImplementedError

    def token_bytes(self) -> list[bytes]:
        """The bytes each token id adds to the text, [vocab_size]; b"" for special and unused ids.

        Joined, they are the decoded text, except that tokenizers which mark the start of a word
        (metaspace, WordPiece) drop one blank at the very start of a text when they decode.

        Raises:
          ValueError: the tokenizer's decoder is of a kind that is not per token.
        """
        raise NotImplementedError

    @functools.cached_property
    def token_lengths(self) -> np.ndarray:
        """Bytes of text each token id stands for, int32 [vocab_size]."""
        return np.array([len(piece) for piece in self.token_bytes()], np.int32)


class Bytes(Tokenizer):
    """UTF-8 bytes as ids 0..255, then <|bos|>, <|eos|>, <|pad|>; ids 259..263 are reserved."""

    vocab_size = 264
    bos_id, eos_id, pad_id = 256, 257, 258
    fingerprint = hashlib.sha256(b"bytes bos=256 eos=257 pad=258 vocab_size=264").hexdigest()
    _specials = {b"<|bos|>": bos_id, b"<|eos|>": eos_id, b"<|pad|>": pad_id}

    def encode(self, text: str | bytes, special: bool = False) -> list[int]:
        data = _as_bytes(text)
        if not special:
            return list(data)
        ids = []
        for part in re.split(rb"(<\|(?:bos|eos|pad)\|>)", data):
            ids.extend([self._specials[part]] if part in self._specials else part)
        return ids

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        return [np.frombuffer(_as_bytes(text), np.uint8) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def token_bytes(self) -> list[bytes]:
        return [bytes([i]) if i < 256 else b"" for i in range(self.vocab_size)]


class HuggingFace(Tokenizer):
    """A `tokenizer.json`, read by the library `tokenizers`.

    bos, eos and pad are those of `tokenizer_config.json` or `special_tokens_map.json` beside it,
    else the special token with a customary spelling, else None. The file's own truncation
    and padding are not applied, its template by `encode_prompt` alone.
    """

    _customary = {
        "bos": ("<s>", "<bos>", "<|bos|>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"),
        "eos": ("</s>", "<eos>", "<|eos|>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
        "pad": ("<pad>", "<|pad|>", "[PAD]"),
    }

    def __init__(self, path: Path):
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(
                f"tokenizer {str(path)!r} needs the library `tokenizers`: "
                "pip install 'parazoo[hf]', or take --tokenizer=bytes"
            ) from error
        try:
            contents = path.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_str(contents.decode("utf-8"))
        except Exception as error:  # The library raises plain Exception for a bad file.
            raise ValueError(f"tokenizer {str(path)!r} cannot be read: {_line(error)}") from error
        self._files = {"tokenizer.json": contents, **_files_beside(path.parent)}
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.fingerprint = hashlib.sha256(contents).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._special_ids = {
            i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        }
        named = _named_special_tokens(path.parent, self._files)
        self.bos_id, self.eos_id, self.pad_id = (
            self._find_special(kind, named.get(kind)) for kind in ("bos", "eos", "pad")
        )

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, contents in self._files.items():
            part = folder / f"{name}.part"
            part.write_bytes(contents)
            os.replace(part, folder / name)

    def _find_special(self, kind: str, name: str | None) -> int | None:
        if name is not None:
            return self._tokenizer.token_to_id(name)
        ids = map(self._tokenizer.token_to_id, self._customary[kind])
        return next((i for i in ids if i in self._special_ids), None)

    def encode(self, text: str | bytes, special: bool = False) -> list[int]:
        self._tokenizer.encode_special_tokens = not special
        return self._tokenizer.encode(_as_text(text), add_special_tokens=False).ids

    def encode_prompt(self, text: str | bytes) -> list[int]:
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.encode(_as_text(text), add_special_tokens=True).ids
        # What ends a text would end the answer before it begins.
        while ids and ids[-1] == self.eos_id:
            ids.pop()
        return ids

    @property
    def special_tokens(self) -> dict[str, str]:
        """Spellings by name, as {"bos_token": "<s>"}, for a chat template."""
        known = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        return {name: self._tokenizer.id_to_token(i) for name, i in known.items() if i is not None}

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        self._tokenizer.encode_special_tokens = True
        encodings = self._tokenizer.encode_batch_fast(
            [_as_text(text) for text in texts], add_special_tokens=False
        )
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def token_bytes(self) -> list[bytes]:
        to_bytes = _token_decoder(json.loads(self._tokenizer.to_str())["decoder"])
        pieces = [b""] * self.vocab_size
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i not in self._special_ids:
                pieces[i] = to_bytes(token)
        return pieces


def _as_bytes(text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    try:  # A command line holds bytes that are not UTF-8 as surrogate escapes.
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds a lone surrogate {text[error.start]!r} at character {error.start}; "
            "give valid Unicode"
        ) from error


def _as_text(text: str | bytes) -> str:
    try:
        return _as_bytes(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}; "
            "convert it, or take --tokenizer=bytes"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _files_beside(folder: Path) -> dict[str, bytes]:
    """What a tokenizer.json comes with, those files that there are."""
    files = [folder / name for name in CARRIED if name != "tokenizer.json"]
    try:
        return {file.name: file.read_bytes() for file in files if file.is_file()}
    except OSError as error:
        raise ValueError(f"{str(error.filename)!r} cannot be read: {error.strerror}") from error


def _named_special_tokens(folder: Path, files: Mapping[str, bytes]) -> dict[str, str]:
    """{"bos": "<s>", ...}: what the configuration files beside a tokenizer.json name."""
    named = {}
    for name in _NAMING:
        try:
            config = json.loads(files.get(name, b"{}").decode("utf-8"))
            for kind in ("bos", "eos", "pad"):
                token = config.get(f"{kind}_token")
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str):
                    named[kind] = token
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{str(folder / name)!r} cannot be read: {_line(error)}") from error
    return named


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable character of each byte, inverted (Radford et al., 2019, encoder.py).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for 256, 257, ...
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _token_decoder(decoder: dict | None) -> Callable[[str], bytes]:
    """The function token -> bytes that a tokenizer.json's "decoder" amounts to, per token."""
    if decoder is None:  # The library then joins the tokens with blanks.
        return lambda token: b" " + token.encode("utf-8")
    stages: list[Callable[[str], str | bytes]] = []
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    fused = False  # From Fuse on, a stage sees the whole text: Strip then acts on its ends alone.
    for part in parts:
        match part:
            case {"type": "ByteLevel"}:
                stages.append(functools.partial(_from_byte_level, _byte_level_alphabet()))
            case {"type": "ByteFallback"}:
                stages.append(_from_byte_fallback)
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Metaspace", "replacement": mark}:
                stages.append(functools.partial(_replace, mark, " "))
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                stages.append(functools.partial(_replace, old, new))
            case {"type": "Strip", "content": mark, "start": start, "stop": stop}:
                if not fused:
                    stages.append(functools.partial(_strip, mark, start, stop))
            case {"type": "WordPiece", "prefix": prefix}:
                stages.append(functools.partial(_from_word_piece, prefix))
            case {"type": "BPEDecoder", "suffix": suffix}:
                stages.append(functools.partial(_replace, suffix, " "))
            case _:
                raise ValueError(
                    f"tokenizer: a decoder of type {part['type']!r} has no bytes per token; "
                    "take a byte-level, metaspace, byte-fallback, WordPiece or BPE tokenizer"
                )

    def to_bytes(token: str) -> bytes:
        piece: str | bytes = token
        for stage in stages:
            if isinstance(piece, str):
                piece = stage(piece)
        return piece.encode("utf-8") if isinstance(piece, str) else piece

    return to_bytes


def _from_byte_level(alphabet: dict[str, int], token: str) -> str | bytes:
    if all(char in alphabet for char in token):
        return bytes(alphabet[char] for char in token)
    return token  # An added token, stored as it reads.


def _from_byte_fallback(token: str) -> str | bytes:
    return bytes.fromhex(token[3:5]) if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token) else token


def _replace(old: str, new: str, token: str) -> str:
    return token.replace(old, new)


def _strip(mark: str, start: int, stop: int, token: str) -> str:
    for _ in range(start):
        token = token.removeprefix(mark)
    for _ in range(stop):
        token = token.removesuffix(mark)
    return token


def _from_word_piece(prefix: str, token: str) -> str:
    return token.removeprefix(prefix) if token.startswith(prefix) else " " + token
