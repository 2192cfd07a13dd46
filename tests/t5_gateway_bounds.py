"""aios-gateway(8) under programs that ask for too much, or mean harm, on the real mount."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from aiosd.gateway import wire
from tests.gateway import FRONT, Gateway
from tests.running import Daemon, wait_until
from tests.t5_gateway import GAMES, NEWS, Curl, chat
from tests.t5_gateway_keys import key_of
from tests.t5_users import as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]
Json = dict[str, Any]
PAGE = "https://chat.example"


@pytest.fixture(scope="module")
def gateway(aios: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    state = folder / "state"
    state.mkdir()
    state.chmod(0o777)
    options = "--state", str(state), "--cors-origin", PAGE, "--host", "Proxy.example"
    made = Gateway(folder / "run", aios, *options)
    yield made.start()
    made.stop()
    assert "Traceback" not in made.log.read_text()


class Tcp:
    def __init__(self, gateway: Gateway, key: str) -> None:
        self.http = HTTPConnection("127.0.0.1", gateway.port)
        self.headers = {"Authorization": f"Bearer {key}"}

    def send(self, path: str, body: Json | None = None, method: str = "", **headers: str) -> HTTPResponse:
        method = method or ("POST" if body else "GET")
        self.http.request(method, path, json.dumps(body) if body else None, self.headers | headers)
        return self.http.getresponse()

    def ask(self, path: str, body: Json | None = None) -> tuple[int, Json]:
        answer = self.send(path, body)
        return answer.status, json.loads(answer.read())


def spoken(gateway: Gateway, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", gateway.port)) as raw:
        raw.settimeout(20)
        raw.sendall(data)
        said = b""
        while more := raw.recv(65536):
            said += more
        return said


def test_a_key_has_its_tokens_a_day_in_all_dialects_and_after_a_kill(gateway: Gateway, aios: Daemon) -> None:
    key = key_of(aios, NEWS, name="few", tokens_per_day=60)["key"]
    with closing(Tcp(gateway, key).http):
        tcp = Tcp(gateway, key)
        status, answer = tcp.ask("/v1/embeddings", {"model": "tiny", "input": "mango"})
        assert status == 200
        used = answer["usage"]["total_tokens"]
        while used < 60:
            answered = tcp.send("/v1/chat/completions", chat("Repeat: plum", stream=True,
                                stream_options={"include_usage": True}))  # fmt: skip
            assert answered.status == 200, answered.read()
            events = answered.read().decode().split("\n\n")
            used += json.loads(events[-3].removeprefix("data: "))["usage"]["total_tokens"]
        for again in range(2):
            for path, body in (
                ("/v1/chat/completions", chat("hi")),
                ("/v1/embeddings", {"model": "tiny", "input": "a"}),
            ):
                refused = tcp.send(path, body)
                assert refused.status == 429
                assert 1 <= int(refused.headers["retry-after"]) <= 86400
                assert json.loads(refused.read())["error"]["code"] == "insufficient_quota"
            if not again:
                gateway.kill()
                gateway.begin()
                tcp = Tcp(gateway, key)
        assert tcp.ask("/v1/models")[0] == 200
        other = Tcp(gateway, key_of(aios, NEWS, name="free")["key"])
        assert other.ask("/v1/chat/completions", chat("Repeat: plum"))[0] == 200


def test_wrong_keys_do_not_keep_out_those_who_have_one(gateway: Gateway, aios: Daemon) -> None:
    key = key_of(aios, NEWS)["key"]
    id = key.split("-")[1]
    known, wrong = Tcp(gateway, key), Tcp(gateway, "")
    status, answer = known.ask("/v1/models")
    assert status == 200, answer
    statuses = []
    for i in range(1500):
        wrong.headers = {"Authorization": f"Bearer aios-{i if i % 2 else id:>012}-{i:064}"}
        statuses.append(wrong.ask("/v1/models")[0])
    assert set(statuses) == {401, 429}
    assert set(statuses[1::2]) == {401}
    time.sleep(1.1)  # the key has to be checked again
    status, answer = known.ask("/v1/models")
    assert status == 200, answer
    fresh = Tcp(gateway, key_of(aios, NEWS)["key"])
    status, answer = fresh.ask("/v1/models")
    assert status == 200, answer


def test_a_session_keeps_a_key_to_its_agent_whatever_the_front_says(gateway: Gateway, aios: Daemon) -> None:
    """A front that was taken over speaks to the session itself."""
    assert as_user(aios, NEWS, "mkdir agents/bert agents/other").returncode == 0
    try:
        key = key_of(aios, NEWS, agent="bert")["key"]
        with socket.socket(socket.AF_UNIX) as session:
            session.settimeout(20)
            session.connect(str(gateway.address.with_name("session.sock")))
            messages, got = wire.Messages(), list[wire.Head]()
            session.sendall(wire.packed({"key": key}))
            calls = [
                ("list", "agents/bert", None), ("list", "agents", None),
                ("read", "models/tiny/info.json", None),
                ("read", "agents/other/model", "EACCES"), ("read", "agents/bert/../other/model", "EINVAL"),
                ("ask", "models/tiny/llm", "EACCES"), ("read", "models/tiny/llm", "EACCES"),
                ("mkdir", "agents/new", "EACCES"), ("list", "contexts", "EACCES"),
                ("rmdir", "agents/other", "EACCES"), ("ask", "agents/bertold/syscall/llm", "EACCES"),
                ("rmdir", "agents/bert", "EACCES"), ("write", "agents/bert/context", "EACCES"),
                ("ask", "agents/bert/syscall/llm", "EINVAL"), ("read", "agents/\ud800", "EINVAL"),
                ('{"name":"calc","arguments":{}}', "agents/bert/syscall/tool", "EACCES"),
                ('{"name":"calc","arguments":{}}', "agents/bert/syscall/tool/.", "EACCES"),
                ('{"prompt":"a","context":"diary"}', "agents/bert/syscall/llm", "EACCES"),
                ('{"prompt":"a","model":"tiny"}', "agents/bert/syscall/llm", "EACCES"),
                ('{"prompt":"a","context":""}', "agents/bert/syscall/llm", None),
            ]  # fmt: skip
            for n, (operation, path, _) in enumerate(calls):
                body = operation.encode() if "{" in operation else b""
                head = {"n": n, "op": "ask" if body else operation, "path": path}
                session.sendall(wire.packed(head, body))
            while len(got) < 1 + len(calls):
                got += [head for head, _ in messages.add(session.recv(1 << 20))]
        assert got[0] == {"uid": NEWS, "file": False}
        errors = {head["n"]: head.get("errno") for head in got[1:]}
        names = {13: "EACCES", 22: "EINVAL", None: None}
        assert [names[errors[n]] for n in range(len(calls))] == [wanted for _, _, wanted in calls]
    finally:
        assert as_user(aios, NEWS, "rmdir agents/bert agents/other").returncode == 0


def test_no_json_leads_a_key_out_of_its_agent(gateway: Gateway, aios: Daemon) -> None:
    assert as_user(aios, NEWS, "mkdir agents/bert contexts/diary").returncode == 0
    try:
        tcp = Tcp(gateway, key_of(aios, NEWS, agent="bert")["key"])
        status, answer = tcp.ask("/v1/chat/completions", chat("hi", model="agent:bert", context="diary"))
        assert (status, answer["error"]["message"]) == (
            403, "this key may use only the context of its agent: leave context out",
        )  # fmt: skip
        assert as_user(aios, NEWS, "cat contexts/diary/messages.jsonl").stdout == ""
        assert tcp.ask("/v1/chat/completions", chat("hi", model="agent:bert", context=""))[0] == 200
    finally:
        assert as_user(aios, NEWS, "rmdir agents/bert contexts/diary").returncode == 0


ELSEWHERE = """
import ctypes, os, socket, sys
address, asked = sys.argv[1:]
session, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
session.connect(asked)
libc = ctypes.CDLL(None)
assert libc.unshare(0x20000) == 0  # CLONE_NEWNS
assert libc.mount(b"none", b"/", None, 0x44000, None) == 0  # MS_REC | MS_PRIVATE
assert libc.mount(b"tmpfs", os.path.dirname(address).encode(), b"tmpfs", 0, None) == 0
client.bind(address)
client.connect("\\0aios-" + address)
socket.send_fds(session, [b"\\0\\0\\0\\3{}\\n"], [client.fileno()])
sys.stdout.buffer.write(session.recv(1000))
"""


def test_who_binds_the_gateways_address_elsewhere_is_not_the_user_to_whom_he_connects(
    gateway: Gateway,
) -> None:
    """Another user listens somewhere. In his own mount namespace anybody can have the gateway's address."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0aios-" + str(gateway.address))
        child = os.fork()
        if child == 0:
            os.setresuid(NEWS, NEWS, NEWS)  # who listens is the peer
            listener.listen()
            os._exit(0)
        os.waitpid(child, 0)
        command = [sys.executable, "-c", ELSEWHERE, str(gateway.address)]
        said = subprocess.run(
            [*command, str(gateway.address.with_name("session.sock"))], capture_output=True, check=True
        ).stdout
    assert b"no connection to the gateway" in said


