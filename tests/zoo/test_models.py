"""Every registered model against one contract. Renew the snapshots of parameter paths with
``python -m tests.zoo.test_models``, and only where a change of the public paths is meant."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers.attention
import sharding
import zoo
from layers.stack import to_stacked
from tests import tiny
from tests.tolerances import assert_close
from zoo import protocol
from zoo.decode import tree as trees

PRESETS = pytest.mark.parametrize("name", zoo.list())
SNAPSHOTS = pathlib.Path(__file__).parent / "snapshots"

# Where an author's page or paper gives the exact number, or the published weights do.
NUM_PARAMS = {
    "gpt2": 124_439_808,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_241_732_096,
}

# Softmax does not see what is added to all scores of a query, as a key's bias does without rope.
NO_GRADIENT = {"gpt2": {"stack/blocks/0/mixer/key/bias"}}


def flat(tree) -> dict:
    """{"stack/blocks/0/mlp/up/kernel": leaf}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in leaves}


@functools.cache
def on_one_device(config, stacked=True):
    """Loss and gradients of a batch, in the stacked layout; presets of one tiny form share them."""
    mesh = sharding.mesh("data:1", jax.devices()[:1])
    with sharding.use(mesh, sharding.rules("fsdp_tp")):
        return jax.device_get(loss_and_gradients(config, mesh, stacked))


def loss_and_gradients(config, mesh, stacked):
    model = tiny.model(config, stacked)
    definition, params = protocol.split(model)
    rules = sharding.ambient_rules()
    params = jax.device_put(params, protocol.shardings(mesh, rules, protocol.axes(model), params))
    batch = tiny.batch(config.vocab_size)
    layout = jax.NamedSharding(mesh, sharding.spec("batch", "seq"))
    batch = {name: jax.device_put(x, layout) for name, x in batch.items()}

    def loss(params, batch):
        model = protocol.merge(definition, params)
        output = model(batch, jax.random.key(3), train=True)
        total, weight, _ = model.loss(output, batch["labels"], batch["weights"], z_loss=1e-2)
        return total / weight

    value, gradients = jax.jit(jax.value_and_grad(loss))(params, batch)
    return value, to_stacked(jax.device_get(gradients))


@PRESETS
def test_loss_and_gradients(name):
    loss, gradients = on_one_device(tiny.config(name))
    assert math.isfinite(loss)
    sizes = {path: float(np.abs(g).max()) for path, g in flat(gradients).items()}
    idle = {path for path, size in sizes.items() if size < 1e-6}
    assert idle == NO_GRADIENT.get(name, set())
    assert all(math.isfinite(size) for size in sizes.values())


@PRESETS
def test_list_form(name):
    assert_close(on_one_device(tiny.config(name), False), on_one_device(tiny.config(name)))


def mesh_cases():
    """All with Auto axis types; with Explicit ones every option once, the other presets slowly."""
    for name in zoo.list():
        yield pytest.param(name, False, id=f"{name}-auto")
        marks = () if name in ("gpt2", "qwen3-8b") else pytest.mark.slow
        yield pytest.param(name, True, id=f"{name}-explicit", marks=marks)


@pytest.mark.parametrize(("name", "explicit"), list(mesh_cases()))
def test_eight_devices_equal_one(name, explicit):
    """GPT-2 has a vocabulary that does not divide, and dropout."""
    config = tiny.config(name, **({"vocab_size": 41} if name == "gpt2" else {}))
    mesh = sharding.mesh(tiny.MESH, explicit=explicit)
    with sharding.use(mesh, sharding.rules("fsdp_tp")):
        sharded = loss_and_gradients(config, mesh, stacked=True)
    assert_close(sharded, on_one_device(config))


