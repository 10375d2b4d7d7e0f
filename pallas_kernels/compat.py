"""Differences between the versions of JAX that this project runs on."""

import jax

_JAX_0_12 = jax.__version_info__ >= (0, 12)


def gpu_load(ref, layout, optimized=True):
    """A Mosaic GPU ref's whole content, in registers of `layout`; `optimized` is for shared memory,
    whose banks must not conflict."""
    from jax.experimental.pallas import mosaic_gpu as pg

    options = {"layout": layout, "optimized": optimized}
    return pg.load(ref, **options) if _JAX_0_12 else pg.load(ref, (), **options)


def gpu_cost_estimate(flops: int, bytes_accessed: int, transcendentals: int) -> dict:
    """Keyword arguments of Mosaic GPU's `kernel` that tell XLA the cost: none before JAX 0.12."""
    from jax.experimental import pallas as pl

    if not _JAX_0_12:
        return {}
    return {"cost_estimate": pl.CostEstimate(
        flops=flops, bytes_accessed=bytes_accessed, transcendentals=transcendentals)}
