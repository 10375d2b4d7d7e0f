"""What one gets on the phantoms without shapes: boosted trees on each pixel and its neighbours.

  python -m recipes.benchmarks.phantom_baselines

Prints the Dice score of each organ on the held-out phantoms for trees that see a pixel's intensity
and position, and for trees that see the 3x3 patch around it as well. A segmentation model has to
beat both by much; if these score high the phantoms are too easy. Needs scikit-learn:
pip install 'parazoo[baselines]'.
"""

import numpy as np
from absl import flags

from recipes import command, phantoms

with command.group("What"):
    SAMPLES = flags.DEFINE_integer("samples", 400_000, "Training pixels, half of them of organs.")
    ITERATIONS = flags.DEFINE_integer("iterations", 100, "Trees for each class.")


def features(image: np.ndarray, neighbours: bool) -> np.ndarray:
    """float32 [Z, Y, X, F] of a volume int16 [Z, Y, X]: position, intensity, and the patch's."""
    z, y, x = np.indices(image.shape)
    columns = [z, y, x, image]
    if neighbours:
        padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
        height, width = image.shape[1:]
        columns += [padded[:, i:i + height, j:j + width] for i in range(3) for j in range(3)
                    if (i, j) != (1, 1)]
    return np.stack(columns, axis=-1).astype(np.float32)


def dice(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The Dice score of each organ, over a volume that holds all of them."""
    return np.array([
        2 * np.count_nonzero((predicted == c) & (labels == c))
        / (np.count_nonzero(predicted == c) + np.count_nonzero(labels == c))
        for c in range(1, len(phantoms.CLASSES))])


def score(neighbours: bool, samples: int, iterations: int) -> np.ndarray:
    """The mean Dice score of each organ on the held-out phantoms."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    draw = np.random.default_rng(0)
    train = phantoms.load("train")
    inputs, labels = [], []
    for phantom in train:
        for wanted in (phantom.labels > 0, phantom.labels == 0):
            chosen = draw.choice(np.flatnonzero(wanted), samples // (2 * len(train)))
            inputs.append(features(phantom.image, neighbours).reshape(-1, 12 if neighbours else 4)
                          [chosen])
            labels.append(phantom.labels.ravel()[chosen])
    # Organs were drawn more often than they are found.
    organs = sum(np.count_nonzero(p.labels) for p in train) / sum(p.labels.size for p in train)
    labels = np.concatenate(labels)
    weights = np.where(labels > 0, organs, 1 - organs)
    trees = HistGradientBoostingClassifier(max_iter=iterations, early_stopping=False,
                                           random_state=0)
    trees.fit(np.concatenate(inputs), labels, sample_weight=weights)
    scores = []
    for phantom in phantoms.load("heldout"):
        x = features(phantom.image, neighbours)
        predicted = trees.predict(x.reshape(-1, x.shape[-1])).reshape(phantom.labels.shape)
        scores.append(dice(predicted, phantom.labels))
    return np.mean(scores, axis=0)


def main() -> None:
    """Prints both scores."""
    for name, neighbours in (("a pixel and its place", False),
                             ("3x3 pixels and their place", True)):
        scores = score(neighbours, SAMPLES.value, ITERATIONS.value)
        organs = ", ".join(f"{organ} {value:.2f}" for organ, value in zip(
            phantoms.CLASSES[1:], scores, strict=True))
        print(f"{name}: mean Dice {scores.mean():.3f} ({organs})")


if __name__ == "__main__":
    command.run(main)
