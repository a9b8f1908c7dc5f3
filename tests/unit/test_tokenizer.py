"""Tokenizers from GGUF metadata and from folders: ids against independent pipelines, bytes, streaming."""

from __future__ import annotations

import json
import mmap
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.files import as_in_file, only_flatout_errors
from tests.tiny import tiny_spec, write_tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from flatout.core.config import spec_to_config
from flatout.core.gguf import GgufFile
from flatout.core.tokenizer import Tokenizer
from flatout.errors import ConfigError, FlatoutError, ModelFileError, UnsupportedModelError

NOTHING = mmap.mmap(-1, 1)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind at all.",
    "It's 1999 or 2024; we'll see 12345 things: don't you think they're there?",
    "\n\n    def main():\n\treturn 42  # naïve café, Straße, 数字\r\n",
] * 3
TRICKY = [
    "", " ", "  two  spaces\n\n\ttab ", "DON'T I'll we'RE", "x1234567890y", "数字１２３½Ⅷ",
    "e\u0301 é \u200d🙂👩‍👩‍👧", "\ufffd\x00\x7f",
    "<s>in the<turn>out</s>", "<|im_start|>user",
]  # fmt: skip
SPECIALS = ["<unk>", "<s>", "</s>"]


def gguf_file(metadata: dict[str, Any]) -> GgufFile:
    full = {
        f"tokenizer.ggml.{key}": as_in_file(value) for key, value in metadata.items() if value is not None
    }
    return GgufFile(
        path=Path("t.gguf"), metadata=full, tensors={}, mapped=NOTHING, data=np.zeros(0, np.uint8)
    )


def trained(pre_tokenizer: Any, vocab_size: int = 330) -> tokenizers.Tokenizer:
    """A byte-level BPE of the corpus, with three special tokens and one that is merely added."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizer
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIALS, "<turn>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    return inner


def metadata_of(inner: tokenizers.Tokenizer, pre: str) -> dict[str, Any]:
    """What a GGUF file of that tokenizer holds."""
    state = json.loads(inner.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    types = [3 if t in SPECIALS else 4 if t == "<turn>" else 1 for t in tokens]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": np.array(types, np.int32),
        "merges": [" ".join(m) for m in state["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def split_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def published(pre: str) -> Any:
    """How the published tokenizers cut text: with the patterns of the models' own files."""
    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    digits = r"\p{N}" if pre == "qwen2" else r"\p{N}{1,3}"
    return split_by(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_ids_equal_those_of_the_tokenizer_the_file_was_made_from(pre: str) -> None:
    inner = trained(published(pre))
    if pre == "qwen2":
        inner.normalizer = normalizers.NFC()
    ours = Tokenizer.from_gguf(gguf_file(metadata_of(inner, pre)))
    assert (ours.vocab_size, ours.bos, ours.eos) == (inner.get_vocab_size(), 1, 2)
    for text in (*CORPUS, *TRICKY):
        ids = ours.encode(text)
        assert ids == inner.encode(text).ids
        assert ours.decode(ids) == (text if pre != "qwen2" else inner.normalizer.normalize_str(text))
    assert ours.encode("<s>") == [1]
    assert ours.encode("a<turn>b")[1] == 3
    assert ours.encode("hi", add_bos=True) == [1, *ours.encode("hi")]
    assert ours.adds_bos == (pre == "llama-bpe")


def test_digits_are_cut_as_the_model_expects() -> None:
    for pre, longest in (("smollm", 1), ("qwen2", 1), ("llama-bpe", 3)):
        inner = trained(published(pre), 400)
        ours = Tokenizer.from_gguf(gguf_file(metadata_of(inner, pre)))
        pieces = [ours.decode([i]) for i in ours.encode("12345123451234512345")]
        assert max(map(len, pieces)) <= longest


def sentence_piece(prefix: bool | None = None) -> dict[str, Any]:
    """A SentencePiece BPE vocabulary: bytes, letters, then joined pieces with falling scores."""
    joined = [
        "he", "in", "\u2581t", "er", "\u2581the", "in\u2581", "re", "the", "\u2581\u2581", "ere", "there",
        "th",
    ]  # fmt: skip
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "é"]
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *joined, *letters]
    first = 3 + 256
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": np.array([0.0] * first + [-float(i) for i in range(len(tokens) - first)], np.float32),
        "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * (len(tokens) - first), np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_space_prefix": prefix,
    }


