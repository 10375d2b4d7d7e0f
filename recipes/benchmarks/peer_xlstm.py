"""The authors' package xlstm (xLSTMLarge, its native kernels) as a peer of the xlstm suite.

The first request describes the model; the answer lists the modes it can be timed in.
"""

import json
import time
from pathlib import Path
from typing import Any

from recipes.benchmarks.peer import TorchTraining, serve

# What their config and the config.json of the same model call alike.
_SAME = ("embedding_dim", "num_heads", "num_blocks", "vocab_size", "norm_eps", "qk_dim_factor",
         "v_dim_factor", "ffn_proj_factor", "ffn_round_up_to_multiple_of", "gate_soft_cap",
         "output_logit_soft_cap", "eps")  # fmt: skip


class _XLstm:
    ready = {"train": TorchTraining.MODES, "decode": ["eager", "compiled"]}

    def __init__(self, setup: dict[str, Any]):
        import torch
        from safetensors.torch import load_file
        from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

        torch.set_num_threads(setup["threads"])
        self.torch, self.prompt_tokens = torch, setup["prompt_tokens"]
        folder = Path(setup["model"])
        settings = json.loads((folder / "config.json").read_text())
        weights = {key.replace("backbone.embeddings.", "embedding."): x
                   for key, x in load_file(folder / "model.safetensors").items()}

        def make(mode: str):
            # Without the states its layers fail when training.
            model = xLSTMLarge(xLSTMLargeConfig(
                mode=mode, chunkwise_kernel="chunkwise--native_autograd", step_kernel="native",
                sequence_kernel="native_sequence__native", autocast_kernel_dtype="float32",
                return_last_states=True, **{key: settings[key] for key in _SAME}))
            model.load_state_dict(weights)
            return model

        self.model = make("inference").eval()
        self.forward = {"eager": self.model.forward, "compiled": torch.compile(self.model)}
        tokens = torch.randint(0, setup["vocab_size"], (setup["batch_size"], setup["seq_len"] + 1))
        batch, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].reshape(-1)

        def loss(call):
            logits, _ = call(batch)
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)

        self.train = TorchTraining(torch, lambda: make("train"), loss, setup["learning_rate"])

    def logits(self, tokens: list[list[int]]) -> list:
        with self.torch.no_grad():
            return self.model(self.torch.tensor(tokens))[0].tolist()

    def decode(self, mode: str, batch: int, new_tokens: int) -> float:
        """As its own `generate`, whose loop this is, but for the prompt: never compiled."""
        last = self.torch.arange(1, self.prompt_tokens + 1)[None].repeat(batch, 1)
        started = time.perf_counter()
        with self.torch.no_grad():
            forward, state, found = self.model.forward, None, []
            for _ in range(new_tokens):
                logits, state = forward(last, state)
                last = logits[:, -1:].argmax(-1)
                found.append(last)
                forward = self.forward[mode]
        assert self.torch.cat(found, 1).shape == (batch, new_tokens)
        return time.perf_counter() - started


if __name__ == "__main__":
    serve(_XLstm)
