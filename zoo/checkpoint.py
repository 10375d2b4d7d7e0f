"""Checkpoints: sharded, asynchronous, atomic, and aware of their own damage; the one user of orbax.

    directory/
      step_00000100/                a committed checkpoint
        manifest-00000-of-00002.json    sizes and checksums of the files process 0 of 2 wrote
        manifest-00001-of-00002.json
        meta.json                       paths, shapes and dtypes of the arrays; the caller's `meta`
        arrays/                         orbax (OCDBT), a flat dict {"params/blocks/q": array}
      step_00000200.unfinished/     a save in progress, or one that was killed
      step_00000050.deleted-*/      a checkpoint on its way out

A step is written under its `.unfinished` name. Only when every file in it, of every process, is
on the disk and listed in a manifest is it renamed, so a kill at any moment leaves nothing
that could be taken for a checkpoint. A step is read only if its files are exactly those of its
manifests, byte for byte. Nothing is ever unpickled.
"""

import asyncio
import concurrent.futures
import difflib
import errno
import functools
import hashlib
import itertools
import json
import logging
import operator
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

FORMAT_VERSION = 1

_LOG = logging.getLogger(__name__)
_STEP = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"step_\d{8,}\.(unfinished|deleted-\d+)")
_MANIFEST = re.compile(r"manifest-(\d{5})-of-(\d{5})\.json")
_META, _ARRAYS = "meta.json", "arrays"
# Orbax lets each process write below a name of its own; all other files are process 0's.
_OWNER = re.compile(_ARRAYS + r"/ocdbt\.process_(\d+)/")
_HASH_THREADS = 8  # hashlib releases the GIL
_TIMEOUT_MS = 2 * 3600 * 1000  # a dead process is noticed by jax.distributed long before this
_SHOWN = 50  # problems listed in one message
_blake2b = functools.partial(hashlib.blake2b, digest_size=16)
_calls = itertools.count()  # names the barriers; in step on all processes, whose calls are the same


class _Damaged(ValueError):
    """A step directory whose files are not exactly those its manifests list."""


class _NewerFormat(ValueError):
    """A sound step directory written by a later version of this module."""


