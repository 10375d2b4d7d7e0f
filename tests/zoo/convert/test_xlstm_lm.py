"""The first xLSTM under its authors' names: both layouts of sLSTM weights, and their config."""

import dataclasses
import json
import logging

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import zoo
from tests import tiny
from tests.tiny import assert_same, flat
from zoo import convert
from zoo.convert import saving
from zoo.convert.source import choose_family, open_source

VOCAB, WIDTH, INNER, HIDDEN, HEADS = 17, 12, 32, 20, 2
DH = WIDTH // HEADS


def small(**overrides):
    """One epsilon, as their code has."""
    return tiny.config("xlstm-mixed-tiny", **{"mlstm.norm_eps": 1e-5, "slstm.norm_eps": 1e-5,
                                              **overrides})


def alone():
    """mLSTM blocks, which have no MLP."""
    return dataclasses.replace(small(), blocks="m", slstm=None, mlp=None)


def shapes(blocks: str, backend: str) -> dict[str, tuple[int, ...]]:
    """The tensors of one of theirs, by the sizes above."""
    found = {"token_embedding.weight": (VOCAB, WIDTH), "lm_head.weight": (VOCAB, WIDTH),
             "xlstm_block_stack.post_blocks_norm.weight": (WIDTH,)}
    mlstm = {
        "learnable_skip": (INNER,), "proj_up.weight": (2 * INNER, WIDTH),
        "proj_down.weight": (WIDTH, INNER),
        **{f"{name}_proj.weight": (INNER // 4, 4, 4) for name in "qkv"},
        "conv1d.conv.weight": (INNER, 1, 4), "conv1d.conv.bias": (INNER,),
        **{f"mlstm_cell.{name}gate.weight": (HEADS, 3 * INNER) for name in "if"},
        **{f"mlstm_cell.{name}gate.bias": (HEADS,) for name in "if"},
        "mlstm_cell.outnorm.weight": (INNER,)}
    slstm = {
        "conv1d.conv.weight": (WIDTH, 1, 4), "conv1d.conv.bias": (WIDTH,),
        **{f"{name}gate.weight": (HEADS, DH, DH) for name in "ifzo"},
        "slstm_cell._recurrent_kernel_": (HEADS, 4 * DH, DH) if backend == "vanilla" else (
            HEADS, DH, 4 * DH),
        "slstm_cell._bias_": (4 * WIDTH,), "group_norm.weight": (WIDTH,)}
    for i, kind in enumerate(blocks):
        block = f"xlstm_block_stack.blocks.{i}."
        found[block + "xlstm_norm.weight"] = (WIDTH,)
        found |= {f"{block}xlstm.{key}": s for key, s in (mlstm if kind == "m" else slstm).items()}
        if kind == "s":
            found |= {f"{block}ffn_norm.weight": (WIDTH,),
                      f"{block}ffn.proj_up.weight": (2 * HIDDEN, WIDTH),
                      f"{block}ffn.proj_down.weight": (WIDTH, HIDDEN)}
    return found


def settings(blocks: str, backend: str) -> dict:
    """What `dataclasses.asdict` makes of their config, with some of what they compute."""
    up = {"proj_factor": 2.0, "round_proj_up_dim_up": True, "round_proj_up_to_multiple_of": 16,
          "_proj_up_dim": INNER}
    return {
        "mlstm_block": {"mlstm": {**up, "conv1d_kernel_size": 4, "qkv_proj_blocksize": 4,
                                  "num_heads": HEADS, "embedding_dim": WIDTH, "bias": False,
                                  "dropout": 0.0, "context_length": 50, "_num_blocks": 1},
                        "_num_blocks": len(blocks), "_block_idx": None},
        "slstm_block": {"slstm": {"backend": backend, "num_heads": HEADS, "hidden_size": WIDTH,
                                  "function": "slstm", "bias_init": "powerlaw_blockdependent",
                                  "gradient_recurrent_clipval": None, "constants": {},
                                  "dtype": "bfloat16", "conv1d_kernel_size": 4,
                                  "group_norm_weight": True, "_block_idx": None},
                        "feedforward": {**up, "proj_factor": 1.3, "_proj_up_dim": HIDDEN,
                                        "round_proj_up_to_multiple_of": 5, "act_fn": "gelu",
                                        "ff_type": "ffn_gated", "bias": False, "dropout": 0.0}},
        "context_length": 50, "num_blocks": len(blocks), "embedding_dim": WIDTH,
        "add_post_blocks_norm": True, "bias": False, "dropout": 0.0,
        "slstm_at": [i for i, kind in enumerate(blocks) if kind == "s"],
        "_block_map": "0", "vocab_size": VOCAB, "tie_weights": False,
        "weight_decay_on_embedding": True, "add_embedding_dropout": False,
    }


def theirs(folder, blocks="msmms", backend="vanilla", change=None, **values):
    """Writes one of theirs with random tensors, which are returned."""
    rng = np.random.default_rng(0)
    tensors = {key: rng.normal(size=shape).astype(np.float32)
               for key, shape in shapes(blocks, backend).items()}
    tensors = (change or (lambda t: None))(tensors) or tensors
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**settings(blocks, backend), **values}))
    return tensors


