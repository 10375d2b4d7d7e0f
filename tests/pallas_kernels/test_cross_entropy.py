"""Cross-entropy of a linear head against its float64 definition, on one device and eight."""

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import pallas_kernels
import sharding
from pallas_kernels.cross_entropy import cross_entropy, gpu, reference, tpu, xla
from pallas_kernels.dispatch import RESIDUAL
from sharding import Rules
from tests.tiny import MESH
from tests.tolerances import assert_close


def operands(b=2, t=7, d=6, v=11, seed=0):
    """hidden, head, labels, weights; labels at both ends of the vocabulary, some weights 0."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, v, (b, t)).astype(np.int32)
    labels.flat[:2] = 0, v - 1
    weights = rng.random((b, t)) * (rng.random((b, t)) > 0.3)
    weights.flat[:2] = 1.0
    return rng.normal(size=(b, t, d)), rng.normal(size=(d, v)), labels, weights


def results(function, arrays, dtype=jnp.float32, factor=1.0):
    """The sums by name, and the gradients of `factor` times the loss."""
    hidden, head, labels, weights = arrays
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32

    def loss(hidden, head, labels, weights):
        total, weight, metrics = jax.tree.map(
            jnp.sum, function(hidden, head, labels, weights))
        return factor * total, {"loss": total, "weight": weight, **metrics}

    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (d_hidden, d_head), sums = run(
        jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), labels, jnp.asarray(weights, wide))
    return jax.device_get({**sums, "hidden": d_hidden, "head": d_head})


def expected(arrays, factor=1.0, **options):
    with jax.enable_x64(True):
        function = functools.partial(reference.cross_entropy, **options)
        return results(function, arrays, jnp.float64, factor)


OPTIONS = {
    "plain": {},
    "z-loss": {"z_loss": 0.1},
    "smoothing": {"label_smoothing": 0.3},
    "softcap": {"softcap": 1.5},
    "all": {"z_loss": 0.05, "label_smoothing": 0.1, "softcap": 2.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_its_definition(options):
    arrays = operands(b=3, t=17)
    op = functools.partial(cross_entropy, **options)
    assert_close(results(op, arrays, factor=-2.5), expected(arrays, factor=-2.5, **options))


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize(("b", "t"), [(1, 1), (1, 2), (4, 3), (2, 31)])
def test_any_length(b, t, rows):
    """One position, primes that no slice divides, slices of one position and of more than all."""
    arrays = operands(b=b, t=t)
    op = functools.partial(xla.cross_entropy, rows=rows, z_loss=0.1, label_smoothing=0.0,
                           softcap=None, vocab_axis=None)
    assert_close(results(op, arrays), expected(arrays, z_loss=0.1))


@pytest.mark.parametrize("positions", [1, 2, 5, 97, 1024, 4099, 16_384, 2_867_200])
@pytest.mark.parametrize("vocab", [7, 264, 32_000, 152_064])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
def test_slices_cover_the_positions(positions, vocab, platform):
    """Equal slices, at least two of them, within the bound on logits, and little padding."""
    rows = xla.slice_rows(positions, vocab, platform)
    logits, fewest, multiple = xla.SLICES[platform]
    slices = -(-positions // rows)
    assert rows % multiple == 0
    assert slices >= 2 or positions <= max(1, multiple)
    assert slices * rows - positions < slices * multiple
    assert rows < max(fewest, logits // vocab) + multiple


def test_weight_zero_hides_a_position():
    hidden, head, labels, weights = operands()
    weights[:, 3:] = 0
    other = labels.copy()
    other[:, 3:] = -100  # as some data sets mark what has no label
    first = results(cross_entropy, (hidden, head, labels, weights))
    assert_close(results(cross_entropy, (hidden, head, other, weights)), first, tol=0)
    assert not first["hidden"][:, 3:].any()
    assert_close(first["weight"], weights.sum())


def test_no_weight_at_all():
    hidden, head, labels, weights = operands()
    nothing = results(cross_entropy, (hidden, head, labels, 0 * weights))
    assert all(not x.any() for x in nothing.values())


@contextlib.contextmanager
def using(implementation):
    """In the interpreter where it is a TPU's."""
    with contextlib.ExitStack() as stack:
        if implementation == "tpu":
            stack.enter_context(pallas_kernels.interpret("v5p"))
        stack.enter_context(pallas_kernels.using(cross_entropy=implementation))
        yield


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_extreme_logits(implementation):
    """Logits of about +-1e4: the loss is a difference of large numbers, yet finite and right."""
    hidden, head, labels, weights = operands(v=300)
    arrays = (100 * hidden, 100 * head, labels, weights)
    with using(implementation):
        assert_close(results(cross_entropy, arrays), expected(arrays))


