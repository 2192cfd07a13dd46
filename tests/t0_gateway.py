"""What aios-gateway(8) makes of a request and of an answer, and its messages, without a mount."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.gateway import openai_chat, wire
from aiosd.gateway.client import Client, first_of
from aiosd.gateway.dialect import chat_file
from aiosd.gateway.refused import HttpRefused
from aiosd.gateway.sessions import SessionLink

Json = dict[str, object]
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


async def no_session() -> SessionLink:
    raise AssertionError


def client(agent: str = "") -> Client:
    return Client(1000, agent, no_session)


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("tiny", "models/tiny/llm"),
        ("Qwen3-4B.v1_x", "models/Qwen3-4B.v1_x/llm"),
        ("agent:ada", "agents/ada/syscall/llm"),
    ],
)
def test_a_model_names_a_file(model: str, path: str) -> None:
    assert chat_file(client(), model) == path


@pytest.mark.parametrize(
    "model", [".", "..", "a/b", "agent:../x", "agent:", "", "é", "x" * 65, "a\n", None, 5, ["a"]]
)
def test_what_is_no_name_is_no_path(model: object) -> None:
    with pytest.raises(HttpRefused) as refused:
        chat_file(client(), model)
    assert refused.value.status in (400, 404)


def test_a_key_of_an_agent_opens_nothing_else() -> None:
    assert chat_file(client("ada"), "agent:ada") == "agents/ada/syscall/llm"
    for model in ("tiny", "ada", "agent:bob"):
        with pytest.raises(HttpRefused, match="only agent:ada"):
            chat_file(client("ada"), model)


def test_a_model_answers_to_its_end_and_otherwise_each_time() -> None:
    first, second = openai_chat.defaults({}), openai_chat.defaults({"max_tokens": 5})
    assert first["max_tokens"] == openai_chat.ENDLESS
    assert second.keys() == {"seed"}
    assert first["seed"] != second["seed"]
    assert openai_chat.defaults({"max_completion_tokens": 5, "seed": 0}) == {}


def test_each_choice_has_a_seed_of_its_own() -> None:
    assert [json.loads(openai_chat.written({"seed": 7}, i))["seed"] for i in range(3)] == [7, 8, 9]


def line(text: str, **more: object) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return json.dumps({"id": "aios-1", "choices": [choice], **more}).encode() + b"\n"


async def lines(*given: bytes) -> AsyncIterator[bytes]:
    for one in given:
        yield one


def streamed(include_usage: bool, *streams: tuple[bytes, ...]) -> list[object]:
    async def collect() -> list[bytes]:
        iterators = [lines(*stream) for stream in streams]
        first = await first_of(iterators[0])
        return [event async for event in openai_chat.events(first, iterators, include_usage)]

    events = asyncio.run(collect())
    assert events.pop() == b"data: [DONE]\n\n"
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def test_usage_comes_only_to_whom_asked_and_in_a_chunk_of_its_own() -> None:
    answer = (line("a"), line("b"), line("", usage=USAGE))
    chunks = streamed(False, answer)
    assert len(chunks) == 3
    assert "usage" not in json.dumps(chunks)
    assert streamed(True, answer)[3] == {"id": "aios-1", "choices": [], "usage": USAGE}


def test_the_only_chunk_of_an_answer_is_its_last() -> None:
    one, usage = streamed(True, (line("a", usage=USAGE),))
    assert "usage" not in json.dumps(one)
    assert usage == {"id": "aios-1", "choices": [], "usage": USAGE}


def test_text_about_usage_is_no_usage() -> None:
    chunks = streamed(True, (line("a"), line('say "usage"'), line("", usage=USAGE)))
    assert "usage" in json.dumps(chunks[1])
    assert len(chunks) == 4


def test_the_usage_of_several_choices_counts_the_prompt_once() -> None:
    answer = (line("a"), line("", usage=USAGE))
    *_, last = streamed(True, answer, answer, answer)
    assert isinstance(last, dict)
    assert last["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}


def test_a_stream_that_fails_says_so() -> None:
    failed = b'{"error":{"message":"the worker died","type":"failed","request":7}}\n'
    *_, last = streamed(True, (line("a"), failed))
    error = {"message": "the worker died", "type": "server_error", "param": None, "code": "failed"}
    assert last == {"error": error}


@given(st.lists(st.tuples(st.dictionaries(st.text(), st.integers()), st.binary())), st.integers(1, 50))
def test_messages_arrive_as_they_were_sent(messages: list[tuple[Json, bytes]], step: int) -> None:
    data = b"".join(wire.packed(head, body) for head, body in messages)
    read = wire.Messages()
    parts = [data[i : i + step] for i in range(0, len(data), step)]
    assert [message for part in parts for message in read.add(part)] == messages


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\0\0\0\2[]", b"\0\0\0\1{", b"\0\0\0\0"])
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(wire.Malformed):
        list(wire.Messages().add(data))
