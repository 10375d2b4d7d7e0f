"""Linear maps and embeddings: shapes, initial scales, layouts, values outside the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sharding
from layers.embed import Embedding
from layers.linear import Linear, fan_in_normal, filled_up
from tests.tiny import MESH
from tests.tolerances import assert_close
from zoo import protocol

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("expression", "shape", "axes", "out", "inputs", "bias"),
    [
        ("btd,df->btf", (4, 6), ("embed", "mlp"), ("batch", "seq", "mlp"), 4, (6,)),
        ("btd,dhk->bthk", (4, 2, 6), ("embed", "heads", "head_dim"),
         ("batch", "seq", "heads", "head_dim"), 4, (2, 6)),
        ("bthv,hvd->btd", (2, 6, 4), ("heads", "head_dim", "embed"), ("batch", "seq", "embed"), 12,
         (4,)),
    ],
)
def test_linear(expression, shape, axes, out, inputs, bias):
    layer = Linear(expression, shape, axes, out, bias=True, gain=0.5, key=KEY)
    assert layer.bias.shape == bias
    assert not layer.bias[...].any()
    assert protocol.axes(layer)["kernel"] == axes
    assert protocol.axes(layer)["bias"] == tuple(a for a in axes if a in out[2:])
    x = jax.random.normal(KEY, (2, 3, *shape[: expression.partition(",")[0].count("h") + 1]))
    layer.bias[...] += 1.5
    assert_close(layer(x), jnp.einsum(expression, x, layer.kernel[...]) + 1.5)
    wide = Linear("btd,df->btf", (inputs * 50, 300), ("embed", "mlp"), ("batch", "seq", "mlp"),
                  gain=0.5, key=KEY)
    assert wide.bias is None
    deviation = 0.5 * (inputs * 50) ** -0.5
    assert np.asarray(wide.kernel[...]).std() == pytest.approx(deviation, rel=0.03)


def test_linear_dtype():
    layer = Linear("btd,df->btf", (4, 6), ("embed", "mlp"), ("batch", "seq", "mlp"), bias=True,
                   key=KEY, dtype=jnp.bfloat16)
    assert layer.kernel[...].dtype == layer.bias[...].dtype == jnp.bfloat16
    assert layer(jnp.ones((1, 2, 4), jnp.bfloat16)).dtype == jnp.bfloat16


def test_embedding():
    layer = Embedding(300, 200, deviation=0.1, key=KEY)
    table = np.asarray(layer.table[...])
    assert table.std() == pytest.approx(0.1, rel=0.02)
    ids = np.array([[0, 299, 5], [300, -1, 7]])
    assert_close(layer(jnp.asarray(ids)), table[np.clip(ids, 0, 299)], tol=0)
    assert protocol.axes(layer) == {"table": ("vocab", "embed")}
    assert protocol.axes(Embedding(3, 4, axis=None, deviation=1.0, key=KEY)) == {
        "table": (None, "embed")}


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("size", [6, 7], ids=["even", "odd"])
def test_embedding_on_eight_devices(explicit, size):
    layer = Embedding(size, 4, deviation=1.0, key=KEY)
    definition, params = protocol.split(layer)
    ids = jnp.array([[0, 5, 3], [1, 1, 9], [-2, 0, 2], [4, 4, 4]])

    def loss(params):
        return jnp.sum(jnp.sin(protocol.merge(definition, params)(ids)))

    expected = jax.jit(jax.value_and_grad(loss))(params)
    mesh, rules = sharding.mesh(MESH, explicit=explicit), sharding.rules("fsdp_tp")
    with sharding.use(mesh, rules):
        layout = protocol.shardings(mesh, rules, protocol.axes(layer), params)
        actual = jax.jit(jax.value_and_grad(loss))(jax.device_put(params, layout))
    assert_close(actual, expected)


def test_what_fills_a_table_up_is_zero():
    """And the rows before it do not depend on it."""
    plain = Embedding(5, 3, deviation=1.0, key=KEY).table[...]
    filled = Embedding(5, 3, deviation=1.0, fill=3, key=KEY, dtype=jnp.bfloat16).table[...]
    assert filled.shape == (8, 3) and filled.dtype == jnp.bfloat16
    assert not filled[5:].any()
    assert (filled[:5] == plain.astype(jnp.bfloat16)).all()
    head = filled_up(fan_in_normal(4), 1, 2)(KEY, (4, 6))
    assert (head == jnp.pad(fan_in_normal(4)(KEY, (4, 4)), ((0, 0), (0, 2)))).all()
