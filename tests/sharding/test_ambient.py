"""The ambient mesh and rules, and the functions that read them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import sharding
from pallas_kernels.dims import Dims
from sharding import Rules, ShardingError
from tests.tiny import MESH
from tests.tolerances import assert_close

MODES = pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
AXES = ("batch", "seq", "embed")


def _op(dims):
    """Gives a function the `dims` of a per-shard op."""
    def declare(function):
        function.dims = dims
        return function

    return declare



def test_use_is_part_of_the_cache_key():
    """One jitted function under two rules is traced twice, each with its own layout."""
    traces = []

    @jax.jit
    def run(x):
        traces.append(sharding.ambient_rules())
        return sharding.constrain(x, "batch", "seq", "mlp")

    x, mesh = jnp.zeros((8, 2, 4)), sharding.mesh(MESH)
    found = {}
    for name in ("dp", "tp", "dp", "tp"):
        with sharding.use(mesh, sharding.rules(name)):
            layout = run(x).sharding.spec
        assert found.setdefault(name, layout) == layout
    assert traces == [sharding.rules("dp"), sharding.rules("tp")]
    assert tuple(found["dp"])[2:] in ((), (None,))
    assert found["tp"][2] == "tensor"


def test_rules_nest():
    assert sharding.ambient_rules() == sharding.rules("fsdp_tp")
    assert sharding.ambient_mesh() is None
    outer, inner = sharding.mesh("data:2"), sharding.mesh("tensor:4")
    with sharding.use(outer, sharding.rules("dp")):
        with sharding.use(inner):
            assert sharding.ambient_mesh().shape == inner.shape
            assert sharding.ambient_rules() == sharding.rules("fsdp_tp")
        assert sharding.ambient_mesh().shape == outer.shape
        assert sharding.ambient_rules() == sharding.rules("dp")
    assert sharding.ambient_mesh() is None


@MODES
def test_constrain(explicit):
    x = np.arange(8 * 2 * 4, dtype=np.float32).reshape(8, 2, 4)
    with sharding.use(sharding.mesh(MESH, explicit=explicit), sharding.rules("fsdp_tp")):
        y = jax.jit(lambda x: sharding.constrain(x, "batch", "seq", "mlp"))(x)
        narrow = jax.jit(lambda x: sharding.constrain(x, *AXES))(x)
        odd = jax.jit(lambda x: sharding.constrain(x, *AXES))(x[:3])
    assert_close(y, x, tol=0)
    assert y.sharding.is_equivalent_to(
        jax.NamedSharding(y.sharding.mesh, P(("data", "fsdp"), None, "tensor")), 3)
    # The batch has fsdp, so the width is whole. A batch of three cannot be cut.
    assert narrow.addressable_shards[0].data.shape == (2, 2, 4)
    assert odd.addressable_shards[0].data.shape[0] == 3


def test_constrain_without_a_mesh_is_nothing():
    x = jnp.zeros((2, 3))
    assert sharding.constrain(x, "batch", "seq") is x
    with sharding.use(sharding.mesh("data:1")):
        assert sharding.constrain(x, "batch", "seq") is x


def test_constrain_refuses():
    with pytest.raises(ShardingError, match=r"2 logical axes .* array of shape \(2, 3, 4\)"):
        sharding.constrain(jnp.zeros((2, 3, 4)), "batch", "seq")
    with sharding.use(sharding.mesh(MESH)):
        with pytest.raises(AttributeError, match="sequence"):
            sharding.constrain(jnp.zeros((2, 3)), "batch", "sequence")
        with pytest.raises(ShardingError, match="mlp of size 3 does not divide"):
            sharding.constrain(jnp.zeros((2, 3)), "batch", "mlp")


def test_ensure_mesh():
    """The mesh of the arrays at hand, else of the first device, where none is ambient."""
    mesh = sharding.mesh("tensor:4")
    arrays = {"x": jax.device_put(np.zeros(4), jax.NamedSharding(mesh, P("tensor")))}
    with sharding.ensure_mesh(arrays):
        assert sharding.ambient_mesh().shape == {"tensor": 4}
    with sharding.ensure_mesh({"x": np.zeros(4)}):
        assert jax.sharding.get_abstract_mesh().size == 1
    with sharding.use(sharding.mesh("data:2,tensor:2")), sharding.ensure_mesh(arrays):
        assert sharding.ambient_mesh().shape == {"data": 2, "tensor": 2}
    with (
        sharding.use(sharding.mesh("data:2")),
        pytest.raises(ShardingError, match="live on the mesh {'tensor': 4}, .* {'data': 2}"),
        sharding.ensure_mesh(arrays),
    ):
        pass
    assert jax.sharding.get_abstract_mesh().empty


def test_param():
    init = sharding.param(jax.nn.initializers.ones, "embed", None)
    assert init.axes == ("embed", None)
    assert init(jax.random.key(0), (2, 3)).shape == (2, 3)
    with pytest.raises(ShardingError, match="'embd' is not a field of Rules"):
        sharding.param(jax.nn.initializers.ones, "embd")
    with pytest.raises(ShardingError, match=r"\('embed', None\) for a parameter of shape \(2,\)"):
        init(jax.random.key(0), (2,))


@MODES
@pytest.mark.parametrize("preset", ["dp", "fsdp", "tp", "fsdp_tp"])
def test_einsum(explicit, preset):
    """Values, layouts and gradients of a column-parallel and a row-parallel product."""
    rng = np.random.default_rng(0)
    x, up, down = (rng.normal(size=s).astype(np.float32) for s in ((8, 3, 4), (4, 6), (6, 4)))

    def run(weights, x):
        hidden = sharding.einsum("btd,df->btf", x, weights[0], weight=("embed", "mlp"),
                                 out=("batch", "seq", "mlp"))
        y = sharding.einsum("btf,fd->btd", jnp.tanh(hidden), weights[1], weight=("mlp", "embed"),
                            out=AXES)
        return jnp.sum(y**2), y

    step = functools.partial(jax.value_and_grad(run, has_aux=True))
    (loss, y), gradients = jax.jit(step)((up, down), x)
    mesh, rules = sharding.mesh(MESH, explicit=explicit), sharding.rules(preset)
    with sharding.use(mesh, rules):
        weights = tuple(
            jax.device_put(w, rules.sharding(mesh, axes, w.shape))
            for w, axes in ((up, ("embed", "mlp")), (down, ("mlp", "embed"))))
        (sharded_loss, sharded_y), sharded_gradients = jax.jit(step)(
            weights, jax.device_put(x, jax.NamedSharding(mesh, sharding.spec(*AXES))))
    assert sharded_y.addressable_shards[0].data.shape == (2, 3, 4)
    assert_close(
        (sharded_loss, sharded_y, sharded_gradients), (loss, y, gradients))


@MODES
def test_first(explicit):
    """Of shards that the new size does not divide into."""
    x = np.arange(4 * 2 * 12, dtype=np.float32).reshape(4, 2, 12)
    axes = ("batch", "seq", "vocab")

    def run(x):
        return sharding.first(sharding.constrain(x, *axes), 11, *axes)

    assert_close(jax.jit(run)(x), x[..., :11], tol=0)
    mesh = sharding.mesh(MESH, explicit=explicit)
    with sharding.use(mesh, sharding.rules("fsdp_tp")):
        layout = jax.NamedSharding(mesh, sharding.spec("batch", "seq", None))
        found = jax.jit(run)(jax.device_put(x, layout))
    assert_close(found, x[..., :11], tol=0)
    assert found.addressable_shards[0].data.shape[0] == 1


@MODES
def test_lookup(explicit):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(6, 4)).astype(np.float32)
    ids = np.array([[0, 5, 3], [1, 1, 9], [-2, 0, 2], [4, 4, 4]], np.int32)
    rules = sharding.rules("fsdp_tp")

    def run(table, ids):
        return jnp.sum(sharding.lookup(table, ids, *AXES) ** 2), sharding.lookup(table, ids, *AXES)

    step = jax.jit(jax.grad(run, has_aux=True))
    clipped = table[np.clip(ids, 0, 5)]
    expected = np.zeros_like(table)
    np.add.at(expected, np.clip(ids, 0, 5), 2 * clipped)
    assert_close(step(table, ids), (expected, clipped))
    mesh = sharding.mesh(MESH, explicit=explicit)
    with sharding.use(mesh, rules):
        sharded = step(
            jax.device_put(table, rules.sharding(mesh, ("vocab", "embed"), table.shape)), ids)
    assert sharded[1].addressable_shards[0].data.shape == (1, 3, 4)
    assert_close(sharded, (expected, clipped))


@_op(Dims(operands=(("batch", "mlp"), (None, "mlp"), ("batch",)), results={"y": ("batch", "mlp")},
         shardable=frozenset({"batch", "mlp"})))
def scale_rows(x, w, offset, *, factor):
    """An op without communication: [B, F] * [1, F] * factor + [B]."""
    y = factor * x * w
    return {"y": y if offset is None else y + offset[:, None]}


@_op(Dims(operands=(("batch", "mlp"),), results=("batch",), shardable=frozenset({"batch", "mlp"}),
         communicates={"mlp": "axis"}))
def row_sums(x, *, axis=None):
    """An op that adds over the shards of its second dimension."""
    total = jnp.sum(x, axis=1)
    return total if axis is None else jax.lax.psum(total, axis)


@MODES
@pytest.mark.parametrize("rules", [
    Rules(batch=None), Rules(batch=None, mlp="tensor"), Rules(), Rules(mlp="tensor"),
    Rules(batch="data", mlp=("fsdp", "tensor")),
], ids=["whole", "mlp", "batch", "both", "two axes"])
def test_local(explicit, rules):
    """Gradients of operands that are whole on every device are summed, once."""
    rng = np.random.default_rng(0)
    x, w, offset = (rng.normal(size=s).astype(np.float32) for s in ((4, 8), (1, 8), (4,)))

    def run(x, w, offset):
        y = sharding.local(scale_rows, x, w, offset, factor=2.0)["y"]
        return jnp.sum(jnp.sin(y)) + jnp.sum(sharding.local(row_sums, y) ** 2)

    step = jax.jit(jax.value_and_grad(run, (0, 1, 2)))
    expected = step(x, w, offset)
    with sharding.use(sharding.mesh(MESH, explicit=explicit), rules):
        assert_close(step(x, w, offset), expected)


def test_local_operand_left_out_and_rules_given():
    x, w = jnp.ones((4, 8)), jnp.ones((1, 8))
    with sharding.use(sharding.mesh(MESH), sharding.rules("dp")):
        y = sharding.local(scale_rows, x, w, None, factor=3.0, rules=Rules(mlp="tensor"))["y"]
    assert_close(y, 3.0 * np.ones((4, 8)))
    assert y.addressable_shards[0].data.shape == (1, 4)


def test_local_batch_that_does_not_divide():
    x = jnp.arange(24.0).reshape(3, 8)
    with sharding.use(sharding.mesh(MESH), Rules(mlp="tensor")):
        assert_close(sharding.local(row_sums, x), jnp.sum(x, axis=1))


def test_local_refuses():
    @_op(Dims(operands=(("batch", "embed"), ("batch", "mlp")), results=("batch",),
             shardable=frozenset({"batch", "mlp", "heads"}), aligned=(("heads", "mlp"),)))
    def rows(x, y):
        return x[:, 0] + y[:, 0]

    x = jnp.ones((8, 4))
    with sharding.use(sharding.mesh(MESH), Rules(embed="tensor")):
        with pytest.raises(ShardingError, match=r"rows cannot be sharded over 'embed'.*\['batch'"):
            sharding.local(rows, x, x)
        with pytest.raises(ShardingError, match="rows needs 'heads' and 'mlp' over the same mesh"):
            sharding.local(rows, x, x, rules=Rules(mlp="tensor"))
        with pytest.raises(ShardingError, match="mlp of size 3 does not divide"):
            sharding.local(rows, x, x[:, :3], rules=Rules(mlp="tensor", heads="tensor"))
        with pytest.raises(TypeError, match="rows takes 2 operands, not 3"):
            sharding.local(rows, x, x, x)


def test_shards():
    assert sharding.shards("heads") == 1
    with sharding.use(sharding.mesh(MESH), sharding.rules("fsdp_tp")):
        assert sharding.shards("heads") == 2
        assert sharding.shards("batch") == 4
        assert sharding.shards("layers") == 1
