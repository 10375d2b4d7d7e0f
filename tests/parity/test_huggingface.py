"""Every kind of Hugging Face checkpoint against transformers, with random weights, both ways.

Run with the extra `parity`: ``python -m pytest tests/parity``.
"""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest

import zoo
from tests.parity.peers import TOKENS, TOLERANCE, VOCAB, our_logits, same_tensors, their_logits
from tests.tolerances import assert_close
from zoo.convert.source import open_source

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 44, "rms_norm_eps": 1e-3,
    "max_position_embeddings": 96, "attn_implementation": "eager", "tie_word_embeddings": False,
    **IDS,
}  # fmt: skip
GEMMA = {**SHAPE, "sliding_window": 7, "query_pre_attn_scalar": 17, "tie_word_embeddings": True}
MOE = {"moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 2}


def rope(kind="default", **values):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **values}}


LLAMA_3 = rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=64)
YARN = rope("yarn", factor=4.0, beta_fast=8.0, beta_slow=1.0, original_max_position_embeddings=64)

# name -> (family, options of its config)
CASES = {
    "llama": ("Llama", {**SHAPE, **rope()}),
    "llama-tied": ("Llama", {**SHAPE, **rope(), "tie_word_embeddings": True}),
    "llama-llama3": ("Llama", {**SHAPE, **LLAMA_3}),
    "llama-linear": ("Llama", {**SHAPE, **rope("linear", factor=3.0)}),
    "llama-yarn": ("Llama", {**SHAPE, **YARN}),
    "llama-biases": ("Llama", {**SHAPE, **rope(), "attention_bias": True, "mlp_bias": True,
                               "hidden_act": "gelu"}),
    "qwen2": ("Qwen2", {**SHAPE, **rope()}),
    "qwen2-tied-window": ("Qwen2", {**SHAPE, **rope(), "tie_word_embeddings": True,
                                    "use_sliding_window": True, "sliding_window": 6,
                                    "max_window_layers": 0}),
    "qwen3": ("Qwen3", {**SHAPE, **rope()}),
    "qwen3-tied": ("Qwen3", {**SHAPE, **rope(), "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**SHAPE, **rope(), "sliding_window": 7}),
    "mistral-full": ("Mistral", {**SHAPE, **rope(), "sliding_window": None}),
    "gemma2": ("Gemma2", {**GEMMA, **rope()}),
    "gemma2-no-caps": ("Gemma2", {**GEMMA, **rope(), "final_logit_softcapping": None,
                                  "attn_logit_softcapping": None}),
    "gemma3": ("Gemma3Text", {**GEMMA, "num_hidden_layers": 8, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}}),
    "gemma3-caps": ("Gemma3Text", {**GEMMA, "final_logit_softcapping": 5.0,
                                   "attn_logit_softcapping": 3.0}),  # The latter does nothing.
    "mixtral": ("Mixtral", {**SHAPE, **rope(), "num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3Moe", {**SHAPE, **rope(), **MOE, "norm_topk_prob": True}),
    "qwen3-moe-window": ("Qwen3Moe", {**SHAPE, **rope(), **MOE, "use_sliding_window": True,
                                      "sliding_window": 6}),
    "qwen3-moe-unnormalised": ("Qwen3Moe", {**SHAPE, **rope(), **MOE}),
    "qwen2-moe": ("Qwen2Moe", {**SHAPE, **rope(), **MOE, "head_dim": 8,
                               "shared_expert_intermediate_size": 28}),
    "gpt2": ("GPT2", {"vocab_size": VOCAB, "n_embd": 36, "n_layer": 3, "n_head": 3, "n_inner": 50,
                      "n_positions": 96, "layer_norm_epsilon": 1e-3,
                      "attn_implementation": "eager", **IDS}),
}


@functools.cache
def peer(name):
    """A Hugging Face model with random values in every parameter."""
    family, options = CASES[name]
    kind = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}.get(
        family, f"{family}ForCausalLM")
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, kind)(config).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            about = ("norm" in key or "ln_" in key) and "Gemma" not in family
            values = 0.2 * rng.normal(size=parameter.shape) + about
            parameter.copy_(torch.tensor(values, dtype=torch.float32))
    return model


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name, tmp_path):
    """Logits and greedy tokens equal; our export loads there; the round trip is bitwise."""
    model = peer(name)
    model.save_pretrained(tmp_path / "theirs")
    here = zoo.from_hf(tmp_path / "theirs")
    expected = their_logits(model)
    assert_close(our_logits(here), expected, tol=TOLERANCE)
    with torch.no_grad():
        continued = model.generate(
            torch.tensor(TOKENS[:, :20]), attention_mask=torch.ones(2, 20), do_sample=False,
            max_new_tokens=32, pad_token_id=0)
    assert zoo.generate(here, TOKENS[:, :20], 32).tokens == continued[:, 20:].tolist()

    zoo.save(here, tmp_path / "native", like=tmp_path / "theirs")
    zoo.to_hf(zoo.load(tmp_path / "native", stacked=True), tmp_path / "back",
              like=tmp_path / "native")
    same_tensors(tmp_path / "theirs", tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager").eval()
    assert type(back) is type(model)
    assert np.array_equal(their_logits(back), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3-moe"])
def test_bfloat16_is_bitwise(name, tmp_path):
    import copy

    model = copy.deepcopy(peer(name)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    here = zoo.from_hf(tmp_path / "theirs")
    assert {x.dtype for x in jax.tree.leaves(zoo.protocol.split(here)[1])} == {
        np.dtype(ml_dtypes.bfloat16)}
    zoo.to_hf(here, tmp_path / "back", like=tmp_path / "theirs")
    with open_source(tmp_path / "theirs") as a, open_source(tmp_path / "back") as b:
        assert a.weights.keys() == b.weights.keys()
        assert all(a.weights.checksum(key) == b.weights.checksum(key) for key in a.weights)


def test_a_gemma_3_with_eyes(tmp_path):
    """Of the multimodal checkpoint the text model is taken, under either naming of its keys."""
    text = CASES["gemma3"][1]
    config = transformers.Gemma3Config(
        text_config={k: v for k, v in text.items() if k != "attn_implementation"},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        attn_implementation="eager", tie_word_embeddings=True)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "theirs")
    here = zoo.from_hf(tmp_path / "theirs")
    with torch.no_grad():
        expected = model.model.language_model(torch.tensor(TOKENS)).last_hidden_state.numpy()
    assert_close(here({"tokens": TOKENS.astype(np.int32)}).hidden, expected, tol=TOLERANCE)


@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_converting_with_a_check(name, tmp_path, capsys):
    """The recipe's own report, of a model converted file to file."""
    from recipes import command, convert

    peer(name).save_pretrained(tmp_path / "theirs")
    code = command.execute(convert.main, [
        "convert", f"--source={tmp_path / 'theirs'}", f"--out={tmp_path / 'ours'}", "--check"])
    assert code == 0
    out = capsys.readouterr().out
    assert "hold the same numbers" in out and "layer 2" in out and "top-1 agreement 100.0%" in out
