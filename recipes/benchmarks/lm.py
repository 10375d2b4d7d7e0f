"""The lm suite: training and greedy decoding, against a peer with the same weights."""

import functools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import sharding
import zoo
from recipes.benchmarks.peer import Peer, in_turns
from recipes.optimizer import Optimizer
from recipes.tasks import lm as lm_task
from recipes.training import Program, make_step

PROMPT_TOKENS = 32
LEARNING_RATE = 1e-4
OURS = "parazoo"


def _batch(config: Any, batch_size: int, seq_len: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch_size, seq_len + 1))
    shape = (batch_size, seq_len)
    return {
        "tokens": tokens[:, :-1].astype(np.int32), "labels": tokens[:, 1:].astype(np.int32),
        "segment_ids": np.ones(shape, np.int32), "weights": np.ones(shape, np.float32),
        "positions": np.broadcast_to(np.arange(seq_len, dtype=np.int32), shape).copy(),
    }


class Ours:
    """This project's side, in this process, on one device."""

    def __init__(self, config: Any, batch_size: int, seq_len: int):
        self.config = config
        self.mesh = sharding.mesh("data:1", jax.devices()[:1])
        self.rules = sharding.rules("dp")
        optimizer = Optimizer("adamw", LEARNING_RATE, schedule="constant", warmup_steps=0)
        self.program = Program(config, self.mesh, self.rules, lm_task.make_loss(0.0), optimizer)
        with sharding.use(self.mesh, self.rules):
            self.step = make_step(self.program)
            self.state = self.program.init()
        # Decoding has weights of its own: a training step gives its buffers away.
        self.model = zoo.build(config, self.program.seed, self.mesh, self.rules)
        self.batch = jax.device_put(_batch(config, batch_size, seq_len),
                                    self.program.batch_sharding)
        self.count = 0

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        with sharding.use(self.mesh, self.rules):
            return np.asarray(self.model({"tokens": tokens}).logits)

    def train(self, steps: int) -> float:
        started = time.perf_counter()
        with sharding.use(self.mesh, self.rules):
            for _ in range(steps):
                signals = jax.device_put(np.array([[self.count, 0]], np.int32))
                self.state, metrics = self.step(self.state, self.batch, signals)
                self.count += 1
            jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - started

    def decode(self, batch: int, new_tokens: int) -> float:
        prompts = [list(range(1, PROMPT_TOKENS + 1))] * batch
        started = time.perf_counter()
        result = zoo.generate(self.model, prompts, new_tokens)
        assert all(len(tokens) == new_tokens for tokens in result.tokens)
        return time.perf_counter() - started


def run(*, model: str, overrides: dict, peer: str | None, rounds: int, batch_size: int,
        seq_len: int, train_steps: int, decode_batches: list[int], new_tokens: int
        ) -> dict[str, Any]:
    """Times both sides in turn and prints a table; see `recipes.bench`.

    Returns the settings and, per job, each side's tokens per second and their ratio.
    Raises RuntimeError where the peer cannot run or its logits differ.
    """
    config = zoo.config(model, **overrides)
    ours = Ours(config, batch_size, seq_len)
    console = Console()
    jobs = {"train": batch_size * seq_len * train_steps}
    jobs |= {f"decode x{b}": b * new_tokens for b in decode_batches}
    modes: dict[str, list[str]] = {job: [] for job in jobs}
    other = None
    if peer is not None:
        with tempfile.TemporaryDirectory() as folder:
            zoo.to_hf(ours.model, Path(folder) / "model")
            other = Peer(f"recipes.benchmarks.peer_{peer}", {
                "model": str(Path(folder) / "model"), "threads": os.cpu_count(),
                "vocab_size": config.vocab_size, "batch_size": batch_size, "seq_len": seq_len,
                "learning_rate": LEARNING_RATE, "prompt_tokens": PROMPT_TOKENS})
        tokens = np.arange(1, 65, dtype=np.int32).reshape(2, 32) % config.vocab_size
        difference = float(np.abs(ours.logits(tokens)
                                  - np.array(other.ask({"do": "logits",
                                                        "tokens": tokens.tolist()}))).max())
        console.print(f"logits agree with {peer} to {difference:.1e}")
        if difference > 1e-4:
            raise RuntimeError(f"logits differ from {peer}'s by {difference:.2e}, over 1e-4; "
                               "timings would compare different models")
        modes = {job: other.ready["train" if job == "train" else "decode"] for job in jobs}

    def measure(job: str, mode: str | None) -> float:
        batch = int(job.rpartition("x")[2]) if job != "train" else 0
        if mode is None:
            return ours.train(train_steps) if job == "train" else ours.decode(batch, new_tokens)
        assert other is not None
        if job == "train":
            return other.ask({"do": "train", "mode": mode, "steps": train_steps})
        return other.ask({"do": "decode", "mode": mode, "batch": batch,
                          "new_tokens": new_tokens})

    table = Table("job", f"{OURS} tokens/s", "peer tokens/s", "peer's mode", "ratio",
                  title=f"{model}, {zoo.protocol.num_params(ours.model) / 1e6:.1f}M parameters, "
                        f"float32, median of {rounds} interleaved rounds")
    results: dict[str, Any] = {}
    for job, count in jobs.items():
        sides = {OURS: functools.partial(measure, job, None),
                 **{mode: functools.partial(measure, job, mode) for mode in modes[job]}}
        seconds = in_turns(sides, rounds)
        speed = {side: count / statistics.median(times) for side, times in seconds.items()}
        best = max(modes[job], key=lambda side: speed[side], default=None)
        results[job] = {
            OURS: speed[OURS],
            "peer": {side: speed[side] for side in modes[job]},
            "ratio": speed[OURS] / speed[best] if best else None,
            "seconds": seconds,
        }
        table.add_row(job, f"{speed[OURS]:.1f}", f"{speed[best]:.1f}" if best else "-",
                      best or "-", f"{results[job]['ratio']:.2f}" if best else "-")
    console.print(table)
    if other is not None:
        other.close()
    return {"suite": "lm", "model": model, "peer": peer, "rounds": rounds,
            "batch_size": batch_size, "seq_len": seq_len, "new_tokens": new_tokens,
            "results": results}
