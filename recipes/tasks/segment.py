"""Segmentation: a class for every pixel, learnt from slices and measured over volumes.

The data are those of `recipes.volumes`. Preprocessing and augmentation are those of ParaTransCNN
(arXiv:2401.15307), but that slices are zoomed before they are turned, and turned images are
interpolated.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from recipes import overlays, scores, segmentation_report, volumes
from recipes.tasks import Batch, Measure, Workload
from zoo.registry import check_kind

FOLDER = "preprocessing"  # In a workdir: how images are made ready.
_ANGLE = 20.0  # Degrees, the largest turn of the augmentation.
_SMALL = 3  # So many of the classes, the smallest, are named when a run ends.
_SHOWN = 6  # So many of the held-out cases, the worst, are shown.


def augment(image: np.ndarray, labels: np.ndarray, rng: np.random.Generator, how: str = "mirror"
            ) -> tuple[np.ndarray, np.ndarray]:
    """A square slice, [H, W] or [H, W, C], and its labels, [H, W], changed alike.

    "mirror": every other one is turned by right angles and mirrored. Of those that are not, and of
    all for "rotate", every other one is turned by any angle up to 20 degrees.
    """
    if how == "mirror" and rng.random() < 0.5:
        turns, axis = rng.integers(4), rng.integers(2)
        image, labels = (np.flip(np.rot90(x, turns), axis) for x in (image, labels))
    elif how != "none" and rng.random() < 0.5:
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
    image, labels = (np.pad(a, ((1, 2), (1, 2)) + ((0, 0),) * (a.ndim - 2))
                     for a in (image, labels))
    i, j = y.astype(np.int64), x.astype(np.int64)
    over_channels = (...,) + (None,) * (image.ndim - 2)
    down, right = ((a - b).astype(np.float32)[over_channels] for a, b in ((y, i), (x, j)))
    above = image[i, j] * (1 - right) + image[i, j + 1] * right
    below = image[i + 1, j] * (1 - right) + image[i + 1, j + 1] * right
    nearest = labels[np.rint(y).astype(np.int64), np.rint(x).astype(np.int64)]
    return above * (1 - down) + below * down, nearest


def make_loss(in_channels: int) -> Callable:
    """A `Task.loss`: cross-entropy and Dice of a batch, whose gray images fill all channels.

    A batch is `images`, float32 [B, H, W, C] with C either 1 or all, `labels`, int32 [B, H, W], and
    where not all images count `weights`, float32 [B, H, W]. Where it does not train, the statistics
    have "prediction", the likeliest class, uint8 [B, H, W].
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


def workload(config: Any, batch_size: int, image_size: int) -> Workload:
    """Of so many square images. Raises ValueError for a size or a model that is none."""
    check_kind(config, "segmentation")
    if image_size < 1:
        raise ValueError(f"image_size {image_size}: it must be at least 1")
    shape = (batch_size, image_size, image_size)
    return Workload(
        unit="images", axes=Segment.axes, loss=make_loss(config.in_channels), units=batch_size,
        flops=batch_size * config.flops_per_image(image_size, image_size),
        batch={"images": ((*shape, config.in_channels), np.float32), "labels": (shape, np.int32)})


