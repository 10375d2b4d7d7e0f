"""Every kernel case, forward and backward, compiled for TPUs and GPUs that are not there."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import pallas_kernels
from pallas_kernels import cases
from sharding.topology import child_env
from tests.aot.test_described_machines import needs_cuda, needs_libtpu

CHILD = pathlib.Path(__file__).with_name("kernel_compiles.py")
MACHINES = [
    pytest.param("v5e:2x2", "data:2,tensor:2", marks=needs_libtpu),
    pytest.param("v5p:2x2x1", "data:2,tensor:2", marks=[needs_libtpu, pytest.mark.slow]),
    pytest.param("v6e:2x2", "data:2,tensor:2", marks=[needs_libtpu, pytest.mark.slow]),
    pytest.param("h200:8", "data:4,tensor:2", marks=needs_cuda),
]
OPS = [name for name, op in pallas_kernels.ops().items()
       if op.__module__.startswith("pallas_kernels.")]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("machine", "mesh"), MACHINES)
def test_kernels_compile(machine, mesh, op):
    """The custom calls are there, and a GPU's binaries are of its architecture."""
    child = subprocess.run(
        [sys.executable, str(CHILD), machine, mesh, op], capture_output=True, text=True,
        env={**os.environ, **child_env()}, timeout=900)
    assert child.returncode == 0, child.stderr[-4000:]
    rows = [json.loads(line) for line in child.stdout.splitlines()]
    own = "gpu" if machine.startswith("h") else "tpu"
    wanted = {case.name for case in cases.of(pallas_kernels.ops()[op]) if case.compiled}
    assert wanted and {row["case"] for row in rows if row["implementation"] == own} == wanted
    errors = [row for row in rows if "error" in row]
    assert not errors, json.dumps(errors, indent=1)
    for row in rows:
        if row["implementation"] != own:
            continue
        # Forward and backward each are at least one kernel.
        assert row["kernels"] >= 2, row
        assert row.get("vmap_kernels", 2) >= 2, row
        if own == "gpu":
            assert row["architectures"] and "sm_90a" in row["architectures"], row
            assert all(a.startswith("sm_90") for a in row["architectures"]), row
