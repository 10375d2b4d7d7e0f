"""Sampling against sort-based processors in numpy, and its laws against chi-square tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tests.tolerances import assert_close
from zoo.decode import sampling
from zoo.decode import tree as trees

DRAWS = 24_000
PROCESS = jax.jit(sampling.process)
SAMPLE = jax.jit(sampling.sample)
GUMBEL = jax.jit(sampling.gumbel, static_argnums=2)


def softmax(x):
    x = np.exp(x.astype(np.float64) - np.max(x))
    return x / x.sum()


def reference(logits, temperature, top_k, top_p, min_p):
    """One row through the sort-based processors, and how close it comes to a tie of masses."""
    x = logits.astype(np.float32) / np.float32(temperature)
    margin = np.inf
    if top_k > 0:
        x[x < np.sort(x)[-min(top_k, len(x))]] = -np.inf
    if top_p < 1:
        order = np.argsort(x, kind="stable")
        mass = np.cumsum(softmax(x[order]))
        rest = 1 - np.float64(np.float32(top_p))
        margin = np.min(np.abs(mass[:-1] - rest), initial=np.inf)
        removed = mass <= rest
        removed[-1] = False
        x[x < x[order[~removed]].min()] = -np.inf
    if min_p > 0:
        chance = softmax(x)
        least = np.float64(np.float32(min_p)) * chance.max()
        margin = min(margin, np.min(np.abs(chance - least)))
        x[chance < least] = -np.inf
    return x, margin


def penalised(logits, tokens, penalty):
    x = logits.astype(np.float32).copy()
    for v in set(tokens):
        x[v] = x[v] * np.float32(penalty) if x[v] < 0 else x[v] / np.float32(penalty)
    return x


def plain(batch, vocab):
    """seen, tokens, tree of plain decoding with nothing penalised."""
    return jnp.zeros((batch, vocab), bool), jnp.zeros((batch, 1), jnp.int32), trees.single(batch)


def chi_square(tokens, law):
    """p-value of the draws against the law; a draw outside its support gives 0."""
    counts = np.bincount(tokens, minlength=len(law))
    assert counts.sum() == len(tokens) == DRAWS
    if counts[law == 0].any():
        return 0.0
    expected = law[law > 0] * len(tokens)
    assert expected.min() >= 5
    return scipy.stats.chisquare(counts[law > 0], expected * (len(tokens) / expected.sum())).pvalue


SETTINGS = {
    "temperature": {},
    "top_k": {"top_k"},
    "top_p": {"top_p"},
    "min_p": {"min_p"},
    "all": {"top_k", "top_p", "min_p"},
}


@pytest.mark.parametrize("vocab", [1, 2, 37, 1000])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("on", SETTINGS.values(), ids=SETTINGS.keys())
def test_process_matches_sorting(vocab, ties, on):
    rng = np.random.default_rng(vocab + ties)
    batch = 96
    logits = rng.normal(size=(batch, 1, vocab)) * rng.choice([0.3, 3, 30], size=(batch, 1, 1))
    if ties:
        logits = np.round(logits * 2) / 2
    logits = logits.astype(np.float32)
    logits[::7, :, : vocab // 3] = -np.inf
    pick = {
        "temperature": rng.choice([0.1, 0.7, 1.0, 5.0], batch),
        "top_k": rng.choice([0, 1, 2, 5, vocab, vocab + 3], batch),
        "top_p": rng.choice([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0], batch),
        "min_p": rng.choice([0.0, 0.01, 0.11, 1.0], batch),
    }
    off = {"temperature": pick["temperature"], "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    chosen = {k: pick[k] if k in on else off[k] for k in off}
    request = sampling.request(batch, **chosen)
    got = np.asarray(PROCESS(logits, request, *plain(batch, vocab)))[:, 0]
    close = 0
    for b in range(batch):
        row = {k: np.broadcast_to(v, batch)[b] for k, v in chosen.items()}
        want, margin = reference(logits[b, 0], **row)
        assert np.isfinite(got[b]).any()
        if 0 < margin < 1e-6 and not np.array_equal(got[b] > -np.inf, want > -np.inf):
            close += 1
            continue
        assert_close(got[b], want)
    assert close <= batch // 20


def test_top_k_keeps_ties_of_the_last_and_no_more():
    logits = jnp.array([[[3.0, 2.0, 2.0, -0.0, 0.0, -1.0]]] * 4)
    request = sampling.request(4, temperature=1.0, top_k=[1, 2, 3, 4])
    kept = np.isfinite(PROCESS(logits, request, *plain(4, 6)))[:, 0]
    assert kept.sum(-1).tolist() == [1, 3, 3, 5]


def test_top_p_keeps_the_token_that_reaches_the_mass():
    law = np.array([0.5, 0.25, 0.125, 0.125])
    logits = jnp.log(jnp.asarray(law, jnp.float32))[None, None]
    wanted = {0.001: 1, 0.4: 1, 0.6: 2, 0.8: 4, 0.99: 4}
    for top_p, count in wanted.items():
        request = sampling.request(1, temperature=1.0, top_p=top_p)
        got = PROCESS(logits, request, *plain(1, 4))
        assert int(jnp.isfinite(got).sum()) == count, top_p


def test_thresholds_are_exact_to_one_unit_in_the_last_place():
    low = np.float32(1.5)
    high = np.nextafter(low, np.float32(2))
    tiny = np.float32(1e-30)
    rows = [[low, high], [-high, -low], [-tiny, tiny], [np.float32(-1e30), np.float32(-9e29)]]
    logits = jnp.asarray(rows, jnp.float32)[:, None]
    request = sampling.request(4, temperature=1.0, top_k=1)
    kept = np.isfinite(PROCESS(logits, request, *plain(4, 2)))[:, 0]
    assert kept.tolist() == [[False, True]] * 4


def test_bfloat16_logits_are_processed_in_float32():
    logits = jax.random.normal(jax.random.key(0), (3, 1, 50), jnp.bfloat16)
    request = sampling.request(3, temperature=[0.0, 0.7, 0.7], top_k=[0, 5, 0], top_p=[1, 1, 0.8])
    ours = PROCESS(logits, request, *plain(3, 50))
    wide = PROCESS(logits.astype(jnp.float32), request, *plain(3, 50))
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(ours, wide)


def test_greedy_rows_are_not_truncated():
    logits = jax.random.normal(jax.random.key(0), (2, 1, 50))
    request = sampling.request(2, temperature=[0.0, 0.5], top_k=9, top_p=0.8, min_p=0.2)
    got = PROCESS(logits, request, *plain(2, 50))
    np.testing.assert_array_equal(got[0], logits[0])
    assert 0 < int(jnp.isfinite(got[1]).sum()) <= 9


def test_penalty_counts_each_rows_own_path():
    vocab, penalty = 9, [1.7, 0.5]
    rng = np.random.default_rng(0)
    #       0
    #     1   2
    #     3  4 5(unused)
    parent = np.array([[0, 0, 0, 1, 2, 2]] * 2, np.int32)
    valid = np.array([[True] * 5 + [False]] * 2)
    tokens = np.array([[4, 5, 6, 5, 7, 8], [0, 1, 0, 2, 3, 8]], np.int32)
    tree = trees.tree(parent, valid)
    logits = rng.normal(size=(2, 6, vocab)).astype(np.float32)
    prompts = [[1, 2, 4], []]
    seen = sampling.mark(
        jnp.zeros((2, vocab), bool),
        jnp.array([[1, 2, 4, 0], [5, 5, 5, 5]]),
        jnp.array([[True] * 3 + [False], [False] * 4]),
    )
    request = sampling.request(2, repetition_penalty=penalty)
    got = PROCESS(logits, request, seen, tokens, tree)
    paths = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4]]
    for b in range(2):
        for n, path in enumerate(paths):
            want = penalised(logits[b, n], prompts[b] + tokens[b][path].tolist(), penalty[b])
            assert_close(got[b, n], want)
    greedy = SAMPLE(logits, request, seen, tokens, tree, jnp.zeros((2, 6), int))
    np.testing.assert_array_equal(greedy, np.argmax(got, -1))


def test_mark_ignores_padding():
    seen = sampling.mark(
        jnp.zeros((2, 5), bool),
        jnp.array([[1, -1, 4], [0, 3, 3]]),
        jnp.array([[True, True, False], [False, True, True]]),
    )
    assert seen.astype(int).tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]


LAWS = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.6},
    "truncated": {"temperature": 0.9, "top_k": 9, "top_p": 0.95, "min_p": 0.02},
    "penalised": {"repetition_penalty": 1.5, "top_k": 11},
}


@pytest.mark.parametrize("over", ["seeds", "positions"])
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
def test_draws_follow_the_exact_law(law, over):
    vocab = 12
    settings = {"temperature": 1.0} | law
    logits = np.random.default_rng(5).normal(size=vocab).astype(np.float32)
    penalty = settings.pop("repetition_penalty", 1.0)
    shape = (settings["temperature"], settings.get("top_k", 0), settings.get("top_p", 1.0))
    want, _ = reference(penalised(logits, [0, 3], penalty), *shape, settings.get("min_p", 0.0))
    count = np.arange(DRAWS, dtype=np.int32)
    seed, position = (count, np.full(DRAWS, 17)) if over == "seeds" else (7, count)
    request = sampling.request(DRAWS, seed=seed, repetition_penalty=penalty, **settings)
    _, tokens, tree = plain(DRAWS, vocab)
    seen = jnp.zeros((DRAWS, vocab), bool).at[:, 3].set(True)
    drawn = SAMPLE(
        jnp.broadcast_to(logits, (DRAWS, 1, vocab)),
        request,
        seen,
        tokens,
        tree,
        jnp.asarray(position, jnp.int32)[:, None],
    )
    assert chi_square(np.asarray(drawn)[:, 0], softmax(want)) > 1e-3


def test_chi_square_finds_a_wrong_law():
    law = softmax(np.random.default_rng(5).normal(size=12))
    wrong = softmax(np.log(law) * 1.1)
    drawn = np.random.default_rng(0).choice(12, DRAWS, p=wrong)
    assert chi_square(drawn, law) < 1e-3


def test_noise_is_gumbel_with_a_fine_tail():
    noise = GUMBEL(jnp.array([3], jnp.uint32), jnp.arange(8)[None], 2**18)
    noise = np.asarray(noise).ravel()
    assert np.isfinite(noise).all()
    assert scipy.stats.kstest(noise[:200_000], "gumbel_r").pvalue > 1e-3
    # Noise made of 23 random bits ties here in about one of eight.
    assert len(np.unique(np.sort(noise)[-1000:])) > 990


def test_noise_depends_on_seed_and_position_alone():
    seeds, positions = np.array([5, 2**32 - 1, 5], np.uint32), np.array([[0, 9, 9, 40]] * 3)
    for vocab in (1, 7, 264):
        many = np.asarray(GUMBEL(seeds, positions, vocab))
        for b in range(3):
            for n in range(4):
                one = GUMBEL(seeds[b : b + 1], positions[b : b + 1, n : n + 1], vocab)
                np.testing.assert_array_equal(many[b, n], one[0, 0])
        np.testing.assert_array_equal(many[0], many[2])
        assert not np.array_equal(many[0], many[1])
        assert not np.array_equal(many[:, 0], many[:, 1])


def test_noise_ignores_the_default_generator():
    args = jnp.array([5], jnp.uint32), jnp.array([[3, 4]]), 11
    want = sampling.gumbel(*args)
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(sampling.gumbel(*args), want)


MIXED = {
    "temperature": [0.0, 1.0, 0.7, 0.0, 1.3, 1.0],
    "top_k": [3, 0, 20, 0, 5, 0],
    "top_p": [1.0, 1.0, 0.9, 0.5, 0.8, 1.0],
    "min_p": [0.0, 0.0, 0.0, 0.0, 0.05, 0.1],
    "repetition_penalty": [1.0, 1.0, 1.2, 1.3, 1.0, 0.8],
    "seed": [0, 1, 2, 3, 4, 1],
}


def mixed(rows):
    """Requests, and logits, seen tokens, tree tokens and positions for them."""
    batch, vocab = 6, 300
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(batch, rows, vocab)).astype(np.float32) * 2
    seen = rng.random((batch, vocab)) < 0.1
    tokens = rng.integers(0, vocab, (batch, rows)).astype(np.int32)
    position = rng.integers(0, 90, (batch, 1)) + np.arange(rows)[None]
    return logits, jnp.asarray(seen), tokens, jnp.asarray(position, jnp.int32)


def test_mixed_rows_draw_what_they_draw_alone():
    logits, seen, tokens, position = mixed(4)
    chain = trees.chain(6, 4)
    together = np.asarray(
        SAMPLE(logits, sampling.request(6, **MIXED), seen, tokens, chain, position)
    )
    turned = jax.tree.map(lambda x: x[::-1], sampling.request(6, **MIXED))
    backwards = SAMPLE(logits[::-1], turned, seen[::-1], tokens[::-1], chain, position[::-1])
    np.testing.assert_array_equal(together, backwards[::-1])
    for b in range(6):
        one = sampling.request(1, **{k: v[b] for k, v in MIXED.items()})
        i = slice(b, b + 1)
        alone = SAMPLE(logits[i], one, seen[i], tokens[i], trees.chain(1, 4), position[i])
        np.testing.assert_array_equal(together[b], alone[0])
        if MIXED["temperature"][b] == 0:
            rows = [
                penalised(logits[b, n], [*np.flatnonzero(seen[b]), *tokens[b, : n + 1]],
                          MIXED["repetition_penalty"][b])
                for n in range(4)
            ]  # fmt: skip
            np.testing.assert_array_equal(together[b], np.argmax(rows, -1))
        # The last row of the chain, drawn as plain decoding draws it after the other three.
        known = sampling.mark(seen[i], tokens[i, :3], jnp.ones((1, 3), bool))
        last = SAMPLE(logits[i, 3:], one, known, tokens[i, 3:], trees.single(1), position[i, 3:])
        assert int(last[0, 0]) == together[b, 3]


def test_one_executable_serves_all_settings():
    traces = 0

    def run(*args):
        nonlocal traces
        traces += 1
        return sampling.sample(*args)

    run = jax.jit(run)
    logits, seen, tokens, position = mixed(2)
    for settings in ({}, MIXED, {"temperature": 1.0}, {"stop_tokens": [1, 2]},
                     {"repetition_penalty": 1.1}, {"stop_tokens": [[1]] * 5 + [[]]},
                     {"temperature": 2, "top_k": 4, "seed": 9}):  # fmt: skip
        run(logits, sampling.request(6, **settings), seen, tokens, trees.chain(6, 2), position)
    assert traces == 1


def primitives(jaxpr, into_branches):
    """Names of the primitives in a jaxpr, with or without those in the branches of a cond."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        if eqn.primitive.name != "cond" or into_branches:
            for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
                if is_jaxpr(sub):
                    yield from primitives(getattr(sub, "jaxpr", sub), into_branches)


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def test_expensive_parts_stand_behind_a_condition_and_nothing_sorts():
    logits, seen, tokens, position = mixed(2)
    args = logits, sampling.request(6, **MIXED), seen, tokens, trees.chain(6, 2), position
    jaxpr = jax.make_jaxpr(sampling.sample)(*args).jaxpr
    everywhere = set(primitives(jaxpr, into_branches=True))
    always = set(primitives(jaxpr, into_branches=False))
    costly = {"random_bits", "exp", "log1p", "scatter"}
    assert costly <= everywhere
    assert not costly & always and not {"while", "scan"} & always
    assert {"while", "scan"} & everywhere
    assert "sort" not in everywhere and "top_k" not in everywhere


