"""Meshes from texts, and what each malformed one is told."""

import dataclasses

import jax
import pytest
from jax.sharding import AxisType

import sharding
from sharding import ShardingError, parse_mesh


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data:2,fsdp:2,tensor:2", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("tensor:4", {"tensor": 4}),
        (" fsdp:2 , tensor:1 ", {"fsdp": 2, "tensor": 1}),
        ("data:-1,tensor:2", {"data": 4, "tensor": 2}),
        ("data:-1,fsdp:8", {"data": 1, "fsdp": 8}),
        ("", {"fsdp": 8}),
        ("  ", {"fsdp": 8}),
    ],
)
def test_parse(text, sizes):
    found = parse_mesh(text, 8)
    assert found == sizes
    assert list(found) == list(sizes)  # the order is the layout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dta:2", "'dta' in 'dta:2' is not one of .*did you mean 'data'"),
        ("data:2,", "'' in 'data:2,' is not one of"),
        ("data:2,fsdp:2,data:2", "'data' stands twice in .*name each once"),
        ("fsdp", "'fsdp' is not NAME:SIZE, as in 'fsdp:4,tensor:2'"),
        ("fsdp:two", "'fsdp:two' is not NAME:SIZE"),
        ("fsdp:", "'fsdp:' is not NAME:SIZE"),
        ("fsdp:0", "size 0 of 'fsdp' must be at least 1, or -1"),
        ("fsdp:-2", "size -2 of 'fsdp' must be at least 1, or -1"),
        ("data:-1,fsdp:-1", r"only one axis may be -1, not \['data', 'fsdp'\]"),
        ("data:-1,fsdp:3", "8 devices do not divide by 3; give 'data' a size"),
    ],
)
def test_refuses_a_malformed_text(text, message):
    with pytest.raises(ShardingError, match=message):
        parse_mesh(text, 8)


@pytest.mark.parametrize("explicit", [False, True])
def test_mesh(explicit):
    mesh = sharding.mesh("data:2,tensor:4", explicit=explicit)
    assert dict(mesh.shape) == {"data": 2, "tensor": 4}
    assert mesh.axis_types == (AxisType.Explicit if explicit else AxisType.Auto,) * 2
    assert set(mesh.devices.flat) == set(jax.devices())


def test_mesh_may_use_fewer_devices():
    assert sharding.mesh("tensor:2").devices.tolist() == jax.devices()[:2]
    assert sharding.mesh("data:1", jax.devices()[3:]).devices.tolist() == [jax.devices()[3]]


def test_mesh_larger_than_the_machine():
    with pytest.raises(ShardingError, match="needs 16 devices and there are 8; use a smaller.*=16"):
        sharding.mesh("data:2,fsdp:8")


@dataclasses.dataclass(frozen=True)
class Device:
    """Stands for a device of some process."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_forced_devices_are_advised_on_a_cpu_only():
    """Not for described machines, nor for real ones."""
    with pytest.raises(ShardingError, match="use a smaller mesh$"):
        sharding.mesh("fsdp:16", [Device(i, 0, "tpu") for i in range(8)])


def test_several_processes_must_all_take_part():
    """The remedy in the message is itself a mesh that works."""
    devices = [Device(i, i // 4) for i in range(8)]
    with pytest.raises(ShardingError, match="uses 4 of 8 devices; a job of several") as error:
        sharding.mesh("data:2,tensor:2", devices)
    remedy = str(error.value).partition("--mesh=")[2]
    assert sharding.mesh(remedy, devices).size == 8
