"""What aios-gateway(8) makes of Ollama's requests and for Ollama's clients, without a mount."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from aiosd.gateway.ollama import models, names, pulls, refusal, request
from aiosd.gateway.ollama.answer import Telling, merged, of_chat, of_generate, parts
from aiosd.gateway.refused import HttpRefused

Json = dict[str, Any]
ASKED: Json = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("name", "local", "source"),
    [
        ("tiny", "tiny", "tiny"),
        ("tiny:latest", "tiny", "tiny"),
        ("smollm2:135m", "smollm2-135m", "smollm2:135m"),
        ("registry.ollama.ai/library/qwen3:4b", "qwen3-4b", "qwen3:4b"),
        ("hf.co/Qwen/Qwen3-0.6B-GGUF:Q8_0", "Qwen3-0.6B-Q8_0", "hf:Qwen/Qwen3-0.6B-GGUF:Q8_0"),
        ("huggingface.co/org/m:latest", "m", "hf:org/m"),
    ],
)
def test_a_name_of_ollama_is_a_name_of_the_tree_and_a_source(name: str, local: str, source: str) -> None:
    assert (names.local(name), names.source(name)) == (local, source)


def test_an_agent_is_no_model_to_pull() -> None:
    assert names.local("agent:ada") == names.local("agent:ada:latest") == "agent:ada"
    with pytest.raises(HttpRefused):
        names.source("agent:ada")


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/../b", "/etc", "a:b:c", "hf.co/../x", "a\nload /", "é", "\ud800", "x" * 200]
)
def test_what_is_no_name_leads_nowhere(name: str) -> None:
    for made in (names.local, names.source):
        with pytest.raises(HttpRefused) as refused:
            made(name)
        assert json.loads(bytes(refusal(refused.value).body)).keys() == {"error"}


def test_ollamas_defaults_are_a_models_and_not_an_agents() -> None:
    first, second = request.chat(ASKED, False), request.chat(ASKED, False)
    assert first["seed"] != second["seed"]
    assert (first["temperature"], first["top_k"], first["top_p"]) == (0.8, 40, 0.9)
    assert (first["max_tokens"], first["truncation"], first["stream"]) == (request.ENDLESS, "auto", True)
    assert request.chat(ASKED, True) == {
        "messages": ASKED["messages"], "truncation": "auto", "stream": True,
    }  # fmt: skip


def test_options_have_the_names_of_the_files() -> None:
    options = {
        "num_predict": 7, "temperature": 0, "top_k": -1, "min_p": 0.1, "seed": 0, "stop": ["x"],
        "num_ctx": 4096,
        "repeat_penalty": 1.2, "presence_penalty": 1, "frequency_penalty": 2, "mirostat": 0, "typical_p": 1.0,
    }  # fmt: skip
    assert request.sampling(options, True) == {
        "max_tokens": 7, "temperature": 0, "top_k": 0, "min_p": 0.1, "seed": 0, "stop": ["x"],
        "repetition_penalty": 1.2, "presence_penalty": 1, "frequency_penalty": 2,
    }  # fmt: skip
    assert request.sampling({"num_predict": -2, "repeat_penalty": 2, "repeat_last_n": 0}, True) == {
        "max_tokens": request.ENDLESS
    }


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("options", {"mirostat": 2}, "mirostat"),
        ("options", {"num_predict": "many"}, "num_predict"),
        ("options", [], "options"),
        ("format", "xml", "format"),
        ("think", "much", "think"),
        ("keep_alive", "soon", "keep_alive"),
        ("keep_alive", float("nan"), "keep_alive"),
        ("keep_alive", True, "keep_alive"),
        ("messages", [{"role": "user", "content": "?", "images": ["aGk="]}], "images"),
        ("messages", [{"role": "assistant", "tool_calls": [{}]}], "tool_calls"),
        ("messages", ["hi"], "messages"),
    ],
)
def test_what_cannot_be_honoured_is_refused(key: str, value: object, word: str) -> None:
    with pytest.raises(HttpRefused, match=word) as refused:
        request.chat(ASKED | {key: value}, False)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        (300, 300), ("5m", 300), ("1h30m", 5400), ("1.5s", 1.5), ("90", 90), (0, 0), ("0s", 0), (0.25, 0.25),
        (-1, request.LONGEST_S), ("-1m", request.LONGEST_S), (float("inf"), request.LONGEST_S),
        ("999999999h", request.LONGEST_S),
    ],
)  # fmt: skip
def test_a_duration_is_one_of_go(said: object, seconds: float) -> None:
    assert request.keep_alive({"keep_alive": said}) == {"keep_alive": seconds}


def test_a_format_and_a_thought_have_their_keys() -> None:
    schema = {"type": "object"}
    form = request.format_of(schema)["response_format"]
    assert form == {
        "type": "json_schema",
        "json_schema": {"name": "format", "schema": schema, "strict": False},
    }
    assert request.format_of("json") == {"response_format": {"type": "json_object"}}
    assert request.format_of("") == {}
    assert request.thinking({"think": False}) == {"enable_thinking": False}
    assert request.thinking({"think": "low"}) == {"enable_thinking": True, "reasoning_effort": "low"}


def test_a_result_finds_its_call() -> None:
    calls = [{"function": {"name": name, "arguments": {"x": i}}} for i, name in enumerate("abb")]
    given: list[Json] = [
        {"role": "assistant", "content": "", "tool_calls": calls, "thinking": "hm"},
        {"role": "tool", "tool_name": "b", "content": "first b"},
        {"role": "tool", "content": "the first that is left"},
        {"role": "tool", "tool_name": "b", "content": "second b"},
    ]
    said, *results = request.messages(given)
    assert said["reasoning_content"] == "hm"
    assert [call["function"]["arguments"] for call in said["tool_calls"]] == [
        '{"x": 0}',
        '{"x": 1}',
        '{"x": 2}',
    ]
    numbers = [call["id"] for call in said["tool_calls"]]
    assert [result["tool_call_id"] for result in results] == [numbers[1], numbers[0], numbers[2]]


def test_a_prompt_is_a_message_or_raw() -> None:
    body = {"model": "tiny", "prompt": "hi", "system": "Be brief.", "context": [1, 2]}
    assert request.generate(body, False)["messages"] == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"},
    ]  # fmt: skip
    raw = request.generate(body | {"raw": True}, False)
    assert (raw["prompt"], raw["raw"]) == ("hi", True)
    assert not {"messages", "system"} & raw.keys()
    for key in ("suffix", "template"):
        with pytest.raises(HttpRefused, match=key):
            request.generate(body | {key: "x"}, False)


def chunk(finish: str | None = None, usage: Json | None = None, **delta: object) -> bytes:
    said: Json = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    return json.dumps(said | ({"usage": usage} if usage else {})).encode()


async def given(*lines: bytes) -> AsyncIterator[bytes]:
    for line in lines:
        yield line


def told(shape: Any, first: bytes, *rest: bytes) -> list[Json]:
    async def collect() -> list[Json]:
        return [part async for part in parts(Telling("tiny", shape), first, given(*rest))]

    return asyncio.run(collect())


CALL = {"index": 0, "id": "call_7_0", "function": {"name": "calc", "arguments": '{"e": '}}
ANSWER = (
    chunk(reasoning_content="hm"), chunk(content="a"), chunk(content="b"), chunk(tool_calls=[CALL]),
    chunk("length", {"prompt_tokens": 5, "completion_tokens": 2},
          tool_calls=[{"index": 0, "function": {"arguments": "1}"}}]),
)  # fmt: skip


def test_a_stream_ends_with_counts_and_times() -> None:
    thought, a, b, called, last = told(of_chat, *ANSWER)
    assert thought["message"] == {"role": "assistant", "content": "", "thinking": "hm"}
    assert (a["message"]["content"], b["message"]["content"], b["done"]) == ("a", "b", False)
    assert called["message"]["tool_calls"] == [
        {"id": "call_7_0", "function": {"index": 0, "name": "calc", "arguments": {"e": 1}}}
    ]
    assert (last["done"], last["done_reason"], last["message"]["content"]) == (True, "length", "")
    assert (last["prompt_eval_count"], last["eval_count"]) == (5, 2)
    assert last["total_duration"] >= last["prompt_eval_duration"] >= 0
    assert last["eval_duration"] > 0


def test_a_whole_answer_is_its_parts() -> None:
    async def collect(shape: Any) -> Json:
        return await merged(parts(Telling("tiny", shape), ANSWER[0], given(*ANSWER[1:])))

    whole = asyncio.run(collect(of_chat))
    message = whole["message"]
    assert (message["content"], message["thinking"], len(message["tool_calls"])) == ("ab", "hm", 1)
    assert (whole["done"], whole["eval_count"]) == (True, 2)
    plain = asyncio.run(collect(of_generate))
    assert (plain["response"], plain["thinking"]) == ("ab", "hm")
    assert "content" not in plain


def test_a_pull_is_told_in_bytes() -> None:
    line = pulls.step("12/94 MB", "smollm2")
    assert (line["completed"], line["total"]) == (12_000_000, 94_000_000)
    assert line["status"].startswith("pulling ")
    assert pulls.step("unpacks 12/98 MB", "smollm2")["digest"] != line["digest"]
    assert pulls.step("checks", "smollm2") == {"status": "verifying sha256 digest"}
    assert pulls.step("", "smollm2") == {"status": "pulling manifest"}


def test_a_model_is_shown_as_it_is() -> None:
    info = {
        "name": "m", "path": "/x/m.gguf", "architecture": "Qwen3ForCausalLM", "parameters": 596_049_920,
        "context_length": 40960, "quantization": "Q8_0", "tool_calls": "hermes", "thinking": ["<think>"],
        "files": [{"name": "m.gguf", "sha256": "00"}], "size_bytes": 639_000_000,
    }  # fmt: skip
    shown = models.description(info)
    assert shown["model_info"]["qwen3.context_length"] == 40960
    assert shown["capabilities"] == ["completion", "tools", "thinking"]
    assert shown["details"] == {
        "parent_model": "", "format": "gguf", "family": "qwen3", "families": ["qwen3"],
        "parameter_size": "596.0M", "quantization_level": "Q8_0",
    }  # fmt: skip
    listed = models.entry("m", 0, info)
    assert (listed["name"], listed["size"], len(listed["digest"])) == ("m:latest", 639_000_000, 64)
    assert models.entry("agent:ada", 0, {})["name"] == "agent:ada"
