"""MCP on the real mount: servers of the official SDK as tools, and the SDK's client with `aiosctl mcp
serve`."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import mcp
import psutil
import pytest
from mcp import StdioServerParameters

from aiosd.tools.mcp.program import program
from tests.conftest import TINY
from tests.running import REPOSITORY, Daemon, wait_until
from tests.t5_users import ALICE, BOB, as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]
SERVER = REPOSITORY / "tests" / "mcp_server.py"


def python() -> list[str]:
    """The interpreter for servers, which other users can reach."""
    (path, *_), _, env = program()
    return ["/usr/bin/env", f"PYTHONPATH={env['PYTHONPATH']}", path, "-S"]


def table(name: str, command: list[str], **facts: object) -> str:
    lines = {"command": command, **facts}
    return f"[mcp.{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())


class Host:
    """A daemon with MCP servers, and a folder that the servers share with the test."""

    def __init__(self, folder: Path) -> None:
        for parent in [folder, *folder.parents][:4]:
            parent.chmod(0o755)
        self.here = folder / "here"
        self.here.mkdir()
        self.here.chmod(0o1777)
        facts: dict[str, Any] = {"read": [str(SERVER.parent)], "write": [str(self.here)]}
        command = [*python(), str(SERVER), str(self.here)]
        config = table("proof", command, timeout_s=20, **facts) + 'env = {KEY = "the key"}\n'
        config += table("quick", command, timeout_s=1, idle_s=1, **facts)
        self.daemon = Daemon(folder, TINY, "[tools]\noutput_bytes = 100000\n" + config)

    def call(self, tool: str, uid: int = ALICE, **arguments: object) -> str:
        """The tool's output, or the shell's error."""
        script = f"exec 3<>tools/{tool}/call; echo '{json.dumps(arguments)}' >&3 && cat <&3"
        done = as_user(self.daemon, uid, script)
        return done.stdout + done.stderr

    def error(self, tool: str, **arguments: object) -> dict[str, Any]:
        """response.json of a call through root's agent."""
        text = json.dumps({"name": tool, "arguments": arguments})
        self.daemon.sh(f"exec 3<>agents/root/syscall/tool; echo '{text}' >&3 && cat <&3")
        facts: dict[str, Any] = json.loads(self.daemon.read("agents/root/requests/latest/response.json"))
        return facts

    def begin(self, tool: str, uid: int = ALICE, **arguments: object) -> subprocess.Popen[bytes]:
        script = f"exec 3<>tools/{tool}/call; echo '{json.dumps(arguments)}' >&3 && exec cat <&3"
        return subprocess.Popen(
            ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups", "bash", "-c", script],
            cwd=self.daemon.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def said(self, name: str) -> bool:
        return (self.here / name).exists()

    def servers(self, uid: int) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["uids", "cmdline", "ppid", "name"]):
            line = process.info["cmdline"] or []
            if str(SERVER) in line and str(self.here) in line and process.info["uids"].real == uid:
                found.append(process)
        pids = {p.pid for p in found}
        return [p for p in found if p.info["ppid"] not in pids and "bwrap" not in p.info["name"]]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("mcp"))
    host.daemon.start()
    wait_until(lambda: "quick.add" in os.listdir(host.daemon.root / "tools"), "the tools of quick")
    wait_until(lambda: "proof.add" in os.listdir(host.daemon.root / "tools"), "the tools of proof")
    host.daemon.sh("mkdir agents/root")
    yield host
    assert host.daemon.stop() == 0


def test_a_servers_tools_are_called_like_any_other(host: Host) -> None:
    assert host.call("proof.add", a=2, b=3) == "5\n"
    function = json.loads(host.daemon.read("tools/proof.add/schema.json"))["function"]
    assert (function["name"], function["description"]) == ("proof_add", "Adds two numbers.")
    assert function["parameters"]["required"] == ["a", "b"]
    assert json.loads(host.daemon.read("tools/proof.add/info"))["server"] == "proof"