@PRESETS
def test_forward_equals_prefill_and_steps(monkeypatch, name):
    monkeypatch.setattr(layers.attention, "CACHE_BLOCK", 4)
    model = tiny.model(tiny.config(name))
    definition, params = protocol.split(model)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, (2, 15), np.int32)

    def call(method):
        return jax.jit(lambda params, *x: method(protocol.merge(definition, params), *x))

    full = call(lambda model, tokens: model({"tokens": tokens}))(params, tokens)
    prefill = call(lambda model, *x: model.prefill(*x))
    step = call(lambda model, token, state: advance(model, token, state))
    state, found = model.init_state(2, 15), []
    for start in (0, 5):
        chunk = np.zeros((2, 7), np.int32)
        valid = np.array([[1, 1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 1, 1, 1]], bool)
        chunk[valid] = tokens[:, start : start + 5].ravel()
        hidden, state = prefill(params, chunk, valid, state)
        found.append(np.asarray(hidden)[valid].reshape(2, 5, -1))
    assert_close(np.concatenate(found, axis=1), full.hidden[:, :10])
    for t in range(10, 15):
        logits, state = step(params, tokens[:, t : t + 1], state)
        assert_close(logits[:, 0], full.logits[:, t])
    assert state.length.tolist() == [15, 15]


def advance(model, token, state):
    """Plain decoding by one token: logits [B, 1, V] and the new state."""
    b = token.shape[0]
    step = model.step(token, trees.single(b), state)
    path, count = jnp.zeros((b, 1), jnp.int32), jnp.ones(b, jnp.int32)
    return step.logits, model.commit(state, step.scratch, path, count)


@PRESETS
def test_packed_documents_equal_documents_alone(name):
    """Segment ids and positions that restart: no document sees its neighbours."""
    model = tiny.model(tiny.config(name))
    run = jax.jit(lambda **batch: model(batch).logits)
    tokens = np.random.default_rng(0).integers(0, 40, (1, 12), np.int32)
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3], np.int32)
    positions = np.array([[*range(5), *range(4), 0, 0, 0]], np.int32)
    packed = run(tokens=tokens, segment_ids=segments, positions=positions)
    # Causal: what stands to the right of a document does not matter.
    alone = run(tokens=np.concatenate([tokens, np.roll(tokens, -5, axis=1)]))
    assert_close(packed[:, :5], alone[:1, :5])
    assert_close(packed[:, 5:9], alone[1:, :4])


@pytest.mark.parametrize("shape", [(5,), (2, 0), (1, 65), (1, 2, 3)], ids=str)
def test_refuses_tokens_of_another_shape(shape):
    model = tiny.model(tiny.config("llama3-8b"))
    with pytest.raises(ValueError, match=r"must be \[B, T\] with T in 1\.\.64"):
        model({"tokens": np.zeros(shape, np.int32)})


@pytest.mark.parametrize("batch", [
    {}, {"token": np.zeros((1, 2), np.int32)}, None, np.zeros((1, 2), np.int32)], ids=type)
def test_refuses_a_batch_without_tokens(batch):
    with pytest.raises(ValueError, match="no dict with 'tokens', int32 .*; pass {'tokens'"):
        tiny.model(tiny.config("llama3-8b"))(batch)


def test_dropout_needs_a_key_and_only_in_training():
    model, batch = tiny.model(tiny.config("qwen3-8b", dropout=0.2)), tiny.batch(40, rows=2)
    with pytest.raises(ValueError, match="dropout is 0.2; training needs a key"):
        model(batch, train=True)
    key = jax.random.key(0)
    trained, with_key, without = (
        jax.jit(functools.partial(model, train=train))(batch, key)
        for train, key in ((True, key), (False, key), (False, None)))
    assert_close(with_key.hidden, without.hidden, tol=0)
    assert trained.logits is None
    assert (trained.hidden != without.hidden).any()


def abstract(name):
    return zoo.build(name, abstract=True, stacked=True)


def paths_and_shapes(name) -> dict[str, list[int]]:
    """The public paths and shapes of the parameters, as checkpoints hold them."""
    return {path: list(x.shape) for path, x in flat(protocol.split(abstract(name))[1]).items()}


@PRESETS
def test_parameter_paths_are_public(name):
    expected = json.loads((SNAPSHOTS / f"{name}.json").read_text())
    found = paths_and_shapes(name)
    assert found == expected
    assert list(found) == sorted(found)


