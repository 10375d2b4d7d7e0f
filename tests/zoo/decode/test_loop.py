"""Generation: every setting, drafters that lie, one executable, the same tokens on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers.attention
import sharding
import zoo
from tests import tiny
from tests.tolerances import assert_close
from zoo import protocol
from zoo.decode import loop
from zoo.decode.drafter import Plain, last_token
from zoo.decode.tree import tree

VOCAB = 40
PROMPTS = [[3], [7, 1, 30, 12, 5], list(range(20, 31)), [39, 0]]
NEW = 13


@functools.cache
def model(name="qwen3-8b", stacked=False, **overrides):
    """Built once, with parameters that make no two logits nearly equal."""
    return tiny.model(tiny.config(name, max_length=256, **overrides), stacked, seed=1)


@functools.cache
def plain(name="qwen3-8b", new=NEW):
    return zoo.generate(model(name), PROMPTS, new)


@dataclasses.dataclass(frozen=True)
class Script:
    """Parents of the rows and, per row, how far it is from the right token; None: no valid row."""

    parents: tuple[int, ...]
    offsets: tuple[int | None, ...]

    @property
    def depths(self) -> list[int]:
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return depths

    @property
    def right(self) -> int:
        """How many rows below the root are right all the way down."""
        right = [True]
        for parent, offset in zip(self.parents[1:], self.offsets[1:], strict=True):
            right.append(right[parent] and offset == 0)
        return max(d for d, ok in zip(self.depths, right, strict=True) if ok)


@dataclasses.dataclass(frozen=True)
class Scripted:
    """Drafts by a `Script` with the answer at hand. Both are data, so all share an executable:
    row i at depth d proposes the true token d places on, plus the row's offset."""

    rows: int = 9
    depth: int = 4

    def init(self, params, batch, capacity):
        return {"accepted": jnp.zeros(batch, jnp.int32), "calls": jnp.int32(0)}

    def propose(self, params, state, history, length):
        truth = params["truth"]
        at = jnp.minimum(length[:, None] - 1 + params["depths"], truth.shape[1] - 1)
        tokens = (jnp.take_along_axis(truth, at, axis=1) + params["offsets"]) % VOCAB
        tokens = tokens.at[:, 0].set(last_token(history, length))
        parents, valid = (
            jnp.broadcast_to(params[name], tokens.shape) for name in ("parents", "valid"))
        return tokens, tree(parents, valid), state

    def observe(self, params, state, tokens, tree, step, path, count, emitted):
        return {"accepted": state["accepted"] + count, "calls": state["calls"] + 1}


SCRIPTS = {
    "always right": Script((0, 0, 1, 2, 3), (0, 0, 0, 0, 0)),
    "always wrong": Script((0, 0, 1, 2), (0, 1, 1, 1)),
    "right below wrong": Script((0, 0, 1, 2), (0, 1, 0, 0)),
    "wrong below right": Script((0, 0, 1, 2), (0, 0, 5, 0)),
    "duplicates": Script((0, 0, 0, 0, 1, 2, 2), (0, 0, 0, 0, 0, 0, 0)),
    "bushy": Script((0, 0, 0, 0, 2, 2, 3, 5, 7), (0, 1, 0, 2, 3, 0, 0, 0, 1)),
    "nothing valid": Script((0, 0, 1), (0, None, None)),
    "a hole in the chain": Script((0, 0, 1, 2, 0), (0, 0, None, 0, 1)),
}
EVERY_SCRIPT = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)


def draft(script, generation, prompts=PROMPTS):
    """The options that draft by `script`, given what plain decoding made of the prompts."""
    drafter = Scripted()
    rows = [p + t for p, t in zip(prompts, generation.tokens, strict=True)]
    truth = np.zeros((len(rows), 128), np.int32)
    for row, tokens in zip(truth, rows, strict=True):
        row[: len(tokens)] = tokens

    def fill(values, rest):
        return jnp.array([*values, *[rest] * (drafter.rows - len(values))])

    params = {
        "truth": jnp.asarray(truth), "parents": fill(script.parents, 0),
        "depths": fill(script.depths, 0), "offsets": fill([o or 0 for o in script.offsets], 0),
        "valid": fill([o is not None for o in script.offsets], False),
    }  # fmt: skip
    return {"drafter": drafter, "drafter_params": params}


