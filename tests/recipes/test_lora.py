"""Adapters: their formula and gradients, what they leave alone, both forms, meshes, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

import sharding
import zoo
from recipes import feed, lora, nonfinite, training
from recipes.optimizer import Optimizer
from recipes.tasks import lm
from tests import tiny
from tests.tolerances import EQUAL, EXACT, RESHARDED, assert_close

CONFIG = tiny.config("llama3-8b", num_layers=2)
ROWS, LENGTH, RANK = 8, 12, 3


def stacked_model():
    return zoo.build(CONFIG, abstract=True, stacked=True)


def adapters(targets="query,key,value,out,mlp", rank=RANK, alpha=None, model=None):
    model = model or stacked_model()
    return lora.make(rank, alpha, targets.split(","), zoo.protocol.split(model)[1],
                     zoo.protocol.axes(model))


def program(mesh="data:1", explicit=False, **changes) -> training.Program:
    fields = {
        "config": CONFIG, "mesh": sharding.mesh(mesh, explicit=explicit),
        "rules": sharding.rules("fsdp_tp,kv_heads=none"), "loss": lm.make_loss(0.0),
        "optimizer": Optimizer(warmup_steps=0, steps=10, learning_rate=1e-2), "lora": adapters()}
    return training.Program(**{**fields, **changes})


def given(p: training.Program):
    """Random parameters, where the program has them."""
    _, params = zoo.protocol.split(tiny.model(CONFIG, stacked=p.stacked))
    return jax.device_put(params, jax.tree.map(
        lambda x: x.sharding, zoo.protocol.split(p.model())[1]))


def perturbed(state, scale=0.1):
    """With adapters that do something."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, scale, x.shape).astype(np.float32),
                          zoo.protocol.to_stacked(state["params"]))
    if "layers" in state["params"]["stack"]:
        params = zoo.protocol.to_list(params)
    return {**state, "params": jax.device_put(params, jax.tree.map(
        lambda x: x.sharding, state["params"]))}


def take(p: training.Program, steps: int):
    """(state, metrics of each step) after some steps on one batch, from perturbed adapters."""
    batch = tiny.batch(CONFIG.vocab_size, ROWS, LENGTH)
    placed = feed.place(lambda r: {n: x[r] for n, x in batch.items()}, ROWS, p.batch_sharding)
    with sharding.use(p.mesh, p.rules):
        step, state, metrics = training.make_step(p), perturbed(p.init(given(p))), []
        for i in range(steps):
            state, values = step(state, placed, feed.signals(p.mesh, i, False))
            metrics.append(jax.device_get(values))
    return state, metrics


@functools.cache
def reference():
    state, metrics = take(program(), 2)
    assert all(m.pop("finite").all() for m in metrics)
    return jax.device_get(zoo.protocol.to_stacked(state)), metrics


def test_at_first_nothing_changes():
    for stacked in (False, True):
        p = program(stacked=stacked)
        state = p.init(given(p))
        merged = p.lora.merge(state["base"], state["params"], jnp.float32)
        assert_close(merged, given(p), EXACT)
        up = zoo.protocol.to_stacked(state["params"])["stack"]["blocks"]["0"]["mlp"]["up"]["kernel"]
        assert up["a"].shape == (2, 32, RANK) and up["b"].shape == (2, RANK, 48)
        assert not up["b"].any() and float(jnp.std(up["a"])) == pytest.approx(32**-0.5, rel=0.3)
        assert not np.array_equal(up["a"][0], up["a"][1])
        if not stacked:
            first = zoo.protocol.to_stacked(state["params"])
    assert_close(state["params"], first, EQUAL)  # Both forms start alike.


