"""The two forms of a stack: the same values, gradients and states, and conversion both ways."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import zoo
from layers.attention import Attention
from layers.mlp import Mlp
from layers.moe import Moe
from layers.norm import Norm
from layers.rope import Rope
from layers.stack import REMAT, Stack, to_list, to_stacked
from tests import tiny
from tests.tolerances import assert_close
from zoo import protocol
from zoo.decode import tree as trees
from zoo.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternating(DecoderConfig):
    """A pattern of two kinds of block: a short and a long window."""

    windows: tuple[int, int] = (2, 4)

    def mixers(self):
        return tuple(Attention(4, 2, 4, rope=Rope(100.0), window=w) for w in self.windows)


CONFIG = Alternating(
    vocab_size=11, width=16, num_layers=5, mlp=Mlp(12), norm=Norm(), max_length=32)
DEPTHS = pytest.mark.parametrize("num_layers", [1, 2, 5])


def build(stacked, num_layers=5, seed=0, **options):
    config = dataclasses.replace(CONFIG, num_layers=num_layers, **options)
    return protocol.split(tiny.model(config, stacked, seed))


def loss_and_gradients(definition, params, key=None):
    batch = tiny.batch(11, rows=2, length=9)

    def loss(params):
        model = protocol.merge(definition, params)
        output = model(batch, key, train=True)
        total, weight, _ = model.loss(output, batch["labels"], batch["weights"])
        return total / weight

    return jax.jit(jax.value_and_grad(loss))(params)


@DEPTHS
def test_both_forms_start_alike_and_convert(num_layers):
    """Layer i has the same values in both; converting there and back changes nothing."""
    config = dataclasses.replace(CONFIG, num_layers=num_layers)
    stacked, listed = (
        protocol.split(config.build(key=jax.random.key(0), stacked=form))[1]
        for form in (True, False))
    assert_close(to_stacked(listed), stacked, tol=0)
    assert_close(to_list(stacked), listed, tol=0)
    assert_close(to_stacked(stacked), stacked, tol=0)
    assert_close(to_list(listed), listed, tol=0)


def test_blocks_know_the_number_of_their_layer():
    class Block(nnx.Module):
        def __init__(self, key, layer):
            self.layer = nnx.Param(jnp.float32(layer), axes=())

    found = {}
    for stacked in (True, False):
        stack = Stack([Block, Block], 5, stacked=stacked, key=jax.random.key(0))
        found[stacked] = to_stacked(protocol.split(stack)[1])
    assert_close(found[True], {"blocks": {"0": {"layer": np.array([0.0, 2.0])},
                                          "1": {"layer": np.array([1.0, 3.0])}},
                               "tail": {"0": {"layer": np.float32(4.0)}}})
    assert_close(found[False], found[True])


def test_layout():
    """blocks[groups, ...] and a tail; a window's layers are those of its place in the pattern."""
    params = build(True)[1]["stack"]
    assert sorted(params) == ["blocks", "tail"]
    assert sorted(params["blocks"]) == ["0", "1"]
    assert sorted(params["tail"]) == ["0"]
    assert params["blocks"]["1"]["mlp"]["up"]["kernel"].shape == (2, 16, 12)
    assert params["tail"]["0"]["mlp"]["up"]["kernel"].shape == (16, 12)
    listed = build(False)[1]["stack"]
    assert sorted(listed["layers"]) == ["0", "1"]
    assert_close(listed["layers"]["1"]["0"], jax.tree.map(lambda x: x[1], params["blocks"]["0"]))


@DEPTHS
def test_both_forms_compute_alike(num_layers):
    """Loss and gradients; the second kind of block must not run with the first one's window."""
    one, gradients = loss_and_gradients(*build(True, num_layers))
    other, listed = loss_and_gradients(*build(False, num_layers))
    assert_close(other, one)
    assert_close(to_stacked(listed), gradients)
    if num_layers > 1:
        swapped, _ = loss_and_gradients(*build(True, num_layers, windows=(4, 2)))
        assert abs(swapped - one) > 1e-4


MOE = Moe(3, 2, 6, balance_loss=0.5, z_loss=0.1)


