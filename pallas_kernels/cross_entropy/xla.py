"""Cross-entropy for any XLA back end: float32 logits of a slice of positions at a time."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.cross_entropy.slices import Statistics, differentiable, rows_per_slice
from pallas_kernels.dispatch import Target, refuse_other_than_floats

# platform -> about so many logits are held at once, but never so few rows; and the multiple of
# which rows are. On a CPU slices stay in its caches. Elsewhere every slice adds to D x V float32 in
# memory, which takes as long as its product where rows are 750 (v5p) or 820 (H200). A TPU gets
# fewer, for the room: of 16k positions 1/34 of the logits (libtpu 0.0.50 counts them twice).
SLICES = {"cpu": (1 << 20, 512, 1), "tpu": (1 << 26, 496, 16), "gpu": (1 << 27, 1024, 16)}


def slice_rows(positions: int, vocab: int, platform: str) -> int:
    """Rows of a slice on a platform."""
    logits, fewest, multiple = SLICES[platform]
    return rows_per_slice(positions, max(fewest, logits // vocab), multiple)


def _statistics(hidden, head, labels, *, softcap, keep, columns=None):
    logits = jnp.einsum("rd,dv->rv", hidden, head, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    column = lax.broadcasted_iota(jnp.int32, (1, head.shape[1]), 1)
    inside = logits
    if columns is not None:
        inside = jnp.where(column < columns, logits, 0.0)
        # Finite: a shard may have no token at all.
        logits = jnp.where(column < columns, logits, -1e30)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - top)
    # Comparisons vectorise; a gather and a scatter along the vocabulary do not.
    found = Statistics(
        top[:, 0],
        jnp.min(jnp.where(logits == top, column, head.shape[1]), axis=-1),
        jnp.sum(exponentials, axis=-1),
        jnp.sum(jnp.where(labels[:, None] == column, logits, 0.0), axis=-1),
        jnp.sum(inside, axis=-1))
    return found, (logits, exponentials, hidden.dtype) if keep else None


def _cotangents(kept, labels, own, coefficients, *, softcap, columns=None):
    logits, exponentials, dtype = kept
    column = lax.broadcasted_iota(jnp.int32, (1, logits.shape[1]), 1)
    exponential, hit, spread = (c[:, None] for c in coefficients)
    d_logits = exponentials * exponential - jnp.where(labels[:, None] == column, hit, 0.0) - spread
    if softcap is not None:
        d_logits = d_logits * (1.0 - (logits / softcap) ** 2)
    if columns is not None:
        d_logits = jnp.where(column < columns, d_logits, 0.0)
    return d_logits.astype(dtype)


_cross_entropy = differentiable(_statistics, _cotangents)


def supports(target, hidden, head, *labels_and_weights, **options):
    """Everything but integers."""
    return refuse_other_than_floats(hidden=hidden, head=head)


def candidates(hidden, head, labels, weights, **options):
    """Slices of other lengths."""
    positions = labels.size
    return [{"rows": rows_per_slice(positions, n, 128)} for n in (256, 512, 1024, 2048)]


def cross_entropy(hidden, head, labels, weights, *, rows=None, **options):
    """See `pallas_kernels.cross_entropy.cross_entropy`."""
    if rows is None:
        rows = slice_rows(labels.size, head.shape[1], Target.ambient().platform)
    return _cross_entropy(hidden, head, labels, weights, rows=rows, **options)
