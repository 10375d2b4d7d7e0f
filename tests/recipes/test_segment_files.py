"""recipes.segment from the command line, with a model of random weights."""

import json

import nibabel
import numpy as np
import pytest
from PIL import Image

import zoo
from recipes import command, segment, volumes
from recipes.scores import score
from tests import tiny
from tests.zoo.test_paratranscnn import drawn

CLASSES = ("background", "liver", "aorta")
SIDE = 32
PREPROCESSING = volumes.Preprocessing("nifti", CLASSES, SIDE, (0.0, 100.0))
AFFINE = np.diag([0.8, 0.9, 3.0, 1.0])


@pytest.fixture(scope="module")
def model():
    return drawn(zoo.override(zoo.config("paratranscnn-tiny"), {
        "num_classes": 4, "cnn.width": 4, "transformer": None}))


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("segment") / "model"
    zoo.save(model, folder)
    PREPROCESSING.save(folder)
    return folder


def drawn_volume(*shape, seed=0):
    """(image, labels) of which no two rows are alike."""
    rng = np.random.default_rng(seed)
    labels = np.kron(rng.integers(0, 3, [-(-n // 8) for n in shape]), np.ones([8] * len(shape)))
    labels = labels[tuple(slice(n) for n in shape)].astype(np.uint8)
    return (40 * labels + rng.integers(0, 20, shape)).astype(np.uint8), labels


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(folder of images, of masks): a scan with its mask, slices with labels, a picture."""
    images, masks = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("masks")
    image, labels = drawn_volume(3, 40, 24)
    nibabel.save(nibabel.Nifti1Image(image.T.astype(np.int16), AFFINE), images / "scan.nii.gz")
    nibabel.save(nibabel.Nifti1Image(labels.T, AFFINE), masks / "scan_seg.nii.gz")
    image, labels = drawn_volume(2, 24, 24, seed=1)
    (images / "more").mkdir()
    np.savez(images / "more" / "slices.npz", image=image, label=labels)
    image, labels = drawn_volume(40, 28, seed=2)
    Image.fromarray(image).save(images / "picture.png")
    Image.fromarray(labels).save(masks / "picture.png")
    return images, masks


def run(checkpoint, out, *flags) -> int:
    return command.execute(segment.main, [
        "segment", f"--checkpoint={checkpoint}", f"--out={out}", "--batch_size=1",
        *map(str, flags)])


@pytest.fixture(scope="module")
def done(checkpoint, files, tmp_path_factory):
    out = tmp_path_factory.mktemp("done") / "masks"
    assert run(checkpoint, out, f"--input={files[0]}", f"--truth={files[1]}") == 0
    return out


def expected(model, volume):
    images = PREPROCESSING.prepare(volume.image, volume.spacing)
    labels = zoo.segment(model, images, batch_size=1)
    return PREPROCESSING.restore(np.where(labels < 3, labels, 0), volume.image.shape)


def test_labels_of_all_files(model, files, done):
    names = {"picture.png": "picture.png", "scan.nii.gz": "scan.nii.gz",
             "more/slices.npz": "more/slices.nii.gz"}
    for image, mask in names.items():
        volume = volumes.read_volume(files[0] / image, done / mask) if "npz" not in image else (
            volumes.read_volume(files[0] / image))
        found = volume.labels
        if "npz" in image:
            found = np.asarray(nibabel.load(done / mask).dataobj).T
        wanted = expected(model, volume)
        assert len(np.unique(wanted)) > 1
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(nibabel.load(done / "scan.nii.gz").affine, AFFINE)
    drawn = sorted(str(path.relative_to(done)) for path in (done / "overlays").rglob("*.png"))
    assert drawn == ["overlays/more/slices.png", "overlays/picture.png", "overlays/scan.png"]


def test_scores(files, done):
    """In millimetres of the scan, and of what else has a truth."""
    found = json.loads((done / "scores.json").read_text())
    assert found.keys() == {"more/slices", "picture", "scan"}
    volume = volumes.read_volume(files[0] / "scan.nii.gz", files[1] / "scan_seg.nii.gz")
    labels = volumes.read_volume(files[0] / "scan.nii.gz", done / "scan.nii.gz").labels
    for name, values in score(volume.labels, labels, 3, (3.0, 0.9, 0.8)).items():
        np.testing.assert_allclose(
            [np.inf if x is None else x for x in found["scan"][name].values()], values, rtol=1e-6)
    page = (done / "report.html").read_text()
    assert all(f"<td>{name}</td>" in page for name in (*CLASSES[1:], *found))
    assert page.count("<img") == 3


def test_tiles_are_of_the_files_own_pixels(model, checkpoint, files, tmp_path, capsys):
    picture = files[0] / "picture.png"
    assert run(checkpoint, tmp_path / "out", f"--input={picture}", "--tile=16",
               "--overlap=0.25") == 0
    image = PREPROCESSING.normalize(volumes.read_volume(picture).image)
    wanted = zoo.segment(model, image, tile=16, overlap=0.25)
    found = volumes.read_volume(picture, tmp_path / "out" / "picture.png").labels
    np.testing.assert_array_equal(found, np.where(wanted < 3, wanted, 0))
    assert "picture.png: 1 x 40 x 28 in" in capsys.readouterr().out
    # Nothing is known to compare with.
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "overlays", "picture.png"]


def test_a_bad_file_does_not_stop_the_others(checkpoint, files, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.nii.gz").write_bytes((files[0] / "scan.nii.gz").read_bytes()[:500])
    Image.fromarray(np.zeros((9, 9, 3), np.uint8) + np.arange(3, dtype=np.uint8)).save(
        folder / "b.png")
    np.savez(folder / "c.npz", image=np.zeros((2, 32, 32)), label=np.full((2, 32, 32), 7))
    np.savez(folder / "d.npz", image=np.zeros((2, 32, 32)))
    assert run(checkpoint, tmp_path / "out", f"--input={folder}") == 2
    errors = capsys.readouterr().err.splitlines()
    for line, words in zip(errors, (
            "a.nii.gz: it is no NIfTI", "b.png: it has 3 channels, and the model takes 1",
            "c.npz: the mask has the label 7, and the model's classes are 0 to 2",
            "3 of 4 files were not segmented"), strict=True):
        assert words in line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["d.nii.gz", "overlays"]


def test_a_mask_is_of_one_image(checkpoint, files, tmp_path, capsys):
    """Where images of different folders have the same name."""
    for folder in "ab":
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "picture.png").write_bytes(
            (files[0] / "picture.png").read_bytes())
    assert run(checkpoint, tmp_path / "out", f"--input={tmp_path / 'in'}",
               f"--truth={files[1]}") == 2
    assert "would be the mask of both" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "words"), [
    (["--input="], "--input is missing; give it"),
    (["--input={images}/scan.nii.gz", "--out={images}"], "exists already; give the name of a new"),
    (["--input={images}/no.png"], "no.png: there is no such file or folder"),
    (["--input={empty}"], "there is no image in it, such as a .nii.gz"),
    (["--input={images}", "--overlap=0.3"], "--overlap=0.3 is of tiles; give --tile too"),
    (["--input={images}", "--truth={empty}"], "there is no mask of"),
    (["--input={images}", "--truth={masks}/picture.png"], "is one mask, and there are 3 images"),
    (["--input={images}/picture.png,{masks}/picture.png"], "would become"),
    (["--input={images}/picture.png", "--tile=20"], "tile is 20; it must be a multiple of 16"),
    (["--input={images}/picture.png", "--checkpoint={empty}"], "/empty has no segment.json"),
    (["--input={images}/picture.png", "--checkpoint={empty}/no"], "/no: there is no such direct"),
    (["--input={images}/picture.png", "--checkpoint={language}"], "is for language; give one for"),
])
def test_what_is_refused(flags, words, checkpoint, files, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    if "{language}" in str(flags):
        zoo.save(tiny.model(tiny.config("llama-tiny")), tmp_path / "language")
        PREPROCESSING.save(tmp_path / "language")
    places = {"images": files[0], "masks": files[1], "empty": tmp_path / "empty",
              "language": tmp_path / "language"}
    assert run(checkpoint, tmp_path / "out", *(flag.format(**places) for flag in flags)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
