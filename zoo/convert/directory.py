"""Directories of models that appear whole or not at all, and know when they are damaged."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

MANIFEST = "manifest.json"
# What a model directory of Hugging Face carries beside its weights and config.json.
CARRIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json",
)
_MAX_CARRIED_BYTES = 1 << 30


@contextlib.contextmanager
def create(folder: str | os.PathLike) -> Iterator[Path]:
    """A new directory to write to, which gets its name `folder` when the block ends well.

    Until then it is `folder` + ".unfinished", which a kill may leave and the next call removes.

    Raises:
      ValueError: `folder` is there and not empty.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; give the name of a new directory")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(folder.name + ".unfinished")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir()
    try:
        yield part
        _sync(part)
        # Over an empty directory this is atomic, too.
        os.replace(part, folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value) -> None:
    """Writes JSON and waits until the disk has it."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict:
    """A JSON object. Raises ValueError for a missing file or one that holds anything else."""
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_CARRIED_BYTES)
        value = json.loads(text.decode("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}; give the directory of a model"
                         ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}; fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; fetch it again")
    return value


def carry(source: Path, target: Path) -> list[str]:
    """Copies the files of a tokenizer and of generation's settings, those there are."""
    found = []
    for name in CARRIED:
        file = source / name
        if file.is_file() and not (target / name).exists():
            if file.stat().st_size > _MAX_CARRIED_BYTES:
                raise ValueError(f"{file} has {file.stat().st_size:,} bytes, too many for what "
                                 "its name says; remove it")
            shutil.copyfile(file, target / name)
            found.append(name)
    return found


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def checksums(files: Iterable[Path]) -> dict[str, str]:
    """BLAKE2b of each file by name, several at a time."""
    files = list(files)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip([f.name for f in files], pool.map(_checksum, files), strict=True))


def write_manifest(folder: Path) -> None:
    """Lists the directory's files with their sizes and checksums, for `verify`."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.name != MANIFEST)
    sums = checksums(files)
    write_json(folder / MANIFEST, {
        "files": {f.name: {"bytes": f.stat().st_size, "blake2b": sums[f.name]} for f in files}})


def verify(folder: Path) -> None:
    """Raises ValueError, naming the file, if the directory is not what its manifest lists."""
    listed = read_json(folder / MANIFEST).get("files")
    if not isinstance(listed, dict) or not all(
            isinstance(entry, dict) and entry.keys() >= {"bytes", "blake2b"}
            and Path(name).name == name for name, entry in listed.items()):
        raise ValueError(f"{folder / MANIFEST} does not list files; convert the model again")
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; copy the whole directory again")
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes, not {entry['bytes']}, as "
                             "its manifest says; copy the whole directory again")
    for name, found in checksums(folder / name for name in listed).items():
        if found != listed[name]["blake2b"]:
            raise ValueError(f"{folder / name} is damaged: its checksum is not that of the "
                             "manifest; copy the whole directory again")
