"""Costs read off compiled programs: exact on XLA:CPU, known forms of HLO text for the rest."""

import json
import struct
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.mesh import ShardingError, mesh
from sharding.report import analyse, gpu_architectures
from sharding.topology import describe


def compile_for(function, *args, **options):
    """Compiles for arguments given as (shape, sharding)."""
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a[0], jnp.float32, sharding=a[1]), args,
        is_leaf=lambda a: isinstance(a, tuple) and len(a) == 2 and isinstance(a[1], NamedSharding),
    )
    return jax.jit(function, **options).lower(*shapes).compile()


# --- Programs compiled for 8 CPU devices


def test_data_parallel_training_reduces_each_gradient_once():
    devices = mesh("data:8")
    whole, rows = NamedSharding(devices, P()), NamedSharding(devices, P("data"))
    width, hidden = 64, 96

    def step(params, x):
        def loss(params):
            return jnp.mean((jax.nn.gelu(x @ params["up"]) @ params["down"]) ** 2)
        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, grads), value

    params = {"up": ((width, hidden), whole), "down": ((hidden, width), whole)}
    compiled = compile_for(step, params, ((32, width), rows), donate_argnums=0)
    report = analyse(compiled, devices)

    param_bytes = 2 * width * hidden * 4
    reduced = [c for c in report.collectives if c.kind == "all-reduce"]
    assert report.collectives == tuple(reduced)
    assert {(c.axes, c.group_size) for c in reduced} == {(("data",), 8)}
    assert sum(c.result_bytes for c in reduced) == param_bytes + 4  # and the loss
    # A ring sends 7/8 of the array twice.
    assert report.wire_bytes("all-reduce") == pytest.approx(2 * 7 / 8 * (param_bytes + 4), abs=2)
    assert report.count("all-reduce", "data") == report.count("all-reduce") >= 1
    assert report.count("all-reduce", "tensor") == 0
    assert all(c.seconds is None for c in reduced) and report.roofline is None

    memory = report.memory
    assert memory.arguments == param_bytes + 32 // 8 * width * 4
    assert memory.aliases == param_bytes  # donated
    assert memory.outputs >= param_bytes + 4
    total = memory.arguments + memory.outputs - memory.aliases + memory.temporaries
    assert memory.total == total and memory.fits is None


@pytest.mark.parametrize("layers", [1, 5])
def test_megatron_blocks_reduce_twice_each(layers):
    devices = mesh("data:2,tensor:4")
    batch, width, hidden = 8, 32, 64
    rows = NamedSharding(devices, P("data"))
    column = NamedSharding(devices, P(None, None, "tensor"))
    row = NamedSharding(devices, P(None, "tensor", None))

    def forward(weights, x):
        def block(x, w):
            for up, down in (("qkv", "out"), ("up", "down")):
                y = jax.nn.relu(x @ w[up]) @ w[down]
                x = jax.lax.with_sharding_constraint(x + y, rows)
            return x, None
        return jax.lax.scan(block, x, weights)[0]

    weights = {name: ((layers, width, hidden), column) for name in ("qkv", "up")}
    weights |= {name: ((layers, hidden, width), row) for name in ("out", "down")}
    report = analyse(compile_for(forward, weights, ((batch, width), rows)), devices)

    (reduced,) = report.collectives
    assert (reduced.kind, reduced.axes, reduced.group_size) == ("all-reduce", ("tensor",), 4)
    assert reduced.count == 2 * layers
    size = batch // 2 * width * 4
    assert reduced.result_bytes == 2 * layers * size
    assert reduced.wire_bytes == 2 * layers * size * 2 * 3 // 4
    assert report.notes == ()


