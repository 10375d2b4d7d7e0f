"""Directories of models that appear whole or not at all, and know when they are damaged."""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from zoo.convert.safetensors import locate, sync

MANIFEST = "manifest.json"
# What a model directory of Hugging Face carries beside its weights and config.json.
CARRIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json", "segment.json",
)
_MAX_CARRIED_BYTES = 1 << 30


@contextlib.contextmanager
def create(folder: str | os.PathLike) -> Iterator[Path]:
    """A new directory to write to, which gets its name `folder` when the block ends well.

    Until then it is `folder` + ".unfinished", which a kill may leave and the next call empties.

    Raises:
      ValueError: `folder` is there and not empty, or another process is writing it.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; give the name of a new directory")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(folder.name + ".unfinished")
    part.mkdir(exist_ok=True)
    handle = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{part} is being written by another process; wait for it, or give "
                             "another name") from None
        try:
            for old in part.iterdir():
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            yield part
            os.fsync(handle)
            # Over an empty directory this is atomic, too.
            os.replace(part, folder)
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
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
    if not path.is_file():  # Of which a pipe would be waited for.
        raise ValueError(f"{path.parent} has no {path.name}; give the directory of a model")
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_CARRIED_BYTES)
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}; fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; fetch it again")
    return value


def carry(source: Path, target: Path) -> list[str]:
    """Copies the files of a tokenizer, of generation's settings and of the preparation of images,
    those there are.

    Raises ValueError for one that is a link out of the directory, whose end nobody asked for.
    """
    found = []
    for name in CARRIED:
        file = source / name
        if file.is_file() and not (target / name).exists():
            locate(source, name)
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
    needed = {"config.json", *(f.name for f in folder.glob("*.safetensors"))}
    if unlisted := sorted(needed - listed.keys()):
        raise ValueError(f"{folder / unlisted[0]} is not in the directory's manifest; remove it, "
                         "or convert the model again")
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
