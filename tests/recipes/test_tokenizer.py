"""Tokenizers: bytes, and tokenizer.json files of the common families, trained here."""

import hashlib
import json
import sys

import numpy as np
import pytest

from recipes import tokenizer as tokenizer_lib

TEXT = "The quick brown fox, naïve café: 日本語 🦊 jumps  over\n\tthe lazy dog's 1234 tails.\r\n"


def test_bytes_ids_and_round_trip():
    tok = tokenizer_lib.load()
    assert (tok.bos_id, tok.eos_id, tok.pad_id, tok.vocab_size) == (256, 257, 258, 264)
    assert tok.encode("é\n") == [0xC3, 0xA9, 10]
    assert tok.encode(b"\xff\x00") == [255, 0]
    assert tok.decode(tok.encode(TEXT)) == TEXT
    assert tok.decode([256, 104, 263, 105, 257, 258, 9999, -1]) == "hi"
    assert tok.decode(np.array([0xC3, 0x41], np.int32)) == "\N{REPLACEMENT CHARACTER}A"


def test_bytes_special_tokens_are_text_unless_asked():
    tok = tokenizer_lib.load("bytes")
    assert tok.encode("<|eos|>") == list(b"<|eos|>")
    assert tok.encode("<|bos|>a<|eos|><|x|>", special=True) == [256, 97, 257, *b"<|x|>"]


def test_bytes_of_an_undecodable_command_line():
    tok = tokenizer_lib.load("bytes")
    assert tok.encode(b"a\xff".decode("utf-8", errors="surrogateescape")) == [97, 255]
    with pytest.raises(ValueError, match="lone surrogate .* at character 1"):
        tok.encode("a\ud800")


def test_bytes_batch_and_token_bytes():
    tok = tokenizer_lib.load("bytes")
    batch = tok.encode_batch(["ab", b"\x00\xff", ""])
    assert [ids.tolist() for ids in batch] == [[97, 98], [0, 255], []]
    pieces = tok.token_bytes()
    assert len(pieces) == 264
    assert pieces[:256] == [bytes([i]) for i in range(256)] and pieces[256:] == [b""] * 8
    assert tok.token_lengths.tolist() == [1] * 256 + [0] * 8


def test_unknown_name_and_missing_file(tmp_path):
    with pytest.raises(ValueError, match="'gpt2'.*give 'bytes'"):
        tokenizer_lib.load("gpt2")
    with pytest.raises(ValueError, match="tokenizer.json"):
        tokenizer_lib.load(str(tmp_path))


