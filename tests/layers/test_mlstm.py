"""The mLSTM mixer: its incremental forms against the recurrence and against the parallel one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from layers.mixer import prefill
from layers.mlstm import EPS, MLstm
from tests.tiny import MESH
from tests.tolerances import assert_close
from zoo import protocol
from zoo.decode import tree as trees

WIDTH, BATCH, LENGTH = 12, 3, 14
CONFIGS = {
    "exponential": MLstm(2, 4, 6),
    "sigmoid": MLstm(2, 4, 6, sigmoid_gate=True),
    "capped, wide keys": MLstm(3, 5, 2, gate_softcap=1.5, norm_eps=1e-2),
}


class Machine:
    """A mixer with every parameter drawn at random, and its methods, jitted."""

    def __init__(self, config):
        self.config = config
        definition, params = protocol.split(
            config.build(WIDTH, gain=1.0, key=jax.random.key(0), dtype=jnp.float32))
        rng = np.random.default_rng(0)
        self.params = jax.tree_util.tree_map_with_path(
            lambda path, x: ((path[-1].key == "scale") + 0.4 * rng.normal(size=x.shape)).astype(
                np.float32), params)
        self.mixer = protocol.merge(definition, self.params)
        self.whole = jax.jit(lambda x, segments: self.mixer(x, segments, None))
        self.absorb = jax.jit(functools.partial(prefill, self.mixer))
        self.step = jax.jit(self.mixer.step)
        self.commit = jax.jit(self.mixer.commit)

    def by_definition(self, x):
        """y [T, D] of x [T, D] and the last (C, n, m), step by step in float64."""
        c = self.config
        p = jax.tree.map(lambda a: np.asarray(a, np.float64), self.params)
        x = np.asarray(x, np.float64)

        def cap(a):
            return c.gate_softcap * np.tanh(a / c.gate_softcap)

        def sigmoid(a):
            return 1 / (1 + np.exp(-a))

        q, k, v, o = (np.einsum("td,dhk->thk", x, p[name]["kernel"])
                      for name in ("query", "key", "value", "output_gate"))
        i, f = (cap(x @ p[name]["kernel"] + p[name]["bias"])
                for name in ("input_gate", "forget_gate"))
        i = np.log(sigmoid(i)) if c.sigmoid_gate else i
        cell = np.zeros((c.num_heads, c.key_dim, c.value_dim))
        n, m = np.zeros(cell.shape[:2]), np.zeros(c.num_heads)
        found = []
        for t in range(len(x)):
            kept = np.log(sigmoid(f[t])) + m
            m = 0 * m if c.sigmoid_gate else np.maximum(kept, i[t])
            kept, new = np.exp(kept - m)[:, None], np.exp(i[t] - m)[:, None]
            cell = kept[..., None] * cell + new[..., None] * k[t, :, :, None] * v[t, :, None]
            n = kept * n + new * k[t]
            query = q[t] / c.key_dim**0.5
            below = np.maximum(np.abs(np.sum(n * query, -1)), np.exp(-m)) + EPS
            found.append(np.einsum("hkv,hk->hv", cell, query) / below[:, None])
        h = np.array(found)
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + c.norm_eps)
        y = sigmoid(o) * h * p["norm"]["scale"]
        return np.einsum("thv,hvd->td", y, p["out"]["kernel"]), (cell, n, m)

    def start(self, seed=2):
        """A state with something in it."""
        x = draw(seed, 5)
        return self.absorb(x, jnp.ones(x.shape[:2], bool), self.mixer.init_state(BATCH, 99))[1]

    def plain(self, state, row, moves):
        """One token a request: y [B, D], and the state where `moves` bool [B]."""
        y, scratch = self.step(row[:, None], trees.single(BATCH), state)
        zeros = jnp.zeros((BATCH, 1), jnp.int32)
        return y[:, 0], self.commit(state, scratch, zeros, moves.astype(jnp.int32))


def draw(seed, length=LENGTH):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(BATCH, length, WIDTH)), jnp.float32)


of = functools.cache(lambda name: Machine(CONFIGS[name]))


@pytest.fixture(params=CONFIGS)
def machine(request):
    return of(request.param)


def test_parallel_and_incremental_forms_equal_the_definition(machine):
    x = draw(1)
    whole = machine.whole(x, None)
    # Real tokens stand anywhere in a chunk, other rows between them.
    rng = np.random.default_rng(0)
    state, given, found = machine.mixer.init_state(BATCH, LENGTH), np.zeros(BATCH, int), []
    for _ in range(2):
        valid = np.stack([rng.permutation(7) < 5 for _ in range(BATCH)])
        chunk = np.array(100 * draw(3, 7))
        chunk[valid] = np.asarray(x)[:, given[0]:given[0] + 5].reshape(-1, WIDTH)
        y, state = machine.absorb(chunk, valid, state)
        found.append(np.asarray(y)[valid].reshape(BATCH, 5, WIDTH))
        given += 5
    for t in range(10, LENGTH):
        y, state = machine.plain(state, x[:, t], jnp.ones(BATCH, bool))
        found.append(np.asarray(y)[:, None])
    found = np.concatenate(found, axis=1)
    for b in range(BATCH):
        y, (cell, n, m) = machine.by_definition(x[b])
        assert_close(whole[b], y)
        assert_close(found[b], y)
        one = jax.tree.map(lambda a, b=b: a[b], state)
        assert_close((one.cell, one.normalizer, one.stabilizer), (cell, n, m))


def test_segments_start_anew(machine):
    x = draw(4)
    segments = np.array([[1] * 5 + [2] * 6 + [0] * 3] * BATCH, np.int32)
    packed = machine.whole(x, segments)
    alone = machine.whole(jnp.roll(x, -5, axis=1), None)
    assert_close(packed[:, 5:11], alone[:, :6])


def test_a_tree_equals_its_chains_and_a_commit_their_replay(machine):
    rng = np.random.default_rng(5)
    n = 8
    rows = draw(6, n)
    parent = np.array([[0, *(rng.integers(0, i) for i in range(1, n))] for _ in range(BATCH)])
    valid = rng.random((BATCH, n)) < 0.8
    tree = trees.tree(jnp.asarray(parent, jnp.int32), jnp.asarray(valid))
    state = machine.start()
    y, scratch = machine.step(rows, tree, state)
    assert np.isfinite(y).all()
    for i in range(n):
        seen = np.asarray(tree.ancestors[:, i])
        path, count = np.zeros((BATCH, n), np.int32), np.zeros(BATCH, np.int32)
        replayed, last = state, None
        for b in range(BATCH):
            if tree.valid[b, i]:
                found = np.flatnonzero(seen[b])
                path[b, : len(found)], count[b] = found, len(found)
        for column in range(count.max()):
            token = jnp.take_along_axis(rows, path[:, column, None, None], axis=1)[:, 0]
            now, replayed = machine.plain(replayed, token, column < count)
            last = now if last is None else jnp.where((column < count)[:, None], now, last)
        moved = np.flatnonzero(count)
        assert_close(y[moved, i], last[moved])
        assert_close(machine.commit(state, scratch, path, count), replayed)


def test_what_is_not_there_leaves_the_state_alone(machine):
    state = machine.start()
    _, absorbed = machine.absorb(draw(7), jnp.zeros((BATCH, LENGTH), bool), state)
    assert_close(absorbed, state, tol=0)
    _, scratch = machine.step(draw(8, 4), trees.chain(BATCH, 4), state)
    path = jnp.ones((BATCH, 3), jnp.int32)
    assert_close(machine.commit(state, scratch, path, jnp.zeros(BATCH, jnp.int32)), state, tol=0)


def test_a_stack_is_committed_as_its_layers_are():
    machine = of("exponential")
    states = [machine.start(seed) for seed in (2, 9)]
    added = [machine.step(draw(seed, 4), trees.chain(BATCH, 4), state)[1]
             for seed, state in zip((10, 11), states, strict=True)]
    path, count = jnp.tile(jnp.arange(3, dtype=jnp.int32), (BATCH, 1)), jnp.array([1, 3, 0])
    expected = [machine.commit(*one, path, count) for one in zip(states, added, strict=True)]

    def stack(*leaves):
        return jnp.stack(leaves)

    found = machine.commit(jax.tree.map(stack, *states), jax.tree.map(stack, *added), path, count)
    assert_close(found, jax.tree.map(stack, *expected))


def test_decoding_on_a_mesh():
    """Heads and requests spread over eight devices, against one."""
    machine = of("exponential")
    definition, params = protocol.split(machine.mixer)
    tree, path = trees.chain(4, 3), jnp.tile(jnp.arange(3, dtype=jnp.int32), (4, 1))
    chunk, rows = (jnp.asarray(np.random.default_rng(n).normal(size=(4, n, WIDTH)), jnp.float32)
                   for n in (6, 3))
    valid, count = jnp.arange(6) < jnp.array([[6], [0], [3], [1]]), jnp.array([0, 1, 3, 2])

    def decode(params):
        mixer = protocol.merge(definition, params)
        y, state = prefill(mixer, chunk, valid, mixer.init_state(4, 16))
        more, scratch = mixer.step(rows, tree, state)
        return y, more, mixer.commit(state, scratch, path, count)

    mesh, rules = sharding.mesh(MESH), sharding.rules("fsdp_tp")
    params = jax.device_put(
        params, protocol.shardings(mesh, rules, protocol.axes(machine.mixer), params))
    with sharding.use(mesh, rules):
        spread = jax.jit(decode)(params)
    assert {s.data.shape[:2] for s in spread[2].cell.addressable_shards} == {(1, 1)}
    assert_close(spread, jax.jit(decode)(machine.params))


def test_the_state_is_float32_and_of_one_size_at_any_length():
    mixer = MLstm(2, 4, 6).build(WIDTH, gain=1.0, key=jax.random.key(0), dtype=jnp.bfloat16)
    sizes = []
    for max_len in (16, 1 << 20):
        state = jax.eval_shape(lambda n=max_len: mixer.init_state(5, n, path=9))
        assert {x.dtype for x in jax.tree.leaves(state)} == {np.dtype(np.float32)}
        sizes.append(sum(x.size * 4 for x in jax.tree.leaves(state)))
    assert sizes == [5 * 2 * (4 * 6 + 4 + 1) * 4] * 2


def test_initial_gates_are_nearly_shut_and_open():
    mixer = MLstm(3, 4, 6).build(WIDTH, gain=1.0, key=jax.random.key(0), dtype=jnp.float32)
    x, ones = draw(0), np.ones((BATCH, LENGTH, 3))
    assert_close(mixer.input_gate(x), ones * 15 * np.tanh(-10 / 15))
    assert_close(mixer.forget_gate(x), ones * 15 * np.tanh(np.array([3, 4.5, 6]) / 15))


def test_bfloat16_stays_close_to_float32():
    """Gates, state and norm are float32 whatever the rest is."""
    machine = of("exponential")
    definition, _ = protocol.split(machine.mixer)
    mixer = protocol.merge(definition, protocol.cast(machine.params, jnp.bfloat16))
    x = draw(1).astype(jnp.bfloat16)
    y, state = jax.jit(functools.partial(prefill, mixer))(
        x, jnp.ones(x.shape[:2], bool), mixer.init_state(BATCH, 8))
    assert y.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves(state)} == {np.dtype(np.float32)}
    assert_close(y, machine.whole(draw(1), None), tol=5e-2)


@pytest.mark.parametrize(("options", "message"), [
    ({"num_heads": 0}, "mlstm.num_heads is 0; it must be >= 1"),
    ({"key_dim": -1}, "mlstm.key_dim is -1; it must be >= 1"),
    ({"gate_softcap": 0.0}, "mlstm.gate_softcap is 0.0; it must be positive, e.g. 15"),
    ({"norm_eps": -1e-6}, "mlstm.norm_eps is -1e-06; it must be positive, e.g. 1e-06"),
])
def test_a_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        MLstm(**{"num_heads": 2, "key_dim": 4, "value_dim": 6, **options})


def test_refuses_a_context():
    machine = of("exponential")
    x = draw(0)
    for call in (lambda: machine.mixer(x, None, None, x),
                 lambda: machine.mixer.init_state(1, 8, context=x)):
        with pytest.raises(ValueError, match="an mLSTM reads no context; give"):
            call()
