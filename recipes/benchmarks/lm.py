"""The lm suite: training and greedy decoding, against a peer with the same weights."""

import functools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import sharding
import zoo
from recipes.benchmarks.ours import LEARNING_RATE, Training
from recipes.benchmarks.peer import Job, Peer, compare
from recipes.tasks import lm as lm_task

PROMPT_TOKENS = 32


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
        work = lm_task.workload(config, batch_size, seq_len)
        self.train = Training(config, work.loss, _batch(config, batch_size, seq_len), work.axes)
        self.mesh, self.rules = self.train.mesh, self.train.rules
        # Decoding has weights of its own: a training step gives its buffers away.
        self.model = zoo.build(config, self.train.program.seed, self.mesh, self.rules)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        with sharding.use(self.mesh, self.rules):
            return np.asarray(self.model({"tokens": tokens}).logits)

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
    jobs = {"train": Job(batch_size * seq_len * train_steps,
                         functools.partial(ours.train, train_steps))}
    jobs |= {f"decode x{b}": Job(b * new_tokens, functools.partial(ours.decode, b, new_tokens))
             for b in decode_batches}
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
        jobs["train"].peer.update({mode: functools.partial(
            other.ask, {"do": "train", "mode": mode, "steps": train_steps})
            for mode in other.ready["train"]})
        for b in decode_batches:
            jobs[f"decode x{b}"].peer.update({mode: functools.partial(
                other.ask, {"do": "decode", "mode": mode, "batch": b, "new_tokens": new_tokens})
                for mode in other.ready["decode"]})
    results = compare(
        jobs, rounds, "tokens", f"{model}, {zoo.protocol.num_params(ours.model) / 1e6:.1f}M "
        f"parameters, float32, median of {rounds} interleaved rounds", console)
    if other is not None:
        other.close()
    return {"suite": "lm", "model": model, "peer": peer, "rounds": rounds,
            "batch_size": batch_size, "seq_len": seq_len, "new_tokens": new_tokens,
            "results": results}
