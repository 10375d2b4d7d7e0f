"""Models in and out of directories: to the bit, whole or not at all, and damage is noticed."""

import dataclasses
import json
import logging
import os
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sharding
import zoo
from tests import tiny
from tests.tiny import assert_same, flat
from zoo import convert, protocol, registry
from zoo.convert import directory, saving, table
from zoo.convert.source import TABLES, choose_family, open_source

# One of each table and each of its options.
NAMES = ("llama-tiny", "qwen2.5-0.5b", "qwen3-8b", "mistral-7b", "gemma2-2b", "gemma3-1b",
         "mixtral-8x7b", "qwen3-30b-a3b", "qwen1.5-moe-a2.7b", "gpt2")


def tiny_model(name, stacked=False, **overrides):
    """Small, but with what the family's config.json has no two keys for: one epsilon, one theta."""
    config = tiny.config(name, **overrides)
    full = zoo.config(name)
    same = {"norm.eps": full.norm.eps}
    for kind in ("attention", "local"):
        if getattr(full, kind) is not None and getattr(full, kind).rope is not None:
            same[f"{kind}.rope.theta"] = getattr(full, kind).rope.theta
    return tiny.model(zoo.override(config, same), stacked)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A Llama as Hugging Face has it, and the model it was written from. Copy it to change it."""
    model = tiny_model("llama-tiny", tie_embeddings=False)
    folder = tmp_path_factory.mktemp("theirs") / "llama"
    convert.to_hf(model, folder)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    return folder, model


@pytest.fixture
def copy(theirs, tmp_path):
    return shutil.copytree(theirs[0], tmp_path / "copy")


def change(folder, tensors=None, **settings) -> None:
    """Rewrites a directory's tensors by a function of their dict, and keys of its config."""
    if tensors is not None:
        path = folder / "model.safetensors"
        found = load_file(path)
        path.unlink()
        save_file(tensors(found) or found, path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("name", NAMES)
def test_round_trips_are_bitwise(name, tmp_path):
    """From either form in memory to theirs and ours, and back into the other form."""
    model = tiny_model(name)
    convert.to_hf(model, tmp_path / "theirs")
    convert.save(tiny_model(name, stacked=True), tmp_path / "ours")
    assert_same(model, convert.from_hf(tmp_path / "theirs", stacked=True))
    assert_same(model, convert.load(tmp_path / "ours"))
    assert convert.load_config(tmp_path / "ours") == model.config
    convert.to_hf(convert.load(tmp_path / "ours", stacked=True), tmp_path / "again")
    one, other = (load_file(tmp_path / d / "model.safetensors") for d in ("theirs", "again"))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "multiple"), [("llama-tiny", 8), ("gpt2", 8), ("gpt2", 100)])
def test_a_filled_up_vocabulary_there_and_back(name, multiple, dtype, tmp_path):
    """41 tokens in 48 or 100 rows, of which the last device of two has some or none. Zeros are
    behind them, and theirs has neither."""
    model = tiny_model(name, vocab_size=41, tie_embeddings=name == "gpt2")
    convert.to_hf(model, tmp_path / "theirs", dtype=dtype)
    mesh = sharding.mesh(tiny.MESH)
    found = convert.from_hf(tmp_path / "theirs", mesh=mesh, rules="fsdp_tp",
                            vocab_multiple=multiple)
    rows = {8: 48, 100: 100}[multiple]
    wanted = {path: x.astype(dtype) for path, x in flat(model).items()}
    wanted["embed/table"] = np.pad(wanted["embed/table"], ((0, rows - 41), (0, 0)))
    if name != "gpt2":
        wanted["head"] = np.pad(wanted["head"], ((0, 0), (0, rows - 41)))
    params = flat(found)
    assert params.keys() == wanted.keys()
    assert all(np.array_equal(params[path], wanted[path]) for path in wanted)
    table = protocol.split(found)[1]["embed"]["table"]
    assert table.addressable_shards[0].data.shape[0] == rows // 2
    convert.save(found, tmp_path / "ours")
    again = convert.load(tmp_path / "ours")
    assert_same(found, again)
    assert convert.load_config(tmp_path / "ours").vocab_multiple == multiple
    convert.to_hf(again, tmp_path / "back")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    assert_same(again, convert.load(tmp_path / "ours", vocab_multiple=multiple))
    with pytest.raises(ValueError, match=f"was saved with vocab_multiple={multiple}, not 3"):
        convert.load(tmp_path / "ours", vocab_multiple=3)
    with pytest.raises(ValueError, match="vocab_multiple is 0; it must be at least 1"):
        convert.from_hf(tmp_path / "theirs", vocab_multiple=0)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", ["qwen3-8b", "mixtral-8x7b"])
