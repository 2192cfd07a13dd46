"""MCP servers that make mistakes, on the real mount: one mistake spoils nothing beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY
from tests.running import REPOSITORY, Daemon, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.root]
SERVER = REPOSITORY / "tests" / "raw_mcp_server.py"
CHANGED = {"jsonrpc": "2.0", "method": "notifications/tools/list_changed"}
USEFUL = {"content": [{"type": "text", "text": "useful text"}]}
OUTPUT = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def tool(name: str, **facts: Any) -> dict[str, Any]:
    plain = {"inputSchema": {"type": "object"}, "annotations": {"readOnlyHint": True}}
    return {"name": name, "description": name, **plain, **facts}


def line(result: str) -> str:
    return '{"jsonrpc": "2.0", "id": @ID, "result": ' + result + "}"


PICTURE = {"type": "image", "data": "§", "mimeType": "image/png"}
LOST = {"type": "object", "properties": {"s": {"$ref": "#/$defs/none"}}}
TEXT = USEFUL["content"]
ODD = "a\u2028b\u0085c"
QUARREL = "does not fit its output schema"
ANSWERS: dict[str, Any] = {
    # name: (what the server answers, what is printed, the tool's output schema, what `info` says then)
    "plain": (USEFUL, "useful text\n", None, ""),
    "wrong_output": ({**USEFUL, "structuredContent": {"n": "seven"}}, "useful text\n", OUTPUT, QUARREL),
    "no_output": (USEFUL, "useful text\n", OUTPUT, "not structured"),
    "lost_output": ({**USEFUL, "structuredContent": {"s": 1}}, "useful text\n", LOST, ""),
    "fitting": ({"content": [], "structuredContent": {"n": 7}}, '{"n": 7}\n', OUTPUT, ""),
    "no_object": ({"content": [], "structuredContent": [1, 2]}, "[1, 2]\n", None, ""),
    "one_wrong_part": ({"content": [{"type": "x"}, *TEXT]}, '{"type": "x"}\nuseful text\n', None, ""),
    "a_part_without_type": ({"content": [{"text": 5}, *TEXT]}, '{"text": 5}\nuseful text\n', None, ""),
    "a_text_for_a_list": ({"content": "useful text"}, "useful text\n", None, ""),
    "no_base64": ({"content": [PICTURE, *TEXT]}, "[image: image/png, not base64]\nuseful text\n", None, ""),
    "half_a_character": (line('{"content": [{"type": "text", "text": "a\\ud83db"}]}'), "a?b\n", None, ""),
    "nan": (line('{"content": [], "structuredContent": {"x": NaN, "y": 1e999}}'),
            '{"x": null, "y": null}\n', None, ""),
    "separators": ({"content": [{"type": "text", "text": ODD}]}, ODD + "\n", None, ""),
}  # fmt: skip
PAIR = {"type": "object", "properties": {"r": {"type": "array", "items": [{"type": "number"}]}}}
TOOLS = [
    *(tool(name, outputSchema=output) for name, (_, _, output, _) in ANSWERS.items()),
    tool("tuple", inputSchema=PAIR),
    tool("no_schema", inputSchema=None),
    tool("wrong_schema", inputSchema={"properties": {"a": {"type": "int"}}}),
    tool("wrong_hints", annotations={"readOnlyHint": "yes"}, execution=5, title=7, icons="none"),
    tool("surrogate", description="half \ud83d of one"),
    tool("as_task", execution={"taskSupport": "required"}),
    tool("not_an_answer"),
    5,
    {"description": "without a name"},
]  # fmt: skip


class Foreign:
    def __init__(self, folder: Path, **more: str) -> None:
        for parent in [folder, *folder.parents][:4]:
            parent.chmod(0o755)
        self.folder = folder
        self.config = "".join(self.table(name, says) for name, says in more.items())
        self.daemon = Daemon(folder, TINY, self.config)

    def table(self, name: str, more: str) -> str:
        command = [
            "/usr/bin/python3",
            str(SERVER),
            str(self.folder / f"{name}.json"),
            str(self.folder / "here" / name),
        ]
        paths = f"read = {json.dumps([str(SERVER.parent), str(self.folder)])}\n"
        paths += f"write = {json.dumps([str(self.folder / 'here')])}\n"
        return f"[mcp.{name}]\ncommand = {json.dumps(command)}\n{paths}{more}"

    def says(self, name: str, **what: Any) -> None:
        (self.folder / f"{name}.json").write_text(json.dumps(what))
        (self.folder / "here").mkdir(exist_ok=True)
        (self.folder / "here").chmod(0o1777)

    def sessions(self, name: str) -> int:
        return len(list((self.folder / "here").glob(f"{name}.*")))

    def tools(self) -> set[str]:
        return set(os.listdir(self.daemon.root / "tools"))

    def call(self, name: str) -> str:
        done = self.daemon.sh(f"exec 3<>tools/{name}/call; echo '{{}}' >&3 && cat <&3")
        return done.stdout + done.stderr

    def info(self, name: str) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self.daemon.read(f"tools/{name}/info"))
        return facts


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foreign]:
    foreign = Foreign(tmp_path_factory.mktemp("foreign"), f="timeout_s = 20\n")
    answers = {name: answer for name, (answer, *_) in ANSWERS.items()}
    answers["not_an_answer"] = '{"jsonrpc": "2.0", "id": @ID, "result": 5}'
    mistaken = {"capabilities": {"tools": {"listChanged": "yes"}, "more": 5}, "serverInfo": {"name": 5}}
    foreign.says("f", tools=TOOLS, answers=answers, hello=["Starting server v1.0 ..."], initialize=mistaken)
    foreign.daemon.start()
    wait_until(lambda: "f.plain" in foreign.tools(), "the tools")
    foreign.daemon.sh("mkdir agents/root")
    yield foreign
    assert foreign.daemon.stop() == 0
    foreign.daemon.clean()


@pytest.mark.parametrize("name", ANSWERS)
def test_the_text_of_a_result_is_kept_whatever_else_is_wrong_with_it(foreign: Foreign, name: str) -> None:
    _, printed, _, noted = ANSWERS[name]
    assert foreign.call(f"f.{name}") == printed
    notes = foreign.info(f"f.{name}").get("notes", [])
    assert noted in " ".join(notes)
    assert bool(notes) == bool(noted)


def test_one_wrong_tool_takes_no_other_from_the_list(foreign: Foreign) -> None:
    right = {f"f.{one['name']}" for one in TOOLS if isinstance(one, dict) and "name" in one} - {"f.as_task"}
    assert {name for name in foreign.tools() if name.startswith("f.")} == right
    assert foreign.info("f.wrong_hints")["irreversible"] is True  # who says nothing right of it is the worst
    assert foreign.call("f.wrong_schema") == "ok\n"
    assert "'int'" in foreign.info("f.wrong_schema")["notes"][0]
    log = foreign.daemon.log.read_text()
    assert "f.as_task runs only as a task" in log
    assert "it has no name" in log


def test_an_answer_that_is_none_fails_its_call_at_once(foreign: Foreign) -> None:
    foreign.daemon.sh(
        """echo '{"name": "f.not_an_answer"}' > agents/root/syscall/tool; cat agents/root/syscall/tool"""
    )
    assert "not in the form of MCP" in foreign.daemon.read("agents/root/requests/latest/error")


def test_a_server_that_says_after_each_start_that_it_changed_is_not_listed_for_ever(tmp_path: Path) -> None:
    foreign = Foreign(tmp_path, chatty="")
    foreign.says("chatty", tools=[tool("one")], answers={}, after=[CHANGED])
    try:
        foreign.daemon.start(ready=False)
        wait_until(lambda: "chatty.one" in foreign.tools(), "the tools")
        assert foreign.sessions("chatty") == 1
        assert foreign.call("chatty.one") == "ok\n"  # another session, which says it too
        wait_until(lambda: foreign.sessions("chatty") == 3, "it to be asked again, once", 20)
        wait_until(lambda: foreign.daemon.log.read_text().count("chatty has 1 tools") == 2, "its answer")
        assert foreign.sessions("chatty") == 3
    finally:
        foreign.daemon.clean()


def test_a_server_that_does_not_start_is_told_with_what_it_said(tmp_path: Path) -> None:
    foreign = Foreign(tmp_path, deaf="start_s = 5\n", dies="")
    foreign.says(
        "deaf", stderr="fetching packages\nstill fetching\n", deaf=True, hello=["npm warn: not JSON"]
    )
    (tmp_path / "dies.json").write_text("{")
    try:
        foreign.daemon.start(ready=False)
        wait_until(lambda: "raise start_s in [mcp.deaf]" in foreign.daemon.log.read_text(), "the failure")
        said = next(l for l in foreign.daemon.log.read_text().splitlines() if "raise start_s" in l)
        assert "it was not ready within 5 s" in said
        assert "fetching packages" in said
        assert "still fetching" in said
        wait_until(lambda: "JSONDecodeError" in foreign.daemon.log.read_text(), "the other failure")
    finally:
        foreign.daemon.clean()


def test_nothing_of_the_daemons_own_environment_is_the_servers(tmp_path: Path) -> None:
    foreign = Foreign(tmp_path)
    program = tmp_path / "environment.py"
    answer = '{"content": [{"type": "text", "text": json.dumps(dict(os.environ))}]}'
    text = SERVER.read_text()
    program.write_text(
        text.replace('return SAYS["answers"].get(params["name"], ', "return (").replace(
            '{"content": [{"type": "text", "text": "ok"}]})', answer + ")"
        )
    )
    foreign.says("e", tools=[tool("environment")], answers={})
    config = foreign.table("e", 'env = {KEY = "value"}\n').replace(str(SERVER), str(program))
    (tmp_path / "aiosd.toml").write_text(config)
    try:
        foreign.daemon.start(ready=False)
        wait_until(lambda: "e.environment" in foreign.tools(), "the tools")
        found = json.loads(foreign.call("e.environment"))
        assert found.keys() - {"PWD", "SHLVL", "_", "LC_CTYPE"} == {"PATH", "HOME", "LANG", "AIOS", "KEY"}
    finally:
        foreign.daemon.clean()