def test_a_servers_hints_decide_which_calls_wait_for_a_decision(host: Host) -> None:
    waits = {
        tool: json.loads(host.daemon.read(f"tools/proof.{tool}/info"))["irreversible"]
        for tool in ("add", "keep", "destroy")
    }
    assert waits == {"add": False, "keep": False, "destroy": True}
    host.daemon.write("agents/root/syscall/tool", '{"name": "proof.destroy", "arguments": {}}')
    wait_until(lambda: bool(os.listdir(host.daemon.root / "access/pending")), "the call to wait")
    [id] = os.listdir(host.daemon.root / "access/pending")
    host.daemon.write(f"access/pending/{id}/decision", "allow")
    assert host.daemon.read("agents/root/syscall/tool") == "destroyed\n"


def test_wrong_arguments_are_refused_by_the_write(host: Host) -> None:
    assert "Invalid argument" in host.call("proof.add", a=2)
    assert "Invalid argument" in host.call("proof.add", a=2, b="three")
    assert "No such file" in host.call("proof.no", a=2)


def test_results_that_are_no_text(host: Host) -> None:
    assert json.loads(host.call("proof.pair", a=4)) == {"a": 4, "twice": 8}
    assert host.call("proof.picture") == "[image: image/png, 100 bytes, file 1.png]\n"
    host.daemon.sh(
        """echo '{"name": "proof.picture"}' >agents/root/syscall/tool; cat agents/root/syscall/tool"""
    )
    picture = host.daemon.root / "agents/root/requests/latest/files/1.png"
    assert picture.read_bytes() == b"\x89PNG" * 25
    assert picture.stat().st_size == 100


def test_the_resources_of_a_server_are_files(host: Host) -> None:
    folder = host.daemon.root / "tools/proof.read_resource/resources"
    assert sorted(os.listdir(folder)) == ["logo", "whose"]
    for uid in (ALICE, BOB):
        assert as_user(host.daemon, uid, "cat tools/proof.read_resource/resources/whose").stdout == f"{uid}\n"
    assert (folder / "logo").read_bytes() == b"\x89PNG" * 25
    assert host.call("proof.read_resource", uri="proof://of/alice") == "of alice\n"
    assert "Input/output" in host.call("proof.read_resource", uri="proof://none")


def test_the_prompts_of_a_server_are_tools_that_give_messages(host: Host) -> None:
    said = json.loads(host.call("proof.prompt.greet", name="Ada"))
    assert said == {"messages": [{"role": "user", "content": "Greet Ada."}]}
    assert "Invalid argument" in host.call("proof.prompt.greet")


def test_the_progress_of_a_call_is_in_its_state(host: Host) -> None:
    host.daemon.write("agents/root/syscall/tool", '{"name": "proof.steps", "arguments": {"name": "steps"}}')
    state = host.daemon.root / "agents/root/requests/latest/state"
    wait_until(lambda: state.read_text() == "running 1/3 half way\n", "its progress")
    (host.here / "steps").touch()
    assert host.daemon.read("agents/root/syscall/tool") == "done\n"
    assert state.read_text() == "done\n"


def test_an_error_of_the_tool_is_the_error_of_the_request(host: Host) -> None:
    facts = host.error("proof.fail", text="no such moon")
    assert facts["exit_status"] == 1
    assert "no such moon" in facts["error"]
    assert "on stderr" in facts["stderr"]
    lines = (host.daemon.root / "access/audit.jsonl").read_text().splitlines()
    assert (json.loads(lines[-1])["what"], json.loads(lines[-1])["tool"]) == ("failed", "proof.fail")


def test_each_user_has_a_session_of_his_own(host: Host) -> None:
    said = {uid: host.call("proof.who", uid) for uid in (ALICE, BOB)}
    for uid in said:
        assert said[uid].startswith(f"{uid} [] ")
        assert said[uid].endswith(" the key\n")
        assert host.call("proof.who", uid) == said[uid]  # the same process
        assert len(host.servers(uid)) == 1
    host.call("proof.keep", ALICE, text="mine")
    assert host.call("proof.keep", BOB, text="his") == "his\n"
    assert host.call("proof.keep", ALICE, text="too") == "mine\ntoo\n"