def test_onto_a_mesh(name, stacked, tmp_path, monkeypatch):
    """Each device gets its own part, and nothing is read that no device holds."""
    model = tiny_model(name)
    convert.to_hf(model, tmp_path / "theirs")
    mesh = sharding.mesh(tiny.MESH)
    read = []
    found = convert.load(tmp_path / "theirs", mesh=mesh, rules="fsdp_tp", stacked=stacked,
                         progress=read.append)
    assert_same(model, found)
    built = zoo.build(model.config, mesh=mesh, rules="fsdp_tp", abstract=True, stacked=stacked)
    for a, b in zip(*(jax.tree.leaves(protocol.split(m)[1]) for m in (found, built)), strict=True):
        assert a.sharding == b.sharding
        assert a.addressable_shards[0].data.shape == b.sharding.shard_shape(b.shape)
    total = sum(x.nbytes for x in flat(model).values())
    assert sum(read) == total


def test_bfloat16(tmp_path):
    model = tiny_model("llama-tiny")
    convert.to_hf(model, tmp_path / "half", dtype="bfloat16")
    half = convert.load(tmp_path / "half")
    assert {x.dtype.name for x in flat(half).values()} == {"bfloat16"}
    expected = {path: x.astype("bfloat16") for path, x in flat(model).items()}
    assert all(np.array_equal(x, expected[path]) for path, x in flat(half).items())
    assert flat(convert.load(tmp_path / "half", dtype="float32"))["norm/scale"].dtype == np.float32


def test_what_comes_along(theirs, tmp_path):
    """Tokenizer, template and ids of special tokens, through our own directory and back."""
    folder = shutil.copytree(theirs[0], tmp_path / "theirs")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    change(folder, bos_token_id=3, eos_token_id=[7, 9])
    convert.save(convert.from_hf(folder), tmp_path / "ours", like=folder)
    convert.to_hf(convert.load(tmp_path / "ours"), tmp_path / "back", like=tmp_path / "ours")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (3, [7, 9])
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()


def published(name) -> bool:
    """Whether there is a format of others for a preset's family."""
    return bool(TABLES[next(family for family, (_, config) in registry.FAMILIES.items()
                            if config == type(zoo.config(name)).__name__)])


def test_every_family_says_whether_others_have_a_format_of_it():
    assert TABLES.keys() == registry.FAMILIES.keys()
    assert {name for name, tables in TABLES.items() if not tables} == {"rnn"}


@pytest.mark.parametrize("name", [name for name in zoo.list() if not published(name)])
def test_a_family_that_no_one_else_has(name, tmp_path):
    """Refused in a line, for every config of it."""
    with pytest.raises(ValueError, match=r"^no one else has a format for a Recurrent; write it in "
                                         r"our own, with zoo.save or --to=native$"):
        convert.to_hf(tiny.model(tiny.config(name)), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in zoo.list() if published(name)])
def test_every_preset_has_a_config_json_that_means_the_same(name):
    config = zoo.config(name)
    family = choose_family(config)
    values = family.settings(config)
    back = family.config(json.loads(json.dumps(values)), "there")
    assert family.comparable(back) == family.comparable(config)


LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
QWEN_25_7B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
    "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
    "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False,
    "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral",
    "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
    "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
    "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
}  # fmt: skip


# With an image encoder; its text_config has only what differs from transformers' defaults.
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
    "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
    "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
    "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                    "num_hidden_layers": 34, "sliding_window": 1024,
                    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152},
}  # fmt: skip


@pytest.mark.parametrize(("values", "preset"), [
    (LLAMA_31_8B, "llama3.1-8b"), (QWEN_25_7B, "qwen2.5-7b"), (MIXTRAL_8X7B, "mixtral-8x7b"),
    (GEMMA_3_1B, "gemma3-1b"), (GEMMA_3_4B, "gemma3-4b"),
])
def test_published_config_jsons_are_the_presets(values, preset, tmp_path, caplog):
    (tmp_path / "config.json").write_text(json.dumps(values))
    found, expected = convert.load_config(tmp_path), zoo.config(preset)
    family = choose_family(expected)
    # The preset has the length of the model's card, the file that of its rope.
    found = dataclasses.replace(found, max_length=expected.max_length)
    assert family.comparable(found) == family.comparable(expected)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING
                and "use_mrope" not in r.message and "the text model alone" not in r.message]


