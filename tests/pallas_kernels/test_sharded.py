"""Every op on eight devices against one: values, and gradients of replicated and sharded operands.

A gradient of a replicated operand that is not summed over the devices, or is summed twice, is
silently wrong; so every op's first core case is run under each of its axes sharded alone, all of
them, and none, its other ones under all (--run-slow: each under each), and some under their TPU
kernels (cross-entropy's are in test_cross_entropy.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
import sharding
from pallas_kernels import cases, dispatch
from tests.pallas_kernels import toy  # noqa: F401, an op that somebody else adds
from tests.tiny import MESH
from tests.tolerances import assert_close

MESH_AXES = {"batch": ("data", "fsdp")}


def layouts(op, case):
    """Name -> which of the op's axes are sharded; those of which a size is odd stay whole."""
    dims, sizes = case.dims or op.dims, {}
    for axes, x in zip(dims.operands, case.avals(np.float32), strict=False):
        for axis, size in zip(axes, () if x is None else x.shape, strict=False):
            sizes.setdefault(axis, set()).add(size)
    together = {}
    for one, other in dims.aligned:
        together[one], together[other] = (one, other), (one, other)
    groups = {together.get(axis, (axis,)) for axis in dims.shardable}
    groups = sorted(group for group in groups if group == ("batch",) or all(
        size % 2 == 0 for axis in group for size in sizes.get(axis, ())))
    named = {"+".join(group): group for group in groups}
    return {"none": (), **named, "all": tuple(axis for group in groups for axis in group)}


def _all():
    for name, op in pallas_kernels.ops().items():
        seen = set()
        for case in cases.of(op):
            if case.core:
                for layout, axes in layouts(op, case).items():
                    again = layout in seen and layout != "all"
                    seen.add(layout)
                    yield pytest.param(op, case, axes, id=f"{name}-{case.name}-{layout}",
                                       marks=[pytest.mark.slow] if again else [])


def batched(case, operands, op):
    """The operands with a batch of 4: the case's rows again and again."""
    axes = (case.dims or op.dims).operands
    return [x if x is None else jnp.concatenate([jnp.asarray(x)] * 4, axes[i].index("batch"))
            if "batch" in axes[i] else jnp.asarray(x) for i, x in enumerate(operands)]


def results(run, operands, differentiable):
    def loss(chosen):
        full = list(operands)
        for i, x in zip(differentiable, chosen, strict=True):
            full[i] = x
        out = [y.astype(jnp.float32) for y in jax.tree.leaves(run(*full))]
        # A loss is one element a shard, of which a square would not be the sum of squares.
        return sum(jnp.sum(y if y.ndim == 1 else y * y) for y in out), out

    chosen = [operands[i] for i in differentiable]
    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(chosen)
    return {"sums": [jnp.sum(y) for y in out], "gradients": gradients}


@pytest.mark.parametrize(("op", "case", "axes"), list(_all()))
def test_eight_devices_equal_one(op, case, axes):
    operands = batched(case, op.bind(*case.operands(np.float32), **case.options)[0], op)

    def run(*operands):
        return sharding.local(op, *operands, dims=case.dims, **case.options)

    one = results(run, operands, case.differentiable)
    fields = dict.fromkeys(sharding.Rules.__dataclass_fields__)
    fields |= {axis: MESH_AXES.get(axis, "tensor") for axis in axes}
    with sharding.use(sharding.mesh(MESH), sharding.Rules(**fields)):
        eight = results(run, operands, case.differentiable)
    assert_close(eight, one, 2e-5)


@pytest.mark.parametrize(("name", "case", "layout"), [
    ("attention", "causal-64", "none"), ("attention", "causal-64", "all"),
    ("rms_norm", "residual-bias-64-heads", "all")])
def test_kernels_on_four_devices_equal_one(name, case, layout):
    op = dispatch.find(name)
    case = next(c for c in cases.of(op) if c.name == case)
    operands = batched(case, op.bind(*case.operands(np.float32), **case.options)[0], op)

    def run(*operands):
        return sharding.local(op, *operands, dims=case.dims, **case.options)

    one = results(run, operands, case.differentiable)
    fields = dict.fromkeys(sharding.Rules.__dataclass_fields__)
    fields |= {axis: {"batch": "data"}.get(axis, "tensor") for axis in layouts(op, case)[layout]}
    mesh = sharding.mesh("data:2,tensor:2", jax.devices()[:4])
    with (pallas_kernels.interpret("v5p"), pallas_kernels.using(**{name: "tpu"}),
          sharding.use(mesh, sharding.Rules(**fields))):
        four = results(run, operands, case.differentiable)
    assert_close(four, one, 2e-5)
