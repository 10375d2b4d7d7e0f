"""Ops and their implementations: which one runs on which compile target, and why.

An op is a folder. Its `__init__.py` declares the signature, checked by `op`; beside it each
implementation is a module of its own, imported only when a target of its platform asks for it:

  def supports(target, *operands, **options) -> str | None    # why not, or None
  def <op's name>(*operands, **options, <tile sizes with defaults>)
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import logging
import pkgutil
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import tuned
from pallas_kernels.dims import Dims

_LOG = logging.getLogger("parazoo.kernels")

OPS: dict[str, "Op"] = {}

_CHIPS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p",
          "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"}

# Remat policies keep what the kernels' backward passes need by this name.
RESIDUAL = "kernel_residual"
residual = functools.partial(checkpoint_name, name=RESIDUAL)


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program is compiled for.

    Attributes:
      platform: "cpu", "tpu" or "gpu".
      chip: e.g. "v5p" or "h200"; the device kind itself where it is not a known one.
    """

    platform: str
    chip: str

    @classmethod
    def parse(cls, name: str) -> "Target":
        """From a chip's name: "cpu", "v5p", "h200"."""
        if name in _CHIPS.values():
            return cls("tpu", name)
        # TPUs' names are all known: "v5" is no GPU.
        if re.fullmatch(r"(?!v\d|tpu)[a-z]+\d+", name):
            return cls("gpu", name)
        if name == "cpu":
            return cls("cpu", name)
        raise ValueError(f"target {name!r} must be cpu, a TPU "
                         f"({', '.join(dict.fromkeys(_CHIPS.values()))}) or a GPU such as h100 "
                         "or h200")

    @classmethod
    def of(cls, platform: str, kind: str) -> "Target":
        """Of a jax device's platform and kind."""
        if platform == "tpu":
            return cls("tpu", _CHIPS.get(kind, kind))
        if platform in ("gpu", "cuda"):
            model = re.search(r"\b([A-Z]+\d+)", kind)
            return cls("gpu", model[1].lower() if model else kind)
        return cls(platform, platform)

    @classmethod
    def ambient(cls) -> "Target":
        """Of the ambient mesh, which may be of described devices; without one, of jax's default.

        Inside `interpret` it is the interpreted one.
        """
        if _INTERPRETED.value is not None:
            return _INTERPRETED.value
        device = jax.sharding.get_abstract_mesh().abstract_device
        if device is None:
            device = jax.config.jax_default_device or jax.devices()[0]
        if isinstance(device, str):
            device = jax.devices(device)[0]
        return cls.of(device.platform, device.device_kind)


# User contexts are part of jit's cache key, so a function traced under another choice compiles
# again.
_USING = jax.make_user_context(default_value=())
_INTERPRETED = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def using(**implementations: str | None):
    """Names implementations for the calls inside, e.g. ``using(attention="xla")``.

    As strict as the argument ``implementation``, which wins over it. Not inside jit.

    Raises:
      ValueError: no such op, or it has no such implementation.
    """
    for name, implementation in implementations.items():
        find(name).check_name(implementation)
    chosen = {**dict(_USING.value), **implementations}
    with _USING(tuple(sorted((k, v) for k, v in chosen.items() if v is not None))):
        yield


@contextlib.contextmanager
def interpret(chip: str):
    """Runs the kernels of a TPU or GPU in Pallas' interpreter, on the host: for tests.

    Raises:
      NotImplementedError: this jax has no interpreter for that platform.
    """
    target = Target.parse(chip)
    if target.platform == "tpu":
        from jax.experimental.pallas import tpu as pltpu

        mode = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams())
    elif target.platform == "gpu":
        from jax.experimental.pallas import mosaic_gpu as pg

        if not hasattr(pg, "force_gpu_interpret_mode"):
            raise NotImplementedError(f"jax {jax.__version__} has no public GPU interpreter; "
                                      "0.12 has")
        mode = pg.force_gpu_interpret_mode(pg.InterpretGPUParams())
    else:
        raise ValueError(f"target {chip!r} has no kernels to interpret")
    with mode, _INTERPRETED(target):
        yield


