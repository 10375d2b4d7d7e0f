"""Transformers: GPT-2, Llama, Mistral, Mixtral, Qwen and Gemma as one config over the decoder
skeleton."""

import dataclasses

from layers.attention import Attention
from layers.mlp import Mlp
from layers.moe import Moe
from layers.norm import Norm
from layers.rope import LinearScaling, Llama3Scaling, Rope
from zoo.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transformer(DecoderConfig):
    """A decoder-only Transformer (arXiv:1706.03762) with pre-norm blocks.

    Attributes:
      attention: of every block, or of the last one in a repeating pattern.
      local, local_layers: the pattern's other blocks come first: so many, with this attention.
    """

    attention: Attention
    local: Attention | None = None
    local_layers: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.local_layers < 0:
            raise ValueError(f"local_layers is {self.local_layers}; it must be 0 or more")
        if (self.local is None) != (self.local_layers == 0):
            raise ValueError(
                f"local_layers is {self.local_layers} and local is {self.local}; give both, or "
                "0 and none")

    def mixers(self) -> tuple[Attention, ...]:
        """Local attention `local_layers` times, if any, then the other."""
        if self.local is None:
            return (self.attention,)
        return (self.local,) * self.local_layers + (self.attention,)


def _llama(width, num_layers, heads, kv_heads, hidden, *, vocab_size, theta, max_length,
           head_dim=None, scaling=None, eps=1e-5, tie=False, moe=None, **attention
           ) -> Transformer:
    """The shape that Llama (arXiv:2302.13971) set and most later models keep.

    `hidden` is that of a dense MLP; `moe` takes its place.
    """
    return Transformer(
        vocab_size=vocab_size, width=width, num_layers=num_layers,
        attention=Attention(heads, kv_heads, head_dim or width // heads,
                            rope=Rope(theta, scaling), **attention),
        mlp=moe or Mlp(hidden), norm=Norm("rms", eps), max_length=max_length, tie_embeddings=tie)


def _llama3(*shape, max_length=8192, **options) -> Transformer:
    return _llama(*shape, vocab_size=128256, theta=5e5, max_length=max_length, **options)


def _qwen2(*shape, vocab_size=151936, max_length=32768, **options) -> Transformer:
    return _llama(*shape, vocab_size=vocab_size, theta=1e6, max_length=max_length, eps=1e-6,
                  qkv_bias=True, **options)


def _qwen3(*shape, **options) -> Transformer:
    return _llama(*shape, vocab_size=151936, theta=1e6, max_length=40960, head_dim=128, eps=1e-6,
                  qk_norm=Norm("rms", 1e-6), **options)


def _qwen3_moe(width, num_layers, heads, kv_heads, hidden) -> Transformer:
    """128 experts of inner width `hidden`."""
    return _qwen3(width, num_layers, heads, kv_heads, None,
                  moe=Moe(128, 8, hidden, normalize=True, balance_loss=1e-3))


def _mixtral(width, num_layers, heads, hidden, *, max_length, balance_loss) -> Transformer:
    return _llama(width, num_layers, heads, 8, None, vocab_size=32000, theta=1e6,
                  max_length=max_length,
                  moe=Moe(8, 2, hidden, normalize=True, balance_loss=balance_loss))


def _gpt2(width, num_layers, heads) -> Transformer:
    return Transformer(
        vocab_size=50257, width=width, num_layers=num_layers,
        attention=Attention(heads, heads, 64, qkv_bias=True, out_bias=True),
        mlp=Mlp(4 * width, activation="gelu_tanh", gated=False, bias=True),
        norm=Norm("layer", 1e-5, bias=True), max_length=1024, tie_embeddings=True,
        learned_positions=True, dropout=0.1)


# Gemma stores norm scales as their distance from one.
_GEMMA_NORM = Norm("rms", 1e-6, offset=1.0)
_GEMMA3_SCALING = LinearScaling(8.0)  # Of the global layers, where they were made for 128k tokens.


def _gemma(width, num_layers, hidden, *, attention, window, theta=1e4, local_layers, **options
           ) -> Transformer:
    """`attention` is the global one; the local ones differ by their window and their `theta`."""
    local = dataclasses.replace(attention, window=window, rope=Rope(theta))
    return Transformer(
        width=width, num_layers=num_layers, attention=attention, local=local,
        local_layers=local_layers, mlp=Mlp(hidden, activation="gelu_tanh"), norm=_GEMMA_NORM,
        post_norms=True, embed_scale=width**0.5, tie_embeddings=True, **options)


def _gemma2(width, num_layers, heads, kv_heads, hidden, *, head_dim=256, score_width=256
            ) -> Transformer:
    """Scores are divided by the root of `score_width`."""
    attention = Attention(heads, kv_heads, head_dim, rope=Rope(1e4), softcap=50.0,
                          scale=score_width**-0.5)
    return _gemma(width, num_layers, hidden, attention=attention, window=4096, local_layers=1,
                  vocab_size=256000, max_length=8192, logit_softcap=30.0)


def _gemma3(width, num_layers, heads, kv_heads, hidden, *, head_dim=256, score_width=256,
            window=1024, vocab_size=262208, max_length=131072, scaling=_GEMMA3_SCALING
            ) -> Transformer:
    attention = Attention(heads, kv_heads, head_dim, rope=Rope(1e6, scaling), qk_norm=_GEMMA_NORM,
                          scale=score_width**-0.5)
    return _gemma(width, num_layers, hidden, attention=attention, window=window, local_layers=5,
                  vocab_size=vocab_size, max_length=max_length)


