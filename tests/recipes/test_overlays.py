"""Masks as a viewer and as a reader of pictures find them."""

import io

import nibabel
import numpy as np
import pytest
from PIL import Image

from recipes import overlays
from recipes.volumes import read_volume

NAMES = ("background", "liver", "aorta")
AFFINE = np.array([[-0.7, 0, 0, 90], [0, 0.7, 0.1, -80], [0, 0, 2.5, 12], [0, 0, 0, 1]])


def labels(*shape):
    return np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)


def test_a_mask_lies_over_its_scan(tmp_path):
    """Of other sides along each axis, so that none is taken for another."""
    scan = np.random.default_rng(0).normal(size=(7, 6, 5)).astype(np.float32)  # x, y, z
    nibabel.save(nibabel.Nifti1Image(scan, AFFINE), tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    mask = (volume.image > 0).astype(np.uint8)
    overlays.write_mask(tmp_path / "mask.nii.gz", mask, volume.affine)
    found = nibabel.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(found.dataobj), scan > 0)
    np.testing.assert_allclose(found.affine, AFFINE, rtol=1e-6)
    header = found.header
    assert header.get_data_dtype() == np.uint8 and header.get_xyzt_units()[0] == "mm"
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    np.testing.assert_allclose(found.get_qform()[:3, 3], AFFINE[:3, 3])
    np.testing.assert_array_equal(
        read_volume(tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz").labels, mask)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask.nii.gz", "scan.nii.gz"]


def test_a_mask_without_a_place(tmp_path):
    mask = labels(3, 4, 5)
    overlays.write_mask(tmp_path / "mask.nii.gz", mask, None)
    found = read_volume(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(found.image, mask)
    np.testing.assert_array_equal(found.affine, np.eye(4))


@pytest.mark.parametrize("classes", [2, 3])
def test_a_picture_of_labels(tmp_path, classes):
    mask = np.minimum(labels(9, 7), classes - 1)
    overlays.write_picture(tmp_path / "mask.png", mask, classes)
    with Image.open(tmp_path / "mask.png") as picture:
        assert picture.mode == "L" and picture.getextrema()[1] == {2: 255, 3: 2}[classes]
    Image.fromarray(np.zeros_like(mask)).save(tmp_path / "image.png")
    found = read_volume(tmp_path / "image.png", tmp_path / "mask.png")
    np.testing.assert_array_equal(found.labels[0], mask)


def test_colors_are_apart():
    found = overlays.colors(40)
    apart = np.abs(found[:, None] - found[None]).sum(-1) + np.eye(40)
    assert found.shape == (40, 3) and found.min() >= 0 and found.max() <= 1 and apart.min() > 0.05
    np.testing.assert_array_equal(found[:5], overlays.colors(5))


def test_an_overlay(tmp_path):
    """Each mask's colour is where it is, over gray and over coloured images."""
    mask = np.zeros((40, 30), np.uint8)
    mask[8:32, 5:25] = 2
    for image in (np.full((40, 30), 0.5), np.full((40, 30, 3), 0.5), np.full((40, 30, 4), 0.5)):
        overlays.draw(tmp_path / "o.png", image, {"truth": mask, "prediction": 0 * mask}, NAMES)
        with Image.open(io.BytesIO((tmp_path / "o.png").read_bytes())) as picture:
            pixels = np.asarray(picture.convert("RGB")) / 255
        middle = pixels[pixels.shape[0] // 3, :]
        wanted = 0.45 * 0.5 + 0.55 * overlays.colors(3)[2]
        found = np.abs(middle - wanted).max(-1) < 0.02
        # The mask is two thirds of the middle one of three panels wide.
        assert 0.15 < found.mean() < 0.25
        assert 0.35 < np.flatnonzero(found).mean() / len(middle) < 0.65
        assert (np.abs(middle - 0.5).max(-1) < 0.02).mean() > 0.4


def test_names_are_drawn_as_they_are(tmp_path):
    """What would be a formula, were it one."""
    name = "cost$1_$2"
    overlays.draw(tmp_path / "a.png", np.zeros((9, 9)), {name: np.eye(9, dtype=np.uint8)},
                  ("background", name))
    assert (tmp_path / "a.png").is_file()
