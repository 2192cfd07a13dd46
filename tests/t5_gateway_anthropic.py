"""Anthropic's Messages over HTTP on the real mount, as a real user."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from tests.gateway import Gateway
from tests.running import Daemon
from tests.t5_gateway import GAMES, NEWS, Curl
from tests.t5_gateway_keys import key_of
from tests.t5_users import as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]
TOOL = {
    "name": "calc",
    "description": "Calculate",
    "input_schema": {"type": "object", "properties": {"expression": {"type": "string"}}},
}
Json = dict[str, Any]


@pytest.fixture(scope="module")
def gateway(aios: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway") / "run"
    made = Gateway(folder, aios, "--model-alias", "claude-*=tiny", "--model-alias", "my-*=agent:ada")
    yield made.start()
    made.stop()
    assert "Traceback" not in made.log.read_text()


class Messages:
    """A program that speaks Anthropic's API."""

    def __init__(self, gateway: Gateway) -> None:
        self.http = Curl(gateway, GAMES).http

    def send(self, body: object, path: str = "/v1/messages", **headers: str) -> Any:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"anthropic-version": "2023-06-01"} | headers
        self.http.request("POST" if body else "GET", path, data if body else None, headers)
        return self.http.getresponse()

    def ask(self, body: object, path: str = "/v1/messages", **headers: str) -> tuple[int, Json]:
        answer = self.send(body, path, **headers)
        assert answer.headers["request-id"].startswith("req_")
        return answer.status, json.loads(answer.read())

    def stream(self, body: Json) -> list[Json]:
        answer = self.send(body | {"stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.read().decode().split("\n\n")[:-1]
        return [json.loads(event.split("\ndata: ")[1]) for event in events]


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Messages]:
    made = Messages(gateway)
    with closing(made.http):
        yield made


def say(content: object, **more: object) -> Json:
    return {"model": "tiny", "max_tokens": 60, "messages": [{"role": "user", "content": content}]} | more


def test_a_message_is_answered_whole_and_as_a_stream(client: Messages, aios: Daemon) -> None:
    status, whole = client.ask(say("Repeat: mango"))
    assert status == 200
    assert whole["content"] == [{"type": "text", "text": "mango"}]
    assert (whole["type"], whole["role"], whole["stop_reason"]) == ("message", "assistant", "end_turn")
    assert "mango" in as_user(aios, GAMES, "cat models/tiny/llm").stdout
    events = client.stream(say("Repeat: mango"))
    deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(deltas) == "mango"
    assert events[0]["message"].keys() == whole.keys()
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert events[-1] == {"type": "message_stop"}


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_sequence_that_ended_an_answer_is_told(client: Messages, stream: bool) -> None:
    body = say("Repeat: mango and fig", stop_sequences=["zzz", " and"])
    told = client.stream(body)[-2]["delta"] if stream else client.ask(body)[1]
    assert (told["stop_reason"], told["stop_sequence"]) == ("stop_sequence", " and")


def test_a_tool_is_called_and_its_result_is_read(client: Messages) -> None:
    body = say("What is 37 * 12?", tools=[TOOL], system=[{"type": "text", "text": "", "cache_control": {}}])
    status, called = client.ask(body)
    assert (status, called["stop_reason"]) == (200, "tool_use")
    (call,) = called["content"]
    assert (call["name"], call["input"]) == ("calc", {"expression": "37 * 12"})
    events = client.stream(body)
    (made,) = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert json.loads(made["partial_json"]) == call["input"]
    body["messages"].append({"role": "assistant", "content": called["content"]})
    result = [{"type": "tool_result", "tool_use_id": call["id"], "content": "444"}]
    body["messages"].append({"role": "user", "content": result})
    assert client.ask(body)[1]["content"] == [{"type": "text", "text": "37 * 12 = 444"}]


def test_counted_tokens_are_those_that_a_message_takes(client: Messages) -> None:
    body = say("Repeat: mango", tools=[TOOL], system="Be brief.")
    usage = client.ask(body)[1]["usage"]
    counted = {key: value for key, value in body.items() if key != "max_tokens"}
    status, answer = client.ask(counted, "/v1/messages/count_tokens")
    assert (status, answer) == (
        200,
        {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]},
    )
    aliased = client.ask(counted | {"model": "claude-opus-9"}, "/v1/messages/count_tokens")
    assert aliased == (status, answer)
    assert client.ask(body | {"model": "my-model"}, "/v1/messages/count_tokens")[0] == 400


