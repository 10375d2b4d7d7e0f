"""The attention mixer: its incremental forms against the parallel one, for every option."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers.attention
import sharding
from layers.attention import Attention
from layers.mixer import prefill
from layers.norm import Norm
from layers.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling
from sharding import Rules
from tests.tiny import MESH
from tests.tolerances import assert_close
from zoo import protocol
from zoo.decode import tree as trees

WIDTH = 12
ROPE = Rope(100.0)
OPTIONS = {
    "multi-head": Attention(4, 4, 4, rope=ROPE),
    "grouped": Attention(4, 2, 4, rope=ROPE),
    "multi-query": Attention(4, 1, 4, rope=ROPE),
    "no rope": Attention(4, 2, 3),
    "window": Attention(4, 2, 4, rope=ROPE, window=3),
    "window of one": Attention(2, 2, 4, rope=ROPE, window=1),
    "qk-norm": Attention(4, 2, 4, rope=ROPE, qk_norm=Norm("rms", 1e-3)),
    "softcap, scale": Attention(4, 2, 4, rope=ROPE, softcap=0.7, scale=1.3),
    "biases": Attention(4, 2, 4, rope=ROPE, qkv_bias=True, out_bias=True),
    "wider values": Attention(4, 2, 4, v_head_dim=6, rope=ROPE),
    "narrower values": Attention(4, 2, 4, v_head_dim=3, rope=ROPE),
    "linear": Attention(2, 1, 8, rope=Rope(100.0, LinearScaling(4.0))),
    "llama3": Attention(2, 1, 8, rope=Rope(100.0, Llama3Scaling(4.0, 1.0, 4.0, 16))),
    "yarn": Attention(2, 1, 8, rope=Rope(100.0, YarnScaling(4.0, 8.0, 1.0, 16))),
    "all": Attention(
        4, 2, 4, v_head_dim=3, rope=Rope(100.0, YarnScaling(4.0, 8.0, 1.0, 16)), window=4,
        qk_norm=Norm("rms", 1e-3, offset=1.0), softcap=0.7, scale=1.3, qkv_bias=True,
        out_bias=True),
}
EVERY = pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)


def make(config, width=WIDTH):
    """A mixer with every parameter drawn at random, biases and scales too."""
    mixer = config.build(width, gain=1.0, key=jax.random.key(0), dtype=jnp.float32)
    definition, params = protocol.split(mixer)
    rng = np.random.default_rng(0)
    return protocol.merge(definition, jax.tree.map(
        lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), params))


def sequence(batch, length, width=WIDTH):
    x = np.random.default_rng(1).normal(size=(batch, length, width))
    return jnp.asarray(x, jnp.float32)


def whole(mixer, x, context=None):
    """The parallel form over one document."""
    b, t = x.shape[:2]
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))
    return jax.jit(lambda x: mixer(x, jnp.ones((b, t), jnp.int32), positions, context))(x)


def incremental(mixer, x, chunks, path=1, context=None, seed=0):
    """y of chunked prefill with holes, then of single steps."""
    b, length = x.shape[:2]
    rng = np.random.default_rng(seed)
    state = mixer.init_state(b, length, path, context)
    absorb = jax.jit(lambda x, valid, state: prefill(mixer, x, valid, state))
    step = jax.jit(lambda x, state: mixer.step(x, trees.single(b), state))
    commit = jax.jit(mixer.commit)
    y, done = np.zeros((b, length, x.shape[2]), np.float32), np.zeros(b, int)
    for chunk in chunks:
        # Where the real tokens stand in a chunk is arbitrary: left, right or between.
        valid = rng.random((b, chunk)) < 0.7
        valid &= np.cumsum(valid, axis=1) <= (length - done)[:, None]
        piece = 100 * np.ones((b, chunk, x.shape[2]), np.float32)
        for row in range(b):
            count = valid[row].sum()
            piece[row, valid[row]] = x[row, done[row] : done[row] + count]
        out, state = absorb(piece, valid, state)
        assert np.isfinite(out).all()
        for row in range(b):
            count = valid[row].sum()
            y[row, done[row] : done[row] + count] = out[row, valid[row]]
            done[row] += count
    while (done < length).any():
        live = (done < length).astype(np.int32)
        rows = x[np.arange(b), np.minimum(done, length - 1)][:, None]
        out, scratch = step(rows, state)
        state = commit(state, scratch, jnp.zeros((b, 1), jnp.int32), live)
        for row in np.flatnonzero(live):
            y[row, done[row]] = out[row, 0]
        done += live
    return y


@EVERY
def test_parallel_equals_prefill_and_steps(monkeypatch, config):
    monkeypatch.setattr(layers.attention, "CACHE_BLOCK", 4)
    mixer, x = make(config), sequence(3, 17)
    assert_close(incremental(mixer, x, (5, 1, 4)), whole(mixer, x))


def test_chunks_longer_than_the_ring(monkeypatch):
    """Of a chunk of 11, a ring of 4 slots keeps the last tokens."""
    monkeypatch.setattr(layers.attention, "CACHE_BLOCK", 1)
    mixer, x = make(dataclasses.replace(OPTIONS["grouped"], window=3)), sequence(2, 29)
    assert mixer.init_state(2, 29).slots == 4
    assert_close(incremental(mixer, x, (11, 2, 7)), whole(mixer, x))


@pytest.mark.parametrize("window", [2, 3, 7])
def test_ring_wraps_under_drafted_paths(monkeypatch, window):
    """Chains of P = 3 rows with 0 to 3 accepted, over a ring of exactly window + P slots."""
    monkeypatch.setattr(layers.attention, "CACHE_BLOCK", 1)
    path, b, length = 3, 3, 40
    mixer, x = make(dataclasses.replace(OPTIONS["grouped"], window=window)), sequence(b, length)
    expected = whole(mixer, x)
    state = mixer.init_state(b, length, path)
    assert state.slots == window + path
    assert length > 3 * state.slots
    step = jax.jit(lambda x, state: mixer.step(x, trees.chain(b, path), state))
    commit = jax.jit(mixer.commit)
    rng, done = np.random.default_rng(0), np.zeros(b, int)
    while (done < length).any():
        accepted = np.minimum(rng.integers(0, path + 1, b), length - done)
        rows = 50 * np.ones((b, path, WIDTH), np.float32)  # wrong drafts leave no trace
        for row in range(b):
            rows[row, : accepted[row]] = x[row, done[row] : done[row] + accepted[row]]
        y, scratch = step(rows, state)
        for row in range(b):
            here = slice(done[row], done[row] + accepted[row])
            assert_close(y[row, : accepted[row]], expected[row, here])
        columns = jnp.broadcast_to(jnp.arange(path), (b, path))
        state = commit(state, scratch, columns, accepted.astype(np.int32))
        done += accepted


def test_state_of_a_resting_request_is_untouched():
    mixer, x = make(OPTIONS["window"]), sequence(2, 6)
    state = prefill(mixer, x, jnp.ones((2, 6), bool), mixer.init_state(2, 8))[1]
    _, scratch = mixer.step(x[:, :1], trees.single(2), state)
    after = mixer.commit(state, scratch, jnp.zeros((2, 1), jnp.int32), jnp.array([0, 1]))
    for before, now in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert_close(now[0], before[0], tol=0)
        assert (now[1] != before[1]).any()


@pytest.mark.parametrize("name", ["multi-head", "grouped", "qk-norm", "all"])
def test_cross_attention(name):
    """Keys and values of an encoder's output, without rotation or mask; they are the state."""
    config = dataclasses.replace(OPTIONS[name], window=None)
    mixer, x, context = make(config), sequence(3, 9), sequence(3, 6)[:, ::-1]
    parallel = whole(mixer, x, context)
    assert_close(incremental(mixer, x, (4, 2), context=context), parallel)
    # Every position sees all of the context, so the order of the context changes nothing ...
    assert_close(whole(mixer, x, context[:, ::-1]), parallel)
    # ... and no position sees another one.
    assert_close(whole(mixer, x[:, ::-1], context)[:, ::-1], parallel)
    assert (whole(mixer, x, context + 1) != parallel).any()


