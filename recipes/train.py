"""Trains a model on text, images or another task, and goes on with a run that was stopped.

  python -m recipes.train --model=llama-tiny --data=stdlib --steps=300 --workdir=runs/a

The same command with the same --workdir resumes, and gives the numbers of a run that never
stopped. Known experiments are in recipes/flags:

  python -m recipes.train --flagfile=recipes/flags/llama_tiny_stdlib.flags --workdir=runs/demo

Given weights are trained further with --init_from, all of them or, with --lora_rank, adapters:

  python -m recipes.train --init_from=runs/a --lora_rank=8 --data=notes.txt --workdir=runs/b
"""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from absl import flags

import sharding
import zoo
from recipes import command, loop, lora, optimizer, processes, training, volumes
from recipes.tasks import Task
from recipes.tasks.lm import LanguageModel
from recipes.tasks.segment import Segment
from recipes.tasks.state_tracking import StateTracking

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parazoo"

_DEFAULT_MODEL = "llama-tiny"

with command.group("Model"):
    _MODEL = flags.DEFINE_string("model", None, "A name in zoo.list(); left out, "
                                 f"{_DEFAULT_MODEL}, or with --init_from the model there.")
    _SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE replaces a field of the model's "
                                     "config, as num_layers=6 or attention.window=512. Repeatable; "
                                     "a later one wins.")
    _DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"],
                               "Of the parameters that are kept: float32 or bfloat16.")
    _COMPUTE_DTYPE = flags.DEFINE_enum(
        "compute_dtype", None, ["float32", "bfloat16"],
        "Of the computation; left out, float32 on CPU and bfloat16 elsewhere.")
    _REMAT = flags.DEFINE_enum("remat", "none", ["none", "dots", "full"],
                               "What the backward pass computes again: none, all but matrix "
                               "products (dots), or all (full). Costs time, saves memory.")
    _STACKED = flags.DEFINE_enum("stacked", "auto", ["auto", "true", "false"],
                                 "Layers as one scanned stack (true) or a list (false); auto: a "
                                 "list on CPU, where it is faster.")

with command.group("Fine-tuning"):
    _INIT_FROM = flags.DEFINE_string(
        "init_from", None, "Starts from the weights and the config there: the workdir of a run, "
        "whose averaged parameters are taken if it has any, a directory that zoo.save wrote, or "
        "one of Hugging Face. A run that has begun goes on without it.")
    _LORA_RANK = flags.DEFINE_integer(
        "lora_rank", 0, "Trains low-rank adapters of this rank (LoRA) and leaves the weights as "
        "they are; 0: trains all weights. The adapters are float32 whatever --dtype.")
    _LORA_ALPHA = flags.DEFINE_float("lora_alpha", None, "Adapters count alpha / rank times; left "
                                     "out, twice the rank.")
    _LORA_TARGETS = flags.DEFINE_string(
        "lora_targets", "query,key,value,out", "The kernels to adapt, or modules of them, with "
        "commas between and * for anything, as query,value or mlp/*; or all-linear: every matrix "
        "of the blocks.")

