"""Labelled images and volumes from files, in parts for training and evaluation, made ready for a
model.

`--data=LAYOUT:FOLDER` names a layout, see `LAYOUTS`:

  synapse   as TransUNet's preprocessing leaves it: train_npz/case0005_slice012.npz and
            test_vol_h5/case0001.npy.h5, each with `image` and `label`; train.txt and test_vol.txt
            in lists/lists_Synapse, where they are, choose among them
  acdc      patient001/patient001_frame01.nii.gz and patient001_frame01_gt.nii.gz, in the folders
            training/ and testing/ where there are such
  avt       NIfTI as below, of aortas in CT
  nifti     X.nii.gz beside X_seg.nii.gz (or _gt, _mask, _label, .seg), in any subfolders; or
            imagesTr/ and labelsTr/, and imagesTs/ and labelsTs/, as in the Medical Segmentation
            Decathlon
  png       images/ and masks/ with files of the same names, .png or .jpg; a mask has class ids, or
            0 and 255 for two classes
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import math
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from recipes import phantoms

PARTS = ("train", "validation", "heldout")
PREPROCESSING = "segment.json"  # In a workdir; see `Preprocessing`.
PICTURES = (".png", ".jpg", ".jpeg")
_NIFTI = (".nii.gz", ".nii")
_ARRAYS = (".npy.h5", ".h5", ".npz")
_MASKS = ("_seg", ".seg", "_gt", "_mask", "_label")
_HELDOUT, _VALIDATION = 0.2, 0.1  # The part of all patients, and of what is left of them.
_FORMAT = 2  # Of prepared slices on disk, and of what `read_volume` refuses.
_LARGEST = 2**14  # Pixels of a slice's side.
_MOST_NEIGHBORS = 64
_RECORD = ("image", "labels", "voxels")  # Of each.


@dataclasses.dataclass(frozen=True)
class Volume:
    """An image, or slices of one body that lie one above the other.

    Attributes:
      name: of the case.
      image: [Z, H, W] or [Z, H, W, C], numbers as the file has them.
      labels: uint8 [Z, H, W], or None where the truth is not known.
      spacing: millimetres between slices, rows and columns; None where the file does not say.
      affine: of a NIfTI, float64 [4, 4]: from (column, row, slice), which is the order of its own
        axes, to millimetres.
    """

    name: str
    image: np.ndarray
    labels: np.ndarray | None = None
    spacing: tuple[float, float, float] | None = None
    affine: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image is made ready for a model; a run keeps it for those who use its model.

    Attributes:
      layout: of the data, a key of `LAYOUTS` or "phantoms".
      classes: their names, background first.
      image_size: of the square slices that the model sees.
      window: values, or percentiles of the image, that become 0 and 1; what lies beyond is clipped.
      percentiles: which of both.
      pixel: millimetres; slices are brought to such pixels first, where their spacing is known.
      neighbors: how many slices before one, and after it, a model sees as further channels of it;
        in the order of the file or files, whatever their distance.
    """

    layout: str
    classes: tuple[str, ...]
    image_size: int
    window: tuple[float, float]
    percentiles: bool = False
    pixel: float | None = None
    neighbors: int = 0

    def __post_init__(self):
        def check(name, ok, wanted):
            if not ok:
                raise ValueError(f"{name} {getattr(self, name)!r}: it must be {wanted}")

        check("layout", isinstance(self.layout, str), "a name")
        check("classes", all(isinstance(c, str) for c in self.classes), "names")
        check("image_size", _is_whole_number(self.image_size, 1, _LARGEST),
              f"a whole number from 1 to {_LARGEST}")
        check("window", len(self.window) == 2 and all(map(_is_finite, self.window)), "two numbers")
        check("percentiles", isinstance(self.percentiles, bool), "true or false")
        check("window", not self.percentiles or 0 <= min(self.window) <= max(self.window) <= 100,
              "percentiles, from 0 to 100")
        check("pixel", self.pixel is None or _is_finite(self.pixel) and self.pixel > 0,
              "millimetres above 0, or null")
        check("neighbors", _is_whole_number(self.neighbors, 0, _MOST_NEIGHBORS),
              f"at least 0, a whole number, and at most {_MOST_NEIGHBORS}")

    def normalize(self, image: np.ndarray) -> np.ndarray:
        """[Z, H, W] or [Z, H, W, C] as float32 in [0, 1]."""
        return np.stack(list(self._slices(image)))

    def prepare(self, image: np.ndarray, spacing: tuple[float, float, float] | None = None
                ) -> np.ndarray:
        """[Z, H, W] or [Z, H, W, C] as float32 [Z, image_size, image_size, C], without neighbors.

        Slices are zoomed by cubic splines, which may overshoot [0, 1] a little. `spacing` is that
        of a `Volume`.
        """
        found = []
        for x in self._slices(image):
            if self.pixel is not None and spacing is not None:
                sides = [max(1, round(n * step / self.pixel))
                         for n, step in zip(x.shape, spacing[1:], strict=False)]
                if max(sides) > _LARGEST:
                    raise ValueError(
                        f"pixels of {spacing[1]:g} x {spacing[2]:g} mm make its slices "
                        f"{_sides(tuple(sides))} pixels of {self.pixel:g} mm; at most {_LARGEST} "
                        "can be, so correct its affine, or its unit, as with nibabel's "
                        "set_xyzt_units('mm')")
                x = _zoom(x, sides, 3)
            x = _zoom(x, (self.image_size, self.image_size), 3)
            found.append(x[..., None] if x.ndim == 2 else x)
        return np.stack(found)

    def with_neighbors(self, images: np.ndarray, z: int, colors: int) -> np.ndarray:
        """Slice z of a volume's [Z, H, W, C] as a model sees it.

        Returns [H, W, colors * (2 neighbors + 1)]: the slices in their order; beyond the ends of
        the volume its last slice stands again. One channel fills all colors.

        Raises ValueError for images or a z that are none.
        """
        if images.ndim != 4 or images.shape[3] not in (1, colors) or not 0 <= z < len(images):
            counts = " or ".join(map(str, sorted({1, colors})))
            raise ValueError(f"images are {images.shape} and z is {z}; images must be [Z, H, W, C] "
                             f"with {counts} channels, and z one of their slices")
        places = np.arange(z - self.neighbors, z + self.neighbors + 1)
        found = [images[place] for place in np.clip(places, 0, len(images) - 1)]
        return np.concatenate([np.broadcast_to(x, (*x.shape[:2], colors)) for x in found], -1)

    def prepare_labels(self, labels: np.ndarray) -> np.ndarray:
        """uint8 [Z, H, W] -> [Z, image_size, image_size], by the nearest pixel."""
        return np.stack([_zoom(x, (self.image_size, self.image_size), 0) for x in labels])

    def restore(self, labels: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """uint8 [Z, image_size, image_size] -> `shape`, [Z, H, W], by the nearest pixel."""
        return np.stack([_zoom(x, shape[1:], 0) for x in labels])

    def save(self, folder: Path) -> None:
        """Writes `PREPROCESSING` there."""
        (folder / PREPROCESSING).write_text(json.dumps(self.to_json(), indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Preprocessing":
        """Reads what `save` wrote. Raises ValueError where it has not."""
        path = folder / PREPROCESSING
        if not path.is_file():
            raise ValueError(f"{folder} has no {PREPROCESSING}, which says how images are made "
                             "ready; give the workdir of a run of --task=segment")
        try:
            found = cls.from_json(json.loads(path.read_text("utf-8")))
            if not found.classes:
                raise ValueError("classes (): it must be names, that of the background first")
            return found
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); the same training command writes it "
                             "again") from error

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {**dataclasses.asdict(self), "classes": list(self.classes),
                "window": list(self.window)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Preprocessing":
        """Of what `to_json` gave."""
        return cls(**{**value, "classes": tuple(value["classes"]),
                      "window": tuple(value["window"])})

    def _slices(self, image: np.ndarray) -> Iterator[np.ndarray]:
        """Slices in [0, 1], one at a time: in float32 the whole may be much larger than before."""
        low, high = self.window
        if self.percentiles:
            low, high = np.percentile(image, self.window, axis=(0, 1, 2)).astype(np.float32)
        # An image of one value is all 0.
        width = np.maximum(np.float32(high - low), np.finfo(np.float32).tiny)
        for x in image:
            yield (np.clip(x, low, high).astype(np.float32) - low) / width


def _is_finite(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _is_whole_number(x: Any, least: int, most: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and least <= x <= most


def _zoom(x: np.ndarray, sides: Sequence[int], order: int) -> np.ndarray:
    """[H, W] or [H, W, C] with other sides; corner pixels stay at the corners."""
    if x.shape[:2] == tuple(sides):
        return x
    from scipy import ndimage

    factors = [new / old for new, old in zip(sides, x.shape, strict=False)]
    if x.ndim == 2:
        return ndimage.zoom(x, factors, order=order)
    return np.stack([ndimage.zoom(x[..., c], factors, order=order) for c in range(x.shape[2])], -1)


# --- files ---------------------------------------------------------------------------------------


def read_volume(path: Path, labels: Path | None = None) -> Volume:
    """Reads a NIfTI (.nii, .nii.gz), arrays `image` and `label` (.npz, .h5) or a picture.

    A NIfTI's axes x, y, z become columns, rows and slices, a fourth one channels; lengths in metres
    or microns become millimetres. Its mask must lie on it, to half a voxel, and has its unit where
    it names none. A picture is a slice of numbers from 0 to 255.

    Args:
      path: of the image.
      labels: its mask, of the same kind of file; arrays have theirs in `path`.

    Raises:
      ValueError: one line that names the file, what is wrong with it, and what to do.
      OSError: there is no such file.
    """
    name = stem(path)
    if _ending(path) in _NIFTI:
        image, affine, unit = _read_nifti(path)
        x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
        mask = None
        if labels is not None:
            mask, other, _ = _read_nifti(labels, unit)
            if mask.shape == image.shape[:3]:
                # No voxel lies farther from its place than one of a corner.
                corners = np.array(np.meshgrid(*((0, n - 1) for n in mask.shape[::-1]), 1))
                corners = corners.reshape(4, -1)
                apart = np.abs(np.linalg.solve(affine, other @ corners) - corners).max()
                if apart > 0.5:
                    raise ValueError(
                        f"{labels}: it lies up to {apart:.3g} voxels from {path}, and half a voxel "
                        "is the most; resample the mask onto the image, or if they belong together "
                        "voxel by voxel save it with the image's affine and unit")
        volume = Volume(name, image, mask, (float(z), float(y), float(x)), affine)
    elif _ending(path) in _ARRAYS:
        volume, labels = Volume(name, *_read_arrays(path)), path
    elif _ending(path) in PICTURES:
        volume = Volume(name, _read_picture(path)[None],
                        None if labels is None else _read_mask(labels)[None])
    else:
        raise ValueError(f"{path}: it is no file of images; give one that ends in "
                         + ", ".join((*_NIFTI, *_ARRAYS, *PICTURES)))
    _check_image(path, volume.image)
    if volume.image.dtype.kind == "b":  # Of which there are no percentiles.
        volume = dataclasses.replace(volume, image=volume.image.astype(np.uint8))
    if volume.labels is None:
        return volume
    return dataclasses.replace(volume, labels=_check_labels(labels, volume.labels, path,
                                                            volume.image.shape[:3]))


def _ending(path: Path) -> str:
    """What its kind is told by, in lower case."""
    name = path.name.lower()
    return next((end for end in (*_NIFTI, *_ARRAYS) if name.endswith(end)), path.suffix.lower())


def stem(path: Path) -> str:
    """Its name without what its kind is told by."""
    return path.name[:len(path.name) - len(_ending(path))]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Says of what a library raises that the file is at fault."""
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except (ValueError, OSError, EOFError, SyntaxError, KeyError, TypeError, RuntimeError,
            OverflowError, MemoryError, zlib.error, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error):
            raise ValueError(f"{path}: it holds Python objects, which are never loaded; save plain "
                             "arrays of numbers") from error
        raise ValueError(f"{path}: it cannot be read ({str(error) or type(error).__name__}), so it "
                         "is cut off or damaged; fetch it again") from error


def _library(name: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = {"PIL.Image": "pillow"}.get(name, name)
        raise ValueError(f"{path}: {package} is needed to read it; pip install "
                         "'parazoo[medical]'") from None


def _read_nifti(path: Path, unit: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
    """([Z, H, W] or [Z, H, W, C], the affine in millimetres, float64 [4, 4], its unit's code).

    `unit` is that of a file that names none; with 0 such a file is in millimetres.
    """
    nibabel = _library("nibabel", path)
    try:
        with _reading(path):
            file = nibabel.load(path)
            array = np.asarray(file.dataobj)
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError
            ) as error:
        raise ValueError(f"{path}: it is no NIfTI ({error}); fetch it again, or convert it") from (
            error)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim not in (3, 4):
        raise ValueError(f"{path}: its shape is {array.shape}; it must have three axes, or "
                         "channels as a fourth")
    if not isinstance(file, nibabel.Nifti1Pair):
        raise ValueError(f"{path}: it is {type(file).__name__} and no NIfTI volume; convert it")
    if not any(int(file.header[code]) > 0 for code in ("sform_code", "qform_code")):
        raise ValueError(f"{path}: it has no affine (both its sform and its qform code are 0), "
                         "so where its voxels lie is unknown; set one, as with nibabel's "
                         "set_sform(affine, code=1)")
    affine = np.asarray(file.affine, np.float64)
    if not (np.isfinite(affine).all() and np.linalg.det(affine[:3, :3])):
        raise ValueError(f"{path}: its affine {affine[:3].tolist()} gives voxels no size or no "
                         "place; set a right one, as with nibabel's set_sform(affine, code=1)")
    unit = int(file.header["xyzt_units"]) & 7 or unit  # That of space is the lowest three bits.
    affine[:3] *= {1: 1e3, 3: 1e-3}.get(unit, 1.0)
    return np.swapaxes(array, 0, 2), affine, unit


def _read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """`image` and `label` of an .npz or .h5, with one slice where they have two axes."""
    found: dict[str, np.ndarray] = {}
    if _ending(path) == ".npz":
        with _reading(path), np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("image", "label") if name in file}
    else:
        h5py = _library("h5py", path)
        with _reading(path), h5py.File(path) as file:
            found = {name: file[name][()] for name in ("image", "label") if name in file}
    if "image" not in found:
        raise ValueError(f"{path}: it has no array 'image'; save the slices under that name, and "
                         "their classes as 'label'")
    for name, array in found.items():
        if np.ndim(array) not in (2, 3):
            raise ValueError(f"{path}: the shape of {name!r} is {np.shape(array)}; it must be [H, "
                             "W] or [Z, H, W]")
        found[name] = array[None] if array.ndim == 2 else array
    return found["image"], found.get("label")


@contextlib.contextmanager
def _open_picture(path: Path) -> Iterator[Any]:
    pillow = _library("PIL.Image", path)
    try:
        with _reading(path), pillow.open(path) as file:
            yield file
    except pillow.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}; cut it into parts") from error


def _read_picture(path: Path) -> np.ndarray:
    """[H, W] or [H, W, 3], from 0 to 255."""
    with _open_picture(path) as file:
        if file.mode in ("1", "L", "LA"):
            return np.asarray(file.convert("L"))
        if file.mode.startswith("I"):  # 16 bits
            return np.asarray(file).astype(np.float32) / 257
        return np.asarray(file.convert("RGB"))


def _read_mask(path: Path) -> np.ndarray:
    """Class ids [H, W]."""
    with _open_picture(path) as file:
        mask = np.asarray(file)  # Of a palette the indices.
    if mask.ndim == 3:
        colors = mask[..., :3] if mask.shape[-1] > 2 else mask[..., :1]  # Without opacity.
        if (colors[..., :1] != colors).any():
            raise ValueError(f"{path}: it is a mask of colours; save class ids, in gray or with a "
                             "palette")
        mask = mask[..., 0]
    if _ending(path) != ".png":  # JPEG blurs what was 0 and 255.
        if 0 < mask.max() < 128:
            raise ValueError(f"{path}: it goes from {mask.min()} to {mask.max()}; a JPEG holds a "
                             "mask of 0 and 255 only, so save class ids as PNG")
        return (mask >= 128).astype(np.uint8)
    return (mask == 255).astype(np.uint8) if np.isin(mask, (0, 255)).all() else mask


def _check_image(path: Path, image: np.ndarray) -> None:
    if image.dtype.kind not in "biuf":
        raise ValueError(f"{path}: its voxels are {image.dtype}; they must be integers or floats")
    if not image.size:
        raise ValueError(f"{path}: its shape is {image.shape}, so it holds nothing; leave it out")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        count = np.count_nonzero(~np.isfinite(image))
        raise ValueError(f"{path}: {count} of its voxels are nan or infinite; replace them, or "
                         "leave the file out")


def _check_labels(path: Path, labels: np.ndarray, image: Path, shape: tuple[int, ...]
                  ) -> np.ndarray:
    """The labels as uint8."""
    if labels.shape != shape:
        raise ValueError(f"{path}: the mask is {_sides(labels.shape)} and the image {image.name} "
                         f"{_sides(shape)}; they must be of one size, so resample the mask")
    if labels.dtype.kind not in "biuf":
        raise ValueError(f"{path}: the labels are {labels.dtype}; they must be whole numbers from "
                         "0 to 255")
    found = labels.astype(np.uint8) if labels.dtype.kind in "biu" else np.nan_to_num(
        np.clip(labels, 0, 255)).astype(np.uint8)
    wrong = labels[found != labels]
    if wrong.size:
        raise ValueError(f"{path}: the mask has the label {wrong[0]}; labels are whole numbers "
                         "from 0 to 255, so correct it")
    return found


def _sides(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def labels_ending(image: Path) -> str:
    """Of the file with an image's labels: .png of a picture, else .nii.gz."""
    return ".png" if _ending(image) in PICTURES else ".nii.gz"


def find_images(folder: Path) -> list[Path]:
    """Files anywhere below that `read_volume` takes, but for what their names say to be masks."""
    return [path for path in _files(folder, (*_NIFTI, *_ARRAYS, *PICTURES))
            if not stem(path).endswith(_MASKS)]


def find_masks(folder: Path, images: Sequence[Path]) -> list[Path | None]:
    """Of each image its mask in a folder, which has its name, or that with an ending such as _seg.

    Of several it is the one whose subfolders are those of the image. Arrays have theirs in their
    own file.

    Raises:
      ValueError: several fit alike.
    """
    by_name: dict[str, list[Path]] = {}
    for path in _files(folder, (*_NIFTI, *PICTURES)):
        by_name.setdefault(stem(path), []).append(path)
    return [image if _ending(image) in _ARRAYS else _find_mask(folder, by_name, image)
            for image in images]


def _find_mask(folder: Path, by_name: Mapping[str, list[Path]], image: Path) -> Path | None:
    endings = _NIFTI if _ending(image) in _NIFTI else PICTURES
    above = image.absolute().parent.parts
    found: dict[tuple[int, int], list[Path]] = {}
    for rank, more in enumerate((*_MASKS, "")):
        for path in by_name.get(stem(image) + more, ()):
            if _ending(path) in endings and not path.samefile(image):
                below = path.relative_to(folder).parent.parts
                fits = below == above[len(above) - len(below):]
                found.setdefault((-len(below) if fits else 1, rank), []).append(path)
    if not found:
        return None
    best = found[min(found)]
    if len(best) > 1:
        raise ValueError(f"{image}: both {best[0]} and {best[1]} could be its mask; lay masks into "
                         "subfolders as the images are")
    return best[0]


# --- layouts -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A volume of a data set.

    Attributes:
      name: of its own in its part.
      patient: cases of one patient are in one part.
      read: gives the volume.
      files: (image, its mask where that is another file), each some of the volume's slices, in
        order; none of a phantom.
    """

    name: str
    patient: str
    read: Callable[[], Volume]
    files: tuple[tuple[Path, Path | None], ...] = ()


def _case(name: str, patient: str, files: Sequence[tuple[Path, Path | None]]) -> Case:
    return Case(name, patient, functools.partial(_read_case, name, tuple(files)), tuple(files))


def _read_case(name: str, files: tuple[tuple[Path, Path | None], ...]) -> Volume:
    volumes = [read_volume(*pair) for pair in files]
    for (image, mask), volume in zip(files, volumes, strict=True):
        if volume.labels is None:
            raise ValueError(f"{mask or image}: it has no array 'label'; save the mask under that "
                             "name")
        if volume.image.shape[1:] != volumes[0].image.shape[1:]:
            raise ValueError(f"{image}: it is {_sides(volume.image.shape[1:])} and {files[0][0]} "
                             f"{_sides(volumes[0].image.shape[1:])}; slices of a case must be of "
                             "one size")
    if len(volumes) == 1:
        return dataclasses.replace(volumes[0], name=name)
    return Volume(name, *(np.concatenate([getattr(v, field) for v in volumes])
                          for field in ("image", "labels")))


def _files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Those anywhere below, but for hidden ones, by name."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and _ending(path) in endings
                  and not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _find_synapse(root: Path) -> dict[str, list[Case]]:
    lists = root / "lists" / "lists_Synapse"
    slices = _listed(lists / "train.txt", _files(root / "train_npz", (".npz",)))
    held = _listed(lists / "test_vol.txt", _files(root / "test_vol_h5", (".npy.h5", ".h5")))
    if slices and not held:
        raise ValueError(f"{root / 'test_vol_h5'}: there are no held-out volumes; put the .npy.h5 "
                         "of the test cases there")
    cases: dict[str, list[tuple[int, Path]]] = {}
    for path in slices:
        match = re.fullmatch(r"(.+)_slice(\d+)", stem(path))
        if match is None:
            raise ValueError(f"{path}: its name says no case and slice; call it as "
                             "case0005_slice012.npz")
        cases.setdefault(match[1], []).append((int(match[2]), path))
    for path in held:
        if stem(path) in cases:
            raise ValueError(f"{path}: slices of this case are in {root / 'train_npz'}, so it is "
                             "not held out; take one of both away")
    return {"train": [_case(name, name, [(path, None) for _, path in sorted(found)])
                      for name, found in cases.items()],
            "heldout": [_case(stem(path), stem(path), [(path, None)]) for path in held]}


def _listed(lines: Path, paths: list[Path]) -> list[Path]:
    """Those that a list of names has, in its order; all where there is no list."""
    if not lines.is_file():
        return paths
    by_name = {stem(path): path for path in paths}
    with _reading(lines):
        names = lines.read_text("utf-8").split()
    for name, count in collections.Counter(names).items():
        if count > 1:
            raise ValueError(f"{lines}: it has {name!r} twice; take one of them out")
        if name not in by_name:
            raise ValueError(f"{lines}: there is no file of {name!r}; restore it, or take the line "
                             "out")
    return [by_name[name] for name in names]


def _find_acdc(root: Path) -> dict[str, list[Case]]:
    root = root / "database" if (root / "database").is_dir() else root
    if not (root / "training").is_dir():
        return {"train": _pairs(root, root)}
    return {"train": _pairs(root / "training", root), "heldout": _pairs(root / "testing", root)}


def _find_nifti(root: Path) -> dict[str, list[Case]]:
    if not (root / "imagesTr").is_dir():
        return {"train": _pairs(root, root)}
    parts = {"train": _folders(root / "imagesTr", root / "labelsTr", _NIFTI)}
    if (root / "labelsTs").is_dir():  # Often the truth about these is not given away.
        parts["heldout"] = _folders(root / "imagesTs", root / "labelsTs", _NIFTI)
    return parts


def _find_png(root: Path) -> dict[str, list[Case]]:
    return {"train": _folders(root / "images", root / "masks", PICTURES)}


def _pairs(folder: Path, root: Path) -> list[Case]:
    """Cases whose masks lie beside them."""
    images, masks = {}, {}
    for path in _files(folder, _NIFTI):
        name = stem(path)
        ending = next((end for end in _MASKS if name.endswith(end)), None)
        if ending is not None:
            _add(masks, path.parent / name.removesuffix(ending), path)
        elif not name.endswith("_4d"):  # ACDC's whole cycle of a heart, which has no mask.
            _add(images, path.parent / name, path)
    for place, path in images.items():
        if place not in masks:
            raise ValueError(f"{path}: its mask is missing; put {place.name}_seg.nii.gz beside it, "
                             "or take the image away")
    for place, path in masks.items():
        if place not in images:
            raise ValueError(f"{path}: its image is missing; put {place.name}.nii.gz beside it, or "
                             "take the mask away")
    # Scans of one patient are told by lying in a folder whose name theirs begin with.
    found = []
    for place, path in images.items():
        name, patient = place.relative_to(root).as_posix(), place.parent.name
        is_own = place.parent != folder and place.name.startswith(patient)
        found.append(_case(name, patient if is_own else name, [(path, masks[place])]))
    return found


def _folders(images: Path, masks: Path, endings: tuple[str, ...]) -> list[Case]:
    """Cases whose masks have their names, in another folder."""
    cases: dict[Path, Path] = {}
    for path in _files(images, endings):
        name = stem(path)
        if _ending(path) in _NIFTI:
            if name.endswith("_0001"):
                raise ValueError(f"{path}: it is a second channel; join channels along a fourth "
                                 "axis, in one file")
            name = name.removesuffix("_0000")  # nnU-Net's number of a channel
        _add(cases, path.relative_to(images).with_name(name), path)
    by_name: dict[Path, Path] = {}
    for path in _files(masks, endings):
        _add(by_name, path.relative_to(masks).with_name(stem(path)), path)
    for name, path in cases.items():
        if name not in by_name:
            raise ValueError(f"{path}: its mask is missing; put {name.as_posix()}{endings[0]} into "
                             f"{masks}, or take the image away")
    return [_case(name.as_posix(), name.as_posix(), [(path, by_name[name])])
            for name, path in cases.items()]


def _add(found: dict[Path, Path], name: Path, path: Path) -> None:
    """Raises ValueError if there is another file of that name."""
    if name in found:
        raise ValueError(f"{path}: {found[name]} is of the same case; take one of them away")
    found[name] = path


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a data set lies in its folder, and how it is made ready.

    Attributes:
      find: cases by part, "train" and where the distributor has held some out "heldout".
      wanted: what must be in the folder, in words.
      window, percentiles, pixel: see `Preprocessing`.
      classes: by label, None: those that the masks have.
      merge: whether all labels but 0 are one class.
    """

    find: Callable[[Path], dict[str, list[Case]]]
    wanted: str
    window: tuple[float, float]
    percentiles: bool = False
    pixel: float | None = None
    classes: tuple[str, ...] | None = None
    merge: bool = False


LAYOUTS: Mapping[str, Layout] = {
    # The window [-125, 275] is behind these already.
    "synapse": Layout(_find_synapse, "train_npz/*.npz and test_vol_h5/*.npy.h5", (0.0, 1.0),
                      classes=phantoms.CLASSES),
    "acdc": Layout(_find_acdc, "patient001/patient001_frame01.nii.gz and so on", (0.5, 99.5), True,
                   classes=("background", "right ventricle", "myocardium", "left ventricle")),
    "avt": Layout(_find_nifti, "D1.nii.gz beside D1.seg.nii.gz and so on", (-190.0, 1668.0),
                  pixel=1.0, classes=("background", "aorta"), merge=True),
    "nifti": Layout(_find_nifti, "X.nii.gz beside X_seg.nii.gz, or imagesTr/ and labelsTr/",
                    (0.5, 99.5), True),
    "png": Layout(_find_png, "images/ and masks/ with .png or .jpg of the same names",
                  (0.0, 255.0)),
}
_WINDOW = (-125.0, 275.0)  # Of phantoms, in Hounsfield units.
_IMAGE_SIZE = 224


# --- data sets -----------------------------------------------------------------------------------


class Dataset:
    """Cases in three parts, with slices made ready.

    Prepared slices of files lie on disk, where they are found again by their files' contents; read
    of them is what is asked for. Those of phantoms are in memory.

    Attributes:
      preprocessing: how slices are made ready.
      parts: cases by part, one of `PARTS`.
      channels: of an image that a model sees.
      voxels: of each class in the training part, int64 [classes], as files have them.
      fingerprint: of all volumes, their parts and the preprocessing.
    """

    def __init__(self, parts: Mapping[str, Sequence[Case]], preprocessing: Preprocessing,
                 num_classes: int, *, merge: bool = False,
                 cache_dir: str | os.PathLike | None = None):
        """Reads, checks and prepares the files whose slices are not in the cache yet.

        Args:
          parts: see the attribute.
          preprocessing: without classes they become those that the masks have.
          num_classes: how many labels there may be where `preprocessing` does not say.
          merge: whether all labels but 0 are one class.
          cache_dir: keeps prepared slices for the next run; None: for this object alone.

        Raises:
          ValueError: see `read_volume`; or a label out of range.
        """
        self.parts, self._merge = parts, merge
        if cache_dir is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="parazoo-")
            cache_dir = self._temporary.name
        self._folder = Path(cache_dir)
        self._prepared: dict[Case, Path | np.ndarray] = {}
        self._places: dict[str, list[tuple[Case, int]]] = {}
        counts, digest, self._colors = {}, hashlib.blake2b(digest_size=16), 1
        how = preprocessing.to_json()
        del how["neighbors"]  # Which slices a model sees beside one is not of the data.
        digest.update(json.dumps(how).encode())
        for part, cases in parts.items():
            self._places[part], counts[part] = [], np.zeros(256, np.int64)
            for case in cases:
                key = self._prepare(case, preprocessing)
                digest.update(f"\0{part}\0{case.name}\0{key}".encode())
                records = self._records(case)
                found = np.asarray(records["voxels"], np.int64)
                _check_range(case, found, len(preprocessing.classes), num_classes)
                counts[part] += found.sum(0)
                self._places[part] += [(case, z) for z in range(len(records))]
                colors = records["image"].shape[-1]
                if 1 not in (colors, self._colors) and colors != self._colors:
                    raise ValueError(f"{case.files[0][0] if case.files else case.name}: it has "
                                     f"{colors} channels, and others have {self._colors}; give "
                                     "all of them the same ones")
                self._colors = max(self._colors, colors)
        self.channels = self._colors * (2 * preprocessing.neighbors + 1)
        if preprocessing.neighbors and all(self.depth(case) == 1 for case in parts["train"]):
            raise ValueError(f"neighbors {preprocessing.neighbors}: no image of the training part "
                             "has more than one slice; leave it out")
        largest = int(np.flatnonzero(sum(counts.values()))[-1])
        if not largest:
            raise ValueError(f"data {preprocessing.layout}: no mask has a label besides 0, the "
                             "background; give masks of class ids")
        self.preprocessing = preprocessing if preprocessing.classes else dataclasses.replace(
            preprocessing, classes=("background", *(f"class {i + 1}" for i in range(largest))))
        self.voxels = counts["train"][:len(self.classes)]
        self.fingerprint = digest.hexdigest()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by label."""
        return self.preprocessing.classes

    def depth(self, case: Case) -> int:
        """Its slices."""
        return len(self._records(case))

    def num_slices(self, part: str) -> int:
        """Of all its cases together."""
        return len(self._places[part])

    def slice(self, part: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A prepared slice, counted over the part's cases in order.

        Returns:
          (float32 [S, S, channels], uint8 [S, S]), S being the preprocessing's image_size. An image
          of one channel among colour images fills all of theirs.
        """
        case, z = self._places[part][index]
        records = self._records(case)
        return (self.preprocessing.with_neighbors(records["image"], z, self._colors),
                np.array(records[z]["labels"]))

    def volume(self, case: Case) -> Volume:
        """A case as its files have it."""
        volume = case.read()
        return dataclasses.replace(volume, labels=np.minimum(volume.labels, 1)) if (
            self._merge) else volume

    def _prepare(self, case: Case, preprocessing: Preprocessing) -> str:
        """Sees to it that `_records` finds the case; returns a hash of the case, made ready."""
        digest = hashlib.blake2b(digest_size=16)
        how = {**preprocessing.to_json(), "format": _FORMAT, "merge": self._merge}
        del how["layout"], how["classes"], how["neighbors"]
        digest.update(json.dumps(how).encode())
        for path in (path for pair in case.files for path in pair if path is not None):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, hashlib.blake2b).digest())
        if case.files:
            path = self._folder / f"{digest.hexdigest()}.npy"
            self._prepared[case] = path
            if not _is_whole(path):
                self._keep(path, _make_records(self.volume(case), preprocessing))
            return digest.hexdigest()
        volume = self.volume(case)
        self._prepared[case] = _make_records(volume, preprocessing)
        digest.update(volume.image.tobytes() + volume.labels.tobytes())
        return digest.hexdigest()

    def _keep(self, path: Path, records: np.ndarray) -> None:
        """Writes them whole or not at all."""
        part = path.with_suffix(f".{os.getpid()}.npy")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            np.save(part, records, allow_pickle=False)
            os.replace(part, path)
        except OSError as error:
            raise ValueError(f"{self._folder}: prepared slices cannot be kept there ({error}); "
                             f"it takes {records.nbytes / 2**20:.1f} MiB for this case alone, so "
                             "make room, or name another disk with XDG_CACHE_HOME") from error
        finally:
            part.unlink(missing_ok=True)

    def _records(self, case: Case) -> np.ndarray:
        """[Z] slices made ready: see `_make_records`."""
        found = self._prepared[case]
        # No file is left open: there may be more than a process can have open.
        return np.load(found, "r", allow_pickle=False) if isinstance(found, Path) else found


def _make_records(volume: Volume, preprocessing: Preprocessing) -> np.ndarray:
    """Of each slice the image, its labels, and how many voxels of each label the file has."""
    image = preprocessing.prepare(volume.image, volume.spacing)
    side = image.shape[1:3]
    fields = (np.float32, image.shape[1:]), (np.uint8, side), (np.uint32, (256,))
    records = np.empty(len(image), [(name, *field) for name, field in zip(
        _RECORD, fields, strict=True)])
    records["image"], records["labels"] = image, preprocessing.prepare_labels(volume.labels)
    for record, labels in zip(records, volume.labels, strict=True):
        record["voxels"] = np.bincount(labels.ravel(), minlength=256)
    return records


def _is_whole(path: Path) -> bool:
    """Whether what `_make_records` gave is there, and no write of it was cut off."""
    try:
        found = np.load(path, "r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return found.ndim == 1 and found.dtype.names == _RECORD


def _check_range(case: Case, voxels: np.ndarray, given: int, num_classes: int) -> None:
    """Raises ValueError for a label beyond the classes; voxels [Z, 256] of each label."""
    slices, labels = np.nonzero(voxels)
    worst = int(np.argmax(labels))
    if labels[worst] < (given or num_classes):
        return
    pair = case.files[slices[worst] if len(case.files) > 1 else 0] if case.files else ()
    where = next((path for path in reversed(pair) if path is not None), case.name)
    label = labels[worst]
    if given:
        raise ValueError(f"{where}: the mask has the label {label}, and the classes are 0 to "
                         f"{given - 1}; correct the mask, or the names of the classes")
    raise ValueError(f"{where}: the mask has the label {label}, and the model's classes are 0 to "
                     f"{num_classes - 1}; give --set=num_classes={label + 1}, or correct the mask")


def load(spec: str, num_classes: int, *, image_size: int | None = None,
         heldout: float | None = None, class_names: Sequence[str] = (), neighbors: int = 0,
         cache_dir: str | os.PathLike | None = None) -> Dataset:
    """Loads the data that a spec names.

    Patients are held out whole, and so are those for validation, a tenth of the others. Which these
    are depends on their names alone.

    Args:
      spec: "phantoms", or LAYOUT:FOLDER with one of `LAYOUTS`.
      num_classes: of the model.
      image_size: the side of prepared slices; None: 224, and that of the phantoms.
      heldout: the part of the patients to hold out, None for a fifth. It is for data whose
        distributor holds none out.
      class_names: of labels 1, 2, ... where the layout has no names; otherwise they are numbered.
      neighbors: see `Preprocessing`.
      cache_dir: see `Dataset`.

    Raises:
      ValueError: one line that names the folder or file, what is wrong with it, and what to do.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size {image_size}: it must be at least 1")
    if heldout is not None and not 0 < heldout < 1:
        raise ValueError(f"heldout {heldout}: it must lie between 0 and 1")
    name, _, folder = spec.partition(":")
    layout = LAYOUTS.get(name)
    if spec != "phantoms" and (layout is None or not folder):
        raise ValueError(f"data {spec!r}: it must be phantoms, or LAYOUT:FOLDER with one of "
                         f"{', '.join(LAYOUTS)}, as png:scans")
    classes = phantoms.CLASSES if layout is None else layout.classes
    if classes and class_names:
        raise ValueError(f"class_names: data {name!r} has names of its own; leave them out")
    if class_names:
        classes = ("background", *class_names)
        if "" in classes or len({metric_name(name) for name in classes}) < len(classes):
            raise ValueError(f"class_names {','.join(class_names)}: they must differ, from one "
                             "another and from background, which label 0 is; correct them")
    if layout is None:
        parts = {part: [_phantom(part, i, x) for i, x in enumerate(phantoms.load(part))]
                 for part in PARTS}
        size = parts["train"][0].read().image.shape[1]
        preprocessing = Preprocessing("phantoms", classes, image_size or size, _WINDOW,
                                      neighbors=neighbors)
    else:
        parts = {part: cases for part, cases in _find(layout, Path(folder)).items() if cases}
        preprocessing = Preprocessing(
            name, tuple(classes or ()), image_size or _IMAGE_SIZE, layout.window,
            layout.percentiles, layout.pixel, neighbors)
    if heldout is not None and "heldout" in parts:
        raise ValueError(f"heldout: {spec} has a part that is held out already; leave it out")
    if "heldout" not in parts:
        parts["train"], parts["heldout"] = _divide(
            parts["train"], _HELDOUT if heldout is None else heldout, spec)
    if "validation" not in parts:
        parts["train"], parts["validation"] = _divide(parts["train"], _VALIDATION, spec)
    return Dataset(parts, preprocessing, num_classes, cache_dir=cache_dir,
                   merge=layout is not None and layout.merge)


def metric_name(class_name: str) -> str:
    """How metrics write a class: "left kidney" is "left_kidney"."""
    return class_name.replace(" ", "_")


def _phantom(part: str, index: int, phantom: phantoms.Phantom) -> Case:
    name = f"{part}_{index}"
    return Case(name, name, lambda: Volume(name, phantom.image, phantom.labels, phantoms.SPACING))


def _find(layout: Layout, folder: Path) -> dict[str, list[Case]]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; give that of the data")
    parts = layout.find(folder)
    if not parts["train"]:
        raise ValueError(f"{folder}: nothing to train on is there; it must have {layout.wanted}")
    return parts


def _divide(cases: Sequence[Case], share: float, spec: str) -> tuple[list[Case], list[Case]]:
    """(the others, about this share of the patients), at least one of each."""
    patients = sorted({case.patient for case in cases}, key=lambda name: hashlib.blake2b(
        name.encode(), digest_size=8).digest())
    count = max(1, round(share * len(patients)))
    if count >= len(patients):
        raise ValueError(f"data {spec}: of {len(patients)} patients or images {count} would be put "
                         "aside for evaluation, and none be left; give more, at least three in "
                         "all, or a smaller --heldout")
    chosen = set(patients[:count])
    return ([case for case in cases if case.patient not in chosen],
            [case for case in cases if case.patient in chosen])