def read_config(model_type, **values):
    """What we make of the config.json of a preset's, changed."""
    preset = {"gemma3_text": "gemma3-1b", "qwen3_moe": "qwen3-30b-a3b", "llama": "llama2-7b"}
    family = choose_family(zoo.config(preset[model_type]), model_type)
    return family.config({**family.settings(zoo.config(preset[model_type])), **values}, "there")


def test_settings_mean_what_transformers_takes_them_for():
    yarn = read_config("llama", rope_scaling={"type": "yarn", "factor": 4.0},
                       max_position_embeddings=100)
    assert yarn.attention.rope.scaling.original_length == 100
    assert read_config("gemma3_text", attn_logit_softcapping=3.0).attention.softcap is None
    window = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 28}
    assert read_config("qwen3_moe", **window).attention.window == 9


def test_all_problems_at_once(copy):
    def damage(tensors):
        tensors["model.layers.1.mlp.gate_projection.weight"] = tensors.pop(
            "model.layers.1.mlp.gate_proj.weight")
        key = "model.layers.0.self_attn.o_proj.weight"
        tensors[key] = tensors[key][:, :-1].copy()
        tensors["visual.patch.weight"] = np.zeros(3, np.float32)
        tensors["model.norm.weight"] = np.zeros(32, np.int8)

    change(copy, damage)
    with pytest.raises(ValueError) as error:
        convert.from_hf(copy)
    text = str(error.value)
    assert "5 problems" in text
    assert ("'model.layers.1.mlp.gate_proj.weight' [48, 32] is missing (for stack/blocks/0/mlp/"
            "gate/kernel); the nearest is 'model.layers.1.mlp.gate_projection.weight'") in text
    assert "is [32, 31]; the config makes it [32, 32]" in text
    assert "'visual.patch.weight' [3] has no place in the model" in text
    assert "'model.norm.weight' is int8" in text


def test_a_head_that_is_tied_and_stored(copy):
    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    change(copy, tie, tie_word_embeddings=True)
    assert "head" not in flat(convert.from_hf(copy))

    def untie(tensors):
        tensors["lm_head.weight"][0, 0] += 1

    change(copy, untie)
    with pytest.raises(ValueError, match="holds other numbers; set tie_word_embeddings to false"):
        convert.from_hf(copy)


def test_the_nearest_names_are_not_sought_for_what_is_not_shown(copy, monkeypatch):
    """That took minutes for a few thousand tensors."""
    sought = []
    monkeypatch.setattr(table.difflib, "get_close_matches",
                        lambda key, *args, **kwargs: sought.append(key) or [])
    with open_source(copy) as source:
        tensors = {f"other.{i}": source.weights["model.norm.weight"] for i in range(100)}
        problems = source.table.problems(tensors)
    assert len(problems) == 21 + 100 and len(sought) == table.SHOWN


def test_buffers_of_old_checkpoints_are_left_out(copy):
    change(copy, lambda t: t.update({
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}))
    convert.from_hf(copy)


