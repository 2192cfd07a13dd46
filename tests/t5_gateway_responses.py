"""OpenAI's responses and completions of real users on the real mount, by the programs of aios-gateway(8)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from tests.gateway import Gateway
from tests.running import Daemon, wait_until
from tests.t5_gateway import GAMES, NEWS, Curl, chat
from tests.t5_gateway_keys import key_of
from tests.t5_users import as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]
Json = dict[str, Any]
PATH = "/v1/responses"
CALC: Json = {  # as the built-in model learnt it
    "type": "function",
    "name": "calc",
    "description": "Evaluate an arithmetic expression",
    "parameters": {
        "type": "object",
        "required": ["expression"],
        "additionalProperties": False,
        "properties": {
            "expression": {"type": "string", "description": "such as 2 * (3 + 4)", "maxLength": 1000}
        },
    },
}


@pytest.fixture
def games(gateway: Gateway) -> Iterator[Curl]:
    curl = Curl(gateway, GAMES)
    with closing(curl.http):
        yield curl


@pytest.fixture
def news(gateway: Gateway) -> Iterator[Curl]:
    curl = Curl(gateway, NEWS)
    with closing(curl.http):
        yield curl


def asked(input: object, **more: object) -> Json:
    return {"model": "tiny", "input": input, "temperature": 0} | more


def respond(curl: Curl, input: object, **more: object) -> Json:
    status, answer = curl.ask(asked(input, **more), PATH)
    assert status == 200, answer
    return answer


def text(response: Json) -> str:
    parts = [part for item in response["output"] if item["type"] == "message" for part in item["content"]]
    return "".join(part["text"] for part in parts)


def stream(curl: Curl, input: object, **more: object) -> list[Json]:
    answer = curl.send(asked(input, stream=True, **more), PATH)
    assert answer.status == 200, answer.read()
    said = [event.split("\n") for event in answer.read().decode().split("\n\n")[:-1]]
    events = [json.loads(data.removeprefix("data: ")) for _, data in said]
    assert [name.removeprefix("event: ") for name, _ in said] == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def contexts(aios: Daemon) -> list[str]:
    return sorted(path.name for path in (aios.root / "contexts").iterdir())


def test_a_conversation_branches_and_is_its_users_alone(games: Curl, news: Curl, aios: Daemon) -> None:
    first = respond(games, "My name is Zorvik.", metadata={"topic": "names"}, instructions="Be brief.")
    id = first["id"]
    assert (first["status"], first["store"], first["metadata"]) == ("completed", True, {"topic": "names"})
    assert first["usage"]["total_tokens"] == first["usage"]["input_tokens"] + first["usage"]["output_tokens"]
    answers = [respond(games, "What is my name?", previous_response_id=id) for _ in range(2)]
    assert all("Zorvik" in text(one) for one in answers)
    later = respond(games, "Repeat: fig", previous_response_id=answers[0]["id"])
    assert text(later) == "fig"
    assert len(aios.read(f"contexts/{later['id']}/messages.jsonl").splitlines()) == 6
    assert "Be brief." not in aios.read(f"contexts/{id}/messages.jsonl")
    assert games.ask(None, f"{PATH}/{id}") == (200, first)
    items = games.ask(None, f"{PATH}/{answers[1]['id']}/input_items?order=asc")[1]["data"]
    assert [item["role"] for item in items] == ["user", "assistant", "user"]
    assert news.ask(None, f"{PATH}/{id}")[0] == 404
    status, answer = news.ask(asked("What is my name?", previous_response_id=id), PATH)
    assert (status, answer["error"]["code"]) == (400, "previous_response_not_found")
    assert as_user(aios, NEWS, f"cat contexts/{id}/note").returncode != 0
    games.http.request("DELETE", f"{PATH}/{id}")
    assert json.loads(games.http.getresponse().read())["deleted"] is True
    assert games.ask(None, f"{PATH}/{id}")[0] == 404
    assert text(respond(games, "Repeat: kiwi", previous_response_id=later["id"])) == "kiwi"


def test_the_events_come_in_their_order(games: Curl) -> None:
    events = stream(games, "Repeat: mango")
    kinds = list(dict.fromkeys(event["type"].removeprefix("response.") for event in events))
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert "".join(e["delta"] for e in events if e["type"].endswith("text.delta")) == "mango"
    assert text(events[-1]["response"]) == "mango"
    assert games.ask(None, f"{PATH}/{events[-1]['response']['id']}")[1] == events[-1]["response"]
    cut = stream(games, "Repeat: mango", max_output_tokens=1, store=False)[-1]
    assert (cut["type"], cut["response"]["incomplete_details"]) == (
        "response.incomplete",
        {"reason": "max_output_tokens"},
    )


@pytest.mark.parametrize("streams", [False, True])
def test_a_tool_is_called_and_its_result_continues_the_response(games: Curl, streams: bool) -> None:
    question = "What is 37 * 12?"
    more: Json = {"tools": [CALC]}
    if streams:
        events = stream(games, question, **more)
        assert [e["type"] for e in events if "arguments" in e["type"]] == [
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
        ]
        response = events[-1]["response"]
    else:
        response = respond(games, question, **more)
    (call,) = [item for item in response["output"] if item["type"] == "function_call"]
    assert call["name"] == "calc"
    assert "37" in json.loads(call["arguments"])["expression"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "444"}
    assert "444" in text(respond(games, [result], previous_response_id=response["id"], tools=[CALC]))
    alone = [{"role": "user", "content": question}, call, result]
    assert "444" in text(respond(games, alone, tools=[CALC], store=False))


def test_an_answer_fits_its_schema(games: Curl) -> None:
    schema: Json = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "name": "number", "schema": schema, "strict": True}
    assert json.loads(text(respond(games, "A number.", text={"format": form}, max_output_tokens=60)))["n"]


def test_nothing_is_left_of_what_is_not_stored(games: Curl, gateway: Gateway, aios: Daemon) -> None:
    first = respond(games, "My name is Zorvik.")
    before = contexts(aios)
    answer = respond(games, "What is my name?", previous_response_id=first["id"], store=False)
    assert (answer["store"], "Zorvik" in text(answer)) == (False, True)
    wait_until(lambda: contexts(aios) == before, "the end of its context", 5.0)
    assert games.ask(None, f"{PATH}/{answer['id']}")[0] == 404
    assert games.ask(asked("x", temperature="hot"), PATH)[0] == 400
    wait_until(lambda: contexts(aios) == before, "the end of the refused one", 5.0)
    curl = Curl(gateway, GAMES)
    long = asked("Say something.", min_tokens=400, ignore_eos=True, max_output_tokens=400, stream=True)
    curl.http.request("POST", PATH, json.dumps(long).encode())
    wait_until(lambda: contexts(aios) != before, "the context of a long answer")
    curl.http.close()
    wait_until(lambda: contexts(aios) == before, "its end with its client", 5.0)


def test_a_conversation_is_a_context_of_the_user(games: Curl, news: Curl, aios: Daemon) -> None:
    assert as_user(aios, GAMES, "mkdir contexts/talk").returncode == 0
    try:
        respond(games, "My name is Zorvik.", conversation="talk")
        assert "Zorvik" in text(respond(games, "What is my name?", conversation={"id": "talk"}))
        assert len(aios.read("contexts/talk/messages.jsonl").splitlines()) == 4
        assert news.ask(asked("hi", conversation="talk"), PATH)[0] == 403
    finally:
        (aios.root / "contexts/talk").rmdir()


def test_conversations_are_made_and_shown_and_removed(games: Curl, news: Curl, aios: Daemon) -> None:
    path = "/v1/conversations"
    items = [{"role": "user", "content": "My name is Zorvik."}]
    status, made = games.ask({"metadata": {"topic": "names"}, "items": items}, path)
    assert (status, made["metadata"]) == (200, {"topic": "names"})
    id = made["id"]
    assert games.ask({"metadata": {"topic": "x"}}, f"{path}/{id}")[1]["metadata"] == {"topic": "x"}
    more = {"items": [{"role": "assistant", "content": "Hello."}]}
    added = games.ask(more, f"{path}/{id}/items")[1]["data"]
    assert [item["content"][0]["text"] for item in added] == ["Hello."]
    assert "Zorvik" in text(respond(games, "What is my name?", conversation=id))
    one = games.ask(None, f"{path}/{id}/items?order=asc&limit=1")[1]
    assert (one["has_more"], one["data"][0]["content"][0]["text"]) == (True, "My name is Zorvik.")
    rest = games.ask(None, f"{path}/{id}/items?order=asc&after={one['last_id']}")[1]
    assert (len(rest["data"]), rest["has_more"]) == (3, False)
    assert news.ask(None, f"{path}/{id}")[0] == 403
    assert news.ask({"items": items}, f"{path}/{id}/items")[0] == 403
    games.http.request("DELETE", f"{path}/{id}")
    assert json.loads(games.http.getresponse().read())["deleted"] is True
    assert games.ask(None, f"{path}/{id}")[0] == 404
    assert id not in contexts(aios)


def test_a_key_for_an_agent_reaches_no_conversation(games: Curl, aios: Daemon) -> None:
    assert as_user(aios, GAMES, "mkdir agents/ada").returncode == 0
    try:
        key = key_of(aios, GAMES, name="k", agent="ada")["key"]
        id = respond(games, "My name is Zorvik.", model="agent:ada")["id"]
        question = asked("What is my name?", model="agent:ada")
        assert games.ask(question, PATH, key)[1]["store"] is False
        for more in ({"previous_response_id": id}, {"conversation": id}, {"store": True}):
            assert games.ask(question | more, PATH, key)[0] in (400, 403)
        assert games.ask(None, f"{PATH}/{id}", key)[0] == 404
        assert games.ask(None, f"/v1/conversations/{id}/items", key)[0] == 403
        assert games.ask(chat("What is my name?", model="agent:ada", context=id), key=key)[0] == 403
        assert games.ask(chat("What is my name?", model="agent:ada", context=id))[0] == 200
    finally:
        (aios.root / "agents/ada").rmdir()


def test_who_may_make_no_contexts_still_gets_answers(games: Curl, aios: Daemon) -> None:
    folder = aios.root / "contexts"
    mode = folder.stat().st_mode
    folder.chmod(0o755)
    try:
        answer = respond(games, "Repeat: fig")
        assert (text(answer), answer["store"]) == ("fig", False)
        assert games.ask(asked("Repeat: fig", store=True), PATH)[0] == 403
    finally:
        folder.chmod(mode & 0o7777)


def test_old_responses_go_when_newer_ones_come(games: Curl, aios: Daemon) -> None:
    old, newest, other = f"contexts/resp_{1:040x}", f"contexts/resp_{'f' * 40}", f"contexts/resp_{2:040x}"
    assert as_user(aios, GAMES, f"mkdir {old} {newest}").returncode == 0
    assert as_user(aios, NEWS, f"mkdir {other}").returncode == 0
    for _ in range(1000):  # one in 32 of them sweeps
        respond(games, "Repeat: fig", max_output_tokens=1)
        if not (aios.root / old).exists():
            break
    assert not (aios.root / old).exists()
    assert (aios.root / newest).exists()
    assert (aios.root / other).exists()


def test_a_response_outlives_the_session_and_a_huge_one_is_not_stored(games: Curl, gateway: Gateway) -> None:
    first = respond(games, "My name is Zorvik.")
    for session in gateway.sessions:
        if session.poll() is None:
            session.kill()
            session.wait()
    assert games.ask(None, f"{PATH}/{first['id']}")[1] == first
    large = respond(games, "Repeat: fig", user="x" * (1 << 20))
    assert (large["store"], text(large)) == (False, "fig")


def test_an_agent_with_a_context_keeps_its_conversation_itself(games: Curl, aios: Daemon) -> None:
    assert (
        as_user(aios, GAMES, "mkdir agents/ada contexts/own; echo own > agents/ada/context").returncode == 0
    )
    try:
        answer = respond(games, "My name is Zorvik.", model="agent:ada")
        assert answer["store"] is False
        assert "Zorvik" in text(respond(games, "What is my name?", model="agent:ada"))
    finally:
        for path in ("agents/ada", "contexts/own"):
            (aios.root / path).rmdir()


NESTED: Any = "x"
for _ in range(400):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"role": "nobody", "content": "x"}]}, "role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "only text"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item"),
        ({"input": NESTED}, "input[0]"),
        ({"input": [{"role": "user", "content": NESTED}]}, "content"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": "calc"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": NESTED}, "tool_choice"),
        ({"text": {"format": NESTED}}, "format"),
        ({"text": {"format": {"type": "json_schema", "schema": NESTED}}}, "nested"),
        ({"reasoning": {"effort": NESTED}}, "nested"),
        ({"metadata": {"a": NESTED}}, "metadata"),
        ({"previous_response_id": "../../agents/x"}, "no response"),
        ({"previous_response_id": "resp_" + "0" * 40}, "no response"),
        ({"previous_response_id": 5}, "previous_response_id"),
        ({"conversation": "../x"}, "conversation"),
        ({"conversation": "none"}, "none"),
        ({"max_output_tokens": -1}, "max_tokens"),
        ({"include": [[]]}, "include"),
        ({"no_such_key": 1}, "no_such_key"),
        ({"store": "yes"}, "store"),
        ({"user": "\ud800"}, "surrogate"),
    ],
)
def test_what_is_wrong_with_a_response_is_said(games: Curl, more: Json, word: str) -> None:
    status, answer = games.ask(asked("hi") | more, PATH)
    assert status in (400, 404), answer
    assert word in answer["error"]["message"]
    assert answer["error"].keys() == {"message", "type", "param", "code"}


def test_half_a_surrogate_pair_is_refused_however_it_is_written(games: Curl) -> None:
    body = '{"model": "tiny", "input": "x", "user": "%s"}'
    for encoding in ("utf-8", "utf-16-le"):
        status, answer = games.ask((body % "\ud800").encode(encoding, "surrogatepass"), PATH)
        assert (status, "surrogate" in answer["error"]["message"]) == (400, True)
    assert games.ask((body % "\\ud83d\\ude00").encode(), PATH)[1]["user"] == "😀"


@pytest.mark.parametrize("path", [PATH, "/v1/completions", "/v1/chat/completions", "/v1/conversations"])
def test_json_of_any_depth_is_refused(games: Curl, path: str) -> None:
    for depth in (100, 940, 960, 970, 975, 980, 985, 990, 1000, 100_000):
        deep = "[" * depth + "]" * depth
        for key in ("seed", "tool_choice", "items", "user"):
            body = f'{{"model": "tiny", "input": "x", "prompt": "x", "messages": 5, "{key}": {deep}}}'
            status, answer = games.ask(body.encode(), path)
            assert status in (200, 400), answer


def complete(curl: Curl, prompt: object, **more: object) -> Json:
    status, answer = curl.ask({"model": "tiny", "prompt": prompt, "temperature": 0} | more, "/v1/completions")
    assert status == 200, answer
    return answer


def test_a_prompt_is_continued_as_it_is(games: Curl, aios: Daemon) -> None:
    answer = complete(games, "Repeat: fig", max_tokens=6)
    assert answer["object"] == "text_completion"
    shown = json.loads(as_user(aios, GAMES, "cat models/tiny/llm").stdout)
    assert shown["choices"][0]["message"]["content"] == answer["choices"][0]["text"]
    mark = "<|im_end|>"
    counts = [complete(games, mark * n, max_tokens=1)["usage"]["prompt_tokens"] for n in (1, 2)]
    assert counts[0] > 2
    assert counts[1] > counts[0] + 2
    several = complete(games, ["a", "b"], n=2, echo=True, max_tokens=3)
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][0] for choice in several["choices"]] == ["a", "a", "b", "b"]
    (choice,) = complete(games, "a", logprobs=2, max_tokens=3)["choices"]
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == choice["text"]
    assert [len(tops) for tops in told["top_logprobs"]] == [2] * len(told["tokens"])
    assert told["text_offset"][0] == 0


def test_a_completion_streams(games: Curl) -> None:
    body = {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 4, "temperature": 0, "stream": True}
    answer = games.send(body | {"stream_options": {"include_usage": True}}, "/v1/completions")
    *events, done, rest = answer.read().decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    texts = ["", ""]
    for choice in [choice for chunk in chunks for choice in chunk["choices"]]:
        texts[choice["index"]] += choice["text"]
    wanted = complete(games, ["a", "b"], max_tokens=4)
    assert texts == [choice["text"] for choice in wanted["choices"]]
    assert chunks[-1]["usage"] == wanted["usage"]


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": [1, 2]}, "tokens"),
        ({"prompt": [[1]]}, "tokens"),
        ({"prompt": ["a"] * 17}, "choices"),
        ({"prompt": ""}, "empty"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 1, "echo": True}, "echo"),
        ({"echo": NESTED}, "echo"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"model": "agent:ada"}, "agent"),
    ],
)
def test_what_is_wrong_with_a_completion_is_said(games: Curl, more: Json, word: str) -> None:
    status, answer = games.ask({"model": "tiny", "prompt": "hi"} | more, "/v1/completions")
    assert status in (400, 404), answer
    assert word in answer["error"]["message"]
