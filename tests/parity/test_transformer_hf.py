"""Transformers against Hugging Face's, with the same random weights. Run with the extra `parity`:
``python -m pytest tests/parity``."""

import jax
import numpy as np
import pytest

import zoo
from layers.attention import Attention
from layers.mlp import Mlp
from layers.norm import Norm
from layers.rope import Llama3Scaling, Rope, YarnScaling
from layers.stack import to_list
from tests.tolerances import assert_close
from zoo import protocol
from zoo.transformer import Transformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
VOCAB, WIDTH, LAYERS, HEADS, GROUPS, HIDDEN, EPS, THETA = 67, 32, 3, 4, 2, 48, 1e-3, 100.0
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 40))
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "intermediate_size": HIDDEN,
    "rms_norm_eps": EPS, "max_position_embeddings": 64, "attn_implementation": "eager",
    "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip


def peer(model_class, config):
    """A Hugging Face model with random values in every parameter, and these in float64 numpy."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = 0.2 * rng.normal(size=parameter.shape) + ("norm" in name or "ln_" in name)
            parameter.copy_(torch.tensor(values, dtype=torch.float32))
    return model, {name: x.detach().numpy() for name, x in model.state_dict().items()}


def stacked(layers):
    return jax.tree.map(lambda *xs: np.stack(xs), *layers)


def llama_params(weights, config):
    """The weights of the Llama lineage (Llama, Mistral, Qwen) in this project's names."""
    a, d = config.attention, config.width

    def block(i):
        here = f"model.layers.{i}."

        def heads(name, count):
            found = {"kernel": weights[f"{here}self_attn.{name}_proj.weight"].T.reshape(
                d, count, a.head_dim)}
            bias = weights.get(f"{here}self_attn.{name}_proj.bias")
            return found if bias is None else {**found, "bias": bias.reshape(count, a.head_dim)}

        mixer = {
            "query": heads("q", a.num_heads),
            "key": heads("k", a.num_kv_heads),
            "value": heads("v", a.num_kv_heads),
            "out": {"kernel": weights[here + "self_attn.o_proj.weight"].T.reshape(
                a.num_heads, a.head_dim, d)},
        }
        if a.qk_norm is not None:
            mixer["query_norm"] = {"scale": weights[here + "self_attn.q_norm.weight"]}
            mixer["key_norm"] = {"scale": weights[here + "self_attn.k_norm.weight"]}
        return {
            "mixer_norm": {"scale": weights[here + "input_layernorm.weight"]},
            "mixer": mixer,
            "mlp_norm": {"scale": weights[here + "post_attention_layernorm.weight"]},
            "mlp": {name: {"kernel": weights[f"{here}mlp.{name}_proj.weight"].T}
                    for name in ("gate", "up", "down")},
        }

    params = {
        "embed": {"table": weights["model.embed_tokens.weight"]},
        "stack": {"blocks": {"0": stacked([block(i) for i in range(config.num_layers)])}},
        "norm": {"scale": weights["model.norm.weight"]},
    }
    if not config.tie_embeddings:
        params["head"] = weights["lm_head.weight"].T
    return params


def gpt2_params(weights, config):
    """GPT-2's weights; its kernels are stored [inputs, outputs], attention's three as one."""
    d, h, k = config.width, config.attention.num_heads, config.attention.head_dim

    def norm(name):
        return {"scale": weights[name + ".weight"], "bias": weights[name + ".bias"]}

    def linear(name):
        return {"kernel": weights[name + ".weight"], "bias": weights[name + ".bias"]}

    def block(i):
        here = f"transformer.h.{i}."
        qkv = linear(here + "attn.c_attn")
        kernels, biases = (np.split(qkv[part], 3, axis=-1) for part in ("kernel", "bias"))
        out = linear(here + "attn.c_proj")
        return {
            "mixer_norm": norm(here + "ln_1"),
            "mixer": {
                **{name: {"kernel": kernel.reshape(d, h, k), "bias": bias.reshape(h, k)}
                   for name, kernel, bias in zip(
                       ("query", "key", "value"), kernels, biases, strict=True)},
                "out": {"kernel": out["kernel"].reshape(h, k, d), "bias": out["bias"]},
            },
            "mlp_norm": norm(here + "ln_2"),
            "mlp": {"up": linear(here + "mlp.c_fc"), "down": linear(here + "mlp.c_proj")},
        }

    return {
        "embed": {"table": weights["transformer.wte.weight"]},
        "positions": {"table": weights["transformer.wpe.weight"]},
        "stack": {"blocks": {"0": stacked([block(i) for i in range(config.num_layers)])}},
        "norm": norm("transformer.ln_f"),
    }


