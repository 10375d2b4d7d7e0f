"""Dice and Hausdorff distances against medpy's."""

import numpy as np
import pytest

from recipes.scores import score

binary = pytest.importorskip("medpy.metric.binary")


@pytest.mark.parametrize("spacing", [None, (2.5, 0.7, 0.9)])
@pytest.mark.parametrize("shape", [(7, 20, 16), (1, 24, 20)])
@pytest.mark.parametrize("share", [0.002, 0.05, 0.4])
def test_scores(share, shape, spacing):
    """Scattered voxels, few to many; of one slice medpy is given the plane."""
    rng = np.random.default_rng(int(1000 * share))
    truth, guess = (np.where(rng.random(shape) < share, rng.integers(1, 4, shape), 0)
                    for _ in range(2))
    found = score(truth, guess, 5, spacing)
    for i in range(4):
        one, other = (np.squeeze(x == i + 1) for x in (guess, truth))
        if one.any() and other.any():
            sides = None if spacing is None else spacing[3 - one.ndim:]
            values = [binary.dc(one, other), binary.hd95(one, other, voxelspacing=sides),
                      binary.dc(one, other), binary.hd95(one, other)]
        elif one.any() == other.any():  # The conventions are ours: medpy refuses empty masks.
            values = [1.0, np.nan, 0.0, 0.0]
        else:
            values = [0.0, np.inf, float(one.any()), 0.0]
        names = ("dice", "hd95", "reference_dice", "reference_hd95")
        np.testing.assert_allclose([found[name][i] for name in names], values, rtol=1e-12)
