"""Token trees against plain Python walks along the parents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.decode import tree as trees

SIZES = (1, 2, 3, 5, 8, 13)
TREE = jax.jit(trees.tree)
DISTINCT = jax.jit(trees.distinct)
ACCEPT = jax.jit(trees.accept, static_argnums=3)


def path_of(parent, i):
    """Rows from the root to i."""
    return [i] if i == 0 else [*path_of(parent, parent[i]), i]


def draw(rng, batch, rows):
    """Random parents (chains, stars and all between), validity, and tokens with duplicates."""
    parent = np.zeros((batch, rows), np.int32)
    for b in range(batch):
        reach = rng.choice([1, 2, rows])
        for i in range(1, rows):
            parent[b, i] = rng.integers(max(0, i - reach), i)
    valid = rng.random((batch, rows)) < rng.choice([0.6, 0.9, 1.0], size=(batch, 1))
    symbols = rng.choice([1, 2, 4])
    tokens = rng.integers(0, symbols, (batch, rows)).astype(np.int32)
    predicted = rng.integers(0, symbols, (batch, rows)).astype(np.int32)
    return parent, valid, tokens, predicted


def expected_tree(parent, valid):
    """depth, valid and ancestors of one tree."""
    rows = len(parent)
    depth, alive, ancestors = np.zeros(rows, int), np.zeros(rows, bool), np.eye(rows, dtype=bool)
    for i in range(rows):
        path = path_of(parent, i)
        alive[i] = all(valid[j] for j in path[1:])
        if alive[i]:
            depth[i] = len(path) - 1
            ancestors[i, path] = True
    return depth, alive, ancestors


def expected_path(parent, alive, tokens, predicted, width):
    """The deepest right path, by walking down from the root."""
    best, frontier = [0], [[0]]
    while frontier and len(frontier[0]) < width:
        frontier = [
            [*path, i]
            for path in frontier
            for i in range(1, len(parent))
            if parent[i] == path[-1] and alive[i] and tokens[i] == predicted[path[-1]]
        ]
        if frontier:
            best = min(frontier, key=lambda path: path[-1])
    return best


def compare(tree, b, depth, alive, ancestors):
    np.testing.assert_array_equal(tree.depth[b], depth)
    np.testing.assert_array_equal(tree.valid[b], alive)
    np.testing.assert_array_equal(tree.ancestors[b], ancestors)


@pytest.mark.parametrize("rows", SIZES)
def test_tree_and_accept_match_a_walk(rows):
    rng = np.random.default_rng(rows)
    batch = 64
    parent, valid, tokens, predicted = draw(rng, batch, rows)
    tree = jax.device_get(TREE(parent, valid))
    for width in {1, (rows + 1) // 2, rows}:
        best, path, count = jax.device_get(ACCEPT(tokens, predicted, tree, width))
        assert path.shape == (batch, width)
        for b in range(batch):
            depth, alive, ancestors = expected_tree(parent[b], valid[b])
            compare(tree, b, depth, alive, ancestors)
            want = expected_path(parent[b], alive, tokens[b], predicted[b], width)
            assert count[b] == len(want)
            assert best[b] == want[-1]
            assert path[b].tolist() == want + [0] * (width - len(want))


@pytest.mark.parametrize("rows", SIZES)
def test_distinct_drops_later_siblings_and_their_descendants(rows):
    rng = np.random.default_rng(100 + rows)
    parent, valid, tokens, predicted = draw(rng, 64, rows)
    tree = jax.device_get(DISTINCT(tokens, TREE(parent, valid)))
    best, path, count = jax.device_get(ACCEPT(tokens, predicted, tree, rows))
    dropped = 0
    for b in range(64):
        alive = expected_tree(parent[b], valid[b])[1]
        taken, keep = set(), alive.copy()
        for i in range(1, rows):
            name = (parent[b, i], tokens[b, i])
            keep[i] &= name not in taken
            if alive[i]:
                taken.add(name)
        dropped += int((alive & ~keep).sum())
        depth, left, ancestors = expected_tree(parent[b], keep)
        compare(tree, b, depth, left, ancestors)
        want = expected_path(parent[b], left, tokens[b], predicted[b], rows)
        assert path[b, : count[b]].tolist() == want
        assert best[b] == want[-1]
    assert (dropped > 0) == (rows > 2)


def test_child_equal_to_the_root_is_not_its_sibling():
    tree = trees.distinct(jnp.array([[7, 7]]), trees.chain(1, 2))
    assert tree.valid.tolist() == [[True, True]]


@pytest.mark.parametrize("length", [1, 2, 9])
def test_chain_is_the_tree_of_its_parents(length):
    rows = np.maximum(np.arange(length) - 1, 0)
    built = trees.tree(np.tile(rows, (3, 1)).astype(np.int32), np.ones((3, length), bool))
    for ours, theirs in zip(
        jax.tree.leaves(trees.chain(3, length)), jax.tree.leaves(built), strict=True
    ):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_single_is_one_row_and_is_always_accepted():
    tree = trees.single(2)
    assert tree.ancestors.tolist() == [[[True]]] * 2
    best, path, count = trees.accept(jnp.array([[3], [4]]), jnp.array([[5], [6]]), tree, 1)
    assert (best.tolist(), path.tolist(), count.tolist()) == ([0, 0], [[0], [0]], [1, 1])


def test_wide_path_buffer_and_narrow_one():
    tokens, predicted = jnp.array([[9, 1, 2, 3]]), jnp.array([[1, 2, 3, 4]])
    tree = trees.chain(1, 4)
    for width, want in ((6, [0, 1, 2, 3, 0, 0]), (2, [0, 1])):
        best, path, count = trees.accept(tokens, predicted, tree, width)
        assert path[0].tolist() == want
        assert count[0] == min(4, width) and best[0] == count[0] - 1


def test_accept_heeds_validity_that_was_narrowed_by_hand():
    tree = dataclasses.replace(trees.chain(1, 4), valid=jnp.array([[True, True, False, True]]))
    best, _, count = trees.accept(jnp.array([[9, 1, 2, 3]]), jnp.array([[1, 2, 3, 4]]), tree, 4)
    assert (best.tolist(), count.tolist()) == ([1], [2])


def test_rows_out_of_order_are_invalid():
    parent = np.array([[3, 0, 2, -1, 1]], np.int32)
    tree = trees.tree(parent, np.zeros((1, 5), bool) | (np.arange(5) > 0))
    assert tree.valid.tolist() == [[True, True, False, False, True]]
    assert tree.depth.tolist() == [[0, 1, 0, 0, 2]]


def test_shape_of_the_tree_is_data():
    traces = 0

    def run(parent, valid, tokens, predicted):
        nonlocal traces
        traces += 1
        return trees.accept(tokens, predicted, trees.tree(parent, valid), 8)

    run = jax.jit(run)
    rng = np.random.default_rng(0)
    for _ in range(5):
        run(*draw(rng, 4, 8))
    assert traces == 1


def test_errors_name_the_value_and_the_remedy():
    with pytest.raises(ValueError, match=r"parent has shape \(3,\).*give every request"):
        trees.tree(np.zeros(3, np.int32), np.ones(3, bool))
    with pytest.raises(ValueError, match=r"valid \(1, 3\)"):
        trees.tree(np.zeros((1, 2), np.int32), np.ones((1, 3), bool))
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        trees.chain(1, 0)
    with pytest.raises(ValueError, match="width=0 must be at least 1"):
        trees.accept(jnp.zeros((1, 1), int), jnp.zeros((1, 1), int), trees.single(1), 0)
