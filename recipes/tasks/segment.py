"""Segmentation: a class for every pixel, learnt from slices and measured by volumes' Dice.

The data are the phantoms of `recipes.phantoms`. Preprocessing and augmentation are those of
ParaTransCNN (arXiv:2401.15307) for Synapse, but that turned images are interpolated.
"""

import hashlib
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from recipes import phantoms
from recipes.tasks import Batch, Measure
from zoo.registry import check_kind

WINDOW = (-125.0, 275.0)
"""Hounsfield units that become 0 and 1; what lies beyond is clipped."""
_ANGLE = 20.0  # Degrees, the largest turn of the augmentation.
_SMALL = 3  # So many of the organs, the smallest, are named when a run ends.


def normalize(image: np.ndarray) -> np.ndarray:
    """Hounsfield units as float32 in [0, 1]; see `WINDOW`."""
    low, high = WINDOW
    return (np.clip(image, low, high).astype(np.float32) - low) / np.float32(high - low)


def augment(image: np.ndarray, labels: np.ndarray, rng: np.random.Generator
            ) -> tuple[np.ndarray, np.ndarray]:
    """A square slice and its labels, [H, W] each, changed alike.

    Half of them are turned by right angles and mirrored, a quarter is turned by any angle up to 20
    degrees, and a quarter is left as it is.
    """
    choice = rng.random()
    if choice < 0.5:
        turns, axis = rng.integers(4), rng.integers(2)
        image, labels = (np.flip(np.rot90(x, turns), axis) for x in (image, labels))
    elif choice < 0.75:
        image, labels = rotate(image, labels, rng.uniform(-_ANGLE, _ANGLE))
    return image, labels


