"""Stop strings: a byte automaton over whole tokens, so that a match may straddle tokens.

The automaton of Aho and Corasick (1975) over bytes serves all stop strings at once; the walk over
each token's bytes from each state is tabulated beforehand, so a decode step costs one gather.
Bytes, not characters: a token may hold half of a character.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# At a vocabulary of 150k tokens the table then takes 0.3 GB.
_MOST_STATES = 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StopTable:
    """State after each token: int16[states, V]; `automaton` builds it.

    State 0 is the start. The last state, `accept`, means that a stop string has occurred, and is
    never left. Without stop strings the table is [1, 1], which no gather outgrows. The number of
    states is a power of two, at least 8, so that different stop strings share an executable.
    """

    next: jax.Array

    @property
    def accept(self) -> int:
        """The accepting state; -1, which no state equals, where there are no stop strings."""
        states = self.next.shape[0]
        return states - 1 if states > 1 else -1


def automaton(stop_strings: Sequence[str | bytes], token_bytes: Sequence[bytes]) -> StopTable:
    """The table for these stop strings and this vocabulary.

    Args:
      stop_strings: text (as UTF-8) or bytes; any of them stops.
      token_bytes: the bytes of each of the V tokens; empty for a token without text, which then
        leaves the state as it is.

    Raises:
      ValueError: a stop string is empty or not text, or they are too long together; an empty
        vocabulary.
    """
    stops = _encode(stop_strings)
    if not stops:
        return StopTable(jnp.zeros((1, 1), jnp.int16))
    if not token_bytes:
        raise ValueError("token_bytes is empty; it must list the bytes of every token id in order")
    return StopTable(jnp.asarray(_tabulate(_machine(stops), token_bytes)))


def advance(table: StopTable, state: jax.Array, token: jax.Array) -> jax.Array:
    """The state int32[B] after one more token int32[B] of each request; start from 0."""
    return table.next.at[state, token].get(mode="clip").astype(jnp.int32)


def cut(text: bytes, stop_strings: Sequence[str | bytes]) -> int:
    """Where to cut `text`: the index at which the stop string that ends first begins.

    Of several that end together the longest counts. The index does not depend on how the text
    was split into tokens. Without a match it is len(text).
    """
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in _encode(stop_strings)]
    return min(((end, start) for end, start in found if start >= 0), default=(0, len(text)))[1]


def _encode(stop_strings: Sequence[str | bytes]) -> list[bytes]:
    """The stop strings as bytes after their checks."""
    if isinstance(stop_strings, (str, bytes)):
        raise ValueError(f"stop_strings={stop_strings!r}: must be a list; pass [{stop_strings!r}]")
    stops = []
    for i, stop in enumerate(stop_strings):
        if not isinstance(stop, (str, bytes)):
            raise ValueError(
                f"stop_strings[{i}]={stop!r}: must be str or bytes; pass token ids as stop_tokens"
            )
        if not stop:
            raise ValueError(
                f"stop_strings[{i}]={stop!r}: must not be empty, as it would match at once; "
                "leave it out"
            )
        stops.append(stop.encode() if isinstance(stop, str) else stop)
    return stops


def _machine(stops: list[bytes]) -> np.ndarray:
    """The byte automaton: next state [states, 256], the last one accepting and absorbing."""
    # A stop string that contains another one adds no match that the other has not made before.
    # Without these, only whole strings accept, and nothing in the trie hangs below an end.
    stops = [s for s in set(stops) if not any(t in s for t in stops if t != s)]
    children: list[dict[int, int]] = [{}]
    end = -1
    for stop in sorted(stops):
        node = 0
        for byte in stop[:-1]:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
            node = children[node][byte]
        children[node][stop[-1]] = end
    states = 1 << max(3, len(children).bit_length())
    if states > _MOST_STATES:
        raise ValueError(
            f"stop_strings need {len(children)} states; they must need fewer than {_MOST_STATES}, "
            "about one a byte; shorten them or pass fewer"
        )
    machine = np.zeros((states, 256), np.intp)
    machine[end] = states - 1
    # Breadth first: a node's longest proper suffix in the trie is shallower, so its row is done.
    queue = [(0, 0)]
    for node, suffix in queue:
        machine[node] = machine[suffix]
        for byte, child in children[node].items():
            if child != end:
                queue.append((child, machine[suffix, byte] if node else 0))
            machine[node, byte] = child % states
    return machine


def _tabulate(machine: np.ndarray, token_bytes: Sequence[bytes]) -> np.ndarray:
    """State after all bytes of each token: int16[states, V]."""
    states = len(machine)
    length = np.fromiter(map(len, token_bytes), np.intp, len(token_bytes))
    order = np.argsort(-length, kind="stable")
    first = np.concatenate([[0], np.cumsum(length)[:-1]])[order]
    text = np.frombuffer(b"".join(token_bytes), np.uint8)
    step = np.ascontiguousarray(machine.T)
    walked = np.tile(np.arange(states, dtype=np.int16), (len(token_bytes), 1))
    # Longest tokens first, so that those with an i-th byte are always the first rows.
    for i in range(length.max()):
        some = int(np.count_nonzero(length > i))
        byte = text[first[:some] + i]
        walked[:some] = step[byte[:, None], walked[:some]]
    table = np.empty((states, len(token_bytes)), np.int16)
    table[:, order] = walked.T
    return table
