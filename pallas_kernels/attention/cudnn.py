"""cuDNN's flash attention, through `jax.nn.dot_product_attention`.

Why it exists: plain causal or full attention in half precision is what NVIDIA tunes for each of
its chips.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import residual

# cuDNN's flash attention needs Ampere or newer.
_CHIPS = ("a100", "h100", "h200", "b200")
_DTYPES = ("bfloat16", "float16")
# JAX lets wider heads through only where the machine that compiles has a Hopper itself.
_WIDEST = 128


def supports(target, query, key, value, query_segments, key_segments, block_mask, *, scale, causal,
             window, softcap, partial):
    """Causal, windowed or full attention in half precision; no data in the mask."""
    if target.chip not in _CHIPS:
        return f"{target.chip} is none of {', '.join(_CHIPS)}"
    dtypes = [str(x.dtype) for x in (query, key, value)]
    if len(set(dtypes)) > 1 or dtypes[0] not in _DTYPES:
        return f"dtypes {', '.join(dtypes)} must all be {' or all '.join(_DTYPES)}"
    k, v = query.shape[-1], value.shape[-1]
    if k != v:
        return f"head sizes {k} of keys and {v} of values must be equal"
    if k > _WIDEST or k % 8:
        return f"head size {k} must be a multiple of 8, at most {_WIDEST}"
    if query_segments is not None:
        return "segments would have to become a dense [T, S] mask"
    if block_mask is not None:
        return "block_mask would have to become a dense [T, S] mask"
    if softcap is not None:
        return f"softcap={softcap}: it has none"
    if partial:
        return "partial: it rounds the logarithms of the rows' sums to the operands' dtype"
    return None


def attention(query, key, value, query_segments, key_segments, block_mask, *, scale, causal, window,
              softcap, partial):
    """See `pallas_kernels.attention.attention`."""
    b, t, s = *query.shape[:2], key.shape[1]
    lengths = {}
    if t % 2 or s % 2:
        # JAX refuses odd lengths in the backward pass. Causal queries see no key past the end.
        query, key, value = (jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)])
                             for x in (query, key, value))
        if not causal:
            lengths = {"query_seq_lengths": jnp.full(b, t, jnp.int32),
                       "key_value_seq_lengths": jnp.full(b, s, jnp.int32)}
    o = jax.nn.dot_product_attention(
        query, key, value, scale=scale, is_causal=causal, implementation="cudnn",
        local_window_size=None if window is None else (window - 1, 0), **lengths)
    return residual(o[:, :t])
