"""The generate loop: one executable from prompt to last token, for every model of the zoo.

It takes prompts in by chunks, then decodes until each request is finished or `until`, an array
of data, is reached. Called again with the donated state it goes on where it stopped, so whole
and streamed generation are the same executable and give the same tokens.
"""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType

import sharding
from zoo.decode import sampling, stop
from zoo.decode.drafter import Drafter, Plain
from zoo.decode.tree import accept
from zoo.protocol import Rows, merge, split
from zoo.registry import check_kind

# Prompt tokens taken in at a time, and the least capacity: both are powers of two, so that
# requests of many lengths share an executable.
CHUNK = 256
LEAST_CAPACITY = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """Everything that decoding carries from step to step.

    Attributes:
      state: the model's; it holds all tokens but the last.
      drafter: the drafter's state.
      history: int32 [B, S], prompt and emitted tokens.
      length: int32 [B], tokens in history.
      log_probs: float32 [B, S], of emitted tokens under the model's own law.
      seen: bool [B, V], tokens in history.
      stop_state: int32 [B], of the stop-string automaton.
      done: bool [B].
      steps: int32, model steps run.
      row_steps: int32 [B], steps in which this request took part.
    """

    state: Any
    drafter: Any
    history: jax.Array
    length: jax.Array
    log_probs: jax.Array
    seen: jax.Array
    stop_state: jax.Array
    done: jax.Array
    steps: jax.Array
    row_steps: jax.Array


def _prefill(model, chunk: int, progress: Progress) -> Progress:
    """Takes prompts into the state, all but each one's last token."""
    history, target = progress.history, progress.length - 1

    def behind(state):
        return jnp.any(state.length < target)

    def take(state):
        at = state.length[:, None] + jnp.arange(chunk)
        tokens = jnp.take_along_axis(history, jnp.minimum(at, history.shape[1] - 1), axis=1)
        return model.prefill(tokens, at < target[:, None], state)[1]

    return dataclasses.replace(progress, state=lax.while_loop(behind, take, progress.state))


def _write(buffer: jax.Array, columns: jax.Array, at: jax.Array, count: jax.Array) -> jax.Array:
    """`buffer` [B, S] with the first `count` [B] of `columns` [B, P] from position `at` [B]."""
    order = jnp.arange(columns.shape[1])
    place = jnp.where(order < count[:, None], at[:, None] + order, buffer.shape[1] + order)
    rows = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[rows, place].set(columns, mode="drop", unique_indices=True)


def _decode(model, drafter: Drafter, drafter_params, request, table, until, progress):
    path_length = drafter.depth + 1

    def live(p: Progress):
        return ~p.done & (p.length < until)

    def body(p: Progress) -> Progress:
        tokens, tree, draft = drafter.propose(drafter_params, p.drafter, p.history, p.length)
        step = model.step(tokens, tree, p.state)
        rows = Rows(tokens, tree, p.length[:, None] + tree.depth, p.seen)
        columns, finished = model.emit(step, request, rows)
        _, path, count = accept(tokens, columns, tree, path_length)

        def along(x):
            return jnp.take_along_axis(x, path, axis=1)

        emitted, ends = along(columns), along(finished)
        stop_state, state_here = p.stop_state, []
        for column in range(path_length):
            stop_state = stop.advance(table, stop_state, emitted[:, column])
            state_here.append(stop_state)
        states = jnp.stack(state_here, axis=1)
        ends |= states == table.accept
        # Nothing counts after the first end, nor past the request's limit, nor in a row at rest.
        order = jnp.arange(path_length)
        first_end = jnp.min(jnp.where(ends, order, path_length), axis=1)
        kept = jnp.minimum(jnp.minimum(count, first_end + 1), until - p.length)
        kept = jnp.where(live(p), kept, 0)
        last = jnp.maximum(kept - 1, 0)[:, None]
        moved = kept > 0
        log_probs = along(sampling.log_probability(step.logits, columns))
        return Progress(
            state=model.commit(p.state, step.scratch, path, kept),
            drafter=drafter.observe(drafter_params, draft, tokens, tree, step, path, kept,
                                    emitted),
            history=_write(p.history, emitted, p.length, kept),
            length=p.length + kept,
            log_probs=_write(p.log_probs, log_probs, p.length, kept),
            seen=sampling.mark(p.seen, emitted, order < kept[:, None]),
            stop_state=jnp.where(
                moved, jnp.take_along_axis(states, last, axis=1)[:, 0], p.stop_state),
            done=p.done | (moved & jnp.take_along_axis(ends, last, axis=1)[:, 0]),
            steps=p.steps + 1,
            row_steps=p.row_steps + moved,
        )

    return lax.while_loop(lambda p: jnp.any(live(p)), body, progress)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def run(definition: nnx.GraphDef, drafter: Drafter, chunk: int, params, drafter_params,
        progress: Progress, request: sampling.Request, table: stop.StopTable,
        until: jax.Array) -> Progress:
    """Goes on until every request is done or holds `until` int32 [B] tokens.

    `chunk` is how many prompt tokens are taken in at a time; 0 leaves that part out.
    """
    model = merge(definition, params)
    if chunk:
        progress = _prefill(model, chunk, progress)
    return _decode(model, drafter, drafter_params, request, table, until, progress)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _start(definition, drafter, capacity, params, drafter_params, history, length) -> Progress:
    model = merge(definition, params)
    batch, slots = history.shape
    seen = jnp.zeros((batch, model.config.vocab_size), bool)
    zeros = jnp.zeros(batch, jnp.int32)
    return Progress(
        state=model.init_state(batch, capacity, drafter.depth + 1),
        drafter=drafter.init(drafter_params, batch, slots),
        history=history, length=length, log_probs=jnp.zeros(history.shape, jnp.float32),
        seen=sampling.mark(seen, history, jnp.arange(slots) < length[:, None]),
        stop_state=zeros, done=jnp.zeros(batch, bool), steps=jnp.int32(0), row_steps=zeros)


