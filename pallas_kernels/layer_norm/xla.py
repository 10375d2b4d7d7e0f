"""LayerNorm for any XLA back end: see `pallas_kernels.rms_norm.xla`."""

import functools

from pallas_kernels.rms_norm.xla import normalise, supports

__all__ = ["layer_norm", "supports"]

layer_norm = functools.partial(normalise, centred=True)
