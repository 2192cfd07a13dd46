"""Programs of AIOS's SDK on the real mount, by its wire contract, as two real users."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.gateway import Gateway
from tests.running import REPOSITORY, Daemon, wait_until
from tests.t5_access import let_in
from tests.t5_gateway import GAMES, NEWS, Curl, chat
from tests.t5_gateway_keys import key_of
from tests.t5_users import as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]
Json = dict[str, Any]
TIMES = {"start_times", "end_times", "waiting_times", "turnaround_times"}

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
if task == "nan":
    print('{"result": NaN, "more": "\\\\ud800"}')
    sys.exit()
if task == "half":
    print('{"result": "\\\\ud800"}')
    sys.exit()
with open("/aios/agents/me__poet/syscall/llm", "r+b", buffering=0) as file:
    file.write(b"Repeat: " + task.encode())
    answer = file.read().decode().strip()
print(json.dumps({"agent_name": "me/poet", "result": answer, "uid": os.getuid(), "rounds": 1}))
"""


@pytest.fixture(scope="module")
def gateway(aios: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    made = Gateway(tmp_path_factory.mktemp("gateway") / "run", aios)
    yield made.start()
    made.stop()
    for agent in (aios.root / "agents").iterdir():
        if agent.stat().st_uid in (GAMES, NEWS):
            agent.rmdir()
    assert "Traceback" not in made.log.read_text()


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


@pytest.fixture
def poet(aios: Daemon) -> Iterator[str]:
    """An agent that GAMES may submit: a tool of his."""
    script = f"mkdir tools/me__poet && cat > tools/me__poet/manifest <<'END'\n{MANIFEST}END\n"
    done = as_user(aios, GAMES, f"{script}cat > tools/me__poet/program <<'END'\n{PROGRAM}END\n")
    assert done.returncode == 0, done.stderr
    yield "me/poet"
    (aios.root / "tools/me__poet").rmdir()


def function(name: str) -> Json:
    parameters = {
        "type": "object", "required": ["expression"], "properties": {"expression": {"type": "string"}},
    }  # fmt: skip
    about = {"name": name, "description": "Evaluate an arithmetic expression", "parameters": parameters}
    return {"type": "function", "function": about}


def llm(content: str, agent: str = "me/writer", **more: object) -> Json:
    """As llm_chat and the other functions of the SDK send it."""
    query = {
        "query_class": "llm", "llms": None, "messages": [{"role": "user", "content": content}], "tools": None,
        "action_type": "chat", "temperature": 0.0, "max_new_tokens": 1000, "message_return_type": "text",
        "response_format": None,
    }  # fmt: skip
    return {"query_type": "llm", "agent_name": agent, "query_data": query | more}


def tool(*calls: object, agent: str = "me/writer") -> Json:
    query = {"query_class": "tool", "tool_calls": list(calls)}
    return {"query_type": "tool", "agent_name": agent, "query_data": query}


def answered(curl: Curl, body: object) -> Json:
    status, answer = curl.ask(body, "/query")
    assert status == 200, answer
    assert answer.keys() >= TIMES
    found: Json = answer["response"]
    return found


def submitted(curl: Curl, agent: str, task: str) -> int:
    status, answer = curl.ask({"agent_id": agent, "agent_config": {"task": task}}, "/agents/submit")
    assert (status, answer["status"]) == (200, "success"), answer
    return int(answer["execution_id"])


def ended(curl: Curl, number: int) -> tuple[int, Json]:
    found: list[tuple[int, Json]] = []

    def looked() -> bool:
        found.append(curl.ask(None, f"/agents/{number}/status"))
        return found[-1][1].get("status") != "running"

    wait_until(looked, "the end of the agent")
    return found[-1]


def test_a_chat_is_a_request_of_the_users_own_agent(games: Curl, news: Curl, aios: Daemon) -> None:
    assert answered(games, llm("Repeat: mango")) == {
        "response_class": "llm", "response_message": "mango", "tool_calls": None, "finished": True,
        "error": None, "status_code": 200,
    }  # fmt: skip
    assert "mango" in as_user(aios, GAMES, "cat agents/me__writer/requests/latest/request").stdout
    as_user(aios, GAMES, "chmod 777 agents/me__writer; chmod 666 agents/me__writer/syscall/llm")
    assert answered(news, llm("Repeat: fig"))["response_message"] == "fig"
    assert "fig" in as_user(aios, NEWS, f"cat agents/me__writer.{NEWS}/requests/latest/request").stdout
    assert "fig" not in as_user(aios, GAMES, "cat agents/me__writer/requests/*/request").stdout
    assert answered(news, llm("Repeat: kiwi", "agent:me__writer"))["response_message"] == "kiwi"


def test_what_aios_drops_counts_here(games: Curl) -> None:
    assert len(answered(games, llm("Repeat: mango and fig", max_new_tokens=1))["response_message"]) < 10
    warm = {answered(games, llm("Tell me a story", temperature=5.0, max_new_tokens=20))["response_message"]
            for _ in range(3)}  # fmt: skip
    assert len(warm) > 1
    number = {"type": "integer", "maximum": 99}
    schema = {"type": "object", "properties": {"a": number}, "required": ["a"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "r", "schema": schema}}
    asked = llm("6 * 7", action_type="chat_with_json_output", response_format=wanted)
    assert isinstance(json.loads(answered(games, asked)["response_message"])["a"], int)


def test_calls_keep_the_names_that_aios_gives_tools(games: Curl) -> None:
    asked_for = "chat_with_tool_call_output"
    asked = llm("What is 6 * 7?", tools=[function("demo/calc")], action_type=asked_for)
    (call,) = answered(games, asked)["tool_calls"]
    assert (call["name"], call["parameters"].keys()) == ("demo/calc", {"expression"})
    asked = llm("Repeat: fig", tools=[function("demo/calc")["function"]], action_type=asked_for)
    assert answered(games, asked) | {"response_message": ""} == {
        "response_class": "llm", "response_message": "", "tool_calls": [], "finished": True, "error": None,
        "status_code": 200,
    }  # fmt: skip


def test_the_gateway_calls_tools_for_the_agent(games: Curl, poet: str) -> None:
    asked = llm("What is 6 * 7?", tools=[function("calc")], action_type="call_tool")
    assert answered(games, asked) == {
        "response_class": "tool", "response_message": "42", "finished": True, "error": None,
        "status_code": 200,
    }  # fmt: skip
    none = llm("Repeat: fig", tools=[function("calc")], action_type="call_tool")
    assert answered(games, none)["finished"] is False
    sums = [{"name": "calc", "parameters": {"expression": text}} for text in ("6*7", "1+1")]
    assert answered(games, tool(*sums))["response_message"] == "42\n2"
    answer = answered(games, tool({"name": poet, "parameters": {"task": "fig"}}, agent=poet))
    assert json.loads(answer["response_message"])["result"] == "fig"


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (llm("hi", llms=[{"name": "gpt-4o", "backend": "openai"}]), 404, "no model gpt-4o"),
        (llm("hi", llms=[{"name": "../x"}]), 404, "no model"),
        (llm("hi", temperature="hot"), 400, "temperature"),
        (llm("hi", messages=[7]), 400, "messages"),
        (llm("hi", response_format={"type": "yaml"}), 400, "response_format"),
        (llm("write a file", action_type="operate_file"), 501, "storage"),
        (tool({"name": "calc", "parameters": {"expression": "6*"}}), 500, "ends too early"),
        (tool({"name": "no/tool", "parameters": {}}), 404, "no__tool"),
        (tool({"name": "../calc", "parameters": {}}), 404, "no tool"),
        (tool({"name": "calc", "parameters": [1]}), 400, "arguments"),
        ({"query_type": "storage", "query_data": {"operation_type": "mount", "params": {}}}, 501, "storage"),
    ],
)
def test_what_fails_is_told_in_the_response(games: Curl, body: Json, status: int, word: str) -> None:
    answer = answered(games, body)
    assert answer["status_code"] == status, answer
    assert word in answer["error"]


