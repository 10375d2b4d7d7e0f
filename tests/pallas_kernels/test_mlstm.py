"""The matrix LSTM beyond the shared cases: lengths of chunks, pinned numbers, states, gates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Target, cases
from pallas_kernels.mlstm import gpu, mlstm, reference, step, tpu, xla
from tests.pallas_kernels.test_cases import expected, results
from tests.tolerances import assert_close

DIFFERENTIABLE = (0, 1, 2, 3, 4, 6, 7, 8)


def operands(b=1, t=150, h=2, k=8, v=12, seed=0):
    """With three documents a row, padding between and after them, and a state."""
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(b, t, h, n)) for n in (k, k, v)]
    gates = rng.normal(size=(b, t, h)), rng.normal(2.0, 1.0, (b, t, h))
    ids = np.repeat([[1, 2, 0, 2, 3, 0]], b, axis=0).repeat(-(-t // 6), axis=1)[:, :t]
    state = [rng.normal(size=s) for s in ((b, h, k, v), (b, h, k), (b, h))]
    return [x if x.dtype.kind == "i" else x.astype(np.float32)
            for x in (*arrays, *gates, ids.astype(np.int32), *state)]


@pytest.fixture(scope="module")
def recurrence():
    return functools.cache(lambda sigmoid_gate: expected(
        mlstm, cases.Case("", None, {"sigmoid_gate": sigmoid_gate}, DIFFERENTIABLE, {}),
        operands(), "float32"))


@pytest.mark.parametrize(("chunk", "dtype", "sigmoid_gate", "tolerance"), [
    (16, "float32", False, 1e-5),
    (64, "float32", False, 1e-5),
    (256, "float32", False, 1e-5),
    (16, "float64", False, 1e-12),
    (64, "float64", True, 1e-12),
    (256, "float64", False, 1e-12),
])
def test_chunks_equal_the_recurrence(recurrence, chunk, dtype, sigmoid_gate, tolerance):
    """Of one chunk of 150 positions, too: the parallel form."""
    made = [x if x.dtype.kind == "i" else x.astype(dtype) for x in operands()]
    with jax.enable_x64(dtype == "float64"):
        value, gradients = results(
            lambda *x: xla.mlstm(*x, chunk=chunk, eps=1e-6, sigmoid_gate=sigmoid_gate), made,
            DIFFERENTIABLE, "float32")
    value0, gradients0 = recurrence(sigmoid_gate)
    assert_close(value, value0, tolerance)
    assert_close(gradients, gradients0, tolerance)


def test_gradients_equal_those_of_a_recurrence_whose_stabilizer_has_gradients_too():
    """Nothing but eps depends on the stabilizer."""
    def plain(query, key, value, input_gate, forget_gate, cell, normalizer, stabilizer):
        out = []
        for t in range(query.shape[1]):
            q, k, v, i, f = (x[:, t] for x in (query, key, value, input_gate, forget_gate))
            m = jnp.maximum(jax.nn.log_sigmoid(f) + stabilizer, i)
            keep = jnp.exp(jax.nn.log_sigmoid(f) + stabilizer - m)
            write, stabilizer = jnp.exp(i - m), m
            cell = keep[..., None, None] * cell + jnp.einsum("bh,bhk,bhv->bhkv", write, k, v)
            normalizer = keep[..., None] * normalizer + write[..., None] * k
            q = q / np.sqrt(q.shape[-1])
            total = jnp.abs(jnp.einsum("bhk,bhk->bh", q, normalizer))
            out.append(jnp.einsum("bhk,bhkv->bhv", q, cell)
                       / (jnp.maximum(total, jnp.exp(-m)) + 1e-9)[..., None])
        return jnp.stack(out, axis=1)

    made = [x.astype(np.float64) for x in operands(t=11) if x.dtype.kind != "i"]
    differentiable = tuple(range(8))
    with jax.enable_x64(True):
        value0, gradients0 = results(plain, made, differentiable, "float64")
        value, gradients = results(
            lambda *x: xla.mlstm(*x[:5], None, *x[5:], chunk=4, eps=1e-9, sigmoid_gate=False)[0],
            made, differentiable, "float64")
    assert_close(value, value0, 1e-12)
    assert_close(gradients, gradients0, 1e-7)


def fill(shape, a, scale=1.0):
    """Numbers [B, H, T, ...] that anyone can make again, as [B, T, H, ...]."""
    made = scale * np.sin(a + 0.7 * np.arange(np.prod(shape))).reshape(shape)
    return np.swapaxes(made, 1, 2)


@pytest.mark.parametrize("function", [
    reference.mlstm, functools.partial(xla.mlstm, chunk=4, eps=1e-6, sigmoid_gate=False)],
    ids=["recurrence", "chunks"])
def test_pinned_numbers_of_the_published_implementation(function):
    made = (fill((1, 2, 8, 4), 1), fill((1, 2, 8, 4), 2), fill((1, 2, 8, 6), 3),
            fill((1, 2, 8), 4, 2.0), fill((1, 2, 8), 5) + 3)
    with jax.enable_x64(True):
        h, c, n, m = jax.device_get(function(*made, None, None, None, None))
    h = np.swapaxes(h, 1, 2).ravel()
    found = [h.sum(), abs(h).sum(), *h[:3], h[-1], c.sum(), abs(c).sum(), n.sum(), abs(n).sum(),
             *m.ravel()]
    np.testing.assert_allclose(found, [
        -3.353771329, 58.528417851, 0.015256895, -0.057282128, -0.102880471, 0.335191044,
        -17.931627438, 33.544972690, 0.575981025, 1.284312210, 1.805730177, 1.869790111],
        rtol=0, atol=1e-9)


def test_steps_and_parts_continue_a_state():
    """Chunks up to 37, the state handed on, chunks up to 60, and then a step at a time."""
    q, k, v, i, f, _, *state = operands(b=2, t=64)
    whole = mlstm(q, k, v, i, f, None, *state)
    outs = []
    for part in (slice(0, 37), slice(37, 60)):
        out, *state = mlstm(*(x[:, part] for x in (q, k, v, i, f)), None, *state)
        outs.append(out)
    advance = jax.jit(step)
    for t in range(60, 64):
        out, *state = advance(*(x[:, t] for x in (q, k, v, i, f)), *state)
        outs.append(out[:, None])
    assert_close((jnp.concatenate(outs, axis=1), *state), whole)


def test_documents_of_a_row_equal_rows_of_their_own():
    """Padding anywhere is as if it were not there, whatever it holds; the first one continues."""
    *rows, _, c, n, m = operands(t=40)
    ids = np.zeros((1, 40), np.int32)
    ids[0, 3:12], ids[0, 12:20], ids[0, 25:33], ids[0, 33:35] = 1, 2, 2, 7
    for x in rows:
        x[:, ids[0] == 0] = 50.0
    out, *state = mlstm(*rows, ids, c, n, m)
    start = [c, n, m]
    for own in (1, 2, 7):
        alone, *last = mlstm(*(x[:, ids[0] == own] for x in rows), None, *start)
        assert_close(out[:, ids[0] == own], alone, 2e-5)
        start = [None] * 3
    assert_close([x * jnp.exp(state[2].reshape(1, 2, *[1] * (x.ndim - 2))) for x in state[:2]],
                 [x * jnp.exp(last[2].reshape(1, 2, *[1] * (x.ndim - 2))) for x in last[:2]])
    assert not out[:, ids[0] == 0].any()
    nothing, *same = mlstm(*rows, np.zeros_like(ids), c, n, m)
    assert not nothing.any()
    assert_close(same, [c, n, m], 0.0)


@pytest.mark.parametrize("sigmoid_gate", [False, True])
@pytest.mark.parametrize("shut", [-1e30, -np.inf])
def test_shut_gates_give_zeros_and_finite_gradients(shut, sigmoid_gate):
    q, k, v, i, f, ids, *state = operands(t=20)
    run = functools.partial(mlstm, sigmoid_gate=sigmoid_gate)
    value, gradients = results(run, [q, k, v, np.full_like(i, shut), np.full_like(f, shut), ids,
                                     *state], DIFFERENTIABLE, "float32")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, gradients)))
    assert np.abs(value[0]).max() < 1e-6


def test_decays_keep_their_digits_after_gates_that_forget_much():
    """Sums of a chunk's gates are in the thousands, and their differences near 0."""
    q, k, v, i, f, *_ = operands(b=1, t=256, h=1)
    q, k, f[:, ::2], i[:, ::3] = abs(q), abs(k), -20.0, -15.0
    f[:, 128:] = 4.0
    made = [q, k, v, i, f, *[None] * 4]
    differentiable = (0, 1, 2, 3, 4)
    value, gradients = results(
        lambda *x: xla.mlstm(*x, chunk=256, eps=1e-6, sigmoid_gate=False), made, differentiable,
        "float32")
    value0, gradients0 = expected(mlstm, cases.Case("", None, {}, differentiable, {}), made,
                                  "float32")
    assert_close(value, value0, 2e-6)
    assert_close(gradients, gradients0, 5e-6)


