"""Compiles one sharded training step for described machines and prints their reports as JSON.

Run in a process of its own: ``python train_step.py v5e:2x2=fsdp:4 h200:8=fsdp:4,tensor:2``.
"""

import json
import re
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.report import analyse, gpu_architectures
from sharding.topology import describe

WIDTH, HIDDEN, LAYERS, ROWS = 512, 2048, 12, 256  # rows a device
PARAMETERS = 2 * LAYERS * WIDTH * HIDDEN


def lower(mesh):
    """Lowers SGD with momentum on a stack of scanned, rematerialised MLP blocks."""
    up, down = P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")
    weights = {
        "up": ((LAYERS, WIDTH, HIDDEN), NamedSharding(mesh, up)),
        "down": ((LAYERS, HIDDEN, WIDTH), NamedSharding(mesh, down)),
    }
    layout = {name: sharding for name, (_, sharding) in weights.items()}
    rows = NamedSharding(mesh, P("fsdp"))

    def loss(params, x):
        @jax.checkpoint
        def block(x, w):
            h = jax.nn.silu(x @ w["up"].astype(jnp.bfloat16)) @ w["down"].astype(jnp.bfloat16)
            return jax.lax.with_sharding_constraint(x + h, rows), None
        return jnp.mean(jax.lax.scan(block, x, params)[0].astype(jnp.float32) ** 2)

    def step(params, momentum, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        return jax.tree.map(lambda w, m: w - 0.1 * m, params, momentum), momentum, value

    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
              for name, (shape, sharding) in weights.items()}
    x = jax.ShapeDtypeStruct((ROWS * mesh.shape["fsdp"], WIDTH), jnp.bfloat16, sharding=rows)
    jitted = jax.jit(step, donate_argnums=(0, 1),
                     out_shardings=(layout, layout, NamedSharding(mesh, P())))
    return jitted.lower(params, params, x)


def granted_hbm(topology) -> float | None:
    """GiB that the TPU compiler grants a program: it says so when one needs more."""
    mesh = topology.mesh("data:-1")
    x = jax.ShapeDtypeStruct((1 << 38,), jnp.float32, sharding=NamedSharding(mesh, P()))
    try:
        jax.jit(lambda x: x + 1).lower(x).compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"available HBM \(([\d.]+)G\)|of ([\d.]+)G hbm", str(error))
        return float(found[1] or found[2]) if found else None
    return None


def main(arguments: list[str]) -> None:
    for argument in arguments:
        name, _, spec = argument.partition("=")
        topology = describe(name)
        mesh = topology.mesh(spec)
        start = time.perf_counter()
        compiled = lower(mesh).compile()
        seconds = time.perf_counter() - start
        flops = 8 * PARAMETERS * ROWS * mesh.shape["fsdp"]  # the forward pass runs twice
        report = analyse(compiled, mesh, topology, flops=flops).as_dict()
        report["compile_seconds"] = seconds
        report["kind"] = mesh.devices.flat[0].device_kind
        if topology.platform == "gpu":
            report["architectures"] = sorted(gpu_architectures(compiled))
        else:
            report["granted_gib"] = granted_hbm(topology)
        print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
