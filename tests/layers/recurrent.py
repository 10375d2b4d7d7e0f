"""What every recurrent mixer is tested by: its incremental forms against its definition in float64
and against its parallel form, on one device and on several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from layers.mixer import prefill
from tests.tiny import MESH
from tests.tolerances import assert_close
from zoo import protocol
from zoo.decode import tree as trees

WIDTH, BATCH, LENGTH = 12, 3, 14


class Machine:
    """A mixer with every parameter drawn at random, and its methods, jitted.

    `definition` takes the config, the parameters in float64 and x [T, D] to y [T, D] and the leaves
    of the last state, of one request.
    """

    def __init__(self, config, definition):
        self.config, self.definition = config, definition
        self.graph, params = protocol.split(
            config.build(WIDTH, gain=1.0, key=jax.random.key(0), dtype=jnp.float32))
        rng = np.random.default_rng(0)
        self.params = jax.tree_util.tree_map_with_path(
            lambda path, x: ((path[-1].key == "scale") + 0.4 * rng.normal(size=x.shape)).astype(
                np.float32), params)
        self.mixer = protocol.merge(self.graph, self.params)
        self.whole = jax.jit(lambda x, segments: self.mixer(x, segments, None))
        self.absorb = jax.jit(functools.partial(prefill, self.mixer))
        self.step = jax.jit(self.mixer.step)
        self.commit = jax.jit(self.mixer.commit)

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
    """x [B, length, D]."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(BATCH, length, WIDTH)), jnp.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def convolve(p, x):
    """A causal convolution's result for x [T, H, D] and its last inputs."""
    before = len(p["kernel"]) - 1
    x = np.concatenate([np.zeros((before, *x.shape[1:])), x])
    windows = np.lib.stride_tricks.sliding_window_view(x, before + 1, axis=0)
    return np.einsum("thdw,whd->thd", windows, p["kernel"]) + p["bias"], x[len(x) - before:]


def check_forms(machine):
    """The parallel and the incremental forms equal the definition."""
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
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), machine.params)
    for b in range(BATCH):
        y, after = machine.definition(machine.config, params, np.asarray(x[b], np.float64))
        assert_close(whole[b], y)
        assert_close(found[b], y)
        assert_close([leaf[b] for leaf in jax.tree.leaves(state)], list(after))


def check_segments(machine):
    """A document starts anew, in training."""
    x = draw(4)
    segments = np.array([[1] * 5 + [2] * 6 + [0] * 3] * BATCH, np.int32)
    packed = machine.whole(x, segments)
    alone = machine.whole(jnp.roll(x, -5, axis=1), None)
    assert_close(packed[:, 5:11], alone[:, :6])


def check_tree(machine):
    """A tree equals its chains, and a commit their replay."""
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


def check_absence(machine):
    """What is not there leaves the state alone."""
    state = machine.start()
    _, absorbed = machine.absorb(draw(7), jnp.zeros((BATCH, LENGTH), bool), state)
    assert_close(absorbed, state, tol=0)
    _, scratch = machine.step(draw(8, 4), trees.chain(BATCH, 4), state)
    path = jnp.ones((BATCH, 3), jnp.int32)
    assert_close(machine.commit(state, scratch, path, jnp.zeros(BATCH, jnp.int32)), state, tol=0)


def check_stack(machine):
    """A stack is committed as its layers are."""
    states = [machine.start(seed) for seed in (2, 9)]
    added = [machine.step(draw(seed, 4), trees.chain(BATCH, 4), state)[1]
             for seed, state in zip((10, 11), states, strict=True)]
    path, count = jnp.tile(jnp.arange(3, dtype=jnp.int32), (BATCH, 1)), jnp.array([1, 3, 0])
    expected = [machine.commit(*one, path, count) for one in zip(states, added, strict=True)]

    def stack(*leaves):
        return jnp.stack(leaves)

    found = machine.commit(jax.tree.map(stack, *states), jax.tree.map(stack, *added), path, count)
    assert_close(found, jax.tree.map(stack, *expected))


def check_mesh(machine):
    """Heads and requests spread over eight devices, against one; returns the state there."""
    tree, path = trees.chain(4, 3), jnp.tile(jnp.arange(3, dtype=jnp.int32), (4, 1))
    chunk, rows = (jnp.asarray(np.random.default_rng(n).normal(size=(4, n, WIDTH)), jnp.float32)
                   for n in (6, 3))
    valid, count = jnp.arange(6) < jnp.array([[6], [0], [3], [1]]), jnp.array([0, 1, 3, 2])

    def decode(params):
        mixer = protocol.merge(machine.graph, params)
        y, state = prefill(mixer, chunk, valid, mixer.init_state(4, 16))
        more, scratch = mixer.step(rows, tree, state)
        return y, more, mixer.commit(state, scratch, path, count)

    mesh, rules = sharding.mesh(MESH), sharding.rules("fsdp_tp")
    params = jax.device_put(
        machine.params,
        protocol.shardings(mesh, rules, protocol.axes(machine.mixer), machine.params))
    with sharding.use(mesh, rules):
        spread = jax.jit(decode)(params)
    assert_close(spread, jax.jit(decode)(machine.params))
    return spread[2]


def check_state(config, sizes):
    """The state is of one size at any length, `sizes` bytes a request for bfloat16 and float32."""
    mixer = config.build(WIDTH, gain=1.0, key=jax.random.key(0), dtype=jnp.bfloat16)
    for max_len in (16, 1 << 20):
        state = jax.eval_shape(lambda n=max_len: mixer.init_state(5, n, path=9))
        found = {jnp.bfloat16.dtype: 0, np.dtype(np.float32): 0}
        for x in jax.tree.leaves(state):
            found[x.dtype] += x.size * x.dtype.itemsize
        assert tuple(found.values()) == tuple(5 * n for n in sizes)


def check_bfloat16(machine):
    """Gates, state and norm are float32 whatever the rest is."""
    mixer = protocol.merge(machine.graph, protocol.cast(machine.params, jnp.bfloat16))
    x = draw(1).astype(jnp.bfloat16)
    y, _ = jax.jit(functools.partial(prefill, mixer))(
        x, jnp.ones(x.shape[:2], bool), mixer.init_state(BATCH, 8))
    assert y.dtype == jnp.bfloat16
    assert_close(y, machine.whole(draw(1), None), tol=5e-2)


def check_context(machine, name):
    """It refuses an encoder's output."""
    x = draw(0)
    for call in (lambda: machine.mixer(x, None, None, x),
                 lambda: machine.mixer.init_state(1, 8, context=x)):
        with pytest.raises(ValueError, match=f"{name} reads no context; give"):
            call()