def rotate(image: np.ndarray, labels: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Turns a slice about its middle, counter-clockwise as seen with row 0 on top.

    The image is interpolated linearly, labels are those of the nearest pixel; from beyond the
    border come zeros.
    """
    height, width = labels.shape
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    y, x = np.meshgrid(np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2,
                       indexing="ij", sparse=True)
    y, x = cos * y + sin * x + (height - 1) / 2, cos * x - sin * y + (width - 1) / 2
    # With a margin of zeros, so that every pixel has four neighbours.
    y, x = np.clip(y, -1, height) + 1, np.clip(x, -1, width) + 1
    image, labels = (np.pad(array, ((1, 2), (1, 2))) for array in (image, labels))
    i, j = y.astype(np.int64), x.astype(np.int64)
    down, right = (y - i).astype(np.float32), (x - j).astype(np.float32)
    above = image[i, j] * (1 - right) + image[i, j + 1] * right
    below = image[i + 1, j] * (1 - right) + image[i + 1, j + 1] * right
    nearest = labels[np.rint(y).astype(np.int64), np.rint(x).astype(np.int64)]
    return above * (1 - down) + below * down, nearest


def dice(truth: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """2 |A and B| / (|A| + |B|) of each class' voxels A in truth and B in prediction.

    Of a class that is in neither it is 1. Labels are integers below `classes`; the result is
    float64 [classes].
    """
    both = np.bincount(truth[truth == prediction], minlength=classes)
    sizes = np.bincount(truth.ravel(), minlength=classes) + np.bincount(
        prediction.ravel(), minlength=classes)
    return np.where(sizes > 0, 2 * both / np.maximum(sizes, 1), 1.0)


def make_loss(in_channels: int) -> Callable:
    """A `Task.loss`: cross-entropy and Dice of a batch, whose gray images fill all channels.

    A batch is `images`, float32 [B, H, W, 1], `labels`, int32 [B, H, W], and where not all images
    count `weights`, float32 [B, H, W]. Where it does not train, the statistics have "prediction",
    the likeliest class, uint8 [B, H, W].
    """
    def loss(model, batch, key, train):
        images = batch["images"]
        images = jnp.broadcast_to(images, (*images.shape[:-1], in_channels))
        output = model({"images": images}, key, train)
        total, weight, stats = model.loss(output, batch["labels"], batch.get("weights"))
        found = {"cross_entropy": stats["nll"], "dice_loss": stats["dice_loss"]}
        if not train:
            found["prediction"] = jnp.argmax(output.logits, axis=-1).astype(jnp.uint8)
        return total, weight, found, output.statistics

    return loss


class Segment:
    """Segmenting the organs of phantoms; a `recipes.tasks.Task`."""

    unit, axes = "images", ("batch", "height")

    def __init__(self, config: Any, *, data: str = "phantoms", batch_size: int = 16,
                 seed: int = 0):
        """Makes the data.

        Args:
          config: of a model for segmentation.
          data: phantoms.
          batch_size: slices of a step, of all processes together.
          seed: of the order of the slices and of their augmentation.

        Raises:
          ValueError: other data, or classes that do not fit the model.
        """
        check_kind(config, "segmentation")
        if data != "phantoms":
            raise ValueError(f"data {data!r}: segmentation is trained on phantoms; give --data="
                             "phantoms, or leave it out")
        self._names = phantoms.CLASSES
        if not len(self._names) <= config.num_classes <= 256:
            raise ValueError(f"num_classes {config.num_classes}: the data has {len(self._names)} "
                             f"classes, and at most 256 are taken; give --set=num_classes="
                             f"{len(self._names)}")
        self._classes, self._batch_size, self._seed = config.num_classes, batch_size, seed
        self._volumes = {split: phantoms.load(split) for split in phantoms.SPLITS}
        # The slices of all volumes one after another.
        self._images, self._labels = (
            {split: np.concatenate([getattr(volume, name) for volume in volumes])
             for split, volumes in self._volumes.items()} for name in ("image", "labels"))
        self._worst_and_best: list[tuple[int, float, np.ndarray]] = []
        self.loss = make_loss(config.in_channels)
        self.units_per_step = batch_size
        height, width = self._labels["train"].shape[1:]
        self.flops_per_step = 3 * config.flops_per_image(height, width) * batch_size

    def describe(self) -> dict[str, Any]:
        """See `Task`."""
        digest = hashlib.blake2b(digest_size=16)
        for array in itertools.chain(self._images.values(), self._labels.values()):
            digest.update(array.tobytes())
        return {"data": {"spec": "phantoms", "fingerprint": digest.hexdigest()},
                "tokenizer": None, "task": {"name": "segment"}}

    def keep(self, folder: Path) -> None:
        """Writes nothing: the model's config says all."""

    def ids(self, step: int) -> list[int]:
        """See `Task`. An epoch's examples are numbered in the order in which they come."""
        return list(range(step * self._batch_size, (step + 1) * self._batch_size))

    def batch(self, step: int, rows: np.ndarray) -> Batch:
        """See `Task`. An epoch has each slice once, in an order of its own."""
        images, labels = self._images["train"], self._labels["train"]
        found = []
        for index in np.asarray(self.ids(step))[rows]:
            epoch, place = divmod(int(index), len(images))
            chosen = self._order(epoch)[place]
            rng = np.random.Generator(np.random.Philox(key=[self._seed % 2**64, int(index)]))
            found.append(augment(normalize(images[chosen]), labels[chosen], rng))
        return _batch(*(np.stack(arrays) for arrays in zip(*found, strict=True)))

    def _order(self, epoch: int) -> np.ndarray:
        bits = np.random.Philox(np.random.SeedSequence([self._seed % 2**64, epoch]))
        return np.argsort(bits.random_raw(len(self._images["train"])), kind="stable")

    def evaluate(self, measure: Measure, final: bool) -> dict[str, float]:
        """The Dice of each organ, a mean over whole volumes, and "dice", the mean over organs.

        In training it is of the validation volumes, after it of the held-out ones. The
        cross-entropy is in nats per pixel.
        """
        split = "heldout" if final else "validation"
        images, labels = self._images[split], self._labels[split]
        nats = pixels = 0.0
        predictions = []
        for begin in range(0, len(images), self._batch_size):
            rows = np.arange(begin, begin + self._batch_size)
            counts = rows < len(images)
            rows = np.minimum(rows, len(images) - 1)
            batch = _batch(normalize(images[rows]), labels[rows])
            weights = np.broadcast_to(counts[:, None, None], labels[rows].shape)
            _, weight, stats = measure({**batch, "weights": weights.astype(np.float32)})
            nats, pixels = nats + float(stats["cross_entropy"]), pixels + weight
            predictions.append(stats["prediction"][counts])
        depths = [len(volume.labels) for volume in self._volumes[split]]
        predicted = np.split(np.concatenate(predictions), np.cumsum(depths)[:-1])
        scores = np.array([
            dice(volume.labels, mask, self._classes)[1:len(self._names)]
            for volume, mask in zip(self._volumes[split], predicted, strict=True)])
        if final:
            means = scores.mean(1)
            self._worst_and_best = [(int(i), float(means[i]), predicted[i])
                                    for i in dict.fromkeys((means.argmin(), means.argmax()))]
        by_organ = scores.mean(0)
        return {"dice": float(by_organ.mean()), "cross_entropy": nats / pixels,
                **{_key(name): float(x) for name, x in zip(self._names[1:], by_organ,
                                                           strict=True)}}

    def summarize(self, metrics: Mapping[str, float]) -> str:
        """See `Task`."""
        sizes = np.bincount(self._labels["train"].ravel(), minlength=len(self._names))[1:]
        small = ", ".join(f"{self._names[1 + i]} {metrics[_key(self._names[1 + i])]:.3f}"
                          for i in np.argsort(sizes, kind="stable")[:_SMALL])
        return (f"mean Dice {metrics['dice']:.3f} of {len(self._names) - 1} organs in "
                f"{len(self._volumes['heldout'])} held-out volumes; of the smallest: {small}")

    def draw(self, folder: Path, runs: Mapping[str, list[Mapping[str, Any]]]) -> None:
        """Writes dice.png, the training loss and the Dice over steps, of all runs, and overlay.png,
        the middle slices of the held-out volumes with the lowest and the highest Dice.
        """
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
        for color, (name, records) in enumerate(runs.items()):
            style = {"color": f"C{color}", "label": name}
            losses = [(r["step"], r["train"]["loss"]) for r in records if "train" in r]
            if losses:
                left.plot(*zip(*losses, strict=True), linewidth=0.9, **style)
            for kind, marks in (("heldout", "o-"), ("final", "D")):
                points = [(r["step"], r[kind]["dice"]) for r in records
                          if "dice" in r.get(kind, {})]
                if points:
                    label = f"{name}, {'held out' if kind == 'final' else 'validation'} " \
                            f"({points[-1][1]:.3f})"
                    right.plot(*zip(*points, strict=True), marks, markersize=4,
                               **{**style, "label": label})
        left.set(xlabel="step", ylabel="half cross-entropy, half Dice loss")
        right.set(xlabel="step", ylabel="mean Dice of organs", ylim=(0, 1))
        for axes in (left, right):
            axes.grid(alpha=0.3)
            if axes.has_data():
                axes.legend()
        figure.savefig(folder / "dice.png", dpi=120)
        pyplot.close(figure)
        self._draw_overlay(folder / "overlay.png", pyplot)

    def _draw_overlay(self, path: Path, pyplot: Any) -> None:
        rows = len(self._worst_and_best)
        figure, grid = pyplot.subplots(rows, 3, figsize=(10, 3.5 * rows + 0.6), squeeze=False,
                                       layout="constrained")
        # Without gray, which the image is.
        colors = pyplot.get_cmap("tab10")(np.delete(np.arange(10), 7)[:len(self._names) - 1])
        for line, (index, score, predicted) in zip(grid, self._worst_and_best, strict=True):
            volume = self._volumes["heldout"][index]
            middle = len(volume.labels) // 2
            gray = normalize(volume.image[middle])[..., None].repeat(3, axis=-1)
            masks = (None, volume.labels[middle], predicted[middle])
            titles = (f"held-out volume {index}, slice {middle}", "truth",
                      f"prediction (Dice of the volume {score:.3f})")
            for axes, mask, title in zip(line, masks, titles, strict=True):
                shown = gray.copy()
                if mask is not None:
                    organ = (mask > 0) & (mask < len(self._names))
                    shown[organ] = 0.45 * shown[organ] + 0.55 * colors[mask[organ] - 1, :3]
                axes.imshow(shown, vmin=0, vmax=1, interpolation="nearest")
                axes.set_title(title, fontsize=9)
                axes.set_axis_off()
        figure.legend(
            handles=[pyplot.Rectangle((0, 0), 1, 1, color=color, label=name)
                     for name, color in zip(self._names[1:], colors, strict=True)],
            loc="outside lower center", ncols=4, fontsize=8)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def _batch(images: np.ndarray, labels: np.ndarray) -> Batch:
    return {"images": images[..., None], "labels": labels.astype(np.int32)}


def _key(organ: str) -> str:
    return f"dice_{organ.replace(' ', '_')}"