def test_only_the_loss_has_a_gradient():
    hidden, head, labels, weights = (jnp.asarray(x) for x in operands())

    def others(hidden, head):
        _, weight, metrics = cross_entropy(hidden, head, labels, weights)
        return sum(x[0] for x in jax.tree.leaves((weight, metrics)))

    gradients = jax.grad(others, (0, 1))(hidden, head)
    assert all(not g.any() for g in gradients)


def test_smoothing_is_that_of_torch():
    """CrossEntropyLoss: the mean over classes counts the label's own, and sums to 1 with it."""
    hidden = jnp.eye(3)[None]
    logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2]])
    labels = np.array([[0, 2, 1]], np.int32)
    target = 0.7 * np.eye(3)[labels[0]] + 0.3 / 3
    total, _, metrics = cross_entropy(hidden, jnp.asarray(logits, jnp.float32), labels,
                                      jnp.ones((1, 3)), label_smoothing=0.3)
    assert_close(total[0], -(target * logits).sum())
    assert_close(metrics["nll"][0], -logits[range(3), labels[0]].sum())


def test_correct_is_the_first_largest():
    """With equal logits everywhere, only label 0 counts; a constant head predicts nothing else."""
    hidden, head, labels, weights = operands(b=2, t=6)
    _, _, metrics = cross_entropy(jnp.asarray(hidden), jnp.zeros(head.shape), labels,
                                  jnp.asarray(weights))
    assert_close(jnp.sum(metrics["correct"]), weights[labels == 0].sum())
    with sharding.use(sharding.mesh(MESH), Rules(batch=None, vocab="tensor")):
        _, _, metrics = sharding.local(
            cross_entropy, jnp.asarray(hidden), jnp.zeros((6, 12)), labels, jnp.asarray(weights))
    assert_close(jnp.sum(metrics["correct"]), weights[labels == 0].sum())


def matmuls(function, *arrays, optimized=False):
    """Dot products in the program of `function`; its loops hold each just once."""
    lowered = jax.jit(function).lower(*arrays)
    text = lowered.compile().as_text() if optimized else lowered.as_text()
    return len(re.findall(r" dot\(| custom-call\(.*matmul" if optimized else "dot_general", text))


@pytest.mark.parametrize(
    ("policy", "most"),
    [(None, 4), (jax.checkpoint_policies.save_only_these_names(RESIDUAL), 3)],
    ids=["nothing saved", "residuals saved"])
def test_remat_makes_gradients_once(policy, most):
    """One product for the loss and one for each gradient; saving nothing repeats the first."""
    hidden, head, labels, weights = (jnp.asarray(x) for x in operands(b=2, t=16, d=8, v=32))

    def loss(hidden, head):
        return cross_entropy(jnp.tanh(hidden), head, labels, weights)[0][0]

    plain = jax.grad(loss, (0, 1))
    again = jax.grad(jax.checkpoint(loss, policy=policy), (0, 1))
    assert matmuls(loss, hidden, head) == 1
    assert matmuls(plain, hidden, head) == 3
    assert 3 <= matmuls(again, hidden, head, optimized=True) <= most
    if policy is not None:
        assert matmuls(again, hidden, head) == 3
    assert_close(again(hidden, head), plain(hidden, head))


def test_bfloat16():
    hidden, head, labels, weights = operands(t=13, d=16)
    hidden, head = (
        np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (hidden, head / 4))
    arrays = hidden, head, labels, weights
    actual = results(functools.partial(cross_entropy, z_loss=0.1), arrays, jnp.bfloat16)
    assert actual["hidden"].dtype == actual["head"].dtype == jnp.bfloat16
    assert actual["loss"].dtype == np.float32
    assert_close(actual, expected(arrays, z_loss=0.1), tol=2e-2)


