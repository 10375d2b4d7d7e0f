"""README's commands and examples run as they stand there, only smaller and for a shorter time."""

import json
import pathlib
import re
import shlex

import pytest

import zoo
from recipes import command, convert, decode, train
from tests import tiny
from tests.recipes.small_run import MODEL
from tests.recipes.test_convert import save_tokenizer

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
RECIPES = {"train": train, "decode": decode, "convert": convert}
SMALLER = {
    "train": ["--steps=2", "--seq_len=16", "--batch_size=8", "--warmup_steps=0",
              "--heldout=0", "--compile_cache="],
    "decode": ["--max_new_tokens=2"], "convert": [],
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
        smaller = SMALLER[name] + ([MODEL] if "--model=llama-tiny" in line else [])
        assert command.execute(RECIPES[name].main, [name, *line[3:], *smaller]) == 0, (
            line, capfd.readouterr().err)
        ran.append(name)
    assert ran == ["train", "decode", "convert", "decode", "train"]


@pytest.mark.parametrize("index", range(sum(kind == "python" for kind, _ in BLOCKS)))
def test_examples(index, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "Qwen3-0.6B").symlink_to(folder / "Qwen3-0.6B")
    monkeypatch.chdir(tmp_path)
    code = [text for kind, text in BLOCKS if kind == "python"][index]
    exec(compile(code, f"README example {index}", "exec"), {"zoo": zoo})


def test_every_preset_is_named():
    table = README.partition("## Models")[2].partition("## From Python")[0]
    assert set(zoo.list()) == set(re.findall(r"`([\w.-]+)`", table))
