"""Continues prompts with a trained model, or answers them.

  python -m recipes.decode --checkpoint=runs/a --prompt='def '
  python -m recipes.decode --checkpoint=runs/a --prompt='import ' --temperature=0.8 --seed=1
  python -m recipes.decode --checkpoint=Qwen3-0.6B --chat --prompt='What is a monad?'

--checkpoint is a training run's workdir, or a directory with a model: one of recipes.convert, or
one of Hugging Face's as it is (config.json, *.safetensors, tokenizer.json). Several --prompt flags
are decoded as one batch. Text appears as it is generated; --json prints one object a prompt
instead.
"""

import codecs
import json
import sys
import time
from pathlib import Path

import jax
from absl import flags

import sharding
import zoo
from recipes import chat, command
from recipes.tokenizer import Tokenizer
from recipes.training import load_model, model_files
from zoo.convert.directory import read_json
from zoo.decode import stop

with command.group("Model"):
    CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A training run's workdir, or a "
                                     "model's directory, also one of Hugging Face's.")
    STEP = flags.DEFINE_integer("step", None, "Which checkpoint of a run; default the newest "
                                "whole one.")
    DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"],
                              "To cast the parameters to; default as they were trained.")
    MESH = flags.DEFINE_string("mesh", "", "Mesh of devices, as in data:2,tensor:4; default one "
                               "device.")
    RULES = flags.DEFINE_string("rules", "fsdp_tp", command.RULES_HELP)
with command.group("Text"):
    PROMPT = flags.DEFINE_multi_string("prompt", None, "Text to continue; repeat it for a batch.")
    PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "A file whose text is a prompt, too.")
    CHAT = flags.DEFINE_bool("chat", False, "Each prompt is what a user says, in the model's own "
                             "chat template, and the model answers.")
    MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Tokens to add at most.")
    STOP = flags.DEFINE_multi_string(
        "stop", [], "Text that ends the output, and is left out of it; repeat it for several.")
    JSON = flags.DEFINE_bool("json", False, "Print one JSON object a prompt: text, tokens, "
                             "log-probabilities, and why it ended.")
with command.group("Sampling"):
    TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token always.")
    TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest tokens; 0: from all.")
    TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens of this mass.")
    MIN_P = flags.DEFINE_float("min_p", 0.0, "Drop tokens less likely than this times the top.")
    PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Over 1 makes repeats less likely.")
    SEED = flags.DEFINE_integer("seed", 0, "Of the draws; prompt i of a batch uses seed + i.")


class _Printer:
    """Prints one prompt's continuation piece by piece, holding back what may be a stop text."""

    def __init__(self, stops: list[str], pieces: list[bytes]):
        self.stops = [s.encode() for s in stops]
        self.pieces, self.text, self.shown = pieces, b"", 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, tokens: list[int]) -> None:
        self.text += b"".join(self.pieces[t] for t in tokens)
        self._show(len(self.text) - max((len(s) for s in self.stops), default=1) + 1)

    def finish(self) -> None:
        self._show(len(self.text), final=True)
        print(flush=True)

    def _show(self, end: int, final: bool = False) -> None:
        end = min(end, stop.cut(self.text, self.stops) if self.stops else end)
        if end > self.shown or final:
            text = self.decoder.decode(self.text[self.shown : max(end, self.shown)], final)
            print(text, end="", flush=True)
            self.shown = max(end, self.shown)


