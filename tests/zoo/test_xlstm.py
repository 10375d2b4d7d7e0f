"""xLSTM: pinned numbers, its FLOPs and state at full size, and its checkpoints' two namings."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import zoo
from layers.mlp import Mlp
from tests import tiny
from tests.tiny import assert_same
from tests.tolerances import assert_close
from zoo import protocol
from zoo.convert.source import choose_family
from zoo.convert.table import ConversionError

CONFIG_7B = {
    "add_out_norm": True, "architectures": ["xLSTMForCausalLM"],
    "autocast_kernel_dtype": "bfloat16", "bos_token_id": 0, "chunk_size": 64,
    "chunkwise_kernel": "chunkwise--triton_xl_chunk", "embedding_dim": 4096, "eos_token_id": 2,
    "eps": 1e-06, "ffn_proj_factor": 2.667, "ffn_round_up_to_multiple_of": 64,
    "force_bos_token_insert": True, "gate_soft_cap": 15.0, "hidden_size": 4096,
    "inference_state_dtype": "float32", "mode": "inference", "model_type": "xlstm",
    "norm_eps": 1e-06, "norm_reduction_force_float32": True, "num_blocks": 32, "num_heads": 8,
    "output_logit_soft_cap": 30.0, "pad_token_id": 1, "qk_dim_factor": 0.5,
    "return_last_states": True, "sequence_kernel": "native_sequence__triton",
    "step_kernel": "triton", "tie_word_embeddings": False, "torch_dtype": "float32",
    "use_bias": False, "use_cache": True, "v_dim_factor": 1.0, "vocab_size": 50304,
    "weight_mode": "single",
}  # fmt: skip

def small(**overrides):
    """One epsilon, as a config.json has."""
    return tiny.config("xlstm-7b", **{"mlstm.norm_eps": 1e-5, **overrides})


def rename(folder, change) -> None:
    """Rewrites a directory's tensors as ``change(their dict)``."""
    path = folder / "model.safetensors"
    found = change(load_file(path))
    path.unlink()
    save_file(found, path)


def to_authors_names(tensors):
    return {"embedding.weight" if key == "backbone.embeddings.weight" else key: x
            for key, x in tensors.items()}


def test_pinned_logits(tmp_path):
    """One block of width 64 whose sorted tensors are sines, under its authors' names; the sums are
    those of their implementation, in float64."""
    config = zoo.config(
        "xlstm-7b", width=64, num_layers=1, vocab_size=16,
        **{"mlstm.num_heads": 2, "mlstm.key_dim": 16, "mlstm.value_dim": 32, "mlp.hidden": 192})
    zoo.to_hf(tiny.model(config), tmp_path / "model")

    def fill(tensors):
        tensors = to_authors_names(tensors)
        assert len(tensors) == 18
        return {key: (0.3 * np.sin(j + 0.7 * np.arange(x.size)).reshape(x.shape)
                      + ("norm" in key)).astype(np.float32)
                for j, (key, x) in enumerate(sorted(tensors.items()))}

    rename(tmp_path / "model", fill)
    model = zoo.from_hf(tmp_path / "model")
    tokens = ((5 * np.arange(16)) % 16).astype(np.int32)[None]
    logits = np.asarray(jax.jit(lambda t: model({"tokens": t}).logits)(tokens), np.float64)
    assert_close(logits.sum(), 2.782790, tol=2e-6)
    assert_close(np.abs(logits).sum(), 107.724223, tol=1e-6)
    assert_close(logits.ravel()[:3], np.array([1.10301244, 0.31500926, -0.67251234]), tol=2e-6)
    assert_close(logits.ravel()[-3:], np.array([-0.03605178, 0.01835891, 0.06116299]), tol=2e-6)