class Checkpointer:
    """Saves and restores steps of one directory, which all processes must share.

    Constructing one touches nothing, so that it also serves read-only directories. With several
    processes, `prepare`, `save`, `latest` and `restore` are collective: every process calls them,
    in the same order.

    Args:
      directory: where the `step_*` directories are.
      keep_last: how many of the newest checkpoints to keep, at least 1.
      keep_every: also keep, for good, the steps divisible by this.

    Raises:
      ValueError: for `keep_last` or `keep_every` below 1, or a URL instead of a path.
    """

    def __init__(
        self, directory: str | os.PathLike, keep_last: int = 3, keep_every: int | None = None
    ):
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last}: at least 1 checkpoint must be kept")
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"keep_every={keep_every}: must be at least 1, or None")
        self._directory = _local(directory)
        self._keep_last, self._keep_every = keep_last, keep_every
        # One thread: saves follow each other, and orbax never meets the caller's event loop, mesh
        # or transfer guard.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future | None = None
        self._prepared = False
        self._verified: tuple[int, dict] | None = None  # what `latest` read, for the next `restore`
        self._damaged: set[int] = set()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, exc_type, exc, traceback) -> None:
        try:
            self.close()
        except Exception:
            if exc_type is None:
                raise  # otherwise the first error is the one to show; this one has been logged

    def prepare(self) -> None:
        """Makes the directory, checks that it can be written, and removes half-made steps.

        The first `save` does this; call it before training to learn of a bad directory early.

        Raises:
          OSError: if the directory cannot be made or written.
        """
        if not self._prepared:
            _together(f"checkpoint/{next(_calls)}/prepare", _on_first(self._prepare))
            self._prepared = True

    def save(self, step: int, arrays: Any, meta: dict, wait: bool = False) -> None:
        """Starts saving `arrays` as `step`; returns once they may be donated or overwritten.

        The commit goes on in the background, one at a time: a second save waits for the first.
        Call `wait`, `close`, or leave the `with` block before the program ends.

        Args:
          step: the step, at least 0, not saved yet.
          arrays: any pytree of jax and numpy arrays. With several processes, numpy arrays and
            arrays local to one process are taken from process 0.
          meta: whatever else a resume needs, as JSON (tuples come back as lists).
          wait: also wait for the commit.

        Raises:
          ValueError: if the step is there already, or two leaves share a path.
          TypeError: if a leaf is no array, or `meta` is not JSON.
          OSError: if this save, or the one before it, met a full or unwritable disk. Checkpoints
            committed before are kept.
          RuntimeError: if this save, or the one before it, failed otherwise.
        """
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step={step}: must be at least 0")
        named = _name_leaves(arrays)
        for path, x in named.items():
            _check_leaf(path, x)
        specs = {path: [list(x.shape), str(x.dtype)] for path, x in named.items()}
        try:
            header = json.dumps({"step": step, "arrays": specs, "meta": meta}).encode()
        except (TypeError, ValueError) as error:
            raise TypeError(f"meta must be JSON (dict, list, str, numbers): {error}") from None
        nbytes = sum(x.size * x.dtype.itemsize for x in named.values())

        self.wait()
        self.prepare()
        tag = f"checkpoint/{next(_calls)}"
        _together(f"{tag}/vacant", _on_first(self._require_vacant, step))
        folder = self._directory / f"{_step_name(step)}.unfinished"
        writes: list = []
        try:
            _together(f"{tag}/begin", _on_first(_begin, folder, header))
            _together(
                f"{tag}/copy",
                lambda: writes.extend(self._thread.submit(_start_writing, folder, named).result()),
            )
        except Exception as error:
            for write in writes:  # another process failed: let ours end before the files go
                with suppress(Exception):
                    write.result()
            _on_first(_remove, folder)()
            raise _explain(error, step, self._directory, nbytes) from error
        self._pending = self._thread.submit(self._commit, tag, step, folder, writes, nbytes)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Waits for the save in progress, if any, and raises its error, as `save` does."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits as `wait` does; no save or restore after this."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def steps(self) -> list[int]:
        """The committed steps, ascending, as far as names and sizes tell (no file is read)."""
        return [s for s in _step_numbers(self._directory) if _looks_whole(self._directory, s)]

    def latest(self) -> int | None:
        """The newest step that verifies byte for byte, or None; logs a warning for each it skips.

        Raises:
          ValueError: if a newer step is of a newer format.
        """
        self._verified = None
        numbers = json.dumps(_step_numbers(self._directory))
        reports = _gather(f"checkpoint/{next(_calls)}/list", numbers)
        return _newest_whole(self._directory, json.loads(reports[0]), self._verify)

    def restore(self, abstract: Any, step: int | None = None) -> tuple[Any, dict, int]:
        """Restores `abstract`'s arrays from `step`, or from the newest step that verifies.

        Args:
          abstract: a pytree of `jax.ShapeDtypeStruct` (or arrays). A leaf with a sharding comes
            back as a jax array in that sharding, whatever the stored one was; one without, as a
            numpy array. Top-level entries may be left out ({"params": ...} alone), but within
            those given the paths must be exactly the checkpoint's.
          step: the step, or None.

        Returns:
          (arrays, meta, step).

        Raises:
          FileNotFoundError: if there is no such step, or none that verifies.
          ValueError: if the step is damaged or of a newer format, or if paths, shapes or dtypes
            differ; one error lists the differences.
        """
        if self._pending is not None:
            concurrent.futures.wait([self._pending])  # its error is for `wait`
        if step is None:
            step = self.latest()
            if step is None:
                raise _nothing(self._directory)
        else:
            _require_step(self._directory, step)
            try:
                self._verify(step)
            except _Damaged as error:
                raise ValueError(
                    f"step {step} in {self._directory} is damaged and cannot be restored: {error}; "
                    "give no step to use the newest whole one"
                ) from None
        self._verified = None
        folder = self._directory / _step_name(step)
        header = _read_header(folder, step)
        wanted = _name_leaves(abstract)
        for path, x in wanted.items():
            if not hasattr(x, "shape") or not hasattr(x, "dtype"):
                raise TypeError(f"{path}: give a jax.ShapeDtypeStruct, not a {type(x).__name__}")
        _check_match(folder, _specs(header), wanted)
        restored = self._thread.submit(_read_arrays, folder, wanted).result()
        structure = jax.tree.structure(abstract)
        return jax.tree.unflatten(structure, [restored[p] for p in wanted]), header["meta"], step

    def _prepare(self) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._directory).close()
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write checkpoints to {self._directory} ({error.strerror}): "
                "give a directory that can be written",
            ) from None
        for path in sorted(self._directory.iterdir()):
            if _LEFTOVER.fullmatch(path.name):
                _LOG.warning("removing what an interrupted save or deletion left: %s", path)
                _remove(path)

    def _require_vacant(self, step: int) -> None:
        """Refuses a step that is there and whole; a damaged one is replaced at the commit."""
        folder = self._directory / _step_name(step)
        if not os.path.lexists(folder):
            return
        try:
            _inspect(folder, step, share=(0, 1))
        except _Damaged as error:
            _LOG.warning(
                "step %d in %s is damaged and is replaced: %s", step, self._directory, error
            )
            return
        raise ValueError(
            f"step {step} is already saved in {self._directory}: "
            "move it away, or save to another directory"
        )

    def _commit(self, tag: str, step: int, folder: Path, writes: list, nbytes: int) -> None:
        """The background half of a save, on every process."""
        try:
            _together(f"{tag}/write", lambda: [w.result() for w in writes])
            if writes:
                merge = functools.partial(_handler().finalize, _orbax_path(folder / _ARRAYS))
                _together(f"{tag}/merge", _on_first(merge))
            _together(f"{tag}/manifest", lambda: _write_manifest(folder, step))
            _together(f"{tag}/publish", _on_first(self._publish, step, folder))
        except Exception as error:
            _on_first(_remove, folder)()
            explained = _explain(error, step, self._directory, nbytes)
            _LOG.error("%s", explained)  # now; `wait` raises it perhaps much later
            raise explained from error

    def _publish(self, step: int, folder: Path) -> None:
        """Makes the finished folder a checkpoint, then deletes those no longer wanted."""
        for root, _, _ in os.walk(folder):
            _sync(root)
        _inspect(folder, step)  # finds files that no process listed
        final = self._directory / _step_name(step)
        if os.path.lexists(final):  # damaged, see _require_vacant
            _remove(final)
        os.rename(folder, final)
        _sync(self._directory)
        self._damaged.discard(step)

        whole = [s for s in self.steps() if s not in self._damaged]
        keep = {step, *whole[-self._keep_last :]}
        if self._keep_every:
            keep.update(s for s in whole if s % self._keep_every == 0)
        for old in whole:
            if old not in keep:
                _remove(self._directory / _step_name(old))

    def _verify(self, step: int) -> None:
        """Reads every file of a step, each process its share; raises the same on all of them."""
        folder, tag = self._directory / _step_name(step), f"checkpoint/{next(_calls)}"
        state = error = None
        with suppress(OSError):
            state = {
                name: (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino)
                for name, s in _files(folder).items()
            }
        known = state is not None and self._verified == (step, state)
        if not _gather(f"{tag}/unknown", None if known else "unknown"):
            return
        try:
            _inspect(folder, step, share=(jax.process_index(), jax.process_count()))
        except (_Damaged, _NewerFormat) as e:
            error = e
        reports = _gather(f"{tag}/verdict", None if error is None else str(error))
        if isinstance(error, _NewerFormat):
            raise error
        if reports:
            self._damaged.add(step)
            raise _Damaged("; ".join(sorted(set(reports.values()))))
        self._damaged.discard(step)
        self._verified = (step, state)


