"""Presets by name, overrides by path, and building a model where its shards live."""

import dataclasses
import difflib
import functools
import importlib
import types
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sharding
from zoo.protocol import axes, merge, shardings, split

# Family -> (module, config class). A family's presets stand in its own module, loaded on demand.
FAMILIES: Mapping[str, tuple[str, str]] = {
    "transformer": ("zoo.transformer", "Transformer"),
    "xlstm": ("zoo.xlstm", "XLstm"),
    "rnn": ("zoo.rnn", "Recurrent"),
    "paratranscnn": ("zoo.paratranscnn", "ParaTransCnn"),
}


def _family(name: str) -> tuple[type, Mapping[str, Any]]:
    module_name, class_name = FAMILIES[name]
    module = importlib.import_module(module_name)
    return getattr(module, class_name), module.PRESETS


@functools.cache
def _presets() -> dict[str, Any]:
    return {preset: make for family in FAMILIES for preset, make in _family(family)[1].items()}


def suggest(name: str, known) -> str:
    """The end of an error about an unknown name: the nearest one there is, or all."""
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.4)
    return f"; did you mean {lower[near[0]]!r}?" if near else f"; known: {', '.join(sorted(known))}"


def list_models(kind: str | None = None) -> list[str]:
    """The names of all presets, by family and size, or of those of one kind.

    A model's kind is what it makes of what: "language" (the next token of tokens) or
    "segmentation" (the class of each pixel of an image). Its config has it as `kind`.
    """
    families = (_family(family) for family in FAMILIES)
    return [preset for config, presets in families if kind in (None, config.kind)
            for preset in presets]


def check_kind(config: Any, kind: str) -> None:
    """Raises ValueError for a config whose models are of another kind; see `list_models`."""
    if config.kind != kind:
        raise ValueError(f"the model is a {type(config).__name__}, which is for {config.kind}; "
                         f"give one for {kind}, such as {list_models(kind)[0]}")


def config(name: str, **overrides: Any) -> Any:
    """A preset's config, with fields replaced.

    Args:
      name: one of `zoo.list()`.
      **overrides: new values by field; nested fields by dotted path, as in
        ``zoo.config("llama-tiny", num_layers=2, **{"attention.window": 512})``. Texts are
        converted to the field's type.

    Raises:
      ValueError: an unknown name or field (with the nearest one), or a value that the config
        refuses.
    """
    if not isinstance(name, str):
        raise ValueError(f"the model is {name!r}; give its name, one of zoo.list()")
    if name not in _presets():
        raise ValueError(f"unknown model {name!r}{suggest(name, _presets())}")
    return override(_presets()[name](), overrides)


def override(config: Any, overrides: Mapping[str, Any]) -> Any:
    """`config` with the fields at dotted paths replaced, all at once; see `config`."""
    return _override(config, overrides, "")


def _override(config: Any, overrides: Mapping[str, Any], prefix: str) -> Any:
    """`prefix` is the path of `config` in the whole, with a dot after it; for messages."""
    nested: dict[str, dict] = {}
    changes: dict[str, Any] = {}
    known = {f.name: f for f in dataclasses.fields(config)}
    hints = typing.get_type_hints(type(config))
    for path, value in overrides.items():
        head, _, rest = path.partition(".")
        if head not in known:
            owner = prefix.rstrip(".") or type(config).__name__.lower()
            raise ValueError(f"{owner} has no field {head!r}{suggest(head, known)}")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            changes[head] = _convert(value, hints[head], prefix + head)
    for head, inner in nested.items():
        child = changes.get(head, getattr(config, head))
        if not dataclasses.is_dataclass(child):
            path = prefix + head
            raise ValueError(f"{path!r} is {child!r}, which has no fields; cannot set "
                             f"{path}.{next(iter(inner))}")
        changes[head] = _override(child, inner, f"{prefix}{head}.")
    return dataclasses.replace(config, **changes)