def assert_same(actual, expected):
    """Same tokens and ends; log-probabilities up to rounding."""
    assert actual.tokens == expected.tokens
    assert actual.finished == expected.finished
    assert_close([np.array(x) for x in actual.log_probs],
                 [np.array(x) for x in expected.log_probs])


def laws(built, prompts, generation):
    """log softmax of one full forward: per request [new tokens, V], where each was chosen."""
    rows = [p + t for p, t in zip(prompts, generation.tokens, strict=True)]
    tokens = np.zeros((len(rows), 72), np.int32)
    for row, sequence in zip(tokens, rows, strict=True):
        row[: len(sequence)] = sequence
    run = jax.jit(lambda tokens: jax.nn.log_softmax(built({"tokens": tokens}).logits))
    law = np.asarray(run(tokens))
    return [law[i, len(p) - 1 : len(r) - 1]
            for i, (p, r) in enumerate(zip(prompts, rows, strict=True))]


@pytest.mark.parametrize("name", ["qwen3-8b", "gpt2", "mistral-7b"])
def test_greedy_tokens_and_log_probs(name):
    """Each token is the likeliest of a full forward over what stands before it."""
    generation = plain(name)
    assert generation.steps == NEW
    assert generation.row_steps == [NEW] * 4
    assert generation.finished == [False] * 4
    for law, tokens, log_probs in zip(
            laws(model(name), PROMPTS, generation), generation.tokens, generation.log_probs,
            strict=True):
        assert len(tokens) == len(log_probs) == NEW
        assert tokens == law.argmax(-1).tolist()
        assert_close(np.array(log_probs), law[np.arange(NEW), tokens])
    assert len({t for tokens in generation.tokens for t in tokens}) > 5  # no trivial sequence


@pytest.mark.parametrize("name", [
    "qwen3-8b", pytest.param("gpt2", marks=pytest.mark.slow),
    pytest.param("mistral-7b", marks=pytest.mark.slow)])
def test_stacked_form_gives_the_same_tokens(name):
    other = zoo.generate(model(name, stacked=True), PROMPTS, NEW)
    assert other.tokens == plain(name).tokens