def test_a_model_that_is_not_here_gives_way_to_the_next(games: Curl) -> None:
    llms = [{"name": "gpt-4o", "backend": "openai"}, {"name": "tiny", "backend": "aiosd"}]
    assert answered(games, llm("Repeat: fig", llms=llms))["response_message"] == "fig"


def test_there_is_no_memory_yet(games: Curl) -> None:
    query = {"query_class": "memory", "operation_type": "get_memory", "params": {}}
    answer = answered(games, {"query_type": "memory", "agent_name": "x", "query_data": query})
    assert (answer["success"], answer["response_class"]) == (False, "memory")
    assert "no manager of memory" in answer["error"]


WRONG: list[tuple[str, object]] = [
    ("/query", b"{"),
    ("/query", b"[]"),
    ("/query", b"[" * 100_000),
    ("/query", {"query_type": ["llm"]}),
    ("/query", {"query_type": "llm", "query_data": 7}),
    ("/query", {"query_type": "llm", "query_data": {"query_class": "tool"}}),
    ("/query", {"query_type": "llm", "query_data": {}}),
    ("/query", {"query_type": "tool", "query_data": {}}),
    ("/query", {"query_type": "llm", "query_data": {"messages": []}}),
    ("/query", llm("hi", ".x")),
    ("/query", llm("hi", "..")),
    ("/query", llm("hi", "x" * 65)),
    ("/query", llm("hi", "agent:../ada")),
    ("/query", llm("hi", action_type="dance")),
    ("/query", llm("hi", action_type=["chat"])),
    ("/query", llm("hi", tools=[1])),
    ("/query", llm("hi", tools=[{"function": "calc"}])),
    ("/query", llm("hi", llms=[{"name": 7}])),
    ("/query", llm("hi", llms=7)),
    ("/query", tool(7)),
    ("/query", tool({"parameters": {}})),
    ("/agents/submit", {"agent_id": 7}),
    ("/agents/submit", {"agent_id": "me/poet", "agent_config": {}}),
    ("/agents/submit", {"agent_id": "me/poet", "agent_config": {"task": 7}}),
]


