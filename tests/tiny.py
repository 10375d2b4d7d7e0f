"""Every registered preset at a size for tests: all its options, little of anything else."""

import functools

import jax
import numpy as np

import zoo
from layers.attention import Attention
from layers.moe import Moe
from layers.stack import to_list
from zoo import protocol

MESH = "data:2,fsdp:2,tensor:2"
"""Eight devices on all axes; the sizes below divide over it."""

TRANSFORMER = {
    "num_layers": 2, "width": 32, "vocab_size": 40, "max_length": 64, "norm.eps": 1e-5,
    "mlp.hidden": 48,
}  # fmt: skip
MLSTM = {"mlstm.num_heads": 4, "mlstm.key_dim": 4, "mlstm.value_dim": 8, "mlstm.norm_eps": 1e-3}
MIXED = {"mlstm.num_heads": 4, "mlstm.head_dim": 8, "mlstm.norm_eps": 1e-2, "slstm.num_heads": 4,
         "slstm.norm_eps": 1e-2, "blocks": "ms"}
RNN = {"rnn.num_heads": 4, "rnn.head_dim": 8}
MOE = {"num_experts": 5, "top_k": 2, "hidden": 16, "balance_loss": 0.1, "z_loss": 0.01}


def config(name: str, **overrides):
    """The preset `name`, reduced; `overrides` as in `zoo.config`."""
    full = zoo.config(name)
    if type(full).__name__ == "XLstm":
        mixers = MLSTM if full.slstm is None else MIXED
        return zoo.override(full, {**TRANSFORMER, **mixers, **overrides})
    if type(full).__name__ == "Recurrent":
        return zoo.override(full, {**TRANSFORMER, **RNN, **overrides})
    if type(full).__name__ != "Transformer":
        raise NotImplementedError(f"say here how to reduce a {type(full).__name__} for tests")
    small = {**TRANSFORMER, **_attention("attention", full.attention, theta=1e4, window=5)}
    if full.local is not None:
        small |= _attention("local", full.local, theta=100.0, window=3)
        # A whole pattern and the beginning of another one.
        small["local_layers"] = min(full.local_layers, 2)
        small["num_layers"] = small["local_layers"] + 2
    if isinstance(full.mlp, Moe):
        small |= {f"mlp.{name}": value for name, value in MOE.items()}
        if full.mlp.shared_hidden is not None:
            small["mlp.shared_hidden"] = 24
    if full.embed_scale is not None:
        small["embed_scale"] = small["width"] ** 0.5
    return zoo.override(full, {**small, **overrides})


def _attention(path: str, full: Attention, *, theta: float, window: int) -> dict:
    grouped = full.num_kv_heads < full.num_heads
    small = {"num_heads": 4, "num_kv_heads": 2 if grouped else 4, "head_dim": 8}
    if full.window is not None:
        small["window"] = window
    if full.scale is not None:
        small["scale"] = 0.3
    if full.rope is not None:
        small["rope.theta"] = theta
        if full.rope.scaling is not None:
            small["rope.scaling.factor"] = 4.0
    return {f"{path}.{name}": value for name, value in small.items()}


def forms() -> list[str]:
    """The first preset of each form that differs in more than a number, the tying of the head, the
    scaling of rope's frequencies, and a classical cell: for tests that cost time."""
    found: dict = {}
    for name in zoo.list("language"):
        form = config(name, tie_embeddings=False)
        if hasattr(form, "attention") and form.attention.rope is not None:
            form = zoo.override(form, {"attention.rope.scaling": None})
        if hasattr(form, "rnn"):
            form = zoo.override(form, {"rnn.cell": "lstm"})
        found.setdefault(form, name)
    return list(found.values())


def jitted(function, model):
    """``function(model, *operands)``, compiled for the operands.

    Weights are among them: XLA takes minutes to compute ahead what it can of large constants.
    """
    definition, params = protocol.split(model)
    run = jax.jit(lambda params, *x: function(protocol.merge(definition, params), *x))
    return functools.partial(run, params)


def model(config, stacked: bool = False, seed: int = 0):
    """A model with random values in every parameter, biases and scales too, alike in both forms.

    Not the initial values: those take longer to compile than most tests take to run.
    """
    rng = np.random.default_rng(seed)

    def draw(path, x):
        unit = 1.0 - config.norm.offset
        about, spread = {"scale": (unit, 0.2), "bias": (0.0, 0.2)}.get(path[-1].key, (0.0, 0.3))
        return (about + spread * rng.normal(size=x.shape)).astype(np.float32)

    abstract = protocol.split(zoo.build(config, abstract=True, stacked=True))[1]
    params = jax.tree_util.tree_map_with_path(draw, abstract)
    definition = protocol.split(zoo.build(config, abstract=True, stacked=stacked))[0]
    return protocol.merge(definition, jax.device_put(params if stacked else to_list(params)))


def filled_up(model, multiple: int, stacked: bool = False):
    """The model with a `vocab_multiple`, and with 9 in the rows and columns that are no token."""
    config = zoo.override(model.config, {"vocab_multiple": multiple})
    definition, wanted = protocol.split(zoo.build(config, abstract=True, stacked=stacked))

    def grow(x, like):
        behind = [(0, n - m) for m, n in zip(x.shape, like.shape, strict=True)]
        return np.pad(x, behind, constant_values=9)

    return protocol.merge(definition, jax.tree.map(grow, protocol.split(model)[1], wanted))


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


def flat(model) -> dict[str, np.ndarray]:
    """A model's parameters by path, in the stacked layout."""
    params = protocol.to_stacked(protocol.split(model)[1])
    return {path: np.asarray(x) for path, x in protocol.flat(params).items()}


def assert_same(one, other) -> None:
    """Two models have the same parameters, to the bit and the type."""
    a, b = flat(one), flat(other)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype and np.array_equal(a[path], b[path]), path
