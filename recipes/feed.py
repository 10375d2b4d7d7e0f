"""Batches onto devices, a few ahead of the step that takes them."""

import math
import queue
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from recipes.tasks import Batch

AHEAD = 2  # Batches that wait on the devices.


def place(make: Callable[[np.ndarray], Batch], batch_size: int, layout: NamedSharding
          ) -> dict[str, jax.Array]:
    """A global batch of arrays [batch_size, ...], each process making the rows its devices hold.

    Args:
      make: the given rows (ascending) of the batch.
      batch_size: rows of all processes together.
      layout: of an array's first dimensions; one with fewer takes the first of them.
    """
    by_row = NamedSharding(layout.mesh, P(*layout.spec[:1]))
    held = by_row.addressable_devices_indices_map((batch_size,)).values()
    rows = np.unique(np.concatenate([np.arange(batch_size)[index[0]] for index in held]))
    local = make(rows)

    def on_devices(name, x):
        check_divides(name, (batch_size, *x.shape[1:]), layout)

        def shard(index):
            begin, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(rows, begin)
            return x[(slice(first, first + stop - begin), *index[1:])]

        spec = P(*layout.spec[:x.ndim])
        return jax.make_array_from_callback(
            (batch_size, *x.shape[1:]), NamedSharding(layout.mesh, spec), shard)

    return {name: on_devices(name, x) for name, x in local.items()}


def signals(mesh: Mesh, step: int, stop: bool) -> jax.Array:
    """The step's third argument: this process' step, and whether it was asked to stop."""
    row = np.array([[step, stop]], np.int32)
    return jax.make_array_from_callback(
        (mesh.size, 2), NamedSharding(mesh, P(mesh.axis_names)), lambda index: row)


def check_divides(name: str, shape: tuple[int, ...], layout: NamedSharding) -> None:
    """Raises ValueError where a batch's array does not divide over the mesh axes it lies on."""
    for dimension, (size, axes) in enumerate(zip(shape, layout.spec, strict=False)):
        names = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(layout.mesh.shape[axis] for axis in names)
        if size % parts:
            over = " x ".join(f"{axis}:{layout.mesh.shape[axis]}" for axis in names)
            raise ValueError(f"{name} of shape {shape}: {size} (axis {dimension}) does not divide "
                             f"over {over}; use a multiple of {parts}, or other --rules")


class Feed:
    """Iterates over the placed batches of steps first..last-1, made in a thread of their own."""

    def __init__(self, place_step: Callable[[int], dict[str, jax.Array]], first: int, last: int):
        self._ready: queue.Queue = queue.Queue(maxsize=AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(place_step, first, last),
                                        name="feed", daemon=True)
        self._thread.start()

    def _run(self, place_step, first, last) -> None:
        for step in range(first, last):
            try:
                item = place_step(step), None
            except Exception as error:  # Raised again where the batch is waited for.
                item = None, error
            while not self._closed.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._closed.is_set() or item[1] is not None:
                return

    def next(self) -> dict[str, jax.Array]:
        """The next step's batch."""
        batch, error = self._ready.get()
        if error is not None:
            raise error
        return batch

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.join()