def test_calls_share_a_session_and_run_at_once(host: Host) -> None:
    waiting = [host.begin("proof.wait", name=f"at once {i}") for i in range(3)]
    wait_until(lambda: all(host.said(f"at once {i}") for i in range(3)), "all to run")
    assert host.call("proof.add", a=1, b=1) == "2\n"
    assert len(host.servers(ALICE)) == 1
    for client in waiting:
        client.kill()
    wait_until(lambda: (host.here / "at once 2").read_text() == "cancelled", "the server to hear of it")


def test_a_call_that_takes_too_long_is_cancelled_and_the_session_goes_on(host: Host) -> None:
    before = host.call("quick.who")
    assert "Input/output" in host.call("quick.wait", name="too long")
    wait_until(lambda: (host.here / "too long").read_text() == "cancelled", "the server to hear of it")
    assert host.call("quick.who") == before
    assert host.error("quick.wait", name="too long of root")["error"] == "it took more than 1 s"


def test_a_server_that_answers_nothing_any_more_is_ended(host: Host) -> None:
    before = host.call("quick.who")
    assert "Input/output" in host.call("quick.hang", name="hung")
    assert (after := host.call("quick.who")).startswith(f"{ALICE} ")
    assert after != before


def test_a_server_killed_in_the_middle_of_a_call_fails_it_and_the_next_starts_another(host: Host) -> None:
    host.daemon.write("agents/root/syscall/tool", '{"name": "proof.wait", "arguments": {"name": "killed"}}')
    wait_until(lambda: host.said("killed"), "the call to run")
    [server] = host.servers(0)
    server.kill()
    with pytest.raises(OSError, match="Input/output"):
        host.daemon.read("agents/root/syscall/tool")
    assert host.daemon.read("agents/root/requests/latest/error").startswith("the server ended")
    assert host.call("proof.add", 0, a=1, b=2) == "3\n"


def test_nothing_is_left_of_a_session_that_was_not_used(host: Host) -> None:
    assert host.call("quick.children", BOB, count=5) == "started\n"
    wait_until(lambda: not [s for s in host.servers(BOB) if "quick" in s.name()], "the session to end")
    wait_until(lambda: "1234" not in commands(BOB), "what it had started to end")


def commands(uid: int) -> str:
    found = psutil.process_iter(["uids", "cmdline"])
    return " ".join(" ".join(p.info["cmdline"] or ()) for p in found if p.info["uids"].real == uid)


def test_a_result_that_is_too_long_is_an_error(host: Host) -> None:
    assert len(host.call("proof.long", count=90_000)) == 90_001
    assert host.error("proof.long", count=100_000)["error"] == "it printed more than 100000 bytes"


def test_a_server_that_prints_garbage_or_floods_fails_its_calls_only(host: Host) -> None:
    assert host.call("proof.shout", text="garbage\n", count=10) == "shouted\n"
    assert "no MCP" in host.error("proof.shout", text="garbage\n", count=5000)["error"]
    assert host.error("quick.shout", text="x" * 100_000, count=1_000_000)["error"]
    assert host.call("proof.add", a=1, b=2) == "3\n"


def test_a_server_with_other_tools_is_heard(host: Host) -> None:
    assert "proof.more" not in os.listdir(host.daemon.root / "tools")
    assert host.call("proof.change") == "changed\n"
    wait_until(lambda: "proof.more" in os.listdir(host.daemon.root / "tools"), "the new tool", 40)
    assert host.call("proof.more") == "more\n"


def test_a_session_that_takes_too_much_memory_is_ended(host: Host) -> None:
    error = host.error("proof.hold", count=700 << 20)["error"]
    assert error == "the server ended: it took more than 1073741824 bytes of memory"
    assert host.call("proof.add", 0, a=1, b=2) == "3\n"


