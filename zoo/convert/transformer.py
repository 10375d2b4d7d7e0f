"""Hugging Face's Transformers as ours, both ways: Llama, Qwen, Mistral, Gemma, Mixtral, GPT-2.

Each family is a row of `FAMILIES`: its name in a config.json, how that file and our config say the
same, and the table of its tensors.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from layers.attention import Attention
from layers.mlp import Mlp
from layers.moe import Moe
from layers.norm import Norm
from layers.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling
from zoo.convert.family import Family, Settings, Unsupported
from zoo.convert.table import Rule
from zoo.transformer import Transformer

# --- tensors ---------------------------------------------------------------------------------

_LAYER = "model.layers.{l}."


def _in_layer(*rules: tuple[str, str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(_LAYER + theirs, ours, axes) for theirs, ours, axes in rules)


_ATTENTION = (
    Rule("model.embed_tokens.weight", "embed/table", "v d -> v d", pad="v"),
    *_in_layer(
        ("input_layernorm.weight", "mixer_norm/scale", "d -> d"),
        ("self_attn.q_proj.weight", "mixer/query/kernel", "(h k) d -> d h k"),
        ("self_attn.k_proj.weight", "mixer/key/kernel", "(h k) d -> d h k"),
        ("self_attn.v_proj.weight", "mixer/value/kernel", "(h k) d -> d h k"),
        ("self_attn.o_proj.weight", "mixer/out/kernel", "d (h k) -> h k d"),
        ("self_attn.q_proj.bias", "mixer/query/bias", "(h k) -> h k"),
        ("self_attn.k_proj.bias", "mixer/key/bias", "(h k) -> h k"),
        ("self_attn.v_proj.bias", "mixer/value/bias", "(h k) -> h k"),
        ("self_attn.o_proj.bias", "mixer/out/bias", "d -> d"),
        ("self_attn.q_norm.weight", "mixer/query_norm/scale", "k -> k"),
        ("self_attn.k_norm.weight", "mixer/key_norm/scale", "k -> k"),
    ),
    Rule("model.norm.weight", "norm/scale", "d -> d"),
    Rule("lm_head.weight", "head", "v d -> d v", pad="v"),
)
_NORMS = _in_layer(("post_attention_layernorm.weight", "mlp_norm/scale", "d -> d"))
_MLP = _in_layer(
    ("mlp.gate_proj.weight", "mlp/gate/kernel", "f d -> d f"),
    ("mlp.up_proj.weight", "mlp/up/kernel", "f d -> d f"),
    ("mlp.down_proj.weight", "mlp/down/kernel", "d f -> f d"),
    ("mlp.gate_proj.bias", "mlp/gate/bias", "f -> f"),
    ("mlp.up_proj.bias", "mlp/up/bias", "f -> f"),
    ("mlp.down_proj.bias", "mlp/down/bias", "d -> d"),
)
_LLAMA = _ATTENTION + _NORMS + _MLP
# Gemma's norms after the branches take the name that the others give to the one before the MLP.
_GEMMA = _ATTENTION + _MLP + _in_layer(
    ("post_attention_layernorm.weight", "mixer_post_norm/scale", "d -> d"),
    ("pre_feedforward_layernorm.weight", "mlp_norm/scale", "d -> d"),
    ("post_feedforward_layernorm.weight", "mlp_post_norm/scale", "d -> d"),
)
_MIXTRAL = _ATTENTION + _NORMS + _in_layer(
    ("block_sparse_moe.gate.weight", "mlp/router/kernel", "e d -> d e"),
    ("block_sparse_moe.experts.{e}.w1.weight", "mlp/gate/kernel", "f d -> e d f"),
    ("block_sparse_moe.experts.{e}.w3.weight", "mlp/up/kernel", "f d -> e d f"),
    ("block_sparse_moe.experts.{e}.w2.weight", "mlp/down/kernel", "d f -> e f d"),
)
_QWEN_MOE = _ATTENTION + _NORMS + _in_layer(
    ("mlp.gate.weight", "mlp/router/kernel", "e d -> d e"),
    ("mlp.experts.{e}.gate_proj.weight", "mlp/gate/kernel", "f d -> e d f"),
    ("mlp.experts.{e}.up_proj.weight", "mlp/up/kernel", "f d -> e d f"),
    ("mlp.experts.{e}.down_proj.weight", "mlp/down/kernel", "d f -> e f d"),
    ("mlp.shared_expert.gate_proj.weight", "mlp/shared/gate/kernel", "f d -> d f"),
    ("mlp.shared_expert.up_proj.weight", "mlp/shared/up/kernel", "f d -> d f"),
    ("mlp.shared_expert.down_proj.weight", "mlp/shared/down/kernel", "d f -> f d"),
    ("mlp.shared_expert_gate.weight", "mlp/shared_gate/kernel", "s d -> d s"),
)
_H = "transformer.h.{l}."
_QKV = ("mixer/query/", "mixer/key/", "mixer/value/")
# GPT-2 stores its matrices inputs first, and the three of attention as one.
_GPT2 = (
    Rule("transformer.wte.weight", "embed/table", "v d -> v d", pad="v"),
    Rule("transformer.wpe.weight", "positions/table", "t d -> t d"),
    Rule(_H + "ln_1.weight", "mixer_norm/scale", "d -> d"),
    Rule(_H + "ln_1.bias", "mixer_norm/bias", "d -> d"),
    Rule(_H + "attn.c_attn.weight", tuple(p + "kernel" for p in _QKV), "d (h k) -> d h k", axis=1),
    Rule(_H + "attn.c_attn.bias", tuple(p + "bias" for p in _QKV), "(h k) -> h k"),
    Rule(_H + "attn.c_proj.weight", "mixer/out/kernel", "(h k) d -> h k d"),
    Rule(_H + "attn.c_proj.bias", "mixer/out/bias", "d -> d"),
    Rule(_H + "ln_2.weight", "mlp_norm/scale", "d -> d"),
    Rule(_H + "ln_2.bias", "mlp_norm/bias", "d -> d"),
    Rule(_H + "mlp.c_fc.weight", "mlp/up/kernel", "d f -> d f"),
    Rule(_H + "mlp.c_fc.bias", "mlp/up/bias", "f -> f"),
    Rule(_H + "mlp.c_proj.weight", "mlp/down/kernel", "f d -> f d"),
    Rule(_H + "mlp.c_proj.bias", "mlp/down/bias", "d -> d"),
    Rule("transformer.ln_f.weight", "norm/scale", "d -> d"),
    Rule("transformer.ln_f.bias", "norm/bias", "d -> d"),
    Rule("lm_head.weight", "head", "v d -> d v", pad="v"),
)

# --- config.json -----------------------------------------------------------------------------

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
                "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2"}
_THEIR_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh",
                      "relu": "relu", "relu2": "relu2"}
_LOCAL, _FULL = "sliding_attention", "full_attention"


def _rope(c: Settings, theta: float) -> Rope:
    """Of ``rope_parameters``, or as it was before transformers 5, theta and ``rope_scaling``."""
    given = c.mapping("rope_parameters")
    scaling = given or c.mapping("rope_scaling")
    if given is None:
        theta = c.number("rope_theta", theta)
    return _rope_of(c, scaling or {}, theta)


def _rope_of(c: Settings, scaling: Mapping[str, Any], theta: float) -> Rope:
    s = Settings(scaling, "its rope's scaling")
    kind = s.text("rope_type", None) or s.text("type", "default")
    theta = s.number("rope_theta", theta)
    if s.number("partial_rotary_factor", 1.0) != 1.0:
        raise Unsupported("partial_rotary_factor", scaling["partial_rotary_factor"], "1")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, LinearScaling(s.number("factor")))
    length = s.whole("original_max_position_embeddings", None)
    if length is None:
        length = c.whole("max_position_embeddings")
    if kind == "llama3":
        return Rope(theta, Llama3Scaling(s.number("factor"), s.number("low_freq_factor"),
                                         s.number("high_freq_factor"), length))
    if kind == "yarn":
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if scaling.get(name) is not None:
                raise Unsupported(name, scaling[name], "null")
        if scaling.get("truncate") is False:
            raise Unsupported("truncate", False, "true")
        return Rope(theta, YarnScaling(s.number("factor"), s.number("beta_fast", 32.0),
                                       s.number("beta_slow", 1.0), length))
    raise Unsupported("rope_type", kind, "default, linear, llama3 or yarn")


def _rope_dict(rope: Rope) -> dict[str, Any]:
    """The inverse of `_rope_of`."""
    found: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": "default"}
    match rope.scaling:
        case LinearScaling(factor):
            found |= {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, low, high, length):
            found |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low,
                      "high_freq_factor": high, "original_max_position_embeddings": length}
        case YarnScaling(factor, fast, slow, length):
            found |= {"rope_type": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": slow,
                      "original_max_position_embeddings": length}
    return found


def _rope_keys(rope: Rope) -> dict[str, Any]:
    """In the form that transformers 4 and 5 both read."""
    found = _rope_dict(rope)
    theta = found.pop("rope_theta")
    return {"rope_theta": theta,
            "rope_scaling": None if found["rope_type"] == "default" else found}


def _activation(c: Settings, key: str = "hidden_act", default: str = "silu") -> str:
    name = c.text(key, default)
    if name not in _ACTIVATIONS:
        raise Unsupported(key, name, ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[name]


def _heads(c: Settings, *, kv_default: int | None = None, head_dim: int | None = None
           ) -> tuple[int, int, int]:
    heads = c.whole("num_attention_heads")
    groups = c.whole("num_key_value_heads", kv_default or heads)
    return heads, groups, c.whole("head_dim", head_dim or c.whole("hidden_size") // heads)


def _common(c: Settings, *, tie: bool = False) -> dict[str, Any]:
    if c.number("attention_dropout", 0.0):
        c.note("attention_dropout is left out: parazoo has no dropout on attention's weights")
    return {
        "vocab_size": c.whole("vocab_size"), "width": c.whole("hidden_size"),
        "num_layers": c.whole("num_hidden_layers"),
        "max_length": c.whole("max_position_embeddings"),
        "tie_embeddings": c.flag("tie_word_embeddings", tie),
    }


def _window(c: Settings, default: int | None) -> int | None:
    """The window that all layers share, from the several ways to say so."""
    window = c.whole("sliding_window", default, null=None)
    layers, kinds = c.whole("num_hidden_layers"), c.texts("layer_types")
    if not c.flag("use_sliding_window", True):
        window = None
    elif kinds is None and "use_sliding_window" in c:
        first = c.whole("max_window_layers", 28, least=0)
        kinds = [_FULL] * min(first, layers) + [_LOCAL] * max(0, layers - first)
    if kinds is None or window is None:
        return window
    if len(set(kinds)) > 1:
        raise Unsupported("layer_types", "of several kinds", "one kind for all layers")
    return window if kinds[:1] == [_LOCAL] else None


def _llama_config(c: Settings) -> Transformer:
    bias = c.flag("attention_bias", False)
    return Transformer(
        **_common(c), norm=Norm("rms", c.number("rms_norm_eps", 1e-6)),
        attention=Attention(*_heads(c), rope=_rope(c, 1e4), qkv_bias=bias, out_bias=bias),
        mlp=Mlp(c.whole("intermediate_size"), _activation(c), bias=c.flag("mlp_bias", False)))


def _mistral_config(c: Settings) -> Transformer:
    return Transformer(
        **_common(c), norm=Norm("rms", c.number("rms_norm_eps", 1e-6)),
        attention=Attention(*_heads(c, kv_default=8), rope=_rope(c, 1e4),
                            window=_window(c, 4096)),
        mlp=Mlp(c.whole("intermediate_size"), _activation(c)))


def _qwen2_config(c: Settings) -> Transformer:
    return Transformer(
        **_common(c), norm=Norm("rms", c.number("rms_norm_eps", 1e-6)),
        attention=Attention(*_heads(c), rope=_rope(c, 1e4), qkv_bias=True,
                            window=_qwen_window(c)),
        mlp=Mlp(c.whole("intermediate_size"), _activation(c)))


def _qwen_window(c: Settings) -> int | None:
    return _window(c, 4096) if c.flag("use_sliding_window", False) else None


def _qwen3_attention(c: Settings, head_dim: int | None, window: int | None) -> Attention:
    bias = c.flag("attention_bias", False)
    return Attention(*_heads(c, head_dim=head_dim), rope=_rope(c, 1e4), qkv_bias=bias,
                     out_bias=bias, window=window,
                     qk_norm=Norm("rms", c.number("rms_norm_eps", 1e-6)))


def _qwen3_config(c: Settings) -> Transformer:
    return Transformer(
        **_common(c), norm=Norm("rms", c.number("rms_norm_eps", 1e-6)),
        attention=_qwen3_attention(c, 128, _qwen_window(c)),
        mlp=Mlp(c.whole("intermediate_size"), _activation(c)))


def _moe(c: Settings, hidden: int, **options) -> Moe:
    # transformers writes either name for several families, by version.
    name = next((k for k in ("num_experts", "num_local_experts") if k in c), "num_experts")
    return Moe(num_experts=c.whole(name), top_k=c.whole("num_experts_per_tok"), hidden=hidden,
               activation=_activation(c), balance_loss=c.number("router_aux_loss_coef", 0.001),
               z_loss=0.0, **options)


def _all_sparse(c: Settings) -> None:
    if c.whole("decoder_sparse_step", 1) != 1 or c.texts("mlp_only_layers"):
        raise Unsupported("decoder_sparse_step / mlp_only_layers", "a mix of dense and expert "
                          "layers", "1 and []: experts in every layer")


def _qwen3_moe_config(c: Settings) -> Transformer:
    _all_sparse(c)
    # Here all layers have the window, whatever max_window_layers says.
    window = c.whole("sliding_window", 4096, null=None)
    if not c.flag("use_sliding_window", False):
        window = None
    return Transformer(
        **_common(c), norm=Norm("rms", c.number("rms_norm_eps", 1e-6)),
        attention=_qwen3_attention(c, None, window),
        mlp=_moe(c, c.whole("moe_intermediate_size"),
                 normalize=c.flag("norm_topk_prob", False)))


def _qwen2_moe_config(c: Settings) -> Transformer:
    _all_sparse(c)
    return Transformer(
        **_common(c), norm=Norm("rms", c.number("rms_norm_eps", 1e-6)),
        attention=Attention(*_heads(c), rope=_rope(c, 1e4), qkv_bias=c.flag("qkv_bias", True),
                            window=_qwen_window(c)),
        mlp=_moe(c, c.whole("moe_intermediate_size"),
                 normalize=c.flag("norm_topk_prob", False),
                 shared_hidden=c.whole("shared_expert_intermediate_size")))


def _mixtral_config(c: Settings) -> Transformer:
    if c.number("router_jitter_noise", 0.0):
        c.note("router_jitter_noise is left out: parazoo routes without noise")
    return Transformer(
        **_common(c), norm=Norm("rms", c.number("rms_norm_eps", 1e-5)),
        attention=Attention(*_heads(c, kv_default=8), rope=_rope(c, 1e6),
                            window=_window(c, None)),
        mlp=_moe(c, c.whole("intermediate_size"), normalize=True))


def _gemma(c: Settings, *, softcap: float | None, logit_softcap: float | None, qk_norm: bool,
           ropes: tuple[Rope, Rope], period: int) -> Transformer:
    """`logit_softcap` and `period`: defaults; `ropes`: local and global."""
    if c.flag("use_bidirectional_attention", False):
        raise Unsupported("use_bidirectional_attention", True, "false")
    common = _common(c, tie=True)
    norm = Norm("rms", c.number("rms_norm_eps", 1e-6), offset=1.0)
    heads, groups, size = _heads(c, kv_default=4, head_dim=256)
    bias = c.flag("attention_bias", False)
    scalar = c.number("query_pre_attn_scalar", 256)
    windows = (c.whole("sliding_window", 4096, null=None), None)
    local, full = (
        Attention(heads, groups, size, rope=rope, qkv_bias=bias, out_bias=bias,
                  softcap=softcap, scale=scalar**-0.5, window=window,
                  qk_norm=norm if qk_norm else None)
        for rope, window in zip(ropes, windows, strict=True))
    kinds = c.texts("layer_types")
    period = c.whole("sliding_window_pattern", period)
    if kinds is not None:
        period = kinds.index(_FULL) + 1 if _FULL in kinds else max(period, len(kinds) + 1)
        expected = [_FULL if (i + 1) % period == 0 else _LOCAL for i in range(len(kinds))]
        if kinds != expected or len(kinds) != common["num_layers"]:
            raise Unsupported("layer_types", "without a period", "so many sliding_attention, then "
                              "one full_attention, again and again")
    # More local layers than there are layers mean the same as one of each.
    period = min(period, common["num_layers"] + 1)
    several = {"local": local, "local_layers": period - 1} if period > 1 else {}
    return Transformer(
        **common, norm=norm, attention=full, **several, post_norms=True,
        mlp=Mlp(c.whole("intermediate_size"),
                _activation(c, "hidden_activation", "gelu_pytorch_tanh")),
        embed_scale=common["width"] ** 0.5,
        logit_softcap=c.number("final_logit_softcapping", logit_softcap, null=None))


def _gemma2_config(c: Settings) -> Transformer:
    rope = _rope(c, 1e4)
    softcap = c.number("attn_logit_softcapping", 50.0, null=None)
    return _gemma(c, softcap=softcap, logit_softcap=30.0, qk_norm=False, ropes=(rope, rope),
                  period=2)


def _gemma3_config(c: Settings) -> Transformer:
    # As a text_config it leaves out what transformers has as its class's defaults.
    c.fill(vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
           num_attention_heads=8, max_position_embeddings=131072)
    both = c.mapping("rope_parameters")
    if both is None:
        ropes = (Rope(c.number("rope_local_base_freq", 1e4)), _rope(c, 1e6))
    else:
        nested = Settings(both, "its rope_parameters")
        ropes = (_rope_of(c, nested.mapping(_LOCAL) or {}, 1e4),
                 _rope_of(c, nested.mapping(_FULL) or {}, 1e6))
    # attn_logit_softcapping may stand there, and transformers caps no scores of this family.
    return _gemma(c, softcap=None, logit_softcap=None, qk_norm=True, ropes=ropes, period=6)


def _gpt2_config(c: Settings) -> Transformer:
    for key, needed in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False),
                        ("add_cross_attention", False)):
        if c.flag(key, needed) != needed:
            raise Unsupported(key, not needed, str(needed).lower())
    width, heads = c.whole("n_embd", 768), c.whole("n_head", 12)
    rates = {c.number(key, 0.1) for key in ("resid_pdrop", "embd_pdrop")}
    if len(rates) > 1:
        c.note(f"resid_pdrop and embd_pdrop differ; dropout becomes {max(rates)}")
    if c.number("attn_pdrop", 0.1):
        c.note("attn_pdrop is left out: parazoo has no dropout on attention's weights")
    return Transformer(
        vocab_size=c.whole("vocab_size", 50257), width=width, num_layers=c.whole("n_layer", 12),
        attention=Attention(heads, heads, width // heads, qkv_bias=True, out_bias=True),
        mlp=Mlp(c.whole("n_inner", 4 * width),
                _activation(c, "activation_function", "gelu_new"), gated=False, bias=True),
        norm=Norm("layer", c.number("layer_norm_epsilon", 1e-5), bias=True),
        max_length=c.whole("n_positions", 1024), tie_embeddings=c.flag("tie_word_embeddings", True),
        learned_positions=True, dropout=max(rates))


# --- and back --------------------------------------------------------------------------------


def _base(config: Transformer) -> dict[str, Any]:
    """The keys that the Llama lineage shares."""
    a = config.attention
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.width,
        "num_hidden_layers": config.num_layers, "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads, "head_dim": a.head_dim,
        "max_position_embeddings": config.max_length, "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings, "attention_dropout": 0.0,
        **({} if a.rope is None else _rope_keys(a.rope)),
    }


def _dense(config: Transformer) -> dict[str, Any]:
    if not isinstance(config.mlp, Mlp):
        raise Unsupported("mlp", type(config.mlp).__name__, "Mlp")
    return {**_base(config), "intermediate_size": config.mlp.hidden,
            "hidden_act": _THEIR_ACTIVATIONS[config.mlp.activation]}


def _sparse(config: Transformer, experts: str, hidden: str) -> dict[str, Any]:
    moe = config.mlp
    if not isinstance(moe, Moe):
        raise Unsupported("mlp", type(moe).__name__, "Moe")
    return {**_base(config), experts: moe.num_experts, "num_experts_per_tok": moe.top_k,
            hidden: moe.hidden, "hidden_act": _THEIR_ACTIVATIONS[moe.activation],
            "router_aux_loss_coef": moe.balance_loss}


def _llama_dict(config: Transformer) -> dict[str, Any]:
    return {**_dense(config), "attention_bias": config.attention.qkv_bias,
            "mlp_bias": config.mlp.bias}


def _mistral_dict(config: Transformer) -> dict[str, Any]:
    return {**_dense(config), "sliding_window": config.attention.window}


def _qwen_window_dict(config: Transformer) -> dict[str, Any]:
    window = config.attention.window
    return {"use_sliding_window": window is not None, "sliding_window": window,
            "max_window_layers": 0 if window is not None else config.num_layers}


def _qwen2_dict(config: Transformer) -> dict[str, Any]:
    return {**_dense(config), **_qwen_window_dict(config)}


def _qwen3_dict(config: Transformer) -> dict[str, Any]:
    return {**_dense(config), **_qwen_window_dict(config),
            "attention_bias": config.attention.qkv_bias}


def _mixtral_dict(config: Transformer) -> dict[str, Any]:
    return {**_sparse(config, "num_local_experts", "intermediate_size"),
            "sliding_window": config.attention.window}


_QWEN_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}


def _qwen3_moe_dict(config: Transformer) -> dict[str, Any]:
    return {**_sparse(config, "num_experts", "moe_intermediate_size"), **_QWEN_SPARSE,
            **_qwen_window_dict(config), "intermediate_size": config.mlp.hidden,
            "norm_topk_prob": config.mlp.normalize, "attention_bias": config.attention.qkv_bias}


def _qwen2_moe_dict(config: Transformer) -> dict[str, Any]:
    found = _sparse(config, "num_experts", "moe_intermediate_size")
    if config.mlp.shared_hidden is None:
        raise Unsupported("mlp.shared_hidden", None, "a width")
    return {**found, **_QWEN_SPARSE, **_qwen_window_dict(config),
            "intermediate_size": config.mlp.hidden, "norm_topk_prob": config.mlp.normalize,
            "shared_expert_intermediate_size": config.mlp.shared_hidden,
            "qkv_bias": config.attention.qkv_bias}


def _gemma_dict(config: Transformer) -> dict[str, Any]:
    a, local = config.attention, config.local or config.attention
    found = _dense(config)
    period = config.local_layers + 1
    scalar = a.head_dim if a.scale is None else a.scale**-2
    return {
        **found, "hidden_activation": found.pop("hidden_act"),
        "attention_bias": a.qkv_bias, "attn_logit_softcapping": a.softcap,
        "final_logit_softcapping": config.logit_softcap, "sliding_window": local.window,
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "layer_types": [_FULL if (i + 1) % period == 0 else _LOCAL
                        for i in range(config.num_layers)],
    }


def _gemma3_dict(config: Transformer) -> dict[str, Any]:
    local = config.local or config.attention
    if local.rope is None or local.rope.scaling is not None:
        raise Unsupported("local.rope", local.rope, "a rope without scaling")
    return {**_gemma_dict(config), "rope_local_base_freq": local.rope.theta,
            "sliding_window_pattern": config.local_layers + 1}


def _gpt2_dict(config: Transformer) -> dict[str, Any]:
    if not isinstance(config.mlp, Mlp):
        raise Unsupported("mlp", type(config.mlp).__name__, "Mlp")
    activation = config.mlp.activation
    return {
        "vocab_size": config.vocab_size, "n_embd": config.width, "n_layer": config.num_layers,
        "n_head": config.attention.num_heads, "n_inner": config.mlp.hidden,
        "n_positions": config.max_length, "layer_norm_epsilon": config.norm.eps,
        "activation_function": "gelu_new" if activation == "gelu_tanh"
        else _THEIR_ACTIVATIONS[activation],
        "tie_word_embeddings": config.tie_embeddings,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
    }


def _comparable(config: Transformer) -> Transformer:
    """The config without what only training sees, and with attention's scale spelled out."""
    def scaled(a: Attention | None) -> Attention | None:
        return a and dataclasses.replace(a, scale=a.scale or a.head_dim**-0.5)

    mlp = config.mlp
    if isinstance(mlp, Moe):
        mlp = dataclasses.replace(mlp, balance_loss=0.0, z_loss=0.0)
    return dataclasses.replace(config, mlp=mlp, dropout=0.0, vocab_multiple=1,
                               attention=scaled(config.attention),
                               local=scaled(config.local))