def test_fsdp_gathers_each_weight():
    devices = mesh("fsdp:8")
    rows = NamedSharding(devices, P("fsdp"))
    width, layers = 64, 3

    def forward(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    weights = ((layers, width, width), NamedSharding(devices, P(None, "fsdp", None)))
    compiled = compile_for(forward, weights, ((256, width), rows))
    report = analyse(compiled, devices)

    gathered = layers * width * width * 4
    assert report.count("all-gather", "fsdp") == layers
    assert report.wire_bytes("all-gather") == gathered * 7 // 8
    assert report.count("all-reduce") == report.count("reduce-scatter") == 0
    assert report.memory.arguments == (gathered + 256 * width * 4) // 8


def test_groups_over_several_axes_are_named():
    devices = mesh("data:2,fsdp:2,tensor:2")
    x = ((16, 16), NamedSharding(devices, P(("data", "fsdp"), "tensor")))

    def forward(x):
        def shard(x):
            total = jax.lax.psum(x, ("data", "fsdp"))
            turned = jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)])
            return total + turned + jax.lax.all_to_all(x, "data", 0, 0, tiled=True)
        return jax.shard_map(shard, mesh=devices, in_specs=P(("data", "fsdp"), "tensor"),
                             out_specs=P(("data", "fsdp"), "tensor"), check_vma=False)(x)

    report = analyse(compile_for(forward, x), devices)
    size = 4 * 8 * 4
    found = {c.kind: (c.axes, c.group_size, c.count, c.wire_bytes) for c in report.collectives}
    assert found == {
        "all-reduce": (("data", "fsdp"), 4, 1, size * 2 * 3 // 4),
        "collective-permute": (("tensor",), 2, 1, size),
        "all-to-all": (("data",), 2, 1, size // 2),
    }


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    devices = mesh("data:8")
    rows = NamedSharding(devices, P("data"))

    def halve(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x / 2, x)

    report = analyse(compile_for(halve, ((8, 8), rows)), devices)
    assert any("unknown length" in note for note in report.notes)


def test_traffic_equals_the_compilers_where_it_has_no_loops_and_scales_with_them():
    devices = mesh("data:1")
    whole = NamedSharding(devices, P())
    width, rows = 128, 64

    def forward(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights, unroll=unroll)[0]

    reports = {}
    for layers, unroll in ((6, 6), (12, 1), (24, 1)):
        compiled = compile_for(forward, ((layers, width, width), whole), ((rows, width), whole))
        reports[layers, unroll] = analyse(compiled, devices)
    unrolled, looped, longer = reports.values()
    assert unrolled.hbm_traffic_bytes == pytest.approx(
        unrolled.compiler["bytes accessed"], rel=0.01)
    # Every weight is read, and at most copied twice on the way.
    weights = 12 * width * width * 4
    assert weights < looped.hbm_traffic_bytes < 6 * weights
    # The compiler counts the body once, however long the loop.
    assert looped.compiler["bytes accessed"] == pytest.approx(
        longer.compiler["bytes accessed"], rel=0.01)
    assert longer.hbm_traffic_bytes / looped.hbm_traffic_bytes == pytest.approx(2, rel=0.01)


def test_report_is_json():
    devices = mesh("data:8")
    x = ((16, 16), NamedSharding(devices, P("data")))
    report = analyse(compile_for(lambda x: x - x.mean(), x), devices)
    again = json.loads(json.dumps(report.as_dict()))
    assert again["mesh"] == {"data": 8} and again["topology"] is None
    assert again["memory"]["total"] == report.memory.total and again["memory"]["fits"] is None
    assert again["collectives"][0]["axes"] == ["data"]


def test_the_mesh_must_be_the_topologys():
    devices = mesh("data:8")
    compiled = compile_for(lambda x: x + 1, ((8,), NamedSharding(devices, P("data"))))
    with pytest.raises(ShardingError, match="cpu devices, not of topology 'v5e:2x4'"):
        analyse(compiled, devices, describe("v5e:2x4"))


def test_an_unknown_collective_is_refused():
    devices = mesh("data:1")
    report = analyse(compile_for(lambda x: x, ((8,), NamedSharding(devices, P()))), devices)
    with pytest.raises(ValueError, match="'allreduce' is not one of all-reduce"):
        report.count("allreduce")


# --- HLO as the TPU and GPU compilers write it


class Program:
    """Stands for a compiled program of given text."""

    def __init__(self, text, costs=None):
        self.text, self.costs = text, costs

    def as_text(self):
        return self.text

    def cost_analysis(self):
        return self.costs

    def memory_analysis(self):
        names = ("argument", "output", "alias", "temp", "generated_code")
        sizes = {f"{name}_size_in_bytes": 10 ** i for i, name in enumerate(names)}
        host = {f"host_{name}_size_in_bytes": 7 for name in names}
        return SimpleNamespace(**sizes, **host, peak_memory_in_bytes=10 ** 9)


def found(text, spec="data:8"):
    """{(kind, axes, group size): (count, result bytes, wire bytes)} of a program's text."""
    report = analyse(Program(text), mesh(spec))
    return {(c.kind, c.axes, c.group_size): (c.count, c.result_bytes, c.wire_bytes)
            for c in report.collectives}


ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


@pytest.mark.parametrize(
    ("shape", "kind", "size"),
    [
        ("f32[8,100]{1,0}", "all-reduce", 3200),  # the results alone
        ("((f32[8,100]{1,0}), f32[8,100]{1,0})", "all-reduce", 3200),
        ("(f32[8,100]{1,0}, bf16[100]{0})", "all-reduce", 3400),  # two arrays at once
        ("((f32[8,100]{1,0}, bf16[100]{0}), (f32[8,100]{1,0}, bf16[100]{0}))", "all-reduce", 3400),
        ("(f32[1,100]{1,0:T(8,128)}, f32[8,100]{1,0:T(8,128)S(1)})", "all-gather", 3200),
        ("((f32[1,100]{1,0}, s4[1,2]{1,0}), (f32[8,100]{1,0}, s4[8,2]{1,0}))", "all-gather", 3208),
        ("((f32[8,100]{1,0}), f32[1,100]{1,0})", "reduce-scatter", 3200),
        ("((f32[8,100]{1,0}), f32[8,100]{1,0})", "all-to-all", 3200),
    ],
)
def test_an_asynchronous_pair_is_one_collective(shape, kind, size):
    text = ADD + f"""
ENTRY %main (p: f32[8,100]) -> f32[8,100] {{
  %p = f32[8,100]{{1,0}} parameter(0)
  %begin = {shape} {kind}-start(%p), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %end = f32[8,100]{{1,0}} {kind}-done(%begin)
}}
"""
    wire = size * 7 / 8 * (2 if kind == "all-reduce" else 1)
    assert found(text) == {(kind, ("data",), 8): (1, size, round(wire))}


def test_a_wrapped_collective_is_counted_once():
    text = """
%wrapped (q: f32[4]) -> f32[32] {
  %q = f32[4]{0} parameter(0)
  ROOT %gather = f32[32]{0} all-gather(%q), channel_id=3, replica_groups={}, dimensions={0}
}

ENTRY %main (p: f32[4]) -> f32[32] {
  %p = f32[4]{0} parameter(0)
  %begin = ((f32[4]{0}), f32[32]{0}, u32[]) async-start(%p), calls=%wrapped
  %more = ((f32[4]{0}), f32[32]{0}, u32[]) async-update(%begin), calls=%wrapped
  ROOT %end = f32[32]{0} async-done(%more), calls=%wrapped
}
"""
    assert found(text) == {("all-gather", ("data",), 8): (1, 128, 112)}


def test_nested_loops_multiply_and_their_lengths_are_derived():
    # As on TPUs: no known_trip_count. The inner bound stands in the outer loop's state; the outer
    # loop runs from 2 to 9 in steps of 3: at 2, 5 and 8.
    text = ADD + """
%inner_body (s: (s32[], f32[4], s32[])) -> (s32[], f32[4], s32[]) {
  %s = (s32[]{:T(128)}, f32[4]{0:T(128)}, s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %x = f32[4]{0:T(128)} get-tuple-element(%s), index=1
  %n = s32[] get-tuple-element(%s), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %r = f32[4]{0:T(128)} all-reduce(%x), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %out = (s32[]{:T(128)}, f32[4]{0:T(128)}, s32[]) tuple(%next, %r, %n)
}

%inner_condition (s.1: (s32[], f32[4], s32[])) -> pred[] {
  %s.1 = (s32[]{:T(128)}, f32[4]{0:T(128)}, s32[]) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %n.1 = s32[] get-tuple-element(%s.1), index=2
  ROOT %less = pred[]{:T(512)} compare(%i.1, %n.1), direction=LT
}

%outer_body (t: (s32[], f32[4], s32[])) -> (s32[], f32[4], s32[]) {
  %t = (s32[], f32[4]{0}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%t), index=0
  %y = f32[4]{0} get-tuple-element(%t), index=1
  %m = s32[] get-tuple-element(%t), index=2
  %zero = s32[] constant(0)
  %zero.1 = s32[] copy(%zero)
  %state = (s32[], f32[4]{0}, s32[]) tuple(%zero.1, %y, %m)
  %loop = (s32[], f32[4]{0}, s32[]) while(%state), condition=%inner_condition, body=%inner_body
  %z = f32[4]{0} get-tuple-element(%loop), index=1
  %three = s32[] constant(3)
  %next.1 = s32[] add(%j, %three)
  ROOT %out.1 = (s32[], f32[4]{0}, s32[]) tuple(%next.1, %z, %m)
}

%outer_condition (t.1: (s32[], f32[4], s32[])) -> pred[] {
  %t.1 = (s32[], f32[4]{0}, s32[]) parameter(0)
  %j.1 = s32[] get-tuple-element(%t.1), index=0
  %nine = s32[] constant(9)
  ROOT %less.1 = pred[] compare(%j.1, %nine), direction=LT
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %two = s32[] constant(2)
  %five = s32[] constant(5)
  %state.1 = (s32[], f32[4]{0}, s32[]) tuple(%two, %p, %five)
  %loop.1 = (s32[], f32[4]{0}, s32[]) while(%state.1), condition=%outer_condition, body=%outer_body
  ROOT %q = f32[4]{0} get-tuple-element(%loop.1), index=1
}
"""
    assert found(text) == {("all-reduce", ("data",), 8): (15, 15 * 16, 15 * 28)}
    up_to = text.replace("%nine), direction=LT", "%nine), direction=LE").replace(
        "constant(9)", "constant(11)")
    assert found(up_to)["all-reduce", ("data",), 8][0] == 20  # at 2, 5, 8 and 11
    known = text.replace("body=%outer_body", 'body=%outer_body, '
                         'backend_config={"known_trip_count":{"n":"7"}}')
    assert found(known)["all-reduce", ("data",), 8][0] == 35
    unknown = text.replace("%two = s32[] constant(2)", "%two = s32[] custom-call()")
    assert found(unknown)["all-reduce", ("data",), 8][0] == 5


def test_a_fused_reduce_scatter_is_seen():
    text = ADD + """
%all-reduce-scatter.1 (input: bf16[64,16]) -> bf16[8,16] {
  %input = bf16[64,16]{1,0} parameter(0)
  %reduced = bf16[64,16]{1,0} all-reduce(%input), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %own = bf16[8,16]{1,0} dynamic-slice(%reduced), dynamic_slice_sizes={8,16}
}

ENTRY %main (p: bf16[64,16]) -> bf16[8,16] {
  %p = bf16[64,16]{1,0} parameter(0)
  ROOT %scattered = bf16[8,16]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    assert found(text) == {("reduce-scatter", ("data",), 8): (1, 2048, 2048 * 7 // 8)}


def test_a_collective_in_steps_over_several_fusions_is_counted_once():
    # It starts before a loop that carries it on for three iterations and ends after it.
    gather = "all-gather(%w), channel_id=9, replica_groups=[1,8]<=[8], dimensions={0}"
    text = f"""
%start (w: f32[4]) -> (f32[4], f32[32]) {{
  %w = f32[4]{{0}} parameter(0)
  %g = f32[32]{{0}} {gather}
  ROOT %c = (f32[4]{{0}}, f32[32]{{0}}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%step (w.1: f32[4]) -> f32[32] {{
  %w = f32[4]{{0}} parameter(0)
  ROOT %g.1 = f32[32]{{0}} {gather}
}}

%done (w.2: f32[4]) -> f32[32] {{
  %w = f32[4]{{0}} parameter(0)
  %g.2 = f32[32]{{0}} {gather}
  ROOT %d = f32[32]{{0}} custom-call(%w, %g.2), custom_call_target="AsyncCollectiveDone"
}}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %s = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %v = f32[4]{{0}} get-tuple-element(%s), index=1
  %f = f32[32]{{0}} fusion(%v), kind=kCustom, calls=%step
  ROOT %t = (s32[], f32[4]{{0}}) tuple(%i, %v)
}}

%condition (s.1: (s32[], f32[4])) -> pred[] {{
  %s.1 = (s32[], f32[4]{{0}}) parameter(0)
  ROOT %true = pred[] constant(true)
}}

ENTRY %main (p: f32[4]) -> f32[32] {{
  %p = f32[4]{{0}} parameter(0)
  %begin = (f32[4]{{0}}, f32[32]{{0}}) fusion(%p), kind=kCustom, calls=%start
  %zero = s32[] constant(0)
  %state = (s32[], f32[4]{{0}}) tuple(%zero, %p)
  %loop = (s32[], f32[4]{{0}}) while(%state), condition=%condition, body=%body, \
backend_config={{"known_trip_count":{{"n":"3"}}}}
  %v.1 = f32[4]{{0}} get-tuple-element(%loop), index=1
  ROOT %end = f32[32]{{0}} fusion(%v.1), kind=kCustom, calls=%done
}}
"""
    assert found(text) == {("all-gather", ("data",), 8): (1, 128, 112)}
    assert analyse(Program(text), mesh("data:8")).custom_calls == ()


def test_a_collective_on_the_sparse_core_is_seen():
    text = ADD + """
%offloaded (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %r = f32[8]{0} all-reduce(%x), channel_id=2, replica_groups=[1,8]<=[8], to_apply=%add
}, execution_thread="sparsecore"

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %begin = ((), (), (s32[0]{0})) custom-call-start(), async_execution_thread="sparsecore", \
custom_call_target="x", called_computations={%offloaded}
  %more = ((f32[8]{0}), f32[8]{0}, (s32[0]{0})) custom-call-update(%begin, %p)
  ROOT %end = f32[8]{0} custom-call-done(%more)
}
"""
    assert found(text) == {("all-reduce", ("data",), 8): (1, 32, 56)}


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",), 2),
        ("{}", ("data", "fsdp", "tensor"), 8),
        ("[4,2]<=[8]", ("tensor",), 2),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",), 2),
        ("[2,4]<=[4,2]T(1,0)", ("data", "fsdp"), 4),
        ("mesh['data'=2,'fsdp'=2,'tensor'=2] {'data'}", ("data",), 2),
        ("mesh['data'=2,'fsdp'=2,'tensor'=2] {'data','tensor'}", ("data", "tensor"), 4),
        ("mesh['axis_0'=1,'axis_1'=8] {'axis_1'}", ("data", "fsdp", "tensor"), 8),
        ("mesh['a'=8] {'a':(1)2}", ("data",), 2),  # the first, middle and last factor of 8
        ("mesh['a'=8] {'a':(2)2}", ("fsdp",), 2),
        ("mesh['a'=8] {'a':(2)4}", ("fsdp", "tensor"), 4),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",), 2),
        ("mesh['a'=4,'b'=2], device_ids=(0,2,1,3,4,6,5,7) {'b'}", ("fsdp",), 2),
    ],
)
def test_replica_groups_are_mesh_axes(groups, axes, size):
    text = ADD + f"""
ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, \
use_global_device_ids=true, to_apply=%add
}}
"""
    assert list(found(text, "data:2,fsdp:2,tensor:2")) == [("all-reduce", axes, size)]


def test_permutes_are_named_by_where_data_moves():
    text = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), \
channel_id=1, source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}
  %b = f32[8]{0} collective-permute-done(%a)
  %c = f32[8]{0} collective-permute(%b), channel_id=2, source_target_pairs={{0,1},{2,3}}
  ROOT %d = f32[8]{0} collective-permute(%c), channel_id=3, source_target_pairs={{0,0},{1,1}}
}
"""
    assert found(text, "fsdp:4,tensor:2") == {
        ("collective-permute", ("fsdp",), 4): (1, 32, 32),
        ("collective-permute", ("tensor",), 2): (1, 32, 32),
    }


