"""xLSTM of Hugging Face's and of its authors as ours, both ways.

Their tensors differ in the name of the token table; some checkpoints keep projections of one input
as one matrix.
"""

import dataclasses
import math
from typing import Any

from layers.mlp import Mlp
from layers.mlstm import EPS, MLstm
from layers.norm import Norm
from zoo.convert.family import Family, Settings, Unsupported
from zoo.convert.table import ConversionError, Rule
from zoo.xlstm import XLstm

_BLOCK = "backbone.blocks.{l}."


def _in_layer(*rules: tuple[str, Any, str]) -> tuple[Rule, ...]:
    return tuple(Rule(_BLOCK + theirs, ours, axes) for theirs, ours, axes in rules)


_XLSTM = (
    Rule("backbone.embeddings.weight", "embed/table", "v d -> v d", pad="v"),
    *_in_layer(
        ("norm_mlstm.weight", "mixer_norm/scale", "d -> d"),
        ("mlstm_layer.q.weight", "mixer/query/kernel", "(h k) d -> d h k"),
        ("mlstm_layer.k.weight", "mixer/key/kernel", "(h k) d -> d h k"),
        ("mlstm_layer.v.weight", "mixer/value/kernel", "(h v) d -> d h v"),
        ("mlstm_layer.ogate_preact.weight", "mixer/output_gate/kernel", "(h v) d -> d h v"),
        ("mlstm_layer.igate_preact.weight", "mixer/input_gate/kernel", "h d -> d h"),
        ("mlstm_layer.igate_preact.bias", "mixer/input_gate/bias", "h -> h"),
        ("mlstm_layer.fgate_preact.weight", "mixer/forget_gate/kernel", "h d -> d h"),
        ("mlstm_layer.fgate_preact.bias", "mixer/forget_gate/bias", "h -> h"),
        ("mlstm_layer.multihead_norm.weight", "mixer/norm/scale", "(h v) -> h v"),
        ("mlstm_layer.out_proj.weight", "mixer/out/kernel", "d (h v) -> h v d"),
        ("norm_ffn.weight", "mlp_norm/scale", "d -> d"),
        ("ffn.proj_up_gate.weight", "mlp/gate/kernel", "f d -> d f"),
        ("ffn.proj_up.weight", "mlp/up/kernel", "f d -> d f"),
        ("ffn.proj_down.weight", "mlp/down/kernel", "d f -> f d"),
        # Fused.
        ("mlstm_layer.qkv_opreact.weight",
         tuple(f"mixer/{name}/kernel" for name in ("query", "key", "value", "output_gate")),
         "(h k) d -> d h k"),
        ("mlstm_layer.ifgate_preact.weight",
         ("mixer/input_gate/kernel", "mixer/forget_gate/kernel"), "h d -> d h"),
        ("mlstm_layer.ifgate_preact.bias", ("mixer/input_gate/bias", "mixer/forget_gate/bias"),
         "h -> h"),
        ("ffn.proj_up_gate_z.weight", ("mlp/gate/kernel", "mlp/up/kernel"), "f d -> d f"),
    ),
    Rule("backbone.out_norm.weight", "norm/scale", "d -> d"),
    Rule("lm_head.weight", "head", "v d -> d v", pad="v"),
)

# How they compute it: which kernels, in what pieces and types.
_KERNELS = (
    "autocast_kernel_dtype", "chunk_size", "chunkwise_kernel", "force_bos_token_insert",
    "inference_state_dtype", "max_inference_chunksize", "mode", "norm_reduction_force_float32",
    "return_last_states", "sequence_kernel", "step_kernel",
)  # fmt: skip
_MAX_LENGTH = 131072  # No config.json gives one.


def _config(c: Settings) -> XLstm:
    width, heads = _either(c, "hidden_size", "embedding_dim"), c.whole("num_heads", 8)
    for key, needed in (("use_bias", False), ("add_out_norm", True),
                        ("tie_word_embeddings", False)):
        if c.flag(key, needed) != needed:
            raise Unsupported(key, not needed, str(needed).lower())
    if c.number("eps", EPS) != EPS:
        raise Unsupported("eps", c.number("eps"), str(EPS))
    if "siging" in c.text("chunkwise_kernel", ""):
        raise Unsupported("chunkwise_kernel", c.text("chunkwise_kernel"),
                          "one with exponential input gates")
    c.text("weight_mode", "single")  # The tensors say it themselves.

    def head_dim(key, default):
        size = int(width * c.number(key, default))
        if size < heads or size % heads:
            raise ConversionError(f"{key} makes {size} dimensions of {width}, which do not divide "
                                  f"into num_heads = {heads}")
        return size // heads

    eps, step = c.number("norm_eps", 1e-6), c.whole("ffn_round_up_to_multiple_of", 64)
    hidden = width * c.number("ffn_proj_factor", 2.667)
    return XLstm(
        vocab_size=c.whole("vocab_size"), width=width,
        num_layers=_either(c, "num_hidden_layers", "num_blocks"),
        mlstm=MLstm(heads, key_dim=head_dim("qk_dim_factor", 0.5),
                    value_dim=head_dim("v_dim_factor", 1.0),
                    gate_softcap=c.number("gate_soft_cap", 15.0), norm_eps=eps),
        # As they round: what is above a multiple by less than one stays there.
        mlp=Mlp(int((hidden + step - 1) // step * step)), norm=Norm("rms", eps),
        max_length=_MAX_LENGTH, logit_softcap=c.number("output_logit_soft_cap", 30.0))


def _either(c: Settings, key: str, other: str) -> int:
    """The number that stands under one of two names, or both."""
    found = {c.whole(key, None), c.whole(other, None)} - {None}
    if len(found) != 1:
        raise ConversionError(f"{key} and {other} are {sorted(found)}; they must be one number")
    return found.pop()


def _dict(config: XLstm) -> dict[str, Any]:
    m, width, layers = config.mlstm, config.width, config.num_layers
    if not isinstance(m, MLstm):
        raise Unsupported("mlstm", type(m).__name__, "MLstm")
    return {
        "vocab_size": config.vocab_size, "hidden_size": width, "embedding_dim": width,
        "num_hidden_layers": layers, "num_blocks": layers, "num_heads": m.num_heads,
        "qk_dim_factor": _factor(m.num_heads * m.key_dim, width),
        "v_dim_factor": _factor(m.num_heads * m.value_dim, width),
        "ffn_proj_factor": _factor(config.mlp.hidden, width), "ffn_round_up_to_multiple_of": 1,
        "gate_soft_cap": m.gate_softcap, "output_logit_soft_cap": config.logit_softcap,
        "norm_eps": config.norm.eps, "eps": EPS, "use_bias": False, "add_out_norm": True,
        "tie_word_embeddings": config.tie_embeddings, "weight_mode": "single",
    }


def _factor(size: int, width: int) -> float:
    """What times `width` is `size`, and no hair less: they cut off what is behind the point."""
    factor = size / width
    return factor if int(width * factor) == size else math.nextafter(factor, math.inf)


def _comparable(config: XLstm) -> XLstm:
    """The config without what a config.json does not say."""
    return dataclasses.replace(config, dropout=0.0, max_length=_MAX_LENGTH, vocab_multiple=1)


FAMILIES = (
    Family("xlstm", "xLSTMForCausalLM", _config, _dict, _XLSTM, probe=_XLSTM[0].theirs,
           comparable=_comparable, variants=({"backbone.embeddings.": "embedding."},),
           kept=_KERNELS),
)
