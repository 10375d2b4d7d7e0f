"""Scores of segmented volumes: Dice and the 95th percentile of the Hausdorff distance."""

import numpy as np


def score(truth: np.ndarray, prediction: np.ndarray, classes: int,
          spacing: tuple[float, float, float] | None = None) -> dict[str, np.ndarray]:
    """Compares two labellings of a volume.

    A volume of one slice is an image, in which borders are those of a plane.

    Args:
      truth, prediction: labels below `classes`, integers [Z, H, W].
      classes: how many there are, background (0) included.
      spacing: millimetres between slices, rows and columns; None: distances are in voxels.

    Returns:
      Scores by name, each float64 [classes - 1], background left out. Of a class' voxels A in
      truth and B in prediction:
        dice: 2 |A and B| / (|A| + |B|); 1 where both are empty.
        hd95: the 95th percentile of the distances, in millimetres (see `spacing`), from each
          border's voxels to the nearest one of the other border; nan where both are empty, inf
          where one is.
        hd95_voxels: the same in voxels.
        reference_dice, reference_hd95: as results on Synapse are reported, by the authors of
          ParaTransCNN (arXiv:2401.15307) too: distances are in voxels, and (Dice, distance) are
          (0, 0) where B is empty and (1, 0) where A alone is. The former lowers mean distances
          and the latter raises the mean Dice.

    Raises:
      ValueError: other shapes, labels that are none, or a spacing that is none.
    """
    if truth.ndim != 3 or truth.shape != prediction.shape or not truth.size:
        raise ValueError(f"truth is {truth.shape} and the prediction {prediction.shape}; both must "
                         "be [Z, H, W], of the same volume")
    for name, labels in (("truth", truth), ("the prediction", prediction)):
        if not np.issubdtype(labels.dtype, np.integer) or not (
                labels.min() >= 0 and labels.max() < classes):
            raise ValueError(f"{name} is {labels.dtype}, from {labels.min()} to {labels.max()}; "
                             f"labels are integers from 0 to {classes - 1}")
    if spacing is not None and (len(spacing) != 3 or not min(spacing) > 0):
        raise ValueError(f"spacing is {spacing}; it must be three lengths above 0, in millimetres")
    sizes = [np.bincount(labels.ravel(), minlength=classes)[1:] for labels in (truth, prediction)]
    both = np.bincount(truth[truth == prediction], minlength=classes)[1:]
    union = sizes[0] + sizes[1]
    dice = np.where(union > 0, 2 * both / np.maximum(union, 1), 1.0)
    hd95 = np.where(union > 0, np.inf, np.nan)
    voxels = np.zeros(classes - 1)
    borders = [_borders(labels, classes) for labels in (truth, prediction)]
    for index in np.flatnonzero((sizes[0] > 0) & (sizes[1] > 0)):
        one, other = (found[index] for found in borders)
        voxels[index] = _hd95(one, other)
        hd95[index] = voxels[index] if spacing is None else _hd95(
            one * np.asarray(spacing), other * np.asarray(spacing))
    alone = (sizes[0] == 0) & (sizes[1] > 0)
    return {"dice": dice, "hd95": hd95, "reference_hd95": voxels,
            "hd95_voxels": np.where(np.isfinite(hd95), voxels, hd95),
            "reference_dice": np.where(sizes[1] == 0, 0.0, np.where(alone, 1.0, dice))}


def _borders(labels: np.ndarray, classes: int) -> list[np.ndarray | None]:
    """Of each class but background the voxels [K, 3] that have a face to another, or None."""
    from scipy import ndimage

    found: list[np.ndarray | None] = []
    boxes = ndimage.find_objects(labels.astype(np.int32), classes - 1)
    for label, box in enumerate(boxes, 1):
        if box is None:
            found.append(None)
            continue
        mask = labels[box] == label
        # Beyond the box, as beyond the volume, there is nothing of the class.
        inner = (ndimage.binary_erosion(mask[0])[None] if len(labels) == 1
                 else ndimage.binary_erosion(mask))
        found.append(np.argwhere(mask & ~inner) + [side.start for side in box])
    return found


def _hd95(one: np.ndarray, other: np.ndarray) -> float:
    """Of two sets of points [K, 3]."""
    from scipy.spatial import KDTree

    # The borders are few of the voxels: trees of them take a tenth of what maps of distances do.
    there, back = KDTree(other).query(one)[0], KDTree(one).query(other)[0]
    return float(np.percentile(np.concatenate([there, back]), 95))