def test_a_session_does_not_begin_for_a_user_who_has_gone(gateway: Gateway) -> None:
    gone = Curl(gateway, GAMES)
    ours = gone.http.sock
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(gateway.address.with_name("mine.sock")))
        listener.listen()
        ours.close()
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(gateway.address.with_name("mine.sock")))
        accepted, _ = listener.accept()
        client.close()
        with accepted, socket.socket(socket.AF_UNIX) as session:
            session.connect(str(gateway.address.with_name("session.sock")))
            socket.send_fds(session, [wire.packed({})], [accepted.fileno()])
            assert b"has gone" in session.recv(1000)


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\0\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000,
    ],
)
def test_what_is_not_http_is_an_error_in_json(gateway: Gateway, data: bytes) -> None:
    head, _, body = spoken(gateway, data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/../../etc/passwd", "/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/%00", "/../v1", "//",
        "/v1/models/tiny/../x", "/v1/models/" + "a" * 5000, "/v1/models/%ff%fe", "/v1//models/.", "*",
        "/v1/chat/completions/", "http://localhost/none",
    ],
)  # fmt: skip
def test_no_path_leads_out_of_what_there_is(gateway: Gateway, aios: Daemon, path: str) -> None:
    key = key_of(aios, NEWS)["key"]
    head = (
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n\r\n"
    )
    said, _, body = spoken(gateway, head.encode()).partition(b"\r\n\r\n")
    assert said.split()[1] in (b"404", b"405", b"307", b"400"), said
    assert b"root:" not in body


