"""ParaTransCNN from torch.nn as a peer of the segment suite, on a CPU or a GPU.

The first request describes the model; the answer lists the modes it can be timed in.
"""

import json
import time
from pathlib import Path
from typing import Any

from recipes.benchmarks.peer import TorchTraining, serve

_LAYOUTS = ("contiguous", "channels last")


class _Segment:
    """On a GPU it computes in bfloat16, in training with float32 parameters."""

    def __init__(self, setup: dict[str, Any]):
        import torch
        from safetensors.torch import load_file

        from recipes.benchmarks import torch_paratranscnn as network

        torch.set_num_threads(setup["threads"])
        self.torch = torch
        folder = Path(setup["model"])
        config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        device = torch.device("cuda" if setup["gpu"] else "cpu")
        formats = dict(zip(_LAYOUTS, (torch.contiguous_format, torch.channels_last), strict=True))

        def make():
            model = network.ParaTransCnn(config)
            # All but the counters of batches, which nothing reads.
            model.load_state_dict(weights, strict=False)
            return model

        self.model = make().eval()  # On the CPU, to compare results in float32.
        shape = (setup["batch_size"], config["num_channels"], *[setup["image_size"]] * 2)
        images = torch.rand(shape, device=device)
        labels = torch.randint(0, config["num_labels"], (shape[0], *shape[2:]), device=device)
        self.training, self.forward = {}, {}
        for layout, form in formats.items():
            batch = images.to(memory_format=form)

            def loss(call, batch=batch):
                with torch.autocast(device.type, torch.bfloat16, enabled=setup["gpu"]):
                    logits = call(batch)
                return network.loss(logits, labels)

            training = TorchTraining(
                torch, lambda form=form: make().to(device, memory_format=form), loss,
                setup["learning_rate"])
            kind = torch.bfloat16 if setup["gpu"] else torch.float32
            model = make().eval().to(device, kind, memory_format=form)
            calls = {"eager": model, "compiled": torch.compile(model)}
            for mode in TorchTraining.MODES:
                self.training[f"{mode}, {layout}"] = (training, mode)
                self.forward[f"{mode}, {layout}"] = (calls[mode], batch.to(kind))
        self.ready = list(self.forward)

    def logits(self, images: list) -> list:
        """Of images [B, C, H, W]."""
        with self.torch.no_grad():
            return self.model(self.torch.tensor(images)).tolist()

    def train(self, mode: str, steps: int) -> float:
        training, name = self.training[mode]
        return training(name, steps)

    def infer(self, mode: str, batches: int) -> float:
        call, images = self.forward[mode]
        started = time.perf_counter()
        with self.torch.no_grad():
            for _ in range(batches):
                call(images)
        if images.is_cuda:
            self.torch.cuda.synchronize()
        return time.perf_counter() - started


if __name__ == "__main__":
    serve(_Segment)