def test_kernels_and_library_calls_are_listed():
    text = """
%with_its_input (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %twice = f32[8]{0} add(%x.1, %x.1)
  ROOT %rms_norm.2 = f32[8]{0} custom-call(%twice), custom_call_target="tpu_custom_call"
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %mlstm_chunk.7 = f32[8]{0:T(128)S(1)} custom-call(%x), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"TUzv"}}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %mlstm_chunk.7)
}

%condition (s.1: (s32[], f32[8])) -> pred[] {
  %s.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %state = (s32[], f32[8]{0}) tuple(%zero, %p)
  %loop = (s32[], f32[8]{0}) while(%state), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"4"}}
  %z = f32[8]{0} get-tuple-element(%loop), index=1
  %y = f32[8]{0} fusion(%z), kind=kCustom, calls=%with_its_input
  %mpmd_map.3 = f32[8]{0} custom-call(%y), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(f)/shard_map/flash_attention/mpmd_map"}
  %buffer = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %out = f32[8]{0} custom-call(%mpmd_map.3, %buffer), custom_call_target="__cublas$lt$matmul"
}
"""
    calls = analyse(Program(text), mesh("data:8")).custom_calls
    assert {(c.target, c.name): c.count for c in calls} == {
        ("tpu_custom_call", "mlstm_chunk"): 4,
        ("tpu_custom_call", "rms_norm"): 1,
        ("mosaic_gpu_v2", "flash_attention"): 1,
        ("__cublas$lt$matmul", ""): 1,
    }