def abstract_run(model, batch: int, capacity: int, drafter: Drafter | None = None
                 ) -> tuple[Any, ...]:
    """The arguments of `run` after `chunk`, for an abstract model on the ambient mesh.

    They are ShapeDtypeStructs with the shardings that `generate` would make, so that
    ``run.lower(definition, drafter, chunk, *arguments).compile()`` plans a machine that is only
    described.
    """
    definition, params = split(model)
    drafter = Plain() if drafter is None else drafter
    device = jax.tree.leaves(params)[0].sharding.mesh
    whole = jax.NamedSharding(device, jax.sharding.PartitionSpec())

    def given(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    prompts = (given((batch, capacity), jnp.int32), given((batch,), jnp.int32))
    start = _start.lower(definition, drafter, capacity, params, (), *prompts)
    shapes = jax.eval_shape(functools.partial(_start, definition, drafter, capacity), params, (),
                            *prompts)
    progress = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes, start.compile().output_shardings)
    settings = jax.tree.map(
        lambda x: given(x.shape, x.dtype),
        jax.eval_shape(lambda: (sampling.request(batch), stop.automaton((), ()))))
    return params, (), progress, *settings, given((batch,), jnp.int32)


def _bucket(n: int, least: int = 1) -> int:
    return max(least, 1 << max(n - 1, 0).bit_length())


def _prompts(tokens: Any, valid: Any, vocab: int) -> list[np.ndarray]:
    """Prompts as one int32 array each, checked."""
    if valid is not None:
        try:
            tokens, valid = np.asarray(tokens), np.asarray(valid)
        except ValueError:  # Of rows of several lengths.
            raise ValueError("tokens and valid must be arrays [B, T]; pad the prompts to one "
                             "length, or pass lists of any lengths without valid") from None
        if tokens.ndim != 2 or valid.shape != tokens.shape:
            raise ValueError(f"valid of shape {valid.shape} must have the shape of tokens, "
                             f"[B, T], which is {tokens.shape}")
        if valid.dtype != bool and not np.isin(valid, (0, 1)).all():
            raise ValueError(f"valid has dtype {valid.dtype} and other values than 0 and 1; it "
                             "says of each token whether it is real, so make it bool")
        valid = valid.astype(bool)
        tokens = [row[mask] for row, mask in zip(tokens, valid, strict=True)]
    elif isinstance(tokens, (np.ndarray, jax.Array)):
        tokens = np.asarray(tokens)
        tokens = list(tokens[None] if tokens.ndim == 1 else tokens)
    elif len(tokens) and np.ndim(tokens[0]) == 0:
        tokens = [tokens]
    prompts = [np.asarray(row) for row in tokens]
    if not prompts:
        raise ValueError("there are no prompts; pass at least one list of token ids")
    for index, row in enumerate(prompts):
        if row.ndim != 1 or not row.size:
            raise ValueError(f"prompt {index} has shape {row.shape}; give it at least one token "
                             "id, such as the tokenizer's bos")
        if not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"prompt {index} has dtype {row.dtype}; token ids are integers")
        if row.min() < 0 or row.max() >= vocab:
            wrong = row[(row < 0) | (row >= vocab)][0]
            raise ValueError(f"prompt {index} holds token {wrong}; the model's ids are 0.."
                             f"{vocab - 1}")
    return [row.astype(np.int32) for row in prompts]


