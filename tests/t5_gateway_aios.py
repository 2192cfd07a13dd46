"""Programs of AIOS's SDK on the real mount, by its wire contract, as two real users."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import pytest

from tests.gateway import Gateway
from tests.running import Daemon, wait_until
from tests.t5_gateway import GAMES, NEWS, Curl, games, gateway, news
from tests.t5_users import as_user

__all__ = ["games", "gateway", "news"]
pytestmark = [pytest.mark.mount, pytest.mark.root]
Json = dict[str, Any]

CALC = {
    "type": "function",
    "function": {
        "name": "demo/calc",
        "description": "Evaluate an arithmetic expression",
        "parameters": {
            "type": "object", "required": ["expression"], "properties": {"expression": {"type": "string"}},
        },
    },
}  # fmt: skip
MANIFEST = """description = "An agent of AIOS"
command = ["./program"]
[parameters]
type = "object"
required = ["task"]
properties.task.type = "string"
"""
PROGRAM = """#!/usr/bin/python3
import json, os, sys, time
task = json.load(sys.stdin)["task"]
if task == "fail":
    sys.exit("it does not work")
while task == "wait":
    time.sleep(1)
with open("/aios/agents/me__poet/syscall/llm", "r+b", buffering=0) as file:
    file.write(b"Repeat: " + task.encode())
    answer = file.read().decode().strip()
print(json.dumps({"agent_name": "me/poet", "result": answer, "uid": os.getuid(), "rounds": 1}))
"""


def llm(content: str, name: str = "me/writer", **more: object) -> Json:
    query = {
        "query_class": "llm", "llms": None, "messages": [{"role": "user", "content": content}], "tools": None,
        "action_type": "chat", "temperature": 1.0, "max_new_tokens": 1000, "message_return_type": "text",
        "response_format": None,
    }  # fmt: skip
    return {"query_type": "llm", "agent_name": name, "query_data": query | more}


def asked(curl: Curl, body: object, path: str = "/query") -> Json:
    status, answer = curl.ask(body, path)
    assert status == 200, answer
    return answer


def test_try(games: Curl, news: Curl, aios: Daemon) -> None:
    print(asked(games, llm("Repeat: mango", temperature=0.0)))
    print(asked(games, llm("What is 6 * 7?", tools=[CALC], action_type="chat_with_tool_call_output", temperature=0.0)))
    print(asked(games, llm("What is 6 * 7?", tools=[CALC | {"function": CALC["function"] | {"name": "calc"}}], action_type="call_tool", temperature=0.0)))
    print(asked(news, llm("Repeat: fig")))
    print(as_user(aios, GAMES, "ls -la agents contexts; cat agents/me__writer/requests/latest/request").stdout)
    print(asked(games, {"query_type": "tool", "agent_name": "x", "query_data": {"tool_calls": [{"name": "calc", "parameters": {"expression": "6*7"}}]}}))
    print(asked(games, {"query_type": "tool", "agent_name": "x", "query_data": {"tool_calls": [{"name": "calc", "parameters": {"expression": "6*"}}]}}))
    print(asked(games, {"query_type": "tool", "agent_name": "x", "query_data": {"tool_calls": [{"name": "none", "parameters": {"expression": "6*"}}]}}))
    done = as_user(aios, GAMES, f"mkdir tools/me__poet && cat > tools/me__poet/manifest <<'E'\n{MANIFEST}\nE\ncat > tools/me__poet/program <<'E'\n{PROGRAM}\nE\n")
    print(done)
    for task in ("fig", "fail", "wait"):
        s = asked(games, {"agent_id": "me/poet", "agent_config": {"task": task}}, "/agents/submit")
        print(s)
        import time; time.sleep(2)
        print(games.ask(None, f"/agents/{s['execution_id']}/status"))
        print(asked(games, None, "/agents/ps"))
        print(asked(news, None, "/agents/ps"))
        print(news.ask(None, f"/agents/{s['execution_id']}/status"))
        print(as_user(aios, GAMES, f"cat requests/{s['execution_id']}/request").stdout)
    for p in ("/core/llms/list", "/core/status", "/status"):
        print(asked(news, None, p))
    assert 0
