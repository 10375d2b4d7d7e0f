"""Differences between the versions of JAX that this project runs on."""

import jax

_JAX_0_12 = jax.__version_info__ >= (0, 12)


def gpu_load(ref, layout):
    """A Mosaic GPU ref's whole content, in registers of `layout`."""
    from jax.experimental.pallas import mosaic_gpu as pg

    return pg.load(ref, layout=layout) if _JAX_0_12 else pg.load(ref, (), layout=layout)


def gpu_cost_estimate(flops: int, bytes_accessed: int, transcendentals: int) -> dict:
    """Keyword arguments of Mosaic GPU's `kernel` that tell XLA the cost: none before JAX 0.12."""
    from jax.experimental import pallas as pl

    if not _JAX_0_12:
        return {}
    return {"cost_estimate": pl.CostEstimate(
        flops=flops, bytes_accessed=bytes_accessed, transcendentals=transcendentals)}
