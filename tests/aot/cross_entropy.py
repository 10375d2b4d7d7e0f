"""Compiles cross-entropy for one described chip and prints what it takes as JSON.

Run in a process of its own: ``python cross_entropy.py v5p:2x2x1 xla``. The shape is that of a
16k-token step of a model with the vocabulary of Qwen 2.5 and a width of 4096.
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
import sharding
from pallas_kernels.cross_entropy import cross_entropy
from sharding.report import analyse
from sharding.topology import describe

BATCH, TIME, WIDTH, VOCAB = 4, 4096, 4096, 152_064


def main(name: str, implementation: str) -> None:
    topology = describe(name)
    mesh = sharding.mesh("", topology.devices()[:1])
    shapes = (((BATCH, TIME, WIDTH), jnp.bfloat16), ((WIDTH, VOCAB), jnp.bfloat16),
              ((BATCH, TIME), jnp.int32), ((BATCH, TIME), jnp.float32))
    operands = [jax.ShapeDtypeStruct(*s, sharding=NamedSharding(mesh, P())) for s in shapes]

    def loss(hidden, head, labels, weights):
        total, weight, metrics = sharding.local(cross_entropy, hidden, head, labels, weights,
                                                z_loss=1e-4)
        return total[0], (weight, metrics)

    with sharding.use(mesh, sharding.rules("dp")), pallas_kernels.using(
            cross_entropy=implementation):
        for kind, function in (("value", loss), ("gradient", jax.grad(loss, (0, 1), has_aux=True))):
            compiled = jax.jit(function).lower(*operands).compile()
            report = analyse(compiled, mesh, topology)
            print(json.dumps({"kind": kind, "temporaries": report.memory.temporaries,
                              "custom_calls": [[c.name, c.count] for c in report.custom_calls]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
