"""Choosing the next token: penalties, truncation, and noise tied to the absolute position.

Every setting is data of a `Request`, so one executable serves all of them, mixed in one batch.
What only some settings need stands behind a `lax.cond` on "does any row need it"; do not vmap
these functions, or both branches run. Nothing here sorts the vocabulary.

Sampling is argmax(processed logits + Gumbel noise), with noise that depends on the request's
seed and the absolute position alone. A request's tokens therefore do not depend on its batch,
on the drafter, or on where a step begins.

Non-finite logits: NaN counts as -inf and is never chosen over a finite logit, +inf counts as the
largest float32. A row with no finite logit yields token 0, with a `log_probability` of NaN.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from zoo.decode.tree import Tree

_LARGEST = np.finfo(np.float32).max
# Logits divided by less than this may overflow, and the law is greedy long before.
_COLDEST = 1e-4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """Sampling settings of B requests; `request` builds and checks it.

    Attributes:
      temperature: float32[B]; 0 is greedy, and then top_k, top_p and min_p change nothing.
      top_k: int32[B]; keep the k most likely tokens; 0 is off.
      top_p: float32[B]; keep the fewest most likely tokens of this mass; 1 is off.
      min_p: float32[B]; keep tokens at least min_p times as likely as the likeliest; 0 is off.
      repetition_penalty: float32[B]; 1 is off.
      seed: uint32[B].
      stop_tokens: int32[B, K]; -1 fills unused places.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    seed: jax.Array
    stop_tokens: jax.Array


def request(
    batch: int,
    *,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
    repetition_penalty: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    stop_tokens: Sequence[int] | Sequence[Sequence[int]] = (),
) -> Request:
    """The settings of `batch` requests; a scalar holds for all rows, a sequence gives one a row.

    The default is greedy. Rows with the same prompt, settings and seed give the same tokens: to
    draw several answers to one prompt, give each row its own seed.

    Args:
      stop_tokens: token ids that end a request; one flat list for all rows, or one list a row.
        The arrays hold at least 4 places and always a power of two, so that requests with a few
        more or fewer stop tokens share an executable.

    Raises:
      ValueError: a value outside its range, or a sequence whose length is not `batch`.
    """
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1; pass one row per prompt")
    off = "0 turns it off"
    settings = {
        "temperature": _rows(
            batch, "temperature", temperature, np.float32,
            lambda x: (x == 0) | (x >= _COLDEST),
            f"0 (greedy) or at least {_COLDEST:g}", "use 0 for greedy decoding",
        ),
        "top_k": _rows(
            batch, "top_k", top_k, np.int32, lambda x: (x >= 0) & (x < 2**31),
            "an integer from 0 to 2**31 - 1", off,
        ),
        "top_p": _rows(
            batch, "top_p", top_p, np.float32, lambda x: (x > 0) & (x <= 1),
            "above 0 and at most 1", "1 turns it off, temperature=0 keeps the likeliest alone",
        ),
        "min_p": _rows(
            batch, "min_p", min_p, np.float32, lambda x: (x >= 0) & (x <= 1),
            "between 0 and 1", off,
        ),
        "repetition_penalty": _rows(
            batch, "repetition_penalty", repetition_penalty, np.float32, lambda x: x > 0,
            "above 0", "1 turns it off",
        ),
        "seed": _rows(
            batch, "seed", seed, np.uint32, lambda x: (x >= 0) & (x < 2**32),
            "an integer from 0 to 2**32 - 1", "take it modulo 2**32",
        ),
    }  # fmt: skip
    settings["stop_tokens"] = _stop_tokens(batch, stop_tokens)
    return Request(**jax.device_put(settings))


def mark(seen: jax.Array, tokens: jax.Array, valid: jax.Array) -> jax.Array:
    """`seen` bool[B, V] with the tokens int32[B, T] added where valid bool[B, T] holds."""
    batch, vocab = seen.shape
    rows = jnp.arange(batch)[:, None]
    return seen.at[rows, _index(tokens, valid, vocab)].set(True, mode="drop")


def process(
    logits: jax.Array, request: Request, seen: jax.Array, tokens: jax.Array, tree: Tree
) -> jax.Array:
    """Logits after repetition penalty, temperature, top-k, top-p and min-p, in this order.

    The order and the definitions are those of Hugging Face transformers; each truncation looks
    at the distribution that the one before has left, renormalised. Tokens that are as likely as
    the last one kept are kept too, so top-k may keep more than k and top-p more than its mass
    asks for; at least one token always stays. Greedy rows get the penalty alone.

    The penalty (Keskar et al. 2019, arXiv:1909.05858, in the sign-aware form) multiplies
    negative logits and divides the others, once for each token seen: those of `seen`, and in
    each tree row those of its own path, the root and the row itself included.

    Args:
      logits: [B, N, V], bfloat16 or float32; computed in float32.
      request: settings of the B requests.
      seen: bool[B, V], tokens of the prompt and of what was generated before the root.
      tokens: int32[B, N], the token of each tree row.
      tree: B trees of N rows.

    Returns:
      float32[B, N, V], -inf where a token is excluded.
    """
    return _truncate(_penalise(logits, request, seen, tokens, tree), request)


