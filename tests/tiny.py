"""Every registered preset at a size for tests: all its options, little of anything else."""

import jax
import numpy as np

import zoo
from layers.stack import to_list
from zoo import protocol

MESH = "data:2,fsdp:2,tensor:2"
"""Eight devices on all axes; the sizes below divide over it."""

TRANSFORMER = {
    "num_layers": 2, "width": 32, "vocab_size": 40, "max_length": 64, "mlp.hidden": 48,
    "attention.num_heads": 4, "attention.head_dim": 8,
}  # fmt: skip


def config(name: str, **overrides):
    """The preset `name`, reduced; `overrides` as in `zoo.config`."""
    full = zoo.config(name)
    if type(full).__name__ != "Transformer":
        raise NotImplementedError(f"say here how to reduce a {type(full).__name__} for tests")
    grouped = full.attention.num_kv_heads < full.attention.num_heads
    small = {**TRANSFORMER, "attention.num_kv_heads": 2 if grouped else 4}
    if full.attention.window:
        small["attention.window"] = 5
    return zoo.override(full, {**small, **overrides})


def model(config, stacked: bool = False, seed: int = 0):
    """A model with random values in every parameter, biases and scales too, alike in both forms.

    Not the initial values: those take longer to compile than most tests take to run.
    """
    rng = np.random.default_rng(seed)

    def draw(path, x):
        about, spread = {"scale": (1.0, 0.2), "bias": (0.0, 0.2)}.get(path[-1].key, (0.0, 0.3))
        return (about + spread * rng.normal(size=x.shape)).astype(np.float32)

    abstract = protocol.split(zoo.build(config, abstract=True, stacked=True))[1]
    params = jax.tree_util.tree_map_with_path(draw, abstract)
    definition = protocol.split(zoo.build(config, abstract=True, stacked=stacked))[0]
    return protocol.merge(definition, jax.device_put(params if stacked else to_list(params)))


def batch(vocab: int, rows: int = 8, length: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """Packed rows of three documents each and some padding, with a third of the weights 0."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length), np.int32)
    segments = np.sort(rng.integers(1, 4, (rows, length)), axis=1).astype(np.int32)
    segments[:, length - 2 :] = 0
    starts = np.concatenate(
        [np.ones((rows, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    column = np.arange(length)
    positions = column - np.maximum.accumulate(np.where(starts, column, 0), axis=1)
    return {
        "tokens": tokens,
        "segment_ids": segments,
        "positions": positions.astype(np.int32),
        "labels": np.roll(tokens, -1, axis=1),
        "weights": ((rng.random((rows, length)) > 1 / 3) & (segments > 0)).astype(np.float32),
    }
