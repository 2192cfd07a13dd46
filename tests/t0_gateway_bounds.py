"""What aios-gateway(8) counts and bounds: tokens of keys, wrong keys, silent streams, large bodies."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from aiosd.gateway import allowance, signs
from aiosd.gateway.allowance import Allowances
from aiosd.gateway.bodies import VALUES_MOST, values_of
from aiosd.gateway.keys import WRONG_ID_MOST, KeyRing, KnownKey
from aiosd.gateway.refused import HttpRefused
from aiosd.gateway.signs import SIGN, Signs
from aiosd.gateway.spent import SpentTokens

KEY = KnownKey("k1", 1000, "", 10)
WORD = f"aios-{'a' * 12}-{'b' * 64}"
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


def used_up(counts: Allowances, key: KnownKey = KEY) -> bool:
    try:
        counts.check(key)
    except HttpRefused as refused:
        assert refused.status == 429
        assert 1 <= int(refused.headers["Retry-After"]) <= 86400
        return True
    return False


def test_a_key_is_used_up_until_the_next_day_also_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Allowances(tmp_path)
    counts.count(KEY, 6)
    assert not used_up(counts)
    counts.count(KEY, 4)
    assert used_up(counts)
    assert used_up(Allowances(tmp_path))
    assert not used_up(counts, KnownKey("k2", 1000, "", 10))
    assert not used_up(counts, KnownKey("k1", 1000, "", None))
    tomorrow = allowance.today() + 1
    monkeypatch.setattr(allowance, "today", lambda: tomorrow)
    assert not used_up(counts)
    assert not used_up(Allowances(tmp_path))


def test_a_damaged_file_costs_only_the_damaged_lines(tmp_path: Path) -> None:
    counts = Allowances(tmp_path)
    counts.count(KEY, 10)
    with (tmp_path / allowance.NAME).open("ab") as file:
        file.write(b"\xff\xff x\n99\n1 2 3 4\n%d k1 -5" % allowance.today())
    assert used_up(Allowances(tmp_path))


def test_the_file_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "COMPACT_LINES", 10)
    counts = Allowances(tmp_path)
    for _ in range(100):
        counts.count(KnownKey("k1", 1000, "", 1000), 1)
    assert len((tmp_path / allowance.NAME).read_text().splitlines()) <= 11
    assert used_up(Allowances(tmp_path), KnownKey("k1", 1000, "", 100))


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize(
    ("content", "whole", "tokens"),
    [("hi", True, 7), ('say "usage": {"total_tokens": 99}', True, 7), ("x" * 9000, True, 7)],
)
def test_the_tokens_of_an_answer_are_those_of_its_usage(
    step: int, content: str, whole: bool, tokens: int
) -> None:
    said = list[int]()
    spent = SpentTokens(40, said.append)
    answer = json.dumps({"choices": [{"content": content}], "usage": USAGE}, separators=(",", ":")) + "\n"
    data = answer.encode()
    for i in range(0, len(data), step):
        spent.passed(data[i : i + step])
    spent.end(whole)
    assert said == [tokens]


def test_an_answer_that_is_broken_off_costs_what_came() -> None:
    said = list[int]()
    spent = SpentTokens(40, said.append)
    for _ in range(20):
        spent.passed(b'{"choices":[{"delta":{"content":"a"}}]}\n')
    spent.end(whole=False)
    assert said == [11 + 20]


@pytest.mark.parametrize("tokens", ["-1000000", "1e999", "NaN", '"x"', "[" * 900 + "1" + "]" * 900])
def test_no_tool_gives_tokens_back_by_what_it_prints(tokens: str) -> None:
    said = list[int]()
    spent = SpentTokens(40, said.append)
    spent.passed(b'{"usage":{"total_tokens":%s}}\n' % tokens.encode())
    spent.end(whole=True)
    assert said == [0]


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"[]," * 90_000, b'{"a":' * 101_000, b'["' + b'","' * 101_000, b'["","' * 210_000,
        b'["a",' + b'"\\\\",' * 150_000,
    ],
)  # fmt: skip
def test_the_values_of_json_are_counted_before_they_are_made(body: bytes) -> None:
    assert values_of(bytearray(body)) > VALUES_MOST


@pytest.mark.parametrize(
    "text", [",[{" * 200_000, '"' * 1_000_000, "\\" * 1_000_000, '\\",[' * 200_000, '"[,' * 200_000]
)
def test_a_long_text_is_one_value(text: str) -> None:
    began_s = time.monotonic()
    assert values_of(bytearray(json.dumps({"a": text}).encode())) < 10
    assert time.monotonic() - began_s < 1


class Checked:
    """keys/check, with its wrong keys."""

    def __init__(self, root: Path) -> None:
        (root / "keys" / ("a" * 12)).mkdir(parents=True)
        self.asked = list[str]()

    def __call__(self, root: Path, word: str) -> KnownKey:
        self.asked.append(word)
        if word != WORD:
            raise PermissionError
        return KEY


def test_wrong_keys_are_bounded_and_known_keys_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = Checked(tmp_path)
    monkeypatch.setattr("aiosd.gateway.keys.check", checked)
    ring = KeyRing(tmp_path)

    async def flood() -> list[int]:
        assert await ring.of(WORD) == KEY
        statuses = list[int]()
        for i in range(WRONG_ID_MOST + 5):
            with pytest.raises(HttpRefused) as refused:
                await ring.of(f"{WORD[:-3]}{i:03}")
            statuses.append(refused.value.status)
        ring._right = type(ring._right)({d: (0.0, key) for d, (_, key) in ring._right.items()})
        assert await ring.of(WORD) == KEY
        return statuses

    assert asyncio.run(flood()) == [401] * WRONG_ID_MOST + [429] * 5
    assert len(checked.asked) == WRONG_ID_MOST + 2


def test_a_key_without_an_id_of_the_tree_does_not_cost_the_daemon_a_check(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "version").write_text("1")

    async def flood() -> None:
        ring = KeyRing(tmp_path)
        for i in range(2000):
            with pytest.raises(HttpRefused, match="this key is none"):
                await ring.of(f"aios-{i:012}-{'b' * 64}")

    asyncio.run(flood())  # keys/check is not there: it would be another refusal


@pytest.mark.parametrize(("kind", "signed"), [(b"text/event-stream", True), (b"application/json", False)])
def test_a_silent_stream_shows_signs_of_life_until_its_end(
    monkeypatch: pytest.MonkeyPatch, kind: bytes, signed: bool
) -> None:
    monkeypatch.setattr(signs, "SILENT_S", 0.02)
    sent = list[Any]()

    async def send(message: Message) -> None:
        sent.append(message.get("body", message["type"]))

    async def stream() -> None:
        made = Signs(send)
        await made.send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await asyncio.sleep(0.1)
        await made.send({"type": "http.response.body", "body": b"a", "more_body": True})
        await made.send({"type": "http.response.body", "body": b"", "more_body": False})
        await asyncio.sleep(0.1)

    asyncio.run(stream())
    assert [body for body in sent if body != SIGN] == ["http.response.start", b"a", b""]
    assert (SIGN in sent) is signed
    assert sent[-1] == b""


def test_a_key_is_not_called_wrong_while_there_is_no_tree(tmp_path: Path) -> None:
    with pytest.raises(HttpRefused, match="systemctl start aiosd") as refused:
        asyncio.run(KeyRing(tmp_path).of(WORD))
    assert refused.value.status == 503
    (tmp_path / "version").write_text("1")
    with pytest.raises(HttpRefused, match="is none") as refused:
        asyncio.run(KeyRing(tmp_path).of(WORD))
    assert refused.value.status == 401
