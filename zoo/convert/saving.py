"""Models into directories: our own, and those that Hugging Face's libraries load as they are."""

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo import protocol, registry
from zoo.convert import directory, safetensors
from zoo.convert.source import (
    FORMAT,
    FORMAT_VERSION,
    THEIRS,
    Source,
    choose_family,
    is_native,
    is_statistic,
    parameter_shapes,
    period,
    read_values,
    unpadded,
)
from zoo.convert.table import Piece, Table, all_finite, cast, tensor_blocks

_LOG = logging.getLogger(__name__)
DTYPES: Mapping[str, np.dtype] = {
    name: jnp.dtype(name) for name in ("float32", "bfloat16", "float16")}
# A config.json of Hugging Face's says these of a model, and our configs do not.
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache")
_NAMED = 5  # tensors in a warning


def save(model, folder: str | os.PathLike, dtype=None, like: str | os.PathLike | None = None
         ) -> None:
    """Writes a model to a new directory, for `zoo.load`.

    Args:
      model: of `zoo.build` or `zoo.load`.
      folder: a name that is not taken. It appears when all is written; numbers in it that are not
        finite are warned of.
      dtype: of the numbers there, as "bfloat16"; None: the model's.
      like: a model's directory whose tokenizer and settings of generation come along.

    Raises:
      ValueError: the name is taken, or arrays are spread over several processes.
      OSError: such as a full disk; nothing is left behind.
    """
    write_native(folder, model.config, _from_model(model), _dtype(model, dtype), like)


def to_hf(model, folder: str | os.PathLike, dtype=None, like: str | os.PathLike | None = None,
          kind: str | None = None) -> None:
    """Writes a model to a new directory that transformers' ``from_pretrained`` loads, or the code
    of its authors where transformers has none.

    Args and errors are those of `save`, and:
      kind: of which model_type, where several can hold the model, such as "xlstm_lm_cuda"; None:
        that of `like`, or the first that can.

    Also ValueError for a config that no one else's model can have, with the reason of each.
    """
    write_hf(folder, model.config, _from_model(model), _dtype(model, dtype), like, kind=kind)


# A part of a parameter, perhaps in parts along its first axis.
Get = Callable[[Piece], Iterable[np.ndarray]]


def write_native(folder, config: Any, get: Get, dtype: np.dtype, like=None,
                 progress: Callable[[int], None] | None = None) -> None:
    """See `save`; ``get(piece)`` gives a part of a parameter."""
    table = Table.identity(parameter_shapes(config))
    like = None if like is None else Path(like).expanduser()
    with directory.create(folder) as part:
        directory.write_json(part / "config.json", {
            "format": FORMAT, "format_version": FORMAT_VERSION,
            "model": registry.to_dict(config)})
        if theirs := _theirs(like):
            directory.write_json(part / THEIRS, theirs)
        if like is not None:
            directory.carry(like, part)
        _write(part, table, get, dtype, progress, {"format": FORMAT}, folder)
        directory.write_manifest(part)


def write_hf(folder, config: Any, get: Get, dtype: np.dtype, like=None,
             progress: Callable[[int], None] | None = None, kind: str | None = None) -> None:
    """See `to_hf`; ``get(piece)`` gives a part of a parameter."""
    like = None if like is None else Path(like).expanduser()
    theirs = _theirs(like)
    family = choose_family(config, theirs.get("model_type"), kind)
    shapes = parameter_shapes(config)
    table = Table(family.rules, shapes, period(shapes), unpadded=unpadded(config))
    table.check_complete()
    settings = family.settings(config)
    for key in family.kept:
        _bring_along(settings, theirs, key.split("."))
    if family.known_by is None:
        # Without null, transformers takes its classes' defaults for ids that nobody knows.
        kept = {key: theirs[key] for key in _KEPT if key in theirs} if theirs else (
            dict.fromkeys(key for key in _KEPT if key.endswith("_id")))
        settings = {**kept, **settings, "torch_dtype": np.dtype(dtype).name}
    with directory.create(folder) as part:
        directory.write_json(part / "config.json", settings)
        if like is not None:
            directory.carry(like, part)
        _write(part, table, get, dtype, progress, {"format": "pt"}, folder)


def _bring_along(settings: dict[str, Any], theirs: Mapping[str, Any], path: list[str]) -> None:
    """Takes what stands under a path in their settings into the new ones, where they have the
    objects around it and nothing there."""
    name, *rest = path
    if rest and isinstance(settings.get(name), dict) and isinstance(theirs.get(name), dict):
        _bring_along(settings[name], theirs[name], rest)
    elif not rest and name in theirs:
        settings.setdefault(name, theirs[name])


