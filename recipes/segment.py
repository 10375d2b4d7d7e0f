"""Segments images and volumes with a trained model.

  python -m recipes.segment --checkpoint=runs/a --input=scan.nii.gz --out=masks
  python -m recipes.segment --checkpoint=runs/a --input=scans --truth=labels --out=masks
  python -m recipes.segment --checkpoint=runs/a --input=slide.png --tile=224 --out=masks

--checkpoint is the workdir of a run of recipes.train, or what recipes.convert made of one; it says
how images are made ready too. --input are files, or folders of them: NIfTI (.nii, .nii.gz), arrays
`image` (.npz, .h5) and pictures (.png, .jpg).

For each file NAME there is then, in --out, NAME.nii.gz, which lies over its scan, or of a picture
NAME.png, with labels of the file's own size; and overlays/NAME.png, the slice in which most is
labelled. Where the truth is known (--truth, or an array `label` beside `image`), Dice and HD95 are
told, and kept in scores.json and report.html.

Slices are zoomed to the size that the model was trained on. With --tile they are not: the model
goes over them in overlapping tiles, which serves images that are larger and show things of the
same size in pixels.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track

import sharding
from recipes import command, overlays, scores, segmentation_report, training, volumes, workdir
from zoo import segmentation

with command.group("Model"):
    CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A training run's workdir, or a model's "
                                     "directory. Needed.")
    STEP = flags.DEFINE_integer("step", None, "Which checkpoint of a run; default the newest "
                                "whole one.")
    DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"],
                              "To cast the parameters to; default as they were trained.")
    MESH = flags.DEFINE_string("mesh", "", "Mesh of devices, over which a batch is laid, as in "
                               "data:4; default one device.")
    RULES = flags.DEFINE_string("rules", "fsdp_tp", command.RULES_HELP)
with command.group("Files"):
    INPUT = flags.DEFINE_list("input", [], "Images, and folders of images, with commas between. "
                              "Files of folders whose names end in _seg, .seg, _gt, _mask or "
                              "_label are left out. Needed.")
    OUT = flags.DEFINE_string("out", None, "Where the masks go; there must be nothing of it yet. "
                              "Needed.")
    TRUTH = flags.DEFINE_string("truth", None, "The mask of the input, or a folder of masks: each "
                                "has the name of its image, perhaps with _seg or another of these "
                                "endings.")
with command.group("Computation"):
    BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Slices at a time.")
    TILE = flags.DEFINE_integer("tile", None, "Side of tiles, a multiple of 16, such as that of "
                                "the slices the model was trained on. Left out: no tiles.")
    OVERLAP = flags.DEFINE_float("overlap", 0.5, "The part of a tile that it shares with the next "
                                 "one, at least.")


def main() -> None:
    """Segments what the flags say."""
    mesh = sharding.mesh(MESH.value or "data:1", None if MESH.value else jax.local_devices()[:1])
    rules = sharding.rules(RULES.value)
    with sharding.use(mesh, rules):
        _segment(mesh, rules)


def _segment(mesh: jax.sharding.Mesh, rules: sharding.Rules) -> None:
    for flag in (CHECKPOINT, INPUT, OUT):
        if not flag.value:
            raise ValueError(f"--{flag.name} is missing; give it, as in --checkpoint=runs/a "
                             "--input=scan.nii.gz --out=masks")
    if OVERLAP.present and TILE.value is None:
        raise ValueError(f"--overlap={OVERLAP.value} is of tiles; give --tile too, such as "
                         "--tile=224")
    out = Path(OUT.value)
    if out.exists():
        raise ValueError(f"--out={out} exists already; give the name of a new directory")
    jobs = _find_jobs([Path(text).expanduser() for text in INPUT.value], out)
    preprocessing = _load_preprocessing(Path(CHECKPOINT.value).expanduser())
    model, _, _ = training.load_model(CHECKPOINT.value, mesh, rules, DTYPE.value, STEP.value,
                                      kind="segmentation")
    cases, failed = [], 0
    for path, mask, target in jobs:
        try:
            volume = _read(path, mask, preprocessing, model.config.in_channels)
        except (OSError, ValueError) as error:  # The other files are worth having.
            print(f"error: {error}", file=sys.stderr, flush=True)
            failed += 1
            continue
        began = time.perf_counter()
        shown, labels = _predict(model, volume, preprocessing)
        seconds = time.perf_counter() - began
        target.parent.mkdir(parents=True, exist_ok=True)
        overlays.write_labels(target, labels, volume.affine, len(preprocessing.classes))
        name = target.relative_to(out).as_posix().removesuffix(volumes.labels_ending(path))
        overlay = out / "overlays" / f"{name}.png"
        overlay.parent.mkdir(parents=True, exist_ok=True)
        _draw(overlay, volume, shown, labels, preprocessing.classes)
        told = f"{target}: {len(labels)} x {labels.shape[1]} x {labels.shape[2]} in {seconds:.1f} s"
        if volume.labels is not None:
            found = scores.score(volume.labels, labels, len(preprocessing.classes), volume.spacing)
            cases.append(segmentation_report.Case(name, found, overlay))
            told += _tell(found, volume.spacing)
        print(told, flush=True)
    if cases:
        workdir.write_json(out / "scores.json", {case.name: _as_json(
            case.scores, preprocessing.classes[1:]) for case in cases})
        page = segmentation_report.write(
            out, title=f"Segmentation by {CHECKPOINT.value}", classes=preprocessing.classes,
            cases=cases, images={})
        print(f"{page} is written.")
    if failed:
        raise ValueError(f"{failed} of {len(jobs)} files were not segmented; what is wrong with "
                         "them is said above")


def _load_preprocessing(checkpoint: Path) -> volumes.Preprocessing:
    if not checkpoint.is_dir():
        raise ValueError(f"--checkpoint={checkpoint}: there is no such directory; give the workdir "
                         "of a run of --task=segment")
    files = training.model_files(checkpoint)
    # Where it is not, the user knows the folder that was given.
    return volumes.Preprocessing.load(
        files if (files / volumes.PREPROCESSING).is_file() else checkpoint)


def _find_jobs(inputs: Sequence[Path], out: Path) -> list[tuple[Path, Path | None, Path]]:
    """(image, its mask if one is given, where its labels go) of every file."""
    found: dict[Path, Path] = {}
    for given in inputs:
        if not given.exists():
            raise ValueError(f"--input={given}: there is no such file or folder; correct its name")
        paths = volumes.find_images(given) if given.is_dir() else [given]
        if not paths:
            raise ValueError(f"--input={given}: there is no image in it, such as a .nii.gz, .npz, "
                             ".h5 or .png; give another folder")
        for path in paths:
            name = path.relative_to(given) if given.is_dir() else Path(path.name)
            target = out / name.with_name(volumes.stem(path) + volumes.labels_ending(path))
            if target in found:
                raise ValueError(f"--input: both {found[target]} and {path} would become "
                                 f"{target}; segment them one after the other")
            found[target] = path
    images = list(found.values())
    return list(zip(images, _find_truths(images), found, strict=True))


def _find_truths(images: Sequence[Path]) -> Sequence[Path | None]:
    """The mask of each, if any are given."""
    if TRUTH.value is None:
        return [None] * len(images)
    folder = Path(TRUTH.value).expanduser()
    if not folder.exists():
        raise ValueError(f"--truth={folder}: there is no such file or folder; correct its name")
    if not folder.is_dir():
        if len(images) > 1:
            raise ValueError(f"--truth={folder} is one mask, and there are {len(images)} images; "
                             "give a folder of masks")
        return [folder]
    masks, owners = volumes.find_masks(folder, images), {}
    for image, mask in zip(images, masks, strict=True):
        if mask is None:
            raise ValueError(f"--truth={folder}: there is no mask of {image}; give it the image's "
                             "name, or leave the image out")
        if owners.setdefault(mask, image) != image:
            raise ValueError(f"--truth={folder}: {mask} would be the mask of both {owners[mask]} "
                             f"and {image}; lay masks into subfolders as the images are")
    return masks


def _read(path: Path, mask: Path | None, preprocessing: volumes.Preprocessing, channels: int
          ) -> volumes.Volume:
    """The volume, checked to be one that the model can take and be measured by."""
    volume = volumes.read_volume(path, mask)
    layout = volumes.LAYOUTS.get(preprocessing.layout)
    if volume.labels is not None and layout is not None and layout.merge:
        volume = dataclasses.replace(volume, labels=np.minimum(volume.labels, 1))
    colors = _colors(preprocessing, channels)
    if volume.image.ndim == 4 and volume.image.shape[3] not in (1, colors):
        raise ValueError(f"{path}: it has {volume.image.shape[3]} channels, and the model takes "
                         f"{colors}; give images such as it was trained on")
    if volume.labels is not None and volume.labels.max() >= len(preprocessing.classes):
        raise ValueError(f"{mask or path}: the mask has the label {volume.labels.max()}, and the "
                         f"model's classes are 0 to {len(preprocessing.classes) - 1}; correct it")
    return volume


def _colors(preprocessing: volumes.Preprocessing, channels: int) -> int:
    """Of a slice, where a model sees so many channels in all."""
    return channels // (2 * preprocessing.neighbors + 1)


def _predict(model: Any, volume: volumes.Volume, preprocessing: volumes.Preprocessing
             ) -> tuple[np.ndarray, np.ndarray]:
    """(the image in [0, 1], its labels), both of the file's own size."""
    shown = preprocessing.normalize(volume.image)
    images = shown
    if TILE.value is None:
        images = preprocessing.prepare(volume.image, volume.spacing)
    if preprocessing.neighbors:
        slices = images.reshape(*images.shape[:3], -1)
        colors = _colors(preprocessing, model.config.in_channels)
        images = np.stack([preprocessing.with_neighbors(slices, z, colors)
                           for z in range(len(slices))])
    pieces = segmentation.stream(model, images, batch_size=BATCH_SIZE.value, tile=TILE.value,
                                 overlap=OVERLAP.value)
    labels = np.concatenate(list(track(
        pieces, description=volume.name, total=math.ceil(len(images) / BATCH_SIZE.value),
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())))
    # Classes that the data has not are nothing.
    labels = np.where(labels < len(preprocessing.classes), labels, 0).astype(np.uint8)
    if TILE.value is None:
        labels = preprocessing.restore(labels, volume.image.shape[:3])
    return shown, labels


def _draw(path: Path, volume: volumes.Volume, shown: np.ndarray, labels: np.ndarray,
          classes: Sequence[str]) -> None:
    masks = {"prediction": labels}
    if volume.labels is not None:
        masks = {"truth": volume.labels, **masks}
    z = int(np.argmax(sum((mask > 0).sum((1, 2)) for mask in masks.values())))
    overlays.draw(path, shown[z], {f"{title}, slice {z}" if len(labels) > 1 else title: mask[z]
                                   for title, mask in masks.items()}, classes)


def _tell(found: dict[str, np.ndarray], spacing: Any) -> str:
    measured = found["hd95"][np.isfinite(found["hd95"])]
    unit = "voxels" if spacing is None else "mm"
    return f", Dice {found['dice'].mean():.3f}" + (
        f", HD95 {measured.mean():.1f} {unit}" if measured.size else "")


def _as_json(found: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, Any]:
    """Scores by name and class; null where a distance is none."""
    return {score: {name: float(x) if np.isfinite(x) else None
                    for name, x in zip(names, values, strict=True)}
            for score, values in found.items()}


if __name__ == "__main__":
    command.run(main, computes=True)
