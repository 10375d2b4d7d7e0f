"""The convert suite: time and memory of reading and writing weights, against transformers' loading.

Every measurement is a process of its own (`python -m recipes.benchmarks.convert JSON` is one), so
that its peak memory is its own.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import zoo
from zoo.convert import saving
from zoo.convert.source import open_source
from zoo.convert.table import Piece

# Of what is read again, so that what was only mapped is in memory, too.
_STRIDE = 1024
DEVICES = 8


def run(*, model: str, overrides: dict, peer: str | None, rounds: int, dtype: str | None
        ) -> dict[str, Any]:
    """Makes a directory of random weights as Hugging Face has it, and times what is done with it.

    Converting both ways and loading onto eight devices once, loading in turns with the peer.
    Returns seconds, bytes per second and peak memory of each job. Raises RuntimeError where a job
    fails, as without the peer's libraries.
    """
    config = zoo.config(model, **overrides)
    kind = jnp.dtype(dtype or "bfloat16")
    with tempfile.TemporaryDirectory(prefix="parazoo-", dir=os.environ.get("TMPDIR")) as folder:
        theirs, ours, back = (str(Path(folder) / name) for name in ("theirs", "ours", "back"))
        saving.write_hf(theirs, config, _random(kind), kind)
        total = sum(f.stat().st_size for f in Path(theirs).glob("*.safetensors"))
        jobs: dict[str, dict[str, Any]] = {}
        jobs["theirs to ours"] = _measure({"do": "convert", "to": "native", "source": theirs,
                                           "out": ours})
        jobs["ours to theirs"] = _measure({"do": "convert", "to": "hf", "source": ours,
                                           "out": back})
        jobs[f"load onto {DEVICES} devices"] = _measure(
            {"do": "load_mesh", "source": theirs},
            {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"})
        sides = {"load": {"do": "load", "source": theirs}}
        if peer is not None:
            sides[f"load by {peer}"] = {"do": f"load_{peer}", "source": theirs}
        times: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, request in sides.items():
                times[name].append(_measure(request))
    for name, found in times.items():
        jobs[name] = {"seconds": statistics.median(r["seconds"] for r in found),
                      "peak_bytes": max(r["peak_bytes"] for r in found),
                      "rounds": [r["seconds"] for r in found]}
    table = Table("job", "seconds", "MB/s", "peak memory GB",
                  title=f"{model}, {total / 1e9:.2f} GB in {kind.name}; loading: median of "
                        f"{rounds} interleaved rounds")
    for name, job in jobs.items():
        job["bytes_per_second"] = total / job["seconds"]
        table.add_row(name, f"{job['seconds']:.2f}", f"{total / 1e6 / job['seconds']:,.0f}",
                      f"{job['peak_bytes'] / 1e9:.2f}")
    Console().print(table)
    if peer is not None:
        ratio = jobs[f"load by {peer}"]["seconds"] / jobs["load"]["seconds"]
        Console().print(f"loading takes 1/{ratio:.2f} of {peer}'s time")
        jobs["load"]["ratio"] = ratio
    return {"suite": "convert", "model": model, "peer": peer, "rounds": rounds,
            "dtype": kind.name, "bytes": total, "results": jobs}


def _random(dtype: np.dtype):
    """Parts of parameters, of a normal's noise around 0, a megabyte of it again and again."""
    noise = (0.02 * np.random.default_rng(0).normal(size=1 << 19)).astype(dtype)

    def get(piece: Piece) -> list[np.ndarray]:
        return [np.resize(noise, piece.shape)]

    return get


def _measure(request: dict[str, Any], env: dict[str, str] | None = None) -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, "-m", "recipes.benchmarks.convert", json.dumps(request)],
        capture_output=True, text=True, env={**os.environ, **(env or {})})
    if child.returncode:
        last = child.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(f"{request['do']} failed: {last} (transformers needs the extra parity: "
                           "pip install 'parazoo[parity]')")
    return json.loads(child.stdout.strip().rpartition("\n")[2])


# --- in a process of its own -----------------------------------------------------------------


def _convert(source: str, out: str, to: str) -> None:
    with open_source(source) as found:
        write = saving.write_native if to == "native" else saving.write_hf
        write(out, found.config, saving.from_source(found), found.dtype, source)


def _load(source: str) -> None:
    params = zoo.protocol.split(zoo.load(source))[1]
    for x in jax.tree.leaves(jax.block_until_ready(params)):
        np.asarray(x).reshape(-1)[::_STRIDE].sum()


def _load_mesh(source: str) -> None:
    model = zoo.load(source, mesh=f"fsdp:{DEVICES}", rules="fsdp", stacked=True)
    leaves = jax.tree.leaves(jax.block_until_ready(zoo.protocol.split(model)[1]))
    held = [sum(s.data.nbytes for x in leaves for s in x.addressable_shards if s.device == device)
            for device in jax.devices()]
    share = sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)
    assert set(held) == {share}, (held, share)


def _load_transformers(source: str) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    for x in model.parameters():
        x.detach().reshape(-1)[::_STRIDE].sum()


_JOBS = {"convert": _convert, "load": _load, "load_mesh": _load_mesh,
         "load_transformers": _load_transformers}


def _main() -> None:
    request = json.loads(sys.argv[1])
    job = _JOBS[request.pop("do")]
    if job is _load_transformers:
        import transformers  # noqa: F401  Not what is timed; nor is jax's start.
    else:
        jax.devices()
    started = time.perf_counter()
    job(**request)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    _main()
