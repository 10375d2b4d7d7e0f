"""Described machines: names, shapes, figures and bandwidths; compiling for them is in tests/aot."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from jax.experimental import topologies

from sharding.mesh import ShardingError
from sharding.topology import CHIPS, child_env, describe, gpu_target_config


@pytest.mark.parametrize(
    ("name", "canonical", "platform", "chips", "devices"),
    [
        ("v4:2x2x1", "v4:2x2x1", "tpu", 4, 4),
        ("v5e:16x16", "v5e:16x16", "tpu", 256, 256),
        ("v5p:4x4x4", "v5p:4x4x4", "tpu", 64, 64),
        (" V5P:8x4x12 ", "v5p:8x4x12", "tpu", 384, 384),
        ("v6e:2x4", "v6e:2x4", "tpu", 8, 8),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", "tpu", 4, 8),
        ("h100:1", "h100:1", "gpu", 1, 1),
        ("h200:8", "h200:8", "gpu", 8, 8),
        ("h200:1x8", "h200:8", "gpu", 8, 8),
        ("b200:2x8", "b200:2x8", "gpu", 16, 16),
    ],
)
def test_describe(name, canonical, platform, chips, devices):
    topology = describe(name)
    assert (topology.name, topology.platform) == (canonical, platform)
    assert (topology.num_chips, topology.num_devices) == (chips, devices)
    assert describe(canonical) == topology


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5:2x2x1", "did you mean 'v5p'"),
        ("h20:8", "did you mean 'h200'"),
        ("", "is not one of v4, v5e"),
        ("v5p", "no shape; v5p needs one of 1x1x1"),
        ("v5p:3x3x3", "multiples of 4 of at most 8960 chips"),
        ("v5p:40x40x40", "at most 8960 chips"),
        ("v5p:2x2", "one of 1x1x1, 2x2x1"),
        ("v5e:2x2x1", "one of 1x1, 2x2, 2x4"),
        ("v6e:3x3", "one of 1x1, 2x2, 2x4"),
        ("v5e:2xtwo", "shape '2xtwo'"),
        ("h200:3", "1, 2, 4, 8 GPUs a node"),
        ("h200:0x8", "NODESxGPUS"),
        ("h200:2x2x2", "NODESxGPUS"),
        ("h200:-8", "NODESxGPUS"),
    ],
)
def test_bad_names_say_what_is_allowed(name, says):
    with pytest.raises(ShardingError) as error:
        describe(name)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_figures_of_a_device_are_its_share_of_the_chip():
    topology = describe("tpu7x:2x2x1")
    chip = CHIPS["tpu7x"]
    assert topology.hbm_bytes * 2 == chip.hbm_bytes
    assert topology.bf16_flops * 2 == chip.bf16_flops
    assert topology.hbm_bandwidth * 2 == chip.hbm_bandwidth
    # The H200 computes 206 FLOPs in the time of one byte, the v5p 166.
    for kind, ridge in (("h200", 206), ("v5p", 166)):
        assert CHIPS[kind].bf16_flops / CHIPS[kind].hbm_bandwidth == pytest.approx(ridge, rel=0.01)


def slice_of(*coords):
    return [SimpleNamespace(coords=c, id=i) for i, c in enumerate(coords)]


def test_bandwidth_follows_the_torus():
    line = [(x, 0, 0) for x in range(4)]
    plane = [(x, y, 0) for x in range(4) for y in range(4)]
    torus, block = describe("v5p:4x4x4"), describe("v5p:2x4x4")
    one_way = CHIPS["v5p"].link_bandwidth
    # A whole dimension of a closed torus is a ring in both directions; a part of one is a line.
    assert torus.bandwidth(slice_of(*line)) == 2 * one_way
    assert torus.bandwidth(slice_of(*plane)) == 4 * one_way
    assert torus.bandwidth(slice_of((0, 0, 0), (1, 0, 0))) == one_way
    assert block.bandwidth(slice_of(*[(0, y, 0) for y in range(4)])) == one_way
    # v5e and v6e slices close along a dimension of 16.
    assert describe("v5e:8x16").bandwidth(slice_of(*[(0, y, 0) for y in range(16)])) == 100e9
    assert describe("v5e:8x16").bandwidth(slice_of(*[(x, 0, 0) for x in range(8)])) == 50e9


def test_bandwidth_of_a_device_that_is_half_a_chip():
    topology = describe("tpu7x:4x4x4")
    cores = slice_of((0, 0, 0), (0, 0, 0))
    assert topology.bandwidth(cores) == topology.hbm_bandwidth
    # Both halves send over the chip's links at once.
    line = slice_of(*[(x, 0, 0) for x in range(4)])
    assert topology.bandwidth(line) == CHIPS["tpu7x"].link_bandwidth


def test_bandwidth_of_gpus_within_and_across_nodes():
    topology = describe("h200:2x8")
    gpus = [SimpleNamespace(id=i) for i in range(16)]
    assert topology.bandwidth(gpus[8:]) == 450e9
    assert topology.bandwidth(gpus[::8]) == 50e9
    assert topology.bandwidth(gpus) == 50e9


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("h100", ("major: 9 ", "core_count: 132", "memory_bandwidth: 3350000000000")),
        ("h200", ("major: 9 ", "core_count: 132", "memory_bandwidth: 4800000000000")),
        ("b200", ("major: 10 ", "core_count: 148", "memory_bandwidth: 7670000000000")),
    ],
)
def test_gpu_target_config(kind, says):
    text = gpu_target_config(kind)
    assert text.count("{") == text.count("}")
    for part in (*says, "ACCELERATED_FEATURES", f"device_memory_size: {CHIPS[kind].hbm_bytes}"):
        assert part in text
    # 4 tensor cores a multiprocessor, a multiply-add counted as 2: the data sheet's peak.
    rates = text.partition("key: 16 value {")[2].split()
    clock, ops = float(rates[1]), int(rates[5])
    cores = int(text.partition("core_count: ")[2].split()[0])
    assert clock * 1e9 * 4 * ops * 2 * cores == pytest.approx(CHIPS[kind].bf16_flops, rel=1e-3)


def test_describe_starts_no_backend():
    script = "from sharding.topology import describe; print(describe('v5p:4x4x4').num_devices)"
    child = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60,
        env={**os.environ, "JAX_PLATFORMS": "no_such_backend"},
    )
    assert child.stdout == "64\n", child.stderr


@pytest.mark.parametrize(("name", "wheels"), [("v5e:2x2", "libtpu"), ("h200:8", "CUDA 13 plugin")])
def test_missing_compiler_names_the_extra(name, wheels, monkeypatch):
    if name.startswith("v5e") and importlib.util.find_spec("libtpu"):
        def refuse(*args, **options):
            raise RuntimeError("JAX TPU support not installed")
        monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    elif name.startswith("h200"):
        def refuse(*args, **options):
            raise NotImplementedError("topology not implemented for cuda")
        monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(ShardingError, match=r"parazoo\[aot\]") as error:
        describe(name).devices()
    assert wheels in str(error.value)


def test_child_env_is_strings_that_keep_the_host_on_its_cpu():
    env = child_env()
    assert env["JAX_PLATFORMS"] == "cpu"
    assert env["ALLOW_MULTIPLE_LIBTPU_LOAD"] == env["TPU_SKIP_MDS_QUERY"] == "1"
    assert all(isinstance(value, str) for value in env.values())