def read_meta(directory: str | os.PathLike, step: int | None = None) -> dict:
    """The `meta` a step was saved with, without its arrays.

    With no step, the newest that verifies byte for byte; a step that is given is checked as far
    as its manifests and this one file go, which is enough for one that `latest` gave.

    Raises:
      FileNotFoundError: if there is no such step, or none that verifies.
      ValueError: if it is damaged or of a newer format.
    """
    return _open_header(directory, step)["meta"]


def describe(
    directory: str | os.PathLike, step: int | None = None
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """{path: (shape, dtype)} of a step's arrays, without restoring them.

    Paths are those of the saved pytree, joined by "/"; the step is chosen, and the errors are
    raised, as by `read_meta`.
    """
    return _specs(_open_header(directory, step))


# --- several processes ---------------------------------------------------------------------------


def _gather(tag: str, text: str | None) -> dict[int, str]:
    """A barrier that tells every process what each had to say: {process: text}, without the Nones.

    It goes through the key-value store of jax.distributed: unlike a device collective, it cannot
    deadlock against the training step when it is called from another thread.
    """
    if jax.process_count() == 1:
        return {} if text is None else {0: text}
    from jax._src import distributed  # the store has no public name

    client = distributed.global_state.client
    if client is None:
        raise RuntimeError(
            "saving from several processes needs jax.distributed: call "
            "jax.distributed.initialize() at the start of the program"
        )
    if text is not None:
        client.key_value_set(f"{tag}/{jax.process_index()}", text)
    client.wait_at_barrier(tag, _TIMEOUT_MS)
    return {int(k.rsplit("/", 1)[1]): v for k, v in client.key_value_dir_get(f"{tag}/")}


def _together(tag: str, work: Callable[[], Any]) -> Any:
    """Runs `work` on every process; if it fails on any, raises on all."""
    result = error = None
    try:
        result = work()
    except Exception as e:
        error = e
    reports = _gather(tag, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if reports:
        process = min(reports)
        raise RuntimeError(f"process {process} failed: {reports[process]}")
    return result


def _on_first(work: Callable, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """`work(*args, **kwargs)` on process 0, and nothing elsewhere."""
    return lambda: work(*args, **kwargs) if jax.process_index() == 0 else None


# --- orbax ---------------------------------------------------------------------------------------


@functools.cache
def _handler() -> Any:
    """Orbax's reader and writer of arrays.

    Its own Checkpointer is not used: that commits without a manifest, and its barriers leave the
    other processes waiting for minutes when one of them fails. Compression is off: it saves 8 %
    of float32 weights and triples the time to write them.
    """
    import orbax.checkpoint as ocp

    def keep(record: logging.LogRecord) -> bool:
        return "_SignalingThread.run() raised" not in str(record.msg)

    logging.getLogger("absl").addFilter(keep)  # tracebacks of errors that `_commit` reports
    types = ocp.type_handlers
    return ocp.PyTreeCheckpointHandler(
        use_compression=False,
        type_handler_registry=types.create_type_handler_registry(
            # To share replicated arrays out among their devices, orbax compiles a slice for each
            # shape and device during the first save: seconds.
            (jax.Array, types.ArrayHandler(use_replica_parallel=False)),
            (np.ndarray, types.NumpyHandler()),
        ),
    )


def _orbax_path(path: Path) -> Any:
    from etils import epath

    return epath.Path(path)


def _start_writing(folder: Path, named: dict[str, Any]) -> list:
    """Copies the arrays off the caller's buffers and starts the writes; returns their futures."""
    import orbax.checkpoint as ocp

    stored = {path: x for path, x in named.items() if x.size}  # orbax refuses empty arrays
    if not stored:
        return []
    if not (folder / _ARRAYS).is_dir():
        raise FileNotFoundError(
            errno.ENOENT,
            f"process {jax.process_index()} does not see {folder}, which process 0 made: "
            "all processes must share the checkpoint directory",
        )
    with jax.transfer_guard("allow"):
        held = []
        for path, x in stored.items():
            if not isinstance(x, jax.Array):
                stored[path] = np.asarray(x)  # orbax copies these itself
            elif jax.process_count() > 1 and x.is_fully_addressable:
                stored[path] = np.asarray(x)
            elif _in_host_memory(x):
                held.append(path)
        # Orbax would refer to host buffers until they are written, and JAX would then refuse
        # their donation to the next step.
        copies = jax.device_put(
            [stored[p] for p in held], [stored[p].sharding for p in held], may_alias=False
        )
        stored.update(zip(held, copies, strict=True))
        # Not asyncio.run: its end races with the event loops of the writer threads.
        loop = asyncio.new_event_loop()
        try:
            return loop.run_until_complete(
                _handler().async_save(
                    _orbax_path(folder / _ARRAYS), args=ocp.args.PyTreeSave(stored)
                )
            )
        finally:
            loop.close()


def _in_host_memory(x: jax.Array) -> bool:
    device = next(iter(x.sharding.device_set))
    return device.platform == "cpu" or "host" in (x.sharding.memory_kind or "")


def _read_arrays(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """{path: array} for the wanted leaves, each in its own sharding."""
    import orbax.checkpoint as ocp

    restored, args = {}, {}
    with jax.transfer_guard("allow"):
        for path, x in wanted.items():
            sharding = getattr(x, "sharding", None)
            if not x.size:
                restored[path] = np.zeros(x.shape, x.dtype)
                if sharding is not None:
                    restored[path] = jax.make_array_from_callback(
                        x.shape, sharding, restored[path].__getitem__
                    )
            elif sharding is None:
                args[path] = ocp.RestoreArgs(restore_type=np.ndarray)
            else:
                args[path] = ocp.ArrayRestoreArgs(
                    restore_type=jax.Array, sharding=sharding, global_shape=x.shape, dtype=x.dtype
                )
        if args:
            request = ocp.args.PyTreeRestore(
                item=dict.fromkeys(args, 0), restore_args=args, partial_restore=True
            )
            restored |= _handler().restore(_orbax_path(folder / _ARRAYS), args=request)
    return restored


def _explain(error: Exception, step: int, directory: Path, nbytes: int) -> Exception:
    """The one-line error of a failed save."""
    text = " ".join(str(error).split())
    code = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"os_error_code='(\d+)'", text):  # tensorstore's
        code = int(found[1])
    kept = "checkpoints committed before are kept"
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OSError(
            code,
            f"step {step} was not saved in {directory} ({os.strerror(code)}): it needs about "
            f"{nbytes:,} bytes, {shutil.disk_usage(directory).free:,} are free; {kept}; "
            "make room, or keep fewer (keep_last, keep_every)",
        )
    message = f"step {step} was not saved in {directory}: {text}; {kept}"
    return RuntimeError(message) if code is None else OSError(code, message)


# --- the tree of arrays --------------------------------------------------------------------------


def _name_leaves(tree: Any) -> dict[str, Any]:
    """{"params/blocks/q": leaf}, in the order of the tree's leaves."""
    named: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if not path:
            raise TypeError("a single array is no checkpoint: put it in a dict")
        if path in named:
            raise ValueError(f"two arrays have the path {path!r}: rename one of their keys")
        named[path] = leaf
    return named


def _check_leaf(path: str, x: Any) -> None:
    if not isinstance(x, jax.Array | np.ndarray | np.generic):
        raise TypeError(
            f"{path}: a {type(x).__name__} is no array: wrap it in np.asarray, or put it in meta"
        )
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{path}: a typed PRNG key: save jax.random.key_data(key)")
    if not jax.dtypes.issubdtype(x.dtype, np.number) and x.dtype != np.bool_:
        raise TypeError(f"{path}: dtype {x.dtype} cannot be saved: use numbers or bool")


def _specs(header: dict) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {p: (tuple(shape), np.dtype(dtype)) for p, (shape, dtype) in header["arrays"].items()}


def _check_match(folder: Path, stored: dict, wanted: dict[str, Any]) -> None:
    """Raises one ValueError about all differences between checkpoint and target."""
    tops = {path.split("/")[0] for path in wanted}
    spare = [p for p in stored if p not in wanted and p.split("/")[0] in tops]
    absent = [path for path in wanted if path not in stored]
    lost = [(path, "checkpoint", stored) for path in absent]
    lost += [(path, "target", absent) for path in spare]
    problems = [
        f"{path}: not in the {where}{_nearest(path, others) if i < _SHOWN else ''}"
        for i, (path, where, others) in enumerate(lost)
    ]
    for path, x in wanted.items():
        want = (tuple(x.shape), np.dtype(x.dtype))
        if path in stored and stored[path] != want:
            have = _type(*stored[path])
            problems.append(f"{path}: {have} in the checkpoint, {_type(*want)} in the target")
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise ValueError(
            f"{folder} does not fit the target, {len(problems)} differences:\n  "
            + "\n  ".join(problems[:_SHOWN] + more)
        )


def _nearest(path: str, others: Iterable[str]) -> str:
    close = difflib.get_close_matches(path, others, n=1)
    return f"; nearest there: {close[0]}" if close else ""


def _type(shape: tuple[int, ...], dtype: np.dtype) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"


# --- step directories and manifests --------------------------------------------------------------


def _local(directory: str | os.PathLike) -> Path:
    if "://" in str(directory):
        raise ValueError(f"{directory}: checkpoints need a path; mount remote storage to use it")
    return Path(directory).absolute()


def _step_name(step: int) -> str:
    return f"step_{step:08d}"


def _step_numbers(directory: Path) -> list[int]:
    """The steps there are by name, ascending; none if there is no such directory."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    found = [int(match[1]) for name in names if (match := _STEP.fullmatch(name))]
    return sorted(s for s in found if _step_name(s) in names)


def _require_step(directory: Path, step: int) -> None:
    numbers = _step_numbers(directory)
    if step not in numbers:
        held = f"it holds {', '.join(map(str, numbers))}" if numbers else "it holds none"
        raise FileNotFoundError(errno.ENOENT, f"no step {step} in {directory}; {held}")


def _nothing(directory: Path) -> FileNotFoundError:
    if numbers := _step_numbers(directory):
        why = f"none of the steps {', '.join(map(str, numbers))} is whole (see the warnings)"
    elif not directory.is_dir():
        why = "there is no such directory"
    elif _STEP.fullmatch(directory.name):
        why = f"it is one step; give its parent, {directory.parent}"
    else:
        why = "it has no step_* directory"
    return FileNotFoundError(errno.ENOENT, f"no checkpoint in {directory}: {why}")


def _newest_whole(directory: Path, numbers: list[int], verify: Callable[[int], None]) -> int | None:
    skipped = []
    for step in reversed(numbers):
        try:
            verify(step)
        except _Damaged as error:
            _LOG.warning("step %d in %s is damaged and not used: %s", step, directory, error)
            skipped.append(step)
        else:
            if skipped:
                _LOG.warning("step %d is the newest whole one in %s", step, directory)
            return step
    return None


def _open_header(directory: str | os.PathLike, step: int | None) -> dict:
    directory = _local(directory)
    if step is None:
        step = _newest_whole(
            directory,
            _step_numbers(directory),
            lambda s: _inspect(directory / _step_name(s), s, share=(0, 1)),
        )
        if step is None:
            raise _nothing(directory)
    else:
        _require_step(directory, step)
    folder = directory / _step_name(step)
    try:
        return _read_header(folder, step)
    except _Damaged as error:
        raise ValueError(f"step {step} in {directory} is damaged: {error}") from None


def _read_header(folder: Path, step: int) -> dict:
    """The contents of meta.json, checked against the manifest."""
    size, digest = _inspect(folder, step)[_META]
    data = (folder / _META).read_bytes()
    if len(data) != size or _blake2b(data).hexdigest() != digest:
        raise _Damaged(f"{_META} has changed")
    return json.loads(data)


def _looks_whole(directory: Path, step: int) -> bool:
    try:
        _inspect(directory / _step_name(step), step)
    except (_Damaged, _NewerFormat):
        return False
    return True


def _files(folder: Path) -> dict[str, os.stat_result]:
    """{relative path: lstat} of everything below `folder` that is not a plain directory."""
    found = {}
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in names + links:
            path = Path(root, name)
            found[path.relative_to(folder).as_posix()] = path.lstat()
    return found


def _digest(path: Path, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, _blake2b).hexdigest()


def _digests(paths: list[Path], sync: bool = False) -> list[str]:
    with concurrent.futures.ThreadPoolExecutor(_HASH_THREADS) as pool:
        return list(pool.map(functools.partial(_digest, sync=sync), paths))


def _sync(directory: str | os.PathLike) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_file(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(part, path)
    _sync(path.parent)


def _begin(folder: Path, header: bytes) -> None:
    _remove(folder)  # left by a failed save of the same step
    if os.path.lexists(folder):
        raise FileExistsError(errno.EEXIST, f"{folder} holds files of others: move it away")
    (folder / _ARRAYS).mkdir(parents=True)
    _write_file(folder / _META, header)


def _write_manifest(folder: Path, step: int) -> None:
    """Lists this process's files, after they and their names have reached the disk."""
    process, count = jax.process_index(), jax.process_count()

    def owner(name: str) -> int:
        found = _OWNER.match(name)
        return int(found[1]) if found else 0

    sizes = {
        name: info.st_size
        for name, info in _files(folder).items()
        if owner(name) == process and not _MANIFEST.match(name)
    }
    digests = _digests([folder / name for name in sizes], sync=True)
    body = json.dumps(
        {
            "format_version": FORMAT_VERSION,
            "step": step,
            "process": process,
            "processes": count,
            "files": {name: [sizes[name], d] for name, d in zip(sizes, digests, strict=True)},
        }
    ).encode()
    _write_file(folder / f"manifest-{process:05d}-of-{count:05d}.json", _seal(body))


def _seal(body: bytes) -> bytes:
    """A manifest's bytes: a line with the checksum of the rest, in every format version."""
    return f'{{"blake2b": "{_blake2b(body).hexdigest()}"}}\n'.encode() + body


def _read_manifest(path: Path) -> dict:
    data = path.read_bytes()
    body = data.partition(b"\n")[2]
    if data != _seal(body):
        raise _Damaged(f"{path.name} has changed")
    manifest = json.loads(body)
    if manifest["format_version"] > FORMAT_VERSION:
        raise _NewerFormat(
            f"{path.parent} has checkpoint format {manifest['format_version']}, and this program "
            f"reads up to {FORMAT_VERSION}: update it"
        )
    return manifest


def _inspect(
    folder: Path, step: int, share: tuple[int, int] | None = None
) -> dict[str, tuple[int, str]]:
    """Compares a step's files with its manifests: names and sizes, and checksums of a share.

    Args:
      folder: the step's directory, finished or not.
      step: the step it must be.
      share: (i, n) also reads every n-th file from the i-th on; None reads only the manifests.

    Returns:
      {relative path: (size, checksum)}, the manifests themselves not among them.

    Raises:
      _Damaged: naming what is wrong.
      _NewerFormat: if the manifests are sound, but of a newer format.
    """
    try:
        found = _files(folder)
        names = sorted(name for name in found if _MANIFEST.fullmatch(name))
        if not names:
            raise _Damaged("it has no manifest")
        count = int(_MANIFEST.fullmatch(names[0])[2])
        if names != [f"manifest-{i:05d}-of-{count:05d}.json" for i in range(count)]:
            raise _Damaged(f"{names} is not one manifest for each of {count} processes")
        listed: dict[str, tuple[int, str]] = {}
        for i, name in enumerate(names):
            manifest = _read_manifest(folder / name)
            if (manifest["step"], manifest["process"], manifest["processes"]) != (step, i, count):
                raise _Damaged(f"{name} is of another checkpoint or process")
            listed |= {path: (size, digest) for path, (size, digest) in manifest["files"].items()}
        rest = {name: info for name, info in found.items() if name not in names}
        problems = [f"{name} is missing" for name in sorted(listed.keys() - rest.keys())]
        problems += [
            f"{name} does not belong there: remove it"
            for name in sorted(rest.keys() - listed.keys())
        ]
        for name in sorted(listed.keys() & rest.keys()):
            if not stat.S_ISREG(rest[name].st_mode):
                problems.append(f"{name} is not a plain file")
            elif (size := rest[name].st_size) != listed[name][0]:
                problems.append(f"{name} has {size} bytes instead of {listed[name][0]}")
        if share and not problems:
            mine = sorted(listed)[share[0] :: share[1]]
            digests = _digests([folder / name for name in mine])
            problems = [
                f"{name} has changed"
                for name, d in zip(mine, digests, strict=True)
                if d != listed[name][1]
            ]
    except OSError as error:
        raise _Damaged(f"it cannot be read: {error}") from None
    if problems:
        more = [f"and {len(problems) - 3} more"] if len(problems) > 3 else []
        raise _Damaged("; ".join(problems[:3] + more))
    return listed


def _remove(folder: Path) -> None:
    """Deletes a step directory, out of sight first; leaves what this module did not make."""
    known = re.compile(rf"({_META}|{_ARRAYS}|{_MANIFEST.pattern})(\.part)?")
    if not os.path.lexists(folder):
        return
    try:
        if not _LEFTOVER.fullmatch(folder.name):
            hidden = folder.with_name(f"{folder.name}.deleted-{time.time_ns()}")
            os.rename(folder, hidden)
            folder = hidden
        strange = sorted(name for name in os.listdir(folder) if not known.fullmatch(name))
        if strange:
            _LOG.warning("%s is left, for it holds files of others: %s", folder, strange)
        else:
            shutil.rmtree(folder)
    except OSError as error:
        _LOG.warning("%s could not be deleted: %s", folder, error)
