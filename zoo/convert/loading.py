"""Models from directories: every tensor goes straight to the devices that hold its parts."""

import concurrent.futures
import functools
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zoo import protocol, registry
from zoo.convert.source import Source, is_native, open_source
from zoo.convert.table import Piece, all_finite

_LOG = logging.getLogger(__name__)


def load(directory: str | os.PathLike, mesh=None, rules=None, dtype=None,
         stacked: bool | None = None, remat: str = "none",
         progress: Callable[[int], None] | None = None, vocab_multiple: int | None = None):
    """The model in a directory, one of `zoo.save` or one of Hugging Face's.

    Each process reads the byte ranges that its devices hold, tensor by tensor.

    Args:
      directory: holds config.json and *.safetensors.
      mesh, rules, stacked, remat: as of `zoo.build`.
      dtype: of the parameters, float32 or bfloat16; None: bfloat16 where all are stored so, else
        float32.
      progress: called with the bytes of each tensor read.
      vocab_multiple: of a model of Hugging Face's, to what the token table and the head are filled
        up; see `zoo.decoder.DecoderConfig`. What `zoo.save` wrote has its own.

    Returns:
      The model, as of `zoo.build`.

    Raises:
      ValueError: a directory that is damaged, unknown or does not match its config; with its
        tensors, all problems at once.
    """
    with open_source(directory, vocab_multiple=vocab_multiple) as source:
        if dtype is None:
            dtype = np.float32 if source.dtype == np.float16 else source.dtype
        return _load(source, mesh, rules, dtype, stacked, remat, progress or (lambda count: None))


def from_hf(directory: str | os.PathLike, mesh=None, rules=None, dtype=None,
            stacked: bool | None = None, remat: str = "none", vocab_multiple: int | None = None):
    """The model in a directory of Hugging Face's; otherwise as `load`."""
    folder = Path(directory).expanduser()
    if is_native(folder):
        raise ValueError(f"{folder} is not of Hugging Face but of zoo.save; use zoo.load")
    return load(folder, mesh, rules, dtype, stacked, remat, vocab_multiple=vocab_multiple)


def _load(source: Source, mesh, rules, dtype, stacked, remat, progress):
    model = registry.build(source.config, 0, mesh, rules, dtype, abstract=True, stacked=stacked,
                           remat=remat)
    definition, abstract = protocol.split(model)
    bad: dict[str, None] = {}

    def make(item):
        path, like = item
        listed = re.fullmatch(r"stack/layers/(\d+)/(.*)", path)
        name = f"stack/blocks/{listed[2]}" if listed else path
        pieces = source.table.parameters[name]
        if listed:
            pieces = [piece for piece in pieces if piece.at[0] == int(listed[1])]

        def read(piece, index):
            part = piece.read(source.weights, index)
            if not all_finite(part):
                bad[path] = None
            progress(part.nbytes)
            return part

        return place(read, pieces, 1 if listed else 0, like)

    # While one tensor is read another goes to its devices; more at a time would take more memory.
    # Several processes must call jitted functions in one order.
    workers = 2 if jax.process_count() == 1 else 1
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        made = list(pool.map(make, protocol.flat(abstract).items()))
    if bad:
        _LOG.warning("%s: numbers that are not finite in %s", source.folder, ", ".join(bad))
    return protocol.merge(definition, jax.tree.unflatten(jax.tree.structure(abstract), made))


Read = Callable[[Piece, tuple[slice, ...]], np.ndarray]


def place(read: Read, pieces: list[Piece], skip: int, like: jax.ShapeDtypeStruct) -> jax.Array:
    """A parameter with the type and layout of `like` from its pieces.

    A piece's index along the parameter's leading axes is ``at[skip:]``.
    """
    if len(pieces) == 1 and not pieces[0].at[skip:]:
        leaf = _put(read, pieces[0], like.sharding)
        if leaf.dtype == like.dtype:
            return leaf
        return jax.jit(lambda x: x.astype(like.dtype), out_shardings=like.sharding,
                       donate_argnums=0)(leaf)
    leaf = _zeros(like.shape, like.dtype, like.sharding)()
    for piece in pieces:
        at = piece.at[skip:]
        spec = (*like.sharding.spec, *[None] * len(like.shape))[len(at):len(like.shape)]
        part = _put(read, piece, NamedSharding(like.sharding.mesh, P(*spec)))
        leaf = _update(like.sharding)(leaf, part, np.array(at, np.int32))
    return leaf


def _put(read: Read, piece: Piece, layout) -> jax.Array:
    seen: dict[tuple, np.ndarray] = {}

    def part(index):
        key = tuple((s.start, s.stop) for s in index)
        if key not in seen:
            seen[key] = read(piece, index)
        return seen[key]

    return jax.make_array_from_callback(piece.shape, layout, part)


@functools.lru_cache(maxsize=64)
def _zeros(shape, dtype, layout):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=layout)


@functools.lru_cache(maxsize=64)
def _update(layout):
    """The jitted ``(whole, part, index) -> whole``, in place."""
    def update(whole, part, index):
        lead = index.shape[0]
        start = [*(index[i] for i in range(lead)), *[0] * part.ndim]
        part = part.astype(whole.dtype).reshape((1,) * lead + part.shape)
        return lax.dynamic_update_slice(whole, part, start)

    return jax.jit(update, out_shardings=layout, donate_argnums=0)