def _stop_tokens(files: Path, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """The tokenizer's end, and those that the model's settings of generation name."""
    found = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    path = files / "generation_config.json"
    if path.is_file():
        named = read_json(path).get("eos_token_id")
        found += named if isinstance(named, list) else [named]
    return sorted({i for i in found if type(i) is int and 0 <= i < vocab_size})


def main() -> None:
    """Decodes what the flags say."""
    mesh = sharding.mesh(MESH.value or "data:1", None if MESH.value else jax.local_devices()[:1])
    with sharding.use(mesh, sharding.rules(RULES.value)):
        _decode(mesh, sharding.rules(RULES.value))


def _decode(mesh: jax.sharding.Mesh, rules: sharding.Rules) -> None:
    if CHECKPOINT.value is None:
        raise ValueError("--checkpoint is missing; give the workdir of a training run, e.g. "
                         "--checkpoint=runs/a")
    texts = list(PROMPT.value or [])
    if PROMPT_FILE.value:
        try:
            with open(PROMPT_FILE.value, encoding="utf-8") as file:
                texts.append(file.read())
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt_file={PROMPT_FILE.value} is not UTF-8 text: byte "
                             f"{error.start}; give a text file") from None
    if not texts:
        raise ValueError("there is nothing to continue; give --prompt=TEXT or --prompt_file=FILE")
    files = model_files(CHECKPOINT.value)
    # Before the weights are read: a model without one is not worth the wait.
    template = chat.template(files) if CHAT.value else None
    model, tokenizer, run = load_model(CHECKPOINT.value, mesh, rules, DTYPE.value, STEP.value)
    if template is not None:
        prompts = [tokenizer.encode(chat.render(
            template, [{"role": "user", "content": text}], tokenizer.special_tokens), special=True)
            for text in texts]
    else:
        # A run's documents are packed as they are; others' models know texts by how they begin.
        prompts = [tokenizer.encode(text) if run else tokenizer.encode_prompt(text)
                   for text in texts]
    for text, ids in zip(texts, prompts, strict=True):
        if not ids and tokenizer.bos_id is None:
            raise ValueError(f"prompt {text!r} holds no token; write at least one character")
        if not ids:
            ids.append(tokenizer.bos_id)
    pieces = tokenizer.token_bytes()
    pieces += [b""] * (model.config.vocab_size - len(pieces))  # ids without text
    options = {
        "temperature": TEMPERATURE.value, "top_k": TOP_K.value, "top_p": TOP_P.value,
        "min_p": MIN_P.value, "repetition_penalty": PENALTY.value,
        "seed": [SEED.value + i for i in range(len(prompts))],
        "stop_tokens": _stop_tokens(files, tokenizer, model.config.vocab_size),
        "stop_strings": STOP.value, "token_bytes": pieces,
    }
    started = time.perf_counter()
    total = [0] * len(prompts)
    if JSON.value:
        result = zoo.generate(model, prompts, MAX_NEW_TOKENS.value, **options)
        for text, tokens, log_probs, finished in zip(
                texts, result.tokens, result.log_probs, result.finished, strict=True):
            added = b"".join(pieces[t] for t in tokens)
            added = added[: stop.cut(added, STOP.value)] if STOP.value else added
            print(json.dumps({"prompt": text, "text": added.decode("utf-8", "replace"),
                              "tokens": tokens, "log_probs": log_probs,
                              "ended_by": "stop" if finished else "length"}))
        total = [len(tokens) for tokens in result.tokens]
    else:
        printers = [_Printer(STOP.value, pieces) for _ in prompts]
        stream = zoo.stream(model, prompts, MAX_NEW_TOKENS.value, **options)
        print(texts[0], end="", flush=True)
        # The first prompt's text appears as it comes; the others' after it, each whole.
        rest: list[list[int]] = [[] for _ in prompts]
        for piece in stream:
            printers[0].add(piece.tokens[0])
            for i, tokens in enumerate(piece.tokens):
                rest[i] += tokens
        printers[0].finish()
        for text, printer, tokens in zip(texts[1:], printers[1:], rest[1:], strict=True):
            print(f"\n{text}", end="")
            printer.add(tokens)
            printer.finish()
        total = [len(tokens) for tokens in rest]
    seconds = time.perf_counter() - started
    print(f"{sum(total)} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)


if __name__ == "__main__":
    command.run(main, computes=True)