def test_traffic_leaves_on_chip_memory_and_slices_out():
    text = """
%slices (stack: f32[10,64], at: s32[], x: f32[64]) -> f32[64] {
  %stack = f32[10,64]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %x = f32[64]{0} parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,64]{1,0} dynamic-slice(%stack, %at, %zero), dynamic_slice_sizes={1,64}
  %flat = f32[64]{0} bitcast(%row)
  ROOT %sum = f32[64]{0} add(%flat, %x)
}

%updates (out: f32[10,64], y: f32[64], at.1: s32[]) -> f32[10,64] {
  %out = f32[10,64]{1,0} parameter(0)
  %y = f32[64]{0} parameter(1)
  %at.1 = s32[] parameter(2)
  %row.1 = f32[1,64]{1,0} bitcast(%y)
  %zero.1 = s32[] constant(0)
  ROOT %new = f32[10,64]{1,0} dynamic-update-slice(%out, %row.1, %at.1, %zero.1)
}

ENTRY %main (p: f32[10,64], i: s32[], v: f32[64]) -> f32[10,64] {
  %p = f32[10,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %v = f32[64]{0:T(128)} parameter(2)
  %begin = ((f32[10,64]{1,0}, s32[], f32[64]{0}), f32[64]{0:T(128)S(1)}, u32[]) \
fusion-start(%p, %i, %v), kind=kLoop, calls=%slices
  %fast = f32[64]{0:T(128)S(1)} fusion-done(%begin)
  ROOT %r = f32[10,64]{1,0} fusion(%p, %fast, %i), kind=kLoop, calls=%updates
}
"""
    # Reads one row, v and i; the sum stays on the chip; writes one row and reads i.
    assert analyse(Program(text), mesh("data:8")).hbm_traffic_bytes == 256 + 256 + 4 + 256 + 4