# what survives, and what does not


def test_after_kill_9_the_tools_are_there_at_once_and_nothing_of_the_sessions_is(tmp_path: Path) -> None:
    host = Host(tmp_path)
    try:
        host.daemon.start()
        wait_until(lambda: "quick.destroy" in os.listdir(host.daemon.root / "tools"), "the tools of quick")
        wait_until(lambda: "proof.add" in os.listdir(host.daemon.root / "tools"), "the tools of proof")
        host.daemon.sh("mkdir agents/root")
        host.daemon.write("agents/root/syscall/tool", '{"name": "quick.destroy", "arguments": {}}')
        host.daemon.write("agents/root/syscall/tool", '{"name": "proof.wait", "arguments": {"name": "died"}}')
        wait_until(lambda: host.said("died"), "the call to run")
        assert host.servers(0)
        host.daemon.kill()
        wait_until(lambda: not host.servers(0), "the session to end")
        host.daemon.start(ready=False)
        assert "proof.add" in os.listdir(host.daemon.root / "tools")
        assert "interrupted" in host.daemon.read("agents/root/requests/latest/error")
        [id] = os.listdir(host.daemon.root / "access/pending")
        host.daemon.write(f"access/pending/{id}/decision", "allow")
        assert host.daemon.read(f"agents/root/requests/{id}/response") == "destroyed\n"
        assert host.servers(0)
        assert host.daemon.stop() == 0
        assert not host.servers(0)
    finally:
        host.daemon.clean()


def test_a_reload_brings_and_takes_servers_and_one_that_fails_is_asked_again(tmp_path: Path) -> None:
    host = Host(tmp_path)
    try:
        host.daemon.start(ready=False)
        wait_until(lambda: "quick.add" in os.listdir(host.daemon.root / "tools"), "the tools of quick")
        assert host.call("quick.add", a=1, b=2) == "3\n"
        config = tmp_path / "aiosd.toml"
        config.write_text(
            table("late", [*python(), str(tmp_path / "late.py"), str(host.here)], read=[str(tmp_path)])
        )
        assert host.daemon.process
        host.daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "quick.add" not in os.listdir(host.daemon.root / "tools"), "the tools to go")
        wait_until(lambda: not host.servers(ALICE), "the session to end")
        wait_until(lambda: '"server": "late", "state": "failed"' in events(host), "the failure")
        host.daemon.says("late.py")
        (tmp_path / "late.py").write_text(SERVER.read_text())
        wait_until(lambda: "late.add" in os.listdir(host.daemon.root / "tools"), "the tools of late", 60)
        assert host.call("late.add", a=1, b=2) == "3\n"
    finally:
        host.daemon.clean()


def events(host: Host) -> str:
    return host.daemon.sh("timeout 0.5 cat events.jsonl").stdout


# aiosctl mcp serve


class Client:
    """The official client on `aiosctl mcp serve`, which runs as a user."""

    def __init__(self, host: Host, uid: int, *options: str) -> None:
        (path, *_), _, env = program()
        command = [
            "--reuid",
            str(uid),
            "--regid",
            str(uid),
            "--clear-groups",
            path,
            "-S",
            "-m",
            "aiosd.cli.aiosctl",
        ]
        command += ["--mount", str(host.daemon.root), "mcp", "serve", *options]
        self._server = StdioServerParameters(command="setpriv", args=command, env=env)

    def do(self, act: Callable[[mcp.Client], Awaitable[Any]]) -> Any:
        async def done() -> Any:
            async with mcp.Client(self._server) as client:
                return await act(client)

        return anyio.run(done)

    def call(self, name: str, **arguments: object) -> tuple[str, bool]:
        return self.calls((name, arguments))[0]

    def calls(self, *calls: tuple[str, dict[str, Any]]) -> list[tuple[str, bool]]:
        """Of one session: what each said, and whether it failed."""

        async def made(client: mcp.Client) -> list[Any]:
            return [await client.call_tool(name, arguments) for name, arguments in calls]

        return [
            ("".join(content.text for content in answer.content), bool(answer.is_error))
            for answer in self.do(made)
        ]


