"""LayerNorm on TPU: see `pallas_kernels.rms_norm.tpu`."""

import functools

from pallas_kernels.rms_norm.tpu import candidates, normalise, supports

__all__ = ["candidates", "layer_norm", "supports"]

layer_norm = functools.partial(normalise, centred=True)
