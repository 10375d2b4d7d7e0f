"""A step over a tree of rows against its chains, and committed paths against plain decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers.attention
from tests import tiny
from tests.tolerances import assert_close
from zoo import protocol
from zoo.decode import tree as trees

VOCAB, BATCH, ROWS, PATH = 40, 3, 9, 5
CONFIGS = {
    "grouped": tiny.config("qwen3-8b"),
    "window": tiny.config("mistral-7b"),
    "narrow window, softcap": tiny.config(
        "mistral-7b", **{"attention.window": 2, "attention.softcap": 2.0}),
    "learned positions": tiny.config("gpt2"),
    "mlstm": tiny.config("xlstm-7b"),
    "mlstm and slstm": tiny.config("xlstm-mixed-tiny"),
    "lstm": tiny.config("lstm-tiny"),
}


class Machine:
    """A model's decoding methods, jitted, and a full forward to compare them with."""

    def __init__(self, config, stacked):
        self.model = tiny.model(config, stacked)
        definition, self.params = protocol.split(self.model)

        def call(method):
            run = jax.jit(lambda params, *x: method(protocol.merge(definition, params), *x))
            return functools.partial(run, self.params)

        self.prefill = call(lambda model, *x: model.prefill(*x)[1])
        self.step = call(lambda model, tokens, tree, state: model.step(tokens, tree, state))
        self.plain = call(lambda model, tokens, state: model.step(
            tokens, trees.single(tokens.shape[0]), state))
        self.commit = call(lambda model, *x: model.commit(*x))
        self.forward = call(lambda model, tokens: model({"tokens": tokens}).logits)

    def start(self, prompts, path=PATH):
        """The state after prompts of different lengths."""
        longest = max(map(len, prompts))
        tokens = np.zeros((len(prompts), longest), np.int32)
        valid = np.arange(longest) < np.array([[len(p)] for p in prompts])
        tokens[valid] = np.concatenate(prompts)
        return self.prefill(tokens, valid, self.model.init_state(len(prompts), 64, path))

    def last_logits(self, sequences, length):
        """What a full forward predicts after each sequence; they are padded to `length`."""
        tokens = np.zeros((len(sequences), length), np.int32)
        for row, sequence in zip(tokens, sequences, strict=True):
            row[: len(sequence)] = sequence
        logits = np.asarray(self.forward(tokens))
        return np.stack([logits[i, len(s) - 1] for i, s in enumerate(sequences)])


def forms():
    """Every config in the list form; stacked, the one whose ring wraps, and slowly the others."""
    for stacked in (False, True):
        for name in CONFIGS:
            marks = pytest.mark.slow if stacked and name != "window" else ()
            form = "stacked" if stacked else "list"
            yield pytest.param((name, stacked), id=f"{name}-{form}", marks=marks)


