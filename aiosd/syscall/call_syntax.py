"""How calls are spelled: one reader for each way in which model families print a call.

A reader gets a text and the position behind a mark that opens calls. It gives the calls that stand there and
the position behind them. It gives no call where the mark is only mentioned, and raises ValueError where a
call has begun and is broken. aiosd.syscall.families says which family uses which reader. Linear in the text.
Pure.

Large: one short reader for each way of printing, and what the readers share.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
DEPTH_MAX = 64  # of values that are no JSON, which this module reads by recursion
SPACE = re.compile(r"[ \t\r\n]*")
BETWEEN = re.compile(r"[\s;,]*")
FENCE = re.compile(r"\s*(?:```(?:json)?\s*)?")
FENCE_END = r"\s*(?:```\s*)?"
OTHER = re.compile(r"<function=|<parameter|<invoke|<arg_key>")
NAME = r"[^\s<>\[\](){}\"',:=|｜]{1,256}"
WORDS = {"True": "true", "False": "false", "None": "null"}
WORD = re.compile(r"[A-Za-z_][\w.-]*")
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?![\w.])")
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}


@dataclass(frozen=True, slots=True)
class Spoken:
    """A call as it was said. A tagged value is text, whose type only the tool's schema knows."""

    name: str
    arguments: str = "{}"  # JSON of an object, letter by letter as it was said
    tagged: tuple[tuple[str, str], ...] | None = None  # in place of `arguments`: keys and texts


Read = tuple[list[Spoken], int]
Reader = Callable[[str, int], Read]


# JSON


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("JSON has no such number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key comes twice")
    return made


DECODER = json.JSONDecoder(parse_float=_number, parse_constant=_number)  # no NaN, no Infinity
STRICT = json.JSONDecoder(object_pairs_hook=_unique)


def raw_value(text: str, at: int) -> tuple[Any, str, int]:
    """A JSON value, its own spelling, and where it ends."""
    value, end = DECODER.raw_decode(text, at)
    return value, text[at:end], end


def members(text: str, at: int) -> tuple[dict[str, tuple[Any, str]], int]:
    """The members of the JSON object at that place, each with its own spelling, and where the object ends."""
    made: dict[str, tuple[Any, str]] = {}
    at = skip(SPACE, text, expect(text, at, "{"))
    while not text.startswith("}", at):
        key, _, end = raw_value(text, at)
        if not isinstance(key, str) or key in made:
            raise ValueError("not a key")
        at = skip(SPACE, text, expect(text, skip(SPACE, text, end), ":"))
        value, raw, end = raw_value(text, at)
        made[key] = value, raw
        at = skip(SPACE, text, end)
        if not text.startswith("}", at):
            at = skip(SPACE, text, expect(text, at, ","))
            if text.startswith("}", at):
                raise ValueError("a comma and no key")
    return made, at + 1


def arguments_of(value: Any, raw: str) -> str:
    """The JSON of an object, out of an object, a JSON text of one, or nothing."""
    if value is None or value == "":
        return "{}"
    if isinstance(value, str):
        value, raw = DECODER.decode(value), value
    if not isinstance(value, dict):
        raise ValueError("arguments are an object")
    said = json.dumps(value, ensure_ascii=False)
    said.encode()  # half a surrogate pair is no text
    try:
        STRICT.decode(raw)
    except ValueError:  # a key comes twice: the last one counts
        return said
    return raw


NAMES = ("name", "tool_name")
ARGUMENTS = ("arguments", "parameters")


def json_call(text: str, at: int) -> tuple[Spoken, int]:
    """An object with a name and arguments; or {NAME: ARGUMENTS} with nothing beside it."""
    said, end = members(text, at)
    if set(said) == {"type", "function"} and said["function"][1].startswith("{"):
        said, _ = members(said["function"][1], 0)
    name = next((said[key][0] for key in NAMES if key in said), None)
    if name is None and len(said) == 1:
        ((only, (value, raw)),) = said.items()
        if isinstance(value, dict) and only not in ARGUMENTS:
            return Spoken(only, arguments_of(value, raw)), end
    if not isinstance(name, str) or not name:
        raise ValueError("a call has a name")
    value, raw = next((said[key] for key in ARGUMENTS if key in said), (None, ""))
    return Spoken(name, arguments_of(value, raw)), end


