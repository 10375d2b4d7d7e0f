"""Checkpoints: what is saved comes back; what is damaged, half-made or foreign is never loaded."""

import asyncio
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.zoo.checkpoint_child import KILL_SHAPES, kill_values
from zoo.checkpoint import Checkpointer, describe, read_meta

CHILD = pathlib.Path(__file__).with_name("checkpoint_child.py")


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


def spec(tree):
    """The abstract tree: shapes, dtypes, and the shardings of those leaves that have one."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree,
    )


def assert_same(actual, expected):
    """Equal bit for bit, in structure, kind of array, dtype, shape and sharding."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array) == isinstance(e, jax.Array)
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        assert getattr(a, "sharding", None) == getattr(e, "sharding", None)
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


def save(checkpointer, *steps):
    for step in steps:
        arrays = {"w": jnp.arange(20.0) + step, "b": np.full(3, step)}
        checkpointer.save(step, arrays, {"step": step}, wait=True)


ABSTRACT = {
    "w": jax.ShapeDtypeStruct((20,), np.float32),
    "b": jax.ShapeDtypeStruct((3,), np.int64),
}


def restored_step(checkpointer):
    """The step that `restore` chooses, its arrays checked."""
    arrays, meta, step = checkpointer.restore(ABSTRACT)
    assert meta == {"step": step}
    np.testing.assert_array_equal(arrays["w"], np.arange(20.0) + step)
    np.testing.assert_array_equal(arrays["b"], np.full(3, step))
    return step


@pytest.fixture
def trained():
    """Parameters of every dtype and kind of container, and their adam state."""
    params = {
        "blocks": [{"q/k": jax.random.normal(jax.random.key(0), (3, 4)), "a.b": jnp.int32(-3)}],
        "pair": Pair(jnp.full((2, 5), 1 / 3, jnp.bfloat16), jnp.array([True, False])),
        "seed": jnp.array([1, 2**32 - 1], jnp.uint32),
        "empty": jnp.zeros((0, 4)),
        "numpy": np.arange(3.0),
        "nothing": None,
        "none at all": {},
    }
    floats = {"w": params["blocks"][0]["q/k"], "h": params["pair"].first}
    optimizer = optax.chain(optax.clip(1.0), optax.adam(1e-3))
    _, state = jax.jit(optimizer.update)(floats, optimizer.init(floats))
    return {"params": params, "optimizer": state, "step": jnp.uint32(7)}


def test_round_trip(tmp_path, trained):
    meta = {"seed": 3, "config": {"lr": 1e-3, "name": "tiny", "dims": [1, 2]}, "done": None}
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(7, trained, meta)
        checkpointer.wait()
        assert checkpointer.steps() == [7] and checkpointer.latest() == 7
        arrays, restored_meta, step = checkpointer.restore(spec(trained))
    assert (restored_meta, step) == (meta, 7)
    assert_same(arrays, trained)


def test_subset_description_and_meta(tmp_path, trained):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(7, trained, {"a": 1})
    assert read_meta(tmp_path) == read_meta(tmp_path, 7) == {"a": 1}
    listing = describe(tmp_path)
    assert listing["params/pair/first"] == ((2, 5), jnp.bfloat16)
    assert listing["params/blocks/0/q/k"] == ((3, 4), np.float32)
    assert listing["params/empty"] == ((0, 4), np.float32)
    assert listing["optimizer/1/0/count"] == ((), np.int32)
    assert len(listing) == len(jax.tree.leaves(trained))
    with Checkpointer(tmp_path) as checkpointer:
        arrays, _, _ = checkpointer.restore({"params": spec(trained["params"])})
    assert_same(arrays, {"params": trained["params"]})


def test_restores_into_the_target_sharding(tmp_path):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    stored, wanted, everywhere = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x", None), ("y", "x"), ())
    )
    values = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    arrays = {"w": jax.device_put(values, stored), "r": jax.device_put(values, jax.devices()[3])}
    target = {
        "w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=wanted),
        "r": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=everywhere),
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, arrays, {})
        restored, _, _ = checkpointer.restore(target)
        on_host, _, _ = checkpointer.restore(
            {"w": jax.ShapeDtypeStruct((8, 8), np.float32), "r": target["r"]}
        )
    assert_same(restored, jax.tree.map(lambda t: jax.device_put(values, t.sharding), target))
    assert isinstance(on_host["w"], np.ndarray)
    np.testing.assert_array_equal(on_host["w"], values)


