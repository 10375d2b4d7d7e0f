"""Dice and Hausdorff distances against their definitions, point by point, and the conventions."""

import numpy as np
import pytest

from recipes.scores import score

CLASSES = 4


def labels(seed: int, shape=(6, 9, 8)) -> np.ndarray:
    """Boxes over one another; class 3 is in those of odd seeds alone."""
    rng = np.random.default_rng(seed)
    found = np.zeros(shape, np.uint8)
    for label in (1, 2, 1, 3)[:3 + seed % 2]:
        low = [rng.integers(0, max(1, side - 3)) for side in shape]
        found[tuple(slice(i, i + rng.integers(1, 6)) for i in low)] = label
    return found


def border(mask: np.ndarray) -> np.ndarray:
    """Points of a mask with a neighbour, along an axis, that is not of it, or none at all."""
    axes = [axis for axis in range(3) if mask.shape[0] > 1 or axis]

    def whole(point):
        for axis in axes:
            for step in (-1, 1):
                at = list(point)
                at[axis] += step
                if not 0 <= at[axis] < mask.shape[axis] or not mask[tuple(at)]:
                    return False
        return True

    return np.array([point for point in np.argwhere(mask) if not whole(point)])


def distance(one: np.ndarray, other: np.ndarray, spacing) -> float:
    apart = (border(one)[:, None] - border(other)[None]) * np.asarray(spacing)
    apart = np.sqrt((apart**2).sum(-1))
    return np.percentile(np.concatenate([apart.min(0), apart.min(1)]), 95)


@pytest.mark.parametrize("spacing", [None, (2.5, 0.7, 0.9)])
@pytest.mark.parametrize(("one", "other", "shape"), [
    (0, 2, (6, 9, 8)), (1, 3, (6, 9, 8)), (4, 1, (6, 9, 8)), (3, 3, (6, 9, 8)),
    (1, 3, (1, 12, 9)), (5, 2, (2, 9, 12))])
def test_scores_are_their_definitions(one, other, shape, spacing):
    truth, guess = labels(one, shape), labels(other, shape)
    found = score(truth, guess, CLASSES, spacing)
    for label in range(1, CLASSES):
        a, b, i = truth == label, guess == label, label - 1
        plain = {name: found[name][i] for name in ("dice", "hd95")}
        reference = tuple(found[f"reference_{name}"][i] for name in plain)
        if a.any() and b.any():
            dice = 2 * (a & b).sum() / (a.sum() + b.sum())
            np.testing.assert_allclose(
                list(plain.values()), (dice, distance(a, b, spacing or (1, 1, 1))))
            np.testing.assert_allclose(reference, (dice, distance(a, b, (1, 1, 1))))
        elif not a.any() and not b.any():
            assert plain["dice"] == 1 and np.isnan(plain["hd95"]) and reference == (0, 0)
        else:
            assert plain == {"dice": 0, "hd95": np.inf}
            assert reference == ((0, 0) if a.any() else (1, 0))


def test_empty_ones():
    """A class in neither, one in truth alone, one in the prediction alone."""
    truth, guess = np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4), np.uint8)
    truth[0, 1, 1] = 2
    guess[1, 2, 2] = 3
    found = score(truth, guess, CLASSES)
    np.testing.assert_array_equal(found["dice"], [1, 0, 0])
    for name in ("hd95", "hd95_voxels"):
        np.testing.assert_array_equal(found[name], [np.nan, np.inf, np.inf])
    np.testing.assert_array_equal(found["reference_dice"], [0, 0, 1])
    np.testing.assert_array_equal(found["reference_hd95"], [0, 0, 0])


def test_the_inside_does_not_count():
    """Distances are between borders: a ball that holds another is its shell away."""
    z, y, x = np.ogrid[-9:10, -9:10, -9:10]
    radius = np.sqrt(z**2 + y**2 + x**2)
    found = score((radius <= 8).astype(np.uint8), (radius <= 3).astype(np.uint8), 2, (2, 2, 2))
    np.testing.assert_array_equal(found["hd95_voxels"], found["reference_hd95"])
    assert 2 * 4.5 < found["hd95"][0] < 2 * 5.5 and 4.5 < found["reference_hd95"][0] < 5.5


def test_what_is_no_labelling():
    truth = np.zeros((2, 4, 4), np.uint8)
    with pytest.raises(ValueError, match=r"truth is \(2, 4, 4\) and the prediction \(2, 4, 3\)"):
        score(truth, truth[..., :3], 2)
    with pytest.raises(ValueError, match="the prediction is uint8, from 7 to 7; labels are"):
        score(truth, truth + np.uint8(7), 2)
    with pytest.raises(ValueError, match="truth is float64"):
        score(truth.astype(float), truth, 2)
    with pytest.raises(ValueError, match="spacing is .* three lengths above 0"):
        score(truth, truth, 2, (1.0, 0.0, 1.0))
