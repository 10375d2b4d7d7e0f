"""The mixture of experts against a loop over all experts, over meshes, and what it reports."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from layers.mlp import ACTIVATIONS
from layers.moe import Moe
from tests.tiny import MESH
from tests.tolerances import assert_close
from zoo import protocol

WIDTH = 7
ODD = Moe(5, 3, 3, balance_loss=0.3, z_loss=0.1)
CONFIGS = {
    "normalized": ODD,
    "shared, gelu": Moe(4, 2, 5, "gelu_tanh", normalize=False, shared_hidden=6, z_loss=0.1),
    "one of one": Moe(1, 1, 4, normalize=False),
    "all of them": Moe(3, 3, 4, balance_loss=1.0),
}
EVEN = Moe(4, 2, 6, shared_hidden=4, balance_loss=0.3, z_loss=0.1)


def make(config, width=WIDTH, seed=0):
    """(definition, parameters drawn at random)."""
    layer = config.build(width, gain=1.0, key=jax.random.key(0), dtype=jnp.float32)
    definition, params = protocol.split(layer)
    rng = np.random.default_rng(seed)
    return definition, jax.tree.map(
        lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32), params)


def inputs(rows, length, width=WIDTH):
    """x, and which positions are real: not all of the first row, and none of the last."""
    rng = np.random.default_rng(1)
    valid = np.ones((rows, length), bool)
    valid[0, length // 2 :], valid[-1] = False, False
    return rng.normal(size=(rows, length, width)).astype(np.float32), valid


def routing(config, params, x):
    """(logits, weight of every expert [B, T, E], 0 where it is not chosen)."""
    logits = x @ params["router"]["kernel"]
    probs = jax.nn.softmax(logits)
    threshold = jnp.sort(probs, axis=-1)[..., -config.top_k, None]
    weights = jnp.where(probs >= threshold, probs, 0.0)
    if config.normalize:
        weights /= weights.sum(-1, keepdims=True)
    return logits, weights


def dense(config, params, x, valid):
    """Every expert on every token; the definition."""
    act = ACTIVATIONS[config.activation]
    _, weights = routing(config, params, x)
    y = jnp.zeros_like(x)
    for e in range(config.num_experts):
        gate, up, down = (params[name]["kernel"][e] for name in ("gate", "up", "down"))
        y += weights[..., e, None] * ((act(x @ gate) * (x @ up)) @ down)
    y = jnp.where(valid[..., None], y, 0.0)
    if config.shared_hidden is not None:
        gate, up, down = (params["shared"][name]["kernel"] for name in ("gate", "up", "down"))
        y += jax.nn.sigmoid(x @ params["shared_gate"]["kernel"]) * (
            (act(x @ gate) * (x @ up)) @ down)
    return y


def value_and_gradients(run, *operands):
    """y, and the gradients of a weighted sum of it."""
    def loss(*operands):
        y = run(*operands)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

    (_, y), gradients = jax.jit(
        jax.value_and_grad(loss, tuple(range(len(operands))), has_aux=True))(*operands)
    return y, gradients


def check(config, params, definition, x, valid):
    expected = value_and_gradients(
        lambda params, x: dense(config, params, x, valid), params, x)
    actual = value_and_gradients(
        lambda params, x: protocol.merge(definition, params)(x, valid)[0], params, x)
    assert_close(actual, expected)
    return expected


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_a_loop_over_experts(config):
    """Values and gradients, with padding."""
    definition, params = make(config)
    check(config, params, definition, *inputs(3, 11))


def test_without_padding():
    definition, params = make(ODD)
    x, valid = inputs(2, 5)
    layer = jax.jit(protocol.merge(definition, params))
    assert_close(layer(x)[0], dense(ODD, params, x, np.ones_like(valid)))
    assert_close(layer(x)[1], layer(x, np.ones_like(valid))[1])


@pytest.mark.parametrize("count", [0, 1, 4], ids=["idle", "alone", "some"])
def test_uneven_loads(count):
    """Experts that get no token, or all of them: none is dropped."""
    config = Moe(5, count or 4, 3)
    definition, params = make(config)
    x, valid = inputs(3, 9)
    x = np.abs(x)
    router = params["router"]["kernel"]
    if count:
        router[:, :count] += 5.0  # These are everyone's favourites,
    else:
        router[:, 2] -= 5.0  # and this one is no one's.
    _, (gradients, _) = check(config, params, definition, x, valid)
    used = np.abs(gradients["down"]["kernel"]).max((1, 2)) > 0
    assert used.tolist() == ([e < count for e in range(5)] if count else
                             [e != 2 for e in range(5)])


def by_hand(config, params, x, valid):
    """What `__call__` reports, token by token."""
    logits, weights = jax.device_get(routing(config, params, x))
    logits, takes = logits[valid].astype(np.float64), weights[valid] > 0
    count = len(logits)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    balance = sum(takes[:, e].mean() * probs[:, e].mean() for e in range(config.num_experts))
    z = (np.log(np.exp(logits).sum(-1)) ** 2).mean()
    load = takes.sum(0) / takes.sum()
    means = {
        "losses": {"moe_balance": config.balance_loss * config.num_experts * balance,
                   "moe_z": config.z_loss * z},
        "stats": {"moe_max_load": load.max() / load.mean(),
                  "moe_entropy": -(probs * np.log(probs)).sum(-1).mean()},
    }
    return jax.tree.map(lambda mean: (np.float64(mean * count), np.float64(count)), means)


def test_auxiliary_losses_and_statistics():
    definition, params = make(ODD)
    x, valid = inputs(3, 11)
    layer = jax.jit(protocol.merge(definition, params))
    _, aux = layer(x, valid)
    assert_close(aux, by_hand(ODD, params, x, valid))
    # Padding has no say.
    _, other = layer(np.where(valid[..., None], x, 100.0), valid)
    assert_close(other, aux)


def test_a_router_that_knows_nothing_is_balanced():
    """Equal probabilities: balance top_k, z log(E)^2, entropy log E; and no coefficient, no loss.
    """
    definition, params = make(ODD)
    params["router"]["kernel"] *= 0
    x, _ = inputs(2, 5)
    _, aux = jax.jit(protocol.merge(definition, params))(x)
    means = jax.tree.map(lambda pair: pair[0] / pair[1], aux,
                         is_leaf=lambda node: isinstance(node, tuple))
    assert_close(means["losses"], {"moe_balance": 0.3 * 3, "moe_z": 0.1 * np.log(5) ** 2})
    assert_close(means["stats"]["moe_entropy"], np.log(5))
    _, aux = jax.eval_shape(protocol.merge(*make(CONFIGS["one of one"])), x)
    assert aux["losses"] == {}


def test_all_padding_gives_zeros():
    definition, params = make(ODD)
    x, valid = inputs(2, 5)

    def loss(params, x):
        y, aux = protocol.merge(definition, params)(x, np.zeros_like(valid))
        return jnp.sum(y) + sum(jax.tree.leaves(aux)), aux

    gradients, aux = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    assert not any(leaf.any() for leaf in jax.tree.leaves((gradients, aux)))


def test_sums_add_over_microbatches():
    """The z-loss, entropy and weights are those of the whole; the balance is each part's own."""
    definition, params = make(ODD)
    x, valid = inputs(4, 6)
    layer = jax.jit(protocol.merge(definition, params))
    whole, parts = layer(x, valid)[1], [layer(x[i : i + 2], valid[i : i + 2])[1] for i in (0, 2)]
    total = jax.tree.map(jnp.add, *parts)
    for kind, name in (("losses", "moe_z"), ("stats", "moe_entropy")):
        assert_close(total[kind][name], whole[kind][name])
    for kind in ("losses", "stats"):
        for sums in (total, whole):
            assert {float(weight) for _, weight in sums[kind].values()} == {valid.sum()}
    twice = layer(np.concatenate([x, x]), np.concatenate([valid, valid]))[1]
    assert_close(twice, jax.tree.map(lambda x: 2 * x, whole))