_ROTARY = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
_NESTED = ({"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
           {"model.": "model.language_model."})
_VISION = (r"(model\.)?(vision_tower|multi_modal_projector)\..*", r"lm_head\.weight")


def _family(model_type, architecture, read, write, rules, *, ignored=_ROTARY, **options) -> Family:
    return Family(model_type, architecture, read, write, rules, probe=rules[0].theirs,
                  comparable=_comparable, ignored=ignored, **options)


# In the order in which an export tries them.
FAMILIES = (
    _family("llama", "LlamaForCausalLM", _llama_config, _llama_dict, _LLAMA),
    _family("qwen2", "Qwen2ForCausalLM", _qwen2_config, _qwen2_dict, _LLAMA),
    _family("qwen3", "Qwen3ForCausalLM", _qwen3_config, _qwen3_dict, _LLAMA),
    _family("mistral", "MistralForCausalLM", _mistral_config, _mistral_dict, _LLAMA),
    _family("gemma2", "Gemma2ForCausalLM", _gemma2_config, _gemma_dict, _GEMMA),
    _family("gemma3_text", "Gemma3ForCausalLM", _gemma3_config, _gemma3_dict, _GEMMA,
            nested_type="gemma3", variants=_NESTED, ignored=_ROTARY + _VISION),
    _family("mixtral", "MixtralForCausalLM", _mixtral_config, _mixtral_dict, _MIXTRAL),
    _family("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_moe_config, _qwen3_moe_dict, _QWEN_MOE),
    _family("qwen2_moe", "Qwen2MoeForCausalLM", _qwen2_moe_config, _qwen2_moe_dict, _QWEN_MOE),
    _family("gpt2", "GPT2LMHeadModel", _gpt2_config, _gpt2_dict, _GPT2,
            variants=({"transformer.": ""},),
            ignored=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",)),
)
