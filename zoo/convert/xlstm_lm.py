"""The first xLSTM as its authors' `xLSTMLMModel` (PyPI xlstm 2) keeps it as ours, both ways.

Their package has no config.json; ours holds what ``dataclasses.asdict`` makes of their config, or
the keys of theirs in YAML, and can be given to `xLSTMLMModelConfig` as it is. The tensors are those
of ``model.state_dict()``. sLSTM weights lie in one of two ways, by the back end that made them,
each of which is a kind of its own here: "xlstm_lm" (vanilla) and "xlstm_lm_cuda".
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from layers.mlp import Mlp
from layers.mlstm import PreUpMLstm
from layers.norm import Norm
from layers.rnn import SLstm
from zoo.convert.family import Family, Settings, Unsupported
from zoo.convert.safetensors import Tensor
from zoo.convert.table import ConversionError, Rule
from zoo.xlstm import XLstm

_BLOCK = "xlstm_block_stack.blocks.{l}."
_KERNEL = "xlstm.slstm_cell._recurrent_kernel_"
# Of each back end: the axes of the recurrent kernels and of the biases.
_LAYOUTS = {
    "vanilla": ("h (g o) i -> g h i o", "(g h d) -> g h d"),
    "cuda": ("h i (g o) -> g h i o", "(h g d) -> g h d"),
}
_EPS = 1e-5  # That of all their norms.
_MOST_BLOCKS = 1 << 14
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "relu^2": "relu2", "swish": "silu"}
_THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}


def _rules(backend: str) -> Iterator[Rule]:
    recurrent, bias = _LAYOUTS[backend]

    def block(*rules, beside=""):
        for theirs, ours, axes in rules:
            yield Rule(_BLOCK + theirs, ours, axes, beside=beside)

    yield Rule("token_embedding.weight", "embed/table", "v d -> v d", pad="v")
    yield from block(
        ("xlstm_norm.weight", "mixer_norm/scale", "d -> d"),
        ("xlstm.conv1d.conv.weight", "mixer/conv/kernel", "(h k) () t -> t h k"),
        ("xlstm.conv1d.conv.bias", "mixer/conv/bias", "(h k) -> h k"),
        ("ffn_norm.weight", "mlp_norm/scale", "d -> d"),
        ("ffn.proj_up.weight", ("mlp/gate/kernel", "mlp/up/kernel"), "f d -> d f"),
        ("ffn.proj_down.weight", "mlp/down/kernel", "d f -> f d"),
    )
    yield from block(
        ("xlstm.proj_up.weight", ("mixer/up/kernel", "mixer/gate/kernel"), "(h k) d -> d h k"),
        ("xlstm.q_proj.weight", "mixer/query/kernel", "(h c) o i -> h c i o"),
        ("xlstm.k_proj.weight", "mixer/key/kernel", "(h c) o i -> h c i o"),
        ("xlstm.v_proj.weight", "mixer/value/kernel", "(h c) o i -> h c i o"),
        ("xlstm.mlstm_cell.igate.weight", "mixer/input_gate/kernel", "g (s h k) -> s h k g"),
        ("xlstm.mlstm_cell.igate.bias", "mixer/input_gate/bias", "h -> h"),
        ("xlstm.mlstm_cell.fgate.weight", "mixer/forget_gate/kernel", "g (s h k) -> s h k g"),
        ("xlstm.mlstm_cell.fgate.bias", "mixer/forget_gate/bias", "h -> h"),
        ("xlstm.mlstm_cell.outnorm.weight", "mixer/norm/scale", "(h k) -> h k"),
        ("xlstm.learnable_skip", "mixer/skip", "(h k) -> h k"),
        ("xlstm.proj_down.weight", "mixer/out/kernel", "d (h k) -> h k d"),
        beside="mixer/skip")
    yield from block(
        # Their modules fgate and igate make each other's pre-activations; R and bias do not.
        ("xlstm.fgate.weight", "mixer/input_gate/kernel", "h o i -> h i o"),
        ("xlstm.igate.weight", "mixer/forget_gate/kernel", "h o i -> h i o"),
        ("xlstm.zgate.weight", "mixer/cell_input/kernel", "h o i -> h i o"),
        ("xlstm.ogate.weight", "mixer/output_gate/kernel", "h o i -> h i o"),
        (_KERNEL, "mixer/cell/recurrent", recurrent),
        ("xlstm.slstm_cell._bias_", "mixer/cell/bias", bias),
        ("xlstm.group_norm.weight", "mixer/norm/scale", "(h k) -> h k"),
        beside="mixer/cell/recurrent")
    yield Rule("xlstm_block_stack.post_blocks_norm.weight", "norm/scale", "d -> d")
    yield Rule("lm_head.weight", "head", "v d -> d v", pad="v")
    # Of two names of one tensor, safetensors.torch.save_model keeps this one.
    yield Rule("lm_head.weight", "embed/table", "v d -> v d", pad="v")


# What the whole model's settings replace, what is of use in training alone, and how it is computed.
_KEPT = (
    "_block_map", "weight_decay_on_embedding",
    "slstm_block.feedforward.embedding_dim",
    *(f"mlstm_block.mlstm.{key}" for key in ("bias", "context_length", "dropout", "embedding_dim")),
    *(f"slstm_block.slstm.{key}" for key in (
        "batch_size", "bias_init", "constants", "dropout", "dtype", "dtype_a", "dtype_b", "dtype_g",
        "dtype_r", "dtype_s", "dtype_w", "embedding_dim", "enable_automatic_mixed_precision",
        "gradient_recurrent_cut", "hidden_size", "initial_val", "input_shape",
        "internal_input_shape", "num_gates", "num_states", "output_shape",
        "recurrent_weight_init")),
)  # fmt: skip


def _config(c: Settings, backend: str) -> XLstm:
    width, layers = c.whole("embedding_dim", 128), c.whole("num_blocks", 1)
    if layers > _MOST_BLOCKS:
        raise ConversionError(f"num_blocks is {layers}; it must be at most {_MOST_BLOCKS}")
    for key, needed in (("add_post_blocks_norm", True), ("bias", False)):
        if c.flag(key, needed) != needed:
            raise Unsupported(key, not needed, str(needed).lower())
    has_mlstm, has_slstm = (c.mapping(key) is not None for key in ("mlstm_block", "slstm_block"))
    at = set(c.wholes("slstm_at", layers) if has_mlstm else range(layers))
    if at and not has_slstm:
        raise ConversionError("slstm_block is null, and " + (
            f"slstm_at has {min(at)}" if has_mlstm else "mlstm_block is, too") + "; give it")
    blocks = _pattern("".join("s" if i in at else "m" for i in range(layers)))
    c.flatten(*["mlstm_block"] * has_mlstm, *["slstm_block"] * bool(at))
    if has_mlstm:
        mlstm = _mlstm(c, width)
    else:  # There is none, and there must be a config of one.
        mlstm = PreUpMLstm(1, _projected(c, "mlstm_block.mlstm", width, 2.0))
    dropout = c.number("dropout", 0.0)
    rates = {dropout, dropout if c.flag("add_embedding_dropout", dropout > 0) else 0.0}
    slstm = mlp = None
    if at:
        slstm, mlp = _slstm(c, backend), _mlp(c, width)
        rates.add(c.number("slstm_block.feedforward.dropout", dropout))
    if len(rates) > 1:
        c.note(f"there are several rates of dropout; it becomes {max(rates)}")
    return XLstm(
        vocab_size=c.whole("vocab_size"), width=width, num_layers=layers, blocks=blocks,
        mlstm=mlstm, slstm=slstm, mlp=mlp, norm=Norm("layer", _EPS, offset=1.0),
        max_length=c.whole("context_length"), tie_embeddings=c.flag("tie_weights", False),
        dropout=max(rates))


def _pattern(letters: str) -> str:
    """The shortest text that, over and over, begins with `letters`."""
    n = len(letters)
    return next(letters[:p] for p in range(1, n + 1)
                if (letters[:p] * (n // p + 1))[:n] == letters)


def _mlstm(c: Settings, width: int) -> PreUpMLstm:
    where = "mlstm_block.mlstm"
    c.mapping(where)
    inner = _projected(c, where, width, 2.0)
    heads, block = c.whole(f"{where}.num_heads", 4), c.whole(f"{where}.qkv_proj_blocksize", 4)
    if inner % (heads * block):
        raise ConversionError(f"{where} has an inner width of {inner}, which does not divide into "
                              f"{heads} heads of blocks of {block}")
    return PreUpMLstm(heads, inner // heads, taps=c.whole(f"{where}.conv1d_kernel_size", 4),
                      block=block, norm_eps=_EPS)


def _slstm(c: Settings, backend: str) -> SLstm:
    where = "slstm_block.slstm"
    c.mapping(where)
    if c.text(f"{where}.function", "slstm") != "slstm":
        raise Unsupported(f"{where}.function", c.text(f"{where}.function"), "slstm")
    if not c.flag(f"{where}.group_norm_weight", True):
        raise Unsupported(f"{where}.group_norm_weight", False, "true")
    for key in ("gradient_recurrent_clipval", "forward_clipval"):  # Either clips the output, too.
        if (value := c.number(f"{where}.{key}", None)) is not None:
            raise Unsupported(f"{where}.{key}", value, "null")
    if (found := c.text(f"{where}.backend", backend)) != backend:
        raise ConversionError(
            f"{where}.backend is {found!r}, and by the shape of {_KERNEL} the tensors look like "
            f"the layout of {backend!r}; give {backend!r}, or the checkpoint that belongs to it")
    return SLstm(c.whole(f"{where}.num_heads", 4), c.whole(f"{where}.conv1d_kernel_size", 4),
                 norm_eps=_EPS)


def _mlp(c: Settings, width: int) -> Mlp:
    where = "slstm_block.feedforward"
    if c.mapping(where, {}) is None:
        raise Unsupported(where, None, "one with its settings")
    if c.text(f"{where}.ff_type", "ffn_gated") != "ffn_gated":
        raise Unsupported(f"{where}.ff_type", c.text(f"{where}.ff_type"), "ffn_gated")
    if c.flag(f"{where}.bias", False):
        raise Unsupported(f"{where}.bias", True, "false")
    name = c.text(f"{where}.act_fn", "gelu")
    if name not in _ACTIVATIONS:
        raise Unsupported(f"{where}.act_fn", name, ", ".join(_ACTIVATIONS))
    return Mlp(_projected(c, where, width, 1.3), _ACTIVATIONS[name])


def _projected(c: Settings, where: str, width: int, default: float) -> int:
    """An inner width: a multiple of the stream's, rounded."""
    factor = c.number(f"{where}.proj_factor", default)
    step = c.whole(f"{where}.round_proj_up_to_multiple_of", 64)
    rounded = math.ceil if c.flag(f"{where}.round_proj_up_dim_up", True) else math.floor
    if not 0 < factor * width < 1 << 32 or not (size := rounded(factor * width / step) * step):
        raise ConversionError(f"{where}.proj_factor is {factor}, which makes no width of {width}")
    return size