class Segment:
    """Segmenting images and volumes; a `recipes.tasks.Task`."""

    unit, axes = "images", ("batch", "height")

    def __init__(self, config: Any, *, data: str = "phantoms", batch_size: int = 16,
                 seed: int = 0, image_size: int | None = None, heldout: float | None = None,
                 class_names: Sequence[str] = (), augmentation: str = "mirror",
                 neighbors: int = 0, cache_dir: str | Path | None = None):
        """Loads the data.

        Args:
          config: of a model for segmentation.
          data, image_size, heldout, class_names, neighbors, cache_dir: see `recipes.volumes.load`.
          batch_size: slices of a step, of all processes together.
          seed: of the order of the slices and of their augmentation.
          augmentation: "mirror", "rotate" or "none"; see `augment`.

        Raises:
          ValueError: data that cannot be read, or that does not fit the model.
        """
        check_kind(config, "segmentation")
        self._data = volumes.load(data, config.num_classes, image_size=image_size,
                                  heldout=heldout, class_names=class_names,
                                  neighbors=neighbors, cache_dir=cache_dir)
        self._names = self._data.classes
        if not len(self._names) <= config.num_classes <= 256:
            raise ValueError(f"num_classes {config.num_classes}: the data has {len(self._names)} "
                             f"classes, and at most 256 are taken; give --set=num_classes="
                             f"{len(self._names)}")
        if self._data.channels not in (1, config.in_channels):
            raise ValueError(f"in_channels {config.in_channels}: the images have "
                             f"{self._data.channels} channels"
                             f"{f' with neighbors={neighbors}' if neighbors else ''}; give "
                             f"--set=in_channels={self._data.channels}, or "
                             f"{'fewer neighbors' if neighbors else 'gray images'}")
        self._spec, self._batch_size, self._seed = data, batch_size, seed
        self._augmentation = augmentation
        self._measured: list[_Measured] = []  # By the final evaluation
        work = workload(config, batch_size, self._data.preprocessing.image_size)
        self.loss, self.units_per_step = work.loss, work.units
        self.flops_per_step = 3 * work.flops

    def describe(self) -> dict[str, Any]:
        """See `Task`."""
        how = self._data.preprocessing
        return {"data": {"spec": self._spec, "fingerprint": self._data.fingerprint,
                         "image_size": how.image_size,
                         **({"neighbors": how.neighbors} if how.neighbors else {})},
                "tokenizer": None, "task": {"name": "segment", "augmentation": self._augmentation}}

    def keep(self, folder: Path) -> None:
        """Writes how images are made ready, for `recipes.segment`."""
        (folder / FOLDER).mkdir(exist_ok=True)
        self._data.preprocessing.save(folder / FOLDER)

    def ids(self, step: int) -> list[int]:
        """See `Task`. An epoch's examples are numbered in the order in which they come."""
        return list(range(step * self._batch_size, (step + 1) * self._batch_size))

    def batch(self, step: int, rows: np.ndarray) -> Batch:
        """See `Task`. An epoch has each slice once, in an order of its own."""
        found = []
        for index in np.asarray(self.ids(step))[rows]:
            epoch, place = divmod(int(index), self._data.num_slices("train"))
            rng = np.random.Generator(np.random.Philox(key=[self._seed % 2**64, int(index)]))
            chosen = int(self._order(epoch)[place])
            found.append(augment(*self._data.slice("train", chosen), rng, self._augmentation))
        return _batch(found)

    def _order(self, epoch: int) -> np.ndarray:
        bits = np.random.Philox(np.random.SeedSequence([self._seed % 2**64, epoch]))
        return np.argsort(bits.random_raw(self._data.num_slices("train")), kind="stable")

    def evaluate(self, measure: Measure, final: bool) -> dict[str, float]:
        """Scores of whole volumes against their labels as they are in the files.

        In training they are of the validation cases, after it of the held-out ones. "dice" and
        "dice_" with a class' name are means over volumes and over volumes and classes; "hd95" is a
        mean over those where both truth and prediction have the class, and "hd95_misses" counts
        those where only one has it. Names with "reference_" are as in `scores.score`. The
        cross-entropy is in nats per pixel of the prepared slices.
        """
        measured, total = [], np.zeros(2)
        for case, predicted in self._predict("heldout" if final else "validation", measure, total):
            volume = self._data.volume(case)
            found = scores.score(volume.labels, self._restore(predicted, volume), len(self._names),
                                 volume.spacing)
            measured.append(_Measured(case, found, volume.spacing is not None,
                                      zlib.compress(predicted.tobytes(), 1)))
        if final:
            self._measured = measured
        means = {name: np.stack([m.scores[name] for m in measured]) for name in measured[0].scores}
        dice, hd95 = means["dice"].mean(0), means["hd95"]
        finite = hd95[np.isfinite(hd95)]
        return {
            "dice": float(dice.mean()), **({"hd95": float(finite.mean())} if finite.size else {}),
            "hd95_misses": float(np.isinf(hd95).sum()),
            **{name: float(means[name].mean()) for name in ("reference_dice", "reference_hd95")},
            "cross_entropy": float(total[0] / total[1]),
            **{_key(name): float(x) for name, x in zip(self._names[1:], dice, strict=True)}}

    def _predict(self, part: str, measure: Measure, total: np.ndarray
                 ) -> Iterator[tuple[volumes.Case, np.ndarray]]:
        """(a case, its predicted labels [Z, S, S]) of all, adding (nats, pixels) to `total`.

        A batch may hold the end of one case and the next ones.
        """
        count, ready = self._data.num_slices(part), []
        cases = iter(self._data.parts[part])
        case = next(cases)
        for begin in range(0, count, self._batch_size):
            rows = np.arange(begin, begin + self._batch_size)
            counts = rows < count
            batch = _batch([self._data.slice(part, min(int(i), count - 1)) for i in rows])
            weights = np.broadcast_to(counts[:, None, None], batch["labels"].shape)
            _, weight, stats = measure({**batch, "weights": weights.astype(np.float32)})
            total += float(stats["cross_entropy"]), weight
            ready += list(stats["prediction"][counts])
            while case is not None and len(ready) >= self._data.depth(case):
                depth = self._data.depth(case)
                yield case, np.stack(ready[:depth])
                case, ready = next(cases, None), ready[depth:]

    def _restore(self, predicted: np.ndarray, volume: volumes.Volume) -> np.ndarray:
        """Predicted labels, of a volume's own size; classes that the data has not are nothing."""
        predicted = np.where(predicted < len(self._names), predicted, 0).astype(np.uint8)
        return self._data.preprocessing.restore(predicted, volume.labels.shape)

    def summarize(self, metrics: Mapping[str, float]) -> str:
        """See `Task`."""
        text = (f"mean Dice {metrics['dice']:.3f} of {_count(len(self._names) - 1, 'class', 'es')} "
                f"in {_count(len(self._measured), 'held-out case')}")
        if "hd95" in metrics:
            unit = "mm" if all(m.in_mm for m in self._measured) else "voxels"
            text += f", HD95 {metrics['hd95']:.1f} {unit}"
        small = 1 + np.argsort(self._data.voxels[1:], kind="stable")[:_SMALL]
        if len(small) < len(self._names) - 1:
            text += "; Dice of the smallest: " + ", ".join(
                f"{self._names[i]} {metrics[_key(self._names[i])]:.3f}" for i in small)
        return text

    def draw(self, folder: Path, runs: Mapping[str, list[Mapping[str, Any]]]) -> None:
        """Writes what the final evaluation found.

        dice.png: the training loss and the Dice over steps, of all runs. predictions/: the labels
        of all held-out cases that are in files, of their own sizes, as NIfTI or, of pictures, as
        PNG. overlays/: slices of the worst cases, and overlay.png: of the one in the middle.
        report.html: all of it, with tables.
        """
        _draw_curves(folder / "dice.png", runs)
        order = sorted(self._measured, key=lambda m: m.dice)
        side, cases = self._data.preprocessing.image_size, []
        for m in self._measured:
            volume = self._data.volume(m.case)
            predicted = self._restore(np.frombuffer(zlib.decompress(m.predicted), np.uint8).reshape(
                -1, side, side), volume)
            if m.case.files:
                path = folder / "predictions" / (
                    m.case.name + volumes.labels_ending(m.case.files[0][0]))
                path.parent.mkdir(parents=True, exist_ok=True)
                overlays.write_labels(path, predicted, volume.affine, len(self._names))
            overlay = None
            if m in order[:_SHOWN]:
                overlay = folder / "overlays" / f"{m.case.name}.png"
                self._draw_overlay(overlay, m, volume, predicted)
            if m is order[len(order) // 2]:
                self._draw_overlay(folder / "overlay.png", m, volume, predicted)
            cases.append(segmentation_report.Case(m.case.name, m.scores, overlay))
        segmentation_report.write(
            folder, title=f"Segmentation: {self._spec}", classes=self._names, cases=cases,
            images={"Training": folder / "dice.png", "The case in the middle, by its Dice":
                    folder / "overlay.png"})

    def _draw_overlay(self, path: Path, measured: "_Measured", volume: volumes.Volume,
                      predicted: np.ndarray) -> None:
        """The slice in which most is labelled."""
        z = int(np.argmax(((volume.labels > 0) | (predicted > 0)).sum((1, 2))))
        path.parent.mkdir(parents=True, exist_ok=True)
        where = f", slice {z}" if len(predicted) > 1 else ""
        overlays.draw(
            path, self._data.preprocessing.normalize(volume.image)[z],
            {f"{measured.case.name}{where}: truth": volume.labels[z],
             f"prediction (Dice {measured.dice:.3f})": predicted[z]}, self._names)


@dataclasses.dataclass(frozen=True, eq=False)
class _Measured:
    """A case that was evaluated.

    Attributes:
      scores: see `scores.score`.
      in_mm: whether distances are in millimetres.
      predicted: labels [Z, S, S], compressed: of a large data set they would fill the memory.
    """

    case: volumes.Case
    scores: dict[str, np.ndarray]
    in_mm: bool
    predicted: bytes

    @property
    def dice(self) -> float:
        return float(self.scores["dice"].mean())


def _draw_curves(path: Path, runs: Mapping[str, list[Mapping[str, Any]]]) -> None:
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
            points = [(r["step"], r[kind]["dice"]) for r in records if "dice" in r.get(kind, {})]
            if points:
                label = f"{name}, {'held out' if kind == 'final' else 'validation'} " \
                        f"({points[-1][1]:.3f})"
                right.plot(*zip(*points, strict=True), marks, markersize=4,
                           **{**style, "label": label})
    left.set(xlabel="step", ylabel="half cross-entropy, half Dice loss")
    right.set(xlabel="step", ylabel="mean Dice of classes", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _batch(examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch:
    images, labels = (np.stack(arrays) for arrays in zip(*examples, strict=True))
    return {"images": images, "labels": labels.astype(np.int32)}


def _count(number: int, unit: str, plural: str = "s") -> str:
    return f"{number} {unit}{plural if number != 1 else ''}"


def _key(name: str) -> str:
    return f"dice_{volumes.metric_name(name)}"
