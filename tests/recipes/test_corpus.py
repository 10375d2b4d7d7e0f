"""Corpora: what each kind of source holds, what is refused, the split and the gzip baseline."""

import gzip
import hashlib
import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from recipes import corpus as corpus_lib
from recipes import tokenizer as tokenizer_lib

EOS = 257


@pytest.fixture
def tok():
    return tokenizer_lib.load("bytes")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _texts(corpus):
    return [corpus.text(d) for d in range(corpus.num_documents)]


def _refused(match, spec, tok, **kwargs):
    with pytest.raises(ValueError, match=match) as error:
        corpus_lib.load(spec, tok, **kwargs)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def stdlib():
    return corpus_lib.load("stdlib", tokenizer_lib.load("bytes"))


def test_stdlib_is_the_library_sources(stdlib):
    assert stdlib.names == sorted(stdlib.names)
    assert {"abc.py", "asyncio/base_events.py", "unittest/case.py"} <= set(stdlib.names)
    folders = {part for name in stdlib.names for part in name.split("/")[:-1]}
    assert not folders & {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    doc_id = stdlib.names.index("json/decoder.py")
    assert stdlib.text(doc_id) == Path(json.decoder.__file__).read_bytes()
    assert stdlib.num_bytes > 5e6
    assert stdlib.bytes_per_token == pytest.approx(1, abs=0.01)


def test_stdlib_layout_and_manifest(stdlib):
    assert stdlib.tokens.dtype == np.uint16 and not stdlib.tokens.flags.writeable
    assert stdlib.starts[0] == 0 and stdlib.starts[-1] == len(stdlib.tokens)
    assert np.all(np.diff(stdlib.starts) == stdlib.document_bytes + 1)
    np.testing.assert_array_equal(np.flatnonzero(stdlib.tokens == EOS), stdlib.starts[1:] - 1)
    assert json.loads(json.dumps(stdlib.manifest)) == {
        "spec": "stdlib",
        "kind": "stdlib",
        "documents": len(stdlib.names),
        "tokens": len(stdlib.tokens),
        "bytes": stdlib.num_bytes,
        "sha256": hashlib.sha256(stdlib.tokens.tobytes() + stdlib.starts.tobytes()).hexdigest(),
        "tokenizer": stdlib.tokenizer.fingerprint,
    }
    again = corpus_lib.load("stdlib", stdlib.tokenizer)
    assert again.manifest == stdlib.manifest


def test_files_directories_and_globs(here, tok):
    (here / "b.txt").write_text("beta")
    (here / "a.log").write_bytes(b"al\xc3\xa9\r\n")
    folder = here / "d"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "x.txt").write_text("hidden")
    (folder / "z.md").write_text("zed")
    (folder / "sub" / "y.py").write_text("why")
    (folder / "sub" / "empty.py").write_text("")
    (folder / "picture.png").write_bytes(b"\x89PNG\x00")
    corpus = corpus_lib.load("b.txt, a.log,d", tok)
    assert _texts(corpus) == [b"beta", b"al\xc3\xa9\r\n", b"why", b"zed"]
    assert corpus.names == ["b.txt", "a.log", "d/sub/y.py", "d/z.md"]
    assert corpus.document(0).tolist() == [*b"beta", EOS]
    assert corpus.document_bytes.tolist() == [4, 6, 3, 3] and corpus.num_bytes == 16
    assert corpus.manifest["kind"] == "text"
    assert _texts(corpus_lib.load("d/**/*.*[dy]", tok)) == [b"why", b"zed"]
    # A file that two pieces name is there once.
    assert corpus_lib.load("d/z.md,d,./d/z.md", tok).names == ["d/z.md", "d/sub/y.py"]


def test_jsonl(here, tok):
    lines = ['\ufeff{"text": "one", "id": 3}', "", '{"text": ""}', '{"text": "tw\\u00f6\\u0000"}']
    (here / "x.jsonl").write_text("\n".join(lines), encoding="utf-8")
    corpus = corpus_lib.load("x.jsonl", tok)
    assert _texts(corpus) == [b"one", b"tw\xc3\xb6\x00"]
    assert corpus.names == ["x.jsonl:1", "x.jsonl:4"]
    assert corpus.manifest["kind"] == "jsonl"


