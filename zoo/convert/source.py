"""A directory with a model's config and weights, ours or Hugging Face's, opened and checked."""

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from zoo import protocol, registry
from zoo.convert import directory
from zoo.convert.family import Family
from zoo.convert.safetensors import Tensor, Weights
from zoo.convert.table import DTYPES, ConversionError, Piece, Table

FORMAT, FORMAT_VERSION = "parazoo", 1
# Modules with FAMILIES, the tables of each of our model families; none where no one else publishes
# weights of it.
TABLES: Mapping[str, tuple[str, ...]] = {
    "transformer": ("zoo.convert.transformer",),
    "xlstm": ("zoo.convert.xlstm", "zoo.convert.xlstm_lm"),
    "rnn": (),
    "paratranscnn": ("zoo.convert.paratranscnn",),
}
# Beside our own config.json: the one that the weights came with, for the way back.
THEIRS = "huggingface_config.json"


def families(name: str | None = None) -> list[Family]:
    """All kinds of checkpoints that there are tables for, or those of one of our model families, in
    the order an export tries them."""
    modules = [m for ours, found in TABLES.items() if name in (None, ours) for m in found]
    return [family for module in modules for family in importlib.import_module(module).FAMILIES]


def parameter_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Of a config's parameters by path, in the stacked layout."""
    try:
        model = jax.eval_shape(
            lambda: protocol.split(config.build(key=jax.random.key(0), stacked=True))[1])
    except (OverflowError, TypeError) as error:
        raise ConversionError(f"the config has sizes that no array can have: {error}") from None
    return {path: x.shape for path, x in protocol.flat(model).items()}


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened directory.

    Attributes:
      folder: its path.
      config: of our model.
      weights: its tensors.
      table: what they hold.
      family: of Hugging Face's; None: the directory is ours.
    """

    folder: Path
    config: Any
    weights: Weights
    table: Table
    family: Family | None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.weights.close()

    @property
    def dtype(self) -> np.dtype:
        """That of all weights: bfloat16, float16, or float32, also where they differ."""
        kinds = {self.weights[key].dtype for key, (_, pieces) in self.table.tensors.items()
                 if not is_statistic(pieces)} - {DTYPES[0]}
        return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)


def is_native(folder: Path) -> bool:
    """Whether a directory was written by `zoo.save`, going by its config.json."""
    return read_values(folder).get("format") == FORMAT


def read_values(folder: Path) -> dict[str, Any]:
    """A directory's config.json; where there is none, what its tensors tell of it."""
    path = folder / "config.json"
    values = directory.read_json(path) if os.path.lexists(path) else None
    if values is not None and ("format" in values or values.get("model_type") is not None):
        return values
    with _weights(folder, needed=values is None and folder.is_dir()) as weights:
        for family in families():
            if values is None:
                if family.infer is not None and family.probe in weights:
                    return {"model_type": family.model_type, **family.infer(weights)}
            elif family.known_by is not None and family.known_by(values, weights):
                return {**values, "model_type": family.model_type}
    return directory.read_json(path) if values is None else values


@contextlib.contextmanager
def _weights(folder: Path, needed: bool) -> Iterator[Mapping[str, Tensor]]:
    """The tensors of a directory; where it has no file of them none, or if needed `Damaged`."""
    if not needed and not any(folder.glob("*.safetensors")):
        yield {}
        return
    weights = Weights(folder)
    try:
        yield weights
    finally:
        weights.close()


def is_statistic(pieces: Sequence[Piece]) -> bool:
    """Whether a tensor holds running statistics, which stay float32."""
    return pieces[0].path.startswith(f"{protocol.STATISTICS}/")