def test_one_query_sees_what_it_should():
    """Which inputs an output depends on: the window, the segment, nothing later."""
    mixer, x = make(OPTIONS["window"]), sequence(1, 8)
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2]])
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 3, 4]])
    jacobian = jax.jacobian(lambda x: mixer(x, segments, positions).sum(-1))(x)[0, :, 0]
    depends = np.asarray(jnp.any(jacobian != 0, axis=-1))
    t, s = np.indices((8, 8))
    assert (depends == ((s <= t) & (s > t - 3) & (segments[0][t] == segments[0][s]))).all()


RULES = {
    "data": Rules(),
    "tensor": Rules(batch=None, heads="tensor", kv_heads="tensor", embed="fsdp"),
    "keys whole": Rules(heads="tensor"),
    "heads over more": Rules(batch="data", heads=("fsdp", "tensor"), kv_heads="fsdp"),
    "heads whole": Rules(kv_heads="tensor"),
    "heads and keys over different axes": Rules(batch="data", heads="fsdp", kv_heads="tensor"),
}


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("groups", [2, 4])
def test_eight_devices_equal_one(groups, name, explicit):
    if groups == 4 and name == "heads over more":
        pytest.skip("the same as with 2 groups")
    mixer = make(dataclasses.replace(OPTIONS["all"], num_kv_heads=groups))
    definition, params = protocol.split(mixer)
    x = sequence(4, 6)
    segments, positions = jnp.ones((4, 6), jnp.int32), jnp.tile(jnp.arange(6), (4, 1))

    def loss(params, x):
        y = protocol.merge(definition, params)(x, segments, positions)
        return jnp.sum(y**2), y

    step = functools.partial(jax.value_and_grad, has_aux=True)
    expected = jax.jit(step(loss))(params, x)
    mesh, rules = sharding.mesh(MESH, explicit=explicit), RULES[name]
    with sharding.use(mesh, rules):
        layout = protocol.shardings(mesh, rules, protocol.axes(mixer), params)
        assert_close(jax.jit(step(loss))(jax.device_put(params, layout), x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "attention.num_heads is 0; it must be >= 1"),
        ({"num_kv_heads": 3}, "num_heads is 4, which does not divide by .*num_kv_heads = 3"),
        ({"head_dim": 5}, "attention.head_dim is 5; rope rotates pairs, so make it even"),
        ({"window": 0}, "attention.window is 0; it must be >= 1, or none"),
        ({"v_head_dim": 0}, "attention.v_head_dim is 0"),
        ({"softcap": 0.0}, "attention.softcap is 0.0; it must be positive, or none"),
        ({"qk_norm": 1e-6}, "attention.qk_norm is 1e-06; it must be a Norm of kind 'rms', or none"),
        ({"qk_norm": Norm("layer")}, "attention.qk_norm is Norm.*'layer'.*of kind 'rms'"),
        ({"scale": float("nan")}, "attention.scale is nan"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(OPTIONS["grouped"], **options)
