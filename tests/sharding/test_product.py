"""The product of an activation and a parameter: values and gradients in each of its forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from sharding.product import product

EXPRESSIONS = {
    "btd,dhk->bthk": ((512,), (4, 48)),
    "bthk,hkd->btd": ((8, 32), (272,)),
    "btd,df->btf": ((260,), (260,)),
}


def _operands(expression, batch, dtype=np.float32):
    summed, outputs = EXPRESSIONS[expression]
    rng = np.random.default_rng(0)
    return (rng.normal(size=(*batch, *summed)).astype(dtype),
            rng.normal(size=(*summed, *outputs)).astype(dtype))


def _chooses(expression, x, w, whole=True, **options):
    text = str(jax.make_jaxpr(lambda x, w: product(expression, x, w, whole=whole, **options))(x, w))
    return "platform_index" in text


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("batch", [(1, 1), (4, 1), (2, 2), (5, 1), (0, 1)])
def test_equals_einsum(expression, batch):
    x, w = _operands(expression, batch)
    y = jax.jit(lambda x, w: product(expression, x, w, whole=True))(x, w)
    expected = np.einsum(expression, x.astype(np.float64), w.astype(np.float64))
    assert y.shape == expected.shape and y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_gradients_equal_those_of_einsum(expression):
    x, w = _operands(expression, (2, 1))
    cotangent = np.cos(np.arange(np.einsum(expression, x, w).size, dtype=np.float32))

    def loss(multiply):
        return jax.grad(lambda x, w: jnp.vdot(multiply(x, w).ravel(), cotangent), (0, 1))

    found = loss(lambda x, w: product(expression, x, w, whole=True))(x, w)
    expected = loss(lambda x, w: jnp.einsum(expression, x, w, precision="highest"))(x, w)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def test_rows_one_by_one_only_where_few_rows_meet_a_whole_float32_matrix():
    expression = "btd,dhk->bthk"
    x, w = _operands(expression, (4, 1))
    assert _chooses(expression, x, w)
    assert not _chooses(expression, x, w, whole=False)
    assert not _chooses(expression, x, w, preferred_element_type=jnp.bfloat16)
    assert not _chooses(expression, *_operands(expression, (5, 1)))
    assert not _chooses(expression, *_operands(expression, (1, 1), jnp.bfloat16))
    assert not _chooses(expression, x, w[:, :, :16])  # A small matrix.
    assert not _chooses(expression, x[..., :510], w[:510])  # Sums that have no four parts.


def test_other_einsums_stay_what_they_are():
    """A head's own matrix, and a sum over dimensions that are not next to each other."""
    rng = np.random.default_rng(0)
    for expression, x, w in (("bthd,hdk->bthk", (1, 1, 4, 128), (4, 128, 128)),
                             ("btd,kd->btk", (1, 1, 256), (256, 256)),
                             ("bdt,dk->btk", (1, 256, 1), (256, 256))):
        x, w = rng.normal(size=x).astype(np.float32), rng.normal(size=w).astype(np.float32)
        assert not _chooses(expression, x, w)
        y = product(expression, x, w, whole=True)
        np.testing.assert_allclose(y, np.einsum(expression, x, w), rtol=0, atol=1e-4)


def test_a_symbolic_batch_can_be_exported():
    expression = "btd,dhk->bthk"
    x, w = _operands(expression, (3, 1))
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("b, 1, 512"), jnp.float32)
    exported = export.export(jax.jit(lambda x: product(expression, x, w, whole=True)))(shape)
    np.testing.assert_allclose(exported.call(x), np.einsum(expression, x, w), rtol=0, atol=1e-4)


def test_a_program_for_another_platform_has_the_plain_product():
    expression = "btd,df->btf"
    x, w = _operands(expression, (1, 1))
    call = jax.jit(lambda x, w: product(expression, x, w, whole=True))
    texts = {platform: export.export(call, platforms=[platform])(x, w).mlir_module()
             for platform in ("cpu", "tpu")}
    assert "tensor<4x65x260xf32>" in texts["cpu"]
    assert "tensor<4x65x260xf32>" not in texts["tpu"]


def test_shapes_that_do_not_fit_are_told_by_einsum():
    x, w = _operands("btd,df->btf", (1, 1))
    with pytest.raises((TypeError, ValueError), match="[Ss]ize of label 'd'|contract"):
        product("btd,df->btf", x[..., :200], w, whole=True)