def test_memory_is_counted_without_the_host():
    memory = analyse(Program("ENTRY %main () -> f32[] {\n}"), mesh("data:8")).memory
    assert (memory.arguments, memory.outputs, memory.aliases, memory.temporaries, memory.code) == (
        1, 10, 100, 1000, 10000)
    assert memory.total == 1 + 10 - 100 + 1000
    assert memory.host == 7 + 7 - 7 + 7


def test_estimates_that_cannot_be_true_are_left_out():
    costs = {"flops": 3e9, "bytes accessed": -5.0, "optimal_seconds": float("nan"), "other": 1.0}
    report = analyse(Program("ENTRY %main () -> f32[] {\n}", costs), mesh("data:8"))
    assert report.compiler == {"flops": 3e9}
    assert len(report.notes) == 2 and all("cannot be true" in note for note in report.notes)


def test_roofline_of_a_described_machine():
    topology = describe("v5p:2x2x1")
    coords = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    devices = np.array([SimpleNamespace(id=i, coords=c, platform="tpu")
                        for i, c in enumerate(coords)]).reshape(2, 2)
    fake = SimpleNamespace(devices=devices, shape={"fsdp": 2, "tensor": 2}, size=4,
                           axis_names=("fsdp", "tensor"))
    text = ADD + """
ENTRY %main (p: f32[1000000]) -> f32[1000000] {
  %p = f32[1000000]{0} parameter(0)
  ROOT %r = f32[1000000]{0} all-reduce(%p), channel_id=1, replica_groups=[2,2]<=[4], to_apply=%add
}
"""
    report = analyse(Program(text), fake, topology, flops=4 * 459e12)
    line = report.roofline
    assert line.flops == 459e12 and line.compute_seconds == pytest.approx(1.0)
    # Half of 4 MB twice over one link of 100 GB/s; the memory is read and written once.
    assert line.collective_seconds == pytest.approx(4e6 / 100e9)
    assert line.memory_seconds == pytest.approx(8e6 / 2765e9) and line.hbm_bytes_source == "hlo"
    assert line.limiting == "compute"
    assert report.memory.capacity == topology.hbm_bytes and report.memory.fits

    given = analyse(Program(text), fake, topology, hbm_bytes=2765e9).roofline
    assert given.memory_seconds == pytest.approx(1.0) and given.hbm_bytes_source == "given"
    assert given.compute_seconds is None and given.limiting == "memory"
    bare = analyse(Program(text), fake, topology).roofline
    assert bare.limiting == "collectives"