def test_non_finite_logits():
    nan, inf = np.nan, np.inf
    logits = jnp.array([[nan, 1, 2], [nan, nan, -inf], [1, inf, nan], [-inf, -3, -inf]])[:, None]
    for dtype in (jnp.float32, jnp.bfloat16):
        for temperature in (0.0, 0.5):
            for extra in ({}, {"repetition_penalty": 1.3}):
                request = sampling.request(
                    4, temperature=temperature, top_k=1, top_p=0.9, min_p=0.1, **extra
                )
                got = SAMPLE(
                    logits.astype(dtype), request, *plain(4, 3), jnp.zeros((4, 1), jnp.int32)
                )
                assert got[:, 0].tolist() == [2, 0, 1, 1]
    tied = jnp.array([[[1.0, inf, inf, nan]]])
    request = sampling.request(1, temperature=0.5, top_p=0.9)
    kept = np.isfinite(PROCESS(tied, request, *plain(1, 4)))
    assert kept.tolist() == [[[False, True, True, False]]]
    scores = sampling.log_probability(logits[:, 0], jnp.array([2, 0, 1, 1]))
    assert np.isnan(scores).tolist() == [True, True, True, False]
    assert scores[3] == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_log_probability_is_that_of_the_raw_logits(dtype):
    logits = (jax.random.normal(jax.random.key(1), (3, 4, 200)) * 9).astype(dtype)
    logits = logits.at[..., 7].set(-jnp.inf)
    token = jnp.arange(12).reshape(3, 4)
    got = np.asarray(jax.jit(sampling.log_probability)(logits, token))
    assert got.dtype == np.float32
    with np.errstate(divide="ignore"):
        laws = np.log([[softmax(np.asarray(row, np.float32)) for row in rows] for rows in logits])
    want = np.take_along_axis(laws, np.asarray(token)[..., None], axis=-1)[..., 0]
    assert np.isneginf(want).sum() == 1
    assert_close(got, want)