def bare_calls() -> Reader:
    """Objects that are calls and nothing else: JSON that merely looks like a call is an answer."""
    exactly = [{"name", key} for key in ARGUMENTS]

    def read(text: str, at: int) -> Read:
        calls = list[Spoken]()
        while text.startswith("{", at):
            said, _ = members(text, at)
            if said.keys() - {"type", "id"} not in exactly:
                return [], at
            call, end = json_call(text, at)
            calls.append(call)
            at = skip(BETWEEN, text, end)
        return calls, at

    return read


def json_calls(closing: str = "", again: str = "") -> Reader:
    """One call or more as JSON objects, or as a list of them.

    `closing`: the pattern behind them, without which they are broken unless the text ends. `again`: a pattern
    that may stand in its place: the mark of the next call.
    """
    more = f"|(?={again})" if again else ""
    closed = re.compile(rf"{FENCE_END}(?:{closing}{more}|\Z)") if closing else None

    def read(text: str, at: int) -> Read:
        begin = skip(FENCE, text, at)
        if OTHER.match(text, begin):
            raise ValueError("a call in the way of another family")
        if not text.startswith(("{", "["), begin):
            return [], at
        calls, end = _list(text, begin) if text.startswith("[", begin) else _row(text, begin)
        return calls, must(closed, text, end) if closed and calls else end

    return read


def _row(text: str, at: int) -> Read:
    """Objects one after the other."""
    calls = []
    while True:
        call, end = json_call(text, at)
        calls.append(call)
        at = skip(BETWEEN, text, end)
        if not text.startswith("{", at):
            return calls, end


def _list(text: str, at: int) -> Read:
    calls, at = [], skip(SPACE, text, at + 1)
    while not text.startswith("]", at):
        call, at = json_call(text, at)
        calls.append(call)
        at = skip(SPACE, text, at)
        if not text.startswith("]", at):
            at = skip(SPACE, text, expect(text, at, ","))
    return calls, at + 1


# a head and JSON


def headed_calls(head: str, tail: str = "", closing: str = "", again: str = "") -> Reader:
    """Calls that are a head, with the group `name`, and a JSON object. `tail` ends a call, `closing` all of
    them; a text that ends before either is whole. `again` stands between two calls."""
    begin, ended = re.compile(head), re.compile(rf"(?:{tail}|\Z)")
    after, between = re.compile(rf"(?:\s*{closing})?" if closing else ""), re.compile(rf"\s*{again}")

    def read(text: str, at: int) -> Read:
        calls, place = list[Spoken](), at
        while found := begin.match(text, place):
            value, raw, end = raw_value(text, skip(SPACE, text, found.end()))
            calls.append(Spoken(found["name"], arguments_of(value, raw)))
            place = must(ended, text, end)
            next_call = between.match(text, place)
            if next_call is None or not begin.match(text, next_call.end()):
                break
            place = next_call.end()
        return calls, skip(after, text, place) if calls else at

    return read


# tags around each value


