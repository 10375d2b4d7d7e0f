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
from layers.attention import Attention
from layers.mlstm import MLstm, PreUpMLstm
from layers.rnn import SLstm
from layers.stack import to_stacked
from pallas_kernels.mlstm import mlstm
from pallas_kernels.rnn import CELLS, rnn
from tests import tiny
from tests.tolerances import EQUAL, assert_close
from zoo import protocol
from zoo.decode import tree as trees

PRESETS = pytest.mark.parametrize("name", zoo.list())
FORMS = pytest.mark.parametrize("name", tiny.forms())
SNAPSHOTS = pathlib.Path(__file__).parent / "snapshots"

# Where an author's page or paper gives the exact number, or the published weights do.
NUM_PARAMS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    # What was published less SigLIP's image encoder and the projection behind it.
    "gemma3-4b": 4_300_079_472 - 416_866_032 - 1152 * (2560 + 1),
    "gemma3-12b": 12_187_325_040 - 416_866_032 - 1152 * (3840 + 1),
    "gemma3-27b": 27_432_406_640 - 416_866_032 - 1152 * (5376 + 1),
    "xlstm-7b": 6_865_424_896,
    "paratranscnn": 245_468_937,
}
# What their names round.
ABOUT = {"xlstm-tiny": 3e6, "xlstm-165m": 1.65e8, "xlstm-1.3b": 1.3e9, "xlstm-2.7b": 2.7e9,
         "xlstm-mixed-tiny": 1.5e6, "lstm-tiny": 2e6, "gru-tiny": 2e6,
         "paratranscnn-tiny": 2.3e6, "paratranscnn-small": 2.8e7}

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
        return total / weight + sum(extra / count for extra, count in output.losses.values())

    value, gradients = jax.jit(jax.value_and_grad(loss))(params, batch)
    return value, to_stacked(jax.device_get(gradients))


@FORMS
def test_loss_and_gradients(name):
    loss, gradients = on_one_device(tiny.config(name))
    assert math.isfinite(loss)
    sizes = {path: float(np.abs(g).max()) for path, g in flat(gradients).items()}
    idle = {path for path, size in sizes.items() if size < 1e-6}
    assert idle == NO_GRADIENT.get(name, set())
    assert all(math.isfinite(size) for size in sizes.values())


@FORMS
def test_list_form(name):
    assert_close(on_one_device(tiny.config(name), False), on_one_device(tiny.config(name)))


def mesh_cases():
    """All with Auto axis types; with Explicit ones every option once, the others slowly."""
    for name in tiny.forms():
        yield pytest.param(name, False, id=f"{name}-auto")
        marks = () if name in ("gpt2", "qwen3-0.6b") else pytest.mark.slow
        yield pytest.param(name, True, id=f"{name}-explicit", marks=marks)


@pytest.mark.parametrize(("name", "explicit"), list(mesh_cases()))
def test_eight_devices_equal_one(name, explicit):
    """GPT-2 has a vocabulary that does not divide, and dropout.

    Through exponential gates rounding errors grow a little.
    """
    config = tiny.config(name, **({"vocab_size": 41} if name == "gpt2" else {}))
    mesh = sharding.mesh(tiny.MESH, explicit=explicit)
    with sharding.use(mesh, sharding.rules("fsdp_tp")):
        sharded = loss_and_gradients(config, mesh, stacked=True)
    assert_close(sharded, on_one_device(config), (3 if "xlstm" in name else 1) * EQUAL)


@FORMS
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


@FORMS
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


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
def test_filled_up_vocabulary(tied):
    """41 tokens in 48 rows on eight devices: logits, loss and gradients are those of 41 rows on
    one, and what is behind them, here far from zero, gets a gradient of exactly zero."""
    plain = tiny.model(tiny.config("gpt2", vocab_size=41, num_layers=1, tie_embeddings=tied))
    batch = tiny.batch(41)

    def run(model, mesh):
        definition, params = protocol.split(model)
        params = jax.device_put(params, protocol.shardings(
            mesh, sharding.ambient_rules(), protocol.axes(model), params))

        def loss(params):
            model = protocol.merge(definition, params)
            output = model(batch)
            total, weight, metrics = model.loss(output, batch["labels"], batch["weights"],
                                                z_loss=1e-2)
            return total / weight, (output.logits, metrics)

        values, gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return flat(params), values, flat(jax.device_get(gradients))

    rules = sharding.rules("fsdp_tp")
    one, eight = sharding.mesh("data:1", jax.devices()[:1]), sharding.mesh(tiny.MESH)
    with sharding.use(one, rules):
        _, *expected = run(plain, one)
    with sharding.use(eight, rules):
        params, values, gradients = run(tiny.filled_up(plain, 16), eight)
    for path, axis in {"embed/table": 0, **({} if tied else {"head": 1})}.items():
        assert params[path].shape[axis] == 48
        assert params[path].addressable_shards[0].data.shape[axis] == 24
        gradients[path], rest = np.split(gradients[path], [41], axis)
        assert not rest.any()
    assert values[1][0].shape[-1] == 41
    assert_close([values, gradients], expected)


