"""Segmenting images and volumes of any size, in batches of slices and, if asked, in tiles."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

import sharding
from zoo.paratranscnn import STRIDE
from zoo.protocol import merge, split
from zoo.registry import check_kind


def segment(model: Any, images: Any, **options) -> np.ndarray:
    """The likeliest class of every pixel.

    Runs on the ambient mesh and rules, else on the model's mesh. A volume is its slices, each an
    image; however many there are, two batches of them are on the devices.

    Tiles overlap. Where several cover a pixel, its logits are their mean, each weighted by the
    squares of the sines of how far across the tile, along rows and columns, the pixel lies (Hann
    windows): towards its edges a tile counts nothing, so that no seam shows. Elsewhere the result
    is that of the whole image if the model sees no further than a tile. Attention and
    squeeze-excitation see all of what they are given, be it a tile or an image.

    Args:
      model: of kind "segmentation".
      images: floats [N, H, W] or [N, H, W, C], scaled as those it was trained on. Gray ones fill
        all of the model's channels. Slices that it saw beside their neighbors in training are given
        with them, see `recipes.volumes.Preprocessing.with_neighbors`.
      batch_size: images at a time, by default 8; more where the mesh's devices would have less
        than one each.
      tile: the side of tiles, a multiple of 16; sides up to it are not cut. None, the default:
        whole images.
      overlap: the part of a tile's side, from 0 to below 1, that it shares at least with the next;
        by default a half.
      logits: returns them in place of the classes.

    Returns:
      uint8 [N, H, W], or the logits, float32 [N, H, W, classes].

    Raises:
      ValueError: another kind of model or of images, or a setting out of its range.
    """
    return np.concatenate(list(stream(model, images, **options)))


def stream(model: Any, images: Any, *, batch_size: int = 8, tile: int | None = None,
           overlap: float = 0.5, logits: bool = False) -> Iterator[np.ndarray]:
    """`segment` in pieces: yields what each batch gives, in order. Takes the same arguments."""
    config = model.config
    check_kind(config, "segmentation")
    if config.num_classes > 256:
        raise ValueError(f"num_classes is {config.num_classes}; of more than 256 classes no uint8 "
                         "labels can be made: give a model of fewer")
    images = _check_images(images, config.in_channels)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if tile is not None and (tile < 1 or tile % STRIDE):
        raise ValueError(f"tile is {tile}; it must be a multiple of {STRIDE}, such as "
                         f"{max(1, round(tile / STRIDE)) * STRIDE}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; it must be at least 0 and below 1, as 0.5 is")
    definition, params = split(model)
    count, *sides = images.shape[:3]
    rows, columns = (_spread(side, min(side, tile or side), overlap) for side in sides)
    with sharding.ensure_mesh(params):
        # The pieces run under the mesh and rules of now, whatever is ambient when one is asked.
        mesh, rules = jax.sharding.get_mesh(), sharding.ambient_rules()
        devices = sharding.shards("batch")
        size = math.ceil(min(batch_size, count) / devices) * devices
        layout = NamedSharding(mesh, sharding.spec(
            "batch", "height", None, None, shape=(size, *images.shape[1:])))

    def run(begin: int) -> jax.Array:
        batch = np.asarray(images[begin:begin + size], np.float32)
        # Filled up, so that one executable serves all.
        batch = np.pad(batch, ((0, size - len(batch)), *((0, 0),) * 3))
        with sharding.use(mesh, rules):
            placed = jax.device_put(batch, layout)
            total = jnp.zeros((size, *sides, config.num_classes), jnp.float32, device=layout)
            for y, down in rows:
                for x, across in columns:
                    total = _add(definition, params, placed, total, y, x, down, across)
            return total if logits else _classes(total)

    def pieces() -> Iterator[np.ndarray]:
        ahead = run(0)
        for begin in range(0, count, size):
            # Fetched while the devices work on the next one.
            found = ahead
            ahead = run(begin + size) if begin + size < count else None
            yield jax.device_get(found)[:count - begin]

    return pieces()


def _check_images(images: Any, channels: int) -> Any:
    """The images as floats [N, H, W, C] with C either 1 or the model's."""
    images = images if hasattr(images, "dtype") else np.asarray(images)
    shape = images.shape
    if len(shape) == 3:
        images, shape = images[..., None], (*shape, 1)
    if len(shape) != 4 or shape[-1] not in (1, channels):
        raise ValueError(f"images have the shape {np.shape(images)}; they must be [N, H, W], or "
                         f"[N, H, W, C] of the model's {channels} channels")
    if 0 in shape:
        raise ValueError(f"images have the shape {shape}, which holds no pixel; give at least one "
                         "image")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}; give floats, scaled as those that the model "
                         "was trained on, such as from 0 to 1")
    return images


def _spread(side: int, tile: int, overlap: float) -> list[tuple[np.int32, np.ndarray]]:
    """(first pixel, weight of each of its pixels) of the tiles that cover a side.

    They lie evenly, and their weights add up to 1 at every pixel.
    """
    step = max(1, round(tile * (1 - overlap)))
    firsts = np.rint(np.linspace(0, side - tile, math.ceil((side - tile) / step) + 1)).astype(int)
    window = np.sin(np.pi * (np.arange(tile) + 0.5) / tile)**2
    total = np.zeros(side)
    for first in firsts:
        total[first:first + tile] += window
    return [(np.int32(first), (window / total[first:first + tile]).astype(np.float32))
            for first in firsts]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _add(definition, params, images, total, y, x, down, across):
    """`total` [B, H, W, classes] with the weighted logits of one tile of `images` added."""
    model = merge(definition, params)
    at = (0, y, x, 0)
    cut = jax.lax.dynamic_slice(
        images, at, (images.shape[0], len(down), len(across), images.shape[3]))
    cut = jnp.broadcast_to(cut, (*cut.shape[:3], model.config.in_channels))
    found = model({"images": cut}).logits * down[:, None, None] * across[:, None]
    before = jax.lax.dynamic_slice(total, at, found.shape)
    total = jax.lax.dynamic_update_slice(total, before + found, at)
    return sharding.constrain(total, "batch", "height", None, None)


@jax.jit
def _classes(total: jax.Array) -> jax.Array:
    return jnp.argmax(total, axis=-1).astype(jnp.uint8)