def write_tensors(model, folder: str | os.PathLike, table: Table, dtype=None) -> None:
    """Writes the part of a model that a table has to a new directory, without a config.json."""
    table.check_complete()
    with directory.create(folder) as part:
        _write(part, table, _from_model(model), _dtype(model, dtype), None, {"format": "pt"},
               folder)


def _theirs(like: Path | None) -> dict[str, Any]:
    """The config.json of Hugging Face's that a directory has or came with, with a model_type."""
    if like is None or not (like / "config.json").is_file():
        return {}
    if not is_native(like):
        return read_values(like)
    return directory.read_json(like / THEIRS) if (like / THEIRS).is_file() else {}


def _write(part: Path, table: Table, get: Get, dtype, progress, metadata, folder) -> None:
    bad: dict[str, None] = {}

    def stored(key: str) -> np.dtype:
        return np.dtype(np.float32) if is_statistic(table.tensors[key][1]) else dtype

    def produce(key: str) -> Iterator[np.ndarray]:
        for block in tensor_blocks(table.tensors[key][1], get, stored(key)):
            if not all_finite(block):
                bad[key] = None
            yield block

    tensors = {key: (stored(key), shape) for key, (shape, _) in table.tensors.items()}
    safetensors.write(part, tensors, produce, metadata=metadata, progress=progress)
    if bad:
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        _LOG.warning("%s: numbers that are not finite in %s%s", folder,
                     ", ".join([*bad][:_NAMED]), more)


def _dtype(model, dtype) -> np.dtype:
    if dtype is None:
        return jax.tree.leaves(protocol.split(model)[1])[0].dtype
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in DTYPES.values():
        raise ValueError(f"dtype is {dtype}; it must be one of {', '.join(DTYPES)}")
    return found


def _from_model(model) -> Get:
    _, params = protocol.split(model)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
        raise ValueError("the model is abstract and holds no numbers; build it with abstract=False")
    if not all(x.is_fully_addressable for x in jax.tree.leaves(params)):
        raise ValueError("the parameters are spread over several processes; load the checkpoint "
                         "in one process to write it")
    leaves = protocol.flat(params)

    def get(piece: Piece) -> list[np.ndarray]:
        path, at = piece.path, piece.at
        if path not in leaves:  # the list form
            path = path.replace("stack/blocks/", f"stack/layers/{at[0]}/", 1)
            at = at[1:]
        return [np.asarray(leaves[path][at] if at else leaves[path])]

    return get


def from_source(source: Source) -> Get:
    """Parts of parameters from an opened directory."""
    def get(piece: Piece) -> Iterator[np.ndarray]:
        return source.table.read(source.weights, piece.path, piece.at)

    return get


def compare(one: Source, other: Source, dtype: np.dtype,
            progress: Callable[[int], None] | None = None) -> Iterator[tuple[str, str]]:
    """(path, what is wrong) of every part of a parameter that two directories hold differently.

    `dtype`: to which the numbers were cast on the way.
    """
    finer = max((one, other), key=lambda source: len(source.table.tensors))
    return _compare(finer, *(_relocated(from_source(source), source.config, finer.config)
                             for source in (one, other)), dtype, progress)


def compare_with_model(model, target: Source, dtype: np.dtype | None) -> Iterator[tuple[str, str]]:
    """The same of a model and a directory that it was written to."""
    return _compare(target, _relocated(_from_model(model), model.config, target.config),
                    from_source(target), _dtype(model, dtype), None)


def _relocated(get: Get, config: Any, asked: Any) -> Get:
    """`get` of a model of `config` for pieces of `asked`, the same one with its layers in groups of
    another length."""
    if config == asked or config.kind != "language":
        return get
    (period, groups), (theirs, their_groups) = (
        (len(c.mixers()), c.num_layers // len(c.mixers())) for c in (config, asked))

    def relocated(piece: Piece) -> Iterable[np.ndarray]:
        found = re.fullmatch(r"stack/(blocks|tail)/(\d+)/(.*)", piece.path)
        if found is None:
            return get(piece)
        group, at = their_groups, piece.at
        if found[1] == "blocks":
            group, *at = at
        group, index = divmod(group * theirs + int(found[2]), period)
        kind, lead = ("blocks", (group,)) if group < groups else ("tail", ())
        return get(dataclasses.replace(
            piece, path=f"stack/{kind}/{index}/{found[3]}", at=(*lead, *at)))

    return relocated


def _compare(finer, one: Get, other: Get, dtype, progress) -> Iterator[tuple[str, str]]:
    for path, pieces in finer.table.parameters.items():
        for piece in pieces:
            for a, b in zip(one(piece), other(piece), strict=True):
                if not np.array_equal(*(_bits(cast(x, dtype)) for x in (a, b))):
                    yield path, f"{list(piece.at)} differs" if piece.at else "differs"
                if progress is not None:
                    progress(a.nbytes)


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.itemsize}")
