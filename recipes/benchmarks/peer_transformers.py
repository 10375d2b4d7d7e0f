"""Hugging Face transformers as a peer of the lm suite.

The first request describes the model; the answer lists the modes it can be timed in.
"""

import time
from typing import Any

from recipes.benchmarks.peer import TorchTraining, serve


class _Transformers:
    ready = {"train": TorchTraining.MODES,
             "decode": ["dynamic cache", "static cache, compiled"]}

    def __init__(self, setup: dict[str, Any]):
        import torch
        import transformers

        torch.set_num_threads(setup["threads"])
        self.torch, self.prompt_tokens = torch, setup["prompt_tokens"]

        def make():
            return transformers.AutoModelForCausalLM.from_pretrained(
                setup["model"], dtype=torch.float32)

        self.model = make().eval()
        shape = (setup["batch_size"], setup["seq_len"])
        batch = torch.randint(0, setup["vocab_size"], shape)
        self.train = TorchTraining(
            torch, make, lambda call: call(input_ids=batch, labels=batch, use_cache=False).loss,
            setup["learning_rate"])

    def logits(self, tokens: list[list[int]]) -> list:
        with self.torch.no_grad():
            return self.model(self.torch.tensor(tokens)).logits.tolist()

    def decode(self, mode: str, batch: int, new_tokens: int) -> float:
        ids = self.torch.arange(1, self.prompt_tokens + 1)[None].repeat(batch, 1)
        # Static caches are what transformers compiles the forward pass for.
        extra = {"cache_implementation": "static"} if mode.startswith("static") else {}
        started = time.perf_counter()
        with self.torch.no_grad():
            out = self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), max_new_tokens=new_tokens,
                min_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **extra)
        assert out.shape[1] == self.prompt_tokens + new_tokens
        return time.perf_counter() - started


if __name__ == "__main__":
    serve(_Transformers)