def test_log_probability_makes_no_copy_of_the_logits():
    shapes = (
        jax.ShapeDtypeStruct((4, 2, 50_000), jnp.float32),
        jax.ShapeDtypeStruct((4, 2), jnp.int32),
    )
    memory = jax.jit(sampling.log_probability).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 50_000


def test_request_defaults_to_greedy_and_pads_stop_tokens():
    request = sampling.request(2, stop_tokens=[[5], [6, 7, 8, 9, 10]])
    assert request.temperature.tolist() == [0, 0]
    assert request.stop_tokens.tolist() == [[5] + [-1] * 7, [6, 7, 8, 9, 10, -1, -1, -1]]
    assert sampling.request(3).stop_tokens.tolist() == [[-1] * 4] * 3
    assert sampling.request(2, stop_tokens=[5, 6]).stop_tokens.tolist() == [[5, 6, -1, -1]] * 2
    kinds = {k: v.dtype.name for k, v in vars(request).items()}
    assert kinds == {
        "temperature": "float32", "top_k": "int32", "top_p": "float32", "min_p": "float32",
        "repetition_penalty": "float32", "seed": "uint32", "stop_tokens": "int32",
    }  # fmt: skip
    assert sampling.request(2, seed=[2**32 - 1, 0]).seed.tolist() == [2**32 - 1, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1.0: must be 0 .* at least 0.0001; use 0 for"),
        ({"temperature": 1e-6}, "temperature=1e-06: must be 0"),
        ({"temperature": [1.0, float("nan")]}, r"temperature\[1\]=nan"),
        ({"temperature": "hot"}, "temperature=hot: must be 0"),
        ({"top_k": -1}, "top_k=-1: must be an integer.*0 turns it off"),
        ({"top_k": 2.5}, "top_k=2.5: must be an integer"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1; 1 turns it off"),
        ({"top_p": [0.5, 1.5]}, r"top_p\[1\]=1.5"),
        ({"min_p": 1.1}, "min_p=1.1: must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be above 0; 1 turns it off"),
        ({"repetition_penalty": 1e39}, "repetition_penalty=1e.39: must be above 0"),
        ({"seed": 2**32}, r"seed=4294967296: must be an integer from 0 .*modulo"),
        ({"seed": -1}, "seed=-1: must be an integer"),
        ({"top_k": [1, 2, 3]}, r"top_k has shape \(3,\).*each of the 2 requests; pass a scalar"),
        ({"stop_tokens": [[1]]}, r"stop_tokens=\[\[1\]\]: must hold .*each of the 2 requests"),
        ({"stop_tokens": [1, [2]]}, r"stop_tokens=\[1, \[2\]\]: must hold"),
        ({"stop_tokens": [1, -2]}, r"stop_tokens\[0\]\[1\]=-2: must be a token id"),
        ({"stop_tokens": 7}, r"stop_tokens=7: must be a list of token ids; pass \[7\]"),
    ],
)  # fmt: skip
def test_request_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        sampling.request(2, **settings)


def test_request_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        sampling.request(0)
