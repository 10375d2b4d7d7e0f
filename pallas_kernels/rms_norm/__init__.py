"""RMSNorm of rows, perhaps of the sum of two arrays: the pre-norm block's residual add.

Why it is an op: it does next to no arithmetic, so it costs what it moves. Forward that is one read
of x and of the residual and one write of the sum and of y; backward one read of the sum and of the
two cotangents and one write of d_x, where XLA reads them for the rows' means, for d_scale and for
d_x in turn.

Which is preferred follows from programs compiled for described chips, not from measurements. XLA
folds the norm into the matrix products around it, and makes it again in those of the backward pass;
on a v5p at a width of 4096 its own cost model puts a block's training step at 45.4 Mcycles with
autodiff's norms, 43.4 with `xla`, and 41.2 with the kernels, their traffic at full bandwidth
included. The order was the same on v6e, at a width of 1024, per head, and with remat; on v5e the
kernels and `xla` are even. On an H200 the kernels save twelve passes over x a block, but how near
they come to full bandwidth is not known, so there XLA goes first.
"""

import jax

from pallas_kernels.dims import Dims
from pallas_kernels.dispatch import op


def dims(*rows: str | None) -> Dims:
    """The dims of rms_norm and layer_norm for an x of the logical axes `rows` and a whole width.

    Rows are independent of each other: any of their axes may be sharded.
    """
    x = (*rows, None)
    return Dims(operands=(x, (None,), x, (None,)), results=x,
                shardable=frozenset(filter(None, rows)), rowwise=True)


def check(name, x, scale, residual, bias, eps):
    """Raises ValueError where the operands of rms_norm or layer_norm do not fit together."""
    if x.ndim < 2 or scale.shape != x.shape[-1:]:
        raise ValueError(f"{name}: x {x.shape} and scale {scale.shape} must be [..., D] and [D]")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(f"{name}: residual {residual.dtype}{residual.shape} must be like x, "
                         f"{x.dtype}{x.shape}")
    if bias is not None and bias.shape != scale.shape:
        raise ValueError(f"{name}: bias {bias.shape} must be {scale.shape}, like scale")
    if not eps > 0:
        raise ValueError(f"{name}: eps={eps} must be positive, e.g. 1e-6")


@op(dims("batch", "seq"), cpu=("xla",), tpu=("tpu", "xla"), gpu=("xla", "gpu"))
def rms_norm(
    x: jax.Array,
    scale: jax.Array,
    residual: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    eps: float,
    offset: float = 0.0,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """``x / sqrt(mean(x^2) + eps) * (offset + scale) + bias`` per row (arXiv:1910.07467, eq. 4).

    Args:
      x: [..., D]; differentiable.
      scale: [D]; differentiable.
      residual: [..., D] of x's dtype; differentiable. The sum ``x + residual``, in that dtype, is
        normalised in place of x.
      bias: [D]; differentiable.
      eps: added to the mean square.
      offset: added to the scale, 1 where the parameter is stored as its distance from one.

    Returns:
      [..., D] in x's dtype; with a residual (that, the sum). Statistics are float32, and so are
      the sums over rows in the gradients of scale and bias.

    Raises:
      ValueError: shapes that do not fit together, or eps <= 0.
    """
    check("rms_norm", x, scale, residual, bias, eps)