@pytest.mark.parametrize(("num_layers", "policy"), [(1, "none"), (5, "dots")])
def test_both_forms_report_the_sum_over_layers(num_layers, policy):
    """Of groups, of the blocks in a group, and of the tail; also with their gradients."""
    batch, results = tiny.batch(11, rows=2, length=9), {}
    for stacked in (True, False):
        config = dataclasses.replace(CONFIG, num_layers=num_layers, mlp=MOE)
        _, params = protocol.split(tiny.model(config, stacked))
        definition = protocol.split(
            zoo.build(config, abstract=True, stacked=stacked, remat=policy))[0]

        def loss(params, definition=definition):
            output = protocol.merge(definition, params)(batch, train=True)
            return sum(total for total, _ in output.losses.values()), output

        (_, output), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        results[stacked] = output, to_stacked(gradients)
    assert_close(results[False], results[True])
    tokens = (batch["segment_ids"] > 0).sum()
    assert output.losses.keys() == {"moe_balance", "moe_z"}
    for total, weight in (*output.losses.values(), *output.stats.values()):
        assert weight == num_layers * tokens
        assert total > 0
    mean_load = output.stats["moe_max_load"][0] / weight
    assert 1 <= mean_load <= MOE.num_experts / MOE.top_k


def test_dense_blocks_report_nothing():
    output = jax.eval_shape(functools.partial(tiny.model(CONFIG), train=True), tiny.batch(11))
    assert (output.losses, output.stats) == ({}, {})


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
def test_remat_changes_nothing(stacked):
    key, config = jax.random.key(3), dataclasses.replace(CONFIG, num_layers=3, dropout=0.2)
    params = protocol.split(tiny.model(config, stacked))[1]
    results = {}
    for policy in REMAT:
        definition = protocol.split(
            zoo.build(config, abstract=True, stacked=stacked, remat=policy))[0]
        results[policy] = loss_and_gradients(definition, params, key)
    assert_close(results["dots"], results["none"])
    assert_close(results["full"], results["none"])


def test_remat_keeps_less():
    """Only the name "none" keeps what a block computed for the backward pass."""
    kept = {}
    for policy in REMAT:
        config = dataclasses.replace(CONFIG, num_layers=8, windows=(32, 32))
        definition, params = protocol.split(
            zoo.build(config, abstract=True, stacked=True, remat=policy))
        batch = tiny.batch(11, rows=8, length=32)

        def loss(params, definition=definition, batch=batch):
            return jnp.sum(protocol.merge(definition, params)(batch, train=True).hidden)

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        kept[policy] = compiled.memory_analysis().temp_size_in_bytes
    assert kept["full"] < kept["dots"] < kept["none"]


def test_unknown_remat():
    with pytest.raises(ValueError, match="remat is 'all'; it must be one of .*'full'"):
        CONFIG.build(key=jax.random.key(0), remat="all")


def test_dropout_does_not_depend_on_the_form():
    """The masks are folded from the key and the layer's number."""
    results = {}
    for stacked in (True, False):
        definition, params = build(stacked, dropout=0.3)
        results[stacked] = loss_and_gradients(definition, params, jax.random.key(1))
    other = loss_and_gradients(definition, params, jax.random.key(2))
    assert abs(other[0] - results[False][0]) > 1e-4
    assert_close(results[False][0], results[True][0])
    assert_close(to_stacked(results[False][1]), results[True][1])


def test_layers_drop_differently():
    """With equal weights in all layers, equal masks would give a symmetric result."""
    definition, params = build(True, 4, windows=(4, 4), dropout=0.5)
    equal = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), params["stack"]["blocks"])
    params["stack"]["blocks"] = {"0": equal["0"], "1": equal["0"]}
    batch = {"tokens": jnp.zeros((1, 32), jnp.int32)}
    masks = []

    def record(x, rate, key):
        masks.append(np.asarray(jax.random.bernoulli(key, 0.5, (64,))))
        return x

    listed = protocol.merge(build(False, 4, windows=(4, 4), dropout=0.5)[0], to_list(params))
    import layers.block

    original = layers.block.dropout
    layers.block.dropout = record
    try:
        listed(batch, jax.random.key(0), train=True)
    finally:
        layers.block.dropout = original
    assert len(masks) == 8  # two branches in each of four layers
    assert len({mask.tobytes() for mask in masks}) == 8


