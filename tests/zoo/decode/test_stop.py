"""The stop automaton against a plain search in the text, over random splits into tokens."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.decode import stop


def walk(table, tokens):
    """States after each token: int32[B, T] -> int[B, T]."""

    def one(state, token):
        state = stop.advance(table, state, token)
        return state, state

    start = jnp.zeros(tokens.shape[0], jnp.int32)
    return np.asarray(jax.jit(lambda t: jax.lax.scan(one, start, t.T)[1].T)(tokens))


def strings(rng, count, longest, alphabet):
    return [
        bytes(rng.choice(list(alphabet), size=rng.integers(1, longest + 1)).tolist())
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(12))
def test_accepts_exactly_when_the_text_contains_a_stop_string(seed):
    rng = np.random.default_rng(seed)
    alphabet, longest = (b"ab", 6) if seed % 2 else ("☃".encode(), 4)
    stops = strings(rng, 1 + seed % 4, longest, alphabet)
    vocab = [b"", *strings(rng, 12, 5, alphabet), b"q"]
    table = stop.automaton(stops, vocab)
    tokens = rng.integers(0, len(vocab), (64, 24)).astype(np.int32)
    hit = walk(table, tokens) == table.accept
    want = np.zeros_like(hit)
    for b, row in enumerate(tokens):
        text = b""
        for t, token in enumerate(row):
            text += vocab[token]
            want[b, t] = any(s in text for s in stops)
    np.testing.assert_array_equal(hit, want)
    assert want.any() and not want.all()


@pytest.mark.parametrize("seed", range(8))
def test_same_text_in_other_tokens_stops_at_the_same_place(seed):
    rng = np.random.default_rng(seed)
    stops = strings(rng, 3, 5, b"abc")
    vocab = sorted({bytes([c]) for c in b"abc"} | set(strings(rng, 20, 4, b"abc")))
    table = stop.automaton(stops, vocab)
    for text in strings(rng, 20, 30, b"abc"):
        first = stop.cut(text, stops)
        ends = [e for e in range(len(text) + 1) if any(text[:e].endswith(s) for s in stops)]
        if ends:
            longest = max(len(s) for s in stops if text[: ends[0]].endswith(s))
            assert first == ends[0] - longest
        else:
            assert first == len(text)
        tokens, place, accepted = [], 0, None
        while place < len(text):
            token = rng.choice([i for i, t in enumerate(vocab) if text.startswith(t, place)])
            place += len(vocab[token])
            tokens.append(token)
        state = jnp.zeros(1, jnp.int32)
        place = 0
        for token in tokens:
            state = stop.advance(table, state, jnp.array([token]))
            place += len(vocab[token])
            if int(state[0]) == table.accept:
                accepted = place
                break
        if ends:
            assert accepted is not None and accepted >= ends[0]
            # What was generated up to the stop gives the same cut as the whole text.
            assert stop.cut(text[:accepted], stops) == first
        else:
            assert accepted is None


def test_match_inside_a_token_across_tokens_and_across_a_character():
    vocab = [b"xENDy", b"E", b"N", b"D", b"", "☃".encode()[:1], "☃".encode()[1:], b"ND"]
    table = stop.automaton(["END", "☃"], vocab)
    cases = {(0,): True, (1, 2, 3): True, (1, 4, 7): True, (5, 6): True, (5, 1): False,
             (1, 1, 7): True, (1, 2, 2): False, (0, 4, 4): True}  # fmt: skip
    for tokens, want in cases.items():
        states = walk(table, np.array([tokens], np.int32))
        assert (states[0, -1] == table.accept) == want, tokens


def test_no_stop_strings_never_accept_and_cost_one_entry():
    table = stop.automaton([], [b"a", b"b"])
    assert table.next.shape == (1, 1)
    states = walk(table, np.array([[1, 0, 150_000]], np.int32))
    assert states.tolist() == [[0, 0, 0]]
    assert table.accept not in states
    assert stop.cut(b"text", []) == 4


def test_tables_of_different_stop_strings_share_an_executable():
    vocab = [bytes([c]) for c in range(256)]
    traces = 0

    def run(table, state, token):
        nonlocal traces
        traces += 1
        return stop.advance(table, state, token) == table.accept

    run = jax.jit(run)
    state, token = jnp.zeros(1, jnp.int32), jnp.array([ord("a")])
    got = [bool(run(stop.automaton(s, vocab), state, token)[0]) for s in (["a"], ["b", "aa"])]
    assert got == [True, False]
    assert traces == 1


def test_a_real_vocabulary_is_tabulated_in_no_time():
    rng = np.random.default_rng(0)
    size = np.clip(rng.normal(6.5, 3, 150_000).astype(int), 1, 128)
    text = rng.integers(97, 123, size.sum(), np.uint8).tobytes()
    end = np.cumsum(size)
    vocab = [text[e - n : e] for e, n in zip(end.tolist(), size.tolist(), strict=True)]
    stops = ["<|im_end|>", "\n\nHuman:", "abc", "Observation: "]
    begin = time.process_time()
    table = np.asarray(stop.automaton(stops, vocab).next)
    assert time.process_time() - begin < 5
    assert table.dtype == np.int16 and table.shape == (32, 150_000)
    np.testing.assert_array_equal(table[0] == 31, [b"abc" in t for t in vocab])
    assert (table[31] == 31).all()


def test_errors_name_the_value_and_the_remedy():
    with pytest.raises(ValueError, match=r"stop_strings\[1\]='': must not be empty.*leave it out"):
        stop.automaton(["a", ""], [b"a"])
    with pytest.raises(ValueError, match=r"stop_strings\[0\]=5: must be str or bytes"):
        stop.cut(b"a", [5])
    with pytest.raises(ValueError, match=r"must be a list; pass \['END'\]"):
        stop.automaton("END", [b"a"])
    with pytest.raises(ValueError, match="must need fewer than 1024.*shorten"):
        stop.automaton(["a" * 2000], [b"a"])
    with pytest.raises(ValueError, match="token_bytes is empty"):
        stop.automaton(["a"], [])