@pytest.mark.parametrize("axes", [(), ("x",)])
def test_buffers_are_free_when_save_returns(tmp_path, axes):
    """The next step may donate the arrays, and does so in place; numpy arrays may change."""
    sharding = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec(*axes))
    make = jax.jit(lambda step: jnp.arange(1_000_000.0) + step, out_shardings=sharding)
    spoil = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    values = np.arange(1_000_000, dtype=np.float32)
    with Checkpointer(tmp_path) as checkpointer:
        for step in range(3):
            x, host = jax.block_until_ready(make(step)), values + step
            before = [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]
            checkpointer.save(step, {"x": x, "host": host}, {})
            host[:] = -1
            spoilt = jax.block_until_ready(spoil(x))
            assert x.is_deleted()
            assert before == [s.data.unsafe_buffer_pointer() for s in spoilt.addressable_shards]
        checkpointer.wait()
        target = jax.ShapeDtypeStruct(values.shape, values.dtype)
        for step in range(3):
            arrays, _, _ = checkpointer.restore({"x": target, "host": target}, step)
            np.testing.assert_array_equal(arrays["x"], values + step)
            np.testing.assert_array_equal(arrays["host"], values + step)


def test_works_inside_an_event_loop_and_under_a_transfer_guard(tmp_path, trained):
    async def notebook_cell():
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(1, trained, {})
            return checkpointer.restore(spec(trained))[0]

    jax.config.update("jax_transfer_guard", "disallow")
    try:
        restored = asyncio.run(notebook_cell())
    finally:
        jax.config.update("jax_transfer_guard", "allow")
    assert_same(restored, trained)


# --- damage --------------------------------------------------------------------------------------


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


def delete(path, rng):
    path.unlink()


def test_200_corruptions_are_all_found(tmp_path, caplog):
    rng = random.Random(0)
    with Checkpointer(tmp_path / "run") as checkpointer:
        save(checkpointer, 1, 2)
        newest = tmp_path / "run" / "step_00000002"
        shutil.copytree(newest, tmp_path / "copy")
        files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
        assert {"meta.json", "_METADATA", "manifest.ocdbt"} <= {p.name for p in files}
        for i in range(200):
            caplog.clear()
            file = files[i % len(files)]  # each file many times; place and kind at random
            rng.choice([flip, flip, flip, truncate, delete])(newest / file, rng)
            assert restored_step(checkpointer) == 1
            assert f"step 2 in {tmp_path / 'run'} is damaged" in caplog.text
            assert "step 1 is the newest whole one" in caplog.text
            with pytest.raises(ValueError, match="step 2 .* is damaged"):
                checkpointer.restore(ABSTRACT, step=2)
            shutil.copyfile(tmp_path / "copy" / file, newest / file)
        assert restored_step(checkpointer) == 2


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


def drop_manifest(step):
    next(step.glob("manifest-*")).unlink()


def claim_two_processes(step):
    next(step.glob("manifest-*")).rename(step / "manifest-00000-of-00002.json")


def add_file(step):
    (step / "arrays" / "d" / "more").write_bytes(b"x")


def swap_data(step):
    """The data of the other step, whole in itself."""
    shutil.rmtree(step / "arrays")
    shutil.copytree(step.with_name("step_00000001") / "arrays", step / "arrays")


def copy_other_step(step):
    shutil.rmtree(step)
    shutil.copytree(step.with_name("step_00000001"), step)


def link(step):
    file = next(p for p in (step / "arrays").rglob("d/*"))
    file.rename(step.parent / "elsewhere")
    file.symlink_to(step.parent / "elsewhere")


def shorten(step):
    file = next(p for p in (step / "arrays").rglob("d/*"))
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (empty, "it has no manifest"),
        (drop_manifest, "it has no manifest"),
        (claim_two_processes, "is not one manifest for each of 2 processes"),
        (add_file, "arrays/d/more does not belong there"),
        (swap_data, "is missing"),
        (copy_other_step, "is of another checkpoint"),
        (link, "is not a plain file"),
        (shorten, "bytes instead of"),
    ],
)
def test_other_damage_is_found(tmp_path, caplog, damage, reason):
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        save(checkpointer, 1, 2)
        damage(tmp_path / "step_00000002")
        assert checkpointer.steps() == [1]
        assert restored_step(checkpointer) == 1
        assert reason in caplog.text
        with pytest.raises(ValueError, match=f"step 2 .* is damaged: .*{reason}"):
            read_meta(tmp_path, 2)
        assert read_meta(tmp_path) == {"step": 1}
        save(checkpointer, 3)  # the damaged one does not count as kept
        assert checkpointer.steps() == [1, 3]
        assert (tmp_path / "step_00000002").exists()


