"""The cross-entropy of a layer's callers: scalars over all shards."""

import jax
import numpy as np
import pytest

import sharding
from layers.losses import cross_entropy
from tests.tiny import MESH
from tests.tolerances import assert_close


@pytest.mark.parametrize("batch", [8, 3], ids=["even", "odd"])
def test_sums_do_not_depend_on_the_mesh(batch):
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(batch, 5, 4)), rng.normal(size=(4, 6))
    labels = rng.integers(0, 6, (batch, 5), np.int32)
    weights = rng.random((batch, 5)).astype(np.float32)
    logits = hidden @ head
    log_z = np.log(np.exp(logits).sum(-1))
    at_label = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    z_sum = (weights * log_z**2).sum()
    nll = (weights * (log_z - at_label)).sum()
    correct = (weights * (logits.argmax(-1) == labels)).sum()
    expected = (nll + 0.1 * z_sum, weights.sum(),
                {"nll": nll, "z_squared": z_sum, "correct": correct})
    arrays = hidden.astype(np.float32), head.astype(np.float32), labels, weights
    assert_close(cross_entropy(*arrays, z_loss=0.1), expected)
    with sharding.use(sharding.mesh(MESH), sharding.rules("fsdp_tp")):
        sums = jax.jit(lambda *x: cross_entropy(*x, z_loss=0.1))(*arrays)
    assert all(x.shape == () for x in jax.tree.leaves(sums))
    assert_close(sums, expected)
