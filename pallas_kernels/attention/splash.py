"""Attention by jax's splash kernels for TPUs: a peer to measure against, chosen where it is faster.

As in `tpu.py` scores stay in VMEM, forward and backward, and tiles that the causal mask or the
window empties are skipped. Its layout [B, H, T, K] costs a pass over q, k, v and o. The floor in
bytes and FLOPs is that of `tpu.py`.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.attention import MASKED
from pallas_kernels.dispatch import RESIDUAL, interpreting

LANES = 128
BLOCK = 512


def supports(target, query, key, value, query_segments=None, key_segments=None, block_mask=None,
             **options):
    """bfloat16, and what static masks and segments can say."""
    dtypes = {jnp.dtype(x.dtype) for x in (query, key, value)}
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        names = ", ".join(sorted(str(d) for d in dtypes))
        return f"operands of {names} must be bfloat16, to which splash rounds its products"
    if block_mask is not None:
        return "block_mask must be None: splash has only static masks"
    if options.get("partial"):
        return "partial=True must be False: splash does not differentiate the row sums"
    if not options["causal"] and key.shape[1] % LANES:
        return f"{key.shape[1]} keys must be a multiple of {LANES} where nothing is causal"
    return None


def candidates(query, key, value, *segments_and_mask, **options):
    """Tile sizes worth timing."""
    lengths = query.shape[1], key.shape[1]
    tiles = {tuple(_tile(n, most) for n, most in zip(lengths, pair, strict=True)): pair
             for pair in ((512, 512), (1024, 512), (512, 1024), (1024, 1024), (256, 512))}
    return [{"block_q": q, "block_k": k} for q, k in tiles.values()]


def _padded(length: int) -> int:
    return -(-length // LANES) * LANES


def _tile(length: int, most: int) -> int:
    """The largest tile up to `most` that divides a padded length."""
    padded = _padded(length)
    return max(n for n in range(LANES, max(most, LANES) + 1, LANES) if padded % n == 0)


def attention(query, key, value, query_segments=None, key_segments=None, block_mask=None, *, scale,
              causal=True, window=None, softcap=None, partial=False, block_q=BLOCK, block_k=BLOCK):
    """See `pallas_kernels.attention.attention`."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    t, h = query.shape[1:3]
    s = key.shape[1]
    shape = _padded(t), _padded(s)
    if window is not None:
        mask = masks.LocalMask(shape, (window - 1, 0), 0)
    else:
        mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    bq, bk = _tile(t, block_q), _tile(s, block_k)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * h), head_shards=1, q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=bq, block_kv=bk, block_q_dkv=bq, block_kv_dkv=bk, block_q_dq=bq,
            block_kv_dq=bk),
        attn_logits_soft_cap=softcap, residual_checkpoint_name=RESIDUAL)

    def rows(x, length):
        x = jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        return x if x.ndim == 2 else jnp.swapaxes(x, 1, 2)

    q = (query.astype(jnp.float32) * scale).astype(query.dtype)
    q, k, v = rows(q, shape[0]), rows(key, shape[1]), rows(value, shape[1])
    operands = (q, k, v)
    if query_segments is not None:
        # Where a row sees no key, all its weight goes to a sink below any score: it gives 0.
        kernel = functools.partial(kernel, sinks=jnp.full(h, MASKED, jnp.float32))
        operands += splash.SegmentIds(
            rows(query_segments, shape[0]), rows(key_segments, shape[1])),
    if interpreting():
        # The interpreter miscounts the axes of a batched grid.
        o = jax.lax.map(lambda one: kernel(*one), operands)
    else:
        o = jax.vmap(kernel)(*operands)
    return jnp.swapaxes(o, 1, 2)[:, :t]