def test_kernels_are_the_formula():
    p = program(stacked=True, lora=adapters("query,out", alpha=5))
    state = perturbed(p.init(given(p)))
    base, trained = jax.device_get((state["base"], state["params"]))
    merged = jax.device_get(jax.jit(p.lora.merge, static_argnums=2)(base, trained, "float32"))
    for name, formula in (("query", "ldr,lrhk->ldhk"), ("out", "lhkr,lrd->lhkd")):
        half = trained["stack"]["blocks"]["0"]["mixer"][name]["kernel"]
        kernel = base["stack"]["blocks"]["0"]["mixer"][name]["kernel"]
        expected = kernel + 5 / RANK * np.einsum(formula, half["a"].astype(np.float64), half["b"])
        assert_close(merged["stack"]["blocks"]["0"]["mixer"][name].pop("kernel"), expected, 1e-6)
        base["stack"]["blocks"]["0"]["mixer"][name].pop("kernel")
    assert_close(merged, base, EXACT)
    halved = p.lora.merge(state["base"], state["params"], "bfloat16")  # Rounded once, at the end.
    kernels = (x["stack"]["blocks"]["0"]["mixer"]["query"]["kernel"] for x in (
        halved, p.lora.merge(state["base"], state["params"], "float32")))
    low, full = kernels
    assert low.dtype == jnp.bfloat16
    assert_close(low.astype(jnp.float32), full.astype(jnp.bfloat16).astype(jnp.float32), EXACT)


@pytest.mark.parametrize("changes", [{"stacked": False}, {"stacked": True, "remat": "dots"}],
                         ids=["list", "stack"])
def test_a_step_is_the_plain_formula(changes):
    """Against the merged model, its gradients with respect to the adapters, and optax."""
    p = program(**changes)
    state = perturbed(p.init(given(p)))
    definition, _ = zoo.protocol.split(p.model())
    batch = tiny.batch(CONFIG.vocab_size, ROWS, LENGTH)

    def loss(params):
        model = zoo.protocol.merge(definition, p.lora.merge(state["base"], params, jnp.float32))
        total, weight, _, _ = p.loss(model, batch, None, True)
        return total / weight

    value, gradients = jax.jit(jax.value_and_grad(loss))(state["params"])
    optimizer = p.optimizer.build(p.lora.axes(zoo.protocol.axes(p.model())))
    updates, _ = optimizer.update(gradients, optimizer.init(state["params"]), state["params"])
    expected = optax.apply_updates(state["params"], updates)
    got, (metrics,) = take(p, 1)
    assert_close(metrics["loss"], value)
    assert_close(metrics["grad_norm"], optax.tree.norm(gradients))
    assert_close(got["params"], expected, RESHARDED)


def test_training_leaves_the_base_alone():
    p = program(ema=0.5)
    state, metrics = take(p, 6)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1
    assert_close(state["base"], given(p), EXACT)
    trained = len(jax.tree.leaves(state["params"]))
    assert trained == 2 * 7 * CONFIG.num_layers
    kept = [x for x in jax.tree.leaves(state["optimizer"]) if x.ndim]
    assert len(kept) == 2 * trained  # Adam's moments, of the adapters alone.
    names = training.finite_names(p)
    assert len(names) == 1 + trained == len(metrics[0]["finite"])
    assert "the gradient of stack/layers/1/0/mixer/query/kernel/a" in names


@pytest.mark.parametrize("changes", [
    {"stacked": False, "accumulate": 2}, {"stacked": True, "remat": "full", "accumulate": 2},
    pytest.param({"stacked": True, "explicit": True}, marks=pytest.mark.slow),
], ids=["list", "stack", "explicit"])
def test_eight_devices_give_what_one_does(changes):
    state, metrics = take(program(tiny.MESH, **changes), 2)
    expected, one = reference()
    assert all(m.pop("finite").all() for m in metrics)
    assert_close(metrics, one, EQUAL)
    assert_close(zoo.protocol.to_stacked(state)["params"], expected["params"], RESHARDED)


def test_adapters_are_kept_in_float32():
    state = program(dtype="bfloat16", ema=0.5).abstract_state()
    assert {x.dtype for x in jax.tree.leaves(state["base"])} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves((state["params"], state["ema"]))} == {
        jnp.dtype("float32")}