def ours(params, config):
    """The model with these parameters, every one of which must be taken."""
    definition, abstract = protocol.split(zoo.build(config, abstract=True, stacked=False))
    params = to_list(params)
    shapes = (jax.tree.map(np.shape, tree) for tree in (params, abstract))
    assert next(shapes) == next(shapes)
    return protocol.merge(definition, jax.device_put(params))


def transformer(*, rope=THETA, scaling=None, tie=False, head_dim=8, **attention):
    return Transformer(
        vocab_size=VOCAB, width=WIDTH, num_layers=LAYERS, mlp=Mlp(HIDDEN), norm=Norm("rms", EPS),
        max_length=64, tie_embeddings=tie,
        attention=Attention(HEADS, GROUPS, head_dim, rope=Rope(rope, scaling), **attention))


def rope_parameters(kind="default", **values):
    return {"rope_type": kind, "rope_theta": THETA, **values}


def llama(rope, **options):
    config = transformers.LlamaConfig(**SHAPE, rope_parameters=rope, head_dim=8)
    return peer(transformers.LlamaForCausalLM, config), transformer(**options)


def llama_plain():
    return llama(rope_parameters())


def llama_3():
    """Lengths that put frequencies above, in and below the blend."""
    return llama(
        rope_parameters("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                        original_max_position_embeddings=64),
        scaling=Llama3Scaling(4.0, 1.0, 4.0, 64))


def llama_yarn():
    return llama(
        rope_parameters("yarn", factor=4.0, beta_fast=8.0, beta_slow=1.0,
                        original_max_position_embeddings=64),
        scaling=YarnScaling(4.0, 8.0, 1.0, 64))


def qwen2():
    config = transformers.Qwen2Config(**SHAPE, rope_parameters=rope_parameters())
    return peer(transformers.Qwen2ForCausalLM, config), transformer(qkv_bias=True)


def qwen3(tie=False):
    shape = {**SHAPE, "tie_word_embeddings": tie}
    config = transformers.Qwen3Config(**shape, rope_parameters=rope_parameters(), head_dim=12)
    config_here = transformer(qk_norm=EPS, head_dim=12, tie=tie)
    return peer(transformers.Qwen3ForCausalLM, config), config_here


def qwen3_tied():
    return qwen3(tie=True)


def mistral():
    config = transformers.MistralConfig(
        **SHAPE, rope_parameters=rope_parameters(), head_dim=8, sliding_window=7)
    return peer(transformers.MistralForCausalLM, config), transformer(window=7)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=HIDDEN,
        n_positions=64, layer_norm_epsilon=EPS, attn_implementation="eager", bos_token_id=None,
        eos_token_id=None)
    here = Transformer(
        vocab_size=VOCAB, width=WIDTH, num_layers=LAYERS, max_length=64, tie_embeddings=True,
        attention=Attention(HEADS, HEADS, 8, qkv_bias=True, out_bias=True),
        mlp=Mlp(HIDDEN, activation="gelu_tanh", gated=False, bias=True),
        norm=Norm("layer", EPS, bias=True), learned_positions=True)
    return peer(transformers.GPT2LMHeadModel, config), here


FAMILIES = (llama_plain, llama_3, llama_yarn, qwen2, qwen3, qwen3_tied, mistral, gpt2)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_logits_and_greedy_tokens(family):
    (model, weights), config = family()
    params = (gpt2_params if family is gpt2 else llama_params)(weights, config)
    here = ours(params, config)
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).logits.numpy()
        continued = model.generate(
            torch.tensor(TOKENS[:, :20]), attention_mask=torch.ones(2, 20), do_sample=False,
            max_new_tokens=16, pad_token_id=0)
    actual = jax.jit(lambda tokens: here({"tokens": tokens}).logits)(TOKENS.astype(np.int32))
    assert_close(actual, expected, tol=TOLERANCE)
    generation = zoo.generate(here, TOKENS[:, :20], 16)
    assert generation.tokens == continued[:, 20:].tolist()
