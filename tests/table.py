"""Writes the outcome of a test run as Markdown: `python -m tests.table report.xml > table.md`.

`report.xml` is what pytest's --junitxml writes. The first table counts kernel cases by op and
implementation, the second all tests by folder.
"""

import collections
import datetime
import importlib.metadata
import platform
import re
import subprocess
import sys
from xml.etree import ElementTree

KERNEL_CASE = re.compile(r"test_equals_its_definition\[(\w+)-(\w+)-.*-(\w+)\]$")


def outcome(case: ElementTree.Element) -> str:
    """"passed", "skipped" or "failed" of a <testcase>."""
    tags = {child.tag for child in case}
    if tags & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in tags else "passed"


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def summarise(report: ElementTree.Element) -> str:
    """Both tables of a report."""
    kernels = collections.defaultdict(collections.Counter)
    folders = collections.defaultdict(collections.Counter)
    for case in report.iter("testcase"):
        result = outcome(case)
        parts = case.get("classname", "").split(".")
        folder = "/".join(parts[:2]) if len(parts) > 2 else parts[0]
        folders[folder][result] += 1
        folders[folder]["seconds"] += float(case.get("time", 0))
        found = KERNEL_CASE.match(case.get("name", ""))
        if found:
            op, implementation, dtype = found.groups()
            kernels[op, implementation][dtype, result] += 1

    def cell(counts, dtype):
        passed, skipped, failed = (counts[dtype, r] for r in ("passed", "skipped", "failed"))
        text = f"{passed} passed" if passed else ""
        return ", ".join(filter(None, [text, skipped and f"{skipped} skipped",
                                       failed and f"{failed} failed"]))

    return "\n".join([
        table(["op", "implementation", "float32", "bfloat16"],
              [[op, name, cell(counts, "float32"), cell(counts, "bfloat16")]
               for (op, name), counts in sorted(kernels.items())]),
        "",
        table(["tests in", "passed", "skipped", "failed", "seconds"],
              [[name, c["passed"], c["skipped"], c["failed"], f"{c['seconds']:.0f}"]
               for name, c in sorted(folders.items())]),
    ])


def main() -> None:
    """Prints the tables of the report that the first argument names."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], capture_output=True, text=True,
                              check=True).stdout.strip()

    # The table itself is being written.
    others = git("status", "--porcelain", "--", ":/", ":(top,exclude)docs/test_all.md")
    changed = " with uncommitted changes" if others else ""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax"))
    print(f"""# All tests

`make test-all` on {datetime.date.today()}, commit {git("rev-parse", "--short", "HEAD")}{changed}:
Python {platform.python_version()}, {versions}, {platform.machine()}, no accelerator. Kernels are
run in the interpreters and compared with their definitions in float64, values and gradients; one
that is skipped refuses the case, or this jax has no interpreter for it.
""")
    print(summarise(ElementTree.parse(sys.argv[1]).getroot()))


if __name__ == "__main__":
    main()
