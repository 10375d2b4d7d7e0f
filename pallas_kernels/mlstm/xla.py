"""The matrix LSTM for any XLA back end: a loop over chunks, forward and backward.

Memory is linear in the length. The backward pass makes the states between chunks and the scores
inside them again; what it keeps of the forward pass is h and a number a row.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mlstm.chunks import NEVER, Gates, Grads, differentiable, split

# A chunk's scores cost as much as the state's products where it is as long as 2 K V / (K + V).
CHUNK, SHORT_CHUNK, SHORT = 128, 64, 512


def supports(target, *operands, **options):
    """Everything."""
    return None


def candidates(query, *operands, **options):
    """Chunks of other lengths."""
    return [{"chunk": n} for n in (32, 64, 128, 256) if n <= max(32, query.shape[1])]


def _split(x, count, chunk):
    """[B, T, H, ...] as [chunks, B, H, L, ...]."""
    short = count * chunk - x.shape[1]
    if short:
        x = jnp.pad(x, ((0, 0), (0, short), (0, 0), (0, 0)))
    x = x.reshape(x.shape[0], count, chunk, *x.shape[2:])
    return jnp.transpose(x, (1, 0, 3, 2, 4))


def _join(x, t):
    """The inverse of `_split`."""
    x = jnp.transpose(x, (1, 0, 3, 2, 4))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :t]


def _by_chunk(x):
    """[B, H, chunks, ...] as [chunks, B, H, ...]."""
    return jnp.moveaxis(x, 2, 0)


def _weights(gates):
    """[B, H, L, L] of one chunk."""
    exponent = (gates.coarse[..., :, None] - gates.coarse[..., None, :]) + (
        gates.row[..., :, None] - gates.column[..., None, :])
    past = jnp.tri(exponent.shape[-1], dtype=bool)
    return jnp.exp(jnp.where(past, exponent, NEVER))


class _Products:
    """Einsums over [B, H, ...] whose operands are rounded to one dtype and whose sums are not."""

    def __init__(self, operand, sums):
        self.operand, self.sums = operand, sums

    def __call__(self, spec, one, two):
        return jnp.einsum(spec, one.astype(self.operand), two.astype(self.operand),
                          preferred_element_type=self.sums)


def _advance(product, cell, normalizer, k, v, gates):
    """The state after a chunk."""
    written = gates.write[..., None] * k
    return (gates.keep[..., None, None] * cell + product("bhlk,bhlv->bhkv", written, v),
            gates.keep[..., None] * normalizer + jnp.sum(written, axis=2))


def _forward(query, key, value, cell, normalizer, gates, *, chunk, eps):
    count = gates.keep.shape[2]
    product = _Products(value.dtype, cell.dtype)

    def visit(state, x):
        q, k, v, own = x
        cell, normalizer = state
        scores = product("bhik,bhjk->bhij", q, k) * _weights(own)
        sums = product("bhij,bhjv->bhiv", scores, v)
        sums += own.read[..., None] * product("bhlk,bhkv->bhlv", q, cell)
        total = jnp.sum(scores, axis=-1) + own.read * jnp.einsum(
            "bhlk,bhk->bhl", q.astype(cell.dtype), normalizer)
        inverse = 1.0 / (jnp.maximum(jnp.abs(total), own.floor) + eps)
        h = (sums * inverse[..., None]).astype(value.dtype)
        return _advance(product, cell, normalizer, k, v, own), (h, total)

    xs = (*(_split(x, count, chunk) for x in (query, key, value)),
          Gates(*map(_by_chunk, gates)))
    (cell, normalizer), (h, total) = lax.scan(visit, (cell, normalizer), xs)
    t = query.shape[1]
    total = jnp.moveaxis(total, 0, 2).reshape(*gates.keep.shape[:2], -1)[..., :t]
    return _join(h, t), total, cell, normalizer


def _backward(query, key, value, cell, normalizer, gates, d_h, inverse, d_total, d_cell,
              d_normalizer, *, chunk):
    count, t, sums = gates.keep.shape[2], query.shape[1], cell.dtype
    product = _Products(value.dtype, sums)
    q, k, v, d_h = (_split(x, count, chunk) for x in (query, key, value, d_h))
    own = Gates(*map(_by_chunk, gates))
    inverse, d_total = (
        _by_chunk(split(x, count, chunk)) for x in (inverse, d_total))

    def state(carry, x):
        return _advance(product, *carry, *x), carry

    _, states = lax.scan(state, (cell, normalizer), (k, v, own))

    def visit(carry, x):
        d_cell, d_normalizer = carry
        q, k, v, d_h, own, inverse, d_total, (cell, normalizer) = x
        weights = _weights(own)
        d_sums = inverse[..., None] * d_h
        scores = product("bhik,bhjk->bhij", q, k) * weights
        d_scores = weights * (product("bhiv,bhjv->bhij", d_sums, v) + d_total[..., None])
        d_q = product("bhij,bhjk->bhik", d_scores, k) + own.read[..., None] * (
            product("bhlv,bhkv->bhlk", d_sums, cell)
            + d_total[..., None] * normalizer[:, :, None])
        d_k = product("bhij,bhik->bhjk", d_scores, q)
        d_k_written = own.write[..., None] * (
            product("bhlv,bhkv->bhlk", v, d_cell) + d_normalizer[:, :, None])
        d_v = product("bhij,bhiv->bhjv", scores, d_sums) + product(
            "bhlk,bhkv->bhlv", own.write[..., None] * k, d_cell)
        kept = own.keep * (jnp.sum(d_cell * cell, (2, 3)) + jnp.sum(d_normalizer * normalizer, 2))
        read = own.read[..., None] * q
        carry = (own.keep[..., None, None] * d_cell + product("bhlk,bhlv->bhkv", read, d_sums),
                 own.keep[..., None] * d_normalizer + jnp.sum(d_total[..., None] * read, 2))
        rows, columns, written = (jnp.sum(a * b, -1)
                                  for a, b in ((q, d_q), (k, d_k), (k, d_k_written)))
        out = (d_q.astype(query.dtype), (d_k + d_k_written).astype(key.dtype),
               d_v.astype(value.dtype), rows, columns, written, kept)
        return carry, out

    carry, out = lax.scan(visit, (d_cell, d_normalizer),
                          (q, k, v, d_h, own, inverse, d_total, states), reverse=True)
    d_q, d_k, d_v, *scalars = out
    return Grads(_join(d_q, t), _join(d_k, t), _join(d_v, t), *carry,
                 *(jnp.moveaxis(x, 0, 2) for x in scalars))


_mlstm = differentiable(_forward, _backward)


def mlstm(*operands, chunk=None, **options):
    """See `pallas_kernels.mlstm.mlstm`; a sequence shorter than a chunk is one chunk."""
    t = operands[0].shape[1]
    if chunk is None:
        chunk = CHUNK if t > SHORT else SHORT_CHUNK
    return _mlstm(*operands, chunk=min(chunk, t), **options)
