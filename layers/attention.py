"""Softmax attention: multi-head, grouped, windowed, self or cross, with a block-read KV cache."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

import sharding
from layers.linear import Linear
from layers.mixer import Rows, State, state, valid_count
from layers.norm import Norm, Normalize
from layers.rope import Rope
from pallas_kernels.attention import attention

MASKED = -1e30

# Cache slots read at a time while decoding: the cost of a token follows the tokens in use, not
# the cache's capacity. Capacities are multiples of it.
CACHE_BLOCK = 128

# Up to so many rows are written to a cache slice by slice, more by a scatter.
FEW_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Attention:
    """A config of attention.

    Attributes:
      num_heads: query heads.
      num_kv_heads: key and value heads; num_heads for multi-head, 1 for multi-query attention.
      head_dim: width of a query or key head; v_head_dim that of a value head (default: the same).
      rope: rotary embedding of queries and keys, or None.
      window: a token sees itself and the window - 1 tokens before it; None: all before it.
      qk_norm: RMSNorm over each query and key head, before rope, or None.
      softcap: scores become softcap * tanh(scores / softcap).
      scale: factor on the scores; default head_dim ** -0.5.
      qkv_bias, out_bias: biases on the input and output projections.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    rope: Rope | None = None
    window: int | None = None
    qk_norm: Norm | None = None
    softcap: float | None = None
    scale: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self):
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"attention.{name} is {getattr(self, name)}; it must be >= 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"attention.num_heads is {self.num_heads}, which does not divide by "
                f"attention.num_kv_heads = {self.num_kv_heads}; use a divisor of "
                f"{self.num_heads}, e.g. {self.num_heads}"
            )
        if self.rope is not None and self.head_dim % 2:
            raise ValueError(
                f"attention.head_dim is {self.head_dim}; rope rotates pairs, so make it even"
            )
        for name in ("window", "v_head_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"attention.{name} is {getattr(self, name)}; it must be >= 1, "
                                 "or none")
        if self.qk_norm is not None and getattr(self.qk_norm, "kind", None) != "rms":
            raise ValueError(f"attention.qk_norm is {self.qk_norm}; it must be a Norm of kind "
                             "'rms', or none")
        for name in ("softcap", "scale"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"attention.{name} is {getattr(self, name)}; it must be "
                                 "positive, or none")

    @property
    def value_dim(self) -> int:
        """Width of a value head."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    def build(self, width: int, *, gain: float, depth: float | jax.Array = 0.0, key: jax.Array,
              dtype) -> "AttentionMixer":
        """See `layers.mixer.MixerConfig`; layers of all depths start alike."""
        return AttentionMixer(self, width, gain=gain, key=key, dtype=dtype)

    def flops_per_token(self, width: int, length: int) -> float:
        """Projections, and scores and values over the keys a causal query sees on average."""
        heads, groups, k, v = self.num_heads, self.num_kv_heads, self.head_dim, self.value_dim
        projections = 2 * width * (heads * k + groups * (k + v) + heads * v)
        window = min(length, self.window or length)
        seen = (window * (window + 1) / 2 + (length - window) * window) / length
        return projections + 2 * heads * (k + v) * seen


def _row_major(x: jax.Array) -> jax.Array:
    """Pins a cache's layout: left to itself, XLA's TPU back end writes in another one than it
    reads, and copies the whole cache at each step in between."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


