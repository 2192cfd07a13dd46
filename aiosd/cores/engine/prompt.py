"""From rendered text to tokens, so that only the chat template's own marks become special tokens.

Foreign text is everything that a request brings: messages, names, keys, schemas, results of tools. Before the
template runs, twins replace the characters in foreign text that marks are made of. A twin is a code unit that
no text can hold. So a mark in the rendered text has no twins exactly where the template wrote it. Each of
these marks is then spelled as a secret that nobody can guess, and a tokenizer that knows only the secrets
reads the whole text.
"""

from __future__ import annotations

import re
import secrets
from typing import Any

from tokenizers import AddedToken, Tokenizer

from aiosd.errors import BadRequest

TWINS = 0xD800  # lone surrogates: JSON from a stranger that holds one is refused (aiosd.syscall)
TWINS_MAX = 0x800
PLAIN = "_-.:/ \t\r\n"  # stand in names and paths: templates look at them
# Words that templates compare with their own. They stay as they are, also where they are the core of a mark.
KNOWN = frozenset(
    re.findall(
        r"\w+",
        """system user assistant tool developer function object string number integer boolean array null text
        role content name tool_calls tool_call_id reasoning_content arguments parameters type id description
        properties required items enum anyOf oneOf allOf default strict""",
    )
)
BREAK = "break"


class Marks:
    """The control tokens of one tokenizer, and the way to write them that foreign text has not."""

    def __init__(self, tokenizer: Tokenizer, mentioned: str) -> None:
        """`mentioned`: texts whose added tokens are marks, special or not."""
        added = tokenizer.get_added_tokens_decoder()
        self._ids = {t.content: id for id, t in added.items() if _is_mark(t, mentioned)}
        literals = sorted(self._ids, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, literals))) if literals else None
        signs = sorted({c for mark in literals for c in mark if not c.isalnum() and c not in PLAIN})
        words = [mark for mark in literals if not set(mark) & set(signs)]
        self._words = re.compile("|".join(map(re.escape, words))) if words else None
        self._cores = {core(mark) for mark in literals} - KNOWN - {""}
        begins = sorted({word[0] for word in (*self._cores, *words)})
        if len(signs) + len(begins) > TWINS_MAX:
            raise ValueError("the tokenizer's special tokens have too many kinds of characters")
        self._twins = {ord(c): chr(TWINS + i) for i, c in enumerate(signs)}
        self._first = {ord(c): chr(TWINS + len(signs) + i) for i, c in enumerate(begins)}
        self.back = {ord(twin): chr(c) for c, twin in (*self._twins.items(), *self._first.items())}
        salt = secrets.token_hex(8)
        self._spelled = {mark: f"x{salt}{i:05d}x" for i, mark in enumerate([*literals, BREAK])}
        self._tokenizer = self._secret(tokenizer, [added[id] for id in sorted(added)])
        known = {id: self._tokenizer.token_to_id(self._spelling(t)) for id, t in added.items()}
        self._original = {spelled: id for id, spelled in known.items() if spelled is not None}
        self._break = self._tokenizer.token_to_id(self._spelled[BREAK])

    def _spelling(self, token: AddedToken) -> str:
        return self._spelled.get(token.content, token.content)

    def _secret(self, tokenizer: Tokenizer, added: list[AddedToken]) -> Tokenizer:
        """The tokenizer with other spellings of the marks, without what it puts around texts."""
        made = Tokenizer(tokenizer.model)
        made.normalizer = tokenizer.normalizer
        made.pre_tokenizer = tokenizer.pre_tokenizer
        again = [
            AddedToken(
                self._spelling(t), single_word=t.single_word, lstrip=t.lstrip, rstrip=t.rstrip,
                normalized=t.normalized, special=t.special,
            )
            for t in added
        ]  # fmt: skip
        again.append(AddedToken(self._spelled[BREAK], normalized=False, special=True))
        made.add_special_tokens([t for t in again if t.special])
        made.add_tokens([t for t in again if not t.special])
        return made

    def foreign(self, value: Any) -> Any:
        """The same value with twins in its texts and keys. Raises BadRequest."""
        if isinstance(value, str):
            return self._foreign(value)
        if isinstance(value, dict):
            return {self.foreign(key): self.foreign(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self.foreign(one) for one in value]
        return value

    def _foreign(self, text: str) -> str:
        if text in KNOWN:
            return text
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRequest("half a surrogate pair (\\ud800 to \\udfff) is no character") from None
        made = text.translate(self._twins)
        if self._words:
            made = self._words.sub(lambda found: self._first_of(found[0]), made)
        return self._first_of(made) if core(text) in self._cores else made

    def _first_of(self, text: str) -> str:
        return text[:1].translate(self._first) + text[1:]

    def encode(self, text: str) -> list[int]:
        """The tokens of a rendered text. Raises BadRequest where foreign text can only be read as a mark."""
        if self._any is None:
            return self._read(text.translate(self.back))
        armed = self._any.sub(lambda found: self._spelled[found[0]], text)
        whole = armed.translate(self.back)
        ids = self._read(whole)
        if self._made_of_words(ids):
            ids = self._read(self._any.sub(lambda m: m[0][0] + self._spelled[BREAK] + m[0][1:], whole))
            if self._made_of_words(ids):
                raise BadRequest(
                    "this model's tokenizer reads part of the text as a special token", "write it another way"
                )
        return [self._original.get(id, id) for id in ids if id != self._break]

    def _read(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _made_of_words(self, ids: list[int]) -> bool:
        """Some vocabularies have their marks among their words too, and find them without being told."""
        return not (set(ids) & set(self._ids.values())) <= self._original.keys()


def _is_mark(token: AddedToken, mentioned: str) -> bool:
    signs = any(not c.isalnum() and c not in PLAIN for c in token.content)
    return bool(token.content.strip()) and (token.special or (signs and token.content in mentioned))


def core(mark: str) -> str:
    """A mark without the signs around it: a template may put such signs around foreign text."""
    return re.sub(r"\A[\W_]+|[\W_]+\Z", "", mark)
