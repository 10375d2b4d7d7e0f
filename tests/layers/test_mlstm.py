"""The mLSTM mixers: their incremental forms against the recurrence and the parallel one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.mlstm import EPS, MLstm, PreUpMLstm
from tests.layers import recurrent
from tests.layers.recurrent import BATCH, LENGTH, WIDTH, Machine, convolve, draw, sigmoid, silu
from tests.tolerances import assert_close

CONFIGS = {
    "exponential": MLstm(2, 4, 6),
    "sigmoid": MLstm(2, 4, 6, sigmoid_gate=True),
    "capped, wide keys": MLstm(3, 5, 2, gate_softcap=1.5, norm_eps=1e-2),
    "pre-up": PreUpMLstm(2, 8, norm_eps=1e-2),
    "pre-up, other blocks": PreUpMLstm(2, 6, taps=2, block=3),
}


def definition(config, p, x):
    if isinstance(config, PreUpMLstm):
        return pre_up(config, p, x)

    def cap(a):
        return config.gate_softcap * np.tanh(a / config.gate_softcap)

    q, k, v, o = (np.einsum("td,dhk->thk", x, p[name]["kernel"])
                  for name in ("query", "key", "value", "output_gate"))
    i, f = (cap(x @ p[name]["kernel"] + p[name]["bias"]) for name in ("input_gate", "forget_gate"))
    h, state = recur(q, k, v, i, f, config.sigmoid_gate)
    y = sigmoid(o) * normalize(h, config.norm_eps) * p["norm"]["scale"]
    return np.einsum("thv,hvd->td", y, p["out"]["kernel"]), state


def pre_up(config, p, x):
    u, z = (np.einsum("td,dhk->thk", x, p[name]["kernel"]) for name in ("up", "gate"))
    convolved, last = convolve(p["conv"], u)
    c = silu(convolved)

    def blocks(name, y):
        y = y.reshape(*y.shape[:2], -1, config.block)
        return np.einsum("thci,hcio->thco", y, p[name]["kernel"]).reshape(u.shape)

    three = blocks("query", c), blocks("key", c), blocks("value", u)
    i, f = (np.einsum("sthk,shkg->tg", np.stack(three), p[name]["kernel"]) + p[name]["bias"]
            for name in ("input_gate", "forget_gate"))
    h, state = recur(*three, i, f, False)
    y = normalize(h, config.norm_eps) * (1 + p["norm"]["scale"]) + p["skip"] * c
    return np.einsum("thk,hkd->td", y * silu(z), p["out"]["kernel"]), (last, *state)


def recur(q, k, v, i, f, sigmoid_gate):
    """h [T, H, V] and the last (C, n, m), step by step."""
    i = np.log(sigmoid(i)) if sigmoid_gate else i
    cell, n, m = np.zeros((*k.shape[1:], v.shape[-1])), np.zeros(k.shape[1:]), np.zeros(k.shape[1])
    found = []
    for t in range(len(q)):
        kept = np.log(sigmoid(f[t])) + m
        m = 0 * m if sigmoid_gate else np.maximum(kept, i[t])
        kept, new = np.exp(kept - m)[:, None], np.exp(i[t] - m)[:, None]
        cell = kept[..., None] * cell + new[..., None] * k[t, :, :, None] * v[t, :, None]
        n = kept * n + new * k[t]
        query = q[t] / k.shape[-1]**0.5
        below = np.maximum(np.abs(np.sum(n * query, -1)), np.exp(-m)) + EPS
        found.append(np.einsum("hkv,hk->hv", cell, query) / below[:, None])
    return np.array(found), (cell, n, m)


def normalize(h, eps):
    return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + eps)


of = functools.cache(lambda name: Machine(CONFIGS[name], definition))


@pytest.fixture(params=list(CONFIGS)[:4])
def machine(request):
    return of(request.param)


@pytest.mark.parametrize("name", CONFIGS)
def test_parallel_and_incremental_forms_equal_the_definition(name):
    recurrent.check_forms(of(name))


def test_segments_start_anew(machine):
    recurrent.check_segments(machine)


def test_a_tree_equals_its_chains_and_a_commit_their_replay(machine):
    recurrent.check_tree(machine)


def test_what_is_not_there_leaves_the_state_alone(machine):
    recurrent.check_absence(machine)


LAYERS = pytest.mark.parametrize("name", ["exponential", "pre-up"])


@LAYERS
def test_a_stack_is_committed_as_its_layers_are(name):
    recurrent.check_stack(of(name))


@LAYERS
def test_decoding_on_a_mesh(name):
    state = recurrent.check_mesh(of(name))
    cell = (state.memory if name == "pre-up" else state).cell
    assert {s.data.shape[:2] for s in cell.addressable_shards} == {(1, 1)}


@pytest.mark.parametrize(("name", "sizes"), [
    ("exponential", (0, 2 * (4 * 6 + 4 + 1) * 4)),
    ("pre-up", (3 * 2 * 8 * 2, 2 * (8 * 8 + 8 + 1) * 4))])
def test_the_state_is_of_one_size_at_any_length(name, sizes):
    recurrent.check_state(CONFIGS[name], sizes)


def test_initial_gates_are_nearly_shut_and_open():
    mixer = MLstm(3, 4, 6).build(WIDTH, gain=1.0, key=jax.random.key(0), dtype=jnp.float32)
    x, ones = draw(0), np.ones((BATCH, LENGTH, 3))
    assert_close(mixer.input_gate(x), ones * 15 * np.tanh(-10 / 15))
    assert_close(mixer.forget_gate(x), ones * 15 * np.tanh(np.array([3, 4.5, 6]) / 15))


def test_initial_values_of_a_pre_up_layer():
    """Small where the stream is read, 2 / (blocks sqrt(width)) where it is written."""
    mixer = PreUpMLstm(4, 200).build(400, gain=2 / 12, key=jax.random.key(0), dtype=jnp.float32)
    small = (2 / (5 * 400))**0.5
    for name, deviation in (("up", small), ("gate", small), ("query", small), ("key", small),
                            ("value", small), ("out", 2 / (12 * 400**0.5))):
        kernel = getattr(mixer, name).kernel[...]
        assert float(kernel.std()) == pytest.approx(deviation, rel=0.06), name
    assert not mixer.input_gate.kernel[...].any() and not mixer.forget_gate.kernel[...].any()
    assert_close(mixer.forget_gate.bias[...], np.linspace(3, 6, 4))
    assert 0 < abs(mixer.input_gate.bias[...]).max() < 0.5
    assert not mixer.norm.scale[...].any() and (mixer.skip[...] == 1).all()


@LAYERS
def test_bfloat16_stays_close_to_float32(name):
    recurrent.check_bfloat16(of(name))


@pytest.mark.parametrize(("options", "message"), [
    ({"num_heads": 0}, "mlstm.num_heads is 0; it must be >= 1"),
    ({"key_dim": -1}, "mlstm.key_dim is -1; it must be >= 1"),
    ({"gate_softcap": 0.0}, "mlstm.gate_softcap is 0.0; it must be positive, e.g. 15"),
    ({"norm_eps": -1e-6}, "mlstm.norm_eps is -1e-06; it must be positive, e.g. 1e-06"),
])
def test_a_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        MLstm(**{"num_heads": 2, "key_dim": 4, "value_dim": 6, **options})


@pytest.mark.parametrize(("options", "message"), [
    ({"taps": 0}, "mlstm.taps is 0; it must be >= 1"),
    ({"head_dim": 6}, "mlstm.head_dim is 6; it must be a multiple of mlstm.block, 4"),
    ({"norm_eps": 0.0}, "mlstm.norm_eps is 0.0; it must be positive, e.g. 1e-5"),
])
def test_a_pre_up_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        PreUpMLstm(**{"num_heads": 2, "head_dim": 8, **options})


@LAYERS
def test_refuses_a_context(name):
    recurrent.check_context(of(name), "an mLSTM")