def test_tpu_chunks_of_several_tiles_equal_the_definition():
    made = operands(t=300, h=1)
    with pallas_kernels.interpret("v5p"):
        value, gradients = results(
            lambda *x: tpu.mlstm(*x, chunk=256, eps=1e-6, sigmoid_gate=False), made,
            DIFFERENTIABLE, "float32")
    case = cases.Case("", None, {}, DIFFERENTIABLE, {})
    value0, gradients0 = expected(mlstm, case, made, "float32")
    assert_close(value, value0, 2e-5)
    assert_close(gradients, gradients0, 5e-5)


def refusal(module, chip, k=64, v=64, dtype=jnp.bfloat16, other=None):
    shapes = (1, 256, 2, k), (1, 256, 2, k), (1, 256, 2, v)
    dtypes = dtype, dtype, other or dtype
    arrays = [jax.ShapeDtypeStruct(*x) for x in zip(shapes, dtypes, strict=True)]
    bound, options = mlstm.bind(*arrays, *[jax.ShapeDtypeStruct((1, 256, 2), jnp.float32)] * 2)
    return module.supports(Target.parse(chip), *bound, **options)


def test_tpu_refuses_by_name():
    refuse = functools.partial(refusal, tpu, "v5p")
    assert refuse() is None
    assert refuse(k=256, v=512) is None
    assert "bfloat16, float32 must be" in refuse(other=jnp.float32)
    assert "float16 must be" in refuse(dtype=jnp.float16)
    assert "a state of 1024 x 2048 exceeds" in refuse(k=1000, v=2048)