@pytest.mark.parametrize(("path", "body"), WRONG)
def test_a_wrong_form_is_said_in_the_shape_of_fastapi(games: Curl, path: str, body: object) -> None:
    status, answer = games.ask(body, path)
    assert status == 422, answer
    assert answer["detail"][0]["msg"]
    assert answer["detail"][0]["loc"][0] == "body"


@pytest.mark.parametrize("depth", [100, 900, 950, 970, 990])
def test_deep_values_are_no_error_of_the_gateway(games: Curl, depth: int) -> None:
    deep = b"[" * depth + b"]" * depth
    body = b'{"query_type": "llm", "agent_name": "x", "query_data": {"messages": [' + deep + b"]}}"
    status, answer = games.ask(body, "/query")
    assert status == 422 or answer["response"]["status_code"] == 400, answer


def test_what_is_no_unicode_is_a_wrong_query(games: Curl) -> None:
    for wrong in (chat("hi", model="\ud800"), tool({"name": "\ud800", "parameters": {}})):
        status, answer = games.ask(wrong)
        assert (status, "surrogate" in str(answer)) == (400, True), answer


def test_a_submitted_agent_runs_as_its_user_and_its_end_comes_back(
    games: Curl, news: Curl, poet: str, aios: Daemon
) -> None:
    number = submitted(games, poet, "fig")
    result = {"agent_name": "me/poet", "result": "fig", "uid": GAMES, "rounds": 1}
    assert ended(games, number) == (200, {"execution_id": number, "status": "completed", "result": result})
    assert news.ask(None, f"/agents/{number}/status")[0] == 403
    status, answer = ended(games, submitted(games, poet, "fail"))
    assert status == 500
    assert "it does not work" in answer["detail"]
    assert ended(games, submitted(games, poet, "nan"))[1]["result"].startswith('{"result": NaN')
    assert ended(games, submitted(games, poet, "half"))[1]["result"] == {"result": "\ud800"}