@pytest.mark.parametrize("backend", ["vanilla", "cuda"])
def test_every_tensor_has_its_place(backend, tmp_path, caplog):
    """By hand, for the parameters whose names or layouts say something else."""
    tensors = theirs(tmp_path / "theirs", backend=backend)
    model = zoo.from_hf(tmp_path / "theirs", stacked=True)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert model.config.blocks == "msm" and model.config.max_length == 50
    params = flat(model)
    # Block 4 is the tail's second, 1 stands in the pattern.
    for ours, their in (("stack/blocks/1/", 1), ("stack/tail/1/", 4)):
        def part(path, ours=ours):
            x = params[ours + path]
            return x[0] if "blocks" in ours else x

        def tensor(key, their=their):
            return tensors[f"xlstm_block_stack.blocks.{their}.{key}"]

        for name, gate in (("input_gate", "f"), ("forget_gate", "i"), ("cell_input", "z"),
                           ("output_gate", "o")):
            assert np.array_equal(part(f"mixer/{name}/kernel"),
                                  tensor(f"xlstm.{gate}gate.weight").swapaxes(1, 2))
        kernel = tensor("xlstm.slstm_cell._recurrent_kernel_")
        kernel = kernel.swapaxes(1, 2) if backend == "vanilla" else kernel
        bias = tensor("xlstm.slstm_cell._bias_")
        bias = (bias.reshape(4, HEADS, DH) if backend == "vanilla"
                else bias.reshape(HEADS, 4, DH).swapaxes(0, 1))
        for g in range(4):
            assert np.array_equal(part("mixer/cell/recurrent")[g],
                                  kernel[:, :, g * DH:(g + 1) * DH])
            assert np.array_equal(part("mixer/cell/bias")[g], bias[g])
        up = tensor("ffn.proj_up.weight").T
        assert np.array_equal(part("mlp/gate/kernel"), up[:, :HIDDEN])
        assert np.array_equal(part("mlp/up/kernel"), up[:, HIDDEN:])
        assert np.array_equal(part("mixer/norm/scale").ravel(), tensor("xlstm.group_norm.weight"))
    block = "xlstm_block_stack.blocks.3.xlstm."
    own = {path.removeprefix("stack/tail/0/mixer/"): x for path, x in params.items()}
    up = tensors[block + "proj_up.weight"].T
    assert np.array_equal(own["up/kernel"].reshape(WIDTH, -1), up[:, :INNER])
    assert np.array_equal(own["gate/kernel"].reshape(WIDTH, -1), up[:, INNER:])
    for name in ("input", "forget"):
        assert np.array_equal(own[f"{name}_gate/kernel"].reshape(-1, HEADS).T,
                              tensors[f"{block}mlstm_cell.{name[0]}gate.weight"])
    assert np.array_equal(own["value/kernel"].reshape(-1, 4, 4).swapaxes(1, 2),
                          tensors[block + "v_proj.weight"])
    assert np.array_equal(own["conv/kernel"].reshape(4, -1).T,
                          tensors[block + "conv1d.conv.weight"][:, 0])
    assert np.array_equal(own["norm/scale"].ravel(), tensors[block + "mlstm_cell.outnorm.weight"])
    zoo.to_hf(model, tmp_path / "back", like=tmp_path / "theirs")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    assert values["slstm_block"]["slstm"]["backend"] == backend
    assert values["slstm_block"]["slstm"]["dtype"] == "bfloat16"
    assert values["weight_decay_on_embedding"] and "model_type" not in values


@pytest.mark.parametrize(("blocks", "layers"), [("m", 2), ("s", 2), ("ms", 3), ("mmms", 6)])
@pytest.mark.parametrize("kind", ["xlstm_lm", "xlstm_lm_cuda"])
def test_round_trips_are_bitwise(kind, blocks, layers, tmp_path):
    model = tiny.model(dataclasses.replace(
        alone() if blocks == "m" else small(), blocks=blocks, num_layers=layers))
    zoo.to_hf(model, tmp_path / "theirs", kind=kind)
    found = zoo.from_hf(tmp_path / "theirs", stacked=True)
    assert_same(model, found)
    assert choose_family(model.config).comparable(found.config) == choose_family(
        model.config).comparable(model.config)