@functools.cache
def reports(mesh=None, rules="fsdp_tp", explicit=False, rows=8):
    """Value, gradients of it and of the losses, and what is reported."""
    definition, params = make(EVEN, width=8)
    x, valid = inputs(rows, 6, width=8)

    def run(params, x, valid):
        y, aux = protocol.merge(definition, params)(x, valid)
        extra = sum(total / count for total, count in aux["losses"].values())
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)) + extra, (y, aux)

    step = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    if mesh is None:
        return jax.device_get(step(params, x, valid))
    mesh, rules = sharding.mesh(mesh, explicit=explicit), sharding.rules(rules)
    axes = protocol.axes(protocol.merge(definition, params))
    with sharding.use(mesh, rules):
        params = jax.device_put(params, protocol.shardings(mesh, rules, axes, params))
        return jax.device_get(step(params, x, valid))


@pytest.mark.parametrize(("rules", "explicit", "rows"), [
    ("fsdp_tp", False, 8),
    ("fsdp_tp,experts=tensor,mlp=none", False, 8),
    ("dp,batch=data,experts=fsdp+tensor", False, 8),
    ("fsdp_tp,seq=tensor,mlp=none", False, 8),
    ("fsdp_tp", False, 3),
    ("fsdp_tp", True, 8),
], ids=["hidden", "experts", "experts over two", "sequence", "uneven batch", "explicit"])
def test_eight_devices_equal_one(rules, explicit, rows):
    assert_close(reports(MESH, rules, explicit, rows), reports(rows=rows))