@EVERY_SCRIPT
def test_drafters_change_nothing_but_the_steps(script):
    """T4, greedy. How many tokens a step yields follows from the script."""
    actual = zoo.generate(model(), PROMPTS, NEW, **draft(script, plain()))
    assert_same(actual, plain())
    assert actual.steps == -(-NEW // (1 + script.right))


@pytest.mark.parametrize("new", [1, 4, 5, 6, 10])
def test_accepted_path_meets_the_limit(new):
    """Paths of 5 tokens that end before, at and after the last token wanted."""
    expected = plain(new=new)
    actual = zoo.generate(model(), PROMPTS, new, **draft(SCRIPTS["always right"], plain()))
    assert_same(actual, expected)
    assert [len(t) for t in actual.tokens] == [new] * 4


def test_cache_filled_to_the_last_place():
    """max_len exactly what is needed: the longest prompt, its tokens, and no slack."""
    longest = max(map(len, PROMPTS))
    for options in ({}, draft(SCRIPTS["always right"], plain())):
        actual = zoo.generate(model(), PROMPTS, NEW, max_len=longest + NEW, **options)
        assert_same(actual, plain())


@pytest.mark.parametrize("script", ["always right", "bushy", "duplicates"])
@pytest.mark.parametrize("place", [0, 2, 5])
def test_stop_token_inside_the_tree(script, place):
    """Accepted rows after the stop token do not count."""
    stops = [tokens[place] for tokens in plain().tokens]
    expected = zoo.generate(model(), PROMPTS, NEW, stop_tokens=[[s] for s in stops])
    for tokens, whole, stop in zip(expected.tokens, plain().tokens, stops, strict=True):
        assert tokens == whole[: whole.index(stop) + 1]
    assert expected.finished == [True] * 4
    actual = zoo.generate(model(), PROMPTS, NEW, stop_tokens=[[s] for s in stops],
                          **draft(SCRIPTS[script], plain()))
    assert_same(actual, expected)


def test_stop_tokens_of_one_request_only():
    whole = plain().tokens
    generation = zoo.generate(model(), PROMPTS, NEW, stop_tokens=[[whole[0][1]], [], [], []])
    assert generation.tokens[0] == whole[0][: whole[0].index(whole[0][1]) + 1]
    assert generation.tokens[1:] == whole[1:]
    assert generation.finished == [True, False, False, False]
    assert generation.row_steps[0] == len(generation.tokens[0])


def test_stop_token_as_the_last_one_allowed():
    """It ends the request even at the limit."""
    last = plain().tokens[0][-1]
    first = plain().tokens[0].index(last)
    generation = zoo.generate(model(), PROMPTS[:1], first + 1, stop_tokens=[last])
    assert generation.finished == [True]
    assert generation.tokens == [plain().tokens[0][: first + 1]]


# Two letters a token: "ab", "bc", ... so that a text straddles tokens.
TOKEN_BYTES = [bytes([97 + i % 26, 97 + (i * 7) % 26]) for i in range(VOCAB)]


@pytest.mark.parametrize("script", [None, "always right", "bushy"])
def test_stop_strings_straddle_tokens(script):
    tokens = plain().tokens
    texts = [b"".join(TOKEN_BYTES[t] for t in row) for row in tokens]
    stop = texts[1][5:8]  # the second half of token 2, and all of token 3
    ends = [row.find(stop) for row in texts]
    kept = [len(row) if end < 0 else (end + len(stop) + 1) // 2
            for row, end in zip(tokens, ends, strict=True)]
    assert kept[1] <= 4
    generation = zoo.generate(
        model(), PROMPTS, NEW, stop_strings=[stop, b"\x00\x01"], token_bytes=TOKEN_BYTES,
        **(draft(SCRIPTS[script], plain()) if script else {}))
    assert generation.tokens == [row[:n] for row, n in zip(tokens, kept, strict=True)]
    assert generation.finished == [end >= 0 for end in ends]


def test_stop_string_straddles_two_streamed_pieces():
    tokens = plain().tokens[1]
    text = b"".join(TOKEN_BYTES[t] for t in tokens)
    pieces = list(zoo.stream(model(), PROMPTS[1:2], NEW, every=3, stop_strings=[text[5:8]],
                             token_bytes=TOKEN_BYTES))
    found = [t for piece in pieces for t in piece.tokens[0]]
    assert found == tokens[: (text.find(text[5:8]) + 4) // 2]
    assert pieces[-1].finished == [True]


DRAWN = {"temperature": 0.9, "top_k": 12, "top_p": 0.95, "min_p": 0.01,
         "repetition_penalty": 1.3, "seed": [5, 6, 7, 8]}  # fmt: skip


@functools.cache
def sampled():
    return zoo.generate(model(), PROMPTS, NEW, **DRAWN)


@EVERY_SCRIPT
def test_drafted_samples_are_the_plain_ones(script):
    """SEED: at T > 0 the tokens depend on the request's seed, never on the drafter."""
    assert sampled().tokens != plain().tokens
    actual = zoo.generate(model(), PROMPTS, NEW, **DRAWN, **draft(script, sampled()))
    assert_same(actual, sampled())
    assert actual.steps == -(-NEW // (1 + script.right))


def test_seeds():
    again = zoo.generate(model(), PROMPTS, NEW, **DRAWN)
    assert again == sampled()
    other = zoo.generate(model(), PROMPTS, NEW, **{**DRAWN, "seed": 9})
    assert all(a != b for a, b in zip(other.tokens, sampled().tokens, strict=True))
    # Log-probabilities are the model's own, whatever was cut off or penalised.
    for law, tokens, log_probs in zip(
            laws(model(), PROMPTS, sampled()), sampled().tokens, sampled().log_probs, strict=True):
        assert_close(np.array(log_probs), law[np.arange(NEW), tokens])


def test_temperature_zero_in_a_mixed_batch():
    options = {**DRAWN, "temperature": [0.9, 0.0, 0.9, 0.0], "repetition_penalty": 1.0}
    mixed = zoo.generate(model(), PROMPTS, NEW, **options)
    assert [mixed.tokens[i] for i in (1, 3)] == [plain().tokens[i] for i in (1, 3)]


@pytest.mark.parametrize("options", [{}, DRAWN], ids=["greedy", "sampled"])
def test_a_request_does_not_depend_on_its_batch(options):
    """Alone, in another order, with another limit beside it."""
    whole = zoo.generate(model(), PROMPTS, NEW, **options)
    seeds = options.get("seed", [0] * 4)
    for i, prompt in enumerate(PROMPTS):
        alone = zoo.generate(model(), prompt, NEW, **{**options, "seed": seeds[i]})
        assert alone.tokens == [whole.tokens[i]]
    turned = zoo.generate(model(), PROMPTS[::-1], [NEW, 2, 5, NEW],
                          **{**options, "seed": seeds[::-1]})
    assert turned.tokens == [
        tokens[:n] for tokens, n in zip(whole.tokens[::-1], (NEW, 2, 5, NEW), strict=True)]
    assert turned.row_steps == [NEW, 2, 5, NEW]


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_prompts(side):
    longest = max(map(len, PROMPTS)) + 2
    tokens = np.full((4, longest), 17, np.int32)
    valid = np.zeros((4, longest), bool)
    for row, (prompt, mask) in enumerate(zip(PROMPTS, valid, strict=True)):
        start = {"left": longest - len(prompt), "right": 0, "both": 1}[side]
        mask[start : start + len(prompt)] = True
        tokens[row, start : start + len(prompt)] = prompt
    assert_same(zoo.generate(model(), tokens, NEW, valid=valid), plain())


def test_forms_of_prompts():
    prompt = [7, 1, 30, 12, 5]
    expected = [plain().tokens[1]]
    for tokens in (prompt, [prompt], np.array(prompt), jnp.array([prompt]), [np.array(prompt)],
                   (prompt,), [jnp.array(prompt, jnp.uint8)]):
        assert zoo.generate(model(), tokens, NEW).tokens == expected


def test_a_prompt_longer_than_a_chunk(monkeypatch):
    """Taken in by several chunks, beside one that needs a single one."""
    monkeypatch.setattr(loop, "CHUNK", 16)
    prompts = [np.random.default_rng(0).integers(0, VOCAB, n).tolist() for n in (50, 3, 33)]
    generation = zoo.generate(model(), prompts, 5)
    for law, tokens in zip(
            laws(model(), prompts, generation), generation.tokens, strict=True):
        assert tokens == law.argmax(-1).tolist()


@pytest.mark.parametrize("every", [1, 3, 5, 13, 16])
@pytest.mark.parametrize("script", [None, "bushy"])
def test_stream_equals_generate(every, script):
    options = DRAWN | (draft(SCRIPTS[script], sampled()) if script else {})
    pieces = list(zoo.stream(model(), PROMPTS, NEW, every=every, **options))
    assert len(pieces) == -(-NEW // every)
    assert all(len(t) <= every for piece in pieces for t in piece.tokens)
    for i in range(4):
        assert [t for p in pieces for t in p.tokens[i]] == sampled().tokens[i]
        log_probs = [x for p in pieces for x in p.log_probs[i]]
        assert_close(np.array(log_probs), np.array(sampled().log_probs[i]))
    assert pieces[-1].finished == sampled().finished


def test_stream_ends_with_its_last_request():
    """Stop tokens and limits of their own: no empty piece at the end."""
    whole = plain().tokens
    pieces = list(zoo.stream(model(), PROMPTS, [2, 7, 4, 9], every=3, stop_tokens=[whole[3][3]]))
    expected = zoo.generate(model(), PROMPTS, [2, 7, 4, 9], stop_tokens=[whole[3][3]])
    assert [[t for p in pieces for t in p.tokens[i]] for i in range(4)] == expected.tokens
    assert pieces[-1].finished == expected.finished
    assert any(pieces[-1].tokens)


@pytest.mark.parametrize("window", [
    pytest.param(4, id="P-1", marks=pytest.mark.slow), pytest.param(5, id="P"),
    pytest.param(11, id="2P+1", marks=pytest.mark.slow)])
def test_window_ring_wraps(monkeypatch, window):
    """Paths of P = 5 over a ring of window + P slots, for more than three wraps."""
    monkeypatch.setattr(layers.attention, "CACHE_BLOCK", 1)
    built = model("mistral-7b", **{"attention.window": window})
    prompts, new = PROMPTS[:2], 4 * (window + Scripted().depth + 1)
    expected = zoo.generate(built, prompts, new)
    for law, tokens in zip(laws(built, prompts, expected), expected.tokens, strict=True):
        assert tokens == law.argmax(-1).tolist()
    for script in ("always right", "bushy", "always wrong"):
        actual = zoo.generate(built, prompts, new, **draft(SCRIPTS[script], expected, prompts))
        assert_same(actual, expected)
        assert actual.steps == -(-new // (1 + SCRIPTS[script].right))


@pytest.fixture
def compilations():
    """Names of the functions that XLA compiles while the test runs."""
    names = []

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(details["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_one_executable(compilations):
    """Lengths within a bucket, every sampling setting, limits and streaming share it."""
    one = tiny.model(tiny.config("llama3-8b", max_length=200))
    calls = [
        lambda: zoo.generate(one, [[1, 2], [3]], 5),
        lambda: zoo.generate(one, [list(range(9)), [3, 4]], 40, temperature=0.7, seed=3),
        lambda: zoo.generate(one, [[5], [6]], [1, 9], top_k=3, temperature=[0.0, 2.0], top_p=0.5,
                             min_p=0.1, repetition_penalty=1.1, stop_tokens=[4, 5]),
        lambda: list(zoo.stream(one, [[1], [2, 3]], 20, every=3, temperature=1.0)),
    ]
    calls[0]()
    assert compilations.count("jit(run)") == 1
    for call in calls[1:]:
        call()
    assert compilations.count("jit(run)") == 1
    # The count would show another one: a longer prompt has another bucket.
    zoo.generate(one, [list(range(30)), [3]], 5)
    assert compilations.count("jit(run)") == 2


def test_no_transfer_inside():
    """From the first prompt token to the last new one, nothing goes to or from the host."""
    with sharding.ensure_mesh(protocol.split(model())[1]):
        call = loop._Run(model(), PROMPTS, NEW, **DRAWN)
        arguments = (call.definition, call.drafter, call.chunk, call.params, (), call.progress,
                     call.request, call.table, jnp.asarray(call.limit))
        text = loop.run.lower(*arguments).compile().as_text()
        with jax.transfer_guard("disallow"):
            progress = loop.run(*arguments)
    assert np.asarray(progress.length).tolist() == call.limit.tolist()
    for word in ("outfeed", "infeed", "callback", " send(", " recv("):
        assert word not in text


def test_state_is_donated():
    with sharding.ensure_mesh(protocol.split(model())[1]):
        call = loop._Run(model(), PROMPTS, NEW)
        before = call.progress
        call.advance(2)
    assert all(x.is_deleted() for x in jax.tree.leaves((before.state, before.history)))


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
def test_temporaries_do_not_grow_with_the_cache(stacked):
    config, batch = tiny.config("llama3-8b", max_length=8192), 2
    mesh = sharding.mesh("data:1", jax.devices()[:1])
    with sharding.use(mesh):
        abstract = zoo.build(config, stacked=stacked, abstract=True)
        definition = protocol.split(abstract)[0]
        sizes = {}
        for capacity in (512, 4096):
            arguments = loop.abstract_run(abstract, batch, capacity)
            analysis = loop.run.lower(definition, Plain(), 16, *arguments).compile(
                ).memory_analysis()
            sizes[capacity] = analysis.temp_size_in_bytes
            # The caches are updated where they are.
            assert analysis.alias_size_in_bytes > 4 * batch * 2 * 2 * 2 * 8 * capacity
    # In the list form XLA may copy the slots' positions, 4 bytes each; a cache is 16 times that.
    positions = 4 * config.num_layers * batch * (4096 - 512)
    assert sizes[4096] - sizes[512] <= (0 if stacked else positions)


@pytest.mark.parametrize(("preset", "stacked", "multiple"), [
    ("fsdp_tp", False, 48), pytest.param("fsdp_tp", True, 1, marks=pytest.mark.slow),
    pytest.param("dp", True, 1, marks=pytest.mark.slow)])
def test_four_devices_give_the_same_tokens(preset, stacked, multiple):
    """T7, greedy and sampled, plain and drafted. The mesh is that of the parameters. Columns that
    fill the vocabulary up are never chosen, however large they are."""
    mesh, rules = sharding.mesh("data:2,tensor:2", jax.devices()[:4]), sharding.rules(preset)
    wide = tiny.filled_up(model(stacked=stacked), multiple, stacked)
    definition, params = protocol.split(wide)
    layout = protocol.shardings(mesh, rules, protocol.axes(wide), params)
    spread = protocol.merge(definition, jax.device_put(params, layout))
    with sharding.use(mesh, rules):
        for options in ({}, draft(SCRIPTS["bushy"], plain())):
            assert_same(zoo.generate(spread, PROMPTS, NEW, **options), plain())
        assert_same(zoo.generate(spread, PROMPTS, NEW, **DRAWN), sampled())


@pytest.mark.slow
def test_mesh_of_the_parameters_is_enough():
    """No ambient mesh; and one prompt, which cannot be cut over two devices."""
    mesh, rules = sharding.mesh("fsdp:2", jax.devices()[:2]), sharding.rules("fsdp_tp")
    definition, params = protocol.split(model())
    layout = protocol.shardings(mesh, rules, protocol.axes(model()), params)
    spread = protocol.merge(definition, jax.device_put(params, layout))
    for prompt, tokens in zip(PROMPTS[:2], plain().tokens, strict=False):
        assert zoo.generate(spread, prompt, NEW).tokens == [tokens]


def test_bfloat16():
    definition, params = protocol.split(model())
    half = protocol.merge(definition, protocol.cast(params, jnp.bfloat16))
    generation = zoo.generate(half, PROMPTS, 6, temperature=1.0)
    assert all(len(t) == 6 and np.isfinite(x).all()
               for t, x in zip(generation.tokens, generation.log_probs, strict=True))


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "there are no prompts"),
        ([[1], []], {}, r"prompt 1 has shape \(0,\); give it at least one token"),
        ([[1, 40]], {}, r"prompt 0 holds token 40; the model's ids are 0\.\.39"),
        ([[1], [-1]], {}, "prompt 1 holds token -1"),
        ([[1.5, 2.0]], {}, "prompt 0 has dtype float64; token ids are integers"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0; it must be an integer >= 1"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ([[1], [2]], {"max_new_tokens": [1, 2, 3]}, "one number, or one for each of the 2 prompts"),
        ([list(range(30))], {"max_new_tokens": 40},
         "a prompt of 30 tokens and max_new_tokens = 40 need 70 places in a cache of 64"),
        ([[1] * 9], {"max_len": 12}, "need 14 places in a cache of 12; .*raise max_len"),
        ([[1]], {"max_len": 65}, "max_len is 65; the model is made for at most 64"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0: must be 0"),
        ([[1], [2]], {"seed": [1, 2, 3]}, r"seed has shape \(3,\); .* 2 requests"),
        ([[1]], {"stop_strings": ["a"]}, "stop_strings need token_bytes"),
        ([[1]], {"stop_strings": ["a"], "token_bytes": [b"a"] * 41}, "41 entries; .* 40 token ids"),
        ([[1, 2]], {"valid": [True, True]}, r"valid of shape \(2,\) must have the shape of tokens"),
        (np.array([[1, 2]]), {"valid": [[False, False]]}, "prompt 0 has shape"),
        (np.array([[1, 2]]), {"valid": [[1, 2]]}, "valid has dtype int64 and other values than 0"),
        (np.array([[1, 2]]), {"valid": "10"}, r"valid of shape \(\) must have the shape of tokens"),
        ([[1, 2], [3]], {"valid": [[1, 1], [1]]}, "tokens and valid must be arrays .*; pad the"),
        ([[1]], {"max_len": "64"}, "max_len is '64'; it must be an integer >= 1, or None"),
        ([[1]], {"max_len": 32.0}, "max_len is 32.0; it must be an integer"),
        ([[1]], {"max_len": 0}, "max_len is 0; it must be an integer >= 1"),
        ([[1]], {"temprature": 1.0}, "'temprature' is no option .*; did you mean 'temperature'"),
        ([[1]], {"stops": ["a"]}, "'stops' is no option of generate or stream"),
        ([[1]], {"zzz": 1}, "'zzz' is no option .*; known: drafter, .*, valid$"),
    ],
)
def test_refuses(tokens, options, message):
    small = zoo.build(tiny.config("gpt2"), abstract=True)
    for door in (zoo.generate, zoo.stream):  # at the call, not at the first piece
        with pytest.raises(ValueError, match=message):
            door(small, tokens, **{"max_new_tokens": 5, **options})


def test_explicit_axis_types_are_refused_at_the_door():
    """Be they of the ambient mesh or of the model's own."""
    mesh = sharding.mesh("tensor:2", explicit=True)
    built = zoo.build(tiny.config("gpt2"), mesh=mesh, abstract=True)
    for door in (zoo.generate, zoo.stream):
        with pytest.raises(ValueError, match="'tensor': 2}.* has Explicit .*explicit=False"):
            door(built, PROMPTS, NEW)
        for ambient in (mesh, sharding.mesh("tensor:2")):
            with sharding.use(ambient), pytest.raises(ValueError, match="has Explicit axis types"):
                door(built, PROMPTS, NEW)


def test_fewer_key_heads_than_the_tensor_axis_is_wide():
    """Two key heads over four devices: whole on each of them."""
    mesh, rules = sharding.mesh("tensor:4"), sharding.rules("fsdp_tp,kv_heads=none")
    definition, params = protocol.split(model())
    layout = protocol.shardings(mesh, rules, protocol.axes(model()), params)
    spread = protocol.merge(definition, jax.device_put(params, layout))
    with sharding.use(mesh, rules):
        assert_same(zoo.generate(spread, PROMPTS, NEW), plain())


def test_stream_refuses():
    with pytest.raises(ValueError, match="every is 0; it must be at least 1 token"):
        zoo.stream(model(), PROMPTS, NEW, every=0)


def test_ids_without_text_match_no_stop_string():
    """A vocabulary padded beyond its tokenizer: only id 1 has the text that stops."""
    generation = zoo.generate(
        model(), PROMPTS, NEW, stop_strings=["y"], token_bytes=[b"x", b"y"])
    expected = [row[: row.index(1) + 1] if 1 in row else row for row in plain().tokens]
    assert generation.tokens == expected and any(len(row) > 1 for row in expected)