def _gemma3_text(*shape) -> Transformer:
    """The sizes that were released without an image encoder."""
    return _gemma3(*shape, window=512, vocab_size=262144, max_length=32768, scaling=None)


# Arguments in order: width, layers, heads, key heads, hidden width of the MLP.
PRESETS = {
    # Bytes: 256 values and 8 special ids. For demonstrations and tests.
    "llama-tiny": lambda: _llama(
        256, 4, 4, 4, 640, vocab_size=264, theta=1e4, max_length=2048, tie=True),
    "llama-60m": lambda: _llama(
        512, 8, 8, 8, 1408, vocab_size=32000, theta=1e4, max_length=2048),
    # Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    "gpt2": lambda: _gpt2(768, 12, 12),
    "gpt2-medium": lambda: _gpt2(1024, 24, 16),
    "gpt2-large": lambda: _gpt2(1280, 36, 20),
    "gpt2-xl": lambda: _gpt2(1600, 48, 25),
    # arXiv:2307.09288.
    "llama2-7b": lambda: _llama(
        4096, 32, 32, 32, 11008, vocab_size=32000, theta=1e4, max_length=4096),
    # arXiv:2407.21783: the 8k-token release, then those for 128k tokens.
    "llama3-8b": lambda: _llama3(4096, 32, 32, 8, 14336),
    "llama3-70b": lambda: _llama3(8192, 80, 64, 8, 28672),
    "llama3.1-8b": lambda: _llama3(
        4096, 32, 32, 8, 14336, max_length=131072, scaling=Llama3Scaling(8.0)),
    "llama3.2-1b": lambda: _llama3(
        2048, 16, 32, 8, 8192, max_length=131072, scaling=Llama3Scaling(32.0), tie=True),
    "llama3.2-3b": lambda: _llama3(
        3072, 28, 24, 8, 8192, max_length=131072, scaling=Llama3Scaling(32.0), tie=True),
    # arXiv:2412.15115.
    "qwen2.5-0.5b": lambda: _qwen2(896, 24, 14, 2, 4864, tie=True),
    "qwen2.5-1.5b": lambda: _qwen2(1536, 28, 12, 2, 8960, tie=True),
    "qwen2.5-7b": lambda: _qwen2(3584, 28, 28, 4, 18944, vocab_size=152064),
    # arXiv:2505.09388.
    "qwen3-0.6b": lambda: _qwen3(1024, 28, 16, 8, 3072, tie=True),
    "qwen3-1.7b": lambda: _qwen3(2048, 28, 16, 8, 6144, tie=True),
    "qwen3-4b": lambda: _qwen3(2560, 36, 32, 8, 9728, tie=True),
    "qwen3-8b": lambda: _qwen3(4096, 36, 32, 8, 12288),
    "qwen3-14b": lambda: _qwen3(5120, 40, 40, 8, 17408),
    "qwen3-32b": lambda: _qwen3(5120, 64, 64, 8, 25600),
    "qwen3-30b-a3b": lambda: _qwen3_moe(2048, 48, 32, 4, 768),
    "qwen3-235b-a22b": lambda: _qwen3_moe(4096, 94, 64, 4, 1536),
    # Qwen team, "Qwen1.5-MoE: Matching 7B Model Performance with 1/3 Activated Parameters", 2024.
    "qwen1.5-moe-a2.7b": lambda: _qwen2(
        2048, 24, 16, 16, None, max_length=8192,
        moe=Moe(60, 4, 1408, normalize=False, shared_hidden=5632, balance_loss=1e-3)),
    # arXiv:2310.06825: first with its sliding window, then without.
    "mistral-7b": lambda: _llama(
        4096, 32, 32, 8, 14336, vocab_size=32000, theta=1e4, max_length=32768, window=4096),
    "mistral-7b-v0.3": lambda: _llama(
        4096, 32, 32, 8, 14336, vocab_size=32768, theta=1e6, max_length=32768),
    # arXiv:2401.04088. All with 8 key heads.
    "mixtral-8x7b": lambda: _mixtral(4096, 32, 32, 14336, max_length=32768, balance_loss=0.02),
    "mixtral-8x22b": lambda: _mixtral(6144, 56, 48, 16384, max_length=65536, balance_loss=1e-3),
    # arXiv:2408.00118.
    "gemma2-2b": lambda: _gemma2(2304, 26, 8, 4, 9216),
    "gemma2-9b": lambda: _gemma2(3584, 42, 16, 8, 14336),
    "gemma2-27b": lambda: _gemma2(4608, 46, 32, 16, 36864, head_dim=128, score_width=144),
    # arXiv:2503.19786, the language models.
    "gemma3-270m": lambda: _gemma3_text(640, 18, 4, 1, 2048),
    "gemma3-1b": lambda: _gemma3_text(1152, 26, 4, 1, 6912),
    "gemma3-4b": lambda: _gemma3(2560, 34, 8, 4, 10240),
    "gemma3-12b": lambda: _gemma3(3840, 48, 16, 8, 15360),
    "gemma3-27b": lambda: _gemma3(5376, 62, 32, 16, 21504, head_dim=128, score_width=168),
}