def test_an_alias_counts_in_every_dialect(client: Messages) -> None:
    said = {"model": "claude-x", "messages": [{"role": "user", "content": "Repeat: fig"}], "stream": False}
    answer = client.send(said, "/api/chat")
    assert json.loads(answer.read())["message"]["content"] == "fig"
    vector = client.send({"model": "claude-x", "input": "fig"}, "/v1/embeddings")
    assert (vector.status, len(json.loads(vector.read())["data"])) == (200, 1)


def test_models_have_the_shape_of_anthropic_and_aliases(client: Messages, aios: Daemon) -> None:
    assert as_user(aios, GAMES, "mkdir agents/ada").returncode == 0
    try:
        _, listed = client.ask(None, "/v1/models?limit=1")
        assert (listed["has_more"], len(listed["data"])) == (True, 1)
        _, more = client.ask(None, f"/v1/models?after_id={listed['last_id']}")
        ids = [card["id"] for card in listed["data"] + more["data"]]
        assert {"tiny", "agent:ada"} <= set(ids)
        assert client.ask(None, f"/v1/models?before_id={more['first_id']}")[1]["data"] == listed["data"]
        assert client.ask(None, "/v1/models/claude-opus-9")[1]["id"] == "tiny"
        assert "object" not in listed
        assert client.ask(None, "/v1/models?limit=0")[0] == 400
        for model in ("claude-opus-9", "my-model"):
            status, answer = client.ask(say("Repeat: kiwi", model=model))
            assert (status, answer["model"], answer["content"][0]["text"]) == (200, model, "kiwi")
        assert "kiwi" in as_user(aios, GAMES, "cat agents/ada/requests/latest/response.json").stdout
    finally:
        (aios.root / "agents/ada").rmdir()


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b"{", 400, "invalid_request_error"),
        (
            b'{"model": "tiny", "max_tokens": 1, "messages": ' + b"[" * 900 + b"]" * 900 + b"}",
            400,
            "invalid_request_error",
        ),
        (say("hi", model="none"), 404, "not_found_error"),
        (say("hi", temperature="hot"), 400, "invalid_request_error"),
        (say("hi", max_tokens=10**30), 400, "invalid_request_error"),
        (say([{"type": "text", "text": "\ud800"}]), 400, "invalid_request_error"),
        (say("hi", **{"\ud800": 1}), 400, "invalid_request_error"),
        (say([{"type": "image", "source": {}}]), 400, "invalid_request_error"),
        (say("x " * 3_000_000), 413, "request_too_large"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said_in_the_shape_of_anthropic(
    client: Messages, body: Any, status: int, kind: str, stream: bool
) -> None:
    got, answer = client.ask(body if isinstance(body, bytes) else body | {"stream": stream})
    assert got == status, answer
    assert (answer["type"], answer["error"]["type"]) == ("error", kind)
    assert answer["error"]["message"]


def deep(levels: int) -> bytes:
    """A request that Python can read, and may be unable to write again."""
    schema = b'{"a":' * levels + b"{}" + b"}" * levels
    tools = b'[{"name": "t", "input_schema": ' + schema + b"}]"
    return json.dumps(say("hi"))[:-1].encode() + b', "tools": ' + tools + b"}"


def test_a_request_of_any_depth_is_refused_and_not_failed(client: Messages) -> None:
    for levels in (70, *range(880, 1000, 2), 100_000):
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            assert client.ask(deep(levels), path)[0] == 400, levels


def test_the_key_is_that_of_anthropics_clients(client: Messages, aios: Daemon) -> None:
    key = key_of(aios, NEWS)["key"]
    assert client.ask(say("Repeat: plum"), **{"x-api-key": key})[0] == 200
    assert "plum" in as_user(aios, NEWS, "cat models/tiny/llm").stdout
    status, answer = client.ask(say("hi"), **{"x-api-key": "aios-x"})
    assert (status, answer["error"]["type"]) == (401, "authentication_error")
    status, answer = client.ask(None, "/v1/messages/batches")
    assert (status, answer["error"]["type"]) == (404, "not_found_error")