def tagged_calls(
    head: str, key: str, value_end: str, tail: str, closing: str = "", again: str = "", trim: bool = False
) -> Reader:
    """Calls whose values stand between tags, as text. `key` has the group `key` and perhaps `string`."""
    begin, parameter = re.compile(head), re.compile(rf"\s*{key}")
    # A value ends where its tag is followed by the next key or by the end of the call: it may quote the tag.
    stop = re.compile(rf"{value_end}(?=\s*(?:{_bare(key)}|{tail}))")
    ended, after = re.compile(rf"\s*{tail}"), re.compile(rf"(?:\s*{closing})?")
    between = re.compile(rf"\s*(?:{again})?\s*")

    def read(text: str, at: int) -> Read:
        calls, place = list[Spoken](), at
        while found := begin.match(text, place):
            pairs, place = list[tuple[str, str]](), found.end()
            while one := parameter.match(text, place):
                end = stop.search(text, one.end())
                if end is None:
                    raise ValueError("a value has no end")
                value = text[one.end() : end.start()]
                pairs.append((one["key"], value.removeprefix("\n").removesuffix("\n") if trim else value))
                place = end.end()
            if not ended.match(text, place) and not pairs:
                return [], at  # only mentioned
            calls.append(Spoken(found["name"], tagged=tuple(pairs)))
            place = skip(after, text, must(ended, text, place))
            if not begin.match(text, next_place := skip(between, text, place)):
                break
            place = next_place
        return calls, place if calls else at

    return read


def _bare(pattern: str) -> str:
    """The pattern without names of groups, to be used twice."""
    return re.sub(r"\(\?P<\w+>", "(?:", pattern)


def function_calls(closing: str = "", again: str = "") -> Reader:
    """<function=NAME> with JSON behind it (Llama 3.1, Functionary) or with <parameter=KEY> (Qwen3-Coder)."""
    head = rf"\s*(?:<function=)?(?P<name>{NAME})>\s*"
    inside = rf"\s*(?:<function=)?(?P<name>{NAME})>(?=\s*(?:<parameter=|</function>))"
    as_json = headed_calls(
        head + r"(?=\{)", r"\s*</function>" + (f"(?:\\s*{closing})?" if closing else ""), again=again
    )
    as_tags = tagged_calls(
        inside, r"<parameter=(?P<key>[^<>\s]{1,256})>", "</parameter>", "</function>", closing, again, True
    )

    def read(text: str, at: int) -> Read:
        calls, end = as_tags(text, at)
        return (calls, end) if calls else as_json(text, at)

    return read


# the literals of Python and of Gemma


