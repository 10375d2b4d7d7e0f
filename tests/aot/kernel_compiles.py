"""Compiles kernels for one described machine, and prints what came out, a JSON line a case.

``python kernel_compiles.py v5p:2x2x1 data:2,tensor:2 [op...]``: every compiled case by each of
this project's own kernels and by what is chosen, in a step like a training step's: jitted, on
sharded operands, under remat and grad. One case an op also under vmap.
"""

import json
import re
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

import pallas_kernels
import sharding
from pallas_kernels import Target, cases
from sharding.report import gpu_architectures
from sharding.topology import describe

RULES = sharding.Rules(batch="data", heads="tensor", kv_heads="tensor", vocab="tensor")


def placed(dims, operands, mesh):
    """The operands with the shardings that `sharding.local` wants."""
    return [x if x is None else jax.ShapeDtypeStruct(
                x.shape, x.dtype,
                sharding=NamedSharding(mesh, RULES.spec(*axes, mesh=mesh, shape=x.shape)))
            for x, axes in zip(operands, dims.operands, strict=False)]


def step(op, case, implementation, mapped=False):
    """(values, gradients) of a remat-ed call."""
    def call(*operands):
        return sharding.local(op, *operands, implementation=implementation,
                              dims=case.dims, **case.options)

    def loss(operands):
        out = jax.checkpoint(call)(*operands)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(out)), out

    def run(*operands):
        full = list(operands)
        chosen = [full[i] for i in case.differentiable]

        def of(chosen):
            for i, x in zip(case.differentiable, chosen, strict=True):
                full[i] = x
            return loss(full)

        return jax.value_and_grad(of, has_aux=True)(chosen)

    return jax.vmap(run, in_axes=[0 if i in case.differentiable else None for i in
                                  range(len(op.dims.operands))]) if mapped else run


def compile_case(op, case, implementation, mesh, platform, mapped=False):
    operands = placed(case.dims or op.dims, op.bind(*case.avals(jnp.bfloat16), **case.options)[0],
                      mesh)
    if mapped:
        operands = [x if i not in case.differentiable else jax.ShapeDtypeStruct(
            (2, *x.shape), x.dtype) for i, x in enumerate(operands)]
    started = time.perf_counter()
    compiled = jax.jit(step(op, case, implementation, mapped)).lower(*operands).compile()
    text = compiled.as_text()
    calls = re.findall(r'custom_call_target="([^"]+)"', text)
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "kernels": sum(c in ("tpu_custom_call", "mosaic_gpu_v2") for c in calls),
        "calls": sorted(set(calls)),
        "architectures": sorted(gpu_architectures(compiled)) if platform == "gpu" else [],
        "temporaries": compiled.memory_analysis().temp_size_in_bytes}


def main(name, mesh_name, *ops):
    topology = describe(name)
    mesh = topology.mesh(mesh_name)
    own = topology.platform
    with sharding.use(mesh, RULES):
        target = Target.ambient()
        assert target.platform == own, target
        for op_name, op in pallas_kernels.ops().items():
            if ops and op_name not in ops:
                continue
            mapped = True
            for case in cases.of(op):
                if not case.compiled:
                    continue
                bound, options = op.bind(*case.avals(jnp.bfloat16), **case.options)
                candidates = op.candidates(target, *bound, **options)
                served = [c.name for c in candidates if c.reason is None]
                for implementation in sorted({own, served[0]} & set(served)):
                    result = {"op": op_name, "case": case.name, "implementation": implementation}
                    try:
                        result |= compile_case(op, case, implementation, mesh, own)
                        if mapped and implementation == own:
                            one = compile_case(op, case, implementation, mesh, own, mapped=True)
                            result["vmap_kernels"], mapped = one["kernels"], False
                    except Exception as error:
                        result["error"] = f"{type(error).__name__}: {error}"[:500]
                    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
