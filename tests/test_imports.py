"""Imports point one way: pallas_kernels and sharding, then layers, then zoo, then recipes."""

import ast
import json
import os
import pathlib
import statistics
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# What each package may import, besides itself and Python's standard library.
ALLOWED = {
    "pallas_kernels": {"jax", "numpy"},
    "sharding": {"jax", "numpy"},
    "layers": {"flax", "jax", "numpy", "pallas_kernels", "sharding"},
    "zoo": {"flax", "jax", "layers", "ml_dtypes", "numpy", "sharding"},
    "recipes": {
        "PIL",
        "absl",
        "grain",
        "h5py",
        "jax",
        "matplotlib",
        "nibabel",
        "numpy",
        "optax",
        "rich",
        "scipy",
        "sharding",
        "soundfile",
        "tensorboardX",
        "tokenizers",
        "zoo",
    },
}
# Files that may import more than their package.
ALSO_ALLOWED = {
    "recipes/benchmarks/kernel_peers.py": {"pallas_kernels", "tokamax", "torch"},
    "recipes/benchmarks/kernels.py": {"pallas_kernels"},  # times what the layers call
    "recipes/benchmarks/convert.py": {"transformers"},
    "recipes/benchmarks/peer_flashrnn.py": {"flashrnn", "torch"},
    "recipes/benchmarks/peer_segment.py": {"safetensors", "torch"},
    "recipes/benchmarks/peer_transformers.py": {"torch", "transformers"},
    "recipes/benchmarks/peer_xlstm.py": {"safetensors", "torch", "xlstm"},
    "recipes/benchmarks/torch_paratranscnn.py": {"torch"},
    "recipes/benchmarks/xlstm.py": {"pallas_kernels"},  # as kernels.py
    "recipes/benchmarks/phantom_baselines.py": {"sklearn"},
    "recipes/chat.py": {"jinja2"},
    "recipes/parity.py": {"torch", "transformers"},
    "zoo/checkpoint.py": {"etils", "orbax", "tensorstore"},  # etils: orbax's paths
}
# Submodules that one package alone may import, though others may import the library.
RESERVED = {"jax.experimental.pallas": "pallas_kernels"}
OURS = [(package, path) for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


def imported_modules(source: str) -> list[tuple[int, str]]:
    """(line, dotted name) of every absolute import, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return found


def forbidden_imports(package: str, path: str, source: str) -> list[str]:
    """A line for each import in a file of `package` that no arrow allows."""
    allowed = ALLOWED[package] | ALSO_ALLOWED.get(path, set()) | {package}
    problems = []
    for line, name in imported_modules(source):
        top = name.partition(".")[0]
        if top not in allowed and top not in sys.stdlib_module_names:
            problems.append(f"{path}:{line} imports {name}; {package} may import {sorted(allowed)}")
        for prefix, owner in RESERVED.items():
            if f"{name}.".startswith(f"{prefix}.") and package != owner:
                problems.append(f"{path}:{line} imports {name}; only {owner} may")
    return problems


def test_every_import_follows_an_arrow():
    assert {package for package, _ in OURS} == ALLOWED.keys()
    problems = []
    for package, path in OURS:
        relative = path.relative_to(ROOT).as_posix()
        problems += forbidden_imports(package, relative, path.read_text(encoding="utf-8"))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pallas_kernels/a.py", "import sharding"),
        ("sharding/a.py", "from flax import nnx"),
        ("layers/a.py", "from zoo import protocol"),
        ("layers/a.py", "from jax.experimental import pallas as pl"),
        ("zoo/a.py", "def f():\n    import pallas_kernels.dispatch"),
        ("zoo/a.py", "import importlib\nimportlib.import_module('recipes.train')"),
        ("zoo/a.py", "import orbax.checkpoint"),
        ("recipes/a.py", "from layers import attention"),
        ("recipes/a.py", "import torch"),
    ],
)
def test_walk_notices_a_wrong_arrow(path, source):
    assert len(forbidden_imports(path.partition("/")[0], path, source)) == 1


def test_every_code_folder_is_a_package():
    """A folder without __init__.py would be left out of an installation."""
    folders = {path.parent for _, path in OURS}
    assert [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()] == []


# Runs in a fresh interpreter: what `import zoo` adds to `import flax.nnx`, in modules and seconds
# of processor time, and whether a backend stands (the device count is then fixed).
PROBE = """
import json, sys, time
import flax.nnx, jax
before, start = set(sys.modules), time.process_time()
import zoo
seconds = time.process_time() - start
try:
    jax.config.update("jax_num_cpu_devices", 3)
    initialised = jax.device_count() != 3
except RuntimeError:
    initialised = True
added = sorted(set(sys.modules) - before)
print(json.dumps({"added": added, "seconds": seconds, "initialised": initialised}))
"""


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    """PROBE's answers in three child processes."""
    answers = []
    for _ in range(3):
        child = subprocess.run(
            [sys.executable, "-c", PROBE],
            cwd=tmp_path_factory.mktemp("elsewhere"),
            env={**os.environ, "XLA_FLAGS": ""},  # no forced device count
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert child.returncode == 0, child.stderr
        answers.append(json.loads(child.stdout))
    return answers


def test_import_zoo_loads_no_heavy_module(probes):
    heavy = ("orbax", "tensorstore", "optax", "matplotlib", "jax.experimental.pallas")
    added = probes[0]["added"]
    assert "zoo" in added
    assert [m for m in added if f"{m}.".startswith(tuple(f"{h}." for h in heavy))] == []


def test_import_zoo_initialises_no_backend(probes):
    assert not probes[0]["initialised"]


def test_import_zoo_is_fast(probes):
    assert statistics.median(probe["seconds"] for probe in probes) <= 0.3
