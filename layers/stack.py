"""A stack of blocks: a repeating pattern, scanned over stacked weights or unrolled over a list.

The two forms in memory suit different compilers. Stacked weights `blocks[groups, ...]` are
scanned: compile time does not grow with depth (TPU, GPU). A list of layers is unrolled: XLA's
CPU back end copies every slice of a stacked weight, so separate arrays run faster there. Both
have the same initial values, and on disk there is one layout, the stacked one: `to_stacked` and
`to_list` convert any tree that holds parameters, an optimiser's included.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.dropout import fold
from layers.mixer import Rows
from pallas_kernels.dispatch import RESIDUAL
from sharding.ambient import PRODUCT

# What the backward pass keeps of each block; the rest is computed again.
REMAT: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT, RESIDUAL),
}


class Stack(nnx.Module):
    """`num_layers` blocks whose kinds repeat with the period of `kinds`, perhaps cut short.

    Parameters stand at `blocks/<position in the pattern>/...`, with a leading axis of groups, and
    those of an unfinished last repetition at `tail/<position>/...`. In the list form the former
    are `layers/<group>/<position>/...`.
    """

    def __init__(self, kinds: Sequence[Callable[[jax.Array, int | jax.Array], nnx.Module]],
                 num_layers: int, *, stacked: bool, remat: str = "none", key: jax.Array):
        """Args:
          kinds: makes a block from a key and the number of its layer, one per position in the
            repeating pattern.
          num_layers: blocks in all.
          stacked: the form in memory, see above.
          remat: a name in REMAT.
          key: layer i is made from ``fold_in(key, i)``, in either form.
        """
        if remat not in REMAT:
            raise ValueError(f"remat is {remat!r}; it must be one of {sorted(REMAT)}")
        self.num_layers, self.period = num_layers, len(kinds)
        self.groups = num_layers // self.period
        self.stacked, self.remat = stacked, remat

        def group(first, count=self.period):
            return nnx.List([kinds[i](jax.random.fold_in(key, first + i), first + i)
                             for i in range(count)])

        self.tail = group(self.groups * self.period, num_layers % self.period)
        if not stacked:
            self.layers = nnx.List([group(g * self.period) for g in range(self.groups)])
        if not stacked or not self.groups:
            return
        graph = []

        def make(first):
            definition, values = nnx.split(group(first))
            graph.append(definition)
            return values

        values = jax.vmap(make)(self.period * jnp.arange(self.groups))
        self.blocks = nnx.merge(graph[-1], values)

    def _checkpointed(self, function: Callable, *, scanned: bool) -> Callable:
        policy = REMAT[self.remat]
        if policy is None:
            return function
        # Only a scan hides the repeated computation from common-subexpression elimination.
        return jax.checkpoint(function, policy=policy, prevent_cse=not scanned)

    def _list(self) -> list[tuple[int, int, nnx.Module]]:
        """(index of the layer, its position in the pattern, block) of what is not scanned."""
        groups = [] if self.stacked else list(self.layers)
        done = [(g * self.period + i, i, block)
                for g, group in enumerate(groups) for i, block in enumerate(group)]
        first = self.groups * self.period
        return done + [(first + i, i, block) for i, block in enumerate(self.tail)]

    def __call__(self, x, segment_ids, positions, key=None, context=None
                 ) -> tuple[jax.Array, dict[str, Any]]:
        """Training form: [B, T, D] -> ([B, T, D], auxiliary losses and statistics).

        `key` turns dropout on. The second result is that of the blocks, added up: its pairs (sum,
        weight) then stand for means over all layers.
        """
        total: dict[str, Any] = {}

        def run(block, x, index):
            return block(x, segment_ids, positions, fold(key, index), context)

        if self.stacked and self.groups:
            definition, values = nnx.split(self.blocks)

            @functools.partial(self._checkpointed, scanned=True)
            def body(x, item):
                group, values = item
                found: dict[str, Any] = {}
                for i, block in enumerate(nnx.merge(definition, values)):
                    x, aux = run(block, x, group * self.period + i)
                    found = _add(found, aux)
                return x, found

            x, found = jax.lax.scan(body, x, (jnp.arange(self.groups), values))
            total = jax.tree.map(lambda x: jnp.sum(x, axis=0), found)
        for index, _, block in self._list():
            definition, values = nnx.split(block)

            @functools.partial(self._checkpointed, scanned=False)
            def one(values, x, definition=definition, index=index):
                return run(nnx.merge(definition, values), x, index)

            x, aux = one(values, x)
            total = _add(total, aux)
        return x, total

    def trace(self, x, segment_ids, positions) -> list[jax.Array]:
        """The training form's stream [B, T, D] after each block, without dropout."""
        found = []
        for block in self._all():
            x, _ = block(x, segment_ids, positions)
            found.append(x)
        return found

    def _all(self) -> Iterator[nnx.Module]:
        """All blocks in order, in either form."""
        if self.stacked and self.groups:
            definition, values = nnx.split(self.blocks)
            for group in range(self.groups):
                yield from nnx.merge(
                    definition, jax.tree.map(lambda x, group=group: x[group], values))
        for _, _, block in self._list():
            yield block

    def _pattern(self) -> list[nnx.Module]:
        """A block of each position in the pattern, for calls that use no parameters."""
        return list(self.blocks if self.stacked else self.layers[0]) if self.groups else []

    def init_state(self, batch: int, max_len: int, path: int = 1, context=None) -> dict[str, Any]:
        """States of all layers: {"blocks": [per position, leading axis groups], "tail": [...]}."""

        def one(block):
            return block.init_state(batch, max_len, path, context)

        if context is None:
            blocks = [
                jax.tree.map(lambda x: jnp.broadcast_to(x[None], (self.groups, *x.shape)),
                             one(block)) for block in self._pattern()
            ]
        elif self.stacked and self.groups:
            definition, values = nnx.split(self.blocks)
            blocks = jax.lax.map(
                lambda values: [one(b) for b in nnx.merge(definition, values)], values)
        else:
            groups = [[one(b) for b in group] for group in self.layers] if self.groups else []
            blocks = jax.tree.map(lambda *xs: jnp.stack(xs), *groups) if groups else []
        return {"blocks": blocks, "tail": [one(block) for block in self.tail]}

    def prefill(self, x, valid, state) -> tuple[jax.Array, Any]:
        """A chunk [B, T, D] of every request: (y, the state after it)."""
        x, updates = self._incremental(lambda block, x, one: block.absorb(x, valid, one), x, state)
        blocks = [one.apply(update)
                  for one, update in zip(state["blocks"], updates["blocks"], strict=True)]
        tail = [one.apply(update)
                for one, update in zip(state["tail"], updates["tail"], strict=True)]
        return x, {"blocks": blocks, "tail": tail}

    def step(self, x, tree: Rows, state) -> tuple[jax.Array, Any]:
        """A tree of rows [B, N, D] of every request: (y, scratch for `commit`)."""
        return self._incremental(lambda block, x, one: block.step(x, tree, one), x, state)

    def _incremental(self, run: Callable, x, state) -> tuple[jax.Array, Any]:
        """``run(block, x, state of the block) -> (x, added)`` through all layers.

        The state is closed over and only read; what the layers add comes out stacked like it.
        """
        blocks, added = state["blocks"], {"blocks": [], "tail": []}
        if self.stacked and self.groups:
            definition, values = nnx.split(self.blocks)

            def body(x, item):
                group, values = item
                outs = []
                for i, block in enumerate(nnx.merge(definition, values)):
                    x, one = run(block, x, blocks[i].at(group))
                    outs.append(one)
                return x, outs

            x, added["blocks"] = jax.lax.scan(body, x, (jnp.arange(self.groups), values))
        listed: list[list] = [[] for _ in blocks]
        for index, i, block in self._list():
            group = index // self.period
            if group < self.groups:
                x, one = run(block, x, blocks[i].at(group))
                listed[i].append(one)
            else:
                x, one = run(block, x, state["tail"][i])
                added["tail"].append(one)
        if not self.stacked:
            added["blocks"] = [
                jax.tree.map(lambda *xs: jnp.stack(xs), *items) for items in listed
            ]
        return x, added

    def commit(self, state, scratch, path, count) -> Any:
        """Keeps the first `count` rows [B] of `path` int32 [B, P] in every layer."""
        blocks = [
            block.commit(one, added, path, count)
            for block, one, added in zip(
                self._pattern(), state["blocks"], scratch["blocks"], strict=True)
        ]
        tail = [block.commit(one, added, path, count)
                for block, one, added in zip(self.tail, state["tail"], scratch["tail"],
                                             strict=True)]
        return {"blocks": blocks, "tail": tail}


