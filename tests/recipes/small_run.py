"""A run of `recipes.train` small enough for tests, in this process or in one of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from recipes import command, train

MODEL = (
    "--set=num_layers=2,width=32,vocab_size=264,attention.num_heads=4,attention.num_kv_heads=2,"
    "attention.head_dim=8,mlp.hidden=48,dropout=0.1"
)
BATCH = ("--seq_len=32", "--batch_size=8", "--heldout=0.2", "--eval_batches=2")
OFTEN = ("--log_every=1", "--eval_every=4", "--save_every=4")


def write_corpus(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """A .jsonl of sentences over a few words."""
    rng = np.random.default_rng(seed)
    words = ["def", "return", "self", "None", "import", "x", "y", "(", ")", ":", "=", "\n    "]
    path = folder / "corpus.jsonl"
    with path.open("w") as file:
        for _ in range(documents):
            text = " ".join(words[i] for i in rng.integers(0, len(words), rng.integers(20, 200)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def flags(corpus: Path, workdir: Path, *more: str) -> list[str]:
    """The command line of a small run."""
    return [f"--data={corpus}", f"--workdir={workdir}", MODEL, *BATCH, *OFTEN, *more]


def run(*args: str) -> int:
    """The exit status of `recipes.train` in this process."""
    return command.execute(train.main, ["train", *args])


def start(*args: str, devices: int = 1, log: Path | None = None) -> subprocess.Popen:
    """`recipes.train` in a process of its own, with so many devices; stderr goes to stdout."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1",
                   "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    out = subprocess.PIPE if log is None else log.open("w")
    return subprocess.Popen([sys.executable, "-m", "recipes.train", *args], env=environment,
                            stdout=out, stderr=subprocess.STDOUT, text=True)


def records(workdir: Path) -> list[dict]:
    """The run's metrics.jsonl, without what depends on the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert all(record.pop("time")["seconds"] > 0 for record in found)
    return found


def losses(workdir: Path) -> dict[int, float]:
    """Training loss by step."""
    return {r["step"]: r["train"]["loss"] for r in records(workdir) if "train" in r}