def test_library_missing(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'parazoo\[hf\]'"):
        tokenizer_lib.load(str(tmp_path))


def _train(kind, folder, **save):
    """Trains a small tokenizer of a family and saves folder/tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    bytes_256 = [f"<0x{i:02X}>" for i in range(256)]
    common = {"vocab_size": 700, "show_progress": False}
    if kind == "byte_level":
        tok = tokenizers.Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            **common,
        )
    elif kind == "byte_fallback":  # As in Llama 2 and Gemma.
        tok = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tok.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tok.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        # Byte tokens are ordinary vocabulary in such files, so they are no special tokens here.
        trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>", *bytes_256], **common)
    elif kind == "metaspace":
        tok = tokenizers.Tokenizer(models.Unigram())
        tok.pre_tokenizer = pre_tokenizers.Metaspace()
        tok.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            special_tokens=["<unk>", "</s>"], unk_token="<unk>", **common
        )
    elif kind == "word_piece":
        tok = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tok.decoder = decoders.WordPiece(cleanup=False)
        trainer = trainers.WordPieceTrainer(special_tokens=["[UNK]", "[CLS]", "[SEP]"], **common)
    else:
        tok = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
        tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]", "</s>"], **common)
    with open(tokenizer_lib.__file__, encoding="utf-8") as source:
        tok.train_from_iterator([*source.read().split("\n\n"), *[TEXT] * 9], trainer)
    saved = json.loads(tok.to_str())
    saved["added_tokens"] = [t for t in saved["added_tokens"] if t["content"] not in bytes_256]
    saved |= save
    (folder / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    return tokenizer_lib.load(str(folder))


KINDS = {"byte_level": "", "byte_fallback": " ", "metaspace": " ", "word_piece": " ", "none": " "}


@pytest.mark.parametrize("kind", KINDS)
def test_token_bytes_join_to_the_decoded_text(kind, tmp_path):
    tok = _train(kind, tmp_path)
    words = "The quick brown fox, naïve café: 日本語 jumps over the lazy dog's 1234 tails."
    text = TEXT if kind.startswith("byte") else words
    ids = tok.encode(text)
    pieces = tok.token_bytes()
    assert len(pieces) == tok.vocab_size > max(ids)
    assert tok.decode(ids) == text
    assert b"".join(pieces[i] for i in ids).decode() == KINDS[kind] + text
    assert tok.decode([*ids, tok.vocab_size, -1]) == text


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_any_character_survives_in_pieces(kind, tmp_path):
    tok = _train(kind, tmp_path)
    pieces = tok.token_bytes()
    text = "".join(chr(c) for c in [*range(1, 0x250), 0x3042, 0x1F600])
    ids = tok.encode(text)
    assert len(ids) > len(text)  # Characters never trained on fall into single bytes.
    assert b"".join(pieces[i] for i in ids).decode() == KINDS[kind] + text


def test_special_tokens_of_a_tokenizer_json(tmp_path):
    tok = _train("byte_level", tmp_path)
    assert tok.eos_id == 0 and tok.bos_id is None and tok.pad_id is None
    assert 0 not in tok.encode("a<|endoftext|>b")
    assert tok.decode(tok.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
    assert tok.encode("<|endoftext|>", special=True) == [0]
    assert 0 not in tok.encode_batch(["<|endoftext|>"])[0]
    assert tok.token_bytes()[0] == b"" and tok.decode([0]) == ""
    assert _train("byte_fallback", tmp_path).eos_id == 2
    assert _train("byte_fallback", tmp_path).bos_id == 1


def test_configured_special_tokens_win(tmp_path):
    config = {"eos_token": {"content": "<s>"}, "bos_token": "</s>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tok = _train("byte_fallback", tmp_path)
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (2, 1, None)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="tokenizer_config.json.*cannot be read"):
        tokenizer_lib.load(str(tmp_path))


def test_saved_truncation_and_padding_are_off(tmp_path):
    truncation = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padding = {
        "strategy": {"Fixed": 300},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    tok = _train("byte_level", tmp_path, truncation=truncation, padding=padding)
    assert tok.decode(tok.encode(TEXT)) == TEXT
    assert tok.encode(TEXT) == tok.encode_batch([TEXT])[0].tolist()


def test_batch_equals_single(tmp_path):
    tok = _train("byte_fallback", tmp_path)
    texts = [TEXT, b"bytes too", "", "x" * 100]
    assert [ids.tolist() for ids in tok.encode_batch(texts)] == [tok.encode(t) for t in texts]
    with pytest.raises(ValueError, match="0xff at offset 1"):
        tok.encode(b"a\xff")


def test_fingerprint_is_of_the_contents(tmp_path):
    tok = _train("word_piece", tmp_path)
    contents = (tmp_path / "tokenizer.json").read_bytes()
    assert tok.fingerprint == hashlib.sha256(contents).hexdigest()
    assert tokenizer_lib.load(str(tmp_path / "tokenizer.json")).fingerprint == tok.fingerprint
    assert tokenizer_lib.load("bytes").fingerprint != tok.fingerprint


def test_bad_files_are_one_line_errors(tmp_path):
    tok = _train(
        "word_piece",
        tmp_path,
        decoder={"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    )
    with pytest.raises(ValueError, match="decoder of type 'CTC'"):
        tok.token_bytes()
    for contents in (b"{}", b"\xff\xfe", b"not json"):
        (tmp_path / "tokenizer.json").write_bytes(contents)
        with pytest.raises(ValueError, match="cannot be read") as error:
            tokenizer_lib.load(str(tmp_path))
        assert "\n" not in str(error.value)
