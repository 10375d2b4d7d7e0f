"""ParaTransCNN: the published network's numbers, its branches, sizes, statistics and meshes. Renew
the snapshot of parameter paths with ``python -m tests.zoo.test_paratranscnn``."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
import zoo
from recipes.tasks import lm
from tests.tiny import jitted
from tests.tolerances import assert_close
from tests.zoo.test_models import dot_flops, paths_and_shapes
from zoo import protocol

SNAPSHOT = pathlib.Path(__file__).parent / "snapshots" / "paratranscnn-tiny.json"
SMALL = {"num_classes": 3, "cnn.width": 8, "transformer.width": 16}
BRANCHES = pytest.mark.parametrize("branch", ["both", "cnn", "transformer"])


def config(branch="both", **overrides):
    full = zoo.config("paratranscnn-tiny", **SMALL, **overrides)
    other = {"cnn": "transformer", "transformer": "cnn"}.get(branch)
    return full if other is None else zoo.override(full, {other: None})


def images(rows=2, height=32, width=48, channels=1, seed=0):
    shape = (rows, height, width, channels)
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def drawn(config, seed=1):
    """A model with random values everywhere, scales and statistics too.

    Not the initial values: those take longer to compile than most tests take to run.
    """
    draw = np.random.default_rng(seed)
    definition, params = protocol.split(zoo.build(config, abstract=True))

    def one(path, x):
        about = 1.0 if path[-1].key in ("scale", "variance") else 0.0
        spread = 0.2 if x.ndim == 1 else (x.size / x.shape[-1]) ** -0.5
        return (about + spread * draw.uniform(-1, 1, x.shape)).astype(np.float32)

    return protocol.merge(definition, jax.device_put(
        jax.tree_util.tree_map_with_path(one, params)))


@functools.cache
def model(branch="both"):
    return drawn(config(branch))


@functools.cache
def runner(branch="both"):
    """The jitted evaluation: images -> logits."""
    return jitted(lambda model, x: model({"images": x}).logits, model(branch))


def test_published_sizes():
    assert protocol.num_params(zoo.build("paratranscnn", abstract=True)) == 245_468_937
    narrow = zoo.config("paratranscnn", **{"transformer.width": 32})
    assert protocol.num_params(zoo.build(narrow, abstract=True)) == 42_704_553
    # Its authors count 246.9 G multiply-adds.
    assert zoo.config("paratranscnn").flops_per_image(224, 224) == pytest.approx(
        2 * 246.9e9, rel=5e-4)


def test_parameter_paths_are_public():
    found = paths_and_shapes("paratranscnn-tiny")
    assert found == json.loads(SNAPSHOT.read_text())
    assert all(path.startswith("statistics/") == (path.split("/")[-1] in ("mean", "variance"))
               for path in found)


@functools.cache
def gradients(branch="both", remat="none"):
    """(of the learned parameters, the statistics' next values, what they were)."""
    definition, _ = protocol.split(zoo.build(config(branch), abstract=True, remat=remat))
    learned, statistics = protocol.divide(protocol.split(model(branch))[1])
    labels = np.random.default_rng(0).integers(0, 3, (2, 32, 48))

    def loss(learned):
        model = protocol.merge(definition, protocol.join(learned, statistics))
        output = model({"images": images()}, jax.random.key(0), train=True)
        total, weight, _ = model.loss(output, labels)
        return total / weight, output.statistics

    return *jax.jit(jax.grad(loss, has_aux=True))(learned), statistics


@pytest.mark.parametrize("branch", [
    "both", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cnn", "transformer"))])
def test_gradients_and_statistics(branch):
    found, new, statistics = gradients(branch)
    sizes = {path: float(np.abs(g).max()) for path, g in protocol.flat(found).items()}
    # Of one branch alone the gates have so few hidden units here that all may be off.
    idle = {path for path, size in sizes.items() if size < 1e-6
            and (branch == "both" or "excite" not in path)}
    # A batch norm takes away what the bias before it adds.
    assert idle == {f"decoder/{i}/{name}/conv/bias" for i in range(3)
                    for name in ("first", "second")}
    assert all(np.isfinite(size) for size in sizes.values())
    # All of the running statistics move, in the nesting of the tree.
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), new, statistics)
    assert all(jax.tree.leaves(moved))
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(jnp.float32)}


def test_remat_changes_nothing():
    assert_close(gradients(remat="full"), gradients(), tol=1e-4)
    with pytest.raises(ValueError, match="remat is 'some'; it must be one of"):
        zoo.build(config(), abstract=True, remat="some")


def test_any_size():
    """Padded at the bottom and on the right, cut again; an image alone, of one pixel too."""
    x = images(2, 27, 35)
    padded = np.pad(x, ((0, 0), (0, 5), (0, 13), (0, 0)))
    logits = runner()(x)
    assert logits.shape == (2, 27, 35, 3) and logits.dtype == jnp.float32
    assert_close(logits, runner()(padded)[:, :27, :35])
    assert_close(runner()(x[1:]), logits[1:])
    assert runner()(x[:1, :1, :1]).shape == (1, 1, 1, 3)


