"""Programs that speak Ollama's API, as real users on the real mount, through aios-gateway(8)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests import gguf_files
from tests.gateway import Gateway
from tests.hub import Hub, Repository
from tests.running import Daemon, wait_until
from tests.t5_gateway import GAMES, NEWS, Curl
from tests.t5_users import as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]
Json = dict[str, Any]
EXACT = {"temperature": 0}
CALC = {
    "type": "function",
    "function": {
        "name": "calc", "description": "Calculates.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}},
                       "required": ["expression"]},
    },
}  # fmt: skip


@pytest.fixture
def games(gateway: Gateway) -> Iterator[Curl]:
    curl = Curl(gateway, GAMES)
    with closing(curl.http):
        yield curl


def lines(curl: Curl, path: str, body: Json) -> list[Json]:
    answer = curl.send(body, path)
    assert answer.status == 200, answer.read()
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.read().splitlines()]


def user(content: str, **more: object) -> Json:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "options": EXACT} | more


def test_a_chat_streams_unless_told_otherwise(games: Curl, aios: Daemon) -> None:
    *said, last = lines(games, "/api/chat", user("Repeat: mango"))
    assert "".join(part["message"]["content"] for part in said) == "mango"
    assert not any(part["done"] for part in said)
    assert (last["done"], last["done_reason"], last["model"]) == (True, "stop", "tiny")
    assert last["prompt_eval_count"] > last["eval_count"] > 0
    status, whole = games.ask(user("Repeat: mango", model="tiny:latest", stream=False), "/api/chat")
    assert (status, whole["message"]) == (200, {"role": "assistant", "content": "mango"})
    assert whole["eval_count"] == last["eval_count"]
    kept = as_user(aios, GAMES, "cat models/tiny/llm").stdout.splitlines()
    assert "".join(json.loads(one)["choices"][0]["delta"].get("content", "") for one in kept) == "mango"


def test_a_prompt_is_completed(games: Curl) -> None:
    body: Json = {"model": "tiny", "prompt": "Repeat: fig", "options": EXACT, "context": [1, 2]}
    *said, last = lines(games, "/api/generate", body)
    assert "".join(part["response"] for part in said) == "fig"
    assert last["done"]
    body["options"] = EXACT | {"num_predict": 1}
    _, whole = games.ask(body | {"stream": False}, "/api/generate")
    assert (whole["eval_count"], whole["done_reason"]) == (1, "length")


def test_a_tool_is_called_and_its_result_read(games: Curl) -> None:
    body = user("What is 37 * 12?", tools=[CALC])
    said = [part["message"] for part in lines(games, "/api/chat", body)]
    [call] = [call for message in said for call in message.get("tool_calls", [])]
    assert call["function"]["name"] == "calc"
    assert call["function"]["arguments"] == {"expression": "37 * 12"}
    _, whole = games.ask(body | {"stream": False}, "/api/chat")
    assert whole["message"]["tool_calls"][0]["function"] == call["function"]
    body["messages"] += [whole["message"], {"role": "tool", "tool_name": "calc", "content": "444"}]
    _, end = games.ask(body | {"stream": False}, "/api/chat")
    assert "444" in end["message"]["content"]
    assert "tool_calls" not in end["message"]


def test_a_format_is_kept(games: Curl) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
    _, whole = games.ask(user("Say 5", format=schema, stream=False), "/api/chat")
    assert json.loads(whole["message"]["content"])["n"] <= 9


def test_logprobs_are_those_of_the_files(games: Curl) -> None:
    _, whole = games.ask(user("Repeat: mango", logprobs=True, top_logprobs=2, stream=False), "/api/chat")
    assert "".join(one["token"] for one in whole["logprobs"]) == "mango"
    assert len(whole["logprobs"][0]["top_logprobs"]) == 2


def test_models_and_agents_are_listed_and_shown_to_whom_may_use_them(games: Curl, aios: Daemon) -> None:
    assert as_user(aios, GAMES, "mkdir agents/olla").returncode == 0
    try:
        names = [model["name"] for model in games.ask(None, "/api/tags")[1]["models"]]
        assert {"tiny:latest", "agent:olla"} <= set(names)
        _, whole = games.ask(user("Repeat: kiwi", model="agent:olla", stream=False), "/api/chat")
        assert whole["message"]["content"] == "kiwi"
        assert games.ask({"model": "agent:olla"}, "/api/show")[0] == 200
    finally:
        (aios.root / "agents/olla").rmdir()
    _, shown = games.ask({"model": "tiny"}, "/api/show")
    assert shown["model_info"]["llama.context_length"] == 2048
    assert "tools" in shown["capabilities"]
    [resident] = [one for one in games.ask(None, "/api/ps")[1]["models"] if one["name"] == "tiny:latest"]
    assert resident["size"] > resident["size_vram"] == 0
    assert "version" in games.ask(None, "/api/version")[1]


def test_vectors_are_those_of_the_files(games: Curl) -> None:
    _, one = games.ask({"model": "tiny", "input": "a tree"}, "/api/embed")
    _, two = games.ask({"model": "tiny", "input": ["a tree", "b"]}, "/api/embed")
    _, old = games.ask({"model": "tiny", "prompt": "a tree"}, "/api/embeddings")
    _, openai = games.ask({"model": "tiny", "input": "a tree"}, "/v1/embeddings")
    assert one["embeddings"][0] == two["embeddings"][0] == old["embedding"] == openai["data"][0]["embedding"]
    assert len(two["embeddings"]) == 2


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "word"),
    [
        ("POST", "/api/chat", b"{", 400, "JSON"),
        ("POST", "/api/chat", b"[" * 200_000, 400, "JSON"),
        ("POST", "/api/chat", b'{"model": "tiny", "tools": ' + b"[" * 900 + b"]" * 900 + b',"messages":[{}]}',
         400, "nested"),
        ("POST", "/api/chat", user("hi", model="none"), 404, "no model none"),
        ("POST", "/api/chat", user("hi", model="\ud800"), 400, "surrogate"),
        ("POST", "/api/chat", user("hi", model="../agents/x"), 404, "not found"),
        ("POST", "/api/chat", user("hi", model=7), 400, "model is required"),
        ("POST", "/api/chat", user("hi", options={"temperature": "hot"}), 400, "temperature"),
        ("POST", "/api/chat", user("hi", stream="yes"), 400, "stream"),
        ("POST", "/api/generate", {"model": "tiny", "prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("POST", "/api/embed", {"model": "tiny", "input": [7]}, 400, "input"),
        ("POST", "/api/create", {"model": "x", "from": "tiny"}, 501, "make an agent"),
        ("POST", "/api/push", {"model": "x"}, 501, "not published"),
        ("POST", "/api/pull", {"model": "x\nload /etc"}, 400, "not a model to pull"),
        ("POST", "/api/pull", {"model": "smollm2"}, 403, "Permission denied"),
        ("POST", "/api/copy", {"source": "tiny", "destination": "other"}, 403, "Permission denied"),
        ("DELETE", "/api/delete", {"model": "tiny"}, 403, "Permission denied"),
        ("DELETE", "/api/delete", {"model": "none"}, 404, "no model none"),
        ("POST", "/api/blobs/sha256:0", {}, 404, "no such path"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_the_shape_of_ollama(
    games: Curl, method: str, path: str, body: Json | bytes, status: int, word: str
) -> None:
    games.http.request(method, path, body if isinstance(body, bytes) else json.dumps(body))
    answer = games.http.getresponse()
    said = json.loads(answer.read())
    assert (answer.status, said.keys()) == (status, {"error"}), said
    assert word in said["error"]


def test_a_server_is_found_without_a_key(gateway: Gateway) -> None:
    for method, text in (("GET", b"Ollama is running"), ("HEAD", b"")):
        with closing(HTTPConnection("127.0.0.1", gateway.port)) as http:
            http.request(method, "/")
            answer = http.getresponse()
            assert (answer.status, answer.read()) == (200, text)
    with closing(HTTPConnection("127.0.0.1", gateway.port)) as http:
        http.request("GET", "/api/tags")
        answer = http.getresponse()
        assert (answer.status, "no key" in json.loads(answer.read())["error"]) == (401, True)


# models that come and go


@pytest.fixture
def served(make_daemon: Callable[..., Daemon], tmp_path: Path) -> Iterator[tuple[Daemon, Gateway, Hub]]:
    """A daemon whose administrator lets all users add models, with a hub."""
    weights = gguf_files.make(tmp_path / "m.gguf", "Q4_0").read_bytes()
    with Hub().serve() as hub:
        hub.repositories["org/m-GGUF"] = Repository({"m-Q4_0.gguf": weights})
        daemon = make_daemon()
        daemon.env = hub.env
        daemon.start()
        for folder in (tmp_path, tmp_path.parent, daemon.root.parent):
            folder.chmod(0o755)
        (daemon.root / "models").chmod(0o1777)
        gateway = Gateway(tmp_path / "run", daemon).start()
        yield daemon, gateway, hub
        hub.release.set()
        gateway.stop()
        assert "Traceback" not in gateway.log.read_text()


def why_done(curl: Curl, path: str, body: Json) -> object:
    return curl.ask(body | {"stream": False}, path)[1]["done_reason"]


def test_a_user_pulls_copies_loads_and_deletes_a_model_of_his_own(
    served: tuple[Daemon, Gateway, Hub],
) -> None:
    daemon, gateway, _ = served
    mine, other = Curl(gateway, GAMES), Curl(gateway, NEWS)
    with closing(mine.http), closing(other.http):
        name = "hf.co/org/m-GGUF:Q4_0"
        first, *_, last = lines(mine, "/api/pull", {"model": name})
        assert (first["status"], last["status"]) == ("pulling manifest", "success")
        assert (daemon.root / "models/m-Q4_0").stat().st_uid == GAMES
        assert mine.ask({"model": name, "stream": False}, "/api/pull") == (200, {"status": "success"})
        assert other.ask({"model": name, "stream": False}, "/api/pull")[0] == 403
        assert mine.ask({"model": "hf.co/else/m:Q4_0"}, "/api/pull")[0] == 409

        assert why_done(mine, "/api/generate", {"model": name, "keep_alive": "1h"}) == "load"
        [resident] = [one for one in mine.ask(None, "/api/ps")[1]["models"] if one["name"].startswith("m-")]
        assert resident["expires_at"] < "2300"
        assert why_done(mine, "/api/chat", {"model": name, "keep_alive": 0, "messages": []}) == "unload"
        wait_until(lambda: daemon.read("models/m-Q4_0/state") == "absent\n", "the end of the model")
        assert why_done(mine, "/api/generate", {"model": name, "keep_alive": 0}) == "unload"
        assert daemon.read("models/m-Q4_0/state") == "absent\n", "it is not loaded to be unloaded"

        mine.send({"source": name, "destination": "twin"}, "/api/copy").read()
        names = [model["name"] for model in mine.ask(None, "/api/tags")[1]["models"]]
        assert {"m-Q4_0:latest", "twin:latest"} <= set(names)
        assert "twin:latest" not in [model["name"] for model in other.ask(None, "/api/tags")[1]["models"]]
        mine.http.request("DELETE", "/api/delete", json.dumps({"model": "twin"}))
        assert mine.http.getresponse().read() == b""
        assert not (daemon.root / "models/twin").exists()


def test_a_pull_that_fails_leaves_nothing_and_one_whose_program_goes_is_cancelled(
    served: tuple[Daemon, Gateway, Hub],
) -> None:
    daemon, gateway, hub = served
    mine = Curl(gateway, GAMES)
    with closing(mine.http):
        assert "error" in lines(mine, "/api/pull", {"model": "hf.co/org/none"})[-1]
        assert not (daemon.root / "models/none").exists()
        assert mine.ask({"model": "unheard-of"}, "/api/pull")[0] == 400
        assert not (daemon.root / "models/unheard-of").exists()
        hub.hold_after = 100_000
        answer = mine.send({"model": "hf.co/org/m-GGUF:Q4_0"}, "/api/pull")
        assert json.loads(answer.readline())["status"] == "pulling manifest"
        partial = daemon.state / "models/partial/m-Q4_0"
        wait_until(lambda: any(p.stat().st_size == 100_000 for p in partial.iterdir()), "its first bytes")
    answer.close()
    wait_until(lambda: "failed" in daemon.read("models/m-Q4_0/state"), "the end of the pull")