def test_the_published_size():
    """6,865,424,896 parameters are in tests/zoo/test_models.py."""
    config = zoo.config("xlstm-7b")
    assert config == choose_family(config).config(CONFIG_7B, "there")
    model = zoo.build(config, abstract=True, stacked=True)
    state = jax.eval_shape(lambda: model.init_state(1, 1 << 17).stack)
    # 32 layers of 8 heads of 256 x 512 numbers, and their normalisers.
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) == (
        32 * 8 * (256 * 512 + 256 + 1) * 4)
    # Two FLOPs for each parameter that multiplies, and the recurrence.
    idle = 50304 * 4096 + 65 * 4096 + 32 * (4096 + 2 * 8)
    core = 32 * 8 * 4 * 256 * (512 + 1)
    assert config.flops_per_token(8192) == 2 * (6_865_424_896 - idle) + core
    assert config.flops_at(1) == config.flops_at(100_000)


def test_blocks_of_the_first_xlstm():
    """xLSTM[7:1], with MLPs behind its sLSTM blocks alone, and a remainder."""
    config = tiny.config("xlstm-mixed-tiny", num_layers=18, blocks="mmmmmmms")
    assert [type(m).__name__ for m in config.mixers()] == ["PreUpMLstm"] * 7 + ["SLstm"]
    assert config.mlps() == (None,) * 7 + (config.mlp,)
    params = protocol.split(zoo.build(config, abstract=True, stacked=True))[1]["stack"]
    assert params["blocks"]["7"]["mlp"]["up"]["kernel"].shape == (2, 32, 48)
    assert params["tail"].keys() == {"0", "1"} and "mlp" not in params["tail"]["0"]


def test_forget_gates_start_by_depth():
    """That of the last of three layers has the exponent 1.6, the first's 0.3."""
    model = zoo.build(tiny.config("xlstm-mixed-tiny", blocks="s", num_layers=3), stacked=False)
    bias = tiny.flat(model)["stack/blocks/0/mixer/cell/bias"][:, 1, 0]
    assert_close(bias, 5 - 12 * (np.arange(8) / 7) ** np.array([[0.3], [0.95], [1.6]]))


@pytest.mark.parametrize(("overrides", "message"), [
    ({"blocks": ""}, "blocks is ''; it must be letters m and s, as in 'mms'"),
    ({"blocks": "mts"}, "blocks is 'mts'; it must be letters"),
    ({"blocks": "mx"}, "blocks is 'mx'; it must be letters"),
    ({"slstm": None}, "blocks is 'msm' and slstm is None; give an slstm where"),
    ({"blocks": "m"}, r"blocks is 'm' and slstm is SLstm\(.*; give an slstm where"),
    ({"blocks": "m", "slstm": None}, r"mlp is Mlp\(.*, and no block of 'm' has one; give it"),
    ({"mlp": None}, "mlp is None, and some block of 'msm' has one; give it"),
])
def test_blocks_are_checked(overrides, message):
    with pytest.raises(ValueError, match=message):
        zoo.config("xlstm-mixed-tiny", **overrides)


@pytest.mark.parametrize("stacked", [False, True])
def test_round_trips_are_bitwise(stacked, tmp_path):
    """Theirs, its authors' and our own naming."""
    model = tiny.model(small(), stacked)
    zoo.to_hf(model, tmp_path / "theirs")
    zoo.save(model, tmp_path / "ours")
    assert_same(model, zoo.from_hf(tmp_path / "theirs", stacked=not stacked))
    assert_same(model, zoo.load(tmp_path / "ours", stacked=not stacked))
    rename(tmp_path / "theirs", to_authors_names)
    assert_same(model, zoo.from_hf(tmp_path / "theirs"))


