"""What cross-entropy takes on a chip, at 16k tokens, a vocabulary of 152k and a width of 4096."""

import json
import pathlib

import pytest

from tests.aot.test_described_machines import needs_cuda, needs_libtpu, run

SCRIPT = pathlib.Path(__file__).with_name("cross_entropy.py")
TOKENS, WIDTH, VOCAB = 16_384, 4096, 152_064


def compiled(*arguments: str) -> dict[str, dict]:
    reports = [json.loads(line) for line in run(str(SCRIPT), *arguments).splitlines()]
    return {report["kind"]: report for report in reports}


@needs_libtpu
@pytest.mark.parametrize("implementation", ["xla", "tpu"], ids=["by xla", "by kernel"])
def test_room_on_a_tpu(implementation):
    """Beyond the float32 gradient of the head: under 1/16 of all logits in float32."""
    reports = compiled("v5p:2x2x1", implementation)
    logits = 4 * TOKENS * VOCAB
    assert reports["gradient"]["temporaries"] - 4 * WIDTH * VOCAB < logits / 16
    assert reports["value"]["temporaries"] < logits / (16 if implementation == "xla" else 256)
    if implementation == "tpu":
        calls = dict(reports["gradient"]["custom_calls"])
        assert calls == {"cross_entropy_statistics": 19, "cross_entropy_cotangents": 19}
        assert dict(reports["value"]["custom_calls"]) == {"cross_entropy_statistics": 19}


@needs_cuda
@pytest.mark.parametrize("implementation", ["xla", "gpu"], ids=["by xla", "by kernel"])
def test_room_on_a_gpu(implementation):
    """XLA's slices are of twice the rows, and their cotangents stand beside the logits."""
    reports = compiled("h200:1", implementation)
    logits = 4 * TOKENS * VOCAB
    assert reports["gradient"]["temporaries"] - 4 * WIDTH * VOCAB < logits / 8
    assert reports["value"]["temporaries"] < logits / (8 if implementation == "xla" else 64)
