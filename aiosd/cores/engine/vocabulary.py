"""The tokenizer of a model: text to tokens, messages to a prompt, tokens to bytes.

Wraps the fast tokenizer in a model's folder. What a message says can never become a special token
(aiosd.cores.engine.prompt): only the chat template may open or close a turn. Knows no weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders

from aiosd.cores.engine.folder import COPY_AGAIN, read_json
from aiosd.cores.engine.habits import Habits, probe
from aiosd.cores.engine.prompt import Marks
from aiosd.errors import BadRequest, ModelError, in_words
from aiosd.syscall import families
from aiosd.syscall.families import Family

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
BYTE = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's tokens of a byte


class Vocabulary:
    def __init__(self, folder: Path, config: dict[str, Any], read: Any = None, hf: Any = None) -> None:
        """`config`: what config.json has; `read`: as config.read gives it, else transformers reads it; `hf`:
        the tokenizer, if it is not in the folder.
        """
        self.hf = _open(folder, read) if hf is None else hf
        self.hf.backend_tokenizer.no_truncation()  # it may come with either
        self.hf.backend_tokenizer.no_padding()
        self.eos = self._end_tokens(folder, config)
        self._pieces: dict[int, bytes] = {}
        self._byte_level = isinstance(self.hf.backend_tokenizer.decoder, decoders.ByteLevel)
        self._added: dict[int, AddedToken] = self.hf.backend_tokenizer.get_added_tokens_decoder()

    def __len__(self) -> int:
        return len(self.hf)

    @cached_property
    def templates(self) -> dict[str, str]:
        """The chat templates by their names."""
        return templates(self.hf.chat_template)

    @cached_property
    def family(self) -> Family:
        """The family whose calls the chat templates print."""
        return families.detect("\n".join(self.templates.values()))

    @cached_property
    def _marks(self) -> Marks:
        mentioned = "\n".join([*self.templates.values(), *families.literals(self.family)])
        return Marks(self.hf.backend_tokenizer, mentioned)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text of somebody's: a special token in it is text. Raises BadRequest."""
        before, after = self._around
        return [*before, *self._marks.encode(self._marks.foreign(text)), *after]

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer puts around each text."""
        whole, bare = list(map(int, self.hf.encode("a"))), self._marks.encode("a")
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), len(whole))
        return whole[:at], whole[at + len(bare) :]

    def decode(self, tokens: Sequence[int]) -> str:
        """Special tokens leave no text, but those that mark thinking or a tool call do."""
        if self._byte_level:
            return b"".join(self.piece(t) or b"" for t in tokens).decode("utf-8", "replace")
        spoken = [t for t in tokens if t not in self._silent]
        return str(self.hf.decode(spoken, skip_special_tokens=False, clean_up_tokenization_spaces=False))

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
            return b"" if token in self._silent else added.content.encode()
        text = self.hf.backend_tokenizer.id_to_token(token)  # None: the model's table is longer than this one
        if not self._byte_level:
            byte = BYTE.fullmatch(text or "")
            return bytes([int(byte[1], 16)]) if byte else (text or "").replace("▁", " ").encode()
        return b"".join(bytes([ALPHABET[c]]) if c in ALPHABET else c.encode() for c in text or "")

    @cached_property
    def silent(self) -> list[int]:
        """Special tokens that leave no text and end none."""
        return sorted(self._silent - self.eos)

    @cached_property
    def _silent(self) -> frozenset[int]:
        """Special tokens that leave no text."""
        special = {id: t.content for id, t in self._added.items() if t.special}
        return frozenset(
            id for id, text in special.items() if id in self.eos or not families.speaks(self.family, text)
        )

    @cached_property
    def thinks(self) -> bool:
        """Whether the chat template knows the family's marks of thinking."""
        return any(self.mentions(one.opening) for one in self.family.thinking)

    def mentions(self, text: str) -> bool:
        """Whether the text stands in the chat template."""
        return any(text in template for template in self.templates.values())

    def opened(self, prompt: Sequence[int]) -> str:
        """The mark of thinking that a prompt ends with, so that the answer goes on with the thinking."""
        return families.opened(str(self.hf.decode(list(prompt[-24:]), skip_special_tokens=False)))

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        variables: dict[str, Any] | None = None,
    ) -> list[int]:
        """Tokens of the conversation up to where the assistant's next turn begins. Raises BadRequest.

        `variables`: further ones of the template, such as enable_thinking. A reasoning_effort that the
        template refuses counts as none given.
        """
        said, shown = self.habits.normal(messages, tools)
        given = variables or {}
        try:
            text = self._print(said, shown, given)
        except BadRequest:
            if "reasoning_effort" not in given:
                raise
            text = self._print(said, shown, {k: v for k, v in given.items() if k != "reasoning_effort"})
        return self._marks.encode(text)

    def _print(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, variables: dict[str, Any]
    ) -> str:
        """The prompt as text, with twins in what is foreign."""
        foreign = self._marks.foreign
        template = self.templates.get("tool_use" if tools else "", self.templates["default"])
        told = [{**foreign(one), "role": one["role"]} for one in messages]
        shown, given = foreign(tools or None), foreign(variables)
        try:
            return str(
                self.hf.apply_chat_template(
                    told,
                    tools=shown,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=True,
                    **given,
                )
            )
        except Exception as error:  # noqa: BLE001  a template is a program: it may raise anything about the messages
            why = f"{error}".translate(self._marks.back)
            raise BadRequest(f"the chat template refuses these messages: {why}") from None

    @cached_property
    def habits(self) -> Habits:
        """What the chat template does with messages that not every template knows."""
        return probe(self._probe, self.family)

    def _probe(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        return self._print(messages, tools, {}).translate(self._marks.back)

    def _end_tokens(self, folder: Path, config: dict[str, Any]) -> frozenset[int]:
        """Every token that some file of the model calls its end."""
        generation = folder / "generation_config.json"
        named = [config.get("eos_token_id"), self.hf.eos_token_id]
        named += [read_json(generation).get("eos_token_id")] if generation.exists() else []
        flat = [t for n in named for t in (n if isinstance(n, list) else [n])]
        return frozenset(t for t in flat if isinstance(t, int))


def _open(folder: Path, read: Any) -> Any:
    from transformers import AutoTokenizer

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


def templates(given: Any) -> dict[str, str]:
    """The chat templates of a tokenizer by their names; a single one is `default`."""
    if isinstance(given, dict):
        named = {str(name): str(template) for name, template in given.items()}
        return {"default": next(iter(named.values()), PLAIN_TEMPLATE), **named}
    return {"default": given or PLAIN_TEMPLATE}
