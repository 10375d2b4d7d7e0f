"""recipes.convert from the command line, and recipes.decode of what Hugging Face has."""

import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file
from tokenizers import decoders, models, pre_tokenizers, processors

import zoo
from recipes import command, convert, decode
from tests import tiny

TEMPLATE = ("{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
            "<|im_end|>\n{% endfor %}<|im_start|>assistant\n")
SPECIAL = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]


def save_tokenizer(folder) -> tokenizers.Tokenizer:
    """Bytes, four special tokens, and a template that puts <|bos|> before a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(SPECIAL)
    tok.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 256)])
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": TEMPLATE}))
    return tok


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A small Qwen 3 as Hugging Face has it, with a tokenizer and a chat template."""
    config = tiny.config("qwen3-8b", vocab_size=260, max_length=256, **{"norm.eps": 1e-6})
    folder = tmp_path_factory.mktemp("theirs") / "qwen"
    zoo.to_hf(tiny.model(config), folder)
    save_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 259, 100000]}')
    return folder


def run(module, *args) -> int:
    return command.execute(module.main, [module.__name__, *map(str, args)])


def test_there_and_back(theirs, tmp_path, capsys):
    assert run(convert, f"--source={theirs}", f"--out={tmp_path / 'ours'}", "--check") == 0
    assert "hold the same numbers" in capsys.readouterr().out
    assert run(convert, f"--source={tmp_path / 'ours'}", "--to=hf",
               f"--out={tmp_path / 'back'}") == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (theirs / name).read_bytes()
    a, b = (load_file(d / "model.safetensors") for d in (theirs, tmp_path / "back"))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_experts_there_and_back(tmp_path, capsys):
    """Theirs are a tensor each, ours one for all of a kind."""
    config = tiny.config("mixtral-8x7b", **{"norm.eps": 1e-5})
    zoo.to_hf(tiny.model(config), tmp_path / "theirs")
    assert run(convert, f"--source={tmp_path / 'theirs'}", f"--out={tmp_path / 'ours'}",
               "--check") == 0
    assert run(convert, f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'back'}", "--to=hf",
               "--check") == 0
    assert capsys.readouterr().out.count("hold the same numbers") == 2
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("theirs", "back"))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_a_filled_up_vocabulary_there_and_back(tmp_path, capsys):
    """From directory to directory, tensor by tensor; and a model of it in memory is the same."""
    zoo.to_hf(tiny.model(tiny.config("llama-tiny", vocab_size=41, tie_embeddings=False)),
              tmp_path / "theirs")
    assert run(convert, f"--source={tmp_path / 'theirs'}", f"--out={tmp_path / 'ours'}",
               "--vocab_multiple=16", "--check") == 0
    assert run(convert, f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'back'}", "--to=hf",
               "--check") == 0
    assert capsys.readouterr().out.count("hold the same numbers") == 2
    assert load_file(tmp_path / "ours" / "model.safetensors")["head"].shape[1] == 48
    tiny.assert_same(zoo.load(tmp_path / "ours"), zoo.load(tmp_path / "theirs", vocab_multiple=16))
    a, b = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("theirs", "back"))
    assert a == b


def test_float16_there_and_back(theirs, tmp_path):
    model = zoo.load(theirs)
    zoo.to_hf(model, tmp_path / "theirs", dtype="float16")
    run(convert, f"--source={tmp_path / 'theirs'}", f"--out={tmp_path / 'ours'}")
    run(convert, f"--source={tmp_path / 'ours'}", "--to=hf", f"--out={tmp_path / 'back'}")
    a, b = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("theirs", "back"))
    assert a == b
    params = zoo.protocol.split(zoo.load(tmp_path / "ours"))[1]
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}


def test_a_model_that_transformers_does_not_have(tmp_path, capsys):
    """Checked without it; of its two layouts the one asked for, then that of the source."""
    config = tiny.config("xlstm-mixed-tiny", **{"mlstm.norm_eps": 1e-5, "slstm.norm_eps": 1e-5})
    zoo.save(tiny.model(config), tmp_path / "ours")
    for source, out, *kind in (("ours", "cuda", "--kind=xlstm_lm_cuda"), ("cuda", "again"),
                               ("ours", "vanilla")):
        assert run(convert, f"--source={tmp_path / source}", "--to=hf", f"--out={tmp_path / out}",
                   "--check", *kind) == 0
    out = capsys.readouterr().out
    assert out.count("hold the same numbers") == 3
    assert out.count("transformers has no xLSTMLMModel, so the models were not run") == 3
    cuda, again, vanilla = (load_file(tmp_path / name / "model.safetensors")[
        "xlstm_block_stack.blocks.1.xlstm.slstm_cell._recurrent_kernel_"]
        for name in ("cuda", "again", "vanilla"))
    assert np.array_equal(cuda, again) and np.array_equal(cuda.swapaxes(1, 2), vanilla)


