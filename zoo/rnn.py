"""Language models over the classical recurrent cells, in blocks like those of a Transformer."""

import dataclasses

from layers.mixer import MixerConfig
from layers.mlp import Mlp
from layers.norm import Norm
from layers.rnn import Rnn
from zoo.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recurrent(DecoderConfig):
    """A decoder-only model of pre-norm blocks: a recurrent cell and an MLP in each.

    Decoding takes a state of constant size, so `max_length` bounds a sequence and costs nothing.

    Attributes:
      rnn: the mixer of every block.
    """

    rnn: Rnn

    def mixers(self) -> tuple[MixerConfig, ...]:
        """The cell alone."""
        return (self.rnn,)


def _tiny(cell: str) -> Recurrent:
    return Recurrent(
        vocab_size=264, width=192, num_layers=4, rnn=Rnn(cell, num_heads=4, head_dim=48),
        mlp=Mlp(512), norm=Norm("rms", 1e-6), max_length=2048)


PRESETS = {
    # Bytes: 256 values and 8 special ids. For demonstrations and tests.
    "lstm-tiny": lambda: _tiny("lstm"),
    "gru-tiny": lambda: _tiny("gru"),
}