def test_pages_of_the_named_origin_may_ask_and_no_others(gateway: Gateway, aios: Daemon) -> None:
    tcp = Tcp(gateway, key_of(aios, NEWS)["key"])
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in ((PAGE, PAGE), ("https://evil.example", None)):
        before = tcp.send("/v1/chat/completions", None, "OPTIONS", Origin=origin, **asking)
        before.read()
        assert before.headers.get("access-control-allow-origin") == allowed
        answer = tcp.send("/v1/models", Origin=origin)
        answer.read()
        assert answer.headers.get("access-control-allow-origin") == allowed
    answer = tcp.send("/v1/models", Host="proxy.EXAMPLE:443")
    assert answer.status == 200, answer.read()


def test_a_reader_that_takes_nothing_costs_little(gateway: Gateway, aios: Daemon) -> None:
    """Its answer waits in the daemon, not in the gateway."""

    def memory() -> int:
        status = Path(f"/proc/{gateway.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) >> 10

    key = key_of(aios, NEWS)["key"]
    body = json.dumps(
        chat("Say something.", min_tokens=1500, max_tokens=1500, ignore_eos=True, stream=True, logprobs=True,
             top_logprobs=20)
    ).encode()  # fmt: skip
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
    before, slow = memory(), list[socket.socket]()
    for _ in range(8):
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.connect(("127.0.0.1", gateway.port))
        made.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        slow.append(made)
    wait_until(lambda: " 9 " not in aios.read("scheduler/queue"), "the answers", 120)
    assert memory() - before < 20
    for made in slow:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        made.close()


def test_the_count_is_the_fronts_own_file(gateway: Gateway) -> None:
    (file,) = gateway.address.parents[1].joinpath("state").iterdir()
    assert file.stat().st_uid == FRONT
