"""Segmentations to look at: masks drawn over an image, and files that a viewer lays over a scan."""

import gzip
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from recipes.workdir import write

_OPACITY = 0.55


def colors(classes: int) -> np.ndarray:
    """A colour for each class, float64 [classes, 3] in [0, 1]; that of the background is black."""
    import matplotlib

    # Without gray, which the image is; and beyond these, hues far from one another.
    some = np.delete(matplotlib.colormaps["tab10"].colors, 7, axis=0)
    more = np.arange(max(0, classes - 1 - len(some)))
    hues = np.stack([0.618 * more % 1, np.full(len(more), 0.75), 1 - 0.3 * (more % 2)], axis=-1)
    return np.concatenate([np.zeros((1, 3)), some, matplotlib.colors.hsv_to_rgb(hues)])[:classes]


def draw(path: Path, image: np.ndarray, masks: Mapping[str, np.ndarray], classes: Sequence[str]
         ) -> None:
    """Writes a PNG: the image, and beside it the image under each mask, with a legend.

    Args:
      path: of the file.
      image: [H, W] or [H, W, C] in [0, 1]; unless of three channels, the first one is shown.
      masks: uint8 [H, W] by title.
      classes: names by label, background first.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if image.ndim == 3 and image.shape[-1] != 3:
        image = image[..., 0]
    plain = np.clip(image, 0, 1).astype(np.float64)
    plain = plain if plain.ndim == 3 else plain[..., None].repeat(3, axis=-1)
    palette, seen = colors(len(classes)), np.unique(list(masks.values()))
    figure = Figure(figsize=(3.4 * (1 + len(masks)), 3.4 * len(image) / image.shape[1] + 0.9),
                    layout="constrained")
    for axes, (title, mask) in zip(
            figure.subplots(1, 1 + len(masks), squeeze=False)[0],
            {"image": np.zeros(image.shape[:2], np.uint8), **masks}.items(), strict=True):
        shown = np.where((mask > 0)[..., None],
                         (1 - _OPACITY) * plain + _OPACITY * palette[mask], plain)
        axes.imshow(shown, vmin=0, vmax=1)
        axes.set_title(title, fontsize=9, parse_math=False)  # A $ is one.
        axes.set_axis_off()
    handles = [Patch(color=palette[label], label=classes[label]) for label in seen if label]
    if handles:
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    write(path, data.getvalue())


def write_labels(path: Path, labels: np.ndarray, affine: np.ndarray | None, classes: int) -> None:
    """`write_picture` where `path` ends in .png, else `write_mask`. labels uint8 [Z, H, W]."""
    if path.suffix == ".png":
        write_picture(path, labels[0], classes)
    else:
        write_mask(path, labels, affine)


def write_mask(path: Path, labels: np.ndarray, affine: np.ndarray | None) -> None:
    """Writes a mask as NIfTI, so that a viewer lays it over the scan it is of.

    Args:
      path: of the file, .nii.gz.
      labels: uint8 [Z, H, W].
      affine: of the scan, float64 [4, 4], see `recipes.volumes.Volume`; None: voxels are
        millimetres.
    """
    try:
        import nibabel
    except ImportError:
        raise ValueError(f"{path}: nibabel is needed to write it; pip install "
                         "'parazoo[medical]'") from None
    affine = np.eye(4) if affine is None else affine
    image = nibabel.Nifti1Image(labels.T, affine, dtype=np.uint8)
    image.header.set_xyzt_units("mm")
    # Some viewers read the one and some the other; a qform has no shear and then comes near.
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    write(path, gzip.compress(image.to_bytes(), mtime=0))


def write_picture(path: Path, labels: np.ndarray, classes: int) -> None:
    """Writes a mask, uint8 [H, W], as a gray PNG: labels, or of two classes 0 and 255."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(labels * np.uint8(255 if classes == 2 else 1)).save(data, format="PNG")
    write(path, data.getvalue())