def test_capped_logits_and_scaled_embeddings():
    """The loss is that of the capped logits; scaling embeddings is scaling their table."""
    config, batch = tiny.config("gemma2-2b", tie_embeddings=False, num_layers=1), tiny.batch(40)
    config = zoo.override(config, {"logit_softcap": 2.0, "embed_scale": 3.0})
    definition, params = protocol.split(tiny.model(config))

    def run(definition, params):
        model = protocol.merge(definition, params)
        output = model(batch)
        return output, model.loss(output, batch["labels"], batch["weights"])[0]

    output, loss = jax.jit(functools.partial(run, definition))(params)
    log_p = jax.nn.log_softmax(output.logits)
    at_label = jnp.take_along_axis(log_p, batch["labels"][..., None], -1)[..., 0]
    assert_close(loss, -jnp.sum(batch["weights"] * at_label))
    linear = output.hidden @ params["head"]
    assert_close(output.logits, 2.0 * np.tanh(linear / 2.0))
    assert abs(linear).max() > 4 > 2 >= abs(output.logits).max()

    plain = tiny.model(zoo.override(config, {"embed_scale": None}))
    params = {**params, "embed": {"table": 3.0 * params["embed"]["table"]}}
    scaled, _ = jax.jit(functools.partial(run, protocol.split(plain)[0]))(params)
    assert_close(scaled.hidden, output.hidden)


def test_patterns_of_local_and_global_attention():
    """Gemma 2 alternates, local first; of Gemma 3's layers every sixth is global."""
    for name, period in (("gemma2-2b", 2), ("gemma3-1b", 6)):
        config = zoo.config(name)
        windows = [mixer.window for mixer in config.mixers()]
        assert windows == [config.local.window] * (period - 1) + [None]
    # 26 layers: four groups of six, and two local ones.
    assert len(abstract("gemma3-1b").stack.tail) == 2


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


@FORMS
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
    elif name in ABOUT:
        assert count == pytest.approx(ABOUT[name], rel=0.15)
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
        if equation.primitive.name == "ragged_dot_general":
            # Each row of the first operand meets one expert's kernel, forwards and backwards.
            dims = equation.params["ragged_dot_dimension_numbers"]
            rows, kernel = (x.aval.shape for x in equation.invars[:2])
            met = {*dims.dot_dimension_numbers[0][1], *dims.rhs_group_dimensions}
            total += 2 * times * math.prod(rows) * math.prod(
                n for i, n in enumerate(kernel) if i not in met)
        repeats = times * equation.params.get("length", 1)
        assert equation.primitive.name != "while", "the trip count of a while loop is not known"
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += dot_flops(inner, repeats)
    return total


def recurrence_flops(mixer, width, batch, length) -> tuple[int, int, int]:
    """Those of a recurrent op: of a token as the formula has it; and of the op's matrix products,
    forward and in a training step."""
    h = mixer.num_heads

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    if isinstance(mixer, (MLstm, PreUpMLstm)):
        k, v = ((mixer.key_dim, mixer.value_dim) if isinstance(mixer, MLstm)
                else (mixer.head_dim, mixer.head_dim))
        op, plain = mlstm, 4 * h * k * (v + 1)
        operands = [array(batch, length, h, *sizes) for sizes in ((k,), (k,), (v,), (), ())]
    else:
        cell, d = ("slstm", width // h) if isinstance(mixer, SLstm) else (
            mixer.cell, mixer.head_dim)
        gates = CELLS[cell].gates
        op, plain = functools.partial(rnn, cell=cell), 2 * gates * h * d * d
        operands = [array(batch, length, gates, h, d), array(gates, h, d, d),
                    array(CELLS[cell].biases, h, d)]

    def total(*operands):
        return jnp.sum(op(*operands)[0])

    return plain, *(dot_flops(jax.make_jaxpr(f)(*operands).jaxpr)
                    for f in (total, jax.grad(total, argnums=range(len(operands)))))


@FORMS
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
def test_flop_formula(name, stacked):
    """Against the matrix products that are traced. There attention fills its whole square, of
    which the formula counts what lies under the diagonal and inside the window, and its backward
    pass makes the scores again, which the formula does not count. A recurrent kernel works in
    chunks or makes its products again; the formula counts the plain recurrence."""
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
        if not isinstance(mixer, Attention):
            plain, once, trained = recurrence_flops(mixer, config.width, batch, length)
            unseen += once / (batch * length) - plain
            again += (trained - 3 * once) / (batch * length)
            continue
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
    for preset in tiny.forms():
        lines = [f'  "{path}": {shape}' for path, shape in paths_and_shapes(preset).items()]
        (SNAPSHOTS / f"{preset}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