def _dict(config: XLstm, backend: str) -> dict[str, Any]:
    m, s, width = config.mlstm, config.slstm, config.width
    if not isinstance(m, PreUpMLstm):
        raise Unsupported("mlstm", type(m).__name__, "PreUpMLstm")
    found = {
        "vocab_size": config.vocab_size, "embedding_dim": width, "num_blocks": config.num_layers,
        "context_length": config.max_length, "tie_weights": config.tie_embeddings,
        "dropout": config.dropout, "add_embedding_dropout": config.dropout > 0, "bias": False,
        "add_post_blocks_norm": True,
        "slstm_at": [i for i, kind in enumerate(_letters(config)) if kind == "s"],
        "mlstm_block": {"mlstm": {
            "num_heads": m.num_heads, "conv1d_kernel_size": m.taps, "qkv_proj_blocksize": m.block,
            **_factor(m.num_heads * m.head_dim, width)}},
    }
    if not found["slstm_at"]:
        return found
    if config.mlp.activation not in _THEIR_ACTIVATIONS:
        raise Unsupported("mlp.activation", config.mlp.activation, ", ".join(_THEIR_ACTIVATIONS))
    return found | {"slstm_block": {
        "slstm": {"backend": backend, "num_heads": s.num_heads, "conv1d_kernel_size": s.taps},
        "feedforward": {"act_fn": _THEIR_ACTIVATIONS[config.mlp.activation],
                        "dropout": config.dropout, **_factor(config.mlp.hidden, width)}}}


