"""Finds the first operation of a function that makes an infinity or a NaN, and names it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

_ROOT = Path(__file__).resolve().parent.parent
# Where models are written: the frame there says best what a tensor is.
_MODELS = tuple(str(_ROOT / name) for name in ("layers", "pallas_kernels", "zoo"))
# Operations whose result is still the first operand, when it comes to naming it.
_VIEWS = frozenset((
    "broadcast_in_dim", "convert_element_type", "copy", "dynamic_slice", "expand_dims", "reshape",
    "reshard", "sharding_constraint", "slice", "squeeze", "transpose"))
# Finite operands give finite results: nothing to check.
_SAFE = _VIEWS | frozenset((
    "abs", "argmax", "argmin", "clamp", "concatenate", "cos", "cummax", "cummin",
    "dynamic_update_slice", "erf", "gather", "iota", "logistic", "max", "min", "neg",
    "optimization_barrier", "pad", "reduce_max", "reduce_min", "rev", "select_n", "sign", "sin",
    "sort", "split", "stop_gradient", "tanh"))
_INLINED = frozenset(("checkpoint", "closed_call", "core_call", "custom_jvp_call",
                      "custom_vjp_call", "jit", "pjit", "remat", "remat2"))


def find(function: Callable, inputs: Mapping[str, Any], sound: Mapping[str, Any],
         replicated: jax.sharding.Sharding | None = None) -> str | None:
    """Describes the first non-finite tensor in the order of computation.

    The function runs as one program that also returns, for each operation and each round of a
    scan, whether the result is finite. So it may be sharded over the devices of several processes.

    Args:
      function: takes `inputs` as keywords; all its results are computed.
      inputs: pytrees of arrays.
      sound: other inputs, with which all is well. What is not finite with them either, such as the
        logarithm of a closed gate, is meant to be so.
      replicated: a sharding for what the checks find, where inputs are on several devices.

    Returns:
      A few words such as "inf in the result of dot_general, float32[4,64,128] (Linear.__call__ in
      layers/linear.py:66) with params/stack/layers/2/0/mlp/up/kernel", or None if all is finite.
    """
    paths = jax.tree_util.tree_leaves_with_path(inputs)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    leaves, structure = [leaf for _, leaf in paths], jax.tree.structure(inputs)
    program = jax.make_jaxpr(
        lambda *leaves: function(**jax.tree.unflatten(structure, leaves)))(*leaves)
    checks: list[_Check] = []

    @functools.partial(jax.jit, out_shardings=replicated)
    def run(*leaves):
        checks.clear()
        values = [_Value(x, name) for x, name in zip(leaves, names, strict=True)]
        found = []
        for value, name in zip(values, names, strict=True):
            _check(value.array, name, checks, found)
        _run(program, values, checks, found)
        return found

    now = jax.device_get(run(*leaves))
    usual = jax.device_get(run(*jax.tree.leaves(sound)))
    return _first(checks, now, usual)


@dataclasses.dataclass(frozen=True)
class _Check:
    """What was looked at: a tensor, or (with `rounds`) the tensors of each round of a scan."""

    text: str
    rounds: list["_Check"] | None = None
    reverse: bool = False


@dataclasses.dataclass(frozen=True)
class _Value:
    """An array, and which input it is or is a view of."""

    array: Any
    name: str | None = None


def _check(x: Any, text: str, checks: list[_Check], found: list) -> None:
    if jnp.issubdtype(jnp.result_type(x), jnp.inexact) and jnp.size(x):
        checks.append(_Check(text))
        # Not the largest magnitude: XLA's maximum may drop a NaN.
        found.append(jnp.max(jnp.where(jnp.isnan(x), 2, jnp.isinf(x))))


def _first(checks: Sequence[_Check], found: Sequence[Any], usual: Sequence[Any]) -> str | None:
    for check, now, before in zip(checks, found, usual, strict=True):
        if check.rounds is None:
            if now and not before:
                return f"{'nan' if now == 2 else 'inf'} in {check.text}"
            continue
        rounds = range(len(now[0]) if now else 0)
        for i in reversed(rounds) if check.reverse else rounds:
            here, there = (jax.tree.map(lambda x, i=i: x[i], values) for values in (now, before))
            if text := _first(check.rounds, here, there):
                return f"{text}, round {i} of {len(rounds)} of {check.text}"
    return None


def _run(program: Any, inputs: Sequence[_Value], checks: list[_Check], found: list,
         outer: str = "") -> list[_Value]:
    """Traces a jaxpr's operations one by one, adding to `checks`, and what they find to `found`.

    `outer` is the place from which the jaxpr is called, if it is called.
    """
    jaxpr = getattr(program, "jaxpr", program)  # Closed or not; one class since jax 0.12.
    consts = [_Value(x) for x in getattr(program, "consts", ())]
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))

    def read(atom):
        return _Value(atom.val) if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        place = _place(eqn, outer)
        if name == "scan":
            results = _run_scan(eqn, operands, checks, found, place)
        elif name in _INLINED and inner is not None:
            results = _run(inner, operands, checks, found, place)
        else:
            with eqn.ctx.manager:
                made = eqn.primitive.bind(*(value.array for value in operands),
                                          **eqn.primitive.get_bind_params(eqn.params))
            made = made if eqn.primitive.multiple_results else [made]
            results = [_Value(x, operands[0].name if name in _VIEWS else None) for x in made]
            if name not in _SAFE:
                for x in made:
                    _check(x, _describe(name, place, x, operands), checks, found)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _run_scan(eqn: Any, operands: Sequence[_Value], checks: list[_Check], found: list,
              place: str) -> list[_Value]:
    """A scan whose rounds also return what their checks find."""
    program = eqn.params["jaxpr"]
    body = getattr(program, "jaxpr", program)
    # What is carried has the same rank inside and out, what is stacked has one more outside.
    carried = sum(len(a.aval.shape) == len(b.aval.shape)
                  for a, b in zip(eqn.outvars, body.outvars, strict=True))
    whole = sum(len(a.aval.shape) == len(b.aval.shape)
                for a, b in zip(eqn.invars, body.invars, strict=True))
    fixed = whole - carried
    rounds: list[_Check] = []

    def one(carry, slices):
        rounds.clear()
        values = [*operands[:fixed], *map(_Value, carry),
                  *(_Value(x, v.name) for x, v in zip(slices, operands[whole:], strict=True))]
        seen: list = []
        results = [v.array for v in _run(program, values, rounds, seen, place)]
        return results[:carried], (results[carried:], seen)

    carry, (stacked, seen) = jax.lax.scan(
        one, [v.array for v in operands[fixed:whole]], [v.array for v in operands[whole:]],
        length=eqn.params["length"], reverse=eqn.params["reverse"])
    checks.append(_Check(f"a scan ({place})", rounds, eqn.params["reverse"]))
    found.append(seen)
    return [_Value(x) for x in (*carry, *stacked)]


def _describe(name: str, place: str, x: Any, operands: Sequence[_Value]) -> str:
    shape = f"{x.dtype}[{','.join(map(str, x.shape))}]"
    used = dict.fromkeys(value.name for value in operands if value.name is not None)
    return (f"the result of {name}, {shape} ({place})"
            + (f" with {' and '.join(used)}" if used else ""))


def _place(eqn: Any, outer: str) -> str:
    """The function, file and line that an operation comes from, if in a model, else `outer`."""
    trace = eqn.source_info.traceback
    frames = trace.frames if trace is not None else ()
    frame = next((f for f in frames if f.file_name.startswith(_MODELS)), None)
    if frame is None:
        return outer or "outside of the model"
    file = Path(frame.file_name).relative_to(_ROOT).as_posix()
    return f"{frame.function_name} in {file}:{frame.line_num}"