@pytest.mark.parametrize(
    "line, match",
    [
        (b"{", "x.jsonl:2: not JSON"),
        (b"[1]", 'x.jsonl:2: no string in field "text"'),
        (b'{"txt": "a"}', 'x.jsonl:2: no string in field "text"'),
        (b'{"text": 5}', 'x.jsonl:2: no string in field "text"'),
        (b'{"text": "\xff"}', "x.jsonl:2: not UTF-8 at byte 10"),
        (b'{"text": "\\ud800"}', "x.jsonl:2: .*lone surrogate"),
        (b"[" * 100_000, "x.jsonl:2: not JSON"),
    ],
)
def test_bad_jsonl_names_the_line(here, tok, line, match):
    (here / "x.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    _refused(match, "x.jsonl", tok)


def test_missing_paths_name_the_nearest(here, tok):
    (here / "train.txt").write_text("a")
    (here / "other").mkdir()
    _refused("'trian.txt': no such file.*nearest is 'train.txt'", "trian.txt", tok)
    _refused("nearest is 'stdlib'", "stdlb", tok)
    _refused("nearest is 'other'", "othr/x/y.txt", tok)
    _refused("'other' is empty", "other/x.txt", tok)
    _refused("pattern matches no file", "*.md", tok)
    _refused("directory holds no text", "other", tok)
    _refused("names nothing", " , ", tok)


def test_empty_and_binary_files(here, tok):
    (here / "empty.txt").write_text("")
    (here / "empty.jsonl").write_text("\n")
    (here / "nul.txt").write_bytes(b"abc\x00\xff")
    (here / "latin.txt").write_bytes(b"caf\xe9 ol\xe9")
    _refused("empty.txt: the file is empty", "empty.txt", tok)
    _refused("empty.jsonl: the file has no documents", "empty.jsonl", tok)
    _refused("none with any text", "empty.*", tok)
    _refused("nul.txt: a NUL byte at offset 3", "nul.txt", tok)
    _refused("latin.txt: byte 0xe9 at offset 3", "latin.txt", tok)
    _refused("latin.txt: byte 0xe9 at offset 3", ".", tok)


def test_no_eos_is_refused(here, tok):
    tok.eos_id = None
    _refused("no end-of-text token", "stdlib", tok)


def _write_binary(path, documents, sidecar=None):
    """A .bin of bytes documents, of the sidecar's dtype, and the sidecar if there is one."""
    dtype = sidecar["dtype"] if sidecar else "uint16"
    np.concatenate([np.array([*doc, EOS]) for doc in documents]).astype(dtype).tofile(path)
    if sidecar:
        path.with_suffix(".json").write_text(json.dumps(sidecar))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("chunk", [3, 1 << 22])
def test_binary(here, tok, dtype, chunk, monkeypatch):
    monkeypatch.setattr(corpus_lib, "_CHUNK_TOKENS", chunk)
    documents = [b"abcd", b"", b"efghijk", b"\xff"]
    sidecar = {"dtype": dtype, "eos_id": EOS, "vocab_size": 264}
    _write_binary(here / "x.bin", documents, sidecar if dtype == "uint32" else None)
    corpus = corpus_lib.load("x.bin", tok)
    assert corpus.tokens.dtype == dtype and corpus.names is None
    assert _texts(corpus) == documents
    assert corpus.starts.tolist() == [0, 5, 6, 14, 16]
    assert corpus.document_bytes.tolist() == [4, 0, 7, 1]
    stream = (here / "x.bin").read_bytes() + corpus.starts.tobytes()
    assert corpus.manifest["sha256"] == hashlib.sha256(stream).hexdigest()
    assert corpus.manifest["kind"] == "bin"
    with pytest.raises(ValueError, match="read-only"):
        corpus.tokens[0] = 1


def test_binary_hash_is_of_the_ids_alone(here, tok, monkeypatch):
    _write_binary(here / "x.bin", [b"abcd", b"efghijk", b"abcd"])
    _write_binary(here / "y.bin", [b"efghijk", b"abcd"], {"dtype": "uint32"})
    a, b, a_again = corpus_lib.load("x.bin", tok).document_hashes
    assert a == a_again != b
    monkeypatch.setattr(corpus_lib, "_CHUNK_TOKENS", 3)
    assert corpus_lib.load("y.bin", tok).document_hashes.tolist() == [b, a]


def test_binary_without_a_last_eos(here, tok):
    np.array([1, 2, EOS, 3, 4], "<u2").tofile(here / "x.bin")
    corpus = corpus_lib.load(".", tok)
    assert corpus.starts.tolist() == [0, 3, 5]
    assert corpus.document_bytes.tolist() == [2, 2]


def test_binary_is_never_copied_whole(here, tok, monkeypatch):
    monkeypatch.setattr(corpus_lib, "_CHUNK_TOKENS", 1 << 15)
    size = 4_000_000
    np.full(size, 65, "<u2").tofile(here / "x.bin")
    tracemalloc.start()
    try:
        corpus = corpus_lib.load("x.bin", tok)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert corpus.manifest["tokens"] == size
    assert peak < size / 2  # Bytes; the tokens are 2 * size.


def test_bad_binaries(here, tok):
    (here / "empty.bin").write_bytes(b"")
    (here / "odd.bin").write_bytes(b"abc")
    np.array([1, 2, EOS, 264, 9, 70], "<u2").tofile(here / "big.bin")
    _refused("empty.bin: the file is empty", "empty.bin", tok)
    _refused("odd.bin: 3 bytes is no multiple of 2", "odd.bin", tok)
    _refused("id 264 at position 3 is outside the vocabulary of 264", "big.bin", tok)
    _refused("a .bin is read alone", "stdlib,big.bin", tok)


@pytest.mark.parametrize(
    "sidecar, match",
    [
        ("{", "x.json: not JSON"),
        ("[]", "x.json: not an object"),
        ('{"dtype": "int64"}', "dtype 'int64' is not one of uint16, uint32"),
        ('{"eos_id": 50256}', "eos_id 50256, but the tokenizer has 257"),
        ('{"eos_id": "x"}', "eos_id 'x' is not a natural number"),
        ('{"vocab_size": 50257}', "vocab_size 50257, but the tokenizer has 264"),
    ],
)
def test_bad_sidecars(here, tok, sidecar, match):
    _write_binary(here / "x.bin", [b"abc"])
    (here / "x.json").write_text(sidecar)
    _refused(match, "x.bin", tok)


@pytest.fixture
def words(here):
    """A tokenizer that has to be asked: one id per word."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "two": 2, "words": 3}, "<unk>")
    tok = tokenizers.Tokenizer(model)
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # Also splits off punctuation.
    tok.add_special_tokens(["<unk>", "</s>"])
    tok.save(str(here / "tokenizer.json"))
    return tokenizer_lib.load(str(here / "tokenizer.json"))


def test_other_tokenizers(here, words, monkeypatch):
    monkeypatch.setattr(corpus_lib, "_CHUNK_BYTES", 12)
    texts = ["two words", "words </s> two", "  ", "two"]
    (here / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    corpus = corpus_lib.load("x.jsonl", words)
    documents = [corpus.document(d).tolist() for d in range(4)]
    assert documents == [[2, 3, 1], [3, 0, 0, 0, 2, 1], [1], [2, 1]]  # Text forges no eos.
    assert corpus.tokens.dtype == np.uint8
    assert corpus.document_bytes.tolist() == [9, 14, 2, 3]
    assert corpus.bytes_per_token == 28 / 12


def test_cache(here, words, monkeypatch, caplog):
    (here / "x.jsonl").write_text('{"text": "two words"}\n{"text": "words"}\n')
    first = corpus_lib.load("x.jsonl", words, cache_dir="cache")
    (tokens_file,) = (here / "cache").glob("*.npy")
    (index_file,) = (here / "cache").glob("*.npz")
    assert len(list((here / "cache").iterdir())) == 2  # No temporary file stays.

    def same(corpus):
        np.testing.assert_array_equal(corpus.tokens, first.tokens)
        np.testing.assert_array_equal(corpus.starts, first.starts)
        np.testing.assert_array_equal(corpus.document_bytes, first.document_bytes)
        np.testing.assert_array_equal(corpus.document_hashes, first.document_hashes)
        assert (corpus.names, corpus.manifest) == (first.names, first.manifest)

    with monkeypatch.context() as patch:
        patch.setattr(words, "encode_batch", None)  # The second run asks no tokenizer.
        same(corpus_lib.load("x.jsonl", words, cache_dir="cache"))
    # A damaged cache is made again, aloud: bytes changed, or a file cut short.
    for file, array in ((tokens_file, first.tokens), (index_file, first.starts)):
        held = array.tobytes()
        for damage in (
            lambda data, held=held: data.replace(held, held[::-1]),
            lambda data: data[:20],
        ):
            whole = file.read_bytes()
            file.write_bytes(damage(whole))
            assert file.read_bytes() != whole
            caplog.clear()
            same(corpus_lib.load("x.jsonl", words, cache_dir="cache"))
            assert "damaged" in caplog.text
    (here / "x.jsonl").write_text('{"text": "two"}\n')
    assert corpus_lib.load("x.jsonl", words, cache_dir="cache").document(0).tolist() == [2, 1]


def test_cache_of_a_binary_file(here, tok, monkeypatch):
    _write_binary(here / "x.bin", [b"abcd", b"ef"])
    first = corpus_lib.load("x.bin", tok, cache_dir="cache")
    with monkeypatch.context() as patch:
        patch.setattr(corpus_lib, "_index_binary", None)
        again = corpus_lib.load("x.bin", tok, cache_dir="cache")
    assert again.manifest == first.manifest and _texts(again) == [b"abcd", b"ef"]
    _write_binary(here / "x.bin", [b"abcd", b"efg"])
    assert _texts(corpus_lib.load("x.bin", tok, cache_dir="cache")) == [b"abcd", b"efg"]
    _refused("cache_dir 'x.bin/c': cannot be written", "x.bin", tok, cache_dir="x.bin/c")


def _write_documents(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_split_is_by_content(here, tok):
    texts = [f"document {i}" for i in range(400)]
    _write_documents(here / "x.jsonl", texts)
    corpus = corpus_lib.load("x.jsonl", tok)
    train, heldout = corpus_lib.split(corpus, fraction=0.25)
    assert sorted([*train, *heldout]) == list(range(400))
    assert 60 < len(heldout) < 140
    chosen = {corpus.text(d) for d in heldout}
    # More documents, copies, another order and another tokenizer's ids move none.
    more = [f"extra {i}" for i in range(100)] + texts[::-1] + texts
    _write_documents(here / "y.jsonl", more)
    larger = corpus_lib.load("y.jsonl", tok)
    larger_heldout = set(corpus_lib.split(larger, fraction=0.25)[1].tolist())
    for doc_id in range(100, 900):
        assert (larger.text(doc_id) in chosen) == (doc_id in larger_heldout)
    # A larger fraction adds documents; another seed chooses others.
    assert set(heldout) < set(corpus_lib.split(corpus, fraction=0.5)[1])
    other = set(corpus_lib.split(corpus, fraction=0.25, seed=1)[1])
    assert len(other & set(heldout)) < 60


def test_split_is_pinned(here, tok):
    _write_documents(here / "x.jsonl", [f"document {i}" for i in range(40)])
    corpus = corpus_lib.load("x.jsonl", tok)
    assert corpus.document_hashes[:2].tolist() == [1904991786024820578, 10527755140059072631]
    assert corpus_lib.split(corpus, 0.1)[1].tolist() == [3, 14, 28, 32, 35]
    assert corpus_lib.split(corpus, 0.1, seed=7)[1].tolist() == [11, 12, 22, 23, 24, 37]


def test_split_refuses_an_empty_side(here, tok):
    _write_documents(here / "x.jsonl", ["a", "b", "c"])
    corpus = corpus_lib.load("x.jsonl", tok)
    for fraction, side in ((1e-6, "heldout"), (1 - 1e-6, "train")):
        with pytest.raises(ValueError, match=f"no {side} document among the 3") as error:
            corpus_lib.split(corpus, fraction)
        advice = float(str(error.value).split()[-1])  # Taking the advice must work.
        train, heldout = corpus_lib.split(corpus, advice)
        assert len(train) and len(heldout)
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="it must be 0, or lie between 0 and 1"):
            corpus_lib.split(corpus, fraction)
    train, heldout = corpus_lib.split(corpus, 0)
    assert train.tolist() == [0, 1, 2] and heldout.tolist() == []
    with pytest.raises(ValueError, match="seed -1"):
        corpus_lib.split(corpus, 0.5, seed=-1)
    _write_documents(here / "x.jsonl", ["a", "a"])
    with pytest.raises(ValueError, match="1 distinct document"):
        corpus_lib.split(corpus_lib.load("x.jsonl", tok), 0.5)


def _book(paragraphs, seed=0):
    """Paragraphs of a few hundred bytes, not all of them ASCII."""
    rng = np.random.default_rng(seed)
    sentence = "né en été, "
    return "\n\n".join(f"{i} " + sentence * rng.integers(5, 40) for i in range(paragraphs))


def test_a_single_text_is_cut_where_paragraphs_end(here, tok):
    (here / "book.txt").write_text(_book(300), encoding="utf-8")
    corpus = corpus_lib.load("book.txt", tok)
    texts = _texts(corpus)
    assert b"".join(texts) == (here / "book.txt").read_bytes()
    assert 30 < len(texts) < 90 and all(text.endswith(b"\n\n") for text in texts[:-1])
    assert corpus.is_cut and corpus.names[:2] == ["book.txt@0", f"book.txt@{len(texts[0])}"]
    assert corpus_lib.load("*.txt", tok).starts.tolist() == corpus.starts.tolist()
    # The end is held out, about as much of it as was asked for.
    for fraction in (0.05, 0.5, 0.9):
        train, heldout = corpus_lib.split(corpus, fraction)
        assert [*train, *heldout] == list(range(len(texts)))
        share = corpus.document_bytes[heldout].sum() / corpus.num_bytes
        assert fraction <= share < fraction + 0.05
    for fraction, sides in ((1e-20, (len(texts) - 1, 1)), (1 - 1e-9, (1, len(texts) - 1))):
        assert tuple(map(len, corpus_lib.split(corpus, fraction))) == sides
    # One of several texts is a document as it always was.
    (here / "note.md").write_text("a note")
    several = corpus_lib.load("book.txt,note.md", tok)
    assert several.names == ["book.txt", "note.md"] and not several.is_cut


@pytest.mark.parametrize("text", ["line of text\n" * 999, "word " * 999, "é" * 2222, "x" * 1700])
def test_a_text_without_paragraphs_is_cut_at_lines_words_or_characters(here, tok, text):
    (here / "x.txt").write_text(text, encoding="utf-8")
    texts = _texts(corpus_lib.load("x.txt", tok))
    assert b"".join(texts).decode() == text and len(texts) > 1
    assert all(512 <= len(piece) <= 1536 for piece in texts)
    assert [piece.decode()[-1] for piece in texts] == [text[-1]] * len(texts)


def test_a_large_text_has_larger_pieces_up_to_a_limit(here, tok):
    (here / "x.txt").write_text("line of text\n" * 300_000)
    sizes = corpus_lib.load("x.txt", tok).document_bytes
    assert sizes.max() <= 1.5 * (1 << 16) and sizes.min() >= 1 << 15


def test_a_short_text_is_one_document(here, tok):
    (here / "x.txt").write_text("words\n" * 200)
    corpus = corpus_lib.load("x.txt", tok)
    assert corpus.names == ["x.txt"] and not corpus.is_cut
    with pytest.raises(ValueError, match="1 distinct document.*a longer text.*or --heldout=0"):
        corpus_lib.split(corpus)


def test_a_cut_text_comes_back_from_the_cache(here, words):
    (here / "x.txt").write_text("two words\n" * 999)
    first = corpus_lib.load("x.txt", words, cache_dir="cache")
    again = corpus_lib.load("x.txt", words, cache_dir="cache")
    assert first.is_cut and again.is_cut and again.names == first.names


def test_split_of_the_stdlib(stdlib):
    train, heldout = corpus_lib.split(stdlib)
    share = stdlib.document_bytes[heldout].sum() / stdlib.num_bytes
    assert len(train) + len(heldout) == stdlib.num_documents
    assert 0.005 < share < 0.2


def test_gzip_baseline(here, tok, words):
    texts = ["two words " * 50, "words"]
    _write_documents(here / "x.jsonl", texts)
    raw = corpus_lib.load("x.jsonl", tok)
    sizes = [len(gzip.compress(text.encode(), 9)) for text in texts]
    expected = sum(sizes) * 8 * math.log(2) / (500 + 5)
    assert corpus_lib.gzip_nats_per_byte(raw, [0, 1]) == pytest.approx(expected)
    assert corpus_lib.gzip_nats_per_byte(raw, [1]) == pytest.approx(sizes[1] * 8 * math.log(2) / 5)
    decoded = corpus_lib.load("x.jsonl", words)  # Decoded, the trailing blank is lost.
    size = len(gzip.compress(texts[0].strip().encode(), 9))
    expected = size * 8 * math.log(2) / 499
    assert corpus_lib.gzip_nats_per_byte(decoded, [0]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="without any text"):
        corpus_lib.gzip_nats_per_byte(raw, [])