@PRESETS
def test_axes_match_the_parameters(name):
    """One known logical axis per dimension, in the nesting of the parameters."""
    model = abstract(name)
    names = flat_axes(protocol.axes(model))
    params = flat(protocol.split(model)[1])
    assert names.keys() == params.keys()
    for path, x in params.items():
        assert len(names[path]) == len(x.shape), path
        assert set(names[path]) <= {*sharding.Rules.__dataclass_fields__, None}, path


def flat_axes(tree, path=""):
    if isinstance(tree, tuple):
        return {path.strip("/"): tree}
    children = [flat_axes(node, f"{path}/{name}") for name, node in tree.items()]
    return {name: axes for child in children for name, axes in child.items()}


@PRESETS
def test_number_of_parameters(name):
    count = protocol.num_params(abstract(name))
    if name in NUM_PARAMS:
        assert count == NUM_PARAMS[name]
    elif name == "llama-tiny":
        assert 2.5e6 < count < 3.5e6
    elif name == "llama-60m":
        assert 5.4e7 < count < 6.5e7
    else:
        pytest.fail(f"say here how many parameters {name} has")


def dot_flops(jaxpr, times=1) -> int:
    """Two FLOPs a multiply-add of every matrix product in a jaxpr, loops counted in full."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            size = equation.invars[0].aval.shape
            total += 2 * times * equation.outvars[0].aval.size * math.prod(
                size[i] for i in contracted)
        repeats = times * equation.params.get("length", 1)
        assert equation.primitive.name != "while", "the trip count of a while loop is not known"
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += dot_flops(inner, repeats)
    return total


@PRESETS
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
def test_flop_formula(name, stacked):
    """Against the matrix products that are traced. There attention fills its whole square, of
    which the formula counts what lies under the diagonal and inside the window, and its backward
    pass makes the scores again, which the formula does not count."""
    config, batch, length = tiny.config(name, num_layers=3), 2, 16
    model = zoo.build(config, stacked=stacked, abstract=True)
    definition, params = protocol.split(model)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((batch, length), jnp.float32)

    def forward(params, tokens):
        return protocol.merge(definition, params)({"tokens": tokens}).logits

    def loss(params, tokens, weights):
        model = protocol.merge(definition, params)
        output = model({"tokens": tokens}, jax.random.key(0), train=True)
        return model.loss(output, tokens, weights)[0]

    unseen = again = 0.0
    for layer in range(config.num_layers):
        mixer = config.mixers()[layer % len(config.mixers())]
        window = mixer.window or length
        seen = sum(min(t + 1, window) for t in range(length)) / length
        unseen += 2 * mixer.num_heads * (mixer.head_dim + mixer.value_dim) * (length - seen)
        again += 2 * mixer.num_heads * mixer.head_dim * length
    formula = batch * length * (config.flops_per_token(length) + unseen)
    counted = dot_flops(jax.make_jaxpr(forward)(params, tokens).jaxpr)
    assert counted == pytest.approx(formula, rel=1e-12)
    training = dot_flops(jax.make_jaxpr(jax.grad(loss))(params, tokens, weights).jaxpr)
    assert training == pytest.approx(3 * formula + batch * length * again, rel=1e-12)


def test_flops_at_full_size():
    """Llama 3 8B at 8k tokens: two FLOPs a parameter that multiplies, and half the square."""
    config = zoo.config("llama3-8b")
    multiplied = NUM_PARAMS["llama3-8b"] - 128256 * 4096 - 65 * 4096
    attention = 32 * 2 * 32 * 256 * (8192 + 1) / 2
    assert config.flops_per_token(8192) == 2 * multiplied + attention
    windowed = zoo.config("mistral-7b")
    assert windowed.flops_per_token(4096) == zoo.override(
        windowed, {"attention.window": None}).flops_per_token(4096)
    assert windowed.flops_per_token(32768) < 1.1 * windowed.flops_per_token(8192)


if __name__ == "__main__":
    for preset in zoo.list():
        lines = [f'  "{path}": {shape}' for path, shape in paths_and_shapes(preset).items()]
        (SNAPSHOTS / f"{preset}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
