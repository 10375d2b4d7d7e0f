"""What no file of the repository may be or do: be large, unpickle, load untrusted torch files."""

import ast
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAX_BYTES = 200_000
UNPICKLERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


@pytest.fixture(scope="module")
def files() -> list[pathlib.Path]:
    """Every file that git tracks or would add."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def unpickling(source: str) -> list[tuple[int, str]]:
    """(line, reason) of each way in which Python source could load a pickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), level=0, names=names):
                modules = [module]
                if module == "torch" and any(alias.name == "load" for alias in names):
                    found.append((node.lineno, "imports torch.load; call it by its full name"))
            case _:
                modules = []
        for module in modules:
            if module.partition(".")[0].lstrip("_") in UNPICKLERS:
                found.append((node.lineno, f"imports {module}"))
        if not isinstance(node, ast.Call):
            continue
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        if "allow_pickle" in options and not is_constant(options["allow_pickle"], False):
            found.append((node.lineno, "allow_pickle; leave it at False"))
        if ast.unparse(node.func) == "torch.load" and not is_constant(
            options.get("weights_only"), True
        ):
            found.append((node.lineno, "torch.load; pass weights_only=True"))
    return found


def is_constant(node: ast.AST | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_large_files(files):
    sizes = {str(file.relative_to(ROOT)): file.stat().st_size for file in files}
    assert {name: size for name, size in sizes.items() if size > MAX_BYTES} == {}


def test_nothing_unpickles(files):
    problems = [
        f"{file.relative_to(ROOT)}:{line} {reason}"
        for file in files
        if file.suffix == ".py"
        for line, reason in unpickling(file.read_text(encoding="utf-8"))
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import pickle", 1),
        ("def f():\n    from _pickle import loads", 1),
        ("np.load(path, allow_pickle=flag)", 1),
        ("np.load(path, allow_pickle=False)", 0),
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=False)", 1),
        ("torch.load(path, weights_only=True)", 0),
        ("from torch import load", 1),
    ],
)
def test_check_for_unpickling(source, count):
    assert len(unpickling(source)) == count
