"""Where each copied token of a dialogue comes from: what the attention of the training model is taught.

The tool's name in a call comes from its line in the list of tools, an argument's name from the brackets of
that line, its value from the request, and the words of an answer from what was said before. No torch in here.
"""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from fragments import Message
from generate import Dialogue, render
from tokenizers import Tokenizer

Span = tuple[int, int]  # of token positions, the end excluded
COPY, PICK, NOUN, VERB, AFTER_NOUN, AFTER_VERB = range(6)


@dataclass
class Encoded:
    tokens: list[int] = field(default_factory=list)
    turns: list[tuple[str, Span]] = field(default_factory=list)  # role and where the text of the turn is
    pointers: list[tuple[int, int, int]] = field(default_factory=list)  # kind, from where, to where

    def copies(self, at: int, place: int, count: int) -> None:
        """The tokens from `at` on are those from `place` on: they are chosen one position earlier."""
        self.pointers += [(COPY, at + n - 1, place + n) for n in range(count)]


class Encoder:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = self.ids("<|im_end|>\n")
        self.space, self.opening, self.closing, self.newline, self.colon, self.underscore = (
            self.ids(text)[0] for text in " ()\n:_"
        )
        shown = {token: tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())}
        self.tie = self.ids(" is ")
        self.letters = frozenset(token for token, text in shown.items() if text[:1].isalnum())
        self.heads = {
            role: self.ids(f"<|im_start|>{role}\n") for role in ("system", "user", "assistant", "tool")
        }

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text).ids
        return found

    def __call__(self, talk: Dialogue) -> Encoded:
        made = Encoded()
        for role, text in render(talk):
            made.tokens += self.heads[role]
            start = len(made.tokens)
            made.tokens += self.ids(text)
            made.turns.append((role, (start, len(made.tokens))))
            made.tokens += self.end
        made.tokens.pop()  # the last newline is never asked for
        return made

    def point(self, talk: Dialogue, made: Encoded) -> None:
        """Fills the pointers: left out where they are not wanted, since this takes most of the time."""
        for name, verb, noun in talk.subjects:
            start = _find(made.tokens, [self.space, *self.ids(name), self.opening], made.turns[0][1]) + 1
            line = start
            while made.tokens[line] != self.newline:
                line -= 1
            positions = range(start, start + len(self.ids(name)))
            self._point_subject(made, positions, verb, noun, (line, start))
            self._point_signature(made, made.tokens.index(self.opening, start))
        for role, span in made.turns:
            if role in ("user", "assistant"):  # what is said of something, to that something
                for place in _all(made.tokens, self.tie, span):
                    end = place + len(self.tie)
                    made.pointers += [(NOUN, end - 1, place - 1), (NOUN, end, place - 1)]
        messages = [message for message in talk.messages if message["role"] != "system"]
        turns = made.turns[-len(messages) :]
        for number, (message, (role, span)) in enumerate(zip(messages, turns, strict=True)):
            if role != "assistant":
                continue
            before = turns[:number]
            if "tool_calls" in message:
                asked = [place for who, place in before if who == "user"][-1]
                at = self._point_call(made, message, span, made.turns[0][1], asked)
                for name, verb, noun in talk.subjects:
                    if name == message["tool_calls"][0]["function"]["name"]:
                        slots = [span[0] - 1, *range(at - 1, at + len(self.ids(name)) - 1)]
                        self._point_subject(made, slots, verb, noun, asked)
            else:
                self._point_words(made, span, [place for _, place in before], talk.words)

    def _point_subject(
        self, made: Encoded, positions: Sequence[int], verb: str, noun: str, described: Span
    ) -> None:
        """From the letters of a tool's name to the last letters of its noun and its verb in a description or
        a request, and to what follows them: only there is it known that the word ends."""
        verbs = (verb, verb[0].upper() + verb[1:])
        for kind, after, words in ((NOUN, AFTER_NOUN, (noun,)), (VERB, AFTER_VERB, verbs)):
            for ids in map(self.ids, words):
                for place in _all(made.tokens, ids, described):
                    end = place + len(ids) - 1
                    if self._whole(made.tokens, place, end + 1):
                        made.pointers += [(kind, position, end) for position in positions]
                        made.pointers += [(after, position, end + 1) for position in positions]

    def _point_signature(self, made: Encoded, at: int) -> None:
        """From each argument's first letter to the last one of what stands before it, from the bracket on."""
        tokens, last = made.tokens, at - 1
        while tokens[at] != self.closing:
            at += 1
            starts = tokens[at] in self.letters and tokens[at - 1] in (self.opening, self.space)
            if starts and tokens[at - 2] != self.colon:  # after a colon it is a type
                made.pointers.append((NOUN, at, last))
                last = at
                while tokens[last + 1] in self.letters or tokens[last + 1] == self.underscore:
                    last += 1

    def _point_call(self, made: Encoded, message: Message, span: Span, tools: Span, asked: Span) -> int:
        """Gives where the name starts in the call."""
        function = message["tool_calls"][0]["function"]
        name = self.ids(function["name"])
        start = _find(made.tokens, [self.space, *name, self.opening], tools) + 1
        at = first = _find(made.tokens, name, span)
        made.copies(at, start, len(name))
        made.pointers += [(PICK, at + n - 1, start + n) for n in range(len(name))]
        made.pointers.append((PICK, span[0] - 1, start))  # whether to call is decided there
        closing = made.tokens.index(self.closing, start)
        at += len(name)
        last = at - 1
        for key, value in function["arguments"].items():
            said = self.ids(key)
            at = _find(made.tokens, said, (at, span[1]))
            source = _find(made.tokens, said, (start + len(name), closing))
            made.copies(at, source, len(said))
            made.pointers.append((NOUN, at - 1, last))
            at += len(said)
            last = at - 1
            made.pointers.append((COPY, last, source + len(said)))  # what follows it there tells the type
            given = self.ids(str(value))
            if (found := _find(made.tokens, given, (at, span[1]))) >= 0:
                at = found
                for place in _all(made.tokens, given, asked):
                    made.copies(at, place, len(given) + 1)  # what follows it there tells that it ends
        return first

    def _point_words(self, made: Encoded, span: Span, before: list[Span], words: Container[str]) -> None:
        """Each stretch of the answer that holds a word drawn by chance: the longest equal ones before it."""
        tokens, at = made.tokens, span[0]
        places: dict[int, list[int]] = {}
        for start, end in before:
            for place in range(start, end):
                places.setdefault(tokens[place], []).append(place)
        while at < span[1]:
            longest = 0
            found: list[int] = []
            for place in places.get(tokens[at], ()) if tokens[at] != self.space else ():
                length = 1
                while at + length < span[1] and tokens[at + length] == tokens[place + length]:
                    length += 1
                if length > longest:
                    longest, found = length, []
                if length == longest:
                    found.append(place)
            end = at + longest
            if longest and self._whole(tokens, at, end) and self._drawn(tokens[at:end], words):
                spaced = tokens[at - 1] == self.space
                for place in found:
                    made.copies(at, place, longest)
                    if spaced and tokens[place - 1] == self.space:
                        made.copies(at - 1, place - 1, 1)
            at += max(longest, 1)

    def _whole(self, tokens: list[int], start: int, end: int) -> bool:
        """Whether no word is cut at either end."""
        return not (
            (tokens[start] in self.letters and tokens[start - 1] in self.letters)
            or (tokens[end - 1] in self.letters and tokens[end] in self.letters)
        )

    def _drawn(self, tokens: list[int], words: Container[str]) -> bool:
        text = self.tokenizer.decode(tokens).lower()
        return any(word in words or word.isdigit() for word in re.split(r"[\s./]+", text)) or bool(
            re.search("[@/_-]", text)
        )


def _all(tokens: list[int], wanted: list[int], span: Span) -> list[int]:
    size = len(wanted)
    return [n for n in range(span[0], span[1] - size + 1) if tokens[n : n + size] == wanted]


def _find(tokens: list[int], wanted: list[int], span: Span) -> int:
    size = len(wanted)
    return next((n for n in range(span[0], span[1] - size + 1) if tokens[n : n + size] == wanted), -1)
