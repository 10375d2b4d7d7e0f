"""xLSTM: of mLSTM blocks with an MLP behind each (arXiv:2503.13427), as xLSTM 7B is, and the first
one (arXiv:2405.04517), of mLSTM blocks without and sLSTM blocks with one."""

import dataclasses
import math

from layers.mixer import MixerConfig
from layers.mlp import Mlp
from layers.mlstm import MLstm, PreUpMLstm
from layers.moe import Moe
from layers.norm import Norm
from layers.rnn import SLstm
from zoo.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class XLstm(DecoderConfig):
    """A decoder-only xLSTM with pre-norm blocks.

    Decoding takes a state of constant size, so `max_length` bounds a sequence and costs nothing.

    Attributes:
      mlp: of the other blocks than those of a `PreUpMLstm`; None where there are none.
      mlstm: the mixer of mLSTM blocks; a `PreUpMLstm` is a block without an MLP.
      slstm: the mixer of sLSTM blocks.
      blocks: a letter a block, over and over: m for mLSTM, s for sLSTM. xLSTM[7:1] is "mmmmmmms";
        as many letters as layers say it block by block.
    """

    mlp: Mlp | Moe | None
    mlstm: MLstm | PreUpMLstm
    slstm: SLstm | None = None
    blocks: str = "m"

    def __post_init__(self):
        super().__post_init__()
        if not self.blocks or set(self.blocks) - {"m", "s"}:
            raise ValueError(f"blocks is {self.blocks!r}; it must be letters m and s, as in 'mms'")
        if ("s" in self.blocks) != (self.slstm is not None):
            raise ValueError(f"blocks is {self.blocks!r} and slstm is {self.slstm}; give an slstm "
                             "where blocks has an s, and only there")
        wanted = not isinstance(self.mlstm, PreUpMLstm) or "s" in self.blocks
        if wanted != (self.mlp is not None):
            raise ValueError(f"mlp is {self.mlp}, and {'some' if wanted else 'no'} block of "
                             f"{self.blocks!r} has one; give it where it is used, and only there")

    def mixers(self) -> tuple[MixerConfig, ...]:
        """As `blocks` says."""
        return tuple(self.mlstm if kind == "m" else self.slstm for kind in self.blocks)

    def mlps(self) -> tuple[Mlp | Moe | None, ...]:
        """None behind a `PreUpMLstm`."""
        return tuple(None if isinstance(m, PreUpMLstm) else self.mlp for m in self.mixers())

    def gain(self) -> float:
        """Smaller in the first xLSTM: its output projections start at ``2 / (N sqrt(width))``."""
        first = isinstance(self.mlstm, PreUpMLstm)
        return 2 / self.num_layers if first else super().gain()


def _xlstm(width, num_layers, heads, *, vocab_size=50304, max_length=131072) -> XLstm:
    """Values as wide as the stream and keys half of that, in all heads together."""
    hidden = 64 * math.ceil(2.667 * width / 64)
    return XLstm(
        vocab_size=vocab_size, width=width, num_layers=num_layers,
        mlstm=MLstm(heads, key_dim=width // (2 * heads), value_dim=width // heads),
        mlp=Mlp(hidden), norm=Norm("rms", 1e-6), max_length=max_length, logit_softcap=30.0)


def _mixed(width, num_layers, heads, blocks, *, vocab_size, max_length) -> XLstm:
    """Inner widths as their authors': twice the stream's in mLSTM blocks, 1.3 times in MLPs, both
    rounded up to a multiple of 64."""
    inner, hidden = (64 * math.ceil(factor * width / 64) for factor in (2, 1.3))
    return XLstm(
        vocab_size=vocab_size, width=width, num_layers=num_layers, blocks=blocks,
        mlstm=PreUpMLstm(heads, inner // heads), slstm=SLstm(heads), mlp=Mlp(hidden, "gelu"),
        norm=Norm("layer", 1e-5, offset=1.0), max_length=max_length)


PRESETS = {
    # Bytes: 256 values and 8 special ids. For demonstrations and tests.
    "xlstm-tiny": lambda: _xlstm(256, 4, 4, vocab_size=264, max_length=2048),
    # The sizes that its authors train; the vocabulary is that of GPT-NeoX, padded.
    "xlstm-165m": lambda: _xlstm(768, 12, 4),
    "xlstm-1.3b": lambda: _xlstm(2048, 24, 4),
    "xlstm-2.7b": lambda: _xlstm(2560, 32, 5),
    "xlstm-7b": lambda: _xlstm(4096, 32, 8),
    # Bytes again; of the blocks that the first xLSTM has.
    "xlstm-mixed-tiny": lambda: _mixed(192, 6, 4, "msm", vocab_size=264, max_length=2048),
}