def _check_mesh(params: Any) -> None:
    own = getattr(getattr(jax.tree.leaves(params)[0], "sharding", None), "mesh", None)
    meshes = [mesh for mesh in (sharding.ambient_mesh(), own) if mesh is not None]
    explicit = [any(t == AxisType.Explicit for t in mesh.axis_types) for mesh in meshes]
    alone = all(mesh.size == 1 for mesh in meshes) and all(explicit)
    if any(explicit) and not alone:
        raise ValueError(
            f"the mesh {dict(meshes[0].shape)}, or the model's own, has Explicit axis types, with "
            "which there is training but no decoding; build the model on sharding.mesh(...) with "
            "explicit=False")


def _check_settings(settings: dict[str, Any]) -> None:
    known = [p.name for taker in (_Run.__init__, sampling.request)
             for p in inspect.signature(taker).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise ValueError(f"{name!r} is no option of generate or stream; {hint}")


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated, on the host.

    Attributes:
      tokens: per request, the list of new token ids, a stop token included.
      log_probs: per request, the log-probability in nats of each new token under the model's
        own law (temperature 1, nothing cut off).
      finished: per request, True where a stop token or string ended it, False at the limit.
      steps: model steps run; tokens per step is what a drafter improves.
      row_steps: the steps in which each request took part.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]]
    finished: list[bool]
    steps: int
    row_steps: list[int]


class _Run:
    """One call's arrays and limits; `advance` decodes to a number of new tokens."""

    def __init__(self, model, tokens, max_new_tokens, *, valid=None, stop_strings=(),
                 token_bytes=None, max_len=None, drafter=None, drafter_params=(), **settings):
        config = model.config
        check_kind(config, "language")
        self.definition, self.params = split(model)
        _check_mesh(self.params)
        _check_settings(settings)
        prompts = _prompts(tokens, valid, config.vocab_size)
        batch, longest = len(prompts), max(len(p) for p in prompts)
        limits = np.asarray(max_new_tokens)
        if limits.shape not in ((), (batch,)):
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be one number, or one "
                             f"for each of the {batch} prompts")
        limits = np.broadcast_to(limits, (batch,))
        if not np.issubdtype(limits.dtype, np.integer) or limits.min() < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be an integer >= 1")
        needed = max(len(p) + int(n) for p, n in zip(prompts, limits, strict=True))
        if max_len is not None and (not isinstance(max_len, (int, np.integer)) or max_len < 1):
            raise ValueError(f"max_len is {max_len!r}; it must be an integer >= 1, or None")
        room = config.max_length if max_len is None else int(max_len)
        if room > config.max_length:
            raise ValueError(f"max_len is {max_len}; the model is made for at most "
                             f"{config.max_length} tokens")
        if needed > room:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens = {int(limits.max())} need "
                f"{needed} places in a cache of {room}; shorten the prompt, ask for fewer "
                + ("tokens, or raise max_len" if max_len else "tokens"))
        if len(stop_strings) and token_bytes is None:
            raise ValueError("stop_strings need token_bytes, the bytes of each token id; "
                             "a tokenizer's token_bytes() gives them")
        if token_bytes is not None and len(token_bytes) > config.vocab_size:
            raise ValueError(f"token_bytes has {len(token_bytes)} entries; the model has "
                             f"{config.vocab_size} token ids")
        # A vocabulary padded beyond its tokenizer: the ids left over have no text.
        token_bytes = [*(token_bytes or ()), *[b""] * (
            config.vocab_size - len(token_bytes or ()))]
        self.drafter = Plain() if drafter is None else drafter
        self.drafter_params = drafter_params
        self.request = sampling.request(batch, **settings)
        self.table = stop.automaton(stop_strings, token_bytes)
        self.prompt_length = np.array([len(p) for p in prompts], np.int32)
        self.limit = self.prompt_length + limits.astype(np.int32)
        capacity = _bucket(needed, LEAST_CAPACITY) if max_len is None else room
        # The chunk follows the prompt, so that a short one does not pay for a long one.
        self.chunk = min(CHUNK, _bucket(longest, 16))
        history = np.zeros((batch, capacity), np.int32)
        for row, prompt in zip(history, prompts, strict=True):
            row[: len(prompt)] = prompt
        self.progress = _start(self.definition, self.drafter, capacity, self.params,
                               drafter_params, jnp.asarray(history),
                               jnp.asarray(self.prompt_length))

    def advance(self, new_tokens: int | None = None) -> None:
        """Decodes until each request has `new_tokens` (default: its limit) or is done."""
        until = self.limit
        if new_tokens is not None:
            until = np.minimum(until, self.prompt_length + new_tokens)
        self.progress = run(self.definition, self.drafter, self.chunk, self.params,
                            self.drafter_params, self.progress, self.request, self.table,
                            jnp.asarray(until))

    def fetch(self, start: np.ndarray) -> tuple[Generation, np.ndarray, bool]:
        """What stands from position `start` [B] on; the new lengths; whether all is over."""
        p = self.progress
        history, length, log_probs, done, steps, row_steps = jax.device_get(
            (p.history, p.length, p.log_probs, p.done, p.steps, p.row_steps))
        spans = list(zip(start, length, strict=True))
        generation = Generation(
            tokens=[history[b, i:j].tolist() for b, (i, j) in enumerate(spans)],
            log_probs=[log_probs[b, i:j].tolist() for b, (i, j) in enumerate(spans)],
            finished=done.tolist(), steps=int(steps), row_steps=row_steps.tolist())
        return generation, length, bool(np.all(done | (length >= self.limit)))