def gumbel(seed: jax.Array, position: jax.Array, vocab: int) -> jax.Array:
    """Standard Gumbel noise float32[B, N, V] for seed uint32[B] and position int32[B, N].

    Each row's noise is a function of (seed, position, vocab) alone. Its generator is fixed to
    threefry, whatever `jax_default_prng_impl` says: others give noise that depends on the batch.
    """

    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.bits(key, (vocab,), jnp.uint32)

    bits = jax.vmap(jax.vmap(row, (None, 0)))(seed, position)
    # All 32 bits stay distinct near 0, where log1p turns them into the large values that decide
    # an argmax. `jax.random.gumbel` has 23 there: over 100k tokens its maxima tie, which favours
    # low ids. The upper clamp keeps the noise finite.
    uniform = (bits.astype(jnp.float32) + 0.5) * np.float32(2.0**-32)
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, np.float32(1 - 2.0**-24))))


def sample(
    logits: jax.Array,
    request: Request,
    seen: jax.Array,
    tokens: jax.Array,
    tree: Tree,
    position: jax.Array,
) -> jax.Array:
    """The token int32[B, N] that follows each tree row.

    Greedy rows take the largest penalised logit (the lowest id among equals). The others take
    the argmax of processed logits + Gumbel noise, which is an exact draw from softmax(processed)
    (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030).

    Args:
      logits, request, seen, tokens, tree: as in `process`.
      position: int32[B, N], absolute position in the sequence of the token drawn.
    """
    drawing = jnp.any(request.temperature > 0)

    def draw(scores: jax.Array) -> jax.Array:
        noise = gumbel(request.seed, position, scores.shape[-1])
        scores = _truncate(scores, request)
        return _argmax(jnp.where(_column(request.temperature) > 0, scores + noise, scores))

    def penalised(logits: jax.Array) -> jax.Array:
        scores = _penalise(logits, request, seen, tokens, tree)
        return jax.lax.cond(drawing, draw, _argmax, scores)

    # Plain greedy decoding reads the logits once, in their own dtype, and writes nothing.
    needed = drawing | jnp.any(request.repetition_penalty != 1)
    return jax.lax.cond(needed, penalised, _argmax, logits)


def log_probability(logits: jax.Array, token: jax.Array) -> jax.Array:
    """log softmax(logits)[token] in float32: logits [..., V], token int32[...] -> [...].

    The law is the model's own: temperature 1, before penalties and truncation. NaN where the
    logits hold NaN or +inf, or are all -inf.
    """
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0].astype(jnp.float32)
    largest = jnp.max(logits, axis=-1).astype(jnp.float32)
    shifted = logits.astype(jnp.float32) - largest[..., None]
    return chosen - largest - jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))


def _penalise(
    logits: jax.Array, request: Request, seen: jax.Array, tokens: jax.Array, tree: Tree
) -> jax.Array:
    """Logits in float32 without NaN, after the repetition penalty."""
    logits = logits.astype(jnp.float32)
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
    batch, rows, vocab = logits.shape
    penalty = _column(request.repetition_penalty)

    def apply(logits: jax.Array) -> jax.Array:
        def penalised(x: jax.Array) -> jax.Array:
            return jnp.where(x < 0, x * penalty, x / penalty)

        out = jnp.where(seen[:, None, :], penalised(logits), logits)
        # Path tokens are scattered from the raw logits, so that a token both in `seen` and on
        # the path, or twice on the path, is penalised once; N^2 entries, not [N, N, V].
        index = _index(tokens[:, None, :], tree.ancestors, vocab)
        chosen = jnp.take_along_axis(logits, jnp.minimum(index, vocab - 1), axis=-1)
        b = jnp.arange(batch)[:, None, None]
        n = jnp.arange(rows)[None, :, None]
        return out.at[b, n, index].set(penalised(chosen), mode="drop")

    return jax.lax.cond(jnp.any(penalty != 1), apply, lambda x: x, logits)


def _truncate(logits: jax.Array, request: Request) -> jax.Array:
    """Logits without NaN after temperature, top-k, top-p and min-p; greedy rows unchanged."""
    drawn = request.temperature > 0
    temperature = jnp.where(drawn, request.temperature, 1)
    top_k = jnp.where(drawn, request.top_k, 0)
    top_p = jnp.where(drawn, request.top_p, 1)
    min_p = jnp.where(drawn, request.min_p, 0)

    logits = jnp.minimum(logits / _column(temperature), _LARGEST)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    everything = jnp.full_like(largest, -jnp.inf)

    def by_count(_: None) -> jax.Array:
        bound = jnp.where(top_k > 0, top_k.astype(jnp.float32), jnp.inf)
        return _threshold(logits, np.float32(1), _column(bound))

    least = jax.lax.cond(jnp.any(top_k > 0), by_count, lambda _: everything, None)

    def by_mass(_: None) -> jax.Array:
        mass = jnp.exp(logits - jnp.maximum(largest, -_LARGEST))
        mass = jnp.where(logits >= least, mass, 0)
        bound = _column(top_p) * jnp.sum(mass, axis=-1, keepdims=True)
        return _threshold(logits, mass, jnp.where(_column(top_p) < 1, bound, jnp.inf))

    least = jnp.maximum(
        least, jax.lax.cond(jnp.any(top_p < 1), by_mass, lambda _: everything, None)
    )
    least = jnp.maximum(least, largest + jnp.log(_column(min_p)))
    return jnp.where(logits >= least, logits, -jnp.inf)