def test_fused_projections_come_apart(tmp_path):
    model = tiny.model(small())

    def fuse(tensors):
        for block in ("backbone.blocks.0.", "backbone.blocks.1."):
            for fused, parts in (
                    ("mlstm_layer.qkv_opreact.weight",
                     [f"mlstm_layer.{name}.weight" for name in ("q", "k", "v", "ogate_preact")]),
                    *((f"mlstm_layer.ifgate_preact.{kind}",
                       [f"mlstm_layer.{name}gate_preact.{kind}" for name in "if"])
                      for kind in ("weight", "bias")),
                    ("ffn.proj_up_gate_z.weight", ["ffn.proj_up_gate.weight",
                                                   "ffn.proj_up.weight"])):
                tensors[block + fused] = np.concatenate([tensors.pop(block + p) for p in parts])
        return tensors

    zoo.to_hf(model, tmp_path / "fused")
    rename(tmp_path / "fused", fuse)
    assert_same(model, zoo.from_hf(tmp_path / "fused"))


def test_how_it_is_computed_comes_along(tmp_path):
    """Settings of kernels and special tokens, which no config of ours holds."""
    model = tiny.model(small())
    zoo.to_hf(model, tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    given = {"chunk_size": 32, "autocast_kernel_dtype": "float32", "mode": "inference",
             "eos_token_id": 2}
    path.write_text(json.dumps({**json.loads(path.read_text()), **given}))
    zoo.save(zoo.from_hf(tmp_path / "a"), tmp_path / "ours", like=tmp_path / "a")
    zoo.to_hf(zoo.load(tmp_path / "ours"), tmp_path / "b", like=tmp_path / "ours")
    assert given.items() <= json.loads((tmp_path / "b" / "config.json").read_text()).items()


@pytest.mark.parametrize(("change", "message"), [
    ({"use_bias": True}, "use_bias is True; what can be converted is false"),
    ({"add_out_norm": False}, "add_out_norm is False; what can be converted is true"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings is True; what can be"),
    ({"eps": 1e-5}, "eps is 1e-05; what can be converted is 1e-06"),
    ({"chunkwise_kernel": "chunkwise--triton_xl_chunk_siging"}, "exponential input gates"),
    ({"num_blocks": 31, "num_hidden_layers": 32},
     r"num_hidden_layers and num_blocks are \[31, 32\]; they must be one number"),
    ({"qk_dim_factor": 0.3}, "qk_dim_factor makes 1228 dimensions of 4096, which do not divide"),
    ({"v_dim_factor": 0.0}, "v_dim_factor makes 0 dimensions"),
    ({"gate_soft_cap": -1.0}, "mlstm.gate_softcap is -1.0; it must be positive"),
])
def test_refuses_what_it_cannot_express(change, message):
    with pytest.raises(ConversionError, match=message):
        choose_family(zoo.config("xlstm-7b")).config({**CONFIG_7B, **change}, "there")


@pytest.mark.parametrize(("overrides", "message"), [
    ({"mlstm.sigmoid_gate": True}, "xlstm: mlstm.sigmoid_gate is True"),
    ({"mlstm.norm_eps": 1e-3}, "xlstm: .*norm_eps is"),
    ({"logit_softcap": None}, "xlstm: logit_softcap is None"),
    ({"tie_embeddings": True}, "xlstm: tie_word_embeddings is True"),
    ({"mlp": Mlp(48, activation="gelu")}, "xlstm: mlp.activation is 'gelu'"),
    ({"post_norms": True}, "xlstm: post_norms is True"),
])
def test_no_config_json_says_more_than_it_can(overrides, message):
    with pytest.raises(ConversionError, match=message):
        choose_family(small(**overrides))


@pytest.mark.parametrize(("width", "heads", "key_dim", "hidden"), [
    (96, 3, 7, 97), (130, 5, 11, 1000), (768, 4, 96, 2112), (49, 7, 3, 29)])
def test_odd_widths_are_written_as_factors(width, heads, key_dim, hidden):
    """Their widths are products with a factor, cut off behind the point."""
    config = small(width=width, **{"mlstm.num_heads": heads, "mlstm.key_dim": key_dim,
                                   "mlstm.value_dim": key_dim + 1, "mlp.hidden": hidden})
    assert choose_family(config).model_type == "xlstm"
