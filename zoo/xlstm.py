"""xLSTM with mLSTM blocks and an MLP behind each, as in xLSTM 7B (arXiv:2503.13427)."""

import dataclasses
import math

from layers.mixer import MixerConfig
from layers.mlp import Mlp
from layers.mlstm import MLstm
from layers.norm import Norm
from zoo.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class XLstm(DecoderConfig):
    """A decoder-only xLSTM with pre-norm blocks.

    Decoding takes a state of constant size, so `max_length` bounds a sequence and costs nothing.

    Attributes:
      mlstm: the mixer of every block.
    """

    mlstm: MLstm

    def mixers(self) -> tuple[MixerConfig, ...]:
        """The mLSTM alone."""
        return (self.mlstm,)


def _xlstm(width, num_layers, heads, *, vocab_size=50304, max_length=131072) -> XLstm:
    """Values as wide as the stream and keys half of that, in all heads together."""
    hidden = 64 * math.ceil(2.667 * width / 64)
    return XLstm(
        vocab_size=vocab_size, width=width, num_layers=num_layers,
        mlstm=MLstm(heads, key_dim=width // (2 * heads), value_dim=width // heads),
        mlp=Mlp(hidden), norm=Norm("rms", 1e-6), max_length=max_length, logit_softcap=30.0)


PRESETS = {
    # Bytes: 256 values and 8 special ids. For demonstrations and tests.
    "xlstm-tiny": lambda: _xlstm(256, 4, 4, vocab_size=264, max_length=2048),
    # The sizes that its authors train; the vocabulary is that of GPT-NeoX, padded.
    "xlstm-165m": lambda: _xlstm(768, 12, 4),
    "xlstm-1.3b": lambda: _xlstm(2048, 24, 4),
    "xlstm-2.7b": lambda: _xlstm(2560, 32, 5),
    "xlstm-7b": lambda: _xlstm(4096, 32, 8),
}
