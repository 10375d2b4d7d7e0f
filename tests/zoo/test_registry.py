"""Presets by name, overrides by path, configs as data, and models built where they live."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
import zoo
from layers.attention import Attention
from layers.moe import Moe
from layers.norm import Norm
from layers.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling
from layers.stack import to_stacked
from tests import tiny
from tests.tolerances import assert_close
from zoo import protocol
from zoo.transformer import Transformer

PRESETS = pytest.mark.parametrize("name", zoo.list())


def test_names():
    assert zoo.list() == [
        "llama-tiny", "llama-60m", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "llama2-7b",
        "llama3-8b", "llama3-70b", "llama3.1-8b", "llama3.2-1b", "llama3.2-3b", "qwen2.5-0.5b",
        "qwen2.5-1.5b", "qwen2.5-7b", "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b",
        "qwen3-14b", "qwen3-32b", "qwen3-30b-a3b", "qwen3-235b-a22b", "qwen1.5-moe-a2.7b",
        "mistral-7b", "mistral-7b-v0.3", "mixtral-8x7b", "mixtral-8x22b", "gemma2-2b",
        "gemma2-9b", "gemma2-27b", "gemma3-270m", "gemma3-1b", "gemma3-4b", "gemma3-12b",
        "gemma3-27b", "xlstm-tiny", "xlstm-165m", "xlstm-1.3b", "xlstm-2.7b", "xlstm-7b",
        "xlstm-mixed-tiny", "lstm-tiny", "gru-tiny", "paratranscnn-tiny", "paratranscnn-small",
        "paratranscnn",
    ]
    language, images = zoo.list("language"), zoo.list("segmentation")
    assert [*language, *images] == zoo.list()
    assert images == ["paratranscnn-tiny", "paratranscnn-small", "paratranscnn"]


@PRESETS
def test_configs_are_values(name):
    config = zoo.config(name)
    assert config == zoo.config(name)
    assert hash(config) == hash(zoo.config(name))
    assert config.kind != "language" or config.max_length >= 1024
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 3


@pytest.mark.parametrize(
    ("name", "near"),
    [("llama3_8b", "llama3-8b"), ("gpt-2", "gpt2"), ("qwen3-0.6B", "qwen3-0.6b"),
     ("mistral7b", "mistral-7b"), ("LLAMA-TINY", "llama-tiny"), ("GPT2", "gpt2")],
)
def test_unknown_name(name, near):
    for door in (zoo.config, zoo.build):
        with pytest.raises(ValueError, match=f"unknown model '{name}'; did you mean '{near}'"):
            door(name)


@pytest.mark.parametrize("name", [None, 3, {"width": 2}])
def test_a_name_is_a_text(name):
    for door in (zoo.config, zoo.build):
        with pytest.raises(ValueError, match=r"the model is .*; give its name, one of zoo.list"):
            door(name)


def test_name_like_nothing():
    with pytest.raises(ValueError, match="unknown model 'zzz'; known: gemma2-27b, gemma2-2b,"):
        zoo.config("zzz")


def test_overrides():
    config = zoo.config(
        "qwen3-8b", num_layers=3, dropout=0, tie_embeddings="True",
        **{"attention.window": "1_024", "attention.rope.theta": "5e5", "attention.qk_norm": None,
           "mlp.activation": "gelu", "norm.eps": "1e-3", "attention.softcap": 30,
           "attention.v_head_dim": 64.0})  # fmt: skip
    assert config.num_layers == 3
    assert config.tie_embeddings is True
    assert config.attention.window == 1024
    assert config.attention.rope == Rope(5e5)
    assert config.attention.qk_norm is None
    assert config.attention.softcap == 30.0
    assert isinstance(config.attention.softcap, float)
    assert config.attention.v_head_dim == 64
    assert isinstance(config.attention.v_head_dim, int)
    assert (config.mlp.activation, config.norm.eps) == ("gelu", 1e-3)
    # What is not named stays.
    assert config.attention.num_kv_heads == 8
    assert config.vocab_size == 151936


def test_overrides_take_whole_dataclasses_and_none():
    config = zoo.config("llama3-8b", **{
        "attention.rope": Rope(1e4, Llama3Scaling()), "attention.rope.theta": 2e4})
    assert config.attention.rope == Rope(2e4, Llama3Scaling())
    assert zoo.config("mistral-7b", **{"attention.window": "none"}).attention.window is None


def test_overrides_apply_together():
    """Two changes that are only valid together."""
    config = zoo.config("gpt2", **{"attention.num_heads": 7, "attention.num_kv_heads": 7})
    assert config.attention.num_heads == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_layer": 2}, "transformer has no field 'num_layer'; did you mean 'num_layers'"),
        ({"attention.windw": 2}, "attention has no field 'windw'; did you mean 'window'"),
        ({"width.x": 2}, "'width' is 768, which has no fields; cannot set width.x"),
        ({"attention.rope.theta": 2},
         "'attention.rope' is None, which has no fields; cannot set attention.rope.theta"),
        ({"attention": Attention(4, 2, 8, rope=Rope()), "attention.rope.theta": "x"},
         "attention.rope.theta is 'x'; it must be float"),
        ({"attention": Attention(4, 2, 8, rope=Rope()), "attention.rope.thet": 2},
         "attention.rope has no field 'thet'; did you mean 'theta'"),
        ({"num_layers": "two"}, "num_layers is 'two'; it must be int"),
        ({"num_layers": 2.5}, "num_layers is 2.5; it must be int"),
        ({"num_layers": True}, "num_layers is True; it must be int"),
        ({"num_layers": None}, "num_layers cannot be none; it is an int"),
        ({"mlp.hidden": None}, "mlp.hidden cannot be none; it is an int"),
        ({"tie_embeddings": "yes"}, "tie_embeddings is 'yes'; it must be bool"),
        ({"attention.window": "wide"}, "^attention.window is 'wide'; it must be int or NoneType"),
        ({"attention.scale": "inf"}, "^attention.scale is inf; it must be finite"),
        ({"attention.qk_norm": 1e-6}, "^attention.qk_norm is 1e-06; it must be Norm or NoneType"),
        ({"embed_scale": "inf"}, "^embed_scale is inf; it must be finite"),
        ({"embed_scale": 0}, "^embed_scale is 0.0; it must be positive, or none"),
        ({"logit_softcap": -3}, "^logit_softcap is -3.0; it must be positive, or none"),
        ({"local_layers": 1}, "local_layers is 1 and local is None; give both, or 0 and none"),
        ({"local": Attention(4, 4, 8)}, "local_layers is 0 and local is Attention.*; give both"),
        ({"local_layers": -1}, "local_layers is -1; it must be 0 or more"),
        ({"mlp": None}, "mlp cannot be none; it is a Mlp or Moe"),
        ({"mlp.num_experts": 3}, "mlp has no field 'num_experts'"),
        ({"attention.scale": "nan"}, "attention.scale is nan; it must be"),
        ({"attention": Attention(4, 2, 8, rope=Rope(float("inf")))},
         "^attention.rope.theta is inf; it must be finite"),
        ({"attention": Attention(4, 2, 8, rope=Rope(1e4, YarnScaling(fast=float("inf"))))},
         "^attention.rope.scaling.fast is inf; it must be finite"),
        ({"norm.eps": "inf"}, "^norm.eps is inf; it must be finite"),
        ({"norm.eps": "nan"}, "norm.eps is nan; it must be"),
        ({"dropout": "nan"}, "^dropout is nan; it must be finite"),
        ({"mlp": 3}, "mlp is 3; it must be Mlp"),
        ({"attention": Norm()}, "attention is Norm.*it must be Attention"),
        ({"num_layers": 0}, "num_layers is 0; it must be at least 1"),
        ({"attention.num_kv_heads": 5}, "num_heads is 12, which does not divide by .* = 5"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"mlp.activation": "swish"}, "mlp.activation is 'swish'; it must be one of"),
    ],
)
def test_refused_overrides(overrides, message):
    with pytest.raises(ValueError, match=message):
        zoo.config("gpt2", **overrides)


@PRESETS
def test_round_trip(name):
    data = json.loads(json.dumps(zoo.to_dict(zoo.config(name))))
    assert data["type"] == type(zoo.config(name)).__name__
    assert zoo.from_dict(data) == zoo.config(name)


def test_round_trip_of_every_option():
    for scaling in (LinearScaling(2.0), Llama3Scaling(32.0),
                    YarnScaling(8.0, original_length=4096)):
        attention = Attention(4, 2, 8, 6, Rope(1e6, scaling), 3, Norm("rms", 1e-5, offset=1.0),
                              20.0, 0.1, True, True)
        config = zoo.config(
            "gpt2", attention=attention, local=attention, local_layers=2, post_norms=True,
            embed_scale=3.0, logit_softcap=4.0,
            mlp=Moe(5, 2, 4, "gelu", False, 6, 0.1, 0.2))
        assert zoo.from_dict(json.loads(json.dumps(zoo.to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Transfomer"}, "unknown config type 'Transfomer'; did you mean 'Transformer'"),
        ({"type": None}, "unknown config type None"),
        ({"widht": 3}, "Transformer has no field 'widht'; did you mean 'width'"),
        ({"vocab_multiple": 0}, "vocab_multiple is 0; it must be at least 1"),
        ({"width": 0}, "width is 0; it must be at least 1"),
    ],
)
def test_refused_data(change, message):
    with pytest.raises(ValueError, match=message):
        zoo.from_dict({**zoo.to_dict(zoo.config("gpt2")), **change})


def test_data_that_lacks_a_field():
    data = zoo.to_dict(zoo.config("gpt2"))
    del data["mlp"]["hidden"]
    with pytest.raises(ValueError, match="Mlp lacks the field 'hidden'"):
        zoo.from_dict(data)


def params(*args, **options):
    return protocol.split(zoo.build(*args, **options))[1]


def loss_of(config, values):
    model = protocol.merge(protocol.split(zoo.build(config, abstract=True))[0], values)
    batch = tiny.batch(40)
    total, weight, _ = jax.jit(
        lambda batch: model.loss(model(batch), batch["labels"], batch["weights"]))(batch)
    return total / weight


def test_seed():
    config = tiny.config("qwen2.5-7b")
    first = params(config, seed=3)
    assert_close(params(config, seed=3), first, tol=0)
    other = params(config, seed=4)
    assert abs(loss_of(config, first) - np.log(40)) < 0.5  # it knows next to nothing
    drawn = jax.tree.map(lambda x, y: bool((x != y).any()), first, other)
    assert drawn["embed"]["table"] and drawn["head"]
    assert drawn["stack"]["layers"]["0"]["0"]["mixer"]["query"]["kernel"]
    assert not drawn["norm"]["scale"]
    # No two matrices of one shape are equal, within a layer or between layers.
    layer, next_layer = first["stack"]["layers"]["0"]["0"], first["stack"]["layers"]["1"]["0"]
    assert (layer["mlp"]["gate"]["kernel"] != layer["mlp"]["up"]["kernel"]).any()
    assert (layer["mixer"]["key"]["kernel"] != layer["mixer"]["value"]["kernel"]).any()
    assert (layer["mlp"]["up"]["kernel"] != next_layer["mlp"]["up"]["kernel"]).any()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_refused_seed(seed):
    with pytest.raises(ValueError, match=f"seed is {seed}; it must be from 0 to 2"):
        zoo.build(tiny.config("gpt2"), seed=seed)


def test_dtype():
    config, batch = tiny.config("qwen3-8b"), tiny.batch(40, rows=2)
    model = zoo.build(config, dtype=jnp.bfloat16)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(protocol.split(model)[1]))
    output = jax.jit(model)(batch)
    assert output.hidden.dtype == jnp.bfloat16
    assert output.logits.dtype == jnp.float32
    # The same numbers, rounded.
    assert_close(protocol.split(model)[1], params(config), tol=1e-2)
    definition, full = protocol.split(zoo.build(config))
    cast = protocol.merge(definition, protocol.cast(full, jnp.bfloat16))
    assert_close(jax.jit(cast)(batch).logits, output.logits, tol=0.05)
    for dtype in (jnp.int32, jnp.float16, "float33", None, 3):
        with pytest.raises(ValueError, match="parameters are float32 or bfloat16"):
            zoo.build(config, dtype=dtype)


def test_abstract():
    """Shapes, dtypes and layouts of the real thing, at no cost."""
    config, mesh = tiny.config("qwen3-8b"), sharding.mesh(tiny.MESH)
    abstract = params(config, mesh=mesh, abstract=True, dtype=jnp.bfloat16)
    real = params(config, mesh=mesh, dtype=jnp.bfloat16)

    def kinds(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)

    assert kinds(abstract) == kinds(real)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))
    huge = zoo.build("llama3-70b", abstract=True)
    assert protocol.num_params(huge) == 70_553_706_496


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
def test_parameters_do_not_depend_on_the_mesh(stacked):
    config = tiny.config("qwen3-8b")
    one = params(config, stacked=stacked)
    mesh, rules = sharding.mesh(tiny.MESH), sharding.rules("fsdp_tp")
    eight = params(config, mesh=mesh, rules=rules, stacked=stacked)
    assert_close(eight, one, tol=0)
    assert_close(to_stacked(one), params(config, stacked=True), tol=0)
    kernel = to_stacked(eight)["stack"]["blocks"]["0"]["mlp"]["up"]["kernel"]
    assert kernel.shape == (2, 32, 48)
    assert kernel.addressable_shards[0].data.shape == (2, 16, 24)
    assert eight["head"].addressable_shards[0].data.shape == (16, 20)


def test_mesh_and_rules_default_to_the_ambient_ones():
    config, mesh = tiny.config("gpt2"), sharding.mesh("tensor:2")
    with sharding.use(mesh, sharding.rules("tp")):
        ambient = params(config)
    assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(ambient))
    assert ambient["embed"]["table"].addressable_shards[0].data.shape == (20, 32)
    alone = params(config)
    assert all(x.sharding.device_set == {jax.devices()[0]} for x in jax.tree.leaves(alone))


def test_mesh_and_rules_may_be_texts():
    config = tiny.config("gpt2")
    spread = params(config, mesh="fsdp:2,tensor:2", rules="tp,vocab=none", abstract=True)
    expected = params(config, mesh=sharding.mesh("fsdp:2,tensor:2"),
                      rules=dataclasses.replace(sharding.rules("tp"), vocab=None), abstract=True)
    assert jax.tree.map(lambda x: x.sharding, spread) == jax.tree.map(
        lambda x: x.sharding, expected)
    with pytest.raises(ValueError, match="did you mean 'fsdp'"):
        zoo.build(config, mesh="fdsp:2")
    with pytest.raises(ValueError, match="did you mean 'fsdp'"):
        zoo.build(config, rules="fspd")


def test_form_follows_the_device():
    """Lists of layers where the compiler copies slices of stacked weights: on a CPU."""
    assert "layers" in params(tiny.config("gpt2"))["stack"]
    assert "blocks" in params(tiny.config("gpt2"), stacked=True)["stack"]


def test_sizes_that_do_not_divide():
    mesh = sharding.mesh("tensor:8")
    with pytest.raises(ValueError, match="kv_heads of size 2 does not divide .*tensor:8"):
        zoo.build(tiny.config("llama3-8b", **{"attention.num_heads": 8}), mesh=mesh)
    with pytest.raises(ValueError, match="--rules=fsdp_tp,kv_heads=none"):
        zoo.build(tiny.config("llama3-8b", **{"attention.num_heads": 8}), mesh=mesh)
    with_key_heads_whole = params(tiny.config("llama3-8b", **{"attention.num_heads": 8}), mesh=mesh,
                                  rules="fsdp_tp,kv_heads=none", abstract=True)
    mixer = with_key_heads_whole["stack"]["layers"]["0"]["0"]["mixer"]
    assert mixer["key"]["kernel"].sharding.shard_shape((32, 2, 8)) == (32, 2, 8)
    assert mixer["query"]["kernel"].sharding.shard_shape((32, 8, 8)) == (32, 1, 8)


def test_merge_inverts_split():
    model = zoo.build(tiny.config("gpt2"))
    definition, values = protocol.split(model)
    hash(definition)
    again = protocol.split(protocol.merge(definition, values))
    assert again[0] == definition
    assert_close(again[1], values, tol=0)
    assert isinstance(protocol.merge(definition, values).config, Transformer)
    assert np.all([isinstance(name, str) for name in values["stack"]["layers"]])
