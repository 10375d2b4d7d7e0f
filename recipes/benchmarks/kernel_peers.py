"""Peers of the kernels suite: the same call by somebody else's code, where that can make it.

  plain      the op's definition, compiled by XLA
  jax        jax.nn
  torch      PyTorch, on its GPU where it has one
  tokamax    tokamax, which chooses its own implementation
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import Case
from pallas_kernels.dispatch import Op

PEERS = ("plain", "jax", "torch", "tokamax")


def host(result: Any) -> list[np.ndarray]:
    """A side's results as float32 numpy arrays."""
    def array(x):
        return x.float().cpu().numpy() if hasattr(x, "cpu") else np.asarray(x, np.float32)

    return [array(x) for x in jax.tree.leaves(result)]


class CannotRun(Exception):
    """Why a peer cannot make a call."""


def make(peer: str, op: Op, case: Case, operands: list) -> Callable | tuple:
    """The peer's call: a function of jax arrays, or for torch (forward, both passes, wait).

    Raises CannotRun.
    """
    if peer == "plain":
        definition = getattr(op.module("reference"), op.__name__)
        return lambda *x: definition(*x, **case.options)
    maker = globals().get(f"_{peer}_{op.__name__}")
    if maker is None:
        raise CannotRun("has no such call")
    if peer in ("torch", "tokamax"):
        try:
            importlib.import_module(peer)
        except ImportError as error:
            raise CannotRun(f"is not installed ({error})") from None
    return maker(op.bind(*operands, **case.options)[1], operands)


def _only_causal(options: dict, operands: list) -> None:
    if any(x is not None for x in operands[3:]):
        raise CannotRun("takes no segments or block masks without a dense mask")
    for name in ("window", "softcap", "partial"):
        if options[name]:
            raise CannotRun(f"takes no {name}")


def _jax_attention(options: dict, operands: list) -> Callable:
    _only_causal(options, operands)
    if operands[0].shape[-1] != operands[2].shape[-1]:
        raise CannotRun("takes no values of another width")
    return lambda q, k, v, *_: jax.nn.dot_product_attention(
        q, k, v, is_causal=options["causal"], scale=options["scale"], implementation="xla")


def _tokamax_attention(options: dict, operands: list) -> Callable:
    import tokamax

    _only_causal(options, operands)
    return lambda q, k, v, *_: tokamax.dot_product_attention(
        q, k, v, is_causal=options["causal"], scale=options["scale"])


def _torch_tensors(operands: list) -> list:
    import torch

    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    if jax.default_backend() == "gpu" and device == "cpu":
        raise CannotRun("sees no GPU")

    def tensor(x):
        if x is None:
            return None
        made = torch.from_numpy(np.array(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x))
        return made.to(device, torch.bfloat16 if x.dtype == jnp.bfloat16 else made.dtype)

    return [tensor(x) for x in operands]


def _torch_passes(function: Callable, tensors: list, differentiable: tuple[int, ...]) -> tuple:
    import torch

    def wait(_: Any) -> None:
        if tensors[0].is_cuda:
            torch.cuda.synchronize()

    def forward():
        with torch.no_grad():
            return function(*tensors)

    def both():
        chosen = [tensors[i].detach().requires_grad_() for i in differentiable]
        full = list(tensors)
        for i, x in zip(differentiable, chosen, strict=True):
            full[i] = x
        out = function(*full)
        loss = (out * out).sum()
        loss.backward()
        return loss.detach(), [x.grad for x in chosen]

    return forward, both, wait


def _torch_attention(options: dict, operands: list) -> tuple:
    import torch

    _only_causal(options, operands)
    tensors = _torch_tensors(operands)
    grouped = operands[0].shape[2] != operands[1].shape[2]

    def attend(q, k, v, *_):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=options["causal"], scale=options["scale"],
            enable_gqa=grouped).transpose(1, 2)

    return _torch_passes(attend, tensors, (0, 1, 2))


def _torch_rms_norm(options: dict, operands: list) -> tuple:
    import torch

    if any(x is not None for x in operands[2:]):
        raise CannotRun("has no fused residual add")
    x, scale = _torch_tensors(operands[:2])
    return _torch_passes(
        lambda x, scale: torch.nn.functional.rms_norm(x, x.shape[-1:], scale.to(x.dtype),
                                                      options["eps"]), [x, scale], (0, 1))
