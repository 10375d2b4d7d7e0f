"""Drafters: what proposes the tree of rows that one decoding step verifies."""

import dataclasses
from typing import Any, Protocol

import jax

from zoo.decode.tree import Tree, single
from zoo.protocol import Step


class Drafter(Protocol):
    """Proposes `rows` candidate rows a step, none deeper than `depth`.

    A drafter is a hashable constant of the executable; what it learns or remembers is its state,
    and what it was trained to is `params`. It can be as wrong as it likes: only rows that the
    model itself would have emitted are accepted.
    """

    rows: int
    depth: int

    def init(self, params: Any, batch: int, capacity: int) -> Any:
        """The state before the first step, for sequences of up to `capacity` tokens."""
        ...

    def propose(
        self, params: Any, state: Any, history: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, Tree, Any]:
        """The next tree.

        Args:
          history: int32 [B, S], the tokens so far, `length` int32 [B] of them in each row. The
            last of these is the root.

        Returns:
          tokens int32 [B, N] whose first column is the root, their tree, and the new state.
        """
        ...

    def observe(
        self, params: Any, state: Any, tokens: jax.Array, tree: Tree, step: Step,
        path: jax.Array, count: jax.Array, emitted: jax.Array,
    ) -> Any:
        """The state after a step: `emitted` int32 [B, P] followed the rows of `path` int32
        [B, P]; the first `count` int32 [B] columns hold (0 for a request at rest)."""
        ...


@dataclasses.dataclass(frozen=True)
class Plain:
    """Plain decoding: the root alone."""

    rows: int = dataclasses.field(default=1, init=False)
    depth: int = dataclasses.field(default=0, init=False)

    def init(self, params, batch, capacity):
        """No state."""
        return ()

    def propose(self, params, state, history, length):
        """The last token of each request."""
        return last_token(history, length)[:, None], single(history.shape[0]), state

    def observe(self, params, state, tokens, tree, step, path, count, emitted):
        """Nothing to learn."""
        return state


def last_token(history: jax.Array, length: jax.Array) -> jax.Array:
    """int32 [B]: the root of the next tree."""
    return jax.numpy.take_along_axis(history, length[:, None] - 1, axis=1)[:, 0]