with command.group("Data"):
    _TASK = flags.DEFINE_enum("task", None, ["lm", "state_tracking", "segment"],
                              "lm: the next token of text; state_tracking: the parity of random "
                              "bits, learnt at lengths up to --seq_len and evaluated up to eight "
                              "times that; segment: the class of each pixel of images. Left out, "
                              "lm, or segment of a model for segmentation.")
    _DATA = flags.DEFINE_string("data", None, "stdlib (the source of Python's standard "
                                "library), or files, directories and globs with commas between: "
                                ".txt and other text, .jsonl, or one .bin of token ids. A single "
                                "text is cut into documents where paragraphs or lines end. For "
                                "--task=segment phantoms (CT-like volumes with eight organs), or "
                                "LAYOUT:DIR with one of "
                                f"{', '.join(volumes.LAYOUTS)}, as png:scans for scans/images and "
                                "scans/masks (recipes/volumes.py tells of all). Left out, stdlib, "
                                "or phantoms.")
    _TOKENIZER = flags.DEFINE_string("tokenizer", None, "bytes, or a tokenizer.json; left out, "
                                     "bytes, or with --init_from the one there.")
    _BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Rows, or images, of a step, over all "
                                      "devices.")
    _SEQ_LEN = flags.DEFINE_integer("seq_len", 256, "Tokens of a row.")
    _HELDOUT = flags.DEFINE_float("heldout", 0.05, "The part of the documents to hold out, of a "
                                  "single text its end; 0: none, and nothing is evaluated. For "
                                  "--task=segment the part of the patients, 0.2 if left out; data "
                                  "with a test part of its own takes none.")
    _IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "The side that images are brought to; "
                                       "left out, 224, or the phantoms' own.")
    _AUGMENT = flags.DEFINE_enum(
        "augment", "mirror", ["mirror", "rotate", "none"],
        "mirror: every other image is mirrored and turned by right angles, and half of the rest "
        "turned by up to 20 degrees; rotate: every other one is turned by up to 20 degrees, where "
        "left is not right; none.")
    _NEIGHBORS = flags.DEFINE_integer(
        "neighbors", None, "How many slices of a volume before one, and after it, the model sees "
        "as further channels of it; of gray images 1 needs --set=in_channels=3, and 2 needs 5. "
        "Left out, 0, or with --init_from as there.")
    _CLASS_NAMES = flags.DEFINE_list("class_names", [], "Of labels 1, 2 and so on, with commas "
                                     "between, for nifti and png; left out, they are numbered.")

with command.group("Optimization"):
    _STEPS = flags.DEFINE_integer("steps", 1000, "Steps of the whole run.")
    _SEED = flags.DEFINE_integer("seed", 0, "Of parameters, dropout and the order of examples.")
    _OPTIMIZER = flags.DEFINE_string("optimizer", "adamw", "adamw, lion, muon (with AdamW for "
                                     "what is no matrix of a block), or sgd (with momentum).")
    _LEARNING_RATE = flags.DEFINE_float(
        "learning_rate", None, "The peak; left out, "
        + ", ".join(f"{rate} for {name}" for name, rate in optimizer.LEARNING_RATES.items()) + ".")
    _ADAM_LEARNING_RATE = flags.DEFINE_float("adam_learning_rate", 3e-3,
                                             "The peak of muon's AdamW part.")
    _SCHEDULE = flags.DEFINE_string("schedule", "cosine", "After the warm-up: cosine, linear or "
                                    "poly (to the power of 0.9) to 0, wsd (constant, then linear "
                                    "to 0), or constant.")
    _WARMUP = flags.DEFINE_integer("warmup_steps", 50, "Steps up to the peak.")
    _WEIGHT_DECAY = flags.DEFINE_float("weight_decay", 0.1, "On matrices, times the learning rate; "
                                       "at most 1 over that.")
    _GRAD_CLIP = flags.DEFINE_float("grad_clip", 1.0, "Largest gradient norm; 0 for any.")
    _ACCUMULATE = flags.DEFINE_integer("accumulate", 1, "Microbatches a step is computed in.")
    _EMA = flags.DEFINE_float("ema", 0.0, "Decay of an average of the parameters, which is then "
                              "what is evaluated and decoded; 0 for none.")
    _Z_LOSS = flags.DEFINE_float("z_loss", 0.0, "Coefficient of log(Z)^2 in the loss.")

with command.group("Run"):
    _WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics.jsonl and pictures "
                                   "go. Left out, runs/MODEL; with --init_from it is needed.")
    _COMPARE = flags.DEFINE_list("compare", [], "Workdirs of other runs, with commas between; the "
                                 "picture shows their results too.")
    _LOG_EVERY = flags.DEFINE_integer("log_every", 10, "Steps between log entries.")
    _EVAL_EVERY = flags.DEFINE_integer("eval_every", 200, "Steps between evaluations; 0: at the "
                                       "end alone.")
    _EVAL_BATCHES = flags.DEFINE_integer("eval_batches", 16, "About how many they take.")
    _FINAL_EVAL_BATCHES = flags.DEFINE_integer("final_eval_batches", 1000,
                                               "About how many the last one takes, at most.")
    _SAVE_EVERY = flags.DEFINE_integer("save_every", 500, "Steps between checkpoints; 0: at the "
                                       "end alone.")
    _KEEP_LAST = flags.DEFINE_integer("keep_last", 3, "How many of the newest stay.")
    _KEEP_EVERY = flags.DEFINE_integer("keep_every", 0, "Those of steps divisible by this stay "
                                       "too; 0: none.")
    _PROFILE = flags.DEFINE_string("profile", None, "FIRST:LAST profiles these steps, counted from "
                                   "0, as 10:15; a run taken up in between, those that are left.")
    _COMPILE_CACHE = flags.DEFINE_string("compile_cache", str(_CACHE / "jax"),
                                         "Where compiled programs are kept; empty for nowhere.")

