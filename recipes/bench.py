"""Measures speed, always against a named peer or a measured roofline, in one run.

  python -m recipes.bench --suite=lm --peer=transformers
  python -m recipes.bench --suite=kernels --op=attention --case=8x2048 --compare=plain,torch
  python -m recipes.bench --suite=convert --model=llama3.2-1b --dtype=bfloat16
  python -m recipes.bench --suite=xlstm --train_steps=1
  python -m recipes.bench --suite=segment --rounds=3

Suites:
  lm: training and greedy decoding of a model (--model), in tokens per second. The
    peer gets the same weights; logits must agree to 1e-4 before anything is timed. Each side runs
    alone in a process of its own while the other sleeps, in turns, --rounds times; medians and
    their ratio are printed. The peer is timed in each of its modes and counts by its best one.
  kernels: every case (--op, --case) of every kernel op on this device, forward and with the
    backward pass, by each implementation that can run it and by --compare, with the share of the
    roofline that the device's measured matrix and copy speed allow. --tune times every tile size
    too and writes the table by which implementations are chosen.
  convert: random weights of --model in --dtype, converted from Hugging Face's form to ours and
    back, loaded onto eight devices of this machine's CPU, and loaded in turns with the peer.
  xlstm: what lm does, for an xLSTM of 58M parameters (or --model) against the package of its
    authors; sLSTM against theirs of the cells (--cells); and tokens per second over the length
    against a Transformer of that size (--lengths). What is not installed is left out.
  segment: training and inference of ParaTransCNN (--model, or one at 96 x 96 and a larger one at
    224 x 224 pixels) in images per second, as lm does it, against the same layers from torch.nn in
    two memory layouts, each as it is and compiled; and the share of the measured matrix speed. On a
    GPU both compute in bfloat16.
"""

import json
import platform
from pathlib import Path

import jax
from absl import flags

from recipes import command
from recipes.benchmarks import convert, kernel_peers, kernels, lm, segment, xlstm

DEFAULT_MODEL = "llama-60m"

with command.group("What"):
    SUITE = flags.DEFINE_enum("suite", "lm", ["convert", "kernels", "lm", "segment", "xlstm"],
                              "Which suite.")
with command.group("How"):
    ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds, sides in turn; medians count.")
    OUT = flags.DEFINE_string("out", None, "A file for the results as JSON.")
with command.group("Suite kernels"):
    OP = flags.DEFINE_string("op", "", "Only ops whose name this regular expression finds.")
    CASE = flags.DEFINE_string("case", "", "Only cases whose name this regular expression finds.")
    DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"],
                              "Of kernels and weights; default bfloat16, of kernels on a CPU "
                              "float32.")
    COMPARE = flags.DEFINE_list("compare", ["plain"], "Peers beside the op's own implementations: "
                                f"{', '.join(kernel_peers.PEERS)}.")
    TUNE = flags.DEFINE_bool("tune", False, "Time every tile size and write the tuned table.")
with command.group("Suites lm, convert, xlstm and segment"):
    PEER = flags.DEFINE_enum("peer", "transformers", ["transformers", "none"],
                             "Against whom; none measures this project alone. The suites xlstm "
                             "and segment have peers of their own.")
    MODEL = flags.DEFINE_string("model", None, "A preset that the peer has, too; default "
                                "llama-60m, of xlstm an xLSTM of that size, of segment "
                                f"{' and '.join(segment.MODELS)}.")
    SET = flags.DEFINE_multi_string("set", [], "Config overrides, as in num_layers=4.")
    BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Rows, or images, of a training step.")
    SEQ_LEN = flags.DEFINE_integer("seq_len", 256, "Tokens of a row.")
    TRAIN_STEPS = flags.DEFINE_integer("train_steps", 2, "Training steps of a round.")
    DECODE_BATCHES = flags.DEFINE_list("decode_batches", ["1", "4"], "Prompts decoded at once.")
    NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "Tokens decoded after a prompt of 32.")
with command.group("Suite segment"):
    IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "Pixels of an image's sides; default "
                                      f"{segment.IMAGE_SIZE} of a --model.")
with command.group("Suite xlstm"):
    CELLS = flags.DEFINE_list("cells", ["4x512x12x64", "4x512x1x768"], "Batch x length x heads x "
                              "width of the sLSTMs that are timed; empty: none.")
    LENGTHS = flags.DEFINE_list("lengths", ["512", "1024", "2048", "4096", "8192", "16384"],
                                "Tokens of a row in training and of a prompt; empty: none.")


def main() -> None:
    """Runs a suite and prints its table."""
    sizes = {"batch_size": BATCH_SIZE.value, "seq_len": SEQ_LEN.value,
             "train_steps": TRAIN_STEPS.value, "new_tokens": NEW_TOKENS.value,
             "decode_batches": _counts(DECODE_BATCHES)}
    if ROUNDS.value < 1:
        raise ValueError(f"--rounds={ROUNDS.value}: it must be at least 1")
    if SUITE.value == "lm":
        result = lm.run(
            model=MODEL.value or DEFAULT_MODEL, overrides=command.settings(SET.value),
            peer=None if PEER.value == "none" else PEER.value, rounds=ROUNDS.value, **sizes)
    elif SUITE.value == "xlstm":
        result = xlstm.run(
            model=MODEL.value, overrides=command.settings(SET.value),
            peers=PEER.value != "none", rounds=ROUNDS.value, cells=CELLS.value,
            lengths=_counts(LENGTHS), **sizes)
    elif SUITE.value == "segment":
        result = segment.run(
            model=MODEL.value, overrides=command.settings(SET.value),
            peer=PEER.value != "none", rounds=ROUNDS.value, batch_size=BATCH_SIZE.value,
            image_size=IMAGE_SIZE.value, train_steps=TRAIN_STEPS.value)
    elif SUITE.value == "convert":
        result = convert.run(
            model=MODEL.value or DEFAULT_MODEL, overrides=command.settings(SET.value),
            peer=None if PEER.value == "none" else PEER.value, rounds=ROUNDS.value,
            dtype=DTYPE.value)
    else:
        result = kernels.run(op=OP.value, case=CASE.value, dtype=DTYPE.value,
                             compare=COMPARE.value, rounds=ROUNDS.value, tune=TUNE.value)
    result["environment"] = {
        "python": platform.python_version(), "jax": jax.__version__,
        "device": jax.devices()[0].device_kind, "machine": platform.processor()
        or platform.machine()}
    if OUT.value:
        Path(OUT.value).write_text(json.dumps(result, indent=1) + "\n")


def _counts(flag: flags.FlagHolder) -> list[int]:
    """The positive numbers of a list flag."""
    for text in flag.value:
        if not text.isdecimal() or not int(text):
            raise ValueError(f"--{flag.name}={','.join(flag.value)}: {text!r} is no positive "
                             "number; give some with commas between, or none")
    return [int(text) for text in flag.value]


if __name__ == "__main__":
    command.run(main, computes=True)
