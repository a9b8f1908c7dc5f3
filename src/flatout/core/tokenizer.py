"""Text <-> token ids, on the `tokenizers` library, from a GGUF file or a Hugging Face folder.

Decoding works on bytes: every token stands for some bytes of UTF-8, so a text is the concatenation of its
tokens' bytes whatever pieces they arrive in, and `TextStream` never shows half a character.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from flatout.core.chat import render_chat
from flatout.core.files import corrupt, read_json_object, read_text, shown, write_bytes
from flatout.core.gguf import GgufFile
from flatout.core.gguf_tokenizer import build_from_gguf
from flatout.errors import ConfigError, ModelFileError, UnsupportedModelError

_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """The tokenizer of one model. Make it with `from_gguf` or `from_folder`.

    vocab_size: ids it knows, added tokens included; bos, eos: ids or None; adds_bos: the model was trained
    with bos in front of every text; chat_template: jinja2 source or None.
    """

    def __init__(self, inner: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
        """`config` has the meaning of tokenizer_config.json and is saved as it is."""
        self._inner, self._config = inner, config
        self._added = {i: token.content for i, token in inner.get_added_tokens_decoder().items()}
        self._byte_level, self._byte_fallback, self._strips_space = _decoder_kind(inner)
        self._bytes: dict[int, bytes] = {}
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)
        self.bos = self._special("bos_token")
        self.eos = self._special("eos_token")
        self.adds_bos = self.bos is not None and _leading_special(inner) == self._content("bos_token")
        self.chat_template = _default_template(config.get("chat_template"))

    @classmethod
    def from_gguf(cls, file: GgufFile) -> Tokenizer:
        """The tokenizer in a GGUF file's metadata. Raises ModelFileError or UnsupportedModelError."""
        return cls(*build_from_gguf(file))

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer.json of a Hugging Face folder, with tokenizer_config.json and chat_template.jinja if
        there.

        Raises ModelFileError when it is missing or corrupt, UnsupportedModelError for kinds without exact
        bytes.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelFileError(
                "the model folder must hold its tokenizer", f"no tokenizer.json in {shown(str(folder), 300)}",
                "copy it from the original model",
            )  # fmt: skip
        text = read_text(path)
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise corrupt(path, "tokenizer.json must be a tokenizer", str(error)) from error
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).exists():
                config |= read_json_object(folder / name)
        if (folder / "chat_template.jinja").exists():
            config["chat_template"] = read_text(folder / "chat_template.jinja")
        return cls(inner, config)

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Ids of `text`; special tokens written out in it become their ids. add_bos puts `bos` in front."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError("a text must be valid Unicode", shown(str(error)), "UTF-8 text") from error
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        if not add_bos:
            return ids
        if self.bos is None:
            raise ConfigError("add_bos needs a tokenizer with a begin-of-text token", "none", "add_bos=False")
        return [self.bos, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.finish()

    def stream(self) -> TextStream:
        """A decoder that takes one token at a time."""
        return TextStream(self)

    def vocabulary(self) -> dict[int, str]:
        """The token of every id, as the tokenizer writes it."""
        return {i: token for token, i in self._inner.get_vocab(with_added_tokens=True).items()}

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `save` writes: the contents of tokenizer.json and tokenizer_config.json."""
        return json.loads(self._inner.to_str()), dict(self._config)

    @classmethod
    def from_state(cls, contents: Mapping[str, Any], config: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer of such contents. Raises ModelFileError for contents that make none."""
        try:
            inner = tokenizers.Tokenizer.from_str(json.dumps(contents))
        except Exception as error:  # the library raises nothing narrower
            raise ModelFileError(
                "the contents must be those of a tokenizer", shown(str(error)), "an unchanged tokenizer"
            ) from error
        return cls(inner, dict(config))

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; b"" for an id without a token, which padded vocabularies can
        produce."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._token_bytes(token)
        return known

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt for messages with "role" and "content". Raises ConfigError if the model has no
        template."""
        if self.chat_template is None:
            raise ConfigError("a chat needs a model with a chat template", "none", "a plain prompt")
        return render_chat(
            self.chat_template,
            messages,
            generate=add_generation_prompt,
            bos=self._content("bos_token") or "",
            eos=self._content("eos_token") or "",
        )

    @functools.cached_property
    def sha256(self) -> str:
        """Hex SHA-256 of the serialised tokenizer and its chat template."""
        return hashlib.sha256(f"{self._inner.to_str()}\0{self.chat_template or ''}".encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers.AutoTokenizer loads."""
        folder = Path(folder)
        config = self._config | ({"chat_template": self.chat_template} if self.chat_template else {})
        files = {
            "tokenizer.json": self._inner.to_str(pretty=False),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n",
        }
        for name, text in files.items():
            write_bytes(folder / name, text.encode())

    def _content(self, key: str) -> str | None:
        """The text of a special token: a string, or an object with its content."""
        value = self._config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    def _special(self, key: str) -> int | None:
        content = self._content(key)
        return None if content is None else self._inner.token_to_id(content)

    def _token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self._inner.id_to_token(token) if 0 <= token < 1 << 31 else None
        if piece is None:
            return b""
        if self._byte_level:
            known = all(character in _BYTE_OF for character in piece)
            return bytes(_BYTE_OF[character] for character in piece) if known else piece.encode()
        match = _BYTE_TOKEN.fullmatch(piece) if self._byte_fallback else None
        return bytes([int(match[1], 16)]) if match else piece.replace(_SPACE, " ").encode()


class TextStream:
    """Turns tokens into text one at a time; the pieces joined are what `Tokenizer.decode` returns."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer._strips_space

    def push(self, token: int) -> str:
        """Text that `token` completes; "" while a character is still incomplete."""
        data = self._tokenizer.token_bytes(token)
        if self._at_start and data:
            self._at_start = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def finish(self) -> str:
        """U+FFFD when the text ends inside a character, otherwise nothing."""
        return self._decoder.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, otherwise the next code point from
    256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _decoder_kind(inner: tokenizers.Tokenizer) -> tuple[bool, bool, bool]:
    """(byte-level, byte fallback, strips the first space) from the tokenizer's decoder."""
    state: dict[str, Any] = json.loads(inner.decoder.__getstate__()) if inner.decoder is not None else {}
    steps: list[dict[str, Any]] = state["decoders"] if state.get("type") == "Sequence" else [state]
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" in kinds:
        return True, False, False
    spaced = [s for s in steps if s.get("type") == "Metaspace" and s.get("replacement") == _SPACE]
    replaced = [
        s for s in steps
        if s.get("type") == "Replace" and s.get("content") == " " and s.get("pattern") == {"String": _SPACE}
    ]  # fmt: skip
    if set(kinds) <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"} and (spaced or replaced):
        strips = "Strip" in kinds or any(s.get("prepend_scheme") != "never" for s in spaced)
        return False, "ByteFallback" in kinds, strips
    raise UnsupportedModelError(
        "tokenizers that run are byte-level BPE and SentencePiece BPE",
        f"decoder {shown(kinds)}",
        "another model",
    )


def _leading_special(inner: tokenizers.Tokenizer) -> str | None:
    """The special token that post-processing puts in front of every text, if any.

    Read from its description: trying it out would run templates whose tokens may not exist, which aborts.
    """
    state: dict[str, Any] = json.loads(inner.post_processor.__getstate__()) if inner.post_processor else {}
    for step in state["processors"] if state.get("type") == "Sequence" else [state]:
        if step.get("type") == "TemplateProcessing" and step["single"]:
            special: str | None = step["single"][0].get("SpecialToken", {}).get("id")
            return special
    return None


def _default_template(value: Any) -> str | None:
    """The chat template: text, or the one called "default" of a list of {name, template}."""
    if isinstance(value, list):
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