with command.group("Devices"):
    _MESH = flags.DEFINE_string("mesh", "", "AXIS:SIZE of data, fsdp and tensor, with commas "
                                "between, as fsdp:4,tensor:2; -1 for the rest. Left out: all on "
                                "fsdp.")
    _RULES = flags.DEFINE_string("rules", "fsdp_tp", command.RULES_HELP)
    _EXPLICIT = flags.DEFINE_bool("explicit_axes", False, "Takes jax's Explicit axis types.")
    _COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of a job of "
                                       "several; auto on a cluster that jax knows.")
    _NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the job.")
    _PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this process, from 0.")


def main() -> None:
    """Trains as the flags say."""
    folder = _workdir()
    _check_lora_flags()
    rules = sharding.rules(_RULES.value)
    updates = optimizer.Optimizer(
        name=_OPTIMIZER.value, learning_rate=_LEARNING_RATE.value,
        adam_learning_rate=_ADAM_LEARNING_RATE.value, schedule=_SCHEDULE.value,
        warmup_steps=_WARMUP.value, steps=_STEPS.value, weight_decay=_WEIGHT_DECAY.value,
        grad_clip=_GRAD_CLIP.value or None)
    schedule = loop.Schedule(
        steps=_STEPS.value, log_every=_LOG_EVERY.value, eval_every=_EVAL_EVERY.value,
        save_every=_SAVE_EVERY.value, keep_last=_KEEP_LAST.value,
        keep_every=_KEEP_EVERY.value or None, profile=_profiled(_PROFILE.value))
    _keep_compiled(_COMPILE_CACHE.value)
    processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    mesh = sharding.mesh(_MESH.value, explicit=_EXPLICIT.value)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    config, tokenizer, source = _choose_model(folder)
    task = _make_task(config, tokenizer)
    program = training.Program(
        config=config, mesh=mesh, rules=rules, loss=task.loss, optimizer=updates,
        seed=_SEED.value, accumulate=_ACCUMULATE.value, dtype=_DTYPE.value,
        compute_dtype=_COMPUTE_DTYPE.value or ("float32" if on_cpu else "bfloat16"),
        ema=_EMA.value or None, remat=_REMAT.value,
        stacked=None if _STACKED.value == "auto" else _STACKED.value == "true",
        batch_axes=task.axes)
    if _LORA_RANK.value:
        model = program.model(stacked=True)
        program = dataclasses.replace(program, lora=lora.make(
            _LORA_RANK.value, _LORA_ALPHA.value, _LORA_TARGETS.value.split(","),
            zoo.protocol.split(model)[1], zoo.protocol.axes(model)))
    loop.train(program, task, _BATCH_SIZE.value, schedule, folder, source,
               [Path(other) for other in _COMPARE.value])


def _workdir() -> Path:
    if _WORKDIR.value is None and _INIT_FROM.value is None:
        return Path("runs") / (_MODEL.value or _DEFAULT_MODEL)
    if not _WORKDIR.value:
        raise ValueError("--workdir is needed, such as --workdir=runs/a: the run is kept there")
    return Path(_WORKDIR.value)


