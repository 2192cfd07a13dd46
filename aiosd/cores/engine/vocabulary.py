"""The tokenizer of a model: text to tokens, messages to a prompt, tokens to bytes.

Wraps the fast tokenizer in a model's folder. What a message says can never become a special token:
only the chat template may open or close a turn. Knows no weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from aiosd.cores.engine.folder import COPY_AGAIN, read_json
from aiosd.errors import BadRequest, ModelError, in_words

# For a model without a chat template (a base model): roles as words, a blank line between turns.
PLAIN_TEMPLATE = """\
{%- if tools %}Tools: {{ tools | tojson }}

{% endif -%}
{%- for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] or '' }}

{% endfor -%}
{%- if add_generation_prompt %}Assistant:{% endif -%}"""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, as every byte-level tokenizer spells them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


ALPHABET = _byte_alphabet()
# Special tokens that are text all the same: "[TOOL_CALLS]", "<|python_tag|>". Without them nobody could tell
# a call from an answer.
BYTE = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's tokens of a byte
SPOKEN = re.compile(r"tool|python_tag|^\[(ARGS|CALL_ID)\]$", re.IGNORECASE)


class Vocabulary:
    def __init__(self, folder: Path, config: dict[str, Any], read: Any = None) -> None:
        """`config`: what config.json has; `read`: as config.read gives it, else transformers reads it."""
        self.hf = _open(folder, read)
        self.hf.backend_tokenizer.no_truncation()  # it may come with either
        self.hf.backend_tokenizer.no_padding()
        self.eos = self._end_tokens(folder, config)
        self._pieces: dict[int, bytes] = {}
        spec = json.loads(self.hf.backend_tokenizer.to_str())
        self._byte_level = _mentions_byte_level(spec.get("decoder"))
        self._added = {t["id"]: t for t in spec.get("added_tokens", ())}
        specials = sorted((t["content"] for t in self._added.values() if t["special"]), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials))) if specials else None
        self._specials = specials

    def __len__(self) -> int:
        return len(self.hf)

    def encode(self, text: str) -> list[int]:
        return [int(t) for t in self.hf.encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Special tokens leave no text, but those that mark a tool call do."""
        if self._byte_level:
            return b"".join(self.piece(t) or b"" for t in tokens).decode("utf-8", "replace")
        return str(self.hf.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def piece(self, token: int) -> bytes | None:
        """The bytes of one token; None when they depend on the tokens around it (SentencePiece)."""
        if not self._byte_level:
            return None
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self.spelling(token)
        return piece

    def spelling(self, token: int) -> bytes:
        """The bytes of one token in the middle of a text; none of a special one."""
        added = self._added.get(token)
        if added is not None:
            return b"" if _is_silent(added) else str(added["content"]).encode()
        text = self.hf.backend_tokenizer.id_to_token(token)  # None: the model's table is longer than this one
        if not self._byte_level:
            byte = BYTE.fullmatch(text or "")
            return bytes([int(byte[1], 16)]) if byte else (text or "").replace("▁", " ").encode()
        return b"".join(bytes([ALPHABET[c]]) if c in ALPHABET else c.encode() for c in text or "")

    @cached_property
    def silent(self) -> list[int]:
        """Special tokens that leave no text and end none."""
        return sorted(id for id, added in self._added.items() if _is_silent(added) and id not in self.eos)

    @cached_property
    def template(self) -> str:
        return self.hf.chat_template or PLAIN_TEMPLATE

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]:
        """Tokens of the conversation up to where the assistant's next turn begins."""
        try:
            text = str(
                self.hf.apply_chat_template(
                    self._disarm([with_objects(message) for message in messages]),
                    tools=self._disarm(tools or None),
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=True,
                )
            )
        except Exception as error:  # noqa: BLE001  a template is a program: it may raise anything about the messages
            raise BadRequest(f"the chat template refuses these messages: {error}") from None
        tokens: list[int] = []
        for i, part in enumerate(re.split("\ue000(\\d+)\ue001", text)):
            if part:
                tokens += self._literal(self._specials[int(part)]) if i % 2 else self._plain(part)
        return tokens

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self.hf.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _literal(self, text: str) -> list[int]:
        backend = self.hf.backend_tokenizer
        backend.encode_special_tokens = True
        try:
            return self._plain(text)
        finally:
            backend.encode_special_tokens = False

    # A message that quotes "<|im_end|>" (a web page, a tool's result) must not end its own turn. Such
    # text goes through the template as a private-use mark and is spelled out in ordinary tokens behind it.
    def _disarm(self, value: Any) -> Any:
        if isinstance(value, str) and self._special is not None:
            value = value.replace("\ue000", "").replace("\ue001", "")
            return self._special.sub(lambda m: f"\ue000{self._specials.index(m[0])}\ue001", value)
        if isinstance(value, dict):
            return {k: self._disarm(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self._disarm(v) for v in value]
        return value

    def _end_tokens(self, folder: Path, config: dict[str, Any]) -> frozenset[int]:
        """Every token that some file of the model calls its end."""
        generation = folder / "generation_config.json"
        named = [config.get("eos_token_id"), self.hf.eos_token_id]
        named += [read_json(generation).get("eos_token_id")] if generation.exists() else []
        flat = [t for n in named for t in (n if isinstance(n, list) else [n])]
        return frozenset(t for t in flat if isinstance(t, int))


def _is_silent(added: dict[str, Any]) -> bool:
    return bool(added["special"]) and not SPOKEN.search(added["content"])


def _mentions_byte_level(decoder: dict[str, Any] | None) -> bool:
    return decoder is not None and decoder.get("type") == "ByteLevel"


def _open(folder: Path, read: Any) -> Any:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).exists() for name in names):
        raise ModelError(
            f"{folder / 'tokenizer.json'}: no such file", "the folder has no tokenizer; " + COPY_AGAIN
        )
    if (folder / "tokenizer.json").exists():
        read_json(folder / "tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=read, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # noqa: BLE001  every tokenizer class raises its own; all mean that the files are unusable
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {in_words(error)}", COPY_AGAIN) from None
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{folder}: the tokenizer has no tokenizer.json",
            "convert it with AutoTokenizer.from_pretrained(…).save_pretrained(…)",
        )
    return tokenizer


def with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """Calls with their arguments as an object, as templates want them; the API has them as JSON in a text."""
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [with_object(call) for call in message["tool_calls"]]}


def with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (ValueError, RecursionError):
        return call