def test_gpu_refuses_by_name():
    assert refusal(gpu, "h200") is None
    assert refusal(gpu, "h100", k=256, v=512) is None
    assert "a100 is not h100 or h200" in refusal(gpu, "a100")
    assert "float32 must all be bfloat16" in refusal(gpu, "h200", dtype=jnp.float32)


@pytest.mark.parametrize(("change", "message"), [
    ({"key": np.zeros((1, 4, 2, 3))}, "key"),
    ({"value": np.zeros((1, 5, 2, 3))}, "value"),
    ({"forget_gate": np.zeros((1, 4))}, "gates"),
    ({"segment_ids": np.zeros((4,), np.int32)}, "segment_ids"),
    ({"cell": np.zeros((1, 2, 8, 12))}, "all of cell, normalizer and stabilizer"),
    ({"cell": np.zeros((1, 2, 12, 8)), "normalizer": np.zeros((1, 2, 8)),
      "stabilizer": np.zeros((1, 2))}, "a state of"),
    ({"eps": 0.0}, "eps=0.0 must be > 0"),
])
def test_operands_must_fit_together(change, message):
    names = ("query", "key", "value", "input_gate", "forget_gate")
    made = dict(zip(names, operands(t=4), strict=False)) | change
    with pytest.raises(ValueError, match=f"mlstm: .*{message}|mlstm: {message}"):
        mlstm.bind(**made)
