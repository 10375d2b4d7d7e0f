"""Set-up for every test: eight forced CPU devices, full matmul precision, seeds, markers."""

import collections
import importlib.metadata
import os
import pathlib
import random

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# JAX reads these when it is imported; child processes of tests inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    forced = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {forced}".strip()
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu asks no metadata server
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # parallel compiles do not fight for its lock file
# What compiled once is read back by later tests, workers and runs; `make clean` forgets it.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / f"jax-{importlib.metadata.version('jax')}")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# The packages are importable in child processes too, whatever their working folder.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import jax  # noqa: E402
import numpy as np  # noqa: E402

# Not through the environment: programs that children compile for a TPU keep its own default.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--every", type=int, default=1, metavar="N",
                     help="run only the first test of each file and every N-th after it")


@pytest.hookimpl(trylast=True)  # After pytest's -k and -m.
def pytest_collection_modifyitems(config, items):
    unmet = {}
    if not config.getoption("--run-slow"):
        unmet["slow"] = pytest.mark.skip(reason="slow: runs with --run-slow")
    if "cuda" not in os.environ["JAX_PLATFORMS"]:
        unmet["gpu"] = pytest.mark.skip(reason="needs a GPU: run with JAX_PLATFORMS=cuda,cpu")
    for item in items:
        for marker, skip in unmet.items():
            if item.get_closest_marker(marker):
                item.add_marker(skip)
    every = config.getoption("--every")
    if every < 1:
        raise pytest.UsageError(f"--every={every}: it must be at least 1")
    seen, chosen, left = collections.Counter(), [], []
    for item in items:
        place = seen[item.path]
        seen[item.path] += not any(map(item.get_closest_marker, unmet))
        (left if place % every else chosen).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = chosen


@pytest.fixture(autouse=True)
def seed_generators():
    """Same numbers in every run, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
