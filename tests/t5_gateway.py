"""HTTP programs of real users on the real mount, through the real programs of aios-gateway(8)."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import time
from array import array
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.gateway import FRONT, Gateway
from tests.manual import blocks
from tests.running import Daemon, wait_until
from tests.t5_manual import examples, fits
from tests.t5_users import as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]
GAMES, NEWS = 5, 9  # users whom every machine has
NOBODY_HERE = 61777  # has no account
Json = dict[str, Any]


class Curl:
    """One connection of a user's program to the Unix socket."""

    def __init__(self, gateway: Gateway, uid: int) -> None:
        self.http = HTTPConnection("localhost")
        self.http.sock = connected(gateway, uid)

    def send(self, body: object, path: str = "/v1/chat/completions", key: str = "") -> Any:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.http.request("POST" if body else "GET", path, data if body else None, headers)
        return self.http.getresponse()

    def ask(self, body: object, path: str = "/v1/chat/completions", key: str = "") -> tuple[int, Json]:
        answer = self.send(body, path, key)
        return answer.status, json.loads(answer.read())

    def stream(self, body: Json) -> list[Json]:
        answer = self.send(body | {"stream": True})
        assert answer.status == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.read().decode().split("\n\n")
        assert events.pop() == ""
        assert all(event.startswith("data: ") for event in events)
        assert events.pop() == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]


