"""Keys of the tree over TCP: aios-gateway(8) acts as the user whose key it is."""

from __future__ import annotations

import json
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import pytest

from tests.gateway import Gateway
from tests.running import Daemon, wait_until
from tests.t5_gateway import GAMES, NEWS, Curl, chat
from tests.t5_users import as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]
Json = dict[str, Any]


def key_of(aios: Daemon, uid: int, **more: object) -> Json:
    asking = f"exec 3<>keys/new && echo '{json.dumps(more or {'name': 'k'})}' >&3 && cat <&3"
    made = as_user(aios, uid, asking)
    assert made.returncode == 0, made.stderr
    found: Json = json.loads(made.stdout)
    return found


def asked(gateway: Gateway, key: str, body: Json) -> tuple[int, Json]:
    with closing(HTTPConnection("127.0.0.1", gateway.port)) as http:
        headers = {"Authorization": f"Bearer {key}"}
        http.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = http.getresponse()
        return answer.status, json.loads(answer.read())


def test_a_key_is_its_user_until_it_is_revoked(gateway: Gateway, aios: Daemon) -> None:
    made = key_of(aios, NEWS)
    assert asked(gateway, made["key"], chat("Repeat: plum"))[1]["choices"][0]["message"]["content"] == "plum"
    assert "plum" in as_user(aios, NEWS, "cat models/tiny/llm").stdout
    assert as_user(aios, NEWS, f"rmdir keys/{made['id']}").returncode == 0
    wait_until(lambda: asked(gateway, made["key"], chat("Repeat: plum"))[0] == 401, "its end", 3.0)


def test_what_is_no_key_is_refused(gateway: Gateway, aios: Daemon) -> None:
    made = key_of(aios, NEWS)["key"]
    for wrong in (made[:-1] + ("a" if made[-1] != "a" else "b"), "aios-", "sk-1", "aios-" + "x" * 5000, "é"):
        status, answer = asked(gateway, wrong.encode().decode("latin-1"), chat("hi"))
        assert (status, answer["error"]["type"]) == (401, "authentication_error"), wrong


def test_a_proxy_on_the_unix_socket_is_the_user_of_the_key(gateway: Gateway, aios: Daemon) -> None:
    key = key_of(aios, NEWS)["key"]
    proxy = Curl(gateway, GAMES)
    with closing(proxy.http):
        assert proxy.ask(chat("Repeat: pear"), key=key)[0] == 200
    assert "pear" in as_user(aios, NEWS, "cat models/tiny/llm").stdout


def test_a_key_of_an_agent_uses_this_agent(gateway: Gateway, aios: Daemon) -> None:
    assert as_user(aios, NEWS, "mkdir agents/bert agents/other").returncode == 0
    try:
        key = key_of(aios, NEWS, agent="bert")["key"]
        assert asked(gateway, key, chat("Repeat: plum", model="agent:bert"))[0] == 200
        for model in ("tiny", "agent:other"):
            assert asked(gateway, key, chat("hi", model=model))[0] == 403
    finally:
        assert as_user(aios, NEWS, "rmdir agents/bert agents/other").returncode == 0
