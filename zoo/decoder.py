"""The skeleton of every decoder-only language model: embedding, blocks, norm, head.

A family is a choice of mixers: it subclasses `DecoderConfig` and says which mixer stands at each
position of the repeating pattern.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

import sharding
from layers.block import Block
from layers.dropout import dropout, fold
from layers.embed import Embedding
from layers.linear import fan_in_normal, filled_up
from layers.losses import cross_entropy
from layers.mixer import MixerConfig, Rows, state
from layers.mlp import Mlp
from layers.moe import Moe
from layers.norm import Norm, Normalize
from layers.stack import Stack
from zoo import protocol
from zoo.decode import sampling
from zoo.protocol import Output, Step


def _check_finite(config: Any, prefix: str = "") -> None:
    """Raises ValueError for a number that is infinite or none, in a config or what it holds."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            _check_finite(value, f"{prefix}{field.name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"{prefix}{field.name} is {value}; it must be finite: give a plain number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What all decoder-only families share.

    Attributes:
      vocab_size: how many tokens there are.
      width: of the residual stream.
      num_layers: blocks.
      mlp, norm: of every block; the MLP may be a mixture of experts.
      max_length: the longest sequence that the model is made for; a learned position table has
        this many rows.
      vocab_multiple: the token table and the head have `vocab_size` rounded up to a multiple of
        this, so that GPT-2's 50257 can be sharded. What fills them up is zero, never chosen and
        never trained.
      tie_embeddings: the head is the token table.
      post_norms: a block also norms what its mixer and its MLP return, before it is added.
      embed_scale: factor on the token embeddings, or None.
      logit_softcap: logits become ``logit_softcap * tanh(logits / logit_softcap)``, or None.
      learned_positions: adds a learned vector per absolute position.
      dropout: rate on the embeddings and on each residual branch, in training.
    """

    kind: ClassVar[str] = "language"

    vocab_size: int
    width: int
    num_layers: int
    mlp: Mlp | Moe
    norm: Norm
    max_length: int
    vocab_multiple: int = 1
    tie_embeddings: bool = False
    post_norms: bool = False
    embed_scale: float | None = None
    logit_softcap: float | None = None
    learned_positions: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("vocab_size", "width", "num_layers", "max_length", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        _check_finite(self)
        for name in ("embed_scale", "logit_softcap"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive, or none")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")

    @property
    def vocab_fill(self) -> int:
        """Rows of the token table that are no token; see `vocab_multiple`."""
        return -self.vocab_size % self.vocab_multiple

    def mixers(self) -> tuple[MixerConfig, ...]:
        """The repeating pattern of mixers, at least one."""
        raise NotImplementedError

    def mlps(self) -> tuple[Mlp | Moe | None, ...]:
        """The MLP behind each mixer of the pattern; None where the block has none."""
        return (self.mlp,) * len(self.mixers())

    def gain(self) -> float:
        """Factor on the initial output projections of mixers and MLPs."""
        # Each block adds two branches to the stream; this keeps its variance from growing.
        return (2 * self.num_layers) ** -0.5

    def build(self, *, key: jax.Array, dtype=jnp.float32, stacked: bool = True,
              remat: str = "none") -> "DecoderLM":
        """The model with fresh parameters; see `layers.stack` for `stacked` and `remat`."""
        return DecoderLM(self, key=key, dtype=dtype, stacked=stacked, remat=remat)

    def flops_per_token(self, length: int) -> float:
        """Forward FLOPs of one token in a sequence of `length`, averaged over its positions.

        Counted are matrix products, two FLOPs a multiply-add; of causal attention only the part
        under the diagonal. Training costs three times as much; neither recomputation is counted nor
        what fills the vocabulary up.
        """
        pattern = [
            mixer.flops_per_token(self.width, length)
            + (0 if mlp is None else mlp.flops_per_token(self.width))
            for mixer, mlp in zip(self.mixers(), self.mlps(), strict=True)
        ]
        blocks = sum(pattern[i % len(pattern)] for i in range(self.num_layers))
        return blocks + 2 * self.width * self.vocab_size

    def flops_at(self, length: int) -> float:
        """Forward FLOPs of the token that stands last in a sequence of `length`: a decode step."""
        longer = length * self.flops_per_token(length)
        return longer - (length - 1) * self.flops_per_token(length - 1) if length > 1 else longer


@state
class DecoderState:
    """Decoding state: int32 [B] tokens so far, and the stack's states."""

    length: jax.Array
    stack: dict


class DecoderLM(nnx.Module):
    """A decoder-only language model over any mixers."""

    def __init__(self, config: DecoderConfig, *, key: jax.Array, dtype, stacked: bool,
                 remat: str):
        self.config = config
        keys = jax.random.split(key, 4)
        # Unit-norm rows: the first norm rescales them, and a tied head starts with small logits.
        deviation = config.width**-0.5
        self.embed = Embedding(config.vocab_size, config.width, deviation=deviation,
                               fill=config.vocab_fill, key=keys[0], dtype=dtype)
        self.positions = (
            Embedding(config.max_length, config.width, axis=None, deviation=0.5 * deviation,
                      key=keys[1], dtype=dtype)
            if config.learned_positions else None)

        def kind(mixer, mlp):
            return lambda key, layer: Block(
                mixer, mlp, config.norm, config.width, post_norms=config.post_norms,
                dropout=config.dropout, gain=config.gain(),
                depth=layer / max(config.num_layers - 1, 1), key=key, dtype=dtype)

        kinds = [kind(*pair) for pair in zip(config.mixers(), config.mlps(), strict=True)]
        self.stack = Stack(kinds, config.num_layers, stacked=stacked, remat=remat, key=keys[2])
        self.norm = Normalize(config.norm, config.width, key=key, dtype=dtype)
        init = sharding.param(filled_up(fan_in_normal(config.width), 1, config.vocab_fill),
                              "embed", "vocab")
        columns = config.vocab_size + config.vocab_fill
        self.head = None if config.tie_embeddings else nnx.Param(
            init(keys[3], (config.width, columns), dtype), axes=init.axes)

    def head_matrix(self) -> jax.Array:
        """The head [D, V + vocab_fill], which may be the token table."""
        return self.embed.table[...].T if self.head is None else self.head[...]

    def _embed(self, tokens, positions, key=None):
        x = self.embed(tokens)
        if self.config.embed_scale is not None:
            # Rounded to the activations' type first, as Gemma's authors do.
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        if self.positions is not None:
            x = x + self.positions(positions)
        return dropout(x, self.config.dropout, key)

    def _logits(self, hidden):
        logits = sharding.einsum("btd,dv->btv", hidden, self.head_matrix(),
                                 weight=("embed", "vocab"), out=("batch", "seq", "vocab"),
                                 preferred_element_type=jnp.float32)
        logits = sharding.first(logits, self.config.vocab_size, "batch", "seq", "vocab")
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def __call__(self, batch: dict[str, jax.Array], key: jax.Array | None = None,
                 train: bool = False) -> Output:
        """Runs whole sequences.

        Args:
          batch: ``tokens`` int32 [B, T]; optionally ``segment_ids`` int32 [B, T] (documents
            packed in one row; 0 is padding) and ``positions`` int32 [B, T] within the document.
          key: for dropout; None for none.
          train: leaves the logits out (see `loss`) and needs a key where the config has dropout.

        Returns:
          Output with hidden [B, T, D] and, unless training, logits float32 [B, T, V]; and the
          blocks' auxiliary losses and statistics, means over valid tokens and layers.
        """
        if not isinstance(batch, Mapping) or "tokens" not in batch:
            raise ValueError("the batch is no dict with 'tokens', int32 [B, T]; pass "
                             "{'tokens': tokens}")
        tokens = batch["tokens"]
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.config.max_length:
            raise ValueError(f"tokens have the shape {tokens.shape}; they must be [B, T] with T "
                             f"in 1..{self.config.max_length}, the config's max_length")
        if train and key is None and self.config.dropout:
            raise ValueError(f"dropout is {self.config.dropout}; training needs a key for it")
        segments = batch.get("segment_ids")
        positions = batch.get("positions")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32),
                                         tokens.shape)
        key = key if train else None
        x = self._embed(tokens, positions, fold(key, 0))
        x, aux = self.stack(x, segments, positions, fold(key, 1))
        hidden = self.norm(x)
        return Output(None if train else self._logits(hidden), hidden, **aux)

    def trace(self, tokens: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """What two implementations are compared by, of whole sequences int32 [B, T].

        Returns:
          The stream [B, T, D] after the embedding, after each block but the last, and after the
          final norm; and the logits float32 [B, T, V].
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        x = self._embed(tokens, positions)
        *inner, last = self.stack.trace(x, None, positions)
        hidden = self.norm(last)
        return [x, *inner, hidden], self._logits(hidden)

    def loss(self, output: Output, labels: jax.Array, weights: jax.Array, *,
             z_loss: float = 0.0) -> tuple[jax.Array, jax.Array, dict]:
        """Next-token cross-entropy of an output: (sum in nats, weight, statistics).

        labels int32 [B, T], weights float32 [B, T]; see `layers.losses.cross_entropy`.
        """
        return cross_entropy(output.hidden, self.head_matrix(), labels, weights, z_loss=z_loss,
                             softcap=self.config.logit_softcap,
                             vocab_size=self.config.vocab_size)

    def init_state(self, batch: int, max_len: int, path: int = 1) -> DecoderState:
        """An empty state for `batch` requests of up to `max_len` tokens.

        `path` is the longest path that `commit` will be given.
        """
        return DecoderState(jnp.zeros(batch, jnp.int32),
                            self.stack.init_state(batch, max_len, path))

    def prefill(self, tokens: jax.Array, valid: jax.Array, state: DecoderState
                ) -> tuple[jax.Array, DecoderState]:
        """Takes a chunk int32 [B, T] of every request into the state.

        `valid` bool [B, T] marks real tokens, in any arrangement. Returns the hidden states
        [B, T, D] and the new state.
        """
        _check_rows(tokens, state)
        positions = state.length[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
        x, stack = self.stack.prefill(self._embed(tokens, positions), valid, state.stack)
        length = state.length + jnp.sum(valid, axis=1, dtype=jnp.int32)
        return self.norm(x), DecoderState(length, stack)

    def step(self, tokens: jax.Array, tree: Rows, state: DecoderState) -> Step:
        """Runs a tree of rows int32 [B, N]; the state is read, not changed."""
        _check_rows(tokens, state)
        positions = state.length[:, None] + tree.depth
        x, scratch = self.stack.step(self._embed(tokens, positions), tree, state.stack)
        hidden = self.norm(x)
        return Step(self._logits(hidden), hidden, scratch)

    def emit(self, step: Step, request: sampling.Request, rows: protocol.Rows
             ) -> tuple[jax.Array, jax.Array]:
        """The token int32 [B, N] that follows each row, and whether it ends its request."""
        column = sampling.sample(step.logits, request, rows.seen, rows.tokens, rows.tree,
                                 rows.position)
        return column, jnp.any(column[..., None] == request.stop_tokens[:, None], axis=-1)

    def commit(self, state: DecoderState, scratch, path: jax.Array, count: jax.Array
               ) -> DecoderState:
        """Takes the first `count` int32 [B] rows of `path` int32 [B, P] into the state.

        A request whose count is 0 keeps its state.
        """
        _check_rows(path, state)
        return DecoderState(state.length + count,
                            self.stack.commit(state.stack, scratch, path, count))


def _check_rows(x: jax.Array, state: DecoderState) -> None:
    if x.ndim != 2 or len(x) != len(state.length):
        raise ValueError(f"an array {x.shape} and a state of {len(state.length)} requests; it must "
                         f"be [{len(state.length)}, N], or make the state with init_state of "
                         "another batch")