def _add(one: Any, other: Any) -> Any:
    """The sum of two nested dicts; what only one of them has stays as it is."""
    if not isinstance(one, dict):
        return jax.tree.map(jnp.add, one, other)
    shared = {name: _add(one[name], other[name]) for name in one if name in other}
    return {**one, **other, **shared}


def _numbered(node: dict) -> list:
    return [node[name] for name in sorted(node, key=int)]


def _is_list_form(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("layers"), dict) and all(
        name.isdigit() for name in node["layers"])


def _is_stacked_form(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("blocks"), dict) and all(
        name.isdigit() for name in node["blocks"])


def _walk(tree: Any, matches: Callable, convert: Callable) -> Any:
    """Applies `convert` to every dict in `tree` that `matches`, through any pytree nodes."""
    def visit(node):
        if matches(node):
            return convert(node)
        if isinstance(node, dict):
            return {name: visit(child) for name, child in node.items()}
        children, structure = jax.tree.flatten(node, is_leaf=lambda n: n is not node)
        if jax.tree_util.all_leaves([node]):
            return node
        return jax.tree.unflatten(structure, [visit(child) for child in children])

    return visit(tree)


def to_stacked(tree: Any) -> Any:
    """A tree that holds parameters in the list form, with them in the stacked form instead.

    Leaves are numpy or jax arrays, or ShapeDtypeStructs. A tree already stacked is unchanged.
    """
    def stack(*leaves):
        first = leaves[0]
        if isinstance(first, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((len(leaves), *first.shape), first.dtype)
        return np.stack(leaves) if isinstance(first, np.ndarray) else jnp.stack(leaves)

    def convert(node):
        rest = {name: child for name, child in node.items() if name != "layers"}
        groups = _numbered(node["layers"])
        return {**rest, "blocks": jax.tree.map(stack, *groups)} if groups else rest

    return _walk(tree, _is_list_form, convert)


def to_list(tree: Any) -> Any:
    """The inverse of `to_stacked`. Each leaf of the result is an array of its own."""
    def item(leaf, group):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        return leaf[group]

    def convert(node):
        rest = {name: child for name, child in node.items() if name != "blocks"}
        leaves, structure = jax.tree.flatten(node["blocks"])
        count = leaves[0].shape[0] if leaves else 0
        groups = {str(g): jax.tree.unflatten(structure, [item(leaf, g) for leaf in leaves])
                  for g in range(count)}
        return {**rest, "layers": groups}

    return _walk(tree, _is_stacked_form, convert)