@pytest.fixture(scope="module", params=list(forms()))
def machine(request):
    """A ring of the fewest slots, so that it wraps soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers.attention, "CACHE_BLOCK", 4)
        yield Machine(CONFIGS[request.param[0]], request.param[1])


def draw_tree(rng, rows=ROWS, depth=PATH - 1):
    """Random tokens, parents, validity; no row deeper than `depth`."""
    parent, level = np.zeros((BATCH, rows), np.int32), np.zeros((BATCH, rows), int)
    for b in range(BATCH):
        for i in range(1, rows):
            parent[b, i] = rng.choice([j for j in range(i) if level[b, j] < depth])
            level[b, i] = level[b, parent[b, i]] + 1
    valid = rng.random((BATCH, rows)) < 0.85
    tokens = rng.integers(0, VOCAB, (BATCH, rows), np.int32)
    return tokens, trees.tree(jnp.asarray(parent), jnp.asarray(valid))


def path_to(tree, b, i):
    """The rows from the root to row i, which is valid."""
    rows = [i]
    while rows[0]:
        rows.insert(0, int(tree.parent[b, rows[0]]))
    return rows


def draw_prompts(rng):
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in (1, 7, 12)]


def test_tree_equals_its_chains(machine):
    """T1: each row predicts what a forward over the prompt and its own ancestors predicts."""
    rng = np.random.default_rng(0)
    prompts = draw_prompts(rng)
    state = machine.start(prompts)
    for _ in range(2):
        tokens, tree = draw_tree(rng)
        step = machine.step(tokens, tree, state)
        assert np.isfinite(step.logits).all()  # invalid rows too
        rows = [(b, i) for b in range(BATCH) for i in range(ROWS) if tree.valid[b, i]]
        sequences = [
            np.concatenate([prompts[b], tokens[b, path_to(tree, b, i)]]) for b, i in rows]
        expected = np.zeros((BATCH * ROWS, VOCAB), np.float32)
        expected[: len(rows)] = machine.last_logits(
            sequences + [[0]] * (BATCH * ROWS - len(rows)), 12 + PATH)[: len(rows)]
        actual = np.stack([step.logits[b, i] for b, i in rows])
        assert_close(actual, expected[: len(rows)])


def test_commit_equals_replay(machine):
    """T2: the state after a committed path is that of plain decoding of the same tokens; with a
    count of 0 it is what it was."""
    rng = np.random.default_rng(1)
    state = machine.start(draw_prompts(rng))
    replayed = state
    for _ in range(4):
        tokens, tree = draw_tree(rng)
        path, count = np.zeros((BATCH, PATH), np.int32), np.zeros(BATCH, np.int32)
        for b in range(BATCH):
            rows = path_to(tree, b, rng.choice(np.flatnonzero(tree.valid[b])))
            count[b] = rng.integers(0, len(rows) + 1)
            path[b, : len(rows)] = rows
        step = machine.step(tokens, tree, state)
        state = machine.commit(state, step.scratch, path, count)
        for column in range(count.max()):
            here = np.take_along_axis(tokens, path[:, column : column + 1], axis=1)
            one = machine.plain(here, replayed)
            replayed = machine.commit(
                replayed, one.scratch, np.zeros((BATCH, 1), np.int32),
                (column < count).astype(np.int32))
        assert_close(state, replayed)
    resting = machine.commit(state, step.scratch, path, np.zeros(BATCH, np.int32))
    assert_close(resting, state, tol=0)


def test_rejected_rows_leave_no_trace(machine):
    """T3: after random trees and random accepted paths, more tokens come out as if nothing had
    ever been drafted."""
    rng = np.random.default_rng(2)
    sequences = [list(p) for p in draw_prompts(rng)]
    state = machine.start(sequences)
    for _ in range(5):
        tokens, tree = draw_tree(rng)
        path, count = np.zeros((BATCH, PATH), np.int32), np.zeros(BATCH, np.int32)
        for b in range(BATCH):
            rows = path_to(tree, b, rng.choice(np.flatnonzero(tree.valid[b])))
            path[b, : len(rows)], count[b] = rows, len(rows)
            sequences[b] += tokens[b, rows].tolist()
        step = machine.step(tokens, tree, state)
        state = machine.commit(state, step.scratch, path, count)
    assert state.length.tolist() == [len(s) for s in sequences]
    ones = np.ones(BATCH, np.int32)
    found = []
    for _ in range(20):
        token = rng.integers(0, VOCAB, (BATCH, 1), np.int32)
        for sequence, (t,) in zip(sequences, token.tolist(), strict=True):
            sequence.append(t)
        step = machine.plain(token, state)
        state = machine.commit(state, step.scratch, np.zeros((BATCH, 1), np.int32), ones)
        found.append(step.logits[:, 0])
    padded = np.zeros((BATCH, 64), np.int32)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    expected = np.asarray(machine.forward(padded))
    for b, sequence in enumerate(sequences):
        actual = np.stack([logits[b] for logits in found])
        assert_close(actual, expected[b, len(sequence) - 20 : len(sequence)])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama-tiny", "xlstm-mixed-tiny", "lstm-tiny"])
def test_a_state_of_another_batch_is_refused(name, batch):
    model = tiny.model(tiny.config(name), stacked=False)
    state = model.init_state(batch, 8)
    tokens = np.zeros((2, 4), np.int32)
    message = f"and a state of {batch} requests; it must be \\[{batch}, N\\]"
    with pytest.raises(ValueError, match=message):
        model.prefill(tokens, tokens == 0, state)
    with pytest.raises(ValueError, match=message):
        model.step(tokens[:, :1], trees.single(2), state)