def test_adapters_lie_as_the_sides_of_their_kernels():
    p = program(tiny.MESH, stacked=True)
    state = p.abstract_state()
    spec = jax.sharding.PartitionSpec
    mixer = state["params"]["stack"]["blocks"]["0"]["mixer"]
    assert mixer["query"]["kernel"]["a"].sharding.spec == spec(None, "fsdp", None)
    assert mixer["query"]["kernel"]["b"].sharding.spec == spec(None, None, "tensor", None)
    assert mixer["out"]["kernel"]["a"].sharding.spec == spec(None, "tensor", None, None)
    assert mixer["out"]["kernel"]["b"].sharding.spec == spec(None, None, "fsdp")


def test_no_gradient_of_a_whole_stack_exists():
    """Nor, with rematerialization, the adapted kernels: both are made layer by layer."""
    p = program(stacked=True, remat="dots", lora=adapters("all-linear"))
    state = p.init(given(p))
    definition, _ = zoo.protocol.split(p.model())
    differentiate = training.make_gradients(p, definition)
    traced = jax.make_jaxpr(differentiate)(state["params"], tiny.batch(CONFIG.vocab_size),
                                           jax.random.key(0), state["base"])
    kernels = {x.shape for path, x in jax.tree_util.tree_leaves_with_path(state["base"]["stack"])
               if path[-1].key == "kernel"}

    def shapes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (v.aval.shape for v in eqn.outvars)
            for inner in core.jaxprs_in_params(eqn.params):
                yield from shapes(inner)

    made = set(shapes(traced.jaxpr))
    assert len(kernels) == 5 and {s[1:] for s in kernels} <= made and not kernels & made


def test_what_is_not_finite_is_found_in_an_adapter():
    p = program(stacked=True)
    sound = p.init(given(p))
    state = perturbed(sound)
    state["params"]["stack"]["blocks"]["0"]["mlp"]["up"]["kernel"]["a"] *= np.inf
    differentiate = training.make_gradients(p, zoo.protocol.split(p.model())[0])
    batch = {"batch": tiny.batch(CONFIG.vocab_size), "key": jax.random.key(0)}
    found = nonfinite.find(
        differentiate, {"params": state["params"], "base": state["base"], **batch},
        {"params": sound["params"], "base": sound["base"], **batch})
    assert found == "inf in params/stack/blocks/0/mlp/up/kernel/a"


def test_names_choose_kernels():
    assert adapters("query").targets == ("stack/mixer/query",)
    assert adapters("mixer/*").targets == adapters("query,key,value,out").targets
    assert adapters("mlp/u*,head").targets == ("head", "stack/mlp/up")
    every = adapters("all-linear").targets
    assert every == adapters("mixer,mlp").targets and len(every) == 7
    assert adapters("query").alpha == 2 * RANK
    listed = zoo.build(CONFIG, abstract=True, stacked=False)
    assert adapters("mlp", model=listed) == adapters("mlp")
    axes = adapters("mlp/up", model=listed).axes(zoo.protocol.axes(listed))
    assert sorted(axes["stack"]["layers"]) == ["0", "1"]


ERRORS = [
    ({"rank": 0}, "lora rank 0: it must be at least 1"),
    ({"rank": -4}, "lora rank -4: it must be at least 1"),
    ({"rank": 40}, "lora rank 40 is above 32, the smaller side of stack/mixer/query; give at most"),
    ({"rank": 20, "targets": "query,key"}, "is above 16, the smaller side of stack/mixer/key"),
    ({"alpha": 0}, "lora alpha 0.0: it must be above 0"),
    ({"alpha": float("nan")}, "lora alpha nan: it must be above 0, and finite"),
    ({"targets": "query,keys"}, "lora target 'keys' matches no kernel; give all-linear, or the "
     "names of some of head, stack/mixer/key, stack/mixer/out, stack/mixer/query, "),
    ({"targets": "embed"}, "lora target 'embed' matches no kernel"),
    ({"targets": "norm"}, "lora target 'norm' matches no kernel"),
    ({"targets": ""}, "lora target '' matches no kernel"),
]


@pytest.mark.parametrize(("options", "words"), ERRORS, ids=[str(o) for o, _ in ERRORS])
def test_errors_say_what_to_give(options, words):
    with pytest.raises(ValueError) as error:
        adapters(**{"targets": "query", **options})
    message = str(error.value)
    assert message.startswith("lora ") and words in message
