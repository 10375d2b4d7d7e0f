"""Cross-entropy and Dice loss of pixels."""

import jax
import numpy as np
import pytest

from layers.segmentation import cross_entropy_and_dice
from tests.tolerances import assert_close


def test_equals_the_definition():
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(2, 5, 4, 3))
    labels = draw.integers(0, 3, (2, 5, 4))
    weights = (draw.random((2, 5, 4)) > 0.3).astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    kept = weights > 0
    nll = -np.log(p[kept, labels[kept]]).sum()
    dice = []
    for c in range(3):
        q, g = p[kept, c], labels[kept] == c
        dice.append(1 - (2 * (q * g).sum() + 1e-5) / ((q**2).sum() + g.sum() + 1e-5))
    total, weight, parts = cross_entropy_and_dice(
        logits.astype(np.float32), labels.astype(np.int32), weights.astype(np.float32))
    assert weight == weights.sum()
    assert_close(parts, {"nll": nll, "dice_loss": weights.sum() * np.mean(dice)})
    assert_close(total, 0.5 * nll + 0.5 * weights.sum() * np.mean(dice))


def test_pixels_without_weight_do_not_matter():
    logits = np.random.default_rng(0).normal(size=(1, 4, 4, 3)).astype(np.float32)
    labels, weights = np.zeros((1, 4, 4), np.int32), np.ones((1, 4, 4), np.float32)
    labels[0, 0], weights[0, 1] = 2, 0

    def loss(logits, labels):
        return cross_entropy_and_dice(logits, labels, weights)[0]

    one, gradient = jax.value_and_grad(loss)(logits, labels)
    assert not gradient[0, 1].any() and gradient[0, 2].any()
    logits[0, 1], labels[0, 1] = 7, 1
    assert_close(loss(logits, labels), one, tol=0)


def test_no_pixel_at_all():
    total, weight, _ = cross_entropy_and_dice(
        np.zeros((1, 2, 2, 3), np.float32), np.zeros((1, 2, 2), np.int32),
        np.zeros((1, 2, 2), np.float32))
    assert total == weight == 0


@pytest.mark.parametrize("label", [0, 2])
def test_a_perfect_prediction_of_one_class(label):
    """Absent classes do not count as wrong."""
    labels = np.full((1, 4, 4), label, np.int32)
    logits = 50.0 * np.eye(3, dtype=np.float32)[labels]
    total, _, _ = cross_entropy_and_dice(logits, labels, np.ones((1, 4, 4), np.float32))
    assert total == pytest.approx(0, abs=1e-4)
