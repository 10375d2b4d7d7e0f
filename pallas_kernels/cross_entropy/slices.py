"""The loop over slices of positions and the gradient, which all implementations share.

An implementation gives the statistics of a slice's logits and, from what it keeps of them, their
cotangents; here shards of the vocabulary are merged and both gradients made while the slice
stands.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.cross_entropy import METRICS
from pallas_kernels.dispatch import residual


class Statistics(NamedTuple):
    """Of each row's capped logits, float32 [R] but for `first`.

    Attributes:
      top: the largest.
      first: int32, the first column where it stands.
      normaliser: sum of ``exp(logit - top)``.
      at_label: the label's, 0 where the label is not among these columns.
      total: the sum of all.
    """

    top: jax.Array
    first: jax.Array
    normaliser: jax.Array
    at_label: jax.Array
    total: jax.Array


class Coefficients(NamedTuple):
    """What makes a row's cotangents of its capped logits, float32 [R].

    ``d_logit = exponential * exp(logit - top) - hit * (column is label) - spread``, where `top` is
    that of this shard's own statistics.
    """

    exponential: jax.Array
    hit: jax.Array
    spread: jax.Array


def differentiable(statistics: Callable, cotangents: Callable) -> Callable:
    """Makes the op's function from the work on one slice of R rows.

    Args:
      statistics: ``(hidden [R, D], head, labels [R], *, softcap, keep, **tiles) -> (Statistics,
        kept)``; labels are columns of this head, -1 where another shard has them. `kept` is
        None unless `keep`. Where only the first columns of this head are tokens, `columns` is
        how many; it may be more than there are, or none.
      cotangents: ``(kept, labels, Statistics, Coefficients, *, softcap, **tiles) -> d_raw``:
        [R, V] in hidden's dtype, the cotangents of the logits before the cap. It is given
        `columns` as well.

    Returns:
      ``(hidden, head, labels, weights, *, rows, z_loss, label_smoothing, softcap,
      vocab_size, vocab_axis, **tiles)``, where `rows` is R.
    """

    def slice_sums(hidden, head, labels, weights, keep, *, z_loss, label_smoothing, softcap,
                   vocab_axis, vocab_size=None, **tiles):
        """Sums of one slice by name, and with `keep` its gradients for a unit cotangent."""
        columns = head.shape[1]
        vocab, offset = columns, 0
        if vocab_axis is not None:
            vocab, offset = columns * lax.axis_size(vocab_axis), (
                lax.axis_index(vocab_axis) * columns)
            labels = labels - offset
            labels = jnp.where((labels >= 0) & (labels < columns), labels, -1)
        if vocab_size is not None:
            vocab, tiles = vocab_size, {**tiles, "columns": vocab_size - offset}
        own, kept = statistics(hidden, head, labels, softcap=softcap, keep=keep, **tiles)
        top, first, normaliser, at_label, total = own
        correct = first == labels
        if vocab_axis is not None:
            top = lax.pmax(own.top, vocab_axis)
            first = lax.pmin(jnp.where(own.top == top, own.first + offset, vocab), vocab_axis)
            correct = first == labels + offset
            normaliser, at_label, total = lax.psum(
                (normaliser * jnp.exp(own.top - top), at_label, total), vocab_axis)
            # Of all shards, only the label's own one can say so.
            correct = lax.psum(jnp.where(labels >= 0, correct, False).astype(jnp.float32),
                               vocab_axis)
        log_z = top + jnp.log(normaliser)
        terms = {"nll": log_z - at_label, "z_squared": log_z**2, "correct": correct}
        if label_smoothing:
            terms["spread"] = log_z - total / vocab
        sums = {name: jnp.sum(weights * term) for name, term in terms.items()}
        if not keep:
            return sums
        slope = weights * (1.0 + 2.0 * z_loss * log_z)
        coefficients = Coefficients(
            slope / normaliser * jnp.exp(own.top - top), weights * (1.0 - label_smoothing),
            weights * (label_smoothing / vocab))
        d_raw = cotangents(kept, labels, own, coefficients, softcap=softcap, **tiles)
        d_hidden = jnp.einsum("rv,dv->rd", d_raw, head, preferred_element_type=jnp.float32)
        d_head = jnp.einsum("rd,rv->dv", hidden, d_raw, preferred_element_type=jnp.float32)
        return sums, d_hidden.astype(hidden.dtype), d_head

    def start(options):
        names = (*METRICS, "spread") if options["label_smoothing"] else METRICS
        return dict.fromkeys(names, jnp.zeros((), jnp.float32))

    def results(sums, options):
        smooth = options["label_smoothing"]
        loss = (1.0 - smooth) * sums["nll"] + options["z_loss"] * sums["z_squared"]
        if smooth:
            loss = loss + smooth * sums["spread"]
        return loss, {name: sums[name] for name in METRICS}

    @functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
    def run(hidden, head, labels, weights, rows, static):
        options = dict(static)

        def add(sums, index):
            h, y, w = _slice(index, rows, *flat)
            return jax.tree.map(jnp.add, sums, slice_sums(h, head, y, w, False, **options)), None

        flat = _flat(rows, hidden, labels, weights)
        sums, _ = lax.scan(add, start(options), jnp.arange(_count(rows, flat[1])))
        return results(sums, options)

    def run_forward(hidden, head, labels, weights, rows, static):
        options = dict(static)

        def add(carry, index):
            h, y, w = _slice(index, rows, *flat)
            terms, d_slice, d_head = slice_sums(h, head, y, w, True, **options)
            sums, d_hidden = carry
            return (jax.tree.map(jnp.add, sums, (terms, d_head)),
                    _put(index, rows, d_slice, d_hidden)), None

        flat = _flat(rows, hidden, labels, weights)
        carry = ((start(options), jnp.zeros(head.shape, jnp.float32)), jnp.zeros_like(flat[0]))
        ((sums, d_head), d_hidden), _ = lax.scan(add, carry, jnp.arange(_count(rows, flat[1])))
        b, t, d = hidden.shape
        d_hidden = d_hidden[: b * t].reshape(b, t, d)
        return results(sums, options), (residual(d_hidden), residual(d_head.astype(head.dtype)))

    def run_backward(rows, static, residuals, cotangent):
        d_hidden, d_head = residuals
        cotangent, _ = cotangent
        vocab_axis = dict(static)["vocab_axis"]
        if vocab_axis is not None:
            # The loss is replicated over the vocabulary's shards, so shard_map hands each of
            # them its part of the cotangent.
            cotangent = lax.psum(cotangent, vocab_axis)
        return ((d_hidden * cotangent).astype(d_hidden.dtype),
                (d_head * cotangent).astype(d_head.dtype), None, None)

    run.defvjp(run_forward, run_backward)

    def cross_entropy(hidden, head, labels, weights, *, rows, **static):
        weights = weights.astype(jnp.float32)
        loss, metrics = run(hidden, head, labels, weights, rows, tuple(sorted(static.items())))
        metrics = {name: lax.stop_gradient(x)[None] for name, x in metrics.items()}
        return loss[None], jnp.sum(weights)[None], metrics

    return cross_entropy


def _flat(rows, *arrays):
    """[B, T, ...] as [max(B * T, rows), ...], padded with zeros: positions of weight 0."""
    flat = [x.reshape(-1, *x.shape[2:]) for x in arrays]
    padding = max(0, rows - flat[0].shape[0])
    return [jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) if padding else x for x in flat]


def _count(rows, labels):
    return -(-labels.shape[0] // rows)


def _first(index, rows, positions):
    """Where a slice starts. The last one ends with the positions and may overlap the one before
    it: padding would copy all of hidden."""
    return jnp.minimum(index * rows, positions - rows)


def _slice(index, rows, hidden, labels, weights):
    """One slice of `rows` positions; those that an earlier one has seen weigh nothing."""
    first = _first(index, rows, labels.shape[0])
    h, y, w = (lax.dynamic_slice_in_dim(x, first, rows) for x in (hidden, labels, weights))
    return h, y, jnp.where(first + jnp.arange(rows) >= index * rows, w, 0.0)


def _put(index, rows, d_slice, d_hidden):
    """Writes a slice's gradient, but not over what an earlier slice has written."""
    first = _first(index, rows, d_hidden.shape[0])
    new = (first + jnp.arange(rows) >= index * rows)[:, None]
    earlier = lax.dynamic_slice_in_dim(d_hidden, first, rows)
    return lax.dynamic_update_slice_in_dim(d_hidden, jnp.where(new, d_slice, earlier), first, 0)


def merge_tiles(top, first, normaliser, at_label, total):
    """Statistics of whole rows from those of tiles of columns, each [tiles, R].

    `first` counts columns from the start of the row.
    """
    whole = jnp.max(top, axis=0)
    last = jnp.iinfo(first.dtype).max
    return Statistics(whole, jnp.min(jnp.where(top == whole, first, last), axis=0),
                      jnp.sum(normaliser * jnp.exp(top - whole), axis=0),
                      jnp.sum(at_label, axis=0), jnp.sum(total, axis=0))


def rows_per_slice(positions: int, longest: int, multiple: int = 1) -> int:
    """Rows of equal slices: at most `longest`, then rounded up to a multiple.

    A slice is at most half of the positions, lest a short sequence's logits stand all at once.
    """
    longest = max(1, min(longest, -(-positions // 2)))
    slices = -(-positions // longest)
    return -(-positions // (slices * multiple)) * multiple