def test_a_filled_up_vocabulary(tmp_path):
    model = tiny.model(small(vocab_size=41))
    zoo.to_hf(model, tmp_path / "theirs")
    found = zoo.from_hf(tmp_path / "theirs", vocab_multiple=16)
    assert flat(found)["embed/table"].shape == (48, 32)
    zoo.to_hf(found, tmp_path / "back")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()


@pytest.mark.parametrize(("blocks", "layers", "read"), [("msms", 5, "ms"), ("mmsm", 4, "mms")])
def test_layers_in_groups_of_another_length(blocks, layers, read, tmp_path):
    """A pattern that is not the shortest one is read as that, and each layer is still found."""
    model = tiny.model(small(blocks=blocks, num_layers=layers))
    zoo.save(model, tmp_path / "ours")
    zoo.to_hf(model, tmp_path / "theirs")
    assert convert.load_config(tmp_path / "theirs").blocks == read

    def differences():
        with open_source(tmp_path / "ours") as one, open_source(tmp_path / "theirs") as other:
            return (list(saving.compare(one, other, np.dtype(np.float32))),
                    list(saving.compare_with_model(model, other, np.dtype(np.float32))))

    assert differences() == ([], [])
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"xlstm_block_stack.blocks.{layers - 1}.xlstm_norm.weight"] += 1
    path.unlink()
    save_file(tensors, path)
    assert [len(found) for found in differences()] == [1, 1]


def test_a_head_that_is_the_token_table(tmp_path):
    """Whichever of the two names is stored; untied, the one is not taken for the other."""
    def drop(key):
        return lambda tensors: tensors.pop(key) is None

    one = theirs(tmp_path / "a", tie_weights=True, change=drop("lm_head.weight"))
    theirs(tmp_path / "b", tie_weights=True, change=lambda t: {
        **{key: x for key, x in t.items() if key != "token_embedding.weight"},
        "lm_head.weight": one["token_embedding.weight"]})
    params = flat(zoo.from_hf(tmp_path / "b"))
    assert "head" not in params
    assert np.array_equal(params["embed/table"], one["token_embedding.weight"])
    theirs(tmp_path / "c", change=drop("token_embedding.weight"))
    with pytest.raises(ValueError, match=r"'token_embedding.weight' \[17, 12\] is missing"):
        zoo.from_hf(tmp_path / "c")


def test_the_layout_of_another_back_end(tmp_path):
    """Which one it looks like; unsaid, the tensors tell."""
    values = settings("ms", "vanilla")
    theirs(tmp_path / "wrong", "ms", "cuda", slstm_block=values["slstm_block"])
    with pytest.raises(ValueError, match=r"config\.json: slstm_block.slstm.backend is 'vanilla', "
                                         "and by the shape .* look like the layout of 'cuda'; "):
        zoo.from_hf(tmp_path / "wrong")
    del values["slstm_block"]["slstm"]["backend"]
    theirs(tmp_path / "unsaid", "ms", "cuda", slstm_block=values["slstm_block"])
    theirs(tmp_path / "said", "ms", "cuda")
    assert_same(*(zoo.from_hf(tmp_path / name) for name in ("unsaid", "said")))