def test_another_dtype_is_checked_as_cast(theirs, tmp_path, capsys):
    out = tmp_path / "half"
    assert run(convert, f"--source={theirs}", "--to=hf", f"--out={out}", "--dtype=bfloat16",
               "--check") == 0
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    capsys.readouterr()


@pytest.mark.parametrize(("args", "message"), [
    ((), "--source is needed"),
    (("--source=x",), "--out is needed"),
    (("--source=nowhere", "--out=y"), "nowhere"),
    (("--source={theirs}", "--out={theirs}"), "exists already"),
    (("--source={theirs}", "--out=y", "--to=torch"), "--to"),
    (("--source={theirs}", "--out=y", "--check_tokens=0"), "--check_tokens=0"),
    (("--source={theirs}", "--out=y", "--step=3"), "--step=3"),
    (("--source={theirs}", "--out=y", "--kind=llama"), "--kind=llama"),
    (("--source={theirs}", "--out=y", "--to=hf", "--kind=xlstm"), "kind is 'xlstm'; a Transf"),
    (("--source={theirs}", "--out=y", "--to=hf", "--vocab_multiple=8"), "--vocab_multiple=8"),
])
def test_errors(theirs, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    assert run(convert, *(arg.format(theirs=theirs) for arg in args)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert list(tmp_path.iterdir()) == []


def prompts_of(monkeypatch) -> list:
    """What decode hands to the engine, in place of an answer."""
    seen = []

    def generate(model, prompts, count, **options):
        seen.append((prompts, options["stop_tokens"]))
        raise ValueError("seen")

    monkeypatch.setattr(decode.zoo, "generate", generate)
    return seen


def test_decoding_what_hugging_face_has(theirs, capsys):
    assert run(decode, f"--checkpoint={theirs}", "--prompt=def ", "--max_new_tokens=4",
               "--json") == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[0])
    model, tok = zoo.load(theirs), tokenizers.Tokenizer.from_file(str(theirs / "tokenizer.json"))
    expected = zoo.generate(model, [tok.encode("def ").ids], 4, stop_tokens=[257, 259])
    assert answer["tokens"] == expected.tokens[0]


def test_prompts_begin_as_the_tokenizer_says(theirs, monkeypatch, capsys):
    seen = prompts_of(monkeypatch)
    with pytest.raises(ValueError, match="seen"):
        run(decode, f"--checkpoint={theirs}", "--prompt=a<|eos|>", "--json")
    (prompt,), stops = seen[0]
    assert prompt[0] == 256 and 257 not in prompt and len(prompt) == 1 + len("a<|eos|>")
    assert stops == [257, 259]  # of the tokenizer and of generation_config.json; 100000 is no id
    capsys.readouterr()


def test_chat(theirs, monkeypatch, capsys):
    seen = prompts_of(monkeypatch)
    with pytest.raises(ValueError, match="seen"):
        run(decode, f"--checkpoint={theirs}", "--prompt=Hi", "--chat", "--json")
    (prompt,), _ = seen[0]
    tok = tokenizers.Tokenizer.from_file(str(theirs / "tokenizer.json"))
    # Jinja leaves the newline out that ends a template.
    text = "<|bos|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant"
    assert prompt == tok.encode(text, add_special_tokens=False).ids
    assert [prompt.count(i) for i in (256, 258, 259)] == [1, 2, 1]
    capsys.readouterr()


def test_a_directory_without_a_config(theirs, tmp_path, capsys):
    folder = shutil.copytree(theirs, tmp_path / "bare")
    (folder / "config.json").unlink()
    for module, *args in ((convert, f"--source={folder}", "--out=x"),
                          (decode, f"--checkpoint={folder}", "--prompt=Hi")):
        assert run(module, *args) == 2
        assert "has no config.json" in capsys.readouterr().err


def test_without_a_tokenizer_no_weights_are_read(theirs, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(theirs, tmp_path / "bare")
    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr(zoo, "load", None)
    assert run(decode, f"--checkpoint={folder}", "--prompt=Hi") == 2
    assert "holds no tokenizer.json; put the model's there" in capsys.readouterr().err


def test_chat_without_a_template(theirs, tmp_path, capsys):
    zoo.to_hf(zoo.load(theirs), tmp_path / "bare")
    assert run(decode, f"--checkpoint={tmp_path / 'bare'}", "--prompt=Hi", "--chat") == 2
    assert "no chat template" in capsys.readouterr().err
