"""Token trees of speculative decoding: their shape as data, and the accepted path through one.

Row 0 is the root, the last emitted token, which is not in the model's state yet. Plain decoding
is the tree of one row (`single`), a drafted continuation is a `chain`, and every other shape
comes from its parents through `tree`. All arrays have static shapes; the shape of the tree is
data, so one executable serves all trees of N rows.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tree:
    """B trees of N rows in topological order.

    Attributes:
      parent: int32[B, N], parent[b, i] < i; the root points at itself.
      depth: int32[B, N], number of edges to the root; 0 for an invalid row.
      valid: bool[B, N], False for unused rows and all that hangs below one; True for the root.
      ancestors: bool[B, N, N], [b, i, j] where j is i or an ancestor of i. An invalid row has
        itself alone, so that a softmax over this mask is finite in every row.
    """

    parent: jax.Array
    depth: jax.Array
    valid: jax.Array
    ancestors: jax.Array


def tree(parent: jax.Array, valid: jax.Array) -> Tree:
    """Depths and ancestors from parents, by pointer doubling: ceil(log2 N) gathers.

    Args:
      parent: int32[B, N] with 0 <= parent[b, i] < i. Row 0 is the root whatever it holds.
      valid: bool[B, N]. The root counts as valid. A row whose parent breaks the order, or any
        of whose ancestors is invalid, becomes invalid.

    Raises:
      ValueError: the shapes differ, or are not [B, N] with N >= 1.
    """
    if parent.ndim != 2 or parent.shape != valid.shape or parent.shape[1] < 1:
        raise ValueError(
            f"tree: parent has shape {parent.shape} and valid {valid.shape}; both must be the "
            "same [B, N] with N >= 1; give every request one row per node, root first"
        )
    rows = jnp.arange(parent.shape[1], dtype=jnp.int32)
    ordered = (parent >= 0) & (parent < rows)
    valid = jnp.where(rows == 0, True, valid & ordered)
    parent = jnp.where(ordered, parent, 0).astype(jnp.int32)
    ancestors = jnp.broadcast_to(jnp.eye(len(rows), dtype=bool), (*parent.shape, len(rows)))
    hop = parent
    for _ in range((len(rows) - 1).bit_length()):
        ancestors |= jnp.take_along_axis(ancestors, hop[:, :, None], axis=1)
        hop = jnp.take_along_axis(hop, hop, axis=1)
    return _closed(parent, valid, ancestors)


def chain(batch: int, length: int) -> Tree:
    """`batch` trees of `length` >= 1 rows, each row the child of the one before; constants."""
    if length < 1:
        raise ValueError(f"chain: length={length} must be at least 1; the root is a row")
    rows = np.arange(length, dtype=np.int32)

    def constant(row: np.ndarray) -> jax.Array:
        return jnp.asarray(np.broadcast_to(row, (batch, *row.shape)))

    return Tree(
        parent=constant(np.maximum(rows - 1, 0)),
        depth=constant(rows),
        valid=constant(np.ones(length, bool)),
        ancestors=constant(np.tri(length, dtype=bool)),
    )


def single(batch: int) -> Tree:
    """The tree of plain decoding: the root alone, [batch, 1]; constants."""
    return chain(batch, 1)


def distinct(tokens: jax.Array, tree: Tree) -> Tree:
    """The tree with each later one of two equal siblings, and all below it, made invalid.

    Rules that draw among siblings without replacement need distinct ones; `accept` does not.

    Args:
      tokens: int32[B, N], the token of each row.
      tree: B trees of N rows.
    """
    rows = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    # Row 0 is no sibling of its children, although it points at itself.
    earlier = (rows[None, :] < rows[:, None]) & (rows[None, :] > 0)
    siblings = tree.parent[:, :, None] == tree.parent[:, None, :]
    equal = tokens[:, :, None] == tokens[:, None, :]
    repeated = jnp.any(earlier & siblings & equal & tree.valid[:, None, :], axis=2)
    return _closed(tree.parent, tree.valid & ~repeated, tree.ancestors)


def accept(
    tokens: jax.Array, predicted: jax.Array, tree: Tree, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The deepest path on which every token is the one its parent row predicts.

    Between equally deep paths the lowest row wins. The step emits the path's tokens after the
    root, then predicted[best].

    Args:
      tokens: int32[B, N], the token of each row.
      predicted: int32[B, N], the model's choice (argmax or sample) after each row.
      tree: B trees of N rows.
      width: P, number of columns of the path: the largest depth + 1. Deeper rows are refused.

    Returns:
      best: int32[B], the last accepted row.
      path: int32[B, P], the accepted rows, root first; 0 from column `count` on.
      count: int32[B], number of accepted rows, the root among them: 1 <= count <= P.

    Raises:
      ValueError: width < 1.
    """
    if width < 1:
        raise ValueError(f"accept: width={width} must be at least 1; it counts the root")
    rows = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    foretold = jnp.take_along_axis(predicted, tree.parent, axis=1)
    right = (rows == 0) | ((tokens == foretold) & tree.valid)
    good = jnp.all(~tree.ancestors | right[:, None, :], axis=2) & (tree.depth < width)
    best = jnp.argmax(jnp.where(good, tree.depth, -1), axis=1).astype(jnp.int32)
    on_path = jnp.take_along_axis(tree.ancestors, best[:, None, None], axis=1)
    level = tree.depth[:, None, :] == jnp.arange(width, dtype=jnp.int32)[:, None]
    path = jnp.argmax(on_path & level, axis=2).astype(jnp.int32)
    count = jnp.take_along_axis(tree.depth, best[:, None], axis=1)[:, 0] + 1
    return best, path, count


def _closed(parent: jax.Array, valid: jax.Array, ancestors: jax.Array) -> Tree:
    """The tree after invalidity has spread to descendants; `ancestors` as by parents alone."""
    valid = jnp.all(~ancestors | valid[:, None, :], axis=2)
    itself = jnp.eye(parent.shape[1], dtype=bool)
    ancestors = jnp.where(valid[:, :, None], ancestors, itself)
    depth = jnp.sum(ancestors, axis=2, dtype=jnp.int32) - 1
    return Tree(parent=parent, depth=depth, valid=valid, ancestors=ancestors)