@pytest.mark.parametrize(("axes", "preset"), [
    ("data:2,fsdp:2,tensor:2", "fsdp_tp"), ("data:2,tensor:4", "dp,height=tensor")])
def test_eight_devices_equal_one(axes, preset):
    """Training with batch norm over the whole batch, its parameters spread as well, or images."""
    definition, params = protocol.split(model())
    names, batch = protocol.axes(model()), {"images": images(8, 32, 32)}
    labels = np.random.default_rng(0).integers(0, 3, (8, 32, 32))
    results = []
    for devices, text, rules in ((1, "data:1", "dp"), (8, axes, preset)):
        mesh, rules = sharding.mesh(text, jax.devices()[:devices]), sharding.rules(rules)
        with sharding.use(mesh, rules):
            @jax.jit
            def run(params, batch):
                learned, statistics = protocol.divide(params)

                def loss(learned):
                    model = protocol.merge(definition, protocol.join(learned, statistics))
                    output = model(batch, jax.random.key(0), train=True)
                    return model.loss(output, labels)[0] / labels.size, output.statistics

                return jax.value_and_grad(loss, has_aux=True)(learned)

            layout = rules.sharding(mesh, ("batch", "height", None, None), (8, 32, 32, 1))
            placed = jax.device_put(params, protocol.shardings(mesh, rules, names, params))
            results.append(jax.device_get(run(placed, jax.device_put(batch, layout))))
    assert_close(results[1], results[0], tol=1e-4)


def test_refused_layout():
    with sharding.use(sharding.mesh("fsdp:4,tensor:2"), sharding.rules("fsdp,channels=tensor")), \
            pytest.raises(ValueError, match="both embed and channels .* leave channels whole"):
        model()({"images": images()}, jax.random.key(0), train=True)


def conv_flops(jaxpr) -> int:
    """Two FLOPs a multiply-add of every convolution, those with zeros around included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod(kernel[:3]))
        for inner in equation.params.values():
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += conv_flops(inner)
    return total


@BRANCHES
def test_flop_formula(branch):
    c = config(branch)
    # In float32 a CPU has a form of convolutions with fewer products.
    definition, params = protocol.split(zoo.build(c, dtype=jnp.bfloat16, abstract=True))
    x = jax.ShapeDtypeStruct((2, 40, 64, 1), jnp.float32)
    traced = jax.make_jaxpr(lambda params, x: protocol.merge(definition, params)(
        {"images": x}).logits)(params, x).jaxpr
    counted = dot_flops(traced) + conv_flops(traced)
    assert counted == 2 * c.flops_per_image(40, 64) == 2 * c.flops_per_image(48, 64)


def test_bfloat16_keeps_statistics_and_logits_in_float32():
    half = zoo.build(config(), dtype=jnp.bfloat16, abstract=True)
    learned, statistics = protocol.divide(protocol.split(half)[1])
    assert {x.dtype for x in jax.tree.leaves(learned)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(statistics)} == {jnp.dtype(jnp.float32)}
    definition, params = protocol.split(model())
    cast = protocol.cast(params, jnp.bfloat16)
    assert_close(cast[protocol.STATISTICS], params[protocol.STATISTICS], tol=0)
    logits = jitted(lambda model, x: model({"images": x}).logits,
                    protocol.merge(definition, cast))(images())
    assert logits.dtype == jnp.float32
    assert_close(logits, runner()(images()), tol=0.05)


@pytest.mark.parametrize(("overrides", "message"), [
    ({"cnn": None, "transformer": None}, "cnn and transformer are both none; keep one"),
    ({"cnn.depth": 50}, r"cnn.depth is 50; it must be one of \[10, 18, 34\]"),
    ({"transformer.width": 15}, "transformer.width is 15, which does not divide by .* = 2"),
    ({"transformer.dropout": 1.0}, r"transformer.dropout is 1.0; it must be in \[0, 1\)"),
    ({"num_classes": 0}, "num_classes is 0; it must be at least 1"),
])
def test_refused_configs(overrides, message):
    with pytest.raises(ValueError, match=message):
        zoo.config("paratranscnn-tiny", **overrides)


def test_refused_batches():
    for batch in ({}, images(), None):
        with pytest.raises(ValueError, match="no dict with 'images', floats"):
            model()(batch)
    with pytest.raises(ValueError, match=r"shape \(2, 32, 48, 3\); they must be \[B, H, W, 1\]"):
        model()({"images": images(channels=3)})
    with pytest.raises(ValueError, match="transformer.dropout is 0.1; training needs a key"):
        model()({"images": images()}, train=True)


def test_language_recipes_refuse_it():
    for refuses in (lambda: lm.check_length(config(), 8),
                    lambda: zoo.generate(model(), [[1, 2]], 3)):
        with pytest.raises(ValueError, match="is a ParaTransCnn, which is for segmentation; give "
                                             "one for language, such as llama-tiny"):
            refuses()


if __name__ == "__main__":
    lines = [f'  "{path}": {shape}' for path, shape in paths_and_shapes(SNAPSHOT.stem).items()]
    SNAPSHOT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
