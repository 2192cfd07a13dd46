"""What programs that speak OpenAI send to aios-gateway(8): honoured, ignored without harm, or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from tests.gateway import Gateway
from tests.t5_gateway import GAMES, Curl, chat, text

pytestmark = [pytest.mark.mount, pytest.mark.root]
Json = dict[str, Any]
CALC: Json = {
    "name": "calc",
    "description": "Calculate an arithmetic expression",
    "parameters": {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
    },
}
CITY: Json = {
    "name": "weather",
    "description": "Tell the weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS = [{"type": "function", "function": tool} for tool in (CALC, CITY)]


@pytest.fixture
def games(gateway: Gateway) -> Iterator[Curl]:
    curl = Curl(gateway, GAMES)
    with closing(curl.http):
        yield curl


def choice(games: Curl, body: Json) -> Json:
    status, answer = games.ask(body)
    assert status == 200, answer
    found: Json = answer["choices"][0]
    return found


def calls_of(chunks: list[Json]) -> list[Json]:
    deltas = [entry["delta"] for chunk in chunks for entry in chunk["choices"]]
    return [call for delta in deltas for call in delta.get("tool_calls") or []]


def test_a_model_calls_tools_also_in_a_stream_and_reads_their_result(games: Curl) -> None:
    asked = chat("What is 37 * 12?", tools=TOOLS)
    said = choice(games, asked)
    assert said["finish_reason"] == "tool_calls"
    (call,) = said["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"expression": "37 * 12"}
    chunks = games.stream(asked)
    (streamed,) = calls_of(chunks)
    assert streamed["index"] == 0
    assert streamed["function"] == call["function"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    result = {"role": "tool", "tool_call_id": call["id"], "content": "444"}
    assert (
        "444"
        in choice(games, asked | {"messages": [*asked["messages"], said["message"], result]})["message"][
            "content"
        ]
    )


def test_a_client_chooses_the_tool(games: Curl) -> None:
    asked = chat("What is 37 * 12?", tools=TOOLS)
    assert "tool_calls" not in choice(games, asked | {"tool_choice": "none", "max_tokens": 20})["message"]
    named = {"type": "function", "function": {"name": "weather"}}
    said = choice(games, asked | {"tool_choice": named, "max_tokens": 60})
    assert said["message"]["tool_calls"][0]["function"]["name"] == "weather"
    said = choice(games, chat("Hello", tools=TOOLS, tool_choice="required", max_tokens=60))
    assert said["message"]["tool_calls"]


def test_parallel_calls_have_an_index_each_and_can_be_switched_off(games: Curl) -> None:
    asked = chat("What is 37 * 12?", tools=TOOLS, tool_choice="required", min_tokens=100, max_tokens=400)
    several = calls_of(games.stream(asked))
    assert len(several) > 1
    assert [call["index"] for call in several] == list(range(len(several)))
    assert len({call["id"] for call in several}) == len(several)
    one = choice(games, asked | {"parallel_tool_calls": False})
    assert len(one["message"]["tool_calls"]) == 1


def test_an_answer_fits_its_schema_also_in_a_stream(games: Curl) -> None:
    schema = {
        "type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 99}},
        "required": ["n"], "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    body = chat("How many?", response_format=form, max_tokens=60)
    for said in (choice(games, body)["message"]["content"], text(games.stream(body))):
        assert 1 <= json.loads(said)["n"] <= 99


def test_a_seed_repeats_an_answer_and_a_bias_and_a_penalty_change_it(games: Curl) -> None:
    drawn = chat("Say something.", temperature=3, max_tokens=12, seed=3)
    once = choice(games, drawn)["message"]["content"]
    assert choice(games, drawn)["message"]["content"] == once
    others = [choice(games, drawn | {"seed": seed})["message"]["content"] for seed in range(4, 12)]
    assert set(others) != {once}
    body = chat("Repeat: mango", max_tokens=4)
    (token, *_) = choice(games, body | {"logprobs": True, "top_logprobs": 2})["logprobs"]["content"]
    assert len(token["top_logprobs"]) == 2
    assert not choice(games, body | {"logit_bias": {str(token["id"]): -100}})["message"][
        "content"
    ].startswith(token["token"])
    long = chat("Say something.", min_tokens=40, max_tokens=40, ignore_eos=True)
    plain = choice(games, long)["message"]["content"]
    assert (
        choice(games, long | {"frequency_penalty": 2, "presence_penalty": 2})["message"]["content"] != plain
    )


def test_an_answer_ends_before_a_stop_text(games: Curl) -> None:
    said = choice(games, chat("Repeat: mango", stop=["g"]))
    assert said["message"]["content"] == "man"
    assert said["finish_reason"] == "stop"


def test_logprobs_are_in_the_chunks(games: Curl) -> None:
    chunks = games.stream(chat("Repeat: fig", logprobs=True, top_logprobs=1))
    tokens = [
        token
        for chunk in chunks
        for entry in chunk["choices"]
        for token in (entry.get("logprobs") or {}).get("content") or []
    ]
    assert "fig" in b"".join(bytes(token["bytes"]) for token in tokens).decode()


def test_what_only_openais_own_service_uses_is_taken(games: Curl) -> None:
    more = {
        "user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "store": True, "safety_identifier": "s",
        "prompt_cache_key": "k", "verbosity": "low", "modalities": ["text"], "logit_bias": None, "stop": None,
    }  # fmt: skip
    assert choice(games, chat("Repeat: fig", **more))["message"]["content"] == "fig"


def test_an_effort_that_the_model_does_not_know_is_told(games: Curl) -> None:
    for stream in (False, True):
        answer = games.send(chat("Repeat: fig", reasoning_effort="low", stream=stream))
        assert (answer.status, answer.headers["x-aios-ignored"]) == (200, "reasoning_effort")
        answer.read()
    answer = games.send(chat("Repeat: fig"))
    assert "x-aios-ignored" not in answer.headers
    answer.read()


IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"messages": [{"role": "user", "content": IMAGE}]}, "image"),
        ({"functions": [CALC]}, "tools"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"web_search_options": {"a": 1}}, "web_search"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "none"}}, "tools": TOOLS}, "none"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "what"}}}}, "what"),
        ({"n": "2"}, "n is"),
        ({"n": 17}, "n is"),
        ({"stop": 7}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"frequency_penalty": 9}, "frequency_penalty"),
        ({"stream_options": 5}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "role"),
        ({"nonsense": 1}, "nonsense"),
        ({"seed": "x", "n": 2}, "seed"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_a_stream_begins(
    games: Curl, more: Json, word: str
) -> None:
    for stream in (False, True):
        status, answer = games.ask(chat("hi", stream=stream, stream_options=None) | more)
        assert status == 400, answer
        assert word in answer["error"]["message"]
        assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_a_request_that_is_wrong(games: Curl, stream: bool) -> None:
    status, answer = games.ask(chat("word " * 3000, stream=stream))
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert "2048" in answer["error"]["message"]


DEEP = b'{"model": "tiny", "messages": ' + b"[" * 900 + b"]" * 900 + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"null",
        b"7",
        b'{"model": "tiny", "messages": ' + b"[" * 100_000 + b"}",
        DEEP,
        b'{"model": "\\ud800"}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1e999}',
        b'{"model": "tiny", "messages": [], "seed": ' + b"9" * 4000 + b"}",
        b'{"model": "tiny", "messages": [], "temperature": NaN}',
        b'{"model": "tiny", "n": 1e2, "messages": {"a": "\\u0000"}}',
        b'{"model": {"a": []}, "messages": [[[]]]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "a\\u0000b"}], "stream": [true]}',
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
def test_a_hostile_body_is_a_request_that_is_wrong(games: Curl, body: bytes, path: str) -> None:
    games.http.request("POST", path, body, {"Content-Type": "application/json"})
    answer = games.http.getresponse()
    said = json.loads(answer.read())["error"]
    assert answer.status in (400, 404), said
    assert said["type"] in ("invalid_request_error", "not_found_error")
