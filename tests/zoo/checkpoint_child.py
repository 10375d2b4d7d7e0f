"""Programs that test_checkpoint.py runs in processes of their own: NAME ARGUMENTS."""

import errno
import json
import os
import random
import resource
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from zoo.checkpoint import Checkpointer

KILL_SHAPES = {"a": (300, 50), "b": (7,), "c": ()}


def kill_values(step):
    """The arrays of a step in `killed`, from the step alone."""
    rng = np.random.default_rng(step)
    return {k: rng.standard_normal(shape, np.float32) for k, shape in KILL_SHAPES.items()}


def killed(directory, seed, rounds):
    """Forks a program that saves without end and kills itself inside a save; once for each round.

    In turn at a random moment, at the n-th thing it makes or renames from Python, and at the n-th
    thing it deletes. Between rounds, the parent looks at the directory.
    """
    import orbax.checkpoint  # noqa: F401  # before the fork: it takes longest

    rng = random.Random(int(seed))
    for i in range(int(rounds)):
        seconds, n = rng.uniform(0.2, 0.7), rng.randrange(1, 20)
        child = os.fork()
        if child == 0:
            if i % 3 == 0:
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
            elif i % 3 == 1:
                kill_at(n, directory, ("open", "os.mkdir", "os.rename"))
            else:
                kill_at(n, directory, ("os.remove", "os.rmdir"))
            save_forever(directory)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.WIFSIGNALED(status) and os.WTERMSIG(status)), flush=True)
        sys.stdin.readline()


def kill_at(n, directory, events):
    left = n

    def hook(event, args):
        nonlocal left
        if event not in events:
            return
        if event == "open" and not (
            str(args[0]).startswith(directory) and args[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            return
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def save_forever(directory):
    checkpointer = Checkpointer(directory, keep_last=2)
    step = checkpointer.latest() or 0
    while True:
        step += 1
        checkpointer.save(step, jax.tree.map(jnp.asarray, kill_values(step)), {"step": step})


def full_disk(directory):
    """Saves a step, meets a full disk (files may not grow beyond 20 kB), and saves again."""
    checkpointer = Checkpointer(directory)
    arrays = {"w": jnp.arange(50_000.0)}
    checkpointer.save(1, arrays, {}, wait=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    checkpointer.save(2, arrays, {})
    try:
        checkpointer.wait()
    except OSError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    left = sorted(os.listdir(directory))
    checkpointer.save(3, arrays, {}, wait=True)
    print(json.dumps({"error": message, "left": left, "steps": checkpointer.steps()}))


def process(index, port, directory):
    """One of two processes, with two devices each."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(index))
    mesh = jax.make_mesh((4,), ("data",))
    rows, columns, everywhere = (
        NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), (None, "data"), ())
    )
    values = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    place = jax.jit(lambda x: x, out_shardings=rows)
    collect = jax.jit(lambda x: x.sum(), out_shardings=everywhere)

    def arrays(step):
        return {
            "sharded": place(values + step),
            "replicated": jax.jit(lambda x: x, out_shardings=everywhere)(values * step),
            "local": jnp.int32(step),
            "numpy": np.full(3, step),
        }

    def target(sharding):
        matrix = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)
        return {
            "sharded": matrix,
            "replicated": matrix,
            "local": jax.ShapeDtypeStruct((), jnp.int32),
            "numpy": jax.ShapeDtypeStruct((3,), np.int64),
        }

    def check(restored, step, sharding):
        for name, expected in (("sharded", values + step), ("replicated", values * step)):
            assert restored[name].sharding == sharding
            for shard in restored[name].addressable_shards:
                np.testing.assert_array_equal(shard.data, expected[shard.index])
        assert int(restored["local"]) == step and restored["numpy"].tolist() == [step] * 3

    # Collectives of the "training step" run while the commits' barriers wait.
    checkpointer = Checkpointer(directory, keep_last=2)
    for step in (1, 2, 3):
        checkpointer.save(step, arrays(step), {"step": step})
        for _ in range(20):
            assert collect(place(values)) == values.sum()
    checkpointer.wait()
    assert checkpointer.steps() == [2, 3]
    restored, meta, step = checkpointer.restore(target(columns))
    assert (meta, step) == ({"step": 3}, 3)
    check(restored, 3, columns)

    # One process fails: both raise, soon, and nothing older is lost.
    if index == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    started = time.monotonic()
    try:
        checkpointer.save(4, arrays(4), {}, wait=True)
    except OSError as error:
        assert error.errno == errno.EFBIG and "step 4 was not saved" in str(error), error
    else:
        raise AssertionError("the save succeeded")
    assert time.monotonic() - started < 10
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert checkpointer.latest() == 3

    # A file of process 1 is damaged: both use the older step.
    collect(place(values)).block_until_ready()
    if index == "0":
        folder = os.path.join(directory, "step_00000003", "arrays", "ocdbt.process_1", "d")
        path = os.path.join(folder, sorted(os.listdir(folder))[0])
        with open(path, "r+b") as file:
            file.write(bytes([file.read(1)[0] ^ 1]))
            file.seek(0)
    collect(place(values)).block_until_ready()
    assert checkpointer.latest() == 2
    restored, _, step = checkpointer.restore(target(rows))
    assert step == 2
    check(restored, 2, rows)

    # Written by one process, read by two.
    alone = Checkpointer(directory + "_of_one")
    restored, _, _ = alone.restore(target(rows))
    check(restored, 5, rows)
    checkpointer.close()
    alone.close()
    jax.distributed.shutdown()


if __name__ == "__main__":
    {"killed": killed, "full_disk": full_disk, "process": process}[sys.argv[1]](*sys.argv[2:])
