"""The phantoms: the same bits everywhere, and as hard and as alike as they are meant to be."""

import hashlib

import numpy as np
import pytest

from recipes import phantoms

# Of a volume's image (little-endian) and labels. What is measured on the phantoms is measured on
# these volumes: a change of the generator makes results incomparable.
DIGESTS = {
    (0, 0): "96975f3821643c719335a7715cb472c2e539b9a73c1d18307aac42461a00fc89",
    (200, 3): "7ad7319155f337f49d7dbad451c74a94f75e89b77b9ece87ca3741492cfe6a7a",
}


@pytest.mark.parametrize(("patient", "scanner"), DIGESTS)
def test_frozen(patient, scanner):
    phantom = phantoms.make(patient, scanner)
    digest = hashlib.sha256(phantom.image.astype("<i2").tobytes() + phantom.labels.tobytes())
    assert digest.hexdigest() == DIGESTS[patient, scanner]


# Who is in which part, by which scanner, and what the scanners do. The digest is that of the parts
# which the results in docs/benchmarks.md were measured on.
PARTS = "ebae8316f0b3e91dabd19373762991f0a8f789123c4f1de03f22105bfc3210a5"


def test_parts_are_frozen():
    text = repr((sorted(phantoms.SPLITS.items()), phantoms.SCANNERS))
    assert hashlib.sha256(text.encode()).hexdigest() == PARTS


def test_held_out_are_other_patients_and_another_scanner():
    patients = {split: {p for p, _ in cases} for split, cases in phantoms.SPLITS.items()}
    scanners = {split: {s for _, s in cases} for split, cases in phantoms.SPLITS.items()}
    for one, other in (("train", "validation"), ("train", "heldout"), ("validation", "heldout")):
        assert not patients[one] & patients[other]
    assert scanners["validation"] == scanners["train"]
    assert not scanners["heldout"] & scanners["train"]
    with pytest.raises(ValueError, match="split is 'test'; it must be one of train"):
        phantoms.load("test")


def test_organs():
    """All in every volume, in the order of size of those of Synapse."""
    found = [phantoms.make(patient, 3) for patient, _ in phantoms.SPLITS["heldout"]]
    litres = np.prod(phantoms.SPACING) / 1e6
    sizes = np.array([np.bincount(p.labels.ravel(), minlength=9) * litres for p in found])
    assert sizes.shape[1] == len(phantoms.CLASSES) and sizes.min() > 0.005
    size = dict(zip(phantoms.CLASSES, sizes.mean(0), strict=True))
    assert size["gallbladder"] < size["pancreas"] < size["left kidney"] < size["stomach"]
    assert 0.7 < size["liver"] < 1.8 and size["aorta"] < 0.08
    for phantom in found:
        assert phantom.image.shape == phantom.labels.shape == phantoms.SHAPE
        assert phantom.image.dtype == np.int16 and phantom.labels.dtype == np.uint8


def test_a_scanner_changes_the_image_alone():
    one, other = phantoms.make(0, 0), phantoms.make(0, 3)
    assert np.array_equal(one.labels, other.labels)
    shift = [np.median(p.image[p.labels == 5]) for p in (one, other)]
    assert abs(shift[0] - shift[1]) > 5
    assert (one.image != other.image).mean() > 0.9


def test_noise():
    """Of the size that the scanner says, and alike in neighbours of a slice."""
    phantom = phantoms.make(1, 0)
    air = phantom.image[:, :6, :6].astype(float).reshape(-1, 6)
    assert np.std(air) == pytest.approx(phantoms.SCANNERS[0].noise, rel=0.3)
    assert np.corrcoef(air[:, 2], air[:, 3])[0, 1] > 0.3
