"""Segmenting images in batches and in tiles."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sharding
import zoo
from tests.tolerances import EXACT, assert_close
from tests.zoo.test_paratranscnn import images, model, runner
from zoo.protocol import Output

REACH = 2


class Local(nnx.Module):
    """Sees `REACH` pixels around each, and by zeros beyond that an image ends."""

    def __init__(self):
        self.config = zoo.config("paratranscnn-tiny", in_channels=2, num_classes=3)
        draw = np.random.default_rng(0)
        side = 2 * REACH + 1
        self.kernel = nnx.Param(jnp.asarray(draw.normal(size=(side, side, 2, 3)), jnp.float32))

    def __call__(self, batch):
        return Output(jax.lax.conv_general_dilated(
            batch["images"], self.kernel[...], (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC")))


@functools.cache
def local():
    return Local()


def whole(x):
    return np.asarray(local()({"images": x}).logits)


@pytest.mark.parametrize(("height", "width", "overlap"), [
    (64, 64, 0.5), (70, 53, 0.5), (81, 32, 0.25), (45, 20, 0.9)])
def test_tiles_are_the_whole_image_away_from_seams(height, width, overlap):
    """And near seams, where a tile has seen too little, the other ones count."""
    tile, x = 32, images(3, height, width, 2)
    found = zoo.segment(local(), x, batch_size=2, tile=tile, overlap=overlap, logits=True)
    expected = whole(x)

    def near(side):
        step = max(1, round(tile * (1 - overlap)))
        count = max(0, -(-(side - tile) // step)) + 1
        firsts = np.rint(np.linspace(0, max(0, side - tile), count)).astype(int)
        ends = [*firsts[1:], *(firsts[:-1] + tile)]
        return np.array([any(-REACH <= i - end < REACH for end in ends) for i in range(side)])

    seams = near(height)[:, None] | near(width)
    assert 0 < seams.mean() < 0.9
    assert_close(found[:, ~seams], expected[:, ~seams])
    # With half a tile in common, by weights of at most sin^2(pi 1.5 / 32) each way.
    if overlap == 0.5:
        worst = np.abs(found - expected).max()
        assert 0 < worst < 0.1 * np.abs(expected).max()
    np.testing.assert_array_equal(
        zoo.segment(local(), x, tile=tile, overlap=overlap), found.argmax(-1))


def test_seams_do_not_show():
    """Where tiles disagree, by their very number, one passes into the next without a step."""
    class Tile(Local):
        def __call__(self, batch):
            x = batch["images"]
            level = x.mean((1, 2, 3), keepdims=True)
            return Output(jnp.broadcast_to(level, (*x.shape[:3], 3)))

    x = np.broadcast_to(np.linspace(0, 1, 96, dtype=np.float32)[:, None], (1, 96, 40))
    found = zoo.segment(Tile(), x, tile=32, logits=True)[0, :, 0, 0]
    hard = zoo.segment(Tile(), x, tile=32, overlap=0, logits=True)[0, :, 0, 0]
    assert np.abs(np.diff(hard)).max() > 0.3
    # The levels of neighbours are 16 / 95 apart; the window's slope is at most pi / 32.
    assert np.abs(np.diff(found)).max() < 1.01 * np.pi / 32 * 16 / 95
    np.testing.assert_allclose(found[[0, -1]], [15.5 / 95, 79.5 / 95], rtol=1e-5)


def test_batches_of_the_network():
    """A volume in batches is its slices; a tile no smaller than an image is the image."""
    x = images(5)
    expected = np.concatenate([runner()(x[i:i + 2]) for i in (0, 2, 3)])[[0, 1, 2, 3, 5]]
    found = zoo.segment(model(), x, batch_size=2, logits=True)
    assert found.dtype == np.float32
    assert_close(found, expected)
    assert_close(zoo.segment(model(), x, batch_size=2, tile=48, logits=True), found, EXACT)
    labels = zoo.segment(model(), jnp.asarray(x[..., 0]), batch_size=2)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, found.argmax(-1))


def test_gray_images_fill_all_channels():
    x = images(2, 20, 24)
    found = zoo.segment(local(), x, logits=True)
    assert_close(found, whole(np.repeat(x, 2, axis=-1)))
    assert_close(zoo.segment(local(), x[..., 0], logits=True), found, EXACT)


def test_over_a_mesh():
    """Of eight devices each has at least an image, though the batch was to be smaller."""
    x = images(9, 40, 40, 2)
    expected = zoo.segment(local(), x, tile=32, logits=True)
    for text, rules in (("data:8", "dp"), ("data:2,tensor:4", "dp,height=tensor")):
        with sharding.use(sharding.mesh(text), sharding.rules(rules)):
            assert_close(zoo.segment(local(), x, batch_size=3, tile=32, logits=True), expected)


@pytest.mark.parametrize(("change", "words"), [
    ({"images": np.zeros((2, 16, 16, 3), np.float32)}, r"they must be \[N, H, W\], or .* 2 chann"),
    ({"images": np.zeros((16, 16), np.float32)}, r"shape \(16, 16\); they must be"),
    ({"images": np.zeros((0, 16, 16), np.float32)}, "holds no pixel; give at least one"),
    ({"images": np.zeros((2, 16, 16), np.int16)}, "images are int16; give floats, scaled as"),
    ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
    ({"tile": 40}, "tile is 40; it must be a multiple of 16, such as 32"),
    ({"tile": 0}, "tile is 0; it must be a multiple of 16, such as 16"),
    ({"overlap": 1.0}, "overlap is 1.0; it must be at least 0 and below 1"),
    ({"model": types.SimpleNamespace(config=zoo.config("llama-tiny"))}, "give one for segment"),
])
def test_what_is_refused(change, words):
    arguments = {"model": local(), "images": np.zeros((1, 16, 16), np.float32), **change}
    with pytest.raises(ValueError, match=words):
        zoo.segment(arguments.pop("model"), arguments.pop("images"), **arguments)
