"""Segmentation data from files: layouts, parts, preparation, and what is said of bad files."""

import gzip
import json

import numpy as np
import pytest
from scipy import ndimage

from recipes import volumes
from recipes.volumes import Preprocessing, load, read_volume

h5py = pytest.importorskip("h5py")
nibabel = pytest.importorskip("nibabel")
Image = pytest.importorskip("PIL.Image")

SIDE = 8
AFFINE = np.array([[-0.5, 0, 0, 9], [0, 0.75, 0, 7], [0, 0, 3, 5], [0, 0, 0, 1.0]])


def example(seed, depth=3, classes=4, shape=(12, 16)):
    """(float32 image, uint8 labels), [depth, 12, 16]; each class is there."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, (depth, *shape), dtype=np.uint8)
    labels[0, 0, :classes] = np.arange(classes)
    return (100 * labels + rng.normal(0, 10, labels.shape)).astype(np.float32), labels


def write_nifti(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array.T, affine), path)


def write_pair(stem, seed, ending="_seg", **kwargs):
    image, labels = example(seed, **kwargs)
    write_nifti(stem.with_name(f"{stem.name}.nii.gz"), image)
    write_nifti(stem.with_name(f"{stem.name}{ending}.nii.gz"), labels)
    return image, labels


def write_picture(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, mode).save(path)


def write_synapse(root, train=3, held=2, slices=3):
    for folder in ("train_npz", "test_vol_h5"):
        (root / folder).mkdir(parents=True)
    for i in range(train):
        image, labels = example(i, slices, 9)
        for z in range(slices):
            np.savez(root / f"train_npz/case{i:04d}_slice{z:03d}.npz", image=image[z] / 1000,
                     label=labels[z].astype(np.float32))
    for i in range(held):
        image, labels = example(100 + i, slices, 9)
        with h5py.File(root / f"test_vol_h5/case{50 + i:04d}.npy.h5", "w") as file:
            file["image"], file["label"] = image / 1000, labels.astype(np.float32)


def write_pictures(root, count=6, colors=3):
    for i in range(count):
        image, labels = example(i, 1, 2)
        image = np.repeat(image[0, ..., None], 3, -1) if colors == 3 else image[0]
        write_picture(root / f"images/p{i}.png", np.clip(image, 0, 255).astype(np.uint8))
        write_picture(root / f"masks/p{i}.png", labels[0] * np.uint8(255))


def names(data):
    return {part: [case.name for case in cases] for part, cases in data.parts.items()}


def get(spec, tmp_path, num_classes=9, **kwargs):
    return load(spec, num_classes, image_size=SIDE, cache_dir=tmp_path / "cache", **kwargs)


# --- layouts -------------------------------------------------------------------------------------


def test_synapse(tmp_path):
    write_synapse(tmp_path / "s", slices=11)
    data = get(f"synapse:{tmp_path / 's'}", tmp_path)
    found = names(data)
    assert found["heldout"] == ["case0050", "case0051"]
    assert sorted(found["train"] + found["validation"]) == [f"case{i:04d}" for i in range(3)]
    assert len(found["validation"]) == 1 and data.num_slices("train") == 22
    assert data.classes[1] == "aorta" and data.channels == 1
    # Slices come in the order of their numbers.
    case = data.parts["train"][0]
    image, labels = example(int(case.name[4:]), 11, 9)
    volume = data.volume(case)
    np.testing.assert_array_equal(volume.labels, labels)
    np.testing.assert_array_equal(volume.image, image / 1000)
    np.testing.assert_array_equal(data.volume(data.parts["heldout"][1]).labels,
                                  example(101, 11, 9)[1])
    assert volume.spacing is None and volume.affine is None
    assert data.voxels.tolist() == sum(
        np.bincount(data.volume(case).labels.ravel(), minlength=9)
        for case in data.parts["train"]).tolist()


def test_lists_choose_among_synapse(tmp_path):
    write_synapse(tmp_path)
    lists = tmp_path / "lists/lists_Synapse"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("case0001_slice001\ncase0002_slice000\ncase0001_slice000\n")
    (lists / "test_vol.txt").write_text("case0051\n")
    data = get(f"synapse:{tmp_path}", tmp_path)
    assert names(data)["heldout"] == ["case0051"]
    assert data.num_slices("train") + data.num_slices("validation") == 3
    (lists / "test_vol.txt").write_text("case0077\n")
    with pytest.raises(ValueError, match="test_vol.txt: there is no file of 'case0077'"):
        get(f"synapse:{tmp_path}", tmp_path)
    (lists / "test_vol.txt").write_text("case0051\ncase0051\n")
    with pytest.raises(ValueError, match="test_vol.txt: it has 'case0051' twice; take one"):
        get(f"synapse:{tmp_path}", tmp_path)
    (lists / "test_vol.txt").write_text("case0051\n", "utf-16")
    with pytest.raises(ValueError, match="test_vol.txt: it cannot be read .*utf-8"):
        get(f"synapse:{tmp_path}", tmp_path)
    (lists / "test_vol.txt").unlink()
    held = tmp_path / "test_vol_h5"
    (held / "case0050.npy.h5").rename(held / "case0001.npy.h5")
    with pytest.raises(ValueError, match="case0001.npy.h5: slices of this case are in .*train_npz"):
        get(f"synapse:{tmp_path}", tmp_path)


@pytest.mark.parametrize("distributed", [True, False])
def test_acdc(tmp_path, distributed):
    root = tmp_path / "acdc"
    for i in range(6):
        part = ("testing" if i == 5 else "training") if distributed else ""
        for frame in (1, 12):
            write_pair(root / part / f"patient{i:03d}/patient{i:03d}_frame{frame:02d}", i, "_gt")
        write_nifti(root / part / f"patient{i:03d}/patient{i:03d}_4d.nii.gz",
                    np.zeros((2, 3, 12, 16), np.float32))
    data = get(f"acdc:{root}", tmp_path, 4)
    patients = {part: {case.patient for case in cases} for part, cases in data.parts.items()}
    assert [len(patients[part]) for part in volumes.PARTS] == [4, 1, 1]
    assert len(set.union(*patients.values())) == 6
    assert all(len(cases) == 2 * len(patients[part]) for part, cases in data.parts.items())
    if distributed:
        assert patients["heldout"] == {"patient005"}
    assert data.classes[1:] == ("right ventricle", "myocardium", "left ventricle")


def test_avt_has_one_class_and_pixels_of_a_millimetre(tmp_path):
    for i in range(4):
        write_pair(tmp_path / f"a/D{i}/D{i}", i, ".seg", classes=3)
    data = get(f"avt:{tmp_path / 'a'}", tmp_path, 2)
    assert data.classes == ("background", "aorta")
    case = data.parts["train"][0]
    volume, found = data.volume(case), data.slice("train", 0)[0][..., 0]
    np.testing.assert_array_equal(volume.labels, example(int(case.name[1:2]), classes=3)[1] > 0)
    assert volume.spacing == (3.0, 0.75, 0.5)
    x = (np.clip(volume.image[0], -190, 1668) + 190) / 1858
    x = ndimage.zoom(x, (9 / 12, 8 / 16), order=3)  # To 1 mm
    np.testing.assert_allclose(found, ndimage.zoom(x, (8 / 9, 1), order=3), atol=1e-6)


def test_nifti_in_folders_of_images_and_labels(tmp_path):
    for i in range(5):
        for folder, array in zip(("imagesTr", "labelsTr"), example(i), strict=True):
            end = "_0000" if folder == "imagesTr" else ""
            write_nifti(tmp_path / folder / f"la_{i:03d}{end}.nii.gz", array)
    write_nifti(tmp_path / "imagesTs/la_900.nii.gz", example(9)[0])
    data = get(f"nifti:{tmp_path}", tmp_path)
    assert [len(data.parts[part]) for part in volumes.PARTS] == [3, 1, 1]
    assert data.classes == ("background", "class 1", "class 2", "class 3")
    # With the truth about them, the distributor's test images are those held out.
    write_nifti(tmp_path / "labelsTs/la_900.nii.gz", example(9)[1])
    data = get(f"nifti:{tmp_path}", tmp_path, class_names=("a", "b", "c"))
    assert names(data)["heldout"] == ["la_900"] and data.classes == ("background", "a", "b", "c")
    with pytest.raises(ValueError, match="has a part that is held out already; leave it out"):
        get(f"nifti:{tmp_path}", tmp_path, heldout=0.5)


def test_parts_are_by_the_names_of_patients_alone(tmp_path):
    for i in range(10):
        write_pair(tmp_path / f"a/x{i}", i, depth=1)
        write_pair(tmp_path / f"other/b/x{i}", i + 50, depth=1)
    one, other = (get(f"nifti:{tmp_path / path}", tmp_path, heldout=0.3)
                  for path in ("a", "other/b"))
    assert names(one) == names(other)
    assert [len(one.parts[part]) for part in volumes.PARTS] == [6, 1, 3]
    assert one.fingerprint != other.fingerprint
    with pytest.raises(ValueError, match="of 10 patients or images 10 would be put aside"):
        get(f"nifti:{tmp_path / 'a'}", tmp_path, heldout=0.99)


def test_pictures(tmp_path):
    write_pictures(tmp_path / "p")
    # A palette's indices are class ids; a JPEG's mask is cut in the middle; gray among colours.
    mask = np.zeros((40, 40), np.uint8)
    mask[8:24, 8:24] = 1
    palette = Image.fromarray(mask, "P")
    palette.putpalette([0, 0, 0, 200, 10, 10] * 128)
    write_picture(tmp_path / "p/images/q1.png", 50 + mask)
    palette.save(tmp_path / "p/masks/q1.png")
    write_picture(tmp_path / "p/images/q2.jpg", np.stack([mask * 90] * 3, -1))
    write_picture(tmp_path / "p/masks/q2.jpg", np.stack([mask * 255] * 3, -1))
    data = get(f"png:{tmp_path / 'p'}", tmp_path, 2)
    cases = {case.name: case for cases in data.parts.values() for case in cases}
    for name in ("q1", "q2"):
        np.testing.assert_array_equal(data.volume(cases[name]).labels, mask[None])
    assert data.classes == ("background", "class 1") and data.channels == 3
    for part, found in data.parts.items():
        for i, case in enumerate(found):
            x, labels = data.slice(part, i)
            assert x.shape == (SIDE, SIDE, 3) and labels.shape == (SIDE, SIDE)
            if case.name == "q1":
                assert data.volume(case).image.shape == (1, 40, 40)
                np.testing.assert_allclose(x[0, 0], 50 / 255, atol=1e-6)


def test_pictures_in_subfolders_have_the_masks_there(tmp_path):
    """Of the same names in all; hidden folders, such as a notebook leaves, are none of them."""
    for i, folder in enumerate("abc"):
        write_picture(tmp_path / f"p/images/{folder}/1.png", np.full((9, 9), 50 * i, np.uint8))
        write_picture(tmp_path / f"p/masks/{folder}/1.png", np.full((9, 9), i, np.uint8))
    write_picture(tmp_path / "p/images/.ipynb_checkpoints/1.png", np.zeros((9, 9), np.uint8))
    data = get(f"png:{tmp_path / 'p'}", tmp_path)
    cases = {case.name: case for cases in data.parts.values() for case in cases}
    assert sorted(cases) == ["a/1", "b/1", "c/1"]
    for i, folder in enumerate("abc"):
        volume = data.volume(cases[f"{folder}/1"])
        assert (volume.image == 50 * i).all() and (volume.labels == i).all()
    write_picture(tmp_path / "p/images/a/1.jpg", np.zeros((9, 9), np.uint8))
    with pytest.raises(ValueError, match="1.jpg is of the same case; take one of them away"):
        get(f"png:{tmp_path / 'p'}", tmp_path)


def test_a_mask_is_found_where_its_image_lies(tmp_path):
    for folder in "ab":
        write_nifti(tmp_path / f"images/{folder}/scan.nii.gz", example(0)[0])
        write_nifti(tmp_path / f"masks/{folder}/scan_seg.nii.gz", example(0)[1])
    images, masks = ([tmp_path / f"{kind}/{folder}/scan{more}.nii.gz" for folder in "ab"]
                     for kind, more in (("images", ""), ("masks", "_seg")))
    assert volumes.find_masks(tmp_path / "masks", images) == masks
    assert volumes.find_masks(tmp_path / "masks", [tmp_path / "other.nii.gz"]) == [None]
    write_nifti(tmp_path / "scan.nii.gz", example(0)[0])
    with pytest.raises(ValueError, match="could be its mask; lay masks into subfolders"):
        volumes.find_masks(tmp_path / "masks", [tmp_path / "scan.nii.gz"])


def test_pictures_of_16_bits_count_as_those_of_8(tmp_path):
    write_picture(tmp_path / "a.png", np.full((4, 5), 51 * 257, np.uint16))
    np.testing.assert_allclose(read_volume(tmp_path / "a.png").image, np.full((1, 4, 5), 51.0))


# --- files and preparation -----------------------------------------------------------------------


def test_a_nifti_comes_back_as_it_was(tmp_path):
    image, labels = write_pair(tmp_path / "x", 3)
    volume = read_volume(tmp_path / "x.nii.gz", tmp_path / "x_seg.nii.gz")
    np.testing.assert_array_equal(volume.image, image)
    np.testing.assert_array_equal(volume.labels, labels)
    np.testing.assert_allclose(volume.affine, AFFINE)
    assert volume.spacing == (3.0, 0.75, 0.5) and volume.name == "x"
    write_nifti(tmp_path / "c.nii", np.stack([image, 2 * image]))  # Channels, last in the file
    volume = read_volume(tmp_path / "c.nii")
    np.testing.assert_array_equal(volume.image, np.stack([image, 2 * image], -1))
    assert volume.labels is None


@pytest.mark.parametrize(("unit", "millimetres"), [("meter", 1000), ("mm", 1), ("micron", 0.001),
                                                   ("unknown", 1)])
def test_a_niftis_units_are_read(unit, millimetres, tmp_path):
    """The unit's length is scaled away; a mask has its image's where it names none.

    A mask a quarter of a voxel off is still one.
    """
    image, labels = example(0)
    stored, moved = AFFINE.copy(), AFFINE.copy()
    moved[0, 3] += 0.125
    stored[:3] /= millimetres
    for name, array, affine, its in (("x", image, stored, unit), ("y", labels, moved, "mm")):
        file = nibabel.Nifti1Image(array.T, affine)
        file.header.set_xyzt_units(its)
        nibabel.save(file, tmp_path / f"{name}.nii")
    volume = read_volume(tmp_path / "x.nii", tmp_path / "y.nii")
    np.testing.assert_allclose(volume.spacing, (3.0, 0.75, 0.5), rtol=1e-6)
    np.testing.assert_allclose(volume.affine, AFFINE, rtol=1e-6)
    write_nifti(tmp_path / "z.nii", labels, stored)
    assert read_volume(tmp_path / "x.nii", tmp_path / "z.nii").labels is not None


def test_slices_are_zoomed_as_the_authors_do():
    image, labels = example(0)
    p = Preprocessing("nifti", ("background",), SIDE, (0.0, 250.0))
    zoom = SIDE / 12, SIDE / 16
    found, small = p.prepare(image), p.prepare_labels(labels)
    assert found.shape == (3, SIDE, SIDE, 1) and found.dtype == np.float32
    for z in range(3):
        scaled = np.clip(image[z], 0, 250) / 250
        np.testing.assert_allclose(found[z, ..., 0], ndimage.zoom(scaled, zoom, order=3), atol=1e-5)
        np.testing.assert_array_equal(small[z], ndimage.zoom(labels[z], zoom, order=0))
        np.testing.assert_array_equal(
            p.restore(small, labels.shape)[z],
            ndimage.zoom(small[z], (12 / SIDE, 16 / SIDE), order=0))


def test_images_are_clipped_to_the_window():
    p = Preprocessing("phantoms", ("background",), 5, (-125.0, 275.0))
    image = np.array([[[-1000, -125, 75, 275, 3000]]], np.int16)
    np.testing.assert_array_equal(p.normalize(image), np.array([[[0, 0, 0.5, 1, 1]]], np.float32))


def test_percentiles_are_of_each_volume_and_channel():
    p = Preprocessing("acdc", ("background",), 4, (10.0, 90.0), percentiles=True)
    image = np.arange(3 * 5 * 5, dtype=np.int16).reshape(3, 5, 5)
    both = p.normalize(np.stack([image, 7 * image + 3], -1))
    np.testing.assert_allclose(both[..., 0], p.normalize(image), atol=1e-6)
    np.testing.assert_allclose(both[..., 1], both[..., 0], atol=1e-6)
    np.testing.assert_allclose(p.normalize(image)[1, 2], (np.arange(35, 40) - 7.4) / 59.2,
                               atol=1e-6)
    assert not p.normalize(np.full((1, 2, 2), 7)).any()


def test_preprocessing_is_kept(tmp_path):
    p = Preprocessing("avt", ("background", "aorta"), 7, (-190.0, 1668.0), pixel=1.0)
    p.save(tmp_path)
    assert Preprocessing.load(tmp_path) == p
    with pytest.raises(ValueError, match="has no segment.json, which says how images are made"):
        Preprocessing.load(tmp_path / "none")
    (tmp_path / volumes.PREPROCESSING).write_text('{"layout": "avt"}')
    with pytest.raises(ValueError, match="segment.json is damaged"):
        Preprocessing.load(tmp_path)


@pytest.mark.parametrize(("name", "value"), [
    ("layout", [1]), ("classes", []), ("classes", [1]), ("image_size", "32"), ("image_size", -3),
    ("image_size", 32.5), ("image_size", 10**7), ("window", [1]), ("window", ["a", "b"]),
    ("percentiles", "no"), ("pixel", 0), ("pixel", -1), ("pixel", True), ("neighbors", -1),
    ("neighbors", 10**9)])
def test_settings_that_were_edited_are_checked(name, value, tmp_path):
    p = Preprocessing("avt", ("background", "aorta"), 7, (-190.0, 1668.0), pixel=1.0)
    (tmp_path / volumes.PREPROCESSING).write_text(json.dumps({**p.to_json(), name: value}))
    with pytest.raises(ValueError, match=f"segment.json is damaged .*{name} .* it must be"):
        Preprocessing.load(tmp_path)


def test_pixels_of_a_thousandth_of_their_size_are_refused():
    """Micrometres, say: slices would become a thousand times as large."""
    p = Preprocessing("avt", ("background", "aorta"), 7, (-190.0, 1668.0), pixel=1.0)
    with pytest.raises(ValueError, match="pixels of 500 x 500 mm make its slices 50000 x 50000"):
        p.prepare(np.zeros((1, 100, 100)), (1.0, 500.0, 500.0))


def test_neighbors_are_of_slices_that_there_are():
    p, images = Preprocessing("phantoms", ("background",), 4, (0.0, 1.0), neighbors=1), np.ones(
        (3, 4, 4, 1), np.float32)
    assert p.with_neighbors(images, 2, 1).shape == (4, 4, 3)
    for wrong, z in ((images[..., 0], 0), (images, 3), (np.ones((3, 4, 4, 2)), 0)):
        with pytest.raises(ValueError, match=r"images must be \[Z, H, W, C\] with 1 channels"):
            p.with_neighbors(wrong, z, 1)


def test_prepared_slices_are_found_again(tmp_path, monkeypatch):
    for i in range(4):
        write_pair(tmp_path / f"n/x{i}", i)
    first = get(f"nifti:{tmp_path / 'n'}", tmp_path)
    made = sorted((tmp_path / "cache").iterdir())
    assert len(made) == 4
    monkeypatch.setattr(volumes, "read_volume", None)
    again = get(f"nifti:{tmp_path / 'n'}", tmp_path)
    assert again.fingerprint == first.fingerprint and again.classes == first.classes
    for x, y in zip(first.slice("train", 4), again.slice("train", 4), strict=True):
        np.testing.assert_array_equal(x, y)
    monkeypatch.undo()
    case = first.parts["train"][0]
    write_pair(tmp_path / f"n/{case.name}", 77)  # Another content is read anew.
    changed = get(f"nifti:{tmp_path / 'n'}", tmp_path)
    assert changed.fingerprint != first.fingerprint
    assert len(sorted((tmp_path / "cache").iterdir())) == 5
    np.testing.assert_array_equal(changed.volume(case).labels, example(77)[1])
    other = load(f"nifti:{tmp_path / 'n'}", 9, image_size=6, cache_dir=tmp_path / "cache")
    assert other.slice("train", 0)[1].shape == (6, 6)


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(path.read_bytes()[:300]), lambda path: path.write_bytes(b""),
    lambda path: np.save(path, np.array([{}], object)),
    lambda path: np.save(path, np.zeros(3))])
def test_damaged_slices_are_prepared_again(spoil, tmp_path):
    for i in range(3):
        write_pair(tmp_path / f"n/x{i}", i)
    first = get(f"nifti:{tmp_path / 'n'}", tmp_path)
    for path in (tmp_path / "cache").iterdir():
        spoil(path)
    again = get(f"nifti:{tmp_path / 'n'}", tmp_path)
    for x, y in zip(first.slice("train", 1), again.slice("train", 1), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_full_disk_is_named_and_nothing_half_written_stays(tmp_path, monkeypatch):
    def save(path, *_, **__):
        path.write_bytes(b"half")
        raise OSError("2 requested and 0 written")

    for i in range(3):
        write_pair(tmp_path / f"n/x{i}", i)
    monkeypatch.setattr(np, "save", save)
    with pytest.raises(ValueError, match="cache: prepared slices cannot be kept there .2 request"):
        get(f"nifti:{tmp_path / 'n'}", tmp_path)
    assert not list((tmp_path / "cache").iterdir())


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "words"), [
    ("scans", "data 'scans': it must be phantoms, or LAYOUT:FOLDER with one of synapse, acdc"),
    ("dicom:{}", "it must be phantoms, or LAYOUT:FOLDER with one of"),
    ("nifti:{}/none", "none: there is no such folder; give that of the data"),
    ("nifti:{}", "nothing to train on is there; it must have X.nii.gz beside X_seg.nii.gz"),
    ("synapse:{}", "it must have train_npz/*.npz and test_vol_h5/*.npy.h5"),
    ("png:{}", "it must have images/ and masks/"),
])
def test_a_wrong_spec_or_an_empty_folder(spec, words, tmp_path):
    with pytest.raises(ValueError) as error:
        get(spec.format(tmp_path), tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def spoil_range(root):
    image, labels = write_pair(root / "x0", 0)
    labels[1, 2, 3] = 200
    write_nifti(root / "x0_seg.nii.gz", labels)


def spoil_size(root):
    write_nifti(root / "x0_seg.nii.gz", example(0, 2)[1])


def spoil_affine(root, name="x0.nii.gz"):
    file = nibabel.load(root / name)
    file = nibabel.Nifti1Image(np.asarray(file.dataobj), None)
    nibabel.save(file, root / name)


def spoil_mask_affine(root):
    spoil_affine(root, "x0_seg.nii.gz")


def spoil_sides(root):
    """Of no height; nibabel refuses to write it."""
    data = bytearray(gzip.decompress((root / "x0.nii.gz").read_bytes()))
    data[312:328] = bytes(16)  # srow_z, of the header
    (root / "x0.nii.gz").write_bytes(gzip.compress(data))


def spoil_type(root):
    data = bytearray(gzip.decompress((root / "x0.nii.gz").read_bytes()))
    data[70:72] = b"\x11\0"  # datatype, of the header
    (root / "x0.nii.gz").write_bytes(gzip.compress(data))


def spoil_colors(root):
    colors = np.zeros((3, 12, 16), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    write_nifti(root / "x0_seg.nii.gz", colors)


def spoil_channels(root):
    for i in range(4):
        write_nifti(root / f"x{i}.nii.gz", np.repeat(example(i)[0][None], 2 + i % 2, 0))


def spoil_twin(root):
    write_nifti(root / "x0_gt.nii.gz", example(0)[1])


def spoil_axes(root):
    write_nifti(root / "x0_seg.nii.gz", example(0)[1], AFFINE * [[-1], [1], [1], [1]])


def spoil_place(root):
    moved = AFFINE.copy()
    moved[1, 3] += 2.5
    write_nifti(root / "x0_seg.nii.gz", example(0)[1], moved)


def spoil_end(root):
    path = root / "x0.nii.gz"
    path.write_bytes(path.read_bytes()[:-200])


def spoil_start(root):
    (root / "x0.nii.gz").write_bytes(gzip.compress(b"no image at all" * 100))


def spoil_voxel(root):
    image, _ = example(0)
    image[0, 1, 2] = np.nan
    write_nifti(root / "x0.nii.gz", image)


def spoil_label(root):
    write_nifti(root / "x0_seg.nii.gz", np.full((3, 12, 16), 0.5, np.float32))


def spoil_mask(root):
    (root / "x0_seg.nii.gz").unlink()


def spoil_image(root):
    (root / "x0.nii.gz").unlink()


@pytest.mark.parametrize(("spoil", "words"), [
    (spoil_range, ["x0_seg.nii.gz: the mask has the label 200, and the model's classes are 0 to 8",
                   "give --set=num_classes=201"]),
    (spoil_size, ["x0_seg.nii.gz: the mask is 2 x 12 x 16 and the image x0.nii.gz 3 x 12 x 16",
                  "resample the mask"]),
    (spoil_affine, ["x0.nii.gz: it has no affine", "set one"]),
    (spoil_sides, ["x0.nii.gz: its affine [[", "gives voxels no size or no place; set a"]),
    (spoil_type, ["x0.nii.gz: it is no NIfTI", "fetch it again, or convert it"]),
    (spoil_colors, ["x0_seg.nii.gz: the labels are [('R', 'u1')", "they must be whole numbers"]),
    (spoil_channels, ["channels, and others have", "give all of them the same ones"]),
    (spoil_twin, ["x0_seg.nii.gz: ", "x0_gt.nii.gz is of the same case; take one of them away"]),
    (spoil_mask_affine, ["x0_seg.nii.gz: it has no affine", "set one"]),
    (spoil_axes, ["x0_seg.nii.gz: it lies up to 36 voxels from", "resample the mask"]),
    (spoil_place, ["x0_seg.nii.gz: it lies up to 3.33 voxels from", "the image's affine"]),
    (spoil_end, ["x0.nii.gz: it cannot be read", "cut off or damaged; fetch it again"]),
    (spoil_start, ["x0.nii.gz: it is no NIfTI", "fetch it again, or convert it"]),
    (spoil_voxel, ["x0.nii.gz: 1 of its voxels are nan or infinite; replace them"]),
    (spoil_label, ["x0_seg.nii.gz: the mask has the label 0.5; labels are whole numbers"]),
    (spoil_mask, ["x0.nii.gz: its mask is missing; put x0_seg.nii.gz beside it"]),
    (spoil_image, ["x0_seg.nii.gz: its image is missing; put x0.nii.gz beside it"]),
])
def test_a_bad_nifti_is_named(spoil, words, tmp_path):
    root = tmp_path / "n"
    for i in range(4):
        write_pair(root / f"x{i}", i)
    spoil(root)
    with pytest.raises(ValueError) as error:
        get(f"nifti:{root}", tmp_path)
    assert str(root) in str(error.value) and "\n" not in str(error.value)
    for text in words:
        assert text in str(error.value)


def test_bad_arrays_are_named(tmp_path):
    path = tmp_path / "case0001_slice000.npz"

    def message(path):
        with pytest.raises(ValueError) as error:
            read_volume(path)
        assert str(path) in str(error.value)
        return str(error.value)

    np.savez(path, image=np.zeros((4, 5)), label=np.zeros((4, 4)))
    assert "the mask is 1 x 4 x 4 and the image" in message(path)
    path.write_bytes(path.read_bytes()[:-30])
    assert "cut off or damaged; fetch it again" in message(path)
    np.savez(path, image=np.array([[{}, 1]], object), label=np.zeros((1, 2)))
    assert "it holds Python objects, which are never loaded" in message(path)
    np.savez(path, pixels=np.zeros((4, 5)))
    assert "it has no array 'image'" in message(path)
    volume = tmp_path / "case0002.npy.h5"
    with h5py.File(volume, "w") as file:
        file["image"] = np.zeros((50, 60, 70))
    assert read_volume(volume).labels is None
    with h5py.File(volume, "w") as file:
        file.create_group("image")
    assert "it cannot be read" in message(volume)
    with h5py.File(volume, "w") as file:
        file["image"] = np.zeros((50, 60, 70))
    volume.write_bytes(volume.read_bytes()[:2000])
    assert "cut off or damaged; fetch it again" in message(volume)
    with h5py.File(volume, "w") as file:
        file["image"] = np.array([["a", "b"]], h5py.string_dtype())
    assert "they must be integers or floats" in message(volume)
    with h5py.File(volume, "w") as file:
        file.create_dataset("image", (10**5, 10**5, 10**5), "f4")
    assert "cut off or damaged; fetch it again" in message(volume)


def test_a_header_that_promises_more_than_memory_holds(tmp_path):
    path = tmp_path / "x.nii.gz"
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.float32), AFFINE)
    content = bytearray(image.to_bytes())
    content[42:48] = np.full(3, 32000, "<i2").tobytes()  # dim[1:4]
    path.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(ValueError, match="x.nii.gz: it cannot be read .*cut off or damaged"):
        read_volume(path)


def test_a_nifti_of_surfaces_is_no_volume(tmp_path):
    axes = nibabel.cifti2.ScalarAxis(["a"]), nibabel.cifti2.BrainModelAxis.from_mask(
        np.ones((2, 2, 2)), "thalamus_left", np.eye(4))
    path = tmp_path / "x.dscalar.nii"
    nibabel.save(nibabel.Cifti2Image(np.zeros((1, 8), np.float32), axes), path)
    with pytest.raises(ValueError, match="x.dscalar.nii: it is Cifti2Image and no NIfTI volume"):
        read_volume(path)


def test_bad_pictures_are_named(tmp_path):
    write_pictures(tmp_path / "p")
    spec = f"png:{tmp_path / 'p'}"
    first = tmp_path / "p/masks/p0.png"
    write_picture(first, np.full((12, 16), 2, np.uint8))
    with pytest.raises(ValueError, match=r"p0.png: the mask has the label 2, and the model's"):
        get(spec, tmp_path, 2)
    with pytest.raises(ValueError, match="the mask has the label 2, and the classes are 0 to 1"):
        get(spec, tmp_path, 3, class_names=("polyp",))
    write_picture(first, np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3))
    with pytest.raises(ValueError, match="p0.png: it is a mask of colours; save class ids"):
        get(spec, tmp_path, 2)
    first.write_bytes(first.read_bytes()[:80])
    with pytest.raises(ValueError, match="masks/p0.png: it cannot be read .*fetch it again"):
        get(spec, tmp_path, 2)
    first.unlink()
    jpeg = first.with_suffix(".jpg")
    write_picture(jpeg, np.full((12, 16), 3, np.uint8))
    with pytest.raises(ValueError, match="p0.jpg: it goes from 3 to 3; a JPEG .* as PNG"):
        get(spec, tmp_path, 2)
    jpeg.unlink()
    with pytest.raises(ValueError, match="images/p0.png: its mask is missing; put p0.png into"):
        get(spec, tmp_path, 2)


def test_settings_that_do_not_fit_are_refused(tmp_path):
    write_synapse(tmp_path)
    for settings, words in (({"image_size": 0}, "image_size 0: it must be at least 1"),
                            ({"heldout": 1.0}, "heldout 1.0: it must lie between 0 and 1"),
                            ({"class_names": ("a",)}, "has names of its own; leave them out")):
        with pytest.raises(ValueError, match=words):
            load(f"synapse:{tmp_path}", 9, **settings)
    for class_names in (("a", "a"), ("a", ""), ("background", "a"), ("a b", "a_b")):
        with pytest.raises(ValueError, match="they must differ, from one another and from backgr"):
            load(f"nifti:{tmp_path}", 9, class_names=class_names)
    for path in (tmp_path / "test_vol_h5").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="there are no held-out volumes; put the .npy.h5"):
        get(f"synapse:{tmp_path}", tmp_path)