# --- GPU binaries within serialized executables


def elf(sm=None, note=None, machine=190, version=8):
    command = f"\0-warn-spills  -arch {note} \0".encode() if note else b""
    header = bytearray(64)
    header[:9] = b"\x7fELF\x02\x01\x01\x41" + bytes([version])
    struct.pack_into("<H", header, 18, machine)
    struct.pack_into("<I", header, 48, (sm or 0) << 8 | 4 if version >= 8 else sm or 0)
    return bytes(header) + command + bytes(32)


def varint(n):
    out = b""
    while n >= 0x80:
        out += bytes([n & 0x7F | 0x80])
        n >>= 7
    return out + bytes([n])


def snappy(data):
    """Literals of at most 16 bytes, and a copy wherever the last 4 bytes come again at once."""
    out, at = varint(len(data)), 0
    while at < len(data):
        run, period = 0, data[at - 4:at] if at >= 4 else b""
        while period and run < 64 and data[at + run:at + run + 1] == period[run % 4:run % 4 + 1]:
            run += 1
        if run >= 8:
            out += bytes([(run - 1) << 2 | 2]) + struct.pack("<H", 4)  # overlaps itself
            at += run
        else:
            size = min(16, len(data) - at)
            out += bytes([(size - 1) << 2]) + data[at:at + size]
            at += size
    return out


