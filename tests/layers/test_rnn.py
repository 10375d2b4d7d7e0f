"""The sLSTM and the classical cells: incremental forms against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.rnn import Rnn, SLstm
from tests.layers import recurrent
from tests.layers.recurrent import WIDTH, Machine, convolve, sigmoid, silu
from tests.tolerances import assert_close

CONFIGS = {
    "slstm": SLstm(2, norm_eps=1e-2),
    "lstm": Rnn("lstm", 2, 5),
    "gru": Rnn("gru", 1, 7),
    "elman": Rnn("elman", 2, 3),
}


def definition(config, p, x):
    if isinstance(config, Rnn):
        inputs = np.einsum("td,dghk->tghk", x, p["gates"]["kernel"])
        h, state = recur(config.cell, p["cell"], inputs)
        return np.einsum("thk,hkd->td", h, p["out"]["kernel"]), (state,)
    x = x.reshape(len(x), config.num_heads, -1)
    convolved, last = convolve(p["conv"], x)
    c = silu(convolved)
    read = {"input_gate": c, "forget_gate": c, "cell_input": x, "output_gate": x}
    inputs = np.stack([np.einsum("thd,hde->the", y, p[name]["kernel"])
                       for name, y in read.items()], axis=1)
    h, state = recur("slstm", p["cell"], inputs)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + config.norm_eps)
    return (h * (1 + p["norm"]["scale"])).reshape(len(x), -1), (last, state)


def recur(cell, p, inputs):
    """h [T, H, D] of inputs [T, G, H, D], and the last state [S, H, D], step by step."""
    state = np.zeros(({"lstm": 2, "slstm": 4}.get(cell, 1), *inputs.shape[2:]))
    found = []
    for x in inputs:
        g = np.einsum("hd,ghde->ghe", state[0], p["recurrent"])
        if cell == "gru":
            r, z = sigmoid(x[:2] + g[:2] + p["bias"][:2])
            n = np.tanh(x[2] + p["bias"][2] + r * (g[2] + p["bias"][3]))
            state = (z * state[0] + (1 - z) * n)[None]
        elif cell == "elman":
            state = np.tanh(x + g + p["bias"])
        else:
            i, f, z, o = x + g + p["bias"]
            if cell == "lstm":
                c = sigmoid(f) * state[1] + sigmoid(i) * np.tanh(z)
                state = np.stack([sigmoid(o) * np.tanh(c), c])
            else:
                kept = np.log(sigmoid(f)) + state[3]
                m = np.maximum(i, kept) if found else i
                kept, new = np.exp(kept - m) if found else 0.0, np.exp(i - m)
                c, n = kept * state[1] + new * np.tanh(z), kept * state[2] + new
                state = np.stack([sigmoid(o) * c / n, c, n, m])
        found.append(state[0])
    return np.array(found), state


of = functools.cache(lambda name: Machine(CONFIGS[name], definition))


@pytest.mark.parametrize("name", CONFIGS)
def test_parallel_and_incremental_forms_equal_the_definition(name):
    recurrent.check_forms(of(name))


LAYERS = pytest.mark.parametrize("name", ["slstm", "lstm"])


@LAYERS
def test_segments_start_anew(name):
    recurrent.check_segments(of(name))


@LAYERS
def test_a_tree_equals_its_chains_and_a_commit_their_replay(name):
    recurrent.check_tree(of(name))


@LAYERS
def test_what_is_not_there_leaves_the_state_alone(name):
    recurrent.check_absence(of(name))


@LAYERS
def test_a_stack_is_committed_as_its_layers_are(name):
    recurrent.check_stack(of(name))


@LAYERS
def test_decoding_on_a_mesh(name):
    cell = recurrent.check_mesh(of(name)).cell
    cell = cell.cell if name == "slstm" else cell
    assert {(s.data.shape[0], s.data.shape[2]) for s in cell.addressable_shards} == {(1, 1)}


@pytest.mark.parametrize(("name", "sizes"), [
    ("slstm", (3 * WIDTH * 2, 4 * WIDTH * 4)), ("lstm", (0, 2 * 10 * 4)), ("gru", (0, 7 * 4))])
def test_the_state_is_of_one_size_at_any_length(name, sizes):
    recurrent.check_state(CONFIGS[name], sizes)


@LAYERS
def test_bfloat16_stays_close_to_float32(name):
    recurrent.check_bfloat16(of(name))


def test_initial_values():
    """An sLSTM mixes no memory at first, and its forget gates spread from open to shut, with the
    depth of the layer more of them open; an LSTM's are open."""
    def build(config, width, **options):
        return config.build(width, gain=0.1, key=jax.random.key(0), dtype=jnp.float32, **options)

    steps = np.arange(6) / 5
    for depth in (0.0, 0.5, 1.0):
        mixer = build(SLstm(2), 12, depth=depth)
        assert not mixer.cell.recurrent[...].any() and not mixer.norm.scale[...].any()
        bias = np.zeros((4, 2, 6))
        bias[1] = -(-5 + 12 * steps**(0.3 + 1.3 * depth))
        assert_close(mixer.cell.bias[...], bias)
    for name in ("input_gate", "forget_gate", "cell_input", "output_gate"):
        kernel = getattr(build(SLstm(4), 400), name).kernel[...]
        assert float(kernel.std()) == pytest.approx((2 / (5 * 400))**0.5, rel=0.05)
    mixer = build(Rnn("lstm", 4, 100), 400)
    assert float(mixer.cell.recurrent[...].std()) == pytest.approx(0.1, rel=0.05)
    assert float(mixer.out.kernel[...].std()) == pytest.approx(0.1 * 400**-0.5, rel=0.05)
    assert_close(mixer.cell.bias[...], np.eye(4)[1][:, None, None] * np.ones((4, 100)))
    assert not build(Rnn("gru", 2, 3), 12).cell.bias[...].any()


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Rnn("rnn", 2, 4), "rnn.cell is 'rnn'; it must be one of lstm, gru, elman"),
    (lambda: Rnn("gru", 0, 4), "rnn.num_heads is 0; it must be >= 1"),
    (lambda: SLstm(2, taps=0), "slstm.taps is 0; it must be >= 1"),
    (lambda: SLstm(2, norm_eps=0.0), "slstm.norm_eps is 0.0; it must be positive"),
    (lambda: SLstm(5).build(12, gain=1.0, key=jax.random.key(0), dtype=jnp.float32),
     "slstm.num_heads is 5; it must divide the width, 12"),
])
def test_a_config_is_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("name", "who"), [("slstm", "an sLSTM"), ("gru", "a recurrent cell")])
def test_refuses_a_context(name, who):
    recurrent.check_context(of(name), who)