def test_experts_do_not_share_an_axis_with_the_batch():
    with pytest.raises(sharding.ShardingError, match="'fsdp' would shard both 'experts' and"):
        reports(MESH, "fsdp_tp,experts=fsdp,embed=none")


def test_bfloat16():
    """Weights and their sum are float32; the result has x's type."""
    definition, params = make(ODD)
    x, valid = inputs(3, 11)
    low = protocol.cast(params, jnp.bfloat16)
    y, aux = jax.jit(protocol.merge(definition, low))(jnp.asarray(x, jnp.bfloat16), valid)
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(aux))
    full = protocol.cast(low, jnp.float32)
    x = jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)
    assert_close(y, dense(ODD, full, x, valid), tol=0.02)


def test_initial_scale():
    """Kernels start with deviation 1 / sqrt(inputs), the last one times `gain`."""
    layer = Moe(4, 2, 400).build(300, gain=0.25, key=jax.random.key(0), dtype=jnp.float32)
    for kernel, deviation in ((layer.gate, 300**-0.5), (layer.up, 300**-0.5),
                              (layer.down, 0.25 * 400**-0.5), (layer.router, 300**-0.5)):
        assert np.asarray(kernel.kernel[...]).std() == pytest.approx(deviation, rel=0.06)


def test_flops():
    assert Moe(5, 2, 3).flops_per_token(7) == 2 * 7 * (2 * 3 * 3 + 5)
    assert Moe(5, 2, 3, shared_hidden=4).flops_per_token(7) == 2 * 7 * (2 * 3 * 3 + 5 + 3 * 4 + 1)


@pytest.mark.parametrize(("options", "message"), [
    ({"num_experts": 0}, "mlp.num_experts is 0; it must be at least 1"),
    ({"top_k": 5}, r"mlp.top_k is 5; it must be in 1\.\.4, the number of experts"),
    ({"top_k": 0}, r"mlp.top_k is 0"),
    ({"hidden": 0}, "mlp.hidden is 0"),
    ({"shared_hidden": 0}, "mlp.shared_hidden is 0"),
    ({"activation": "swish"}, "mlp.activation is 'swish'; it must be one of .*'silu'"),
    ({"balance_loss": -1.0}, "mlp.balance_loss is -1.0; it must be 0"),
    ({"z_loss": float("nan")}, "mlp.z_loss is nan; it must be 0"),
])
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Moe(**{"num_experts": 4, "top_k": 2, "hidden": 3, **options})
