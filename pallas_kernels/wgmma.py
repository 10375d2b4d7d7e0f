"""Products of Hopper's warp groups that several GPU kernels make in one way."""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as pg


def add_product(total, a, b, staging):
    """float32 total [64, n] + a b, of a in registers and b in shared memory.

    Interpreters know this only of a in shared memory: there `staging` is a place for it, else None.
    """
    if staging is None:
        return pl.run_state(lambda sums: pg.wgmma(sums, a, b))(pg.ACC.init(total))
    staging[...] = a
    pg.commit_smem()

    def multiply(sums):
        pg.wgmma(sums, staging, b)
        return sums[...]

    return total + pl.run_scoped(multiply, pg.ACC(total.shape, jnp.float32))