@pytest.mark.parametrize("mesh", ["", "data:2,tensor:2"])
def test_never_holds_all_logits(mesh):
    """Neither the forward nor the backward pass has room for [B, T, V] float32."""
    b, t, d, v = 8, 1024, 8, 4096
    shapes = [((b, t, d), jnp.float32), ((d, v), jnp.float32), ((b, t), jnp.int32),
              ((b, t), jnp.float32)]
    all_logits = 4 * b * t * v

    def temporaries(function):
        gradient = jax.grad(lambda *x: jnp.sum(function(*x)[0]), (0, 1))
        avals = [jax.ShapeDtypeStruct(*s) for s in shapes]
        return jax.jit(gradient).lower(*avals).compile().memory_analysis().temp_size_in_bytes

    if mesh:
        parts = 4
        with sharding.use(sharding.mesh(mesh, jax.devices()[:4]), sharding.rules("fsdp_tp")):
            held = temporaries(functools.partial(sharding.local, cross_entropy))
    else:
        parts = 1
        held = temporaries(cross_entropy)
        assert temporaries(reference.cross_entropy) >= all_logits
    assert held < 0.6 * all_logits / parts


def product_flops(jaxpr) -> int:
    """FLOPs of the matrix products in a program, its loops and kernels' grids multiplied out."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(
                lhs[axis] for axis in contracted)
            continue
        inside = sum(map(product_flops, jaxprs_in_params(eqn.params)))
        if eqn.primitive.name == "scan":
            inside *= eqn.params["length"]
        elif eqn.primitive.name == "pallas_call":
            inside *= math.prod(eqn.params["grid_mapping"].grid)
        else:
            assert eqn.primitive.name != "while" or not inside
        total += inside
    return total


@pytest.mark.parametrize("implementation", [xla, tpu], ids=["xla", "tpu"])
@pytest.mark.parametrize(
    ("b", "t", "d", "v"),
    [(4, 4096, 4096, 152_064), (8, 1000, 768, 50_257), (3, 4097, 512, 32_000)])
def test_flops_are_those_of_the_plain_form(implementation, b, t, d, v):
    """One product for the value and three with gradients, but for little padding."""
    rows = xla.slice_rows(b * t, v, "tpu") if implementation is xla else None
    shapes = [((b, t, d), jnp.bfloat16), ((d, v), jnp.bfloat16), ((b, t), jnp.int32),
              ((b, t), jnp.float32)]
    avals = [jax.ShapeDtypeStruct(*s) for s in shapes]

    def loss(*operands):
        return implementation.cross_entropy(*operands, rows=rows, z_loss=1e-4, softcap=None,
                                            label_smoothing=0.0, vocab_axis=None)[0][0]

    plain = 2 * b * t * d * v
    for function, products in ((loss, 1), (jax.grad(loss, (0, 1)), 3)):
        counted = product_flops(jax.make_jaxpr(function)(*avals).jaxpr)
        assert products * plain <= counted <= 1.15 * products * plain


def test_tiles_tuned_for_a_narrower_head_are_not_taken():
    """One bucket holds widths of 8193 to 16384, and the vector memory is full at 10k."""
    d, v = 16_384, 1024
    shapes = [((1, 512, d), jnp.bfloat16), ((d, v), jnp.bfloat16), ((1, 512), jnp.int32),
              ((1, 512), jnp.float32)]
    avals = [jax.ShapeDtypeStruct(*s) for s in shapes]

    def program(**tiles):
        return str(jax.make_jaxpr(functools.partial(
            tpu.cross_entropy, rows=512, z_loss=0.0, softcap=None, label_smoothing=0.0,
            vocab_axis=None, **tiles))(*avals))

    assert program(block_rows=1024, block_columns=512) == program()
    assert program(block_rows=128, block_columns=128) != program()


def test_no_kernel_for_a_tpu_v4():
    bound, options = cross_entropy.bind(*map(jnp.asarray, operands()))
    assert "v4 has 16 MiB" in tpu.supports(pallas_kernels.Target.parse("v4"), *bound, **options)


RULES = {
    "replicated": Rules(batch=None),
    "batch over data": Rules(batch="data"),
    "batch over two": Rules(),
    "vocabulary": Rules(batch=None, vocab="tensor"),
    "vocabulary over two": Rules(batch="data", vocab=("fsdp", "tensor")),
    "both": Rules(vocab="tensor"),
}


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", RULES)
def test_eight_devices_equal_one(name, explicit):
    arrays = operands(b=4, t=5, v=12)
    options = {"z_loss": 0.1, "label_smoothing": 0.2, "softcap": 2.0}
    one = results(functools.partial(cross_entropy, **options), arrays, factor=3.0)
    with sharding.use(sharding.mesh(MESH, explicit=explicit), RULES[name]):
        eight = results(
            functools.partial(sharding.local, cross_entropy, **options), arrays, factor=3.0)
    assert_close(eight, one)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", [None, "vocabulary", "vocabulary over two", "both"])
def test_columns_that_fill_a_vocabulary_up(name, explicit):
    """11 tokens in 16 columns, of four shards one holds none: as without the other columns,
    whatever these hold."""
    hidden, head, labels, weights = operands(b=4, t=5, v=11)
    options = {"z_loss": 0.1, "label_smoothing": 0.2, "softcap": 2.0}
    wanted = expected((hidden, head, labels, weights), factor=3.0, **options)
    wanted["head"] = np.pad(wanted["head"], ((0, 0), (0, 5)))
    wider = hidden, np.pad(head, ((0, 0), (0, 5)), constant_values=50.0), labels, weights
    op = functools.partial(sharding.local, cross_entropy, vocab_size=11, **options)
    with (contextlib.nullcontext() if name is None else
          sharding.use(sharding.mesh(MESH, explicit=explicit), RULES[name])):
        found = results(op, wider, factor=3.0)
    assert_close(found, wanted)
    assert not found["head"][:, 11:].any()


def test_kernels_refuse_columns_that_are_no_tokens():
    bound, options = cross_entropy.bind(*map(jnp.asarray, operands()), vocab_size=7)
    bound = [x.astype(jnp.bfloat16) if i < 2 else x for i, x in enumerate(bound)]
    for module, chip in ((tpu, "v5p"), (gpu, "h200")):
        target = pallas_kernels.Target.parse(chip)
        assert "vocab_size=7 hides columns" in module.supports(target, *bound, **options)


def test_kernels_merge_shards_of_the_vocabulary():
    arrays = operands(b=4, t=5, v=600)
    options = {"z_loss": 0.1, "label_smoothing": 0.2, "softcap": 2.0}
    mesh = sharding.mesh("data:2,tensor:2", jax.devices()[:4])
    with sharding.use(mesh, Rules(vocab="tensor")), using("tpu"):
        four = results(
            functools.partial(sharding.local, cross_entropy, **options), arrays, factor=3.0)
    assert_close(four, expected(arrays, factor=3.0, **options))


@pytest.mark.parametrize("shape", [{"v": 13}, {"b": 3}, {"b": 1, "v": 7}], ids=str)
def test_what_does_not_divide_is_whole(shape):
    """An odd vocabulary or batch is replicated, and its loss is counted once."""
    arrays = operands(**{"b": 4, "t": 5, "v": 12, **shape})
    one = results(cross_entropy, arrays)
    with sharding.use(sharding.mesh(MESH), sharding.rules("fsdp_tp")):
        eight = results(functools.partial(sharding.local, cross_entropy), arrays)
    assert_close(eight, one)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 4), (5, 6), (2, 3), (2, 3)), r"hidden \(2, 3, 4\) and head \(5, 6\)"),
        (((2, 3, 4), (4, 6), (2, 4), (2, 3)), r"labels \(2, 4\)"),
        (((2, 3, 4), (4, 6), (2, 3), (3, 2)), r"weights \(3, 2\)"),
        (((2, 3, 4), (4,), (2, 3), (2, 3)), r"must be \[B, T, D\] and \[D, V\]"),
        (((0, 3, 4), (4, 6), (0, 3), (0, 3)), "every dimension must be at least 1"),
        (((2, 3, 4), (4, 0), (2, 3), (2, 3)), "every dimension must be at least 1"),
    ],
)
def test_refuses_shapes_that_do_not_fit(shapes, message):
    hidden, head, labels, weights = (jnp.zeros(s) for s in shapes)
    with pytest.raises(ValueError, match=message):
        cross_entropy(hidden, head, labels.astype(jnp.int32), weights)


def test_refuses_labels_that_are_no_integers():
    hidden, head, labels, weights = (jnp.asarray(x) for x in operands())
    with pytest.raises(ValueError, match="labels are float32; they must be integers"):
        cross_entropy(hidden, head, labels.astype(jnp.float32), weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"label_smoothing": 1.0}, r"label_smoothing=1.0 must be in \[0, 1\)"),
     ({"label_smoothing": -0.1}, r"label_smoothing=-0.1"),
     ({"softcap": 0.0}, r"softcap=0.0 must be > 0; None turns it off"),
     ({"softcap": float("nan")}, r"softcap=nan must be > 0"),
     ({"vocab_size": 0}, r"vocab_size=0 must be in 1..11"),
     ({"vocab_size": 12}, r"vocab_size=12 must be in 1..11, the columns of the head")], ids=str)
def test_refuses_options_out_of_range(options, message):
    arrays = (jnp.asarray(x) for x in operands())
    with pytest.raises(ValueError, match=message):
        cross_entropy(*arrays, **options)