def _threshold(values: jax.Array, weights: jax.typing.ArrayLike, bound: jax.Array) -> jax.Array:
    """The smallest finite t[..., 1] for which the weights of values above t sum below `bound`.

    `values >= t` are then the fewest largest values whose weights reach the bound, ties with
    the last of them included, or all but -inf where these do not reach it together. Exact: a
    bisection over the bit patterns of float32 ordered as their values, 32 passes over the
    values. The sums fall as t grows even after rounding, as every pass adds in the same order.
    """

    def below(t: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(values > t, weights, 0), axis=-1, keepdims=True) < bound

    def narrow(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = low + (high - low) // 2
        found = below(_value(middle))
        return jnp.where(found, low, middle), jnp.where(found, middle, high)

    high = jnp.max(values, axis=-1, keepdims=True)
    ends = (_rank(jnp.full_like(high, -jnp.inf)), _rank(high))
    _, high = jax.lax.fori_loop(0, 32, narrow, ends)
    return _value(high)


def _rank(x: jax.Array) -> jax.Array:
    """The uint32 image of float32 that keeps its order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))


def _value(rank: jax.Array) -> jax.Array:
    """The float32 of a rank: the inverse of `_rank`."""
    bits = jnp.where(rank >> 31 == 1, rank ^ np.uint32(1 << 31), ~rank)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _argmax(scores: jax.Array) -> jax.Array:
    """Index int32[...] of the largest of scores [..., V], NaN counting as -inf."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def _column(x: jax.Array) -> jax.Array:
    """x[B] as [B, 1, 1], beside [B, N, V]."""
    return x[:, None, None]


def _index(tokens: jax.Array, valid: jax.Array, vocab: int) -> jax.Array:
    """Tokens as indices, those not valid or negative sent past the end for a scatter to drop."""
    return jnp.where(valid & (tokens >= 0), tokens, vocab)


def _rows(
    batch: int,
    name: str,
    value: object,
    dtype: type[np.generic],
    allowed: Callable[[np.ndarray], np.ndarray],
    constraint: str,
    remedy: str,
) -> np.ndarray:
    """`value` as dtype[batch] after its checks."""
    given = np.asarray(value)
    integer = np.issubdtype(dtype, np.integer)
    if given.dtype.kind in "iuf" and not integer:
        with np.errstate(over="ignore", under="ignore"):
            given = given.astype(dtype)
    if given.shape not in ((), (batch,)):
        raise ValueError(
            f"{name} has shape {given.shape}; it must be a scalar or one value for each of the "
            f"{batch} requests; pass a scalar to set all rows"
        )
    right = given.dtype.kind in ("iu" if integer else "f") and allowed(given) & np.isfinite(given)
    if not np.all(right):
        at = "" if not given.shape or right is False else f"[{np.argmin(right)}]"
        shown = given[np.argmin(right)] if at else value
        raise ValueError(f"{name}{at}={shown!s}: must be {constraint}; {remedy}")
    return np.broadcast_to(given.astype(dtype), (batch,))


def _stop_tokens(batch: int, value: Sequence[int] | Sequence[Sequence[int]]) -> np.ndarray:
    """int32[batch, K] of the stop tokens, padded with -1; K a power of two, at least 4."""
    if isinstance(value, str) or not np.iterable(value):
        raise ValueError(f"stop_tokens={value!s}: must be a list of token ids; pass [{value!s}]")
    nested = any(np.iterable(x) for x in value)
    lists = list(value) if nested else [value] * batch
    if len(lists) != batch or not all(np.iterable(x) for x in lists):
        raise ValueError(
            f"stop_tokens={value!s}: must hold token ids, or one list of them for each of the "
            f"{batch} requests; pass one kind or the other"
        )
    longest = max(len(x) for x in lists)
    out = np.full((batch, 1 << max(2, (longest - 1).bit_length())), -1, np.int32)
    for b, ids in enumerate(lists):
        for k, token in enumerate(ids):
            if not isinstance(token, (int, np.integer)) or not 0 <= token < 2**31:
                raise ValueError(
                    f"stop_tokens[{b}][{k}]={token!s}: must be a token id, an integer from 0 to "
                    "2**31 - 1; look the id up in the tokenizer"
                )
            out[b, k] = token
    return out