@pytest.fixture
def ada(host: Host) -> Iterator[str]:
    """An agent and a context of alice's."""
    script = "mkdir agents/ada contexts/chat; echo calc > agents/ada/tools; echo chat > agents/ada/context"
    assert as_user(host.daemon, ALICE, script).returncode == 0
    yield "ada"
    host.daemon.sh("rmdir agents/ada contexts/chat")


def test_a_client_gets_the_tools_that_its_user_may_call(host: Host) -> None:
    (host.daemon.root / "tools/clock/call").chmod(0o700)
    try:
        tools = Client(host, ALICE).do(lambda client: client.list_tools()).tools
        found = {tool.name: tool for tool in tools}
        assert {"ask", "agents", "calc", "proof_add", "proof_no_file"} <= found.keys()
        assert not [name for name in found if "." in name or "prompt" in name]
        assert "clock" not in found
        assert found["proof_add"].input_schema["required"] == ["a", "b"]
        assert found["shell"].annotations.destructive_hint
        assert Client(host, ALICE).call("clock", zone="UTC") == ("no tool 'clock' that you may call", True)
    finally:
        (host.daemon.root / "tools/clock/call").chmod(0o777)


def test_a_client_calls_tools_as_its_user(host: Host, ada: str) -> None:
    said = Client(host, ALICE).calls(
        ("calc", {"expression": "6*7"}),
        ("proof_who", {}),
        ("proof.add", {"a": 1, "b": 2}),  # its name of before
        ("calc", {"expression": 5}),
        ("../agents", {"expression": "1"}),
        ("calc", {"expression": "1/0"}),
        ("proof_fail", {"text": "no such moon"}),
    )
    assert said[0] == ("42\n", False)
    assert said[1][0].startswith(f"{ALICE} ")
    assert said[2:5] == [
        ("3\n", False),
        ("expression: 5 is not of type 'string'", True),
        ("no tool '../agents' that you may call", True),
    ]
    assert "exit status" in said[5][0]
    assert "no such moon" in said[6][0]
    assert said[5][1]
    assert said[6][1]
    through = Client(host, ALICE, "--agent", ada).calls(
        ("write_file", {"path": "a", "content": "kept"}),
        ("read_file", {"path": "a"}),
        ("calc", {"expression": "1/0"}),
    )
    assert through[0][1] is False
    assert through[1] == ("kept\n", False)
    assert "exit status" in through[2][0]
    agents = host.daemon.root / "agents"
    wait_until(lambda: not [one for one in os.listdir(agents) if one.startswith("mcp-")], "its agent to end")


def test_a_client_gets_pictures_structure_and_progress(host: Host) -> None:
    client = Client(host, ALICE)
    picture = client.do(lambda client: client.call_tool("proof_picture", {}))
    assert [content.type for content in picture.content] == ["text", "image"]
    assert base64.b64decode(picture.content[1].data) == b"\x89PNG" * 25
    pair = client.do(lambda client: client.call_tool("proof_pair", {"a": 2}))
    assert pair.structured_content == {"a": 2, "twice": 4}
    said: list[str | None] = []

    async def heard(progress: float, total: float | None, message: str | None) -> None:
        said.append(message)
        (host.here / "served").touch()

    async def follow(client: mcp.Client) -> Any:
        return await client.call_tool("proof_steps", {"name": "served"}, progress_callback=heard)

    assert not client.do(follow).is_error
    assert said == ["1/3 half way"]


