"""A sharded training step compiled for TPU slices and GPU nodes that are not there."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from sharding.topology import child_env

# One process: the tests share what is compiled once.
pytestmark = pytest.mark.xdist_group("described_machines")

STEP = pathlib.Path(__file__).with_name("train_step.py")
# As in train_step.py: float32 parameters and momentum, bfloat16 copies of the weights.
WIDTH, HIDDEN, LAYERS, ROWS = 512, 2048, 12, 256
PARAMETERS = 2 * LAYERS * WIDTH * HIDDEN


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


needs_libtpu = pytest.mark.skipif(
    not installed("libtpu"), reason="needs the compiler of the extra aot: libtpu")
needs_cuda = pytest.mark.skipif(
    not installed("jax_plugins.xla_cuda13"), reason="needs the extra aot: jax-cuda13-plugin")


def run(*command: str) -> str:
    child = subprocess.run(
        [sys.executable, *command], env={**os.environ, **child_env()}, capture_output=True,
        text=True, timeout=240,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return child.stdout


def compile_all(*arguments: str) -> dict[str, dict]:
    reports = [json.loads(line) for line in run(str(STEP), *arguments).splitlines()]
    return {report["topology"]: report for report in reports}


@pytest.fixture(scope="module")
def tpu() -> dict[str, dict]:
    return compile_all("v5e:2x2=fsdp:4,tensor:1", "v5p:2x2x1=fsdp:2,tensor:2",
                       "v6e:2x2=fsdp:2,tensor:2")


@pytest.fixture(scope="module")
def gpu() -> dict[str, dict]:
    return compile_all("h200:8=fsdp:4,tensor:2", "b200:8=fsdp:4,tensor:2",
                       "h200:2x8=fsdp:16,tensor:1")


def check_costs(report: dict) -> None:
    fsdp, tensor = report["mesh"]["fsdp"], report["mesh"]["tensor"]
    devices = fsdp * tensor
    memory = report["memory"]
    # Parameters and momentum live on in their own buffers; next to them stands one batch.
    state = 2 * 4 * PARAMETERS // devices
    assert state <= memory["aliases"] < 1.01 * state
    assert memory["aliases"] <= memory["arguments"] < state + 2 * ROWS * WIDTH * 2 + 65536
    assert memory["total"] == (memory["arguments"] + memory["outputs"] - memory["aliases"]
                               + memory["temporaries"])
    assert memory["host"] == 0 and memory["fits"] and memory["total"] < 4 * state + (64 << 20)

    wire = {}
    for c in report["collectives"]:
        key = (c["kind"], *c["axes"])
        wire[key] = wire.get(key, 0) + c["wire_bytes"]
        assert c["group_size"] == (fsdp if c["axes"] == ["fsdp"] else tensor)
    # Both weights of each layer are gathered in bfloat16 for the forward pass and for the
    # backward, unless the compiler keeps them; and their gradients are reduced once.
    weights = PARAMETERS * 2 // tensor * (fsdp - 1) / fsdp
    moved = sum(bytes_ for key, bytes_ in wire.items() if key[1:] == ("fsdp",))
    assert 2 * weights <= moved < 4.1 * weights
    if tensor > 1:
        # One all-reduce of the activations a block, forward and backward.
        blocks = [c for c in report["collectives"] if c["axes"] == ["tensor"]]
        assert sum(c["count"] for c in blocks) == 2 * LAYERS
        once = ROWS * WIDTH * 2 * 2 * (tensor - 1) // tensor
        assert sum(c["wire_bytes"] for c in blocks) == 2 * LAYERS * once

    # Every parameter and momentum is read and written, every weight used three times.
    assert report["hbm_traffic_bytes"] > 2 * state
    line = report["roofline"]
    times = {"compute": line["compute_seconds"], "memory": line["memory_seconds"],
             "collectives": line["collective_seconds"]}
    assert all(0 < seconds < 1 for seconds in times.values())
    assert line["limiting"] == max(times, key=times.get)
    assert report["custom_calls"] == []


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "kind"),
    [("v5e:2x2", "TPU v5 lite"), ("v5p:2x2x1", "TPU v5"), ("v6e:2x2", "TPU v6 lite")],
)
def test_training_step_for_a_tpu_slice(tpu, name, kind):
    report = tpu[name]
    assert report["kind"] == kind
    check_costs(report)
    # The capacity that reports compare with is what the compiler enforces; releases differ by 0.01.
    assert report["memory"]["capacity"] / 2 ** 30 == pytest.approx(report["granted_gib"], abs=0.03)


@needs_cuda
@pytest.mark.parametrize(
    ("name", "kind", "architecture"),
    [
        ("h200:8", "NVIDIA H200", "sm_90a"),
        ("b200:8", "NVIDIA B200", "sm_100a"),
        ("h200:2x8", "NVIDIA H200", "sm_90a"),
    ],
)
def test_training_step_for_gpus(gpu, name, kind, architecture):
    report = gpu[name]
    assert report["kind"] == kind
    assert report["architectures"] == [architecture]
    check_costs(report)


@needs_cuda
def test_collectives_across_nodes_run_at_the_networks_speed(gpu):
    report = gpu["h200:2x8"]
    gathered = next(c for c in report["collectives"] if c["kind"] == "all-gather")
    assert gathered["wire_bytes"] / gathered["seconds"] == pytest.approx(50e9)
    within = next(c for c in gpu["h200:8"]["collectives"] if c["kind"] == "all-gather")
    assert within["wire_bytes"] / within["seconds"] == pytest.approx(450e9)


@needs_libtpu
def test_a_mesh_axis_lies_along_the_torus():
    script = """
from sharding.topology import describe
topology = describe("v5p:4x4x4")
mesh = topology.mesh("fsdp:16,tensor:4")
print(*(t.name for t in mesh.axis_types), mesh.size, topology.mesh("fsdp:16,tensor:4") == mesh)
print(topology.bandwidth(list(mesh.devices[0, :])), topology.bandwidth(list(mesh.devices[:, 0])))
print(topology.mesh("data:-1", explicit=True).axis_types[0].name)
print(len({d.id for d in describe("tpu7x:2x2x1").devices()}), len(describe("v4:2x2x1").devices()))
"""
    assert run("-c", script).splitlines() == [
        "Auto Auto 64 True",
        "200000000000.0 400000000000.0",  # closed rings: one dimension, and the other two
        "Explicit",
        "8 4",
    ]
