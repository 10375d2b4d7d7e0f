"""What each process of a job runs in test_processes.py: its port, its size, which one, a corpus.

Prints a digest of the first batches, put together from what the processes placed.
"""

import functools
import hashlib
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

import sharding
from recipes import feed, processes
from recipes.tasks.lm import LanguageModel
from tests import tiny

port, count, index, corpus = sys.argv[1:]
if int(count) > 1:
    processes.join(f"localhost:{port}", int(count), int(index))
mesh = sharding.mesh("data:-1")
layout = jax.sharding.NamedSharding(mesh, sharding.rules("dp").spec("batch", "seq", mesh=mesh))
config = tiny.config("llama-60m", vocab_size=264)
task = LanguageModel(config, data=corpus, seq_len=16, batch_size=8, heldout=0.2, seed=3)
read: list[int] = []


def make(step, rows):
    read.extend(rows.tolist())
    return task.batch(step, rows)


digest = hashlib.sha256()
for step in range(4):
    batch = feed.place(functools.partial(make, step), 8, layout)
    whole = multihost_utils.process_allgather(batch, tiled=True)
    expected = task.batch(step, np.arange(8))
    for name in sorted(whole):
        assert np.array_equal(whole[name], expected[name])
        digest.update(np.ascontiguousarray(whole[name]).tobytes())
assert len(read) == 4 * 8 // int(count)  # Each process makes its own rows alone.
print(digest.hexdigest())
