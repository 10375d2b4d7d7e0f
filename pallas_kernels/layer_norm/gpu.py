"""LayerNorm on Hopper GPUs: see `pallas_kernels.rms_norm.gpu`."""

import functools

from pallas_kernels.rms_norm.gpu import candidates, normalise, supports

__all__ = ["candidates", "layer_norm", "supports"]

layer_norm = functools.partial(normalise, centred=True)
