"""The calls by which layer_norm is tested, compiled and timed: those of rms_norm."""

from pallas_kernels.rms_norm.cases import BACKWARD, CASES, work

__all__ = ["BACKWARD", "CASES", "work"]
