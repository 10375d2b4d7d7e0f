"""Rules: the partition spec of each shape, and what is refused."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec as P

import sharding
from sharding import RULES, Rules, ShardingError
from tests.tiny import MESH


@pytest.fixture(scope="module")
def mesh():
    return sharding.mesh(MESH)


def test_rules_are_a_value():
    """Equal rules are one jit cache entry; a typo is no field; nothing can be changed."""
    assert hash(Rules(embed="fsdp")) == hash(sharding.rules("fsdp"))
    assert Rules(embed="fsdp") == sharding.rules("fsdp")
    with pytest.raises(AttributeError):
        Rules().mesh_axes("embd", sharding.mesh("data:1"))
    with pytest.raises(TypeError):
        Rules(embd="fsdp")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Rules().embed = "fsdp"


@pytest.mark.parametrize(
    ("preset", "kernel", "head", "activation"),
    [
        ("dp", P(None, None), P(None, None), P(("data", "fsdp"), None, None)),
        ("fsdp", P("fsdp", None), P("fsdp", None), P(("data", "fsdp"), None, None)),
        ("tp", P(None, "tensor"), P(None, "tensor"), P(("data", "fsdp"), None, None)),
        ("fsdp_tp", P("fsdp", "tensor"), P("fsdp", "tensor"), P(("data", "fsdp"), None, None)),
    ],
)
def test_presets(mesh, preset, kernel, head, activation):
    rules = sharding.rules(preset)
    assert rules.spec("embed", "mlp", mesh=mesh) == kernel
    assert rules.spec("embed", "vocab", mesh=mesh, shape=(4, 6)) == head
    assert rules.spec("batch", "seq", "embed", mesh=mesh, shared=True) == activation
    assert sorted(RULES) == ["dp", "fsdp", "fsdp_tp", "tp"]


def test_axes_of_size_one_and_absent_axes_are_dropped():
    one = sharding.mesh("data:4,fsdp:1,tensor:2")
    assert sharding.rules("fsdp_tp").spec("batch", "embed", "mlp", mesh=one) == P(
        "data", None, "tensor")
    absent = sharding.mesh("fsdp:8")
    assert sharding.rules("fsdp_tp").spec("embed", "mlp", "batch", mesh=absent, shared=True) == P(
        "fsdp", None, None)
    alone = sharding.mesh("data:1")
    assert sharding.rules("fsdp_tp").spec("batch", "mlp", None, mesh=alone) == P(None, None, None)


def test_a_mesh_axis_is_not_used_twice(mesh):
    rules = Rules(embed="tensor", mlp="tensor")
    with pytest.raises(ShardingError, match="'tensor' would shard both 'embed' and 'mlp'.*None"):
        rules.spec("embed", "mlp", mesh=mesh)
    assert rules.spec("embed", "mlp", mesh=mesh, shared=True) == P("tensor", None)
    # An activation's batch keeps fsdp, so its width stays whole.
    assert sharding.rules("fsdp").spec("batch", "embed", mesh=mesh, shared=True) == P(
        ("data", "fsdp"), None)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("tensr", "rules.mlp is 'tensr'; it must be one of"),
        (("fsdp", "model"), "rules.mlp is .*'model'.*must be one of"),
        (["fsdp"], r"rules.mlp is \['fsdp'\]; it must be one of .*tuple"),
        (("fsdp", "fsdp"), "name each mesh axis once"),
    ],
)
def test_refuses_what_is_no_mesh_axis(value, message):
    with pytest.raises(ShardingError, match=message):
        Rules(mlp=value)


def test_uneven_dimensions(mesh):
    rules = sharding.rules("fsdp_tp")
    with pytest.raises(ShardingError, match="mlp of size 7 does not divide .*tensor:2;.*,mlp=none"):
        rules.spec("embed", "mlp", mesh=mesh, shape=(4, 7))
    with pytest.raises(ShardingError, match="batch|embed of size 3"):
        rules.sharding(mesh, ("embed",), (3,))
    # Nothing else can be done with a published vocabulary, or with one prompt.
    assert rules.spec("embed", "vocab", mesh=mesh, shape=(4, 50257)) == P("fsdp", None)
    assert rules.spec("batch", "seq", mesh=mesh, shape=(1, 9)) == P(None, None)
    assert rules.uneven(mesh, ("embed", "vocab"), (4, 50257)) == ("vocab",)
    assert rules.uneven(mesh, ("embed", "vocab"), (4, 50258)) == ()


def test_an_uneven_dimension_leaves_its_mesh_axis_to_others(mesh):
    rules = Rules(batch="fsdp", embed="fsdp")
    assert rules.spec("batch", "embed", mesh=mesh, shape=(3, 4), shared=True) == P(None, "fsdp")


def test_sharding_of_a_parameter(mesh):
    layout = sharding.rules("fsdp_tp").sharding(mesh, ("layers", "embed", "mlp"), (3, 4, 6))
    assert layout == jax.NamedSharding(mesh, P(None, "fsdp", "tensor"))


def test_fields_of_a_preset_are_replaced(mesh):
    whole = sharding.rules("fsdp_tp,kv_heads=none")
    assert whole == dataclasses.replace(sharding.rules("fsdp_tp"), kv_heads=None)
    assert whole.spec("heads", "kv_heads", mesh=mesh, shape=(4, 1)) == P("tensor", None)
    both = sharding.rules(" dp , mlp = fsdp+tensor, batch=data")
    assert both == Rules(batch="data", mlp=("fsdp", "tensor"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsdp_tp,kv_head=none", "'kv_head=none' is not FIELD=AXIS.*did you mean 'kv_heads'"),
        ("fsdp_tp,kv_heads", "'kv_heads' is not FIELD=AXIS, as in kv_heads=none"),
        ("fsdp_tp,", "'' is not FIELD=AXIS"),
        ("kv_heads=none", "'kv_heads=none' are not one of"),
        ("dp,mlp=model", "rules.mlp is 'model'; it must be one of"),
        ("dp,mlp=fsdp+fsdp", "name each mesh axis once"),
    ],
)
def test_refuses_a_malformed_text(text, message):
    with pytest.raises(ShardingError, match=message):
        sharding.rules(text)


def test_unknown_preset():
    with pytest.raises(ShardingError, match="'fdsp' are not one of .*did you mean 'fsdp'"):
        sharding.rules("fdsp")
