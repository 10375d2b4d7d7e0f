"""`recipes.plan` of a convolutional network, for a TPU slice and a GPU node that are not there."""

import json

import pytest

from tests.aot.test_described_machines import needs_cuda, needs_libtpu, run
from zoo import config

MACHINES = [pytest.param("v5e:2x2", marks=needs_libtpu), pytest.param("h200:8", marks=needs_cuda)]
SIZE, BATCH = 64, 16


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("machine", MACHINES)
def test_segmentation(machine, mode):
    result = json.loads(run(
        "-m", "recipes.plan", "--model=paratranscnn-tiny", f"--topology={machine}", "--json",
        f"--mode={mode}", f"--image_size={SIZE}", f"--batch_size={BATCH}"))
    passes = 3 if mode == "train" else 1
    forward = BATCH * config("paratranscnn-tiny").flops_per_image(SIZE, SIZE)
    assert result["flops_per_step"] == passes * forward
    memory, devices = result["memory"], 8 if machine == "h200:8" else 4
    assert memory["fits"] and result["images_per_second_bound"] > 0
    if mode == "train":
        # Parameters and both of AdamW's moments, float32, live on in their buffers, shared out;
        # a TPU pads them to tiles of 8 x 128, which the tiny model's kernels do not fill.
        state = 3 * 4 * result["parameters"] / devices
        assert 0.9 * state < memory["aliases"] < (1.1 if machine == "h200:8" else 2) * state
        assert {"all-reduce", "all-gather"} & {c["kind"] for c in result["collectives"]}
    else:
        assert 2 * result["parameters"] <= memory["arguments"] and memory["aliases"] == 0
        assert not result["collectives"]