def interpreting() -> bool:
    """Whether the calls here are inside `interpret`."""
    return _INTERPRETED.value is not None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An implementation and what speaks for or against it.

    Attributes:
      name: e.g. "tpu".
      reason: why it cannot run; None if it can.
      milliseconds: its tuned time for this shape on this chip, if there is one.
      parameters: tile sizes from the tuned table.
    """

    name: str
    reason: str | None
    milliseconds: float | None = None
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def why(self) -> str:
        """What it stands in its place for, among those that can run."""
        return ("preferred" if self.milliseconds is None
                else f"measured {self.milliseconds:.3g} ms")


class Op:
    """A per-shard function with several implementations; `op` makes one.

    Attributes:
      dims: the logical axes of its operands and results.
      preference: platform -> its implementations, best first where nothing was measured.
    """

    def __init__(self, function: Callable, dims: Dims, preference: Mapping[str, tuple[str, ...]]):
        functools.update_wrapper(self, function)
        self.dims, self.preference, self._check = dims, dict(preference), function
        self.names = tuple(dict.fromkeys(n for names in preference.values() for n in names))
        self._signature = inspect.signature(function)

    def __repr__(self) -> str:
        return f"<op {self.__name__}: {', '.join(self.names)}>"

    def check_name(self, implementation: str | None) -> None:
        """Raises ValueError unless there is an implementation of this name."""
        if implementation is not None and implementation not in self.names:
            near = difflib.get_close_matches(implementation, self.names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{self.__name__} has no implementation {implementation!r}, only "
                             f"{', '.join(self.names)}{hint}")

    def named(self) -> str | None:
        """The implementation that an enclosing `using` names."""
        return dict(_USING.value).get(self.__name__)

    def module(self, name: str) -> ModuleType:
        """The module of one of its files, e.g. "xla", "reference" or "cases"."""
        return importlib.import_module(f"{self.__module__}.{name}")

    def bind(self, *operands, **options) -> tuple[tuple, dict[str, Any]]:
        """All operands and options, defaults included, once they are found to fit together.

        Raises ValueError where they do not, or where an operand has no elements.
        """
        bound = self._signature.bind(*operands, **options)
        bound.apply_defaults()
        if any(x is not None and 0 in x.shape for x in bound.args):
            raise ValueError(f"{self.__name__}: {_shapes(bound.args)}: every dimension must be at "
                             "least 1; leave out what is empty")
        self._check(*bound.args, **bound.kwargs)
        return bound.args, bound.kwargs

    def candidates(self, target: Target, *operands, **options) -> list[Candidate]:
        """Every implementation, best first, for operands (arrays or their avals) that fit."""
        measured = tuned.entries(self.__name__, target.chip, operands, options)
        preference = self.preference.get(target.platform, ())

        def judge(name):
            if name not in preference:
                platforms = [p for p, names in self.preference.items() if name in names]
                return Candidate(name, f"is for {' and '.join(platforms)}, not for "
                                       f"{target.platform}")
            reason = self.module(name).supports(target, *operands, **options)
            entry = measured.get(name, {})
            return Candidate(name, reason, entry.get("milliseconds"), entry.get("parameters", {}))

        order = [judge(n) for n in (*preference, *(n for n in self.names if n not in preference))]
        # Stable: what was not measured keeps its place behind the fastest that was.
        return sorted(order, key=lambda c: (c.reason is not None,
                                            c.milliseconds is None, c.milliseconds or 0.0))

    def choose(self, target: Target, implementation: str | None, *operands, **options) -> Candidate:
        """The named implementation, or the best one.

        Raises:
          ValueError: there is no such implementation.
          NotImplementedError: it cannot run, or none can; lists each one's reason.
        """
        if implementation is None:
            implementation = self.named()
        self.check_name(implementation)
        candidates = self.candidates(target, *operands, **options)
        fit = [c for c in candidates
               if c.reason is None and implementation in (None, c.name)]
        if not fit:
            asked = ("no implementation runs" if implementation is None
                     else f"{implementation!r} cannot run")
            raise NotImplementedError(
                f"{self.__name__}: {asked} for {_shapes(operands)} on {target.chip}. "
                + "; ".join(f"{c.name}: {c.reason or 'can'}" for c in candidates))
        if implementation is None:
            _log_once(self.__name__, target, fit[0].name, fit[0].why,
                      tuple((c.name, c.reason) for c in candidates if c.reason is not None))
        return fit[0]

    def __call__(self, *operands, implementation: str | None = None, **options):
        operands, options = self.bind(*operands, **options)
        chosen = self.choose(Target.ambient(), implementation, *operands, **options)
        return getattr(self.module(chosen.name), self.__name__)(
            *operands, **options, **chosen.parameters)


def _shapes(operands) -> str:
    return ", ".join("None" if x is None else f"{x.dtype}{list(x.shape)}" for x in operands)


def refuse_other_than_floats(**operands: jax.Array) -> str | None:
    """A `supports` of everything that has a gradient: names the operands that have none."""
    wrong = [f"{name} is {x.dtype}" for name, x in operands.items()
             if not jnp.issubdtype(x.dtype, jnp.floating)]
    return f"{', '.join(wrong)}; it takes floating dtypes" if wrong else None


@functools.cache
def _log_once(op, target, chosen, why, refused) -> None:
    others = "; ".join(f"{name}: {reason}" for name, reason in refused)
    _LOG.info("%s on %s: %s (%s)%s", op, target.chip, chosen, why, f". {others}" if others else "")


def op(dims: Dims, **preference: tuple[str, ...]) -> Callable[[Callable], Op]:
    """Declares an op.

    The decorated function is its signature and docstring; its body checks operands and options,
    raising ValueError, and returns nothing.

    Args:
      dims: the logical axes of operands and results.
      **preference: cpu=, tpu=, gpu=: names of implementations, best first.
    """
    def declare(function):
        made = Op(function, dims, preference)
        OPS[made.__name__] = made
        return made

    return declare


def find(name: str) -> Op:
    """The op of that name. Raises ValueError, with the nearest name, where there is none."""
    if name not in OPS and name not in ops():
        near = difflib.get_close_matches(name, OPS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no op {name!r}, only {', '.join(sorted(OPS))}{hint}")
    return OPS[name]


def ops() -> dict[str, Op]:
    """Every op: those of this package's folders, and those that others declared."""
    package = importlib.import_module("pallas_kernels")
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            importlib.import_module(f"pallas_kernels.{module.name}")
    return dict(sorted(OPS.items()))


def explain(op: Op | str, *operands, target: str | None = None, **options) -> None:
    """Prints which implementation of an op runs for a target, and why the others do not.

    Inside `using` it is the one named there, if that can.

    Args:
      op: the op or its name.
      *operands: arrays or ``jax.ShapeDtypeStruct``s, and the op's options by name.
      target: a chip's name, e.g. "v5p", "h200"; default: the ambient mesh's.
    """
    op = find(op) if isinstance(op, str) else op
    operands, options = op.bind(*operands, **options)
    chip = Target.ambient() if target is None else Target.parse(target)
    candidates = op.candidates(chip, *operands, **options)
    print(f"{op.__name__}({_shapes(operands)}) on {chip.chip}")
    named = op.named()
    chosen = next((c for c in candidates if c.reason is None and named in (None, c.name)), None)
    for c in candidates:
        if c is chosen:
            verdict = f"chosen ({c.why if named is None else 'named by using'})"
        else:
            verdict = c.reason or ("can" if c.milliseconds is None else f"can ({c.why})")
        print(f"  {c.name:10} {verdict}")
    if chosen is None and named is not None:
        print(f"  {named!r}, named by using, cannot run: the call would raise")