def test_numbers_that_are_not_finite_warn(copy, caplog):
    def damage(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan

    change(copy, damage)
    model = convert.from_hf(copy)
    assert "not finite in stack/layers/1/0/mlp/up/kernel" in caplog.text
    caplog.clear()
    convert.to_hf(model, copy.parent / "again", dtype="bfloat16")
    assert "not finite in model.layers.1.mlp.up_proj.weight" in caplog.text


def test_blocks_are_the_array_in_order(monkeypatch):
    """Of any rank, in any order of axes, cut anywhere, with axes of length 1 and none."""
    monkeypatch.setattr(table, "BLOCK_BYTES", 1000)
    rng = np.random.default_rng(0)
    for _ in range(500):
        rank = int(rng.integers(1, 5))
        whole = rng.normal(size=rng.integers(1, 70 if rank < 3 else 12, rank)).astype("bfloat16")
        view = whole.transpose(rng.permutation(rank))
        view = view[tuple(slice(int(rng.integers(0, n)), None) for n in view.shape)]
        blocks = list(table.blocks(view))
        assert all(block.flags.c_contiguous for block in blocks)
        assert np.array_equal(np.concatenate([b.reshape(-1) for b in blocks]), view.reshape(-1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_finite(dtype):
    x = np.array([0.0, -0.0, 1.0, -3e4, 3e4], saving.DTYPES[dtype])
    assert table.all_finite(x) and table.all_finite(x[:0])
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        assert not table.all_finite(np.append(x, x.dtype.type(bad)))


def test_numbers_too_large_for_a_type_warn(theirs, tmp_path, caplog):
    model = zoo.protocol.merge(*(
        part if i == 0 else jax.tree.map(lambda x: x * 1e6, part)
        for i, part in enumerate(protocol.split(theirs[1]))))
    convert.save(model, tmp_path / "small", dtype="float16")
    assert "not finite in embed/table" in caplog.text


BAD_CONFIGS = {
    "model_type": ({"model_type": "lama"}, "model_type 'lama'; what can be converted is llama,"),
    "run": ({"model_type": None, "training": {}}, "is of a training run; make a model's directory"),
    "no type": ({"model_type": None}, "model_type None"),
    "lacks": ({"hidden_size": None}, "lacks 'hidden_size'; it must be an integer from 1"),
    "text": ({"hidden_size": "32"}, "hidden_size = '32'; it must be an integer"),
    "flag": ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1; it must be true or false"),
    "bool": ({"num_hidden_layers": True}, "num_hidden_layers = True; it must be an integer"),
    "negative": ({"num_hidden_layers": -1}, "num_hidden_layers = -1; it must be an integer"),
    "many layers": ({"num_hidden_layers": 10**9}, "says 1000000000 layers, and there are 21 ten"),
    "wide": ({"hidden_size": 1 << 32, "head_dim": 8}, "problems with its tensors|no array"),
    "infinite": ({"rms_norm_eps": 1e999}, "rms_norm_eps = inf; it must be a finite number"),
    "heads": ({"num_key_value_heads": 3}, "num_heads is 4, which does not divide by"),
    "activation": ({"hidden_act": "mish"}, "hidden_act is 'mish'; what can be converted is silu"),
    "rope": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "needs factor >= 1"),
    "rope list": ({"rope_scaling": [1]}, r"rope_scaling = \[1\]; it must be an object"),
    "quantised": ({"quantization_config": {"bits": 4}}, "not quantised"),
    "many experts": ({"model_type": "mixtral", "num_local_experts": 10**9,
                      "num_experts_per_tok": 2}, "2 layers of 1000000000 experts, and"),
    "other sizes": ({"intermediate_size": 50}, r"the config makes it \[50, 32\]"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs(case, copy):
    values, message = BAD_CONFIGS[case]
    change(copy, **values)
    with pytest.raises(ValueError, match=message):
        convert.load(copy)


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_no_json(text, copy):
    (copy / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match="config.json (is no JSON|holds no JSON object)"):
        convert.load(copy)


def test_a_config_that_is_a_pipe(copy):
    (copy / "config.json").unlink()
    os.mkfifo(copy / "config.json")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        convert.load(copy)


def test_a_tokenizer_that_is_a_link_elsewhere(theirs, copy, tmp_path):
    """The copy would hold a file of the user's that has nothing to do with it."""
    (tmp_path / "secret").write_text("{}")
    (copy / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"tokenizer\.json is a link that leads outside"):
        convert.save(theirs[1], tmp_path / "new", like=copy)
    assert not list(tmp_path.glob("new*"))


def test_what_is_loaded_on_demand_is_listed():
    assert {"from_hf", "load", "save", "to_hf"} <= set(dir(zoo))


def test_directories_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="is no directory"):
        convert.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no safetensors file; give"):
        convert.load(tmp_path)
    (tmp_path / "model.pth").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"only 'model\.pth': a pickle .* safetensors\.torch"):
        convert.load(tmp_path)


@pytest.mark.parametrize("how", ["flip", "cut", "swap", "lose"])
def test_damage_to_our_own_files_is_noticed(how, tmp_path):
    convert.save(tiny_model("llama-tiny"), tmp_path / "ours")
    path = tmp_path / "ours" / "model.safetensors"
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[-5] ^= 1
    elif how == "cut":
        data = data[:-4]
    elif how == "swap":
        path = tmp_path / "ours" / "config.json"
        data = path.read_bytes().replace(b'"rms"', b'"rmz"')
    path.unlink() if how == "lose" else path.write_bytes(data)
    with pytest.raises(ValueError, match="copy the whole directory again"):
        convert.load(tmp_path / "ours")


@pytest.mark.parametrize("how", ["empty", "more"])
def test_a_manifest_that_leaves_something_out(how, tmp_path):
    convert.save(tiny_model("llama-tiny"), tmp_path / "ours")
    if how == "empty":
        (tmp_path / "ours" / "manifest.json").write_text('{"files": {}}')
    else:
        shutil.copy(tmp_path / "ours" / "model.safetensors", tmp_path / "ours" / "x.safetensors")
    with pytest.raises(ValueError, match="is not in the directory's manifest"):
        convert.load(tmp_path / "ours")


def test_our_own_config_of_a_billion_layers(tmp_path):
    convert.save(tiny_model("llama-tiny"), tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    values = json.loads(path.read_text())
    values["model"]["num_layers"] = 10**9
    path.write_text(json.dumps(values))
    (tmp_path / "ours" / "manifest.json").unlink()
    directory.write_manifest(tmp_path / "ours")
    with pytest.raises(ValueError, match="says 1000000000 layers, and there are"):
        convert.load(tmp_path / "ours")


def test_a_later_format(tmp_path):
    convert.save(tiny_model("llama-tiny"), tmp_path / "ours")
    change(tmp_path / "ours", format_version=99)
    with pytest.raises(ValueError, match="format_version 99; this version of parazoo reads 1"):
        convert.load(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"not of Hugging Face but of zoo\.save"):
        convert.from_hf(tmp_path / "ours")


def test_a_model_without_numbers(tmp_path):
    with pytest.raises(ValueError, match="abstract and holds no numbers; build it with abstract=F"):
        convert.save(zoo.build("llama-tiny", abstract=True), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken(theirs, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(ValueError, match="exists already; give the name of a new directory"):
        convert.to_hf(theirs[1], tmp_path / "taken")
    assert (tmp_path / "taken" / "file").read_text() == "mine"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(error, theirs, tmp_path, monkeypatch):
    from zoo.convert import saving

    def fail(*args, **kwargs):
        (args[0] / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(saving.safetensors, "write", fail)
    with pytest.raises(type(error)):
        convert.to_hf(theirs[1], tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_is_replaced(theirs, tmp_path):
    (tmp_path / "new.unfinished").mkdir()
    (tmp_path / "new.unfinished" / "model.safetensors").write_bytes(b"half")
    convert.to_hf(theirs[1], tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    assert_same(theirs[1], convert.from_hf(tmp_path / "new"))


def test_a_directory_that_another_process_writes(theirs, tmp_path):
    """Two that write to one directory would leave it with parts of both."""
    with directory.create(tmp_path / "new") as part:
        (part / "file").write_text("mine")
        with pytest.raises(ValueError, match="is being written by another process"):
            convert.to_hf(theirs[1], tmp_path / "new")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["file"]


def test_a_head_dim_that_other_families_cannot_have(tmp_path):
    convert.to_hf(tiny_model("gpt2", **{"attention.head_dim": 7, "width": 28}), tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["model_type"] == "gpt2"


def test_ids_that_nobody_knows_are_null(theirs):
    assert json.loads((theirs[0] / "config.json").read_text())["eos_token_id"] is None


def test_experts_are_moved_one_by_one(tmp_path):
    """From tensors apart into one of ours, with no more in memory than one of them."""
    model = tiny_model("mixtral-8x7b")
    convert.to_hf(model, tmp_path / "theirs")
    largest = 0

    def get(piece):
        nonlocal largest
        for part in saving.from_source(source)(piece):
            largest = max(largest, part.nbytes)
            yield part

    with open_source(tmp_path / "theirs") as source:
        saving.write_native(tmp_path / "ours", source.config, get, source.dtype)
        assert largest == max(t.nbytes for t in source.weights.values())
    assert_same(model, convert.load(tmp_path / "ours"))


def test_a_config_that_no_one_else_has(tmp_path):
    model = tiny_model("llama-tiny", **{"attention.softcap": 3.0})
    with pytest.raises(ValueError) as error:
        convert.to_hf(model, tmp_path / "new")
    assert "llama: attention.softcap is 3.0; what can be converted is None" in str(error.value)
    assert "gemma2: norm.offset is 0.0" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_opening_closes_its_files(theirs):
    with open_source(theirs[0]) as source:
        weights = source.weights
        weights.read("model.norm.weight")
    with pytest.raises((ValueError, OSError)):
        weights.read("model.norm.weight")
