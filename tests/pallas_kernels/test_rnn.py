"""Recurrent cells beyond the shared cases: pinned numbers, states, segments, derivatives, tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Target, cases
from pallas_kernels.rnn import CELLS, gpu, reference, rnn, step, tiles, tpu, xla
from tests.pallas_kernels.test_cases import expected, results
from tests.tolerances import assert_close


def operands(cell, b=2, t=13, h=2, d=8, seed=0):
    """Inputs, recurrent matrices, biases and a state."""
    kind, rng = CELLS[cell], np.random.default_rng(seed)
    inputs = rng.normal(size=(b, t, kind.gates, h, d))
    recurrent = rng.normal(0.0, 0.7 / d**0.5, (kind.gates, h, d, d))
    bias, state = rng.normal(size=(kind.biases, h, d)), rng.normal(size=(kind.states, b, h, d))
    if cell == "slstm":
        state[2] = 1 + abs(state[2])
    return [x.astype(np.float32) for x in (inputs, recurrent, bias, state)]


def fill(shape, a, scale=1.0):
    """Numbers that anyone can make again."""
    return scale * np.sin(a + 0.7 * np.arange(np.prod(shape))).reshape(shape)


PINNED = {
    "lstm": (2.230423931, 6.080500703, 0.18942434, 0.29345633, 0.23115254, 0.083585108),
    "gru": (-6.858471769, 13.108166257, 0.10991526, 0.12508899, 0.19695206, -0.083811603),
    "elman": (-0.740701857, 19.498919720, 0.75418534, 0.43157345, -0.26932779, 0.521457657),
    "slstm": (2.159509013, 10.767462909, 0.27482489, 0.51451165, 0.55425661, 0.037559092),
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("function", [reference.rnn, functools.partial(xla.rnn, unroll=2)],
                         ids=["definition", "loop"])
def test_pinned_numbers_of_the_published_implementation(function, cell):
    """FlashRNN's matrices are [out, in]; its GRU's are in the order n, r, z, its biases hn, r, z,
    n."""
    kind = CELLS[cell]
    inputs = fill((1, 5, kind.gates, 2, 4), 1)
    recurrent = np.swapaxes(fill((kind.gates, 2, 4, 4), 2, 0.5), 2, 3)
    bias = fill((kind.biases, 2, 4), 3)
    if cell == "gru":
        recurrent, bias = recurrent[[1, 2, 0]], bias[[1, 2, 3, 0]]
    with jax.enable_x64(True):
        h, state = jax.device_get(function(inputs, recurrent, bias, None, None, cell=cell))
    h = h.ravel()
    found = [h.sum(), abs(h).sum(), *h[:3], h[-1]]
    np.testing.assert_allclose(found, PINNED[cell], rtol=0, atol=6e-9)
    if cell == "slstm":
        np.testing.assert_allclose(state[3, 0, -1, -1], 1.912645414, rtol=0, atol=1e-9)


def test_cells_equal_their_formulas():
    """As torch's documentation has them, and xLSTM's, of one position and one unit."""
    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    x = np.array([0.3, -0.8, 0.5, 1.1])
    weights = np.array([0.4, -0.6, 0.9, 0.2])
    b = np.array([0.1, -0.2, 0.7, -0.4])
    h0, c0, n0, m0 = 0.6, -0.9, 1.3, 0.2

    def run(cell, *state):
        kind = CELLS[cell]
        with jax.enable_x64(True):
            return np.ravel(step(
                x[:kind.gates, None, None], weights[:kind.gates, None, None, None],
                b[:kind.biases, None, None], np.reshape(state, (-1, 1, 1)), cell=cell))

    gates = x + weights * h0 + b
    found = {"elman": run("elman", h0), "lstm": run("lstm", h0, c0), "gru": run("gru", h0),
             "slstm": run("slstm", h0, c0, n0, m0), "first": run("slstm", 0.0, 0.0, 0.0, 9.0)}
    wanted = {"elman": [np.tanh(gates[0])]}
    i, f, z, o = sigmoid(gates[0]), sigmoid(gates[1]), np.tanh(gates[2]), sigmoid(gates[3])
    c = f * c0 + i * z
    wanted["lstm"] = [o * np.tanh(c), c]
    r, u = sigmoid(gates[:2])
    n = np.tanh(x[2] + b[2] + r * (weights[2] * h0 + b[3]))
    wanted["gru"] = [(1 - u) * n + u * h0]
    log_forget = np.log(f) + m0
    m = max(gates[0], log_forget)
    i, f = np.exp(gates[0] - m), np.exp(log_forget - m)
    c, n = f * c0 + i * z, f * n0 + i
    wanted["slstm"] = [o * c / n, c, n, m]
    first = x + b
    wanted["first"] = [sigmoid(first[3]) * np.tanh(first[2]), np.tanh(first[2]), 1.0, first[0]]
    assert_close(found, {name: np.array(values) for name, values in wanted.items()}, 1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_derivatives_equal_jax_own(cell):
    """Of one position, with gates that are shut or open too."""
    kind, rng = CELLS[cell], np.random.default_rng(0)
    with jax.enable_x64(True):
        pre = list(rng.normal(0.0, 3.0, (kind.biases, 3, 40)))
        state = list(rng.normal(size=(kind.states, 3, 40)))
        if cell == "slstm":
            state[2] = abs(state[2]) + 0.1
            state[1][0], state[2][0] = 0.0, 0.0
        cotangents = tuple(rng.normal(size=(kind.states, 3, 40)))
        _, pull = jax.vjp(lambda p, s: kind.activate(p, s, jax.lax.stop_gradient), pre, state)
        expected = pull(cotangents)
        found = kind.derive(pre, state, cotangents)
    found = jax.tree.map(lambda x: np.broadcast_to(x, (3, 40)), list(found))
    assert_close(found, list(expected), 1e-12)


@pytest.mark.parametrize("cell", ["gru", "slstm"])
def test_gradients_of_float64_equal_the_definition(cell):
    inputs, recurrent, bias, state = (x.astype(np.float64) for x in operands(cell))
    ids = np.array([[1] * 4 + [0] * 2 + [1] * 3 + [2] * 4, [0] + [3] * 6 + [4] * 5 + [0]], np.int32)
    made, differentiable = [inputs, recurrent, bias, ids, state], (0, 1, 2, 4)
    with jax.enable_x64(True):
        value, gradients = results(functools.partial(xla.rnn, cell=cell, unroll=1), made,
                                   differentiable, "float32")
    case = cases.Case("", None, {"cell": cell}, differentiable, {})
    value0, gradients0 = expected(rnn, case, made, "float32")
    assert_close(value, value0, 1e-12)
    assert_close(gradients, gradients0, 1e-11)


def test_steps_and_parts_continue_a_state():
    """Seven positions, the state handed on, four more, and then a step at a time."""
    inputs, recurrent, bias, state = operands("slstm")
    run = jax.jit(functools.partial(rnn, cell="slstm"))
    whole = run(inputs, recurrent, bias, None, state)
    outs = []
    for part in (slice(0, 7), slice(7, 11)):
        out, state = run(inputs[:, part], recurrent, bias, None, state)
        outs.append(out)
    advance = jax.jit(functools.partial(step, cell="slstm"))
    for t in range(11, 13):
        state = advance(inputs[:, t], recurrent, bias, state)
        outs.append(state[0][:, None])
    assert_close((jnp.concatenate(outs, axis=1), state), whole)


@pytest.mark.parametrize("cell", ["lstm", "slstm"])
def test_documents_of_a_row_equal_rows_of_their_own(cell):
    """Padding anywhere is as if it were not there, whatever it holds; the first one continues."""
    inputs, recurrent, bias, first = operands(cell, b=1, t=20)
    ids = np.zeros((1, 20), np.int32)
    ids[0, 2:6], ids[0, 6:10], ids[0, 13:16], ids[0, 16:18] = 1, 2, 2, 7
    inputs[ids == 0] = 50.0
    run = functools.partial(rnn, cell=cell)
    out, state = run(inputs, recurrent, bias, ids, first)
    start = first
    for own in (1, 2, 7):
        alone, last = run(inputs[:, ids[0] == own], recurrent, bias, None, start)
        assert_close(out[:, ids[0] == own], alone)
        start = None
    assert_close(state, last)
    assert not out[:, ids[0] == 0].any()
    nothing, same = run(inputs, recurrent, bias, np.zeros_like(ids), first)
    assert not nothing.any()
    assert_close(same, first, 0.0)


def test_gates_far_from_zero_give_finite_values_and_gradients():
    inputs, recurrent, bias, state = operands("slstm")
    inputs[:, ::2, :2], inputs[:, 1::3, 0], inputs[:, 1::4, 1] = -80.0, 60.0, 90.0
    made = [inputs, recurrent, bias, None, state]
    value, gradients = results(functools.partial(rnn, cell="slstm"), made, (0, 1, 2, 4), "float32")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, gradients)))


def test_tpu_tiles_of_batch_and_groups_equal_the_definition():
    """Two programs of heads by two of the batch, over three blocks of positions."""
    inputs, recurrent, bias, state = operands("lstm", b=11, t=9, h=5, d=64)
    ids = np.repeat([[1, 1, 2, 0, 2, 3, 3, 3, 0]], 11, axis=0).astype(np.int32)
    made, differentiable = [inputs, recurrent, bias, ids, state], (0, 1, 2, 4)
    with pallas_kernels.interpret("v5p"):
        value, gradients = results(
            functools.partial(tpu.rnn, cell="lstm", groups=1, rows=8, times=4), made,
            differentiable, "float32")
    case = cases.Case("", None, {"cell": "lstm"}, differentiable, {})
    value0, gradients0 = expected(rnn, case, made, "float32")
    assert_close(value, value0, 2e-5)
    assert_close(gradients, gradients0, 5e-5)


def sizes(b=8, t=1024, h=12, d=64, itemsize=2, cell="lstm"):
    return tiles.Sizes(b, t, h, d, itemsize, CELLS[cell])


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("shape", [(8, 1024, 12, 64), (1, 7, 1, 48), (300, 64, 4, 128),
                                   (16, 128, 2, 384)])
def test_chosen_tiles_fit(chip, shape):
    asked = sizes(*shape)
    chosen = tiles.choose(asked, chip)
    assert tiles.needed(asked, chosen) <= tiles.vmem(chip)
    assert asked.groups % chosen.groups == 0
    assert chosen.rows % 16 == 0


def test_tiles_use_both_cores_and_share_lanes():
    assert tiles.choose(sizes(), "v5e").groups == 6
    assert tiles.choose(sizes(), "v5p").groups == 3
    assert sizes(h=7, d=40).groups == 4
    assert tiles.choose(sizes(h=1, d=768, t=9), "v6e").times == 16


def refusal(module, chip, cell="lstm", h=2, d=64, dtype=jnp.bfloat16, other=None, segments=False):
    kind = CELLS[cell]
    made = [jax.ShapeDtypeStruct(shape, kind_) for shape, kind_ in (
        ((2, 16, kind.gates, h, d), dtype), ((kind.gates, h, d, d), other or dtype),
        ((kind.biases, h, d), dtype))]
    ids = jax.ShapeDtypeStruct((2, 16), jnp.int32) if segments else None
    bound, options = rnn.bind(*made, ids, cell=cell)
    return module.supports(Target.parse(chip), *bound, **options)


def test_tpu_refuses_by_name():
    refuse = functools.partial(refusal, tpu, "v5p")
    assert refuse() is None
    assert refuse(h=1, d=768) is None
    assert "bfloat16, float32 must be" in refuse(other=jnp.float32)
    assert "float16 must be" in refuse(dtype=jnp.float16)
    assert "a head of 2048 has 67.1 MB of matrices" in refuse(d=2048, dtype=jnp.float32)


def test_gpu_refuses_by_name():
    refuse = functools.partial(refusal, gpu, "h200")
    assert refuse(d=128, cell="slstm", segments=True) is None
    assert refuse(d=256, cell="elman", segments=True) is None
    assert "a head of 768 has 4.72 MB of matrices and needs" in refuse(h=1, d=768)
    assert "a100 is not h100 or h200" in refusal(gpu, "a100")
    assert "float32 must both be bfloat16" in refuse(dtype=jnp.float32)


@pytest.mark.parametrize(("change", "message"), [
    ({"cell": "lstn"}, "cell='lstn' must be one of elman, gru, lstm, slstm"),
    ({"cell": "gru"}, r"inputs \(2, 13, 4, 2, 8\) must be \(B, T, 3, H, D\): gru has 3 gates"),
    ({"inputs": np.zeros((2, 13, 16))}, "inputs"),
    ({"recurrent": np.zeros((4, 2, 8, 9))}, "recurrent"),
    ({"bias": np.zeros((4, 16))}, "bias"),
    ({"segment_ids": np.zeros((13,), np.int32)}, "segment_ids"),
    ({"segment_ids": np.zeros((2, 13), np.float32)}, "segment_ids are float32; they must be integ"),
    ({"state": np.zeros((1, 2, 2, 8))}, "state"),
    ({"state": np.zeros((2, 2, 2, 8), np.int32)}, "the state is int32; it must be float32"),
    ({"state": jnp.zeros((2, 2, 2, 8), jnp.bfloat16)}, "the state is bfloat16; it must be float32"),
])
def test_operands_must_fit_together(change, message):
    inputs, recurrent, bias, state = operands("lstm")
    made = {"inputs": inputs, "recurrent": recurrent, "bias": bias, "state": state, "cell": "lstm"}
    with pytest.raises(ValueError, match=f"rnn: {message}"):
        rnn.bind(**made | change)


@pytest.mark.parametrize("shapes", [((2, 3, 2, 8), (2, 2, 2, 8)), ((2, 4, 2, 8), (4, 2, 2, 8)),
                                    ((2, 4, 2, 8), (2, 3, 2, 8))])
def test_a_step_refuses_gates_states_and_batches_that_do_not_fit(shapes):
    _, recurrent, bias, _ = operands("lstm")
    inputs, state = map(np.zeros, shapes)
    with pytest.raises(ValueError, match=r"must be \[..., 4, H, D\] and \[2, ..., H, D\] for lstm"):
        step(inputs, recurrent, bias, state, cell="lstm")