def test_a_client_gets_prompts_and_resources_of_mcp_servers(host: Host) -> None:
    async def prompts(client: mcp.Client) -> Any:
        [found] = [one for one in (await client.list_prompts()).prompts if one.name == "proof_prompt_greet"]
        assert [(one.name, one.required) for one in found.arguments or ()] == [("name", True)]
        return await client.get_prompt("proof_prompt_greet", {"name": "Ada"})

    [message] = Client(host, ALICE).do(prompts).messages
    assert (message.role, message.content.text) == ("user", "Greet Ada.")

    async def resources(client: mcp.Client) -> list[Any]:
        uris = [str(one.uri) for one in (await client.list_resources()).resources]
        wanted = [uri for uri in uris if uri.startswith("aios://tools/proof.")]
        return [(await client.read_resource(uri)).contents[0] for uri in wanted]

    logo, whose = Client(host, ALICE).do(resources)
    assert base64.b64decode(logo.blob) == b"\x89PNG" * 25
    assert whose.text == f"{ALICE}\n"


def test_a_tool_that_is_not_finished_takes_no_other_from_a_client(host: Host) -> None:
    host.daemon.sh("mkdir -m 755 tools/half && chmod a+x tools/half/call")
    try:
        names = {tool.name for tool in Client(host, 0).do(lambda client: client.list_tools()).tools}
        assert "calc" in names
        assert "half" not in names
        assert Client(host, 0).call("half") == ("no tool 'half' that you may call", True)
    finally:
        host.daemon.sh("rmdir tools/half")


def test_names_without_dots_are_of_mcp_servers_tools(host: Host) -> None:
    function = json.loads(host.daemon.read("tools/proof.add/schema.json"))["function"]
    assert function["name"] == "proof_add"
    assert "proof_add" not in os.listdir(host.daemon.root / "tools")
    assert "Invalid argument" in as_user(host.daemon, ALICE, "mkdir tools/proof_add").stderr
    call = '{"name": "proof_add", "arguments": {"a": 1, "b": 2}}'
    host.daemon.write("agents/root/syscall/tool", call)
    assert host.daemon.read("agents/root/syscall/tool") == "3\n"
    host.daemon.write("agents/root/tools", "proof_add calc")
    assert host.daemon.read("agents/root/tools") == "proof.add calc\n"
    host.daemon.write("agents/root/tools", "")


def test_a_client_asks_its_users_agents_and_no_others(host: Host, ada: str) -> None:
    client = Client(host, ALICE)
    assert client.call("agents") == ("ada idle\n", False)
    assert client.call("ask", agent=ada, message="What is 12*12?") == ("12*12 = 144", False)
    pieces: list[str] = []

    async def heard(progress: float, total: float | None, message: str | None) -> None:
        pieces.append(message or "")

    async def streamed(client: mcp.Client) -> Any:
        asked = {"agent": ada, "message": "Who are you?"}
        return await client.call_tool("ask", asked, progress_callback=heard)

    said = client.do(streamed).content[0].text
    assert len(pieces) > 1
    assert "".join(pieces) == said
    assert client.call("ask", agent="nobody", message="Hello") == ("no agent nobody; yours are ada", True)
    assert Client(host, BOB).call("ask", agent=ada, message="Hello")[1]
    assert Client(host, BOB).call("agents") == ("", False)


def test_a_client_reads_its_users_conversations(host: Host, ada: str) -> None:
    Client(host, ALICE).call("ask", agent=ada, message="What is 12*12?")
    uri = "aios://contexts/chat/messages.jsonl"

    async def read(client: mcp.Client, uri: str) -> str:
        try:
            [content] = (await client.read_resource(uri)).contents
        except mcp.MCPError as error:
            return error.message
        assert isinstance(content, mcp.types.TextResourceContents)
        return content.text

    found = Client(host, ALICE).do(lambda client: client.list_resources()).resources
    assert {str(one.uri) for one in found if "/tools/" not in str(one.uri)} == {
        uri,
        "aios://agents/ada/state",
    }
    lines = Client(host, ALICE).do(partial(read, uri=uri)).splitlines()
    assert [json.loads(line)["role"] for line in lines] == ["user", "assistant", "tool", "assistant"]
    assert Client(host, BOB).do(partial(read, uri=uri)) == f"{uri}: Permission denied"
    for wrong in ("aios://contexts/../status", "aios://agents/ada/ctl", "file:///etc/passwd"):
        assert Client(host, ALICE).do(partial(read, uri=wrong)) == f"no resource {wrong}"


