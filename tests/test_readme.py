"""README's commands and examples run as they stand there, only smaller and for a shorter time."""

import json
import pathlib
import re
import shlex

import numpy as np
import pytest

import zoo
from recipes import command, convert, decode, overlays, segment, train
from tests import tiny
from tests.recipes.small_run import MODEL
from tests.recipes.test_convert import save_tokenizer

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
RECIPES = {"train": train, "decode": decode, "convert": convert, "segment": segment}
SMALLER = {
    "train": ["--steps=2", "--batch_size=8", "--warmup_steps=0", "--compile_cache="],
    "decode": ["--max_new_tokens=2"],
}
# By the model; None: where none is named.
SMALLER_MODELS = {
    "llama-tiny": ["--seq_len=16", "--heldout=0", MODEL],
    "paratranscnn-tiny": ["--image_size=16", "--set=cnn.width=8,transformer=none"],
    None: ["--seq_len=16", "--heldout=0"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader of README would be, with the model that it has in mind, but a tiny one."""
    folder = tmp_path_factory.mktemp("reader")
    config = tiny.config("qwen3-0.6b", vocab_size=260, max_length=256, **{"norm.eps": 1e-6})
    zoo.to_hf(tiny.model(config), folder / "Qwen3-0.6B")
    save_tokenizer(folder / "Qwen3-0.6B")
    with (folder / "notes.jsonl").open("w") as file:
        for i in range(40):
            file.write(json.dumps({"text": f"note {i}: {'na ' * 20}"}) + "\n")
    (folder / "scans").mkdir()
    for path in [folder / "scan.nii.gz", *(folder / f"scans/{i}.nii.gz" for i in range(4))]:
        labels = np.zeros((2, 16, 16), np.uint8)
        labels[:, 4:9, 4:9] = 1
        overlays.write_mask(path, labels, np.eye(4))
        overlays.write_mask(path.with_name(path.name.replace(".nii", "_seg.nii")), labels,
                            np.eye(4))
    return folder


def commands() -> list[list[str]]:
    """The recipes' command lines, in order."""
    lines = "\n".join(text for kind, text in BLOCKS if kind == "sh").replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in lines.splitlines() if "recipes." in line]


def test_commands(folder, monkeypatch, capfd):
    """In one go: later ones use what earlier ones made. plan and bench need libraries of others."""
    monkeypatch.chdir(folder)
    ran = []
    for line in commands():
        name = line[2].removeprefix("recipes.")
        if name not in RECIPES:
            continue
        smaller = SMALLER.get(name, [])
        if name == "train":
            model = next((flag[8:] for flag in line if flag.startswith("--model=")), None)
            smaller = smaller + SMALLER_MODELS[model]
        assert command.execute(RECIPES[name].main, [name, *line[3:], *smaller]) == 0, (
            line, capfd.readouterr().err)
        ran.append(name)
    assert ran == ["train", "decode", "convert", "decode", "train", "train", "segment"]


@pytest.mark.parametrize("index", range(sum(kind == "python" for kind, _ in BLOCKS)))
def test_examples(index, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "Qwen3-0.6B").symlink_to(folder / "Qwen3-0.6B")
    monkeypatch.chdir(tmp_path)
    code = [text for kind, text in BLOCKS if kind == "python"][index]
    exec(compile(code, f"README example {index}", "exec"), {"zoo": zoo})


def test_every_preset_is_named():
    table = README.partition("## Models")[2].partition("## From Python")[0]
    assert set(zoo.list()) == set(re.findall(r"`([\w.-]+)`", table))
