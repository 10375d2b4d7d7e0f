"""The kernels serve at least the cases that coverage.json says, and what the project promises."""

import json

import pytest

from pallas_kernels import cases
from pallas_kernels.attention import attention
from tests.pallas_kernels import coverage

SERVED = ("chosen", "can")


@pytest.fixture(scope="module")
def now():
    return coverage.table()


def test_equals_the_committed_table(now):
    """After a change that covers more: ``python -m tests.pallas_kernels.coverage``."""
    then = json.loads(coverage.PATH.read_text())
    lost = [f"{row} on {chip}: {name}" for row, chips in then.items()
            for chip, names in chips.items() for name, verdict in names.items()
            if verdict in SERVED and now.get(row, {}).get(chip, {}).get(name) not in SERVED]
    assert not lost, "coverage may only grow"
    assert now == then, "write coverage.json anew"


@pytest.mark.parametrize(("implementation", "chips"),
                         [("tpu", ("v5e", "v5p", "v6e")), ("gpu", ("h200",))])
def test_attention_kernels_serve_the_trained_shapes(now, implementation, chips):
    """bfloat16, causal, grouped, packed, heads of 64, 128 and 256, on every chip."""
    wanted = {f"train-{k}" for k in (64, 128, 256)}
    assert wanted <= {case.name for case in cases.of(attention)}
    for name in wanted:
        for chip in chips:
            verdict = now[f"attention {name} bfloat16"][chip][implementation]
            assert verdict in SERVED, (name, chip, verdict)


def test_every_op_has_a_kernel_for_each_platform(now):
    """At every compiled case's shape, one of this project's own on TPUs and one on GPUs."""
    for row, chips in now.items():
        op, name, dtype = row.split()
        if dtype != "bfloat16" or not _compiled(op, name):
            continue
        for chip, names in chips.items():
            own = "gpu" if chip == "h200" else "tpu"
            assert names.get(own) in SERVED, (row, chip, names)


def _compiled(op, name):
    from pallas_kernels import dispatch

    return any(case.compiled and case.name == name for case in cases.of(dispatch.find(op)))