@state
class KVCache(State):
    """Keys and values of the tokens so far, in slots used as a ring.

    Attributes:
      key: [B, G, S, K], rotated. A stack's has a leading layer axis.
      value: [B, G, S, V].
      position: int32 [B, S], the absolute position that a slot holds, -1 where empty.
      length: int32 [B], tokens so far.
      layer: which layer of a stacked cache this is a view of; None: the whole.
    """

    key: jax.Array
    value: jax.Array
    position: jax.Array
    length: jax.Array
    layer: jax.Array | None = None

    def at(self, layer) -> Self:
        return dataclasses.replace(
            self,
            length=lax.dynamic_index_in_dim(self.length, layer, 0, False),
            layer=jnp.asarray(layer, jnp.int32),
        )

    @property
    def slots(self) -> int:
        """S, the capacity."""
        return self.key.shape[-2]

    def block(self, index: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Slots index*size.. of this layer: key [B,G,size,K], value [B,G,size,V], position."""

        def read(x, axis):
            if self.layer is not None:
                starts = [jnp.int32(0)] * x.ndim
                starts[0], starts[axis] = self.layer, index * size
                sizes = list(x.shape)
                sizes[0], sizes[axis] = 1, size
                return lax.dynamic_slice(x, starts, sizes)[0]
            return lax.dynamic_slice_in_dim(x, index * size, size, axis)

        return read(self.key, self.key.ndim - 2), read(self.value, self.value.ndim - 2), read(
            self.position, self.position.ndim - 1)

    def apply(self, update) -> Self:
        return self.write(*update)

    def write(self, key, value, position, valid, length) -> Self:
        """Stores keys [..., B, W, G, K] and values [..., B, W, G, V] at `position` [..., B, W].

        Only those of `valid` [..., B, W] are stored. The leading axis is the layers' in a stack.
        The valid positions of one request are distinct and lie within S of each other.
        """
        batch, width = position.shape[-2:]
        if batch * width <= FEW_ROWS:
            store = functools.partial(self._update_slices, position % self.slots, valid)
        else:
            # A slot past the end is dropped; the offsets keep dropped indices distinct.
            slot = jnp.where(valid, position % self.slots, self.slots + jnp.arange(width))
            store = functools.partial(self._scatter, slot)
        return dataclasses.replace(
            self,
            key=store(self.key, jnp.swapaxes(key, -3, -2)),
            value=store(self.value, jnp.swapaxes(value, -3, -2)),
            position=store(self.position[..., None, :, None], position[..., None, :, None])[
                ..., 0, :, 0],
            length=length,
        )

    @staticmethod
    def _scatter(slot, buffer, rows):
        """`rows` [..., B, G, W, D] into `buffer` [..., B, G, S, D] at `slot` [..., B, W]."""
        if slot.ndim > 2:
            return jax.vmap(KVCache._scatter)(slot, buffer, rows)
        request = jnp.arange(slot.shape[0])[:, None]
        return _row_major(_row_major(buffer).at[request, :, slot].set(
            jnp.swapaxes(rows, 1, 2).astype(buffer.dtype), mode="drop", unique_indices=True))

    @staticmethod
    def _update_slices(slot, valid, buffer, rows):
        """The same for few rows, one after the other, where XLA's scatter costs more."""
        batch, width = slot.shape[-2:]
        # All layers of a stack hold a request's token in the same slot.
        slot, valid = (x.reshape(-1, batch, width)[0] for x in (slot, valid))
        for b in range(batch):
            for w in range(width):
                start = [0] * (buffer.ndim - 4) + [b, 0, slot[b, w], 0]
                new = rows[..., b : b + 1, :, w : w + 1, :].astype(buffer.dtype)
                old = lax.dynamic_slice(buffer, start, new.shape)
                buffer = lax.dynamic_update_slice(buffer, jnp.where(valid[b, w], new, old), start)
                buffer = _row_major(buffer)
        return buffer


@state
class ContextCache(State):
    """Keys [B, S, G, K] and values [B, S, G, V] of an encoder's output, for cross-attention."""

    key: jax.Array
    value: jax.Array

    def apply(self, update) -> Self:
        return self


class AttentionMixer(nnx.Module):
    """Attention under the mixer contract of `layers.mixer`.

    With a `context` its keys and values come from there, unrotated and unmasked.
    """

    def __init__(self, config: Attention, width: int, *, gain: float, key: jax.Array, dtype):
        self.config = config
        h, g, k, v = config.num_heads, config.num_kv_heads, config.head_dim, config.value_dim
        keys = jax.random.split(key, 4)

        def project(heads, size, axis, key):
            return Linear("btd,dhk->bthk", (width, heads, size), ("embed", axis, "head_dim"),
                          ("batch", "seq", axis, "head_dim"), bias=config.qkv_bias, key=key,
                          dtype=dtype)

        self.query = project(h, k, "heads", keys[0])
        self.key = project(g, k, "kv_heads", keys[1])
        self.value = project(g, v, "kv_heads", keys[2])
        self.out = Linear("bthv,hvd->btd", (h, v, width), ("heads", "head_dim", "embed"),
                          ("batch", "seq", "embed"), bias=config.out_bias, gain=gain,
                          key=keys[3], dtype=dtype)

        def head_norm(axis):
            if config.qk_norm is None:
                return None
            return Normalize(config.qk_norm, k, axis="head_dim",
                             rows=("batch", "seq", axis), key=key, dtype=dtype)

        self.query_norm, self.key_norm = head_norm("heads"), head_norm("kv_heads")

    @property
    def _scale(self) -> float:
        scale = self.config.scale
        return self.config.head_dim**-0.5 if scale is None else scale

    def _queries(self, x, positions):
        q = self.query(x)
        q = q if self.query_norm is None else self.query_norm(q)
        if self.config.rope is None or positions is None:
            return q
        return self.config.rope(q, positions)

    def _keys_values(self, x, positions):
        k, v = self.key(x), self.value(x)
        k = k if self.key_norm is None else self.key_norm(k)
        if self.config.rope is None or positions is None:
            return k, v
        return self.config.rope(k, positions), v

    def _attend(self, q, k, v, query_segments, key_segments, **mask):
        repeat = self.config.num_heads // self.config.num_kv_heads
        if sharding.shards("kv_heads") != sharding.shards("heads") and repeat > 1:
            # Heads are spread wider than key heads: each shard needs its own copy of its keys.
            k, v = (sharding.constrain(x, "batch", "seq", None, "head_dim") for x in (k, v))
            k, v = (jnp.repeat(x, repeat, axis=2) for x in (k, v))
            k, v = (sharding.constrain(x, "batch", "seq", "heads", "head_dim") for x in (k, v))
        rules = sharding.ambient_rules()
        out = sharding.local(attention, q, k, v, query_segments, key_segments, scale=self._scale,
                             softcap=self.config.softcap,
                             rules=dataclasses.replace(rules, kv_heads=rules.heads), **mask)
        return sharding.constrain(out, "batch", "seq", "heads", "head_dim")

    def __call__(self, x, segment_ids, positions, context=None):
        if context is not None:
            k, v = self._keys_values(context, None)
            return self.out(self._attend(self._queries(x, None), k, v, None, None, causal=False))
        q = self._queries(x, positions)
        k, v = self._keys_values(x, positions)
        return self.out(self._attend(q, k, v, segment_ids, segment_ids, causal=True,
                                     window=self.config.window))

    def init_state(self, batch, max_len, path=1, context=None):
        if context is not None:
            return ContextCache(*self._keys_values(context, None))
        c = self.config
        # `path` more slots than the window: a commit of that many must not overwrite a token
        # that the next query still sees.
        slots = min(max_len, c.window or max_len) + path
        slots = -(-slots // CACHE_BLOCK) * CACHE_BLOCK
        dtype = self.key.kernel[...].dtype

        def cache(size):
            zeros = jnp.zeros((batch, c.num_kv_heads, slots, size), dtype)
            return sharding.constrain(zeros, "batch", "kv_heads", None, None)

        return KVCache(cache(c.head_dim), cache(c.value_dim),
                       jnp.full((batch, slots), -1, jnp.int32), jnp.zeros(batch, jnp.int32))

    def _incremental(self, x, positions, seen, state):
        """New rows against the cache and each other: y, keys [B,N,G,K], values [B,N,G,V].

        `seen` bool [B, N, N]: which new rows a new row may see. The prefix and the new rows are
        two partial softmaxes, merged by their log-sum-exp.
        """
        c = self.config
        b, n = positions.shape
        groups, repeat = c.num_kv_heads, c.num_heads // c.num_kv_heads
        q = self._queries(x, positions).reshape(b, n, groups, repeat, c.head_dim)
        k_new, v_new = self._keys_values(x, positions)
        # Rows of one key head side by side: a plain batched matrix product.
        q = jnp.moveaxis(q, 1, 3).reshape(b, groups, repeat * n, c.head_dim)

        def partial(carry, key, value, mask):
            """Folds keys [B,G,S,K], values [B,G,S,V], mask [B,N,S] into (top, total, sum)."""
            top, total, weighted = carry
            scores = jnp.einsum("bgnk,bgsk->bgns", q, key, preferred_element_type=jnp.float32)
            scores = scores * self._scale
            if c.softcap is not None:
                scores = c.softcap * jnp.tanh(scores / c.softcap)
            mask = jnp.tile(mask, (1, repeat, 1))[:, None]
            scores = jnp.where(mask, scores, MASKED)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.where(mask, jnp.exp(scores - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            values = jnp.einsum("bgns,bgsv->bgnv", weights.astype(value.dtype), value,
                                preferred_element_type=jnp.float32)
            return (new_top, total * shrink + jnp.sum(weights, axis=-1),
                    weighted * shrink[..., None] + values)

        def block(index, carry):
            key, value, position = state.block(index, CACHE_BLOCK)
            # Positions at or past the length are leftovers that no query may see.
            mask = (position >= 0) & (position < state.length[:, None])
            mask = jnp.broadcast_to(mask[:, None], (b, n, CACHE_BLOCK))
            if c.window is not None:
                mask &= position[:, None] > positions[:, :, None] - c.window
            return partial(carry, key, value, mask)

        if c.window is not None:
            seen &= positions[:, None, :] > positions[:, :, None] - c.window
        shape = (b, groups, repeat * n)
        carry = (jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32),
                 jnp.zeros((*shape, c.value_dim), jnp.float32))
        carry = partial(carry, jnp.swapaxes(k_new, 1, 2), jnp.swapaxes(v_new, 1, 2), seen)
        used = jnp.minimum(jnp.max(state.length), state.slots)
        _, total, weighted = lax.fori_loop(
            0, (used + CACHE_BLOCK - 1) // CACHE_BLOCK, block, carry)
        y = weighted / jnp.maximum(total, 1e-30)[..., None]
        y = y.reshape(b, groups, repeat, n, c.value_dim)
        y = jnp.moveaxis(y, 3, 1).reshape(b, n, c.num_heads, c.value_dim).astype(x.dtype)
        return self.out(y), k_new, v_new

    def _cross(self, x, state):
        q = self._queries(x, None)
        return self.out(self._attend(q, state.key, state.value, None, None, causal=False))

    def absorb(self, x, valid, state):
        if isinstance(state, ContextCache):
            return self._cross(x, state), ()
        positions = state.length[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
        order = jnp.arange(x.shape[1])
        seen = (order[:, None] >= order) & valid[:, None, :]
        y, k, v = self._incremental(x, positions, seen, state)
        length = state.length + valid_count(valid)
        # Of a chunk longer than the ring only the last tokens fit, and only they are needed.
        kept = valid & (positions >= length[:, None] - state.slots)
        return y, (k, v, positions, kept, length)

    def step(self, x, tree: Rows, state):
        if isinstance(state, ContextCache):
            return self._cross(x, state), ()
        seen = tree.ancestors & tree.valid[:, None, :]
        y, k, v = self._incremental(x, state.length[:, None] + tree.depth, seen, state)
        return y, (k, v)

    def commit(self, state, scratch, path, count):
        if isinstance(state, ContextCache):
            return state
        columns = jnp.arange(path.shape[1], dtype=jnp.int32)
        rows = path[:, :, None, None]
        k, v = (jnp.take_along_axis(x, rows.reshape((1,) * (x.ndim - 4) + rows.shape), axis=-3)
                for x in scratch)
        position = state.length[..., None] + columns
        valid = jnp.broadcast_to(columns < count[:, None], position.shape)
        return state.write(k, v, position, valid, state.length + count)