class Literals:
    """Values that are nearly JSON: gives each as the JSON of it."""

    def __init__(self, text: str, at: int, quotes: tuple[str, ...]) -> None:
        self.text, self.at, self._quotes = text, at, quotes

    def value(self, depth: int = 0) -> str:
        if depth > DEPTH_MAX:
            raise ValueError("too deep")
        self.space()
        for quote in self._quotes:
            if self.text.startswith(quote, self.at):
                return self.string(quote)
        if self.take("["):
            return "[" + ", ".join(self._items("]", lambda: self.value(depth + 1))) + "]"
        if self.take("{"):
            return _object(self._items("}", lambda: self._pair(":", depth + 1)))
        if number := NUMBER.match(self.text, self.at):
            self.at = number.end()
            _number(number[0])
            return number[0]
        word = self.word()
        if word not in (*WORDS, *WORDS.values()):
            raise ValueError("not a value")
        return WORDS.get(word, word)

    def items(self, end: str, separator: str) -> list[tuple[str, str]]:
        """KEY SEPARATOR VALUE up to `end`: keys and the JSON of the values."""
        made = self._items(end, lambda: self._pair(separator, 1))
        _unique(list[tuple[str, Any]](made))
        return made

    def _pair(self, separator: str, depth: int) -> tuple[str, str]:
        key = self._key()
        self.need(separator)
        return key, self.value(depth)

    def _key(self) -> str:
        self.space()
        for quote in self._quotes:
            if self.text.startswith(quote, self.at):
                return str(json.loads(self.string(quote)))
        end = re.compile(r"[^\s:=,{}\[\]()]{1,256}").match(self.text, self.at)
        if end is None:
            raise ValueError("not a key")
        self.at = end.end()
        return end[0]

    def _items(self, end: str, one: Callable[[], T]) -> list[T]:
        made = list[T]()
        while not self.take(end):
            if made:
                self.need(",")
                if self.take(end):
                    break
            made.append(one())
        return made

    def string(self, quote: str) -> str:
        """Ordinary quotes know escapes; a mark of Gemma ends at the next one."""
        begin = self.at + len(quote)
        if len(quote) > 1:
            end = self.text.index(quote, begin)
            self.at = end + len(quote)
            return json.dumps(self.text[begin:end], ensure_ascii=False)
        closed = re.compile(rf"(?:[^\\{quote}]|\\.)*{quote}", re.DOTALL).match(self.text, begin)
        if closed is None:
            raise ValueError("a text has no end")
        self.at = closed.end()
        made = re.sub(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", _unescaped, closed[0][:-1], flags=re.DOTALL)
        made.encode("utf-16", "surrogatepass").decode("utf-16")  # raises for half a pair
        return json.dumps(made.encode("utf-16", "surrogatepass").decode("utf-16"), ensure_ascii=False)

    def word(self) -> str:
        found = WORD.match(self.text, self.at)
        if found is None:
            raise ValueError("not a word")
        self.at = found.end()
        return found[0]

    def space(self) -> None:
        self.at = skip(SPACE, self.text, self.at)

    def take(self, mark: str) -> bool:
        self.space()
        if not self.text.startswith(mark, self.at):
            return False
        self.at += len(mark)
        return True

    def need(self, mark: str) -> None:
        if not self.take(mark):
            raise ValueError(f"no {mark}")


def _unescaped(found: re.Match[str]) -> str:
    code = found[1]
    return chr(int(code[1:], 16)) if len(code) > 1 else ESCAPES.get(code, code)


def _object(pairs: list[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in pairs) + "}"


def python_calls(closing: str = "", listed: bool = True) -> Reader:
    """[NAME(KEY=VALUE, …), …], as Python writes it; or such calls line by line."""
    head = re.compile(rf"\s*\[?\s*{NAME}\(")
    closed = re.compile(rf"\s*(?:{closing}|\Z)") if closing else None

    def read(text: str, at: int) -> Read:
        if not head.match(text, at):
            return [], at
        said, calls = Literals(text, at, ('"', "'")), list[Spoken]()
        in_list = said.take("[")
        if listed and not in_list:
            return [], at
        while not (in_list and said.take("]")):
            if calls and in_list:
                said.need(",")
            said.space()
            name = said.word()
            said.need("(")
            calls.append(Spoken(name, _object(said.items(")", "="))))
            if not in_list and not head.match(text, said.at):
                break
        return calls, must(closed, text, said.at) if closed else said.at

    return read


def gemma_calls(quote: str, closing: str) -> Reader:
    """call:NAME{KEY:VALUE,…}, with marks of the family's own around texts."""
    head = re.compile(rf"\s*call:(?P<name>{NAME})\{{")
    closed = re.compile(rf"\s*(?:{closing}|\Z)")

    def read(text: str, at: int) -> Read:
        found = head.match(text, at)
        if found is None:
            return [], at
        said = Literals(text, found.end(), (quote,))
        arguments = _object(said.items("}", ":"))
        return [Spoken(found["name"], arguments)], must(closed, text, said.at)

    return read


def first_of(*readers: Reader) -> Reader:
    """The first reader that finds a call. What only some of them find broken is broken."""

    def read(text: str, at: int) -> Read:
        broken: ValueError | None = None
        for reader in readers:
            try:
                calls, end = reader(text, at)
            except ValueError as error:
                broken = error
            else:
                if calls:
                    return calls, end
        if broken:
            raise broken
        return [], at

    return read


# helpers


def skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at


def must(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    if found is None:
        raise ValueError("a call does not end")
    return found.end()


def expect(text: str, at: int, mark: str) -> int:
    if not text.startswith(mark, at):
        raise ValueError(f"no {mark}")
    return at + len(mark)