def _convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as the type `hint` of the field at `path`; texts are parsed."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        if types.NoneType in options:
            return None
        names = " or ".join(o.__name__ for o in options)
        article = "an" if names[0] in "aeiouAEIOU" else "a"
        raise ValueError(f"{path} cannot be none; it is {article} {names}")
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, option):
            return value
        if option is bool:
            if isinstance(value, bool):
                return value
            if isinstance(value, str) and value.lower() in ("true", "false"):
                return value.lower() == "true"
        elif option is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            if isinstance(value, float) and value.is_integer():
                return int(value)
            if isinstance(value, str):
                try:
                    return int(value.replace("_", ""))
                except ValueError:
                    continue
        elif option is float and not isinstance(value, bool):
            try:
                return float(value)
            except (TypeError, ValueError):
                continue
        elif option is str and isinstance(value, str):
            return value
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise ValueError(f"{path} is {value!r}; it must be {names}")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON-able nested dicts; each names its class under "type"."""
    def plain(value):
        if dataclasses.is_dataclass(value):
            fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return {"type": type(value).__name__, **fields}
        return value

    return plain(config)


def _config_classes(cls: type, found: dict[str, type]) -> dict[str, type]:
    if cls.__name__ not in found:
        found[cls.__name__] = cls
        for hint in typing.get_type_hints(cls).values():
            for option in typing.get_args(hint) or (hint,):
                if dataclasses.is_dataclass(option):
                    _config_classes(option, found)
    return found


def from_dict(data: Mapping[str, Any]) -> Any:
    """The inverse of `to_dict`. Raises ValueError for an unknown class, an unknown or missing
    field, or a value that the config refuses."""
    classes: dict[str, type] = {}
    for family in FAMILIES:
        _config_classes(_family(family)[0], classes)

    def revive(value):
        if not isinstance(value, Mapping):
            return value
        fields = {name: revive(child) for name, child in value.items() if name != "type"}
        name = value.get("type")
        if name not in classes:
            raise ValueError(f"unknown config type {name!r}{suggest(str(name), classes)}")
        known = {f.name for f in dataclasses.fields(classes[name])}
        for field in fields:
            if field not in known:
                raise ValueError(f"{name} has no field {field!r}{suggest(field, known)}")
        required = {f.name for f in dataclasses.fields(classes[name])
                    if f.default is dataclasses.MISSING}
        if missing := sorted(required - fields.keys()):
            raise ValueError(f"{name} lacks the field {missing[0]!r}; give it a value")
        return classes[name](**fields)

    return revive(data)


@functools.lru_cache(maxsize=64)
def _maker(config, dtype, stacked, remat, mesh, rules):
    """(definition, abstract params, jitted seed -> params) of a config."""
    found = []

    def make(seed):
        model = config.build(key=jax.random.key(seed), dtype=dtype, stacked=stacked, remat=remat)
        definition, params = split(model)
        found.append((definition, axes(model)))
        return params

    shapes = jax.eval_shape(make, np.uint32(0))
    definition, names = found[-1]
    layout = shardings(mesh, rules, names, shapes)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)
    return definition, abstract, jax.jit(make, out_shardings=layout)


def _param_dtype(dtype: Any) -> np.dtype:
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype is {dtype if found is None else found}; parameters are float32 "
                         "or bfloat16")
    return found


def build(
    name_or_config: Any,
    seed: int = 0,
    mesh: jax.sharding.Mesh | str | None = None,
    rules: sharding.Rules | str | None = None,
    dtype=jnp.float32,
    abstract: bool = False,
    stacked: bool | None = None,
    remat: str = "none",
):
    """A model with fresh parameters, each shard made on the device where it lives.

    Args:
      name_or_config: a preset's name or a config.
      seed: of the parameters.
      mesh: where, also as a text for `sharding.mesh`; default the ambient mesh, else the first
        device alone.
      rules: how parameters are laid over the mesh, also as a text for `sharding.rules`; default
        the ambient rules (fsdp_tp).
      dtype: of the parameters, jnp.float32 or jnp.bfloat16. The model computes in it.
      abstract: True leaves ShapeDtypeStructs (with shardings) in place of arrays.
      stacked: True for scanned, stacked layers, False for a list of layers, None for what suits
        the mesh's devices (a list on CPU).
      remat: what the backward pass keeps of each block: "none" (keep all), "dots", "full".

    Returns:
      The model: ``model({"tokens": tokens}).logits``.

    Raises:
      ValueError: unknown name, a seed or dtype that is none, or sizes that do not divide over
        the mesh.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; it must be from 0 to 2**32 - 1: take it modulo 2**32")
    dtype = _param_dtype(dtype)
    if not dataclasses.is_dataclass(name_or_config):
        name_or_config = config(name_or_config)
    if isinstance(mesh, str):
        mesh = sharding.mesh(mesh)
    if isinstance(rules, str):
        rules = sharding.rules(rules)
    if mesh is None:
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            mesh = sharding.mesh("data:1", [jax.local_devices()[0]])
    rules = sharding.ambient_rules() if rules is None else rules
    if stacked is None:
        stacked = mesh.devices.flat[0].platform != "cpu"
    with sharding.use(mesh, rules):
        definition, shapes, make = _maker(
            name_or_config, dtype, stacked, remat, mesh, rules)
        return merge(definition, shapes if abstract else make(np.uint32(seed)))
