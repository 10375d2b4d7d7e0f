"""RMSNorm and LayerNorm: what their cases do not reach."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
import sharding
from pallas_kernels import Target, cases
from pallas_kernels.layer_norm import layer_norm
from pallas_kernels.rms_norm import dims, rms_norm, tpu
from tests.tiny import MESH
from tests.tolerances import assert_close

OPS = pytest.mark.parametrize("op", [rms_norm, layer_norm], ids=["rms", "layer"])


def operands(*shape):
    rng = np.random.default_rng(0)
    x, residual = (jnp.asarray(0.5 + rng.normal(size=shape), jnp.float32) for _ in range(2))
    scale, bias = (jnp.asarray(rng.normal(size=shape[-1]), jnp.float32) for _ in range(2))
    return x, scale, residual, bias


def gradients(run, *operands):
    """Results of ``run(*operands) -> (y, total)`` and the gradients of a function of both."""
    def loss(*operands):
        y, total = run(*operands)
        return jnp.sum(jnp.sin(y)) + jnp.sum(total * jnp.cos(total)), (y, total)

    return jax.jit(jax.value_and_grad(loss, tuple(range(len(operands))), has_aux=True))(*operands)


@OPS
@pytest.mark.parametrize(("chip", "tiling"), [
    # Seven tiles, the last of four rows, for two cores; two tiles, one each.
    ("v5p", {"block_rows": 16}), ("v5p", {"block_rows": 64}),
    # Blocks of 34 or 33 rows.
    pytest.param("h200", {"blocks": 3}, marks=pytest.mark.skipif(
        jax.__version_info__ < (0, 12), reason="this jax has no public GPU interpreter")),
])
def test_tilings(op, chip, tiling):
    arrays = operands(2, 50, 128)
    kernel = getattr(op.module(Target.parse(chip).platform), op.__name__)
    with pallas_kernels.interpret(chip):
        actual = gradients(lambda *x: kernel(*x, eps=0.1, offset=0.0, **tiling), *arrays)
    assert_close(actual, gradients(lambda *x: op(*x, eps=0.1), *arrays))


@pytest.mark.parametrize("chip", ["cpu", "v5e"])
def test_gradients_of_bfloat16_parameters_are_summed_in_float32(chip):
    """Ones added up in bfloat16 would stop at 256."""
    rows = 4096
    x = jnp.full((1, rows, 128), 1.0, jnp.bfloat16)
    scale = jnp.ones(128, jnp.bfloat16)

    def loss(scale):
        return jnp.sum(rms_norm(x, scale, eps=1e-6).astype(jnp.float32))

    if chip == "cpu":
        actual = jax.grad(loss)(scale)
    else:
        with pallas_kernels.interpret(chip):
            actual = jax.grad(loss)(scale)
    np.testing.assert_array_equal(actual.astype(jnp.float32), rows)


@pytest.mark.parametrize("explicit", [False, True])
def test_axes_that_share_mesh_axes(explicit):
    """Where the sequence has taken the heads' mesh axis, the heads stay whole."""
    arrays = operands(8, 4, 2, 16)
    rules = sharding.Rules(seq="tensor", heads="tensor")

    def run(*arrays):
        return sharding.local(rms_norm, *arrays, dims=dims("batch", "seq", "heads"), eps=0.1)

    with sharding.use(sharding.mesh(MESH, explicit=explicit), rules):
        actual = gradients(run, *arrays)
    assert_close(actual, gradients(lambda *x: rms_norm(*x, eps=0.1), *arrays))


@OPS
def test_only_parameter_gradients_are_summed_over_devices(op):
    """Activations are whole on both devices of the tensor axis, and so are their gradients."""
    arrays = operands(8, 4, 64)
    mesh = sharding.mesh(MESH)
    rules = sharding.rules("fsdp_tp")

    def run(*arrays):
        y, total = sharding.local(op, *arrays, eps=1e-6)
        return jnp.sin(y), total

    with sharding.use(mesh, rules):
        rows = rules.sharding(mesh, ("batch", "seq", None), arrays[0].shape)
        whole = rules.sharding(mesh, (None,), arrays[1].shape)
        placed = [jax.device_put(x, rows if x.ndim == 3 else whole) for x in arrays]
        pull = jax.jit(lambda cotangents, *x: jax.vjp(run, *x)[1](cotangents))
        text = pull.lower((placed[0], placed[0]), *placed).compile().as_text()
    reduced = re.findall(r"= (.*) all-reduce\(", text)
    shapes = [shape for result in reduced for shape in re.findall(r"\w+\[([\d,]+)\]", result)]
    assert sum(math.prod(map(int, shape.split(","))) for shape in shapes) == 2 * 64, reduced


@OPS
def test_refuses(op):
    x, scale, residual, bias = operands(2, 3, 8)
    with pytest.raises(ValueError, match=r"x \(2, 3, 8\) and scale \(7,\) must be \[..., D\]"):
        op(x, scale[:7], eps=1e-6)
    with pytest.raises(ValueError, match="residual bfloat16.* must be like x, float32"):
        op(x, scale, residual.astype(jnp.bfloat16), eps=1e-6)
    with pytest.raises(ValueError, match=r"bias \(1,\) must be \(8,\)"):
        op(x, scale, None, bias[:1], eps=1e-6)
    with pytest.raises(ValueError, match=r"float32\[0, 3, 8\].*every dimension must be at least 1"):
        op(x[:0], scale, eps=1e-6)
    for eps in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="eps=.* must be positive, e.g. 1e-6"):
            op(x, scale, eps=eps)


@OPS
@pytest.mark.parametrize(("chip", "name", "dtype", "width", "reason"), [
    ("v5e", "tpu", "bfloat16", 16385, "rows of 16385 does not fit in VMEM; up to 16384 do"),
    ("v5e", "tpu", "float16", 128, "x is float16"),
    ("h200", "gpu", "float32", 8193, "rows of 8193 do not fit in registers; up to 8192 do"),
    ("h200", "gpu", "float16", 128, "x is float16"),
    ("b200", "gpu", "bfloat16", 128, "the chip is b200, and it takes h100 and h200"),
])
def test_what_kernels_refuse_goes_to_xla(op, chip, name, dtype, width, reason):
    x, scale = (jax.ShapeDtypeStruct(s, dtype) for s in ((1, 8, width), (width,)))
    candidates = op.candidates(Target.parse(chip), x, scale, None, None, eps=1e-6, offset=0.0)
    assert candidates[0].name == "xla"
    assert reason in next(c.reason for c in candidates if c.name == name)


def test_tiles_tuned_for_narrower_rows_are_cut_to_what_fits():
    """One bucket holds widths of 4097 to 8192."""
    rows = jax.ShapeDtypeStruct((1024, 8192), jnp.bfloat16)
    assert tpu._block_rows(rows, 4, 512) == tpu._block_rows(rows, 4, None) < 64
    assert tpu._block_rows(rows, 4, 32) == 32


@OPS
def test_preferences(op):
    case = next(c for c in cases.of(op) if c.name == "stream-4096")
    bound, options = op.bind(*case.operands(jnp.bfloat16), **case.options)
    chosen = {chip: op.choose(Target.parse(chip), None, *bound, **options).name
              for chip in ("cpu", "v5p", "h200")}
    assert chosen == {"cpu": "xla", "v5p": "tpu", "h200": "xla"}