def _factor(size: int, width: int) -> dict[str, Any]:
    """What times `width` is `size`, rounded up."""
    factor = size / width
    return {"proj_factor": factor if factor * width <= size else math.nextafter(factor, 0.0),
            "round_proj_up_dim_up": True, "round_proj_up_to_multiple_of": 1}


def _letters(config: XLstm) -> str:
    """The kind of every block."""
    n = config.num_layers
    return (config.blocks * (n // len(config.blocks) + 1))[:n]


def _comparable(config: XLstm) -> XLstm:
    """The config without what a config.json does not say, its blocks one by one."""
    letters = _letters(config)
    used = {"mlstm": config.mlstm if "m" in letters else None}
    if "s" not in letters:
        used |= {"slstm": None, "mlp": None}
    return dataclasses.replace(config, blocks=letters, vocab_multiple=1, **used)


def _known_by(backend: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are a config and tensors of this back end's: by the shape of a recurrent
    kernel, and where there is none by what the config says."""
    if not {"mlstm_block", "slstm_block"} & values.keys():
        return False
    stated = values
    for key in ("slstm_block", "slstm", "backend"):
        stated = stated.get(key) if isinstance(stated, Mapping) else None
    kernel = next((x for key, x in tensors.items() if key.endswith(_KERNEL)), None)
    if kernel is not None and len(kernel.shape) == 3:
        _, rows, columns = kernel.shape
        stated = "cuda" if columns == 4 * rows else "vanilla"
    return (stated == "cuda") == (backend == "cuda")


def _family(model_type: str, backend: str) -> Family:
    return Family(
        model_type, "xLSTMLMModel", functools.partial(_config, backend=backend),
        functools.partial(_dict, backend=backend), tuple(_rules(backend)),
        probe="token_embedding.weight", comparable=_comparable, kept=_KEPT,
        known_by=functools.partial(_known_by, backend))


FAMILIES = (_family("xlstm_lm", "vanilla"), _family("xlstm_lm_cuda", "cuda"))