def test_an_agent_that_runs_is_listed_and_outlives_its_client(
    games: Curl, news: Curl, gateway: Gateway, poet: str, aios: Daemon
) -> None:
    first = Curl(gateway, GAMES)
    with closing(first.http):
        number = submitted(first, poet, "wait")
    (one,) = games.ask(None, "/agents/ps")[1]["processes"]
    assert (one["agent_id"], one["execution_id"], one["task"]) == (poet, number, "wait")
    assert news.ask(None, "/agents/ps") == (200, {"status": "success", "processes": []})
    assert games.ask(None, f"/agents/{number}/status")[1]["status"] == "running"
    assert as_user(aios, GAMES, f"echo cancel > requests/{number}/ctl").returncode == 0
    status, answer = ended(games, number)
    assert (status, "cancelled" in answer["detail"]) == (500, True)


def test_each_of_many_submissions_gets_its_own_number(gateway: Gateway, poet: str) -> None:
    curls = [Curl(gateway, GAMES) for _ in range(6)]  # here, because a thread may not fork
    with ThreadPoolExecutor(6) as threads:
        numbers = list(threads.map(lambda curl: submitted(curl, poet, "half"), curls))
        ends = list(threads.map(ended, curls, numbers))
    for curl in curls:
        curl.http.close()
    assert len(set(numbers)) == 6
    assert {status for status, _ in ends} == {200}


@pytest.mark.parametrize("agent", ["example/academic_agent", "/home/ada/agent", "../calc", ""])
def test_what_is_no_agent_here_is_not_started(games: Curl, agent: str) -> None:
    status, answer = games.ask({"agent_id": agent, "agent_config": {"task": "x"}}, "/agents/submit")
    assert (status, "aios-tool(5)" in answer["detail"]) == (404, True)


def test_the_tool_of_another_user_does_not_run_as_somebody(news: Curl, poet: str, aios: Daemon) -> None:
    assert as_user(aios, GAMES, "chmod 777 tools/me__poet tools/me__poet/call").returncode == 0
    status, answer = news.ask({"agent_id": poet, "agent_config": {"task": "fig"}}, "/agents/submit")
    assert (status, "access/owners" in answer["detail"]) == (403, True)


@pytest.mark.parametrize(("number", "status"), [("0", 404), ("x", 422), ("9" * 30, 422), ("987654321", 404)])
def test_a_number_of_nothing_has_no_status(games: Curl, number: str, status: int) -> None:
    assert games.ask(None, f"/agents/{number}/status")[0] == status


def test_a_request_of_a_model_is_no_agent(games: Curl, aios: Daemon) -> None:
    answered(games, llm("Repeat: fig"))
    folder = as_user(aios, GAMES, "readlink agents/me__writer/requests/latest").stdout.strip()
    status, answer = games.ask(None, f"/agents/{folder.rpartition('/')[2]}/status")
    assert (status, answer["detail"]) == (404, "this is no execution of an agent")


def test_a_key_comes_as_the_password_of_a_url(gateway: Gateway, aios: Daemon) -> None:
    """The SDK knows no keys, but requests sends what its URL has."""
    key = key_of(aios, NEWS)["key"]
    for word, status in ((f"aios:{key}", 200), (f"aios:{key}x", 401), ("é", 401), (f"aios:{key[:20]}", 401)):
        with closing(HTTPConnection("127.0.0.1", gateway.port)) as http:
            basic = base64.b64encode(word.encode()).decode()
            http.request("GET", "/core/llms/list", headers={"Authorization": f"Basic {basic}"})
            assert http.getresponse().status == status, word