def test_a_damaged_step_is_replaced_and_a_whole_one_is_not(tmp_path, caplog):
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, 2)
        with pytest.raises(ValueError, match="step 2 is already saved"):
            save(checkpointer, 2)
        flip(next((tmp_path / "step_00000002/arrays").rglob("d/*")), random.Random(0))
        save(checkpointer, 2)
        assert "step 2 in" in caplog.text and "is replaced" in caplog.text
        assert restored_step(checkpointer) == 2
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000002"]


def test_a_newer_format_is_refused_and_kept(tmp_path):
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        save(checkpointer, 1)
        manifest = tmp_path / "step_00000001" / "manifest-00000-of-00001.json"
        body = json.loads(manifest.read_bytes().split(b"\n", 1)[1]) | {"format_version": 2}
        body = json.dumps(body).encode()
        digest = hashlib.blake2b(body, digest_size=16).hexdigest()
        manifest.write_bytes(b'{"blake2b": "%s"}\n' % digest.encode() + body)
        for read in (
            checkpointer.latest,
            lambda: checkpointer.restore(ABSTRACT),
            lambda: read_meta(tmp_path),
            lambda: describe(tmp_path, 1),
        ):
            with pytest.raises(ValueError, match="format 2, and this program reads up to 1"):
                read()
        save(checkpointer, 2, 3)
        assert checkpointer.steps() == [3]
        assert (tmp_path / "step_00000001").exists()


# --- interrupted and failed saves ----------------------------------------------------------------


def start(*args, **kwargs):
    return subprocess.Popen(
        [sys.executable, CHILD, *map(str, args)], stdout=subprocess.PIPE, text=True, **kwargs
    )


def test_sigkill_inside_a_save_leaves_a_whole_checkpoint(tmp_path):
    rounds, last, unfinished = 18, 0, 0
    target = {k: jax.ShapeDtypeStruct(shape, np.float32) for k, shape in KILL_SHAPES.items()}
    run = tmp_path / "run"
    with start("killed", run, 0, rounds, stdin=subprocess.PIPE) as child:
        for _ in range(rounds):
            assert json.loads(child.stdout.readline()) == signal.SIGKILL
            unfinished += any(run.glob("*.unfinished"))
            with Checkpointer(run) as checkpointer:
                numbers = [int(p.name[5:]) for p in run.glob("step_*") if p.suffix == ""]
                assert (checkpointer.latest() or 0) == max(numbers, default=0) >= last
                for step in numbers:  # a step that has its name is whole
                    arrays, meta, _ = checkpointer.restore(target, step)
                    assert meta == {"step": step}
                    assert_same(arrays, kill_values(step))
                last = max(numbers, default=0)
            child.stdin.write("\n")
            child.stdin.flush()
        child.communicate()
    assert child.returncode == 0
    assert last > rounds / 2 and unfinished > 3
    with Checkpointer(run, keep_last=2) as checkpointer:
        checkpointer.save(last + 1, kill_values(last + 1), {})
    assert sorted(os.listdir(run)) == [f"step_{s:08d}" for s in (last, last + 1)]


def test_only_leftovers_of_its_own_are_removed(tmp_path, caplog):
    foreign = ["notes.txt", "step_7", "step_00000009.unfinished/mine.txt", "step_00000001.bak/a"]
    ours = ["step_00000005.unfinished/meta.json.part", "step_00000004.deleted-12/arrays/d/x"]
    for name in foreign + ours:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest() is None and checkpointer.steps() == []
        assert all((tmp_path / name).exists() for name in ours)  # reading removes nothing
        checkpointer.prepare()
        assert all((tmp_path / name).exists() for name in foreign)
        assert not any((tmp_path / name.split("/")[0]).exists() for name in ours)
        assert "step_00000009.unfinished is left" in caplog.text
        save(checkpointer, 1)
        assert restored_step(checkpointer) == 1
        with pytest.raises(FileExistsError, match="step_00000009.unfinished holds files of others"):
            save(checkpointer, 9)
        assert all((tmp_path / name).exists() for name in foreign)