def riegeli(*records, packing="s"):
    """A Riegeli file with one chunk a record."""
    chunks = [(b"s", b"")]
    for record in records:
        sizes, values = varint(len(record)), record
        if packing == "s":
            sizes, values = (varint(len(b)) + snappy(b) for b in (sizes, values))
        head = (packing if packing else "\0").encode() + varint(len(sizes)) + sizes
        chunks.append((b"r", head + values))
    plain = b"".join(
        struct.pack("<QQQ", 0, len(body), 0) + kind + bytes(7) + struct.pack("<Q", 0) + body
        for kind, body in chunks
    )
    out, first = b"", True
    while plain:
        header = bytes.fromhex("83af70d10d884a3f") if first else bytes(8)
        out += header + struct.pack("<QQ", 0, 64)
        out, plain, first = out + plain[:65536 - 24], plain[65536 - 24:], False
    return out


def architectures(data):
    executable = SimpleNamespace(serialize=lambda: data)
    return gpu_architectures(SimpleNamespace(runtime_executable=lambda: executable))


@pytest.mark.parametrize(
    ("binaries", "expected"),
    [
        ([], set()),
        ([elf(90, "sm_90a"), elf(90, "sm_90a")], {"sm_90a"}),
        ([elf(100, "sm_100a"), elf(80)], {"sm_100a", "sm_80"}),
        ([elf(75, version=7)], {"sm_75"}),
        ([elf(90, "sm_90a"), elf(machine=62)], {"sm_90a"}),  # code for the host
    ],
)
@pytest.mark.parametrize("packing", ["s", ""])
def test_gpu_architectures(binaries, expected, packing):
    filler = b"some text, " * 50
    data = filler + riegeli(filler.join([b"", *binaries, b""]), packing=packing)
    assert architectures(data) == expected


def test_gpu_architectures_in_a_file_within_a_file_of_many_blocks():
    noise = np.random.default_rng(0).bytes(200_000)
    inner = riegeli(noise + elf(90, "sm_90a"), elf(100, "sm_100a"))
    assert architectures(b"head" + riegeli(b"a", inner, packing="")) == {"sm_90a", "sm_100a"}


def test_an_executable_packed_otherwise_is_refused():
    data = riegeli(elf(90, "sm_90a"), packing="")
    chunk = data.index(b"r" + bytes(7)) + 16
    with pytest.raises(ValueError, match="packed by 'z'"):
        architectures(data[:chunk] + b"z" + data[chunk + 1:])


def test_a_damaged_executable_is_refused():
    data = bytearray(riegeli(elf(90, "sm_90a") + bytes(400)))
    data[-3] ^= 0x3C
    with pytest.raises(ValueError, match="damaged|Snappy"):
        architectures(bytes(data))
