"""Converts models between Hugging Face's directories and this project's, tensor by tensor.

  python -m recipes.convert --source=Qwen3-0.6B --to=native --out=models/qwen3 --check
  python -m recipes.convert --source=models/qwen3 --to=hf --out=qwen3-tuned --dtype=bfloat16
  python -m recipes.convert --source=runs/a --to=hf --out=my-model

--source is a directory of Hugging Face's (config.json and *.safetensors), one of this project's,
or a training run's workdir. Of the first two only a tensor at a time is in memory. Tokenizer,
chat template and generation settings come along. --out appears when all of it is written; what is
half done is called OUT.unfinished. --check reads both sides again and compares every number; where
torch and transformers are installed it also runs both models on the same tokens, layer by layer.
--vocab_multiple=128 fills a vocabulary that does not divide over a mesh, as GPT-2's 50257, up with
rows that are no token, so that it can be sharded; the way back leaves them out.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags

from recipes import command, parity, training
from recipes.progress import Bytes
from zoo import convert
from zoo.convert import saving
from zoo.convert.source import Source, open_source

with command.group("What"):
    SOURCE = flags.DEFINE_string("source", None, "The model's directory. Needed.")
    TO = flags.DEFINE_enum("to", "native", ["native", "hf"],
                           "Of what kind the new directory is: native or hf.")
    OUT = flags.DEFINE_string("out", None, "Its name; there must be nothing of it yet. Needed.")
    KIND = flags.DEFINE_string("kind", None, "To hf: of which model_type, where several can hold "
                               "the model, as xlstm_lm_cuda; left out, the source's or the first.")
    DTYPE = flags.DEFINE_enum("dtype", None, list(saving.DTYPES),
                              "Of the numbers written; left out, that of the source's, or "
                              "float32 where they differ.")
    VOCAB_MULTIPLE = flags.DEFINE_integer(
        "vocab_multiple", None, "From hf to native: the token table and the head get zeros up to a "
        "multiple of this many tokens; left out, none.")
    STEP = flags.DEFINE_integer("step", None, "Of a workdir, which checkpoint; left out, the "
                                "newest whole one.")
with command.group("Check"):
    CHECK = flags.DEFINE_bool("check", False, "Compare both sides afterwards.")
    CHECK_TOKENS = flags.DEFINE_integer("check_tokens", 64, "On how many tokens both models run.")


def main() -> None:
    """Converts what the flags say."""
    for flag in (SOURCE, OUT):
        if not flag.value:
            raise ValueError(f"--{flag.name} is needed; --help has examples")
    if CHECK_TOKENS.value < 1:
        raise ValueError(f"--check_tokens={CHECK_TOKENS.value}: it must be at least 1")
    folder = Path(SOURCE.value).expanduser()
    dtype = None if DTYPE.value is None else saving.DTYPES[DTYPE.value]
    is_run = training.find_run(folder) is not None
    if VOCAB_MULTIPLE.value is not None and (is_run or TO.value == "hf"):
        raise ValueError(f"--vocab_multiple={VOCAB_MULTIPLE.value}: only a model of Hugging Face's "
                         "is filled up, with --to=native; leave it out")
    if KIND.value is not None and TO.value != "hf":
        raise ValueError(f"--kind={KIND.value}: --to={TO.value} has one; leave it out")
    if is_run:
        _convert_run(folder, dtype)
    elif STEP.value is not None:
        raise ValueError(f"--step={STEP.value}: {folder} holds a model, not a training run with "
                         "checkpoints; leave --step out")
    else:
        _convert(folder, dtype)
    print(f"{OUT.value} is written.")


def _convert_run(folder: Path, dtype) -> None:
    """From a workdir, whose checkpoints are read as a whole."""
    model, _, _ = training.load_model(folder, step=STEP.value, kind=None)
    write = convert.save if TO.value == "native" else _with_kind(convert.to_hf)
    write(model, OUT.value, dtype, like=training.model_files(folder))
    if CHECK.value:
        with open_source(OUT.value, vocab_multiple=_multiple(model.config)) as target:
            _report(saving.compare_with_model(model, target, dtype), target)
            if target.family is not None:
                _run_both(lambda: model, target)


def _convert(folder: Path, dtype) -> None:
    """From a directory of weights, tensor by tensor."""
    with open_source(folder, vocab_multiple=VOCAB_MULTIPLE.value) as source:
        dtype = source.dtype if dtype is None else dtype
        total = sum(int(np.prod(shape, dtype=np.int64)) for shape, _ in
                    source.table.tensors.values()) * dtype.itemsize
        write = saving.write_native if TO.value == "native" else _with_kind(saving.write_hf)
        with Bytes("writing", total) as progress:
            write(OUT.value, source.config, saving.from_source(source), dtype, folder,
                  progress.add)
        if not CHECK.value:
            return
        with open_source(OUT.value, vocab_multiple=_multiple(source.config)) as target:
            with Bytes("comparing", source.weights.total_bytes) as progress:
                _report(saving.compare(source, target, dtype, progress.add), target)
            theirs = next((s for s in (target, source) if s.family is not None), None)
            if theirs is not None:
                ours = source if theirs is target else target
                _run_both(lambda: convert.load(ours.folder), theirs)


def _run_both(load: Callable, theirs: Source) -> None:
    """A model of ours beside theirs, where transformers has it."""
    if theirs.family.in_transformers:
        parity.compare(load(), theirs.folder, CHECK_TOKENS.value)
    else:
        print(f"transformers has no {theirs.family.architecture}, so the models were not run side "
              "by side")


def _with_kind(write: Callable) -> Callable:
    return functools.partial(write, kind=KIND.value)


def _multiple(config) -> int | None:
    """That of a language model, which a config.json of Hugging Face's does not say."""
    return getattr(config, "vocab_multiple", None)


def _report(differences, target) -> None:
    wrong = [f"{path} {what}" for path, what in differences]
    if wrong:
        raise ValueError(f"{target.folder} is not what was converted: {len(wrong)} parts of "
                         f"parameters differ, first {wrong[0]}; convert again to a new directory")
    print(f"checked: all {len(target.weights)} tensors of {target.folder} hold the same numbers")


if __name__ == "__main__":
    command.run(main)
