"""A model beside its peer in transformers, on the same tokens, layer by layer."""

import importlib.util
from pathlib import Path

import jax
import numpy as np

from zoo import protocol

_TOP = 5


def compare(model, folder: Path, tokens: int) -> None:
    """Runs `model` and the one in a directory of Hugging Face's on random tokens, and prints both.

    Each layer's largest difference, then of the logits also the KL divergence and how often the
    likeliest and the five likeliest tokens agree. Says so where torch or transformers is missing.
    """
    if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        print("torch and transformers are not both installed, so the models were not run side by "
              "side (pip install 'parazoo[parity]')")
        return
    length = min(tokens, model.config.max_length)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length), np.int32)
    theirs, their_logits = _run_theirs(folder, ids)
    definition, params = protocol.split(model)
    ours, logits = jax.device_get(jax.jit(
        lambda params, ids: protocol.merge(definition, params).trace(ids))(params, ids))
    print(f"{'on ' + str(length) + ' tokens':18} {'max |difference|':>18} {'of max':>10}")
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        name = "embedding" if i == 0 else "final norm" if i == len(ours) - 1 else f"layer {i}"
        _line(name, a, b)
    _line("logits", logits, their_logits)
    p, q = (_log_softmax(x.astype(np.float64)) for x in (their_logits, logits))
    kl = np.sum(np.exp(p) * (p - q), axis=-1)
    same = np.mean(np.argmax(p, -1) == np.argmax(q, -1))
    tops = [np.argsort(-x, axis=-1, kind="stable")[..., :_TOP] for x in (p, q)]
    shared = np.mean([len(set(a) & set(b)) / _TOP for a, b in zip(
        *(top.reshape(-1, _TOP) for top in tops), strict=True)])
    print(f"KL divergence: mean {kl.mean():.2e}, largest {kl.max():.2e} nats; "
          f"top-1 agreement {same:.1%}, top-{_TOP} overlap {shared:.1%}")


def _run_theirs(folder: Path, ids: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    import torch
    import transformers

    peer = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation="eager", local_files_only=True).eval()
    with torch.no_grad():
        found = peer(torch.tensor(ids.astype(np.int64)), output_hidden_states=True)
    return [x.float().numpy() for x in found.hidden_states], found.logits.float().numpy()


def _line(name: str, a: np.ndarray, b: np.ndarray) -> None:
    worst = float(np.max(np.abs(a.astype(np.float32) - b)))
    print(f"{name:18} {worst:18.2e} {worst / max(1e-30, float(np.max(np.abs(b)))):10.2e}")


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))