@pytest.mark.parametrize("optimiser", [
    optax.adamw(1e-3), optax.lion(1e-3),
    optax.multi_transform(
        {"a": optax.sgd(1e-2, momentum=0.9), "b": optax.adam(1e-3)},
        lambda params: jax.tree.map(lambda x: "a" if x.ndim > 2 else "b", params)),
], ids=["adamw", "lion", "multi_transform"])
def test_optimiser_states_convert(optimiser):
    """A step in one form, converted, is the step in the other form."""
    definition, params = build(False)
    _, gradients = loss_and_gradients(definition, params)
    state = optimiser.init(params)
    updates, after = optimiser.update(gradients, state, params)
    again = to_list(to_stacked(after))
    assert jax.tree.structure(again) == jax.tree.structure(after)
    assert_close(again, after, tol=0)
    stacked = to_stacked(after)
    assert len(jax.tree.leaves(stacked)) < len(jax.tree.leaves(after))
    if isinstance(state, tuple) and not hasattr(state, "inner_states"):
        twin = optimiser.init(to_stacked(params))
        assert jax.tree.structure(twin) == jax.tree.structure(to_stacked(state))
        _, expected = optimiser.update(to_stacked(gradients), twin, to_stacked(params))
        assert_close(stacked, expected)


@DEPTHS
def test_abstract_trees_convert(num_layers):
    """ShapeDtypeStructs, as a checkpoint's target has them."""
    def shapes(tree):
        return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)

    for form, convert in ((False, to_stacked), (True, to_list)):
        params = build(form, num_layers)[1]
        abstract = jax.eval_shape(lambda params=params: params)
        assert shapes(convert(abstract)) == shapes(convert(params))
        assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(convert(abstract)))


def test_numpy_trees_convert():
    params = jax.device_get(build(False)[1])
    stacked = to_stacked(params)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves((stacked, to_list(stacked))))
    assert_close(to_list(stacked), params, tol=0)


def test_conversion_leaves_other_trees_alone():
    tree = {"layers": 3, "blocks": {"a": np.ones(2)}, "x": (None, [np.zeros(1)])}
    assert_close(to_stacked(tree), tree, tol=0)
    assert_close(to_list(tree), tree, tol=0)


def test_more_than_ten_groups_keep_their_order():
    params = {"layers": {str(i): {"0": {"w": np.full(2, i)}} for i in range(12)}}
    assert to_stacked(params)["blocks"]["0"]["w"][:, 0].tolist() == list(range(12))
    assert_close(to_list(to_stacked(params)), params, tol=0)


@DEPTHS
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
def test_prefill_and_steps(stacked, num_layers):
    """Through both kinds of block and the tail: the parallel form, piece by piece."""
    definition, params = build(stacked, num_layers)
    model = protocol.merge(definition, params)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 12)), jnp.int32)
    expected = jax.jit(lambda: model({"tokens": tokens}).hidden)()
    state = model.init_state(2, 12)
    prefill = jax.jit(lambda tokens, state: model.prefill(
        tokens, jnp.ones(tokens.shape, bool), state))
    found = []
    for start, stop in ((0, 5), (5, 8)):
        hidden, state = prefill(tokens[:, start:stop], state)
        found.append(hidden)

    @jax.jit
    def advance(token, state):
        step = model.step(token, trees.single(2), state)
        path = jnp.zeros((2, 1), jnp.int32)
        return step.hidden, model.commit(state, step.scratch, path, jnp.ones(2, jnp.int32))

    for t in range(8, 12):
        hidden, state = advance(tokens[:, t : t + 1], state)
        found.append(hidden)
    assert_close(jnp.concatenate(found, axis=1), expected)
    assert state.length.tolist() == [12, 12]


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
def test_stack_with_a_context(stacked):
    """Cross-attention throughout: each layer keeps its own keys and values of the context."""
    definition, params = build(stacked)
    stack = protocol.merge(definition, params).stack
    rng = np.random.default_rng(0)
    x, context = (jnp.asarray(rng.normal(size=(2, n, 16)), jnp.float32) for n in (6, 4))
    positions = jnp.tile(jnp.arange(6), (2, 1))
    run = functools.partial(stack, segment_ids=None, positions=positions, context=context)
    expected = jax.jit(lambda x: run(x)[0])(x)
    state = jax.jit(lambda: stack.init_state(2, 6, context=context))()
    first, state = jax.jit(stack.prefill)(x[:, :4], jnp.ones((2, 4), bool), state)
    rest, scratch = jax.jit(stack.step)(x[:, 4:], trees.chain(2, 2), state)
    assert_close(jnp.concatenate([first, rest], axis=1), expected)
    after = stack.commit(state, scratch, jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32))
    assert_close(after, state, tol=0)
