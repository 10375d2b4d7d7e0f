"""What a sequence mixer is: the five methods, its state, and a tree of rows to be decoded.

A mixer is the part of a block that lets positions see each other: attention, a recurrence. Every
one of them offers a parallel form for training and an incremental one for decoding:

    __call__(x[B,T,D], segment_ids, positions, context=None) -> y[B,T,D]
    init_state(batch, max_len, path=1, context=None) -> State
    absorb(x[B,T,D], valid[B,T], state) -> (y, update)    # prefill: then state.apply(update)
    step(x[B,N,D], tree, state) -> (y, scratch)          # state is read, never written
    commit(state, scratch, path[B,P], count[B]) -> state  # uses no parameters

Decoding verifies a tree of N candidate rows at once; plain decoding is the tree of one row. The
root is the last token emitted, which is not in the state yet. `step` leaves what a row would add
in `scratch`, and only the rows on the accepted path are committed, so rejecting costs nothing.
A request that is finished commits 0 rows, which leaves its state as it was. `absorb` takes in a
chunk of prompt in the same way: it reads the state, and `State.apply` writes once, after all
layers have read. (A cache that is written between two layers' reads gets copied by XLA.) So
`commit` and `apply` are given the states of a whole stack, whose leaves have a leading layer axis,
or of one layer, whose leaves have none.
"""

import dataclasses
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp


class State:
    """State of one mixer; leaves of a stack's state have a leading layer axis.

    A state that is read and replaced whole (a recurrent one) keeps these defaults. A KV cache
    overrides them, to be read block by block and written in one place.
    """

    def at(self, layer: int | jax.Array) -> Self:
        """The state of one layer of a stack, to be read."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, False), self)

    def apply(self, update: Any) -> Self:
        """The state after the update that `absorb` returned."""
        return update


class Rows(Protocol):
    """A tree of N rows per request, in an order where parents stand before their children.

    parent int32 [B, N] (the root's is itself), depth int32 [B, N] (root 0), valid bool [B, N],
    ancestors bool [B, N, N] (``ancestors[b, i, j]``: row j is row i or one of its ancestors).
    """

    parent: jax.Array
    depth: jax.Array
    valid: jax.Array
    ancestors: jax.Array


class Mixer(Protocol):
    """See the module's docstring."""

    def __call__(self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array,
                 context: jax.Array | None = None) -> jax.Array: ...

    def init_state(self, batch: int, max_len: int, path: int = 1,
                   context: jax.Array | None = None) -> State: ...

    def absorb(self, x: jax.Array, valid: jax.Array, state: Any) -> tuple[jax.Array, Any]: ...

    def step(self, x: jax.Array, tree: Rows, state: Any) -> tuple[jax.Array, Any]: ...

    def commit(self, state: Any, scratch: Any, path: jax.Array, count: jax.Array) -> Any: ...


def prefill(mixer: Mixer, x: jax.Array, valid: jax.Array, state: State
            ) -> tuple[jax.Array, State]:
    """One mixer's `absorb` and `apply`: (y [B, T, D], the state after the chunk)."""
    y, update = mixer.absorb(x, valid, state)
    return y, state.apply(update)


class MixerConfig(Protocol):
    """A frozen dataclass that builds a mixer and counts its work."""

    def build(self, width: int, *, gain: float, depth: float | jax.Array = 0.0, key: jax.Array,
              dtype) -> Mixer:
        """The module; `gain` scales the initial output projection, `depth` says where its layer
        stands: 0 for the first, 1 for the last."""
        ...

    def flops_per_token(self, width: int, length: int) -> float:
        """Forward FLOPs of one token in a causal sequence of `length`, averaged over it."""
        ...


def state(cls: type) -> type:
    """Makes a State subclass a frozen dataclass and a pytree of all its fields."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    return jax.tree_util.register_dataclass(
        cls,
        data_fields=[f.name for f in dataclasses.fields(cls) if not f.metadata.get("static")],
        meta_fields=[f.name for f in dataclasses.fields(cls) if f.metadata.get("static")],
    )


def valid_count(valid: jax.Array) -> jax.Array:
    """bool [B, T] -> int32 [B]: how many positions are real."""
    return jnp.sum(valid, axis=1, dtype=jnp.int32)


def rows_at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, N, ...] at index int [B, P] -> [B, P, ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def refuse_context(context: jax.Array | None, mixer: str) -> None:
    """Raises ValueError where a recurrent `mixer`, "an mLSTM", is given an encoder's output."""
    if context is not None:
        raise ValueError(f"{mixer} reads no context; give the decoder's cross-attention another "
                         "mixer, such as attention")


def check_at_least_1(owner: str, config: Any, *names: str) -> None:
    """Raises ValueError for a field of a mixer's config that is less; `owner` is its name there."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{owner}.{name} is {getattr(config, name)}; it must be >= 1")
