"""Converts models between Hugging Face's directories and this project's, tensor by tensor.

  python -m recipes.convert --source=Qwen3-0.6B --to=native --out=models/qwen3 --check
  python -m recipes.convert --source=models/qwen3 --to=hf --out=qwen3-tuned --dtype=bfloat16
  python -m recipes.convert --source=runs/a --to=hf --out=my-model

--source is a directory of Hugging Face's (config.json and *.safetensors), one of this project's,
or a training run's workdir. Of the first two only a tensor at a time is in memory. Tokenizer,
chat template and generation settings come along. --out appears when all of it is written; what is
half done is called OUT.unfinished. --check reads both sides again and compares every number; where
torch and transformers are installed it also runs both models on the same tokens, layer by layer.
"""

from pathlib import Path

import numpy as np
from absl import flags

from recipes import command, parity, training
from recipes.progress import Bytes
from zoo import convert
from zoo.convert import saving
from zoo.convert.source import open_source

with command.group("What"):
    SOURCE = flags.DEFINE_string("source", None, "The model's directory. Needed.")
    TO = flags.DEFINE_enum("to", "native", ["native", "hf"],
                           "Of what kind the new directory is: native or hf.")
    OUT = flags.DEFINE_string("out", None, "Its name; there must be nothing of it yet. Needed.")
    DTYPE = flags.DEFINE_enum("dtype", None, list(saving.DTYPES),
                              "Of the numbers written; left out, that of the source's, or "
                              "float32 where they differ.")
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
    if training.find_run(folder) is not None:
        _convert_run(folder, dtype)
    elif STEP.value is not None:
        raise ValueError(f"--step={STEP.value}: {folder} holds a model, not a training run with "
                         "checkpoints; leave --step out")
    else:
        _convert(folder, dtype)
    print(f"{OUT.value} is written.")


def _convert_run(folder: Path, dtype) -> None:
    """From a workdir, whose checkpoints are read as a whole."""
    model, _, _ = training.load_model(folder, step=STEP.value)
    write = convert.save if TO.value == "native" else convert.to_hf
    write(model, OUT.value, dtype, like=training.model_files(folder))
    if CHECK.value:
        with open_source(OUT.value) as target:
            _report(saving.compare_with_model(model, target, dtype), target)
            if target.family is not None:
                parity.compare(model, target.folder, CHECK_TOKENS.value)


def _convert(folder: Path, dtype) -> None:
    """From a directory of weights, tensor by tensor."""
    with open_source(folder) as source:
        dtype = source.dtype if dtype is None else dtype
        total = sum(int(np.prod(shape, dtype=np.int64)) for shape, _ in
                    source.table.tensors.values()) * dtype.itemsize
        write = saving.write_native if TO.value == "native" else saving.write_hf
        with Bytes("writing", total) as progress:
            write(OUT.value, source.config, saving.from_source(source), dtype, folder,
                  progress.add)
        if not CHECK.value:
            return
        with open_source(OUT.value) as target:
            with Bytes("comparing", source.weights.total_bytes) as progress:
                _report(saving.compare(source, target, dtype, progress.add), target)
            theirs = next((s.folder for s in (target, source) if s.family is not None), None)
            if theirs is not None:
                ours = source if theirs == target.folder else target
                parity.compare(convert.load(ours.folder), theirs, CHECK_TOKENS.value)


def _report(differences, target) -> None:
    wrong = [f"{path} {what}" for path, what in differences]
    if wrong:
        raise ValueError(f"{target.folder} is not what was converted: {len(wrong)} parts of "
                         f"parameters differ, first {wrong[0]}; convert again to a new directory")
    print(f"checked: all {len(target.weights)} tensors of {target.folder} hold the same numbers")


if __name__ == "__main__":
    command.run(main)
