"""What a family of checkpoints is to the converter: its config.json and its tensors, both ways."""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from zoo.convert.safetensors import Tensor
from zoo.convert.table import ConversionError, Rule

_LOG = logging.getLogger(__name__)
_MISSING = object()
_LARGEST = 1 << 32
# What a config.json says that no model depends on, or the tokenizer's side of it.
_HARMLESS = {
    "_name_or_path", "architectures", "auto_map", "bad_words_ids", "bos_token_id",
    "cache_implementation", "chunk_size_feed_forward", "dtype", "eos_token_id",
    "gradient_checkpointing", "hidden_act",
    "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "model_type",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "pretraining_tp", "problem_type", "return_dict", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params",
    "tie_word_embeddings", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
    "reorder_and_upcast_attn", "n_ctx", "max_window_layers", "intermediate_size", "sliding_window",
    "sliding_window_pattern", "_sliding_window_pattern", "unsloth_fixed", "unsloth_version",
}  # fmt: skip


class Unsupported(ConversionError):
    """A setting that the other side cannot express."""

    def __init__(self, key: str, value: Any, needed: str):
        super().__init__(f"{key} is {value!r}; what can be converted is {needed}")


class Settings:
    """A config.json, read key by key: every value is checked, and what nobody asked for is known.

    A key that is absent has its default; without one it is an error. So does one that is null,
    but where `null` says otherwise.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values, self._where = values, where
        self._asked: set[str] = set()
        self.notes: list[str] = []

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def fill(self, **defaults: Any) -> None:
        """Values of keys that are absent."""
        self._values = {**defaults, **self._values}

    def flatten(self, *keys: str) -> None:
        """What these objects hold gets keys with dots, too, as ``rope.theta``; names that begin
        with _, which a dataclass computes, are left out."""
        left = [(key, self._values[key]) for key in keys]
        for key, value in left:
            if isinstance(value, dict):
                left.extend((f"{key}.{name}", child) for name, child in value.items()
                            if not name.startswith("_"))
        self._values = {**self._values, **dict(left)}

    def note(self, text: str) -> None:
        """Something that the user should know."""
        self.notes.append(text)

    def unknown(self) -> list[str]:
        """Keys that no one asked for."""
        return sorted(key for key, value in self._values.items()
                      if key not in self._asked and key not in _HARMLESS and value is not None)

    def _get(self, key: str, default: Any, kinds: tuple[type, ...], needed: str,
             null: Any = _MISSING) -> Any:
        self._asked.add(key)
        value = self._values.get(key)
        if value is None:
            if key in self._values and null is not _MISSING:
                return null
            if default is _MISSING:
                raise ConversionError(f"{self._where} lacks {key!r}; it must be {needed}")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConversionError(f"{self._where} has {key} = {_short(value)}; it must be {needed}")
        return value

    def whole(self, key: str, default: Any = _MISSING, least: int = 1, null: Any = _MISSING
              ) -> int:
        """An integer of at least `least`."""
        value = self._get(key, default, (int,), f"an integer from {least}", null)
        if value is not None and not least <= value <= _LARGEST:
            raise ConversionError(f"{self._where} has {key} = {_short(value)}; it must be an "
                                  f"integer from {least} to {_LARGEST}")
        return value

    def number(self, key: str, default: Any = _MISSING, null: Any = _MISSING) -> float:
        """A finite number."""
        value = self._get(key, default, (int, float), "a finite number", null)
        try:
            if value is not None and not math.isfinite(value):
                raise OverflowError
        except OverflowError:
            raise ConversionError(f"{self._where} has {key} = {_short(value)}; it must be a "
                                  "finite number") from None
        return value

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        """true or false."""
        return self._get(key, default, (bool,), "true or false")

    def text(self, key: str, default: Any = _MISSING) -> str:
        """A string."""
        return self._get(key, default, (str,), "a string")

    def texts(self, key: str) -> list | None:
        """A list, or None."""
        return self._get(key, None, (list,), "a list")

    def wholes(self, key: str, count: int) -> list[int]:
        """Integers from 0 to below `count`: of a list, or all for "all", or none."""
        needed = f"a list of integers from 0 to {count - 1}, or 'all'"
        found = self._get(key, [], (list, str), needed)
        if found == "all":
            return list(range(count))
        if isinstance(found, str) or not all(type(i) is int and 0 <= i < count for i in found):
            raise ConversionError(f"{self._where} has {key} = {_short(found)}; it must be {needed}")
        return found

    def mapping(self, key: str, default: Any = None, null: Any = None
                ) -> Mapping[str, Any] | None:
        """An object, or None."""
        return self._get(key, default, (dict,), "an object", null)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
      model_type: in its config.json; `architecture` is the name of its class there.
      read: its config.json as our config. Raises ConversionError.
      write: our config as keys of a config.json. Raises Unsupported.
      rules: the table of its tensors.
      probe: a key that every checkpoint has; among `variants` it decides.
      comparable: a config without what a config.json need not hold.
      nested_type: a model type whose config.json holds this one's as ``text_config``.
      variants: other beginnings of keys, as {"model.": "language_model.model."}.
      ignored: patterns of keys that hold nothing to convert.
      kept: keys of a config.json that our config does not hold and that come along.
      infer: the keys of a config.json by a checkpoint's tensors, where its authors write none.
      known_by: whether a config.json without a model_type, and the tensors beside it, are of this
        kind; None: it has one. What is written has then the keys of `write` and `kept` alone, for
        readers that refuse others.
    """

    model_type: str
    architecture: str
    read: Callable[[Settings], Any]
    write: Callable[[Any], dict[str, Any]]
    rules: tuple[Rule, ...]
    probe: str
    comparable: Callable[[Any], Any]
    nested_type: str | None = None
    variants: tuple[Mapping[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    infer: Callable[[Mapping[str, Tensor]], dict[str, Any]] | None = None
    known_by: Callable[[Mapping[str, Any], Mapping[str, Tensor]], bool] | None = None

    @property
    def in_transformers(self) -> bool:
        """Whether the library transformers has its class."""
        return self.infer is None and self.known_by is None

    def config(self, values: Mapping[str, Any], where: str) -> Any:
        """Our config of a config.json; logs what is not understood of it."""
        if self.nested_type is not None and values.get("model_type") == self.nested_type:
            values = values.get("text_config")
            if not isinstance(values, dict):
                raise ConversionError(f"{where} has no text_config, which a {self.nested_type} "
                                      "model's has")
            _LOG.warning("%s: of %s the text model alone is converted", where, self.nested_type)
        if values.get("quantization_config") is not None:
            raise ConversionError(f"{where} has a quantization_config; give the checkpoint that "
                                  "was not quantised")
        settings = Settings(values, where)
        try:
            config = self.read(settings)
        except ConversionError as error:
            raise error if str(error).startswith(where) else ConversionError(
                f"{where}: {error}") from None
        except ValueError as error:
            raise ConversionError(f"{where}: {error}") from None
        for note in settings.notes:
            _LOG.info("%s: %s", where, note)
        if unknown := [key for key in settings.unknown() if key not in self.kept]:
            _LOG.warning("%s: not understood, and left out: %s", where, ", ".join(unknown))
        return config

    def settings(self, config: Any) -> dict[str, Any]:
        """A config.json of our config. Raises Unsupported where that would not mean the same."""
        try:
            found = self.write(config)
            back = self.read(Settings(found, self.model_type))
        except ConversionError:
            raise
        except ValueError as error:  # As of an odd head_dim, which a rope cannot have.
            raise ConversionError(str(error)) from error
        except (AttributeError, TypeError) as error:
            raise Unsupported("the config", type(config).__name__, f"a {self.model_type}'s"
                              ) from error
        ours, theirs = self.comparable(config), self.comparable(back)
        if ours != theirs:
            key, mine, other = next(_differences(ours, theirs))
            raise Unsupported(key, mine, repr(other))
        if self.known_by is not None:
            return found
        return {"model_type": self.model_type, "architectures": [self.architecture], **found}

    def rules_for(self, keys) -> tuple[Rule, ...]:
        """The table with the beginnings of keys that a checkpoint has."""
        for variant in ({}, *self.variants):
            if _begin(self.probe, variant) in keys:
                return tuple(dataclasses.replace(rule, theirs=_begin(rule.theirs, variant))
                             for rule in self.rules)
        return self.rules


def _begin(key: str, variant: Mapping[str, str]) -> str:
    for old, new in variant.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def _differences(ours: Any, theirs: Any, prefix: str = ""):
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        for field in dataclasses.fields(ours):
            mine, other = getattr(ours, field.name), getattr(theirs, field.name)
            if mine != other:
                yield from _differences(mine, other, f"{prefix}{field.name}.")
    else:
        yield prefix.rstrip("."), ours, theirs