def test_a_client_can_cancel_a_call(host: Host) -> None:
    async def begin(client: mcp.Client) -> None:
        with anyio.move_on_after(30) as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.call_tool, "proof.wait", {"name": "of a client"})
                while not host.said("of a client"):
                    await anyio.sleep(0.02)
                scope.cancel()

    Client(host, ALICE).do(begin)
    wait_until(lambda: (host.here / "of a client").read_text() == "cancelled", "the server to hear of it")


# streamable HTTP


class Web:
    """The same server over HTTP on the loopback. A test may start and end it repeatedly."""

    def __init__(self, here: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self._here = f"http://127.0.0.1:{self.port}/mcp", here

    def start(self) -> None:
        command = [sys.executable, str(SERVER), str(self._here), "http", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self._answers, "the server")

    def _answers(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port)):
            return True

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    web = Web(tmp_path)
    web.start()
    yield web
    web.end()


def test_the_host_of_a_session_speaks_streamable_http_and_ends_with_the_server(
    web: Web, tmp_path: Path
) -> None:
    """The test runs the bridge without its sandbox, and sends the daemon's messages."""
    with subprocess.Popen(
        [sys.executable, "-m", "aiosd.tools.mcp.bridge"], cwd=REPOSITORY,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as host:  # fmt: skip
        assert host.stdin
        assert host.stdout
        assert host.stderr

        def tell(**order: object) -> None:
            assert host.stdin
            host.stdin.write(json.dumps(order).encode() + b"\n")
            host.stdin.flush()

        def heard() -> Any:
            assert host.stdout
            return json.loads(host.stdout.readline())

        tell(url=web.url, output_bytes=1000)
        assert heard() == {"ready": True}
        tell(list=True)
        assert {"add", "who"} <= {tool["name"] for tool in heard()["tools"]}
        add = {"method": "tools/call", "params": {"name": "add", "arguments": {"a": 1, "b": 2}}}
        right = {"text": "3\n", "error": False, "files": [], "structured": None, "quarrel": ""}
        tell(id=1, **add)
        assert heard() == {"id": 1, **right}
        tell(id=2, method="tools/call", params={"name": "wait", "arguments": {"name": "web"}})
        wait_until((tmp_path / "web").exists, "the call to run")
        tell(cancel=2)
        assert heard() == {**right, "id": 2, "text": "cancelled\n", "error": True}
        wait_until(lambda: (tmp_path / "web").read_text() == "cancelled", "the server to hear of it")
        web.end()
        web.start()
        tell(id=3, **add)
        if line := host.stdout.readline():  # a server that keeps no sessions does not miss this one
            assert json.loads(line) == {"id": 3, **right}
            web.end()
            tell(id=4, **add)
            assert host.stdout.readline() == b""
        assert host.wait() == 1
        assert host.stderr.read().strip()
        web.start()


def test_a_server_is_reached_by_http_and_one_that_vanished_is_an_error(web: Web, tmp_path: Path) -> None:
    for parent in [tmp_path, *tmp_path.parents][:4]:
        parent.chmod(0o755)
    daemon = Daemon(tmp_path / "daemon", TINY, f'[mcp.web]\nurl = "{web.url}"\n')
    try:
        daemon.start(ready=False)
        wait_until(lambda: "web.add" in os.listdir(daemon.root / "tools"), "the tools")
        script = """exec 3<>tools/web.add/call; echo '{"a": 1, "b": 2}' >&3 && cat <&3"""
        assert as_user(daemon, ALICE, script).stdout == "3\n"
        web.end()
        assert "Input/output" in as_user(daemon, ALICE, script).stderr
        web.start()
        assert as_user(daemon, ALICE, script).stdout == "3\n"
    finally:
        daemon.clean()
