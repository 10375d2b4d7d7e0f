"""Every op by every implementation against its float64 definition, values and gradients.

The kernels of TPUs and GPUs run in Pallas' interpreters here.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import cases
from tests.pallas_kernels import toy  # noqa: F401, an op that somebody else adds
from tests.tolerances import assert_close

# Where each platform's own kernels are interpreted.
CHIPS = {"tpu": "v5p", "gpu": "h200"}
GPU_INTERPRETER = jax.__version_info__ >= (0, 12)


def _all():
    for name, op in pallas_kernels.ops().items():
        kernels = [n for n in op.names if n == "xla" or n in CHIPS]
        for implementation in kernels:
            for case in cases.of(op):
                if case.compiled:
                    continue
                for dtype in case.tolerance:
                    marks = [] if case.core else [pytest.mark.slow]
                    if implementation == "gpu" and not GPU_INTERPRETER:
                        marks.append(pytest.mark.skip("this jax has no public GPU interpreter"))
                    yield pytest.param(op, implementation, case, dtype, marks=marks,
                                       id=f"{name}-{implementation}-{case.name}-{dtype}")


def results(function, operands, differentiable, dtype):
    """Results of `function`, and the gradients of their product with fixed random cotangents."""
    operands = [None if x is None else jnp.asarray(x) for x in operands]
    chosen = [operands[i] for i in differentiable]

    def run(*chosen):
        full = list(operands)
        for i, x in zip(differentiable, chosen, strict=True):
            full[i] = x
        return function(*full)

    shapes = jax.tree.leaves(jax.eval_shape(run, *chosen))
    rng = np.random.default_rng(1)
    cotangents = [jnp.asarray(rng.normal(size=x.shape).astype(dtype).astype(x.dtype))
                  for x in shapes]

    def loss(*chosen):
        out = run(*chosen)
        return sum(jnp.sum(x * c) for x, c in zip(jax.tree.leaves(out), cotangents,
                                                  strict=True)), out

    both = jax.jit(jax.grad(loss, tuple(range(len(chosen))), has_aux=True))
    gradients, out = both(*chosen)
    return jax.device_get(out), jax.device_get(gradients)


def expected(op, case, operands, dtype):
    """The float64 definition on the same rounded operands."""
    wide = [x if x is None or not jnp.issubdtype(x.dtype, jnp.floating)
            else np.asarray(x, np.float64) for x in operands]
    definition = getattr(op.module("reference"), op.__name__)
    with jax.enable_x64(True):
        return results(lambda *x: definition(*x, **case.options), wide, case.differentiable, dtype)


@pytest.mark.parametrize(("op", "implementation", "case", "dtype"), list(_all()))
def test_equals_its_definition(op, implementation, case, dtype):
    context = contextlib.nullcontext()
    if implementation in CHIPS:
        context = pallas_kernels.interpret(CHIPS[implementation])
    operands = case.operands(jnp.dtype(dtype))
    with context, jax.default_matmul_precision("highest"):
        if implementation in CHIPS:
            bound, options = op.bind(*operands, **case.options)
            target = pallas_kernels.Target.ambient()
            refusal = op.module(implementation).supports(target, *bound, **options)
            if refusal is not None:
                pytest.skip(refusal)
        value, gradients = results(
            lambda *x: op(*x, implementation=implementation, **case.options), operands,
            case.differentiable, dtype)
    value0, gradients0 = expected(op, case, operands, dtype)
    tolerance = case.tolerance[dtype]
    assert_close(value, value0, tolerance[0])
    assert_close(gradients, gradients0, tolerance[1])