def connected(gateway: Gateway, uid: int) -> socket.socket:
    """A socket that a process with this uid has connected."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                with socket.socket(socket.AF_UNIX) as made:
                    made.connect(str(gateway.address))
                    socket.send_fds(theirs, [b"."], [made.fileno()])
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        theirs.close()
        _, files, _, _ = socket.recv_fds(ours, 1, 1)
        assert files, f"uid {uid} reaches no socket at {gateway.address}"
        [file] = files
    return socket.socket(fileno=file)


def chat(content: str, **more: object) -> Json:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0} | more


def text(chunks: list[Json], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices if choice["index"] == index)


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


def test_a_program_asks_as_its_user(games: Curl, news: Curl, aios: Daemon) -> None:
    status, answer = games.ask(chat("Repeat: mango"))
    assert status == 200
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "mango"}
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["total_tokens"] > answer["usage"]["completion_tokens"] > 0
    assert news.ask(chat("Repeat: fig"))[1]["choices"][0]["message"]["content"] == "fig"
    assert "mango" in as_user(aios, GAMES, "cat models/tiny/llm").stdout
    assert "fig" in as_user(aios, NEWS, "cat models/tiny/llm").stdout


def test_a_stream_is_the_answer_in_events(games: Curl) -> None:
    chunks = games.stream(chat("Repeat: mango"))
    assert text(chunks) == "mango"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert not any("usage" in chunk for chunk in chunks)
    chunks = games.stream(chat("Repeat: mango", stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 0


def test_several_choices_are_several_answers(games: Curl) -> None:
    status, answer = games.ask(chat("Repeat: mango", n=3))
    assert status == 200
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in answer["choices"]} == {"mango"}
    chunks = games.stream(chat("Repeat: fig", n=2, stream_options={"include_usage": True}))
    assert [text(chunks, index) for index in (0, 1)] == ["fig", "fig"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_an_agent_is_a_model_for_its_user_and_nobody_else(games: Curl, news: Curl, aios: Daemon) -> None:
    assert as_user(aios, GAMES, "mkdir agents/ada && echo 'Be brief.' > agents/ada/system").returncode == 0
    try:
        assert (
            games.ask(chat("Repeat: kiwi", model="agent:ada"))[1]["choices"][0]["message"]["content"]
            == "kiwi"
        )
        assert "kiwi" in as_user(aios, GAMES, "cat agents/ada/requests/latest/response.json").stdout
        names = [card["id"] for card in games.ask(None, "/v1/models")[1]["data"]]
        assert {"tiny", "agent:ada"} <= set(names)
        assert "agent:ada" not in [card["id"] for card in news.ask(None, "/v1/models")[1]["data"]]
        status, answer = news.ask(chat("Repeat: kiwi", model="agent:ada"))
        assert (status, answer["error"]["type"], answer["error"]["code"]) == (
            403,
            "permission_error",
            "EACCES",
        )
    finally:
        (aios.root / "agents/ada").rmdir()


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b"{", 400, "JSON"),
        (b"[]", 400, "object"),
        (b'{"model": "tiny"}', 400, "messages"),
        (chat("hi", model="none"), 404, "none"),
        (chat("hi", model="../agents/ada/syscall"), 404, "there is no model"),
        (chat("hi", model=7), 400, "model is missing"),
        (chat("hi", temperature="hot"), 400, "temperature"),
        (chat("hi", n=0), 400, "n is"),
        (chat("hi", model="agent:none"), 404, "none"),
        (chat("x " * 3_000_000), 413, "bytes"),
    ],
)
def test_what_is_wrong_is_said_in_the_shape_of_openai(
    games: Curl, body: object, status: int, word: str
) -> None:
    got, answer = games.ask(body)
    assert got == status, answer
    assert word in answer["error"]["message"]
    assert answer["error"].keys() == {"message", "type", "param", "code"}


def test_root_and_users_without_an_account_are_refused(gateway: Gateway) -> None:
    for uid, word in ((0, "root"), (NOBODY_HERE, "no account")):
        curl = Curl(gateway, uid)
        with closing(curl.http):
            status, answer = curl.ask(chat("hi"))
            assert status == 403
            assert word in answer["error"]["message"]


def test_who_comes_over_tcp_needs_a_key(gateway: Gateway) -> None:
    with closing(HTTPConnection("127.0.0.1", gateway.port)) as http:
        http.request("POST", "/v1/chat/completions", json.dumps(chat("hi")))
        answer = http.getresponse()
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert "aiosctl key new" in json.loads(answer.read())["error"]["message"]


def test_embeddings_are_those_of_the_files(games: Curl, aios: Daemon) -> None:
    status, answer = games.ask({"model": "tiny", "input": ["mango", "fig"]}, "/v1/embeddings")
    assert status == 200
    asked = as_user(aios, GAMES, "exec 3<>models/tiny/embed; echo mango >&3; cat <&3").stdout
    assert answer["data"][0]["embedding"] == json.loads(asked)["data"][0]["embedding"]
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    packed = games.ask({"model": "tiny", "input": "mango", "encoding_format": "base64"}, "/v1/embeddings")[1]
    numbers = array("f", base64.b64decode(packed["data"][0]["embedding"]))
    assert list(numbers) == pytest.approx(answer["data"][0]["embedding"], rel=1e-6)


@pytest.mark.parametrize("wrong", [{"input": [1]}, {"input": []}, {"dimensions": 7}, {"model": "agent:a"}])
def test_embeddings_that_cannot_be_are_refused(games: Curl, wrong: Json) -> None:
    status, answer = games.ask({"model": "tiny", "input": "fig"} | wrong, "/v1/embeddings")
    assert status in (400, 404)
    assert answer["error"]["message"]


def test_a_page_of_the_web_reaches_nothing_by_a_name_of_its_own(gateway: Gateway) -> None:
    for host, status in (("evil.example:11435", 403), ("localhost:11435", 401), ("[::1]", 401)):
        with closing(HTTPConnection("127.0.0.1", gateway.port)) as http:
            http.request("GET", "/v1/models", headers={"Host": host})
            assert http.getresponse().status == status, host


def test_health_and_metrics_need_no_user(games: Curl, gateway: Gateway) -> None:
    games.ask(chat("Repeat: fig"))
    with closing(HTTPConnection("127.0.0.1", gateway.port)) as http:
        http.request("GET", "/health")
        assert http.getresponse().read() == b"ok\n"
        http.request("GET", "/metrics")
        said = http.getresponse().read().decode()
    samples = {s.name: s for family in text_string_to_metric_families(said) for s in family.samples}
    assert samples["aios_gateway_sessions"].value >= 1
    assert 'endpoint="/v1/chat/completions",status="200"' in said


def test_a_header_that_comes_slowly_ends_the_connection(gateway: Gateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port)) as slow:
        slow.settimeout(30)
        began_s = time.monotonic()
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        for _ in range(5):
            time.sleep(0.5)
            slow.sendall(b"X-More: x\r\n")
        assert slow.recv(1) == b""
        assert 8 < time.monotonic() - began_s < 15


@pytest.mark.parametrize("streams", [False, True])
def test_a_request_ends_with_its_client(gateway: Gateway, aios: Daemon, streams: bool) -> None:
    curl = Curl(gateway, GAMES)
    body = chat("Say something.", min_tokens=400, ignore_eos=True, max_tokens=400, stream=streams)
    data = json.dumps(body).encode()
    curl.http.request("POST", "/v1/chat/completions", data)
    wait_until(lambda: " 5 " in aios.read("scheduler/queue"), "the request")
    curl.http.close()
    wait_until(lambda: " 5 " not in aios.read("scheduler/queue"), "its end", 2.0)


def test_the_front_and_the_session_have_no_rights_of_others(games: Curl, gateway: Gateway) -> None:
    games.ask(chat("Repeat: fig"))
    facts = {}
    for pid in (gateway.pid, *(session.pid for session in gateway.sessions if session.poll() is None)):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert status["CapPrm"] == status["CapEff"] == "0" * 16
        assert status["NoNewPrivs"] == "1"
        facts[pid] = {int(uid) for uid in status["Uid"].split()}
    assert facts.pop(gateway.pid) == {FRONT}
    assert {GAMES} in facts.values()
    assert {0} not in facts.values()


def test_a_killed_session_is_followed_by_another(games: Curl, gateway: Gateway) -> None:
    games.ask(chat("Repeat: fig"))
    for session in gateway.sessions:
        if session.poll() is None:
            session.send_signal(signal.SIGKILL)
            session.wait()
    assert games.ask(chat("Repeat: fig"))[1]["choices"][0]["message"]["content"] == "fig"


def test_a_taken_over_front_cannot_be_somebody_who_did_not_come(gateway: Gateway, tmp_path: Path) -> None:
    """The peer of a connection to a socket where another user listens is that user."""
    tmp_path.chmod(0o777)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "other"))
        listener.listen()
        client.connect(str(tmp_path / "other"))
        with socket.socket(socket.AF_UNIX) as session:
            session.connect(str(gateway.address.with_name("session.sock")))
            socket.send_fds(session, [b"\0\0\0\3{}\n"], [client.fileno()])
            assert b"no connection to the gateway" in session.recv(1000)
            assert session.recv(1) == b""


def test_the_examples_of_its_page_do_what_it_says(gateway: Gateway, aios: Daemon) -> None:
    wanted = [example for block in blocks("aios-gateway.8", "sh") for example in examples(block)]
    assert len(wanted) > 1
    for example in wanted:
        command = example.command.replace("/run/aios-gateway/gateway.sock", str(gateway.address))
        assert fits(example.expected, as_user(aios, NEWS, command).stdout), example.place
