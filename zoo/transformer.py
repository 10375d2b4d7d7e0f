"""Transformers: GPT-2, Llama, Mistral and Qwen as one config over the decoder skeleton."""

import dataclasses

from layers.attention import Attention
from layers.mlp import Mlp
from layers.norm import Norm
from layers.rope import Rope
from zoo.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transformer(DecoderConfig):
    """A decoder-only Transformer (arXiv:1706.03762) with pre-norm blocks."""

    attention: Attention

    def mixers(self) -> tuple[Attention, ...]:
        """Attention in every block."""
        return (self.attention,)


def _llama(width, num_layers, heads, kv_heads, hidden, *, vocab_size, theta, max_length,
           head_dim=None, eps=1e-5, tie=False, **attention) -> Transformer:
    """The shape that Llama (arXiv:2302.13971) set and most later models keep."""
    return Transformer(
        vocab_size=vocab_size, width=width, num_layers=num_layers,
        attention=Attention(heads, kv_heads, head_dim or width // heads, rope=Rope(theta),
                            **attention),
        mlp=Mlp(hidden), norm=Norm("rms", eps), max_length=max_length, tie_embeddings=tie)


PRESETS = {
    # Bytes: 256 values and 8 special ids. For demonstrations and tests.
    "llama-tiny": lambda: _llama(
        256, 4, 4, 4, 640, vocab_size=264, theta=1e4, max_length=2048, tie=True),
    "llama-60m": lambda: _llama(
        512, 8, 8, 8, 1408, vocab_size=32000, theta=1e4, max_length=2048),
    # Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    "gpt2": lambda: Transformer(
        vocab_size=50257, width=768, num_layers=12,
        attention=Attention(12, 12, 64, qkv_bias=True, out_bias=True),
        mlp=Mlp(3072, activation="gelu_tanh", gated=False, bias=True),
        norm=Norm("layer", 1e-5, bias=True), max_length=1024, tie_embeddings=True,
        learned_positions=True, dropout=0.1),
    # arXiv:2407.21783, the 8k-token release.
    "llama3-8b": lambda: _llama(
        4096, 32, 32, 8, 14336, vocab_size=128256, theta=5e5, max_length=8192),
    "llama3-70b": lambda: _llama(
        8192, 80, 64, 8, 28672, vocab_size=128256, theta=5e5, max_length=8192),
    # arXiv:2412.15115.
    "qwen2.5-7b": lambda: _llama(
        3584, 28, 28, 4, 18944, vocab_size=152064, theta=1e6, max_length=32768, eps=1e-6,
        qkv_bias=True),
    # arXiv:2505.09388.
    "qwen3-0.6b": lambda: _llama(
        1024, 28, 16, 8, 3072, vocab_size=151936, theta=1e6, max_length=40960, head_dim=128,
        eps=1e-6, tie=True, qk_norm=1e-6),
    "qwen3-8b": lambda: _llama(
        4096, 36, 32, 8, 12288, vocab_size=151936, theta=1e6, max_length=40960, head_dim=128,
        eps=1e-6, qk_norm=1e-6),
    # arXiv:2310.06825, with its sliding window.
    "mistral-7b": lambda: _llama(
        4096, 32, 32, 8, 14336, vocab_size=32000, theta=1e4, max_length=32768, window=4096),
}
