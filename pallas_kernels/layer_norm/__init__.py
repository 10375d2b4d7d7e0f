"""LayerNorm of rows, perhaps of the sum of two arrays: `pallas_kernels.rms_norm` about the mean.

Its kernels are those of RMSNorm, which take the rows' means out first; so is why it is an op.
"""

import jax

from pallas_kernels.dispatch import op
from pallas_kernels.rms_norm import check, dims


@op(dims("batch", "seq"), cpu=("xla",), tpu=("tpu", "xla"), gpu=("xla", "gpu"))
def layer_norm(
    x: jax.Array,
    scale: jax.Array,
    residual: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    eps: float,
    offset: float = 0.0,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """``(x - mean(x)) / sqrt(var(x) + eps) * (offset + scale) + bias`` per row (arXiv:1607.06450).

    Operands, options, results and errors are those of `pallas_kernels.rms_norm.rms_norm`; eps is
    added to the variance.
    """
    check("layer_norm", x, scale, residual, bias, eps)
