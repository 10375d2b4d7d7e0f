"""The segment suite: training and inference of ParaTransCNN, against the same from torch.nn."""

import functools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import sharding
import zoo
from recipes.benchmarks.kernels import ceilings
from recipes.benchmarks.ours import LEARNING_RATE, Training
from recipes.benchmarks.peer import OURS, Job, Peer, compare
from recipes.tasks import segment as task
from zoo.registry import check_kind

# Model -> sides of its images, of what is timed where no model is named.
MODELS = {"paratranscnn-tiny": 96, "paratranscnn-small": 224}
IMAGE_SIZE = 224
TOLERANCE = 1e-4


class Ours:
    """This project's side, in this process, on one device."""

    def __init__(self, config: Any, batch_size: int, image_size: int, dtype: str):
        """Computes in `dtype`; what is trained is float32."""
        rng = np.random.default_rng(0)
        work = task.workload(config, batch_size, image_size)
        images, labels = (shape for shape, _ in work.batch.values())
        batch = {"images": rng.random(images, np.float32),
                 "labels": rng.integers(0, config.num_classes, labels).astype(np.int32)}
        self.flops = work.flops  # Of a forward pass.
        self.train = Training(config, work.loss, batch, work.axes, dtype)
        self.mesh, self.rules = self.train.mesh, self.train.rules
        self.model = zoo.build(config, self.train.program.seed, self.mesh, self.rules)
        definition, params = zoo.protocol.split(self.model)
        self._params = zoo.protocol.cast(params, jnp.dtype(dtype))
        self._images = jax.device_put(batch["images"])

        def forward(params, images):
            return zoo.protocol.merge(definition, params)({"images": images}).logits

        self._forward = jax.jit(forward)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Float32 ones, of images [B, H, W, C]."""
        with sharding.use(self.mesh, self.rules), jax.default_matmul_precision("highest"):
            return np.asarray(self._forward(zoo.protocol.split(self.model)[1], images))

    def infer(self, batches: int) -> float:
        """The seconds of so many batches."""
        started = time.perf_counter()
        with sharding.use(self.mesh, self.rules):
            for _ in range(batches):
                logits = self._forward(self._params, self._images)
            jax.block_until_ready(logits)
        return time.perf_counter() - started


def run(*, model: str | None, overrides: dict, peer: bool, rounds: int, batch_size: int,
        image_size: int | None, train_steps: int) -> dict[str, Any]:
    """Times both sides in turn and prints a table a model; see `recipes.bench`.

    Returns the settings and, per model and job, each side's images per second, their ratio, and
    the share of this device's matrix roofline that ours reaches.
    Raises ValueError for a model that is none, RuntimeError where the peer cannot run or its
    logits differ.
    """
    for name, size in (("batch_size", batch_size), ("train_steps", train_steps)):
        if size < 1:
            raise ValueError(f"--{name}={size}: it must be at least 1")
    if model is None:
        sizes = {name: size if image_size is None else image_size for name, size in MODELS.items()}
    else:
        sizes = {model: IMAGE_SIZE if image_size is None else image_size}
    configs = {name: zoo.config(name, **overrides) for name in sizes}
    for config in configs.values():
        check_kind(config, "segmentation")
    gpu = jax.default_backend() == "gpu"
    dtype = "bfloat16" if gpu else "float32"
    console = Console()
    roof = ceilings(dtype)["flops"]
    found: dict[str, Any] = {
        "suite": "segment", "peer": "torch.nn" if peer else None, "rounds": rounds,
        "batch_size": batch_size, "train_steps": train_steps, "dtype": dtype,
        "matrix_flops_per_second": roof, "models": {}}
    for name, config in configs.items():
        size = sizes[name]
        ours = Ours(config, batch_size, size, dtype)
        # As long as a training step, about.
        counts = {"train": (ours.train, train_steps, 3), "infer": (ours.infer, 3 * train_steps, 1)}
        jobs = {job: Job(batch_size * count, functools.partial(call, count))
                for job, (call, count, _) in counts.items()}
        other = _peer(ours, config, batch_size, size, gpu, console) if peer else None
        if other is not None:
            for mode in other.ready:
                jobs["train"].peer[mode] = functools.partial(
                    other.ask, {"do": "train", "mode": mode, "steps": train_steps})
                jobs["infer"].peer[mode] = functools.partial(
                    other.ask, {"do": "infer", "mode": mode, "batches": 3 * train_steps})
        results = compare(
            jobs, rounds, "images", f"{name}, {zoo.protocol.num_params(ours.model) / 1e6:.1f}M "
            f"parameters, {batch_size} images {size} x {size}, {dtype}, median of {rounds} "
            "interleaved rounds", console)
        if other is not None:
            other.close()
        for job, (_, _, passes) in counts.items():
            share = results[job][OURS] / batch_size * passes * ours.flops / roof
            results[job]["of_matrix_roofline"] = share
            console.print(f"{job}: {100 * share:.0f}% of the {roof / 1e9:,.0f} GFLOP/s of a large "
                          "matrix product")
        found["models"][name] = {"image_size": size, "results": results}
    return found


def _peer(ours: Ours, config: Any, batch_size: int, image_size: int, gpu: bool, console: Console
          ) -> Peer:
    """The peer with our weights, once its logits are found to be ours."""
    with tempfile.TemporaryDirectory() as folder:
        zoo.to_hf(ours.model, Path(folder) / "model")
        other = Peer("recipes.benchmarks.peer_segment", {
            "model": str(Path(folder) / "model"), "threads": os.cpu_count(), "gpu": gpu,
            "batch_size": batch_size, "image_size": -(-image_size // 16) * 16,
            "learning_rate": LEARNING_RATE})
    images = np.random.default_rng(1).random((1, 64, 48, config.in_channels), np.float32)
    theirs = np.array(other.ask({"do": "logits", "images": np.moveaxis(images, -1, 1).tolist()}))
    difference = float(np.abs(ours.logits(images) - np.moveaxis(theirs, 1, -1)).max())
    console.print(f"logits agree with torch.nn to {difference:.1e}")
    if difference > TOLERANCE:
        raise RuntimeError(f"logits differ from torch.nn's by {difference:.2e}, over {TOLERANCE}; "
                           "timings would compare different models")
    return other
