"""What an MCP server asks during a call: words of its caller, an answer of the agent's model, his folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.conftest import TINY
from tests.running import Daemon, wait_until
from tests.t5_mcp_foreign import Foreign, tool
from tests.t5_users import ALICE, BOB, as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]
FORM = {"type": "object", "properties": {"color": {"type": "string"}}, "required": ["color"]}
SAMPLE = {
    "messages": [{"role": "user", "content": {"type": "text", "text": "Who are you?"}}],
    "maxTokens": 5,
}


def ask(method: str, **params: Any) -> dict[str, Any]:
    return {"ask": {"method": method, "params": params}}


ANSWERS = {
    "elicit": ask("elicitation/create", message="Which color?", requestedSchema=FORM),
    "sample": ask("sampling/createMessage", **SAMPLE),
    "roots": ask("roots/list"),
}


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foreign]:
    foreign = Foreign(tmp_path_factory.mktemp("asking"), a="timeout_s = 5\n")
    foreign.says("a", tools=[tool(name) for name in ANSWERS], answers=ANSWERS)
    foreign.daemon.start()
    wait_until(lambda: "a.roots" in foreign.tools(), "the tools")
    made = as_user(foreign.daemon, ALICE, "mkdir agents/ada && echo tiny > agents/ada/model")
    assert made.returncode == 0
    yield foreign
    assert foreign.daemon.stop() == 0
    foreign.daemon.clean()


def call(asking: Foreign, name: str) -> str:
    script = f"""echo '{{"name": "a.{name}"}}' > agents/ada/syscall/tool"""
    assert as_user(asking.daemon, ALICE, script).returncode == 0
    return asking.daemon.read("agents/ada/requests/latest/state")


def pending(asking: Foreign) -> str:
    folder = asking.daemon.root / "access/pending"
    wait_until(lambda: bool(os.listdir(folder)), "the question")
    [id] = os.listdir(folder)
    return f"access/pending/{id}"


def answered(asking: Foreign) -> Any:
    return json.loads(as_user(asking.daemon, ALICE, "cat agents/ada/syscall/tool").stdout)


def test_a_question_of_a_server_waits_for_its_caller_and_no_other(asking: Foreign) -> None:
    call(asking, "elicit")
    at = pending(asking)
    asked = json.loads(as_user(asking.daemon, ALICE, f"cat {at}/request.json").stdout)
    assert (asked["tool"], asked["question"], asked["answer"]) == ("a.elicit", "Which color?", FORM)
    for text in ("red", '{"color": 5}', "allow", '{"color"'):
        assert "Invalid argument" in as_user(asking.daemon, ALICE, f"echo '{text}' > {at}/decision").stderr
    right = f"""echo '{{"color": "red"}}' > {at}/decision"""
    assert "Permission denied" in as_user(asking.daemon, BOB, right).stderr
    assert as_user(asking.daemon, ALICE, right).returncode == 0
    assert answered(asking) == {"action": "accept", "content": {"color": "red"}}
    assert not os.listdir(asking.daemon.root / "access/pending")


def test_a_question_may_be_declined_and_is_over_with_its_call(asking: Foreign) -> None:
    call(asking, "elicit")
    assert as_user(asking.daemon, ALICE, f"echo deny > {pending(asking)}/decision").returncode == 0
    assert answered(asking) == {"action": "decline"}
    call(asking, "elicit")
    pending(asking)
    as_user(asking.daemon, ALICE, "echo cancel all > agents/ada/ctl")
    wait_until(lambda: not os.listdir(asking.daemon.root / "access/pending"), "the question to go")


def test_an_answer_of_the_agents_model_is_a_request_of_the_agent(asking: Foreign) -> None:
    call(asking, "sample")
    said = answered(asking)
    assert (said["role"], said["model"]) == ("assistant", "tiny")
    assert said["content"]["text"].strip()
    ids = [id for id in os.listdir(asking.daemon.root / "agents/ada/requests") if id.isdecimal()]
    newest = f"agents/ada/requests/{max(map(int, ids))}"
    assert "completion_tokens 5" in " ".join(asking.daemon.read(f"{newest}/usage").split())
    assert asking.daemon.read(f"{newest}/response.json")


def test_without_an_agent_there_is_no_model_to_ask(asking: Foreign) -> None:
    assert "not called through an agent" in asking.call("a.sample")


def test_a_server_is_told_the_folders_of_its_session(asking: Foreign) -> None:
    found = json.loads(asking.call("a.roots"))
    here = asking.folder / "here"
    assert found == {"roots": [{"uri": "file:///work"}, {"uri": f"file://{here}"}]}


# hosted servers


class Guarded(BaseHTTPRequestHandler):
    """An MCP server over HTTP that wants a key, and a token that changes."""

    token = "first"
    refused = 0

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        given = self.headers["X-Key"], self.headers["Authorization"]
        if given != ("sesame", f"Bearer {Guarded.token}"):
            Guarded.refused += 1
            self.send_response(401)
            self.end_headers()
            return
        body = json.dumps({"jsonrpc": "2.0", "id": asked.get("id"), "result": self.result(asked)}).encode()
        self.send_response(200 if "id" in asked else 202)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body) if "id" in asked else 0))
        self.end_headers()
        if "id" in asked:
            self.wfile.write(body)

    @staticmethod
    def result(asked: dict[str, Any]) -> Any:
        match asked["method"]:
            case "initialize":
                server = {"name": "guarded", "version": "1"}
                return {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": server}
            case "tools/list":
                return {"tools": [tool("who")]}
        return {"content": [{"type": "text", "text": Guarded.token}]}

    def log_message(self, *_: object) -> None:
        """Not on the standard error."""


def test_a_hosted_server_gets_headers_with_credentials_and_a_token_that_is_renewed(tmp_path: Path) -> None:
    for parent in [tmp_path, *tmp_path.parents][:4]:
        parent.chmod(0o755)
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "key").write_text("sesame\n")
    (secrets / "key").chmod(0o600)
    token = tmp_path / "token"
    token.write_text("first\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    Thread(target=server.serve_forever, daemon=True).start()
    config = (
        f'[tools]\ncredentials = "{secrets}"\n[mcp.web]\nurl = "http://127.0.0.1:{server.server_port}/mcp"\n'
    )
    config += f'token_command = ["/bin/cat", "{token}"]\nread = ["{token}"]\ncredentials = ["key"]\n'
    daemon = Daemon(tmp_path / "daemon", TINY, config + 'headers = {X-Key = "${key}"}\n')
    try:
        daemon.start(ready=False)
        wait_until(lambda: "web.who" in os.listdir(daemon.root / "tools"), "the tools")
        script = """exec 3<>tools/web.who/call; echo '{}' >&3 && cat <&3"""
        assert as_user(daemon, ALICE, script).stdout == "first\n"
        before = Guarded.refused
        token.write_text("second\n")
        Guarded.token = "second"
        assert as_user(daemon, ALICE, script).stdout == "second\n"
        assert Guarded.refused == before + 1
        assert "sesame" not in daemon.log.read_text() + daemon.read("tools/web.who/info")
    finally:
        daemon.clean()
        server.shutdown()
        server.server_close()