def test_a_key_for_one_agent_reaches_no_other(gateway: Gateway, aios: Daemon, games: Curl, poet: str) -> None:
    assert as_user(aios, GAMES, "mkdir agents/solo && echo calc > agents/solo/tools").returncode == 0
    number = submitted(games, poet, "half")
    key = key_of(aios, GAMES, agent="solo")["key"]

    def ask(body: object, path: str = "/query") -> tuple[int, Json]:
        return games.ask(body, path, key)

    assert ask(llm("Repeat: fig", "solo"))[1]["response"]["response_message"] == "fig"
    assert ask(llm("hi", "me/writer"))[1]["response"]["status_code"] == 403
    assert ask(llm("hi", "solo", llms=[{"name": "tiny"}]))[1]["response"]["status_code"] == 403
    sums, runs = (
        {"name": "calc", "parameters": {"expression": "1+1"}},
        {"name": poet, "parameters": {"task": "x"}},
    )
    assert ask(tool(sums, agent="solo"))[1]["response"]["response_message"] == "2"
    assert ask(tool(runs, agent="solo"))[1]["response"]["status_code"] == 403
    assert ask({"agent_id": poet, "agent_config": {"task": "x"}}, "/agents/submit")[0] == 403
    assert ask(None, f"/agents/{number}/status")[0] == 404
    assert ask(None, "/agents/ps")[1]["processes"] == []
    assert ask(None, "/core/llms/list")[1]["llms"] == []


def test_the_kernel_is_set_up_already(games: Curl) -> None:
    """What version 0.0.3 of the SDK does before it submits an agent."""
    assert games.ask({"llm_name": "tiny", "llm_backend": "default"}, "/core/llm/setup")[0] == 200
    assert games.ask({"llm_name": "gpt-4o"}, "/core/llm/setup")[0] == 404
    for path in ("/core/storage/setup", "/core/scheduler/setup", "/core/cleanup"):
        assert games.ask({"root_dir": "x"}, path)[1]["status"] == "success"
    assert games.ask(None, "/core/status")[1]["memory"] == "inactive"
    assert games.ask(None, "/status")[1]["inactive_components"] == ["memory", "storage"]
    assert games.ask(None, "/core/llms/list")[1]["llms"][0]["name"] == "tiny"


# What the SDK's llm_chat sends from inside of an agent
AGENT = """import json, os, urllib.request
class Teacher:
    def __init__(self, agent_name):
        self.agent_name = agent_name
    def run(self, task_input):
        print("agents print what they do")
        messages = [{"role": "user", "content": task_input}]
        query = {"query_class": "llm", "messages": messages, "action_type": "chat", "temperature": 0.0}
        body = {"query_type": "llm", "agent_name": self.agent_name, "query_data": query}
        asked = urllib.request.Request("http://localhost:8000/query", json.dumps(body).encode())
        answer = json.load(urllib.request.urlopen(asked))["response"]["response_message"]
        return {"agent_name": self.agent_name, "result": answer, "uid": os.getuid()}
"""


def test_an_agent_of_the_sdk_runs_in_the_sandbox_and_asks_the_gateway_as_its_user(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    let_in(tmp_path)
    folder, address = tmp_path / "tools.d/example__language_tutor", tmp_path / "run/gateway.sock"
    shutil.copytree(REPOSITORY / "examples/cerebrum", folder)
    manifest = (folder / "tool.toml").read_text().replace("/run/aios-gateway/gateway.sock", str(address))
    manifest = manifest.replace("/opt/cerebrum", str(tmp_path / "opt")).replace(
        "env = {", f'env = {{ GATEWAY = "{address}",'
    )
    (folder / "tool.toml").write_text(manifest)
    agent = tmp_path / "opt/agents/language_tutor"
    agent.mkdir(parents=True)
    (agent / "agent.py").write_text(AGENT)
    build = {"entry": "agent.py", "module": "Teacher"}
    (agent / "config.json").write_text(json.dumps({"name": "language_tutor", "build": build}))
    daemon = make_daemon(f"[tools]\nfolder = '{tmp_path}/tools.d'\n").start()
    gateway = Gateway(tmp_path / "run", daemon).start()
    try:
        curl = Curl(gateway, GAMES)
        with closing(curl.http):
            status, answer = ended(curl, submitted(curl, "example/language_tutor", "Repeat: mango"))
        assert status == 200, answer
        assert (answer["result"]["agent_name"], answer["result"]["uid"]) == ("language_tutor", GAMES)
        asked = as_user(daemon, GAMES, "cat agents/language_tutor/requests/latest/request").stdout
        assert "Repeat: mango" in asked
    finally:
        gateway.stop()