def generate(model, tokens, max_new_tokens, **options) -> Generation:
    """Continues prompts.

    Runs on the ambient mesh and rules, else on the model's mesh.

    Args:
      model: a language model of the zoo.
      tokens: the prompts: lists of token ids of any lengths, or int [B, T] (or [T]).
      max_new_tokens: how many to add at most, one number or one a request.
      valid: bool [B, T], which of `tokens` are real, for prompts padded left or right.
      temperature, top_k, top_p, min_p, repetition_penalty, seed, stop_tokens: one value, or one
        a request; see `zoo.decode.sampling.request`. The default is greedy.
      stop_strings: texts that end a request when its bytes come to hold one.
      token_bytes: the bytes of each token id, needed for stop_strings.
      max_len: capacity of the cache in tokens; default what the call needs.
      drafter: proposes several tokens a step (`zoo.decode.drafter`); the tokens returned are
        the same with any.

    Returns:
      A `Generation`.

    Raises:
      ValueError: an empty or foreign prompt, one that does not fit the cache, a bad or unknown
        setting, a mesh of Explicit axis types.
    """
    with sharding.ensure_mesh(split(model)[1]):
        call = _Run(model, tokens, max_new_tokens, **options)
        call.advance()
        return call.fetch(call.prompt_length)[0]


def stream(model, tokens: Sequence, max_new_tokens, *, every: int = 16, **options
           ) -> Iterator[Generation]:
    """`generate` in pieces: yields what each `every` tokens per request add.

    Takes the arguments of `generate` and gives the same tokens, through the same executable.
    """
    if every < 1:
        raise ValueError(f"every is {every}; it must be at least 1 token")
    with sharding.ensure_mesh(split(model)[1]):
        call = _Run(model, tokens, max_new_tokens, **options)
        # The pieces run under the mesh and rules of now, whatever is ambient when one is asked.
        mesh, rules = jax.sharding.get_mesh(), sharding.ambient_rules()

    def pieces() -> Iterator[Generation]:
        start, over, given = call.prompt_length, False, 0
        while not over:
            given += every
            with sharding.use(mesh, rules):
                call.advance(given)
            piece, start, over = call.fetch(start)
            yield piece

    return pieces()
