"""Per-shard kernel ops: plain functions of arrays that know no mesh, run by `sharding.local`."""

from pallas_kernels.dims import Dims
from pallas_kernels.dispatch import Op, Target, explain, interpret, op, ops, using

__all__ = ["Dims", "Op", "Target", "explain", "interpret", "op", "ops", "using"]
