"""Measures speed, always against a named peer or a measured roofline, in one run.

  python -m recipes.bench --suite=lm --peer=transformers

Suites:
  lm: training and greedy decoding of a Llama-shaped model (--model), in tokens per second. The
    peer gets the same weights; logits must agree to 1e-4 before anything is timed. Each side runs
    alone in a process of its own while the other sleeps, in turns, --rounds times; medians and
    their ratio are printed. The peer is timed in each of its modes and counts by its best one.
"""

import json
import platform
from pathlib import Path

import jax
from absl import flags

from recipes import command
from recipes.benchmarks import lm

SUITES = {"lm": lm.run}

with command.group("What"):
    SUITE = flags.DEFINE_enum("suite", "lm", sorted(SUITES), "Which suite.")
    PEER = flags.DEFINE_enum("peer", "transformers", ["transformers", "none"],
                             "Against whom; none measures this project alone.")
    MODEL = flags.DEFINE_string("model", "llama-60m", "A preset that is a Llama.")
    SET = flags.DEFINE_multi_string("set", [], "Config overrides, as in num_layers=4.")
with command.group("How"):
    ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds, sides in turn; medians count.")
    BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Rows of a training step.")
    SEQ_LEN = flags.DEFINE_integer("seq_len", 256, "Tokens of a row.")
    TRAIN_STEPS = flags.DEFINE_integer("train_steps", 2, "Training steps of a round.")
    DECODE_BATCHES = flags.DEFINE_list("decode_batches", ["1", "4"], "Prompts decoded at once.")
    NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "Tokens decoded after a prompt of 32.")
    OUT = flags.DEFINE_string("out", None, "A file for the results as JSON.")


def main() -> None:
    """Runs a suite and prints its table."""
    result = SUITES[SUITE.value](
        model=MODEL.value, overrides=command.settings(SET.value),
        peer=None if PEER.value == "none" else PEER.value, rounds=ROUNDS.value,
        batch_size=BATCH_SIZE.value, seq_len=SEQ_LEN.value, train_steps=TRAIN_STEPS.value,
        decode_batches=[int(n) for n in DECODE_BATCHES.value], new_tokens=NEW_TOKENS.value)
    result["environment"] = {
        "python": platform.python_version(), "jax": jax.__version__,
        "device": jax.devices()[0].device_kind, "machine": platform.processor()
        or platform.machine()}
    if OUT.value:
        Path(OUT.value).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    command.run(main)