def naive_sentence_piece(text: str, metadata: dict[str, Any]) -> list[int]:
    """SentencePiece's BPE as its paper says: join the best-scoring neighbours until none is left."""
    ids = {token: i for i, token in enumerate(metadata["tokens"])}
    symbols = list(text.replace(" ", "\u2581"))
    if metadata["add_space_prefix"] is not False and text:
        symbols.insert(0, "\u2581")
    while True:
        pairs = [
            (-metadata["scores"][ids[a + b]], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in ids
        ]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    out: list[int] = []
    for symbol in symbols:
        out += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return out


@pytest.mark.parametrize("prefix", [None, False])
@settings(deadline=None, derandomize=True, max_examples=150)
@given(text=st.text("hetrin  é🙂", max_size=20) | st.text(max_size=6))
def test_sentence_piece_equals_the_plain_algorithm(prefix: bool | None, text: str) -> None:
    metadata = sentence_piece(prefix)
    if "\u2581" in text:
        return  # the space's own sign does not survive SentencePiece
    ours = SENTENCE_PIECE[prefix]
    ids = ours.encode(text)
    assert ids == naive_sentence_piece(text, metadata)
    assert ours.decode(ids) == text


SENTENCE_PIECE = {p: Tokenizer.from_gguf(gguf_file(sentence_piece(p))) for p in (None, False)}


def test_sentence_piece_expects_bos_and_adds_the_space_after_special_tokens() -> None:
    ours = SENTENCE_PIECE[None]
    assert ours.adds_bos
    assert ours.encode("</s>the") == [2, *ours.encode("the")]
    assert ours.decode([1, *ours.encode("the")]) == "<s> the"


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return Tokenizer.from_gguf(gguf_file(metadata_of(trained(published("gpt-2")), "gpt-2")))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(data=st.data())
def test_streamed_pieces_join_to_the_decoded_text(byte_level: Tokenizer, data: st.DataObject) -> None:
    """Any ids: valid text, half characters, ids past the vocabulary."""
    tokenizer = data.draw(st.sampled_from([byte_level, SENTENCE_PIECE[None]]))
    text_ids = st.text(max_size=12).map(tokenizer.encode)
    ids = data.draw(text_ids | st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=12))
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
    for piece in pieces:
        piece.encode()  # never half a surrogate pair


def test_no_half_character_is_shown(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("🙂")
    assert len(ids) == 4
    stream = byte_level.stream()
    assert [stream.push(i) for i in ids] == ["", "", "", "🙂"]
    assert stream.finish() == ""
    stream = byte_level.stream()
    assert stream.push(ids[0]) == ""
    assert stream.finish() == "\ufffd"


@settings(deadline=None, derandomize=True, max_examples=100)
@given(ids=st.lists(st.integers(4, 329), max_size=12))
def test_decoding_equals_the_library_even_for_broken_text(byte_level: Tokenizer, ids: list[int]) -> None:
    assert byte_level.decode(ids) == byte_level._inner.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("family", "pre"),
    [
        ("llama", "smollm"),
        ("llama", "llama-bpe"),
        ("llama", None),
        ("mistral", None),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen2"),
        ("gemma", None),
    ],
)
def test_transformers_loads_what_is_saved(tmp_path: Path, family: str, pre: str | None) -> None:
    """Each family with a tokenizer its models have; None is SentencePiece."""
    from transformers import AutoTokenizer

    if pre is None:
        metadata = sentence_piece(False if family == "gemma" else None)
    else:
        metadata = metadata_of(trained(published(pre)), pre)
    metadata["chat_template"] = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    file = gguf_file(metadata)
    file.metadata["tokenizer.chat_template"] = metadata["chat_template"]
    ours = Tokenizer.from_gguf(file)
    ours.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(spec_to_config(tiny_spec(family))))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TRICKY:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        assert theirs(text)["input_ids"] == ours.encode(text, add_bos=ours.adds_bos)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == ours.apply_chat_template(messages)

    again = Tokenizer.from_folder(tmp_path)
    assert again.sha256 == ours.sha256
    assert (again.bos, again.eos, again.adds_bos, again.vocab_size) == (1, 2, ours.adds_bos, ours.vocab_size)
    for text in TRICKY:
        assert again.encode(text) == ours.encode(text)
        assert again.decode(ours.encode(text)) == ours.decode(ours.encode(text))


def test_the_hash_depends_on_vocabulary_and_template() -> None:
    metadata = sentence_piece()
    one = Tokenizer.from_gguf(gguf_file(metadata))
    assert one.sha256 == SENTENCE_PIECE[None].sha256
    templated = gguf_file(metadata)
    templated.metadata["tokenizer.chat_template"] = "{{ messages }}"
    tokens = [*metadata["tokens"][:-1], "ö"]
    other = Tokenizer.from_gguf(gguf_file(metadata | {"tokens": tokens}))
    assert len({one.sha256, Tokenizer.from_gguf(templated).sha256, other.sha256}) == 3