def _make_task(config: Any, tokenizer: str | None) -> Task:
    name = _TASK.value or ("segment" if config.kind == "segmentation" else "lm")
    if name != "segment":
        _refuse((_IMAGE_SIZE, _AUGMENT, _NEIGHBORS, _CLASS_NAMES), "--task=segment")
    if name == "lm":
        return LanguageModel(
            config, data=_DATA.value or "stdlib", tokenizer=tokenizer, seq_len=_SEQ_LEN.value,
            batch_size=_BATCH_SIZE.value, seed=_SEED.value, heldout=_HELDOUT.value,
            z_loss=_Z_LOSS.value, eval_batches=_EVAL_BATCHES.value,
            final_eval_batches=_FINAL_EVAL_BATCHES.value, cache_dir=_CACHE / "corpus")
    _refuse((_TOKENIZER, _Z_LOSS, _FINAL_EVAL_BATCHES), "--task=lm")
    if name == "segment":
        _refuse((_SEQ_LEN, _EVAL_BATCHES), "tasks of sequences")
        return Segment(config, data=_DATA.value or "phantoms", batch_size=_BATCH_SIZE.value,
                       seed=_SEED.value, image_size=_IMAGE_SIZE.value,
                       heldout=_HELDOUT.value if _HELDOUT.present else None,
                       class_names=_CLASS_NAMES.value, augmentation=_AUGMENT.value,
                       neighbors=_neighbors(), cache_dir=_CACHE / "volumes")
    _refuse((_DATA, _HELDOUT), "--task=lm and segment")
    return StateTracking(config, seq_len=_SEQ_LEN.value, batch_size=_BATCH_SIZE.value,
                         seed=_SEED.value, eval_batches=_EVAL_BATCHES.value)


def _neighbors() -> int:
    """What the flag says, or the weights to begin with were trained on."""
    given = _NEIGHBORS.value
    if _INIT_FROM.value is None:
        return given or 0
    files = training.model_files(_INIT_FROM.value)
    if not (files / volumes.PREPROCESSING).is_file():
        return given or 0
    found = volumes.Preprocessing.load(files).neighbors
    if given not in (None, found):
        raise ValueError(f"--neighbors={given}: {_INIT_FROM.value} was trained with {found}; leave "
                         "it out")
    return found


def _refuse(given: Iterable[flags.FlagHolder], owner: str) -> None:
    for flag in given:
        if flag.present:
            raise ValueError(f"--{flag.name} is of {owner}; leave it out")


def _check_lora_flags() -> None:
    if _INIT_FROM.value is None:
        for flag in (_LORA_RANK, _LORA_ALPHA, _LORA_TARGETS):
            if flag.present:
                raise ValueError(f"--{flag.name} needs weights to adapt; give --init_from=DIR too")
    elif not _LORA_RANK.value and (_LORA_ALPHA.present or _LORA_TARGETS.present):
        raise ValueError("--lora_alpha and --lora_targets need adapters; give --lora_rank too, "
                         "such as --lora_rank=8")


def _choose_model(folder: Path) -> tuple[Any, str | None, training.Source | None]:
    """The model's config, its tokenizer, and the weights to start from, if any are given.

    A model that takes no text has no tokenizer.
    """
    settings = command.settings(_SET.value)
    if _INIT_FROM.value is None:
        config = zoo.config(_MODEL.value or _DEFAULT_MODEL, **settings)
        return config, _TOKENIZER.value or "bytes", None
    source = training.find_source(_INIT_FROM.value, folder)
    config = source.override(settings)
    if _MODEL.value is not None and zoo.config(_MODEL.value, **settings) != config:
        raise ValueError(f"--model={_MODEL.value} is another model than the one in "
                         f"{_INIT_FROM.value}; leave --model out")
    tokenizer = _TOKENIZER.value or source.tokenizer
    if tokenizer is None and config.kind == "language":
        raise ValueError(f"{_INIT_FROM.value} holds no tokenizer.json; give --tokenizer=FILE")
    return config, tokenizer, source


def _profiled(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit()):
        raise ValueError(f"--profile={text}: it must be FIRST:LAST, as in --profile=10:15")
    return int(first), int(last)


def _keep_compiled(folder: str) -> None:
    """Turns on jax's cache of compiled programs, unless its environment variable already has."""
    if folder and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", folder)


if __name__ == "__main__":
    command.run(main, computes=True)
