"""From tokens to text as they come: whole characters only, and nothing of a stop string.

Everything here is a function of the tokens pushed so far, so a resumed request rebuilds its state by
pushing its earlier tokens again. Knows tokens and strings; no model, no sampling.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class Codec(Protocol):
    def piece(self, token: int) -> bytes | None:
        """The bytes of a token, b"" for a special one, None if this tokenizer has no such thing."""

    def decode(self, tokens: Sequence[int]) -> str: ...


class Detokenizer:
    """push() gives the characters completed by a token; flush() the rest, broken ones as U+FFFD."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: list[int] = []  # tokenizers whose pieces depend on their neighbours
        self._shown = 0  # tokens of the window whose text is out

    def push(self, token: int) -> str:
        piece = self._codec.piece(token)
        return self._push_window(token) if piece is None else self._utf8.decode(piece)

    def flush(self) -> str:
        rest = self._codec.decode(self._window)[len(self._codec.decode(self._window[: self._shown])) :]
        self._window, self._shown = [], 0
        return rest + self._utf8.decode(b"", final=True)

    # SentencePiece drops the space in front of a first word and spells unknown characters in byte tokens:
    # only the difference between two decodings, with the tokens before as context, is right.
    def _push_window(self, token: int) -> str:
        self._window.append(token)
        before = self._codec.decode(self._window[: self._shown])
        now = self._codec.decode(self._window)
        # Four bytes make a character, so what is still broken after eight tokens stays broken.
        if now.endswith("\ufffd") and len(self._window) - self._shown < 8:
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return now[len(before) :]


class StopFilter:
    """Passes text through up to the first stop string, holding back what may still become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [s for s in stop if s]
        self._held = ""
        self.found = ""  # the stop string that ended the text

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string was found right behind it."""
        if not self._stop:
            return text, False
        self._held += text
        hits = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if hits:
            at, self.found = min(hits, key=lambda hit: hit[0])
            return self._held[:at], True
        keep = max((self._overlap(s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out, False

    def flush(self) -> str:
        rest, self._held = self._held, ""
        return rest

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        for n in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:n]):
                return n
        return 0


class TextStream:
    """The text of one answer: detokeniser, then stop strings (looked for after `min_tokens` tokens)."""

    def __init__(self, codec: Codec, stop: Sequence[str], min_tokens: int) -> None:
        self._detokenizer = Detokenizer(codec)
        self._filter = StopFilter(stop)
        self._blind = min_tokens

    def push(self, token: int) -> tuple[str, bool]:
        text = self._detokenizer.push(token)
        self._blind -= 1
        return (text, False) if self._blind >= 0 else self._filter.push(text)

    @property
    def stopped(self) -> str:
        """The stop string that ended the text; empty: none."""
        return self._filter.found

    def flush(self) -> str:
        """What was held back, once no more tokens come (a stop string in it still counts)."""
        text, found = self._filter.push(self._detokenizer.flush())
        return text if found else text + self._filter.flush()