def test_templates_of_a_folder(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 320)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    messages = [{"role": "user", "content": "x"}]
    named = [{"name": "tool", "template": "tool"}, {"name": "default", "template": "default"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert Tokenizer.from_folder(tmp_path).apply_chat_template(messages) == "default"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_folder(tmp_path).apply_chat_template(messages) == "file"
    (tmp_path / "chat_template.jinja").unlink()
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config | {"bos_token": {"__type": "AddedToken", "content": "<s>"}})
    )
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.bos == 1
    with pytest.raises(ConfigError, match="a chat needs a model with a chat template"):
        tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": None}, ModelFileError, r"must hold a tokenizer \(tokenizer\.ggml\.tokens\)"),
        ({"tokens": np.arange(3)}, ModelFileError, "must be strings"),
        ({"tokens": ["a", "a"]}, ModelFileError, "token_type must be 2 integers"),
        (
            {"tokens": ["a", "b", "a"], "token_type": None},
            ModelFileError,
            "tokens must differ; found: a in t.gguf",
        ),
        ({"tokens": ["a" * 2000], "token_type": None}, ModelFileError, "at most 1024 characters"),
        ({"model": "t5"}, UnsupportedModelError, "must be gpt2 or llama"),
        ({"model": None}, UnsupportedModelError, "must be gpt2 or llama"),
        ({"model": np.arange(2)}, UnsupportedModelError, "must be gpt2 or llama"),
        ({"pre": "tekken"}, UnsupportedModelError, "tokenizer.ggml.pre must be one of"),
        ({"pre": None}, UnsupportedModelError, "tokenizer.ggml.pre must be one of"),
        ({"merges": None}, ModelFileError, r"tokenizer\.ggml\.merges"),
        ({"merges": ["nothing"]}, ModelFileError, "a merge joins two tokens"),
        ({"merges": ["t zz"]}, ModelFileError, "a merge joins two tokens"),
        ({"token_type": np.zeros(3, np.float32)}, ModelFileError, "token_type must be"),
        ({"model": "llama"}, ModelFileError, "scores must be"),
    ],
)
def test_inconsistent_metadata_are_refused(
    change: dict[str, Any], error: type[FlatoutError], message: str
) -> None:
    metadata = metadata_of(trained(published("gpt-2")), "gpt-2") | change
    with pytest.raises(error, match=message) as caught:
        Tokenizer.from_gguf(gguf_file(metadata))
    assert "t.gguf" in str(caught.value)


def test_folders_without_a_usable_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"must hold its tokenizer.*no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    for content in ("", "{}", "[]", '{"model": {"type": "BPE"}}', "\ud800".encode("utf-8", "surrogatepass")):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "tokenizer.json").write_bytes(data)
        with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
            Tokenizer.from_folder(tmp_path)
    word_piece = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    word_piece.decoder = decoders.WordPiece()
    word_piece.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedModelError, match="byte-level BPE and SentencePiece BPE"):
        Tokenizer.from_folder(tmp_path)


def test_text_that_is_not_unicode_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="valid Unicode"):
        byte_level.encode("a\ud800b")


def test_bos_must_exist_to_be_added() -> None:
    metadata = sentence_piece() | {"bos_token_id": None}
    tokenizer = Tokenizer.from_gguf(gguf_file(metadata))
    assert tokenizer.bos is None
    assert not tokenizer.adds_bos
    with pytest.raises(ConfigError, match="begin-of-text"):
        tokenizer.encode("a", add_bos=True)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(data=st.data())
def test_fuzz_only_flatout_errors_escape(data: st.DataObject) -> None:
    word = st.sampled_from(["a", "b", "ab", "", "\u2581", "<0x41>", "<s>", "a b", " "]) | st.text(max_size=3)
    words = st.lists(word, max_size=6)
    numbers = st.lists(st.integers(0, 7), max_size=6)
    value = (
        words | word | st.integers(-1, 9) | st.booleans() | st.floats(width=32) | st.just("llama")
        | numbers.map(lambda n: np.array(n, np.int32)) | numbers.map(lambda n: np.array(n, np.float32))
    )  # fmt: skip
    tokens = data.draw(words)
    sound = {
        "model": data.draw(st.sampled_from(["gpt2", "llama"])),
        "pre": data.draw(st.sampled_from(["gpt-2", "smollm", "llama-bpe", "qwen2"])),
        "tokens": tokens,
        "token_type": np.array(
            data.draw(st.lists(st.integers(0, 7), min_size=len(tokens), max_size=len(tokens)))
        ),
        "scores": np.zeros(len(tokens), np.float32),
        "merges": data.draw(st.lists(st.tuples(word, word).map(" ".join), max_size=3)),
        "bos_token_id": 0,
    }
    changes = data.draw(
        st.dictionaries(st.sampled_from([*sound, "eos_token_id", "add_bos_token"]), value, max_size=2)
    )
    file = gguf_file(sound | changes)
    with only_flatout_errors():
        tokenizer = Tokenizer.from_gguf(file)
        tokenizer.decode(tokenizer.encode("a b<s>é"))
