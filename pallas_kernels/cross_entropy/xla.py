"""Cross-entropy for any XLA back end: a loop over slices of time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Logits held at once: about this many, but never so few tokens that re-reading the head
# dominates. A short sequence is still cut in two.
SLICE_LOGITS = 1 << 20
MIN_TOKENS = 512


def slice_length(batch: int, time: int, vocab: int) -> int:
    """Positions per slice; slices of equal length, at least two of them."""
    tokens = max(MIN_TOKENS, SLICE_LOGITS // vocab)
    longest = max(1, min(tokens // batch, -(-time // 2)))
    return -(-time // -(-time // longest))


def _slice_terms(hidden, head, labels, weights, z_loss, softcap, vocab_axis, with_gradients):
    """Sums, and gradients for a unit cotangent, of one slice [B, C, D]."""
    raw = jnp.einsum("bcd,dv->bcv", hidden, head, preferred_element_type=jnp.float32)
    logits = raw if softcap is None else softcap * jnp.tanh(raw / softcap)
    columns = head.shape[1]
    offset = 0 if vocab_axis is None else lax.axis_index(vocab_axis) * columns
    # Multiplying by a comparison vectorises; a gather and a scatter along the vocabulary do not.
    is_label = (labels - offset)[..., None] == lax.broadcasted_iota(jnp.int32, (1, 1, columns), 2)
    top = jnp.max(logits, axis=-1)
    if vocab_axis is not None:
        top = lax.pmax(top, vocab_axis)
    exponentials = jnp.exp(logits - top[..., None])
    normaliser = jnp.sum(exponentials, axis=-1)
    at_label = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
    if vocab_axis is not None:
        normaliser, at_label = lax.psum((normaliser, at_label), vocab_axis)
    log_z = top + jnp.log(normaliser)
    z_sum = jnp.sum(weights * log_z**2)
    loss = jnp.sum(weights * (log_z - at_label)) + z_loss * z_sum
    if not with_gradients:
        return loss, z_sum
    scale = weights * (1.0 + 2.0 * z_loss * log_z) / normaliser
    d_logits = exponentials * scale[..., None] - jnp.where(is_label, weights[..., None], 0.0)
    if softcap is not None:
        d_logits = d_logits * (1.0 - (logits / softcap) ** 2)
    d_logits = d_logits.astype(hidden.dtype)
    d_hidden = jnp.einsum("bcv,dv->bcd", d_logits, head, preferred_element_type=jnp.float32)
    d_head = jnp.einsum("bcd,bcv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
    return loss, z_sum, d_hidden.astype(hidden.dtype), d_head


def _sliced(hidden, labels, weights, vocab):
    """The operands as [slices, B, C, ...], padded with positions of weight 0."""
    b, t = labels.shape
    c = slice_length(b, t, vocab)
    padding = -t % c

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) if padding else x
        return jnp.swapaxes(x.reshape(b, -1, c, *x.shape[2:]), 0, 1)

    return cut(hidden), cut(labels), cut(weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _loss(hidden, head, labels, weights, z_loss, softcap, vocab_axis):
    def add(sums, piece):
        h, y, w = piece
        terms = _slice_terms(h, head, y, w, z_loss, softcap, vocab_axis, False)
        return jax.tree.map(jnp.add, sums, terms), None

    zero = jnp.zeros((), jnp.float32)
    sums, _ = lax.scan(add, (zero, zero), _sliced(hidden, labels, weights, head.shape[1]))
    return sums


def _loss_forward(hidden, head, labels, weights, z_loss, softcap, vocab_axis):
    def add(carry, piece):
        loss, z_sum, d_head = carry
        h, y, w = piece
        terms = _slice_terms(h, head, y, w, z_loss, softcap, vocab_axis, True)
        return (loss + terms[0], z_sum + terms[1], d_head + terms[3]), terms[2]

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jnp.zeros(head.shape, jnp.float32))
    (loss, z_sum, d_head), d_hidden = lax.scan(
        add, start, _sliced(hidden, labels, weights, head.shape[1])
    )
    d_hidden = jnp.swapaxes(d_hidden, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])
    d_hidden = d_hidden[:, : hidden.shape[1]]
    return (loss, z_sum), (d_hidden, d_head.astype(head.dtype), labels, weights)


def _loss_backward(z_loss, softcap, vocab_axis, residuals, cotangents):
    d_hidden, d_head, labels, weights = residuals
    cotangent = cotangents[0]
    if vocab_axis is not None:
        # The loss is replicated over the vocabulary's shards, so shard_map hands each of them
        # its part of the cotangent.
        cotangent = lax.psum(cotangent, vocab_axis)
    return (
        (d_hidden * cotangent).astype(d_hidden.dtype),
        (d_head * cotangent).astype(d_head.dtype),
        np.zeros(labels.shape, jax.dtypes.float0),
        jnp.zeros_like(weights),
    )


_loss.defvjp(_loss_forward, _loss_backward)


def cross_entropy(hidden, head, labels, weights, *, z_loss, softcap, vocab_axis):
    """See `pallas_kernels.cross_entropy.cross_entropy`: three scalars."""
    weights = weights.astype(jnp.float32)
    loss, z_sum = _loss(hidden, head, labels, weights, z_loss, softcap, vocab_axis)
    return loss, jnp.sum(weights), lax.stop_gradient(z_sum)