@pytest.mark.parametrize(("values", "message"), [
    ({"mlstm_block": None, "slstm_block": None}, "slstm_block is null, and mlstm_block is, too"),
    ({"slstm_block": None}, "slstm_block is null, and slstm_at has 1; give it"),
    ({"slstm_at": [5]}, r"slstm_at = \[5\]; it must be a list of integers from 0 to 4, or 'all'"),
    ({"slstm_at": "some"}, "slstm_at = 'some'; it must be a list"),
    ({"slstm_at": [True]}, r"slstm_at = \[True\]; it must be"),
    ({"num_blocks": 10**9}, "num_blocks is 1000000000; it must be at most 16384"),
    ({"num_blocks": 16000}, "says 16000 layers, and there are"),
    ({"context_length": -1}, "context_length = -1; it must be an integer from 1"),
    ({"bias": True}, "bias is True; what can be converted is false"),
    ({"add_post_blocks_norm": False}, "add_post_blocks_norm is False; what can be converted is t"),
    ({"mlstm_block": {"mlstm": 5}}, "mlstm_block.mlstm = 5; it must be an object"),
    ({"slstm_block": [1]}, r"slstm_block = \[1\]; it must be an object"),
    ({"slstm_block": {"slstm": "cuda"}}, "slstm_block.slstm = 'cuda'; it must be an object"),
    ({"mlstm_block": {"mlstm": {"num_heads": 3}}},
     "mlstm_block.mlstm has an inner width of 64, which does not divide into 3 heads of blocks of"),
    ({"mlstm_block": {"mlstm": {"proj_factor": -2}}}, "proj_factor is -2, which makes no width"),
    ({"mlstm_block": {"mlstm": {"proj_factor": 1e308}}}, "which makes no width of 12"),
    ({"mlstm_block": {"mlstm": {"conv1d_kernel_size": 0}}}, "conv1d_kernel_size = 0; it must be"),
    ({"mlstm_block": {"mlstm": {"num_heads": 1}}}, "problems with its tensors"),
    ({"slstm_block": {"feedforward": None}}, "slstm_block.feedforward is None; what can be"),
    ({"slstm_block": {"feedforward": {"act_fn": "selu"}}}, "act_fn is 'selu'; what can be"),
    ({"slstm_block": {"feedforward": {"bias": True}}}, "feedforward.bias is True; what can be"),
    ({"slstm_block": {"slstm": {"function": "lstm"}}}, "function is 'lstm'; what can be"),
    ({"slstm_block": {"slstm": {"gradient_recurrent_clipval": 1.0}}},
     "gradient_recurrent_clipval is 1.0; what can be converted is null"),
    ({"slstm_block": {"slstm": {"group_norm_weight": False}}}, "group_norm_weight is False"),
    ({"slstm_block": {"slstm": {"num_heads": 5}}}, "slstm.num_heads is 5; it must divide the wid"),
])
def test_refuses_what_it_cannot_express(values, message, tmp_path):
    theirs(tmp_path / "theirs", **values)
    with pytest.raises(ValueError, match=message):
        zoo.from_hf(tmp_path / "theirs")


def test_what_is_not_understood_is_said(tmp_path, caplog):
    theirs(tmp_path / "theirs", mlstm_block={
        "mlstm": {**settings("m", "")["mlstm_block"]["mlstm"], "gate_softcap": 15.0}})
    convert.load_config(tmp_path / "theirs")
    assert "not understood, and left out: mlstm_block.mlstm.gate_softcap" in caplog.text


def test_defaults_are_those_of_their_dataclasses(tmp_path):
    """A YAML's few keys; a block that is not used does not matter."""
    tmp_path.joinpath("config.json").write_text(json.dumps({
        "vocab_size": 9, "context_length": 7, "num_blocks": 3, "mlstm_block": {},
        "slstm_block": {"feedforward": {"act_fn": "none"}}}))
    config = convert.load_config(tmp_path)
    assert (config.width, config.blocks, config.slstm, config.mlp) == (128, "m", None, None)
    assert (config.mlstm.num_heads, config.mlstm.head_dim) == (4, 64)


@pytest.mark.parametrize(("overrides", "message"), [
    ({"mlstm.norm_eps": 1e-3}, "xlstm_lm: mlstm.norm_eps is 0.001; what can be"),
    ({"norm.offset": 0.0}, "xlstm_lm: norm.offset is 0.0"),
    ({"logit_softcap": 3.0}, "xlstm_lm: logit_softcap is 3.0"),
    ({"mlp.activation": "gelu_tanh"}, "xlstm_lm: mlp.activation is 'gelu_tanh'; what can be"),
    ({"mlp.gated": False}, "xlstm_lm: mlp.gated is False"),
])
def test_no_config_of_theirs_says_more_than_it_can(overrides, message):
    with pytest.raises(ValueError, match=message):
        choose_family(small(**overrides))


@pytest.mark.parametrize(("width", "inner", "hidden"), [(49, 60, 29), (130, 284, 1000)])
def test_odd_widths_are_written_as_factors(width, inner, hidden):
    config = zoo.override(alone(), {
        "width": width, "mlstm.num_heads": 1, "mlstm.head_dim": inner})
    assert choose_family(config).model_type == "xlstm_lm"
    config = small(width=width * 4, **{"mlp.hidden": hidden})
    assert choose_family(config).model_type == "xlstm_lm"


def test_kinds_are_named(tmp_path):
    model = tiny.model(small())
    with pytest.raises(ValueError, match="kind is 'xlstm_cuda'; a XLstm's is one of xlstm, xlstm_"):
        zoo.to_hf(model, tmp_path / "new", kind="xlstm_cuda")
    with pytest.raises(ValueError, match="xlstm: mlstm is 'PreUpMLstm'; what can be converted is"):
        zoo.to_hf(model, tmp_path / "new", kind="xlstm")
