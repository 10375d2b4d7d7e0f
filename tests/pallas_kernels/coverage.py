"""Which implementation serves which case on which chip: the table in coverage.json.

``python -m tests.pallas_kernels.coverage`` writes it anew. Its coverage may only grow.
"""

import json
from pathlib import Path

import pallas_kernels
from pallas_kernels import Target, cases

PATH = Path(__file__).with_name("coverage.json")
CHIPS = ("v5e", "v5p", "v6e", "h200")
DTYPES = ("bfloat16", "float32")


def table() -> dict[str, dict[str, dict[str, str]]]:
    """{"op case dtype": {chip: {implementation: "chosen", "can", or why not}}}, of this project's
    ops and, on each chip, the implementations for its platform."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name, op in pallas_kernels.ops().items():
        if not op.__module__.startswith("pallas_kernels."):
            continue
        for case in cases.of(op):
            for dtype in DTYPES:
                if dtype not in case.tolerance:
                    continue
                operands, options = op.bind(*case.avals(dtype), **case.options)
                row = found[f"{name} {case.name} {dtype}"] = {}
                for chip in CHIPS:
                    target = Target.parse(chip)
                    candidates = op.candidates(target, *operands, **options)
                    row[chip] = {
                        c.name: c.reason or ("chosen" if i == 0 else "can")
                        for i, c in enumerate(candidates)
                        if c.name in op.preference[target.platform]}
    return found


if __name__ == "__main__":
    PATH.write_text(json.dumps(table(), indent=1, sort_keys=True) + "\n")