def period(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Of the stack's pattern, by the paths of the parameters; 0 without one."""
    return len({path.split("/")[2] for path in shapes if path.startswith("stack/blocks/")})


def load_config(folder: str | os.PathLike) -> Any:
    """The config of the model in a directory, ours or Hugging Face's; see `open_source`."""
    folder = Path(folder).expanduser()
    return _config(folder, read_values(folder))[0]


def _config(folder: Path, values: Mapping[str, Any]) -> tuple[Any, Family | None]:
    where = folder / "config.json"
    if values.get("format") == FORMAT:
        _check_version(where, values)
        try:
            return registry.from_dict(values["model"]), None
        except (KeyError, TypeError, ValueError) as error:
            raise ConversionError(f"{where}: {error}") from None
    kind = values.get("model_type")
    known = {name: family for family in families()
             for name in (family.model_type, family.nested_type) if name is not None}
    if kind is None and "training" in values:
        raise ConversionError(f"{where} is of a training run; make a model's directory of it with "
                              "recipes.convert --source")
    if not isinstance(kind, str) or kind not in known:
        raise ConversionError(f"{where} has model_type {kind!r}; what can be converted is "
                              + ", ".join(known))
    return known[kind].config(values, str(where)), known[kind]


def _check_version(where: Path, values: Mapping[str, Any]) -> None:
    if values.get("format_version") != FORMAT_VERSION:
        raise ConversionError(
            f"{where} has format_version {values.get('format_version')!r}; this version of "
            f"parazoo reads {FORMAT_VERSION}: install the one that wrote it")


def open_source(folder: str | os.PathLike, verify: bool = True,
                vocab_multiple: int | None = None) -> Source:
    """Opens a directory of ours or of Hugging Face's and checks it, before a weight is read.

    Args:
      folder: holds config.json and *.safetensors.
      verify: compares our own files with the checksums that were written beside them.
      vocab_multiple: the config's, of a model of Hugging Face's; None: 1. Ours have their own.

    Raises:
      ValueError: whatever is wrong with it; with its tensors, all problems at once.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder} is no directory; give one with config.json and *.safetensors")
    values = read_values(folder)
    if verify and values.get("format") == FORMAT:
        _check_version(folder / "config.json", values)
        directory.verify(folder)
    config, family = _config(folder, values)
    if vocab_multiple is not None:
        config = _filled_up(folder, config, family, vocab_multiple)
    weights = Weights(folder)
    try:
        _check_counts(folder / "config.json", config, weights, stacked=family is None)
        shapes = parameter_shapes(config)
        if family is None:
            table, ignored = Table.identity(shapes), ()
        else:
            table = Table(family.rules_for(weights), shapes, period(shapes), weights,
                          unpadded(config))
            ignored = (*family.ignored, *_tied(family, config, weights, folder))
        table.check(weights, folder, ignored)
    except BaseException:
        weights.close()
        raise
    return Source(folder, config, weights, table, family)


def unpadded(config: Any) -> dict[str, int]:
    """What `Table` wants to know: a checkpoint's tensors have the vocabulary's tokens alone."""
    return {"v": config.vocab_size} if config.kind == "language" else {}


def _filled_up(folder: Path, config: Any, family: Family | None, vocab_multiple: int) -> Any:
    """The config with a `vocab_multiple`."""
    found = registry.override(config, {"vocab_multiple": vocab_multiple})
    if family is None and found != config:
        raise ValueError(f"{folder} was saved with vocab_multiple={config.vocab_multiple}, not "
                         f"{vocab_multiple}; give its own, or convert it to Hugging Face's form "
                         "first")
    return found


def _check_counts(where: Path, config: Any, weights: Weights, stacked: bool) -> None:
    """Raises ConversionError for more layers or experts than can be there.

    A table has entries for each, before anything is compared. Where they are not `stacked`, each is
    a tensor or several.
    """
    layers = getattr(config, "num_layers", 0)
    experts = getattr(getattr(config, "mlp", None), "num_experts", 1)
    most = weights.total_bytes if stacked else len(weights)
    if layers * experts > most:
        raise ConversionError(
            f"{where} says {layers} layers{f' of {experts} experts' if experts > 1 else ''}, and "
            f"there are {most} {'bytes' if stacked else 'tensors'}; this is the config of another "
            "model")


def _tied(family: Family, config: Any, weights: Weights, folder: Path) -> tuple[str, ...]:
    """The pattern of a head that is stored though it is the token table."""
    rules = family.rules_for(weights)
    head = next((rule.theirs for rule in rules if rule.ours == "head"), None)
    if not getattr(config, "tie_embeddings", False) or head not in weights:
        return ()
    table = rules[0].theirs
    if table in weights and weights.checksum(head) != weights.checksum(table):
        raise ConversionError(f"{folder}: config.json ties the head to {table!r}, and {head!r} "
                              "holds other numbers; set tie_word_embeddings to false there")
    return (head.replace(".", r"\."),)


def choose_family(config: Any, model_type: str | None = None, kind: str | None = None) -> Family:
    """The kind of checkpoint that a config can be written as.

    `model_type` is tried first; with a `kind` it alone is. Raises ConversionError with what keeps
    each one from it.
    """
    name = next((name for name, (_, cls) in registry.FAMILIES.items()
                 if cls == type(config).__name__), None)
    known = families(name)
    if not known:
        raise ConversionError(f"no one else has a format for a {type(config).__name__}; write it "
                              "in our own, with zoo.save or --to=native")
    if kind is not None:
        known = [family for family in known if family.model_type == kind]
        if not known:
            raise ConversionError(f"kind is {kind!r}; a {type(config).__name__}'s is one of "
                                  + ", ".join(family.model_type for family in families(name)))
    reasons = []
    for family in sorted(known, key=lambda family: family.model_type != model_type):
        try:
            family.settings(config)
            return family
        except ConversionError as error:
            reasons.append(f"{family.model_type}: {error}")
    raise ConversionError("no model of others has this config, so it cannot be written as theirs "
                          "(zoo.save writes any):\n  " + "\n  ".join(reasons))