def test_full_disk(tmp_path):
    with start("full_disk", tmp_path) as child:
        result = json.loads(child.communicate()[0])
    assert f"step 2 was not saved in {tmp_path} (File too large)" in result["error"]
    assert "it needs about 200,000 bytes" in result["error"] and "are free" in result["error"]
    assert "committed before are kept" in result["error"]
    assert result["left"] == ["step_00000001"]
    assert result["steps"] == [1, 3]


def test_a_background_error_surfaces_once_and_the_next_save_works(tmp_path, caplog, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1)
        with monkeypatch.context() as patch:
            patch.setattr("zoo.checkpoint._write_manifest", fail)
            checkpointer.save(2, {"w": jnp.ones(3)}, {})
            assert restored_step(checkpointer) == 1  # waits for the save; its error stays pending
        with pytest.raises(OSError, match="step 2 was not saved .* needs about 12 bytes"):
            save(checkpointer, 3)
        assert "step 2 was not saved" in caplog.text
        assert os.listdir(tmp_path) == ["step_00000001"]
        save(checkpointer, 3)
        assert restored_step(checkpointer) == 3


@pytest.fixture
def read_only():
    """A directory with one checkpoint, which this process cannot write, be it root's or not."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        run = pathlib.Path(name, "run")
        with Checkpointer(run) as checkpointer:
            save(checkpointer, 1)
        os.chmod(name, 0o755)
        os.chmod(run, 0o555)
        if root:
            os.seteuid(65534)
        try:
            yield run
        finally:
            if root:
                os.seteuid(0)
            os.chmod(run, 0o755)


def test_read_only_directory(read_only):
    with Checkpointer(read_only) as checkpointer:
        assert restored_step(checkpointer) == 1
        with pytest.raises(PermissionError, match=f"cannot write checkpoints to {read_only} "):
            checkpointer.prepare()
        with pytest.raises(PermissionError, match=f"cannot write checkpoints to {read_only} "):
            save(checkpointer, 2)
        assert restored_step(checkpointer) == 1
    with pytest.raises(PermissionError, match="cannot write checkpoints to"):
        Checkpointer(read_only / "sub").prepare()


# --- retention -----------------------------------------------------------------------------------


def test_keep_last_and_keep_every(tmp_path):
    with Checkpointer(tmp_path, keep_last=2, keep_every=4) as checkpointer:
        save(checkpointer, *range(10))
        assert checkpointer.steps() == [0, 4, 8, 9]
    assert len(os.listdir(tmp_path)) == 4
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        save(checkpointer, 5)  # after a return to step 4: older than the newest, yet kept
        assert checkpointer.steps() == [5, 9]


def test_damaged_steps_do_not_count_as_kept(tmp_path):
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        save(checkpointer, 1, 2)
    flip(next((tmp_path / "step_00000002/arrays").rglob("d/*")), random.Random(0))
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        assert checkpointer.latest() == 1
        save(checkpointer, 3)
        assert (tmp_path / "step_00000001").exists()
        save(checkpointer, 4)
        assert not (tmp_path / "step_00000001").exists()
        assert restored_step(checkpointer) == 4


# --- several processes ---------------------------------------------------------------------------


def test_two_processes(tmp_path):
    """Sharded saves, agreement on failure and on damage, and restores over 1 <-> 2 processes."""
    run, of_one = tmp_path / "run", tmp_path / "run_of_one"
    values = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    arrays = {
        "sharded": values + 5,
        "replicated": values * 5,
        "local": np.int32(5),
        "numpy": np.full(3, 5),
    }
    with Checkpointer(of_one) as checkpointer:
        checkpointer.save(5, arrays, {})
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    children = [
        start("process", i, port, run, env=environment, stderr=subprocess.STDOUT) for i in (0, 1)
    ]
    try:
        outputs = [child.communicate(timeout=60)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(outputs)

    sharding = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec(None, "x"))
    matrix = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)
    with Checkpointer(run) as checkpointer:
        assert len(list((run / "step_00000002").glob("manifest-*-of-00002.json"))) == 2
        restored, meta, step = checkpointer.restore({"sharded": matrix, "replicated": matrix})
    assert (meta, step) == ({"step": 2}, 2)
    assert_same(
        restored,
        {
            "sharded": jax.device_put(values + 2, sharding),
            "replicated": jax.device_put(values * 2, sharding),
        },
    )


# --- errors --------------------------------------------------------------------------------------


def test_every_mismatch_is_reported_at_once(tmp_path):
    arrays = {
        "params": {"embed": jnp.ones((4, 2)), "head": jnp.ones(3), "norm": jnp.ones(2)},
        "optimizer": {"count": jnp.int32(0)},
    }
    target = {
        "params": {
            "embed": jax.ShapeDtypeStruct((4, 3), jnp.float32),
            "head": jax.ShapeDtypeStruct((3,), jnp.bfloat16),
            "norms": jax.ShapeDtypeStruct((2,), jnp.float32),
        }
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, arrays, {})
        with pytest.raises(ValueError, match="does not fit the target, 4 differences") as caught:
            checkpointer.restore(target)
        with pytest.raises(TypeError, match="params: give a jax.ShapeDtypeStruct, not a int"):
            checkpointer.restore({"params": 3})
    assert str(caught.value).splitlines()[1:] == [
        "  params/norms: not in the checkpoint; nearest there: params/norm",
        "  params/norm: not in the target; nearest there: params/norms",
        "  params/embed: float32[4,2] in the checkpoint, float32[4,3] in the target",
        "  params/head: float32[3] in the checkpoint, bfloat16[3] in the target",
    ]


def test_where_there_is_no_checkpoint(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    missing = Checkpointer(tmp_path / "missing")
    assert missing.latest() is None and missing.steps() == []
    assert not (tmp_path / "missing").exists()
    for name, reason in [("missing", "there is no such directory"), ("empty", "no step_")]:
        message = f"no checkpoint in .*{name}: .*{reason}"
        with pytest.raises(FileNotFoundError, match=message):
            Checkpointer(tmp_path / name).restore(ABSTRACT)
        with pytest.raises(FileNotFoundError, match=message):
            read_meta(tmp_path / name)
    with pytest.raises(NotADirectoryError):
        Checkpointer(tmp_path / "file").latest()
    with Checkpointer(tmp_path / "run") as checkpointer:
        save(checkpointer, 1, 2)
        with pytest.raises(FileNotFoundError, match="no step 3 in .*; it holds 1, 2"):
            checkpointer.restore(ABSTRACT, step=3)
    with pytest.raises(FileNotFoundError, match="it is one step; give its parent, .*run$"):
        Checkpointer(tmp_path / "run" / "step_00000001").restore(ABSTRACT)
    for step in (1, 2):
        drop_manifest(tmp_path / "run" / f"step_{step:08d}")
    with pytest.raises(FileNotFoundError, match="none of the steps 1, 2 is whole"):
        Checkpointer(tmp_path / "run").restore(ABSTRACT)


@pytest.mark.parametrize(
    ("step", "arrays", "meta", "error", "message"),
    [
        (-1, {"w": np.ones(2)}, {}, ValueError, "step=-1: must be at least 0"),
        (1.5, {"w": np.ones(2)}, {}, TypeError, "float"),
        (1, {"a/b": np.ones(2), "a": {"b": np.ones(2)}}, {}, ValueError, "the path 'a/b'"),
        (1, {"a": {"lr": 0.1}}, {}, TypeError, "a/lr: a float is no array"),
        (1, {"key": jax.random.key(0)}, {}, TypeError, "key: a typed PRNG key"),
        (1, {"s": np.array(["x"])}, {}, TypeError, "s: dtype <U1 cannot be saved"),
        (1, np.ones(2), {}, TypeError, "put it in a dict"),
        (1, {"w": np.ones(2)}, {"a": np.ones(2)}, TypeError, "meta must be JSON"),
    ],
)
def test_arguments_of_save_are_checked(tmp_path, step, arrays, meta, error, message):
    with Checkpointer(tmp_path / "run") as checkpointer, pytest.raises(error, match=message):
        checkpointer.save(step, arrays, meta)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_last": 0}, "keep_last=0"),
        ({"keep_every": 0}, "keep_every=0"),
        ({"directory": "gs://bucket/run"}, "mount remote storage"),
    ],
)
def test_arguments_of_the_constructor_are_checked(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        Checkpointer(**({"directory": tmp_path} | arguments))
