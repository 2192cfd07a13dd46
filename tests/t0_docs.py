"""All that man/ and docs/ name exists, and all that exists is in them."""

from __future__ import annotations

import argparse
import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, cast

import pytest

from aiosd import __main__ as daemon
from aiosd.access.caller import Caller
from aiosd.access.keys import Key
from aiosd.cli import aiosctl
from aiosd.config.config import Config, DaemonConfig, ModelConfig
from aiosd.config.mcp import Server
from aiosd.cores.pool import Worker
from aiosd.fs import layout
from aiosd.fs.access import Owners
from aiosd.fs.files import AnswerFile, Control, File, Lines, Stored, Stream, Text, TextForUser, Value
from aiosd.fs.keys import Exchange
from aiosd.fs.kvfile import KvFile
from aiosd.fs.reason import Reason
from aiosd.fs.tools import Part
from aiosd.fs.transaction import Transaction
from aiosd.fs.tree import Folder, Link, Node
from aiosd.handlers.tool.handler import ToolHandler
from aiosd.kernel import Kernel
from aiosd.syscall import chat, response
from aiosd.syscall.request import Request, State
from aiosd.syscall.toolcall import outcome
from aiosd.tools.mcp.offered import manifests
from tests.manual import plain, source, terms

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MARKDOWN = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
CODE_NAME = re.compile(r"`(aiosd(?:\.\w+)+)`")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


# aiosd.toml(5)


def default(field: Field[Any]) -> object:
    found = "(required)" if field.default is MISSING else field.default
    return list(found) if isinstance(found, tuple) else found


def test_aiosd_toml_5_has_every_key_and_its_default() -> None:
    documented = {}
    for section, term in terms("aiosd.toml.5"):
        key, _, value = term.partition(" ")
        documented[section, key] = tomllib.loads(term)[key] if value.startswith("=") else value
    config = Config()
    sections: dict[str, Any] = {f"[{f.name}]": getattr(config, f.name) for f in fields(Config)}
    del (
        sections["[models]"],
        sections["[quotas]"],
        sections["[mcp]"],
    )  # the tables of the latter have the keys of [quota]
    expected = {(s, f.name): getattr(now, f.name) for s, now in sections.items() for f in fields(now)}
    expected["[tools]", "system_users"] = list(config.tools.system_users)
    expected |= {("[models.NAME]", f.name): default(f) for f in fields(ModelConfig)}
    words = {"command": "(this or url)", "url": "(this or command)", "env": {}}
    words |= {"irreversible": "(as the server says)", "headers": {}}
    keys = {f.name: words.get(f.name, default(f)) for f in fields(Server) if f.name != "name"}
    expected |= {("[mcp.NAME]", key): value for key, value in keys.items()}
    assert documented == expected


# commands


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {name for action in parser._actions for name in action.option_strings}


def commands(parser: argparse.ArgumentParser, before: str = "") -> dict[str, argparse.ArgumentParser]:
    """The commands that can be run."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        return {before.strip(): parser}
    itself = {} if groups[0].required else {before.strip(): parser}
    return itself | {
        name: leaf
        for verb, below in groups[0].choices.items()
        for name, leaf in commands(below, f"{before}{verb} ").items()
    }


def test_aiosctl_1_has_every_command_and_option() -> None:
    documented = {re.split(r" [A-Z\[]", term)[0] for _, term in terms("aiosctl.1", "COMMANDS")}
    leaves = commands(aiosctl.arguments())
    assert documented == set(leaves)
    text = plain(source("aiosctl.1"))
    for parser in (aiosctl.arguments(), *leaves.values()):
        for option in options(parser):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), option


def test_aiosd_8_has_every_option() -> None:
    documented = {word for _, term in terms("aiosd.8", "OPTIONS") for word in re.findall(r"--?[a-z]+", term)}
    assert documented == options(daemon.arguments())


@pytest.mark.parametrize("file", ["aiosctl.bash", "_aiosctl", "aiosctl.fish"])
def test_a_completion_knows_every_command(file: str) -> None:
    text = (ROOT / "completions" / file).read_text()
    for name in commands(aiosctl.arguments()):
        for word in name.split():
            assert re.search(rf"\b{word}\b", text), name


# aios(7)

KINDS: dict[type[Node], set[str]] = {
    Folder: {"folder"}, Link: {"link"}, Text: {"text", "table", "JSON"}, Value: {"value", "prose"},
    Stream: {"JSON lines"}, TextForUser: {"JSON lines"},
    Control: {"ctl"}, Lines: {"JSON lines"}, AnswerFile: {"answer"}, Reason: {"text"},
    Transaction: {"transaction"}, Exchange: {"transaction"}, Stored: {"JSON lines"},
    KvFile: {"file"},
    Part: {"file"},
    Owners: {"value"},
}  # fmt: skip


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    """A kernel with one object of each kind, not started. The group root exists everywhere."""
    kernel = Kernel(
        Config(daemon=DaemonConfig(state=str(tmp_path), group="root", admin_group="root")), tmp_path / "NAME"
    )
    caller = Caller(0, 0, 1)
    kernel.agent_objects.add("NAME", caller)
    kernel.context_objects.add("NAME", caller)
    kernel.tool_objects.add("NAME", caller)
    kernel.trust_objects.add_group("NAME", caller)
    kernel.keys.add(Key(kernel.keys.new()[0], "", 0, "root", "", 0))
    asked = chat.parse(b"Who are you?", chat.Defaults("NAME"))
    agent_id = kernel.agents.get("NAME").id
    asked = chat.looping(asked, 1)  # a loop that is also a step, so that the names of both exist
    kernel.store.add_request(Request(kernel.admission.new_id(), 0, "NAME", "/", asked, agent_id, parent=9))
    tool = kernel.handlers["tool"]
    assert isinstance(tool, ToolHandler)
    call = tool.call(caller, "shell", '{"command": "ls"}', 0)
    kernel.admission.admit(Request(kernel.admission.new_id(), 0, "", "/", call))
    resource = {"uri": "file:///a", "name": "NAME", "type": ""}
    kernel.tools.offer("s", manifests(Server("s", ("x",)), {"resources": [resource]})[0])
    done = Request(kernel.admission.new_id(), 0, "NAME", "/", call, agent_id)
    kernel.store.add_request(done)
    done.state, done.finished_s = State.DONE, 1.0
    outcome(done).files = ({"name": "NAME", "type": "", "data": ""},)
    response.document(done)
    kernel.store.finish_request(done, [], 10)
    workers = kernel.pool._workers
    workers[0] = Worker(0, kernel.models.get("NAME"), cast(Any, None), cast(Any, None))
    yield kernel
    workers.clear()
    kernel.stop()


def named(path: str, name: str) -> str:
    if path == "tools/":
        return "NAME"
    return re.sub(r"^(\d+|[0-9a-f]{12})$", "N" if path == "workers/" else "ID", name)


def described(path: str) -> str:
    return re.sub("^requests/ID/", "agents/NAME/requests/ID/", path)


def walk(path: str, folder: Folder) -> Iterator[tuple[str, Node]]:
    for name in folder.names():
        node = folder.child(name)
        assert node is not None
        below = path + named(path, name)
        yield below, node
        if isinstance(node, Folder):
            yield from walk(below + "/", node)


def documented_tree() -> dict[str, tuple[str, int]]:
    found = {}
    for folder, term in terms("aios.7"):
        if match := re.fullmatch(r"(\S+) \(([\w ]+), (\d{4})\)", term):
            found[folder.lstrip("/") + match[1]] = match[2], int(match[3], 8)
    return found


def test_aios_7_has_every_name_with_its_kind_and_mode(kernel: Kernel) -> None:
    root = layout.build(kernel).find("/").node
    assert isinstance(root, Folder)
    tree = {path: node for path, node in walk("", root) if Path(path).name not in ("NAME", "ID", "N")}
    documented = documented_tree()
    assert set(documented) == {described(path) for path in tree}
    for path, node in tree.items():
        kind, mode = documented[described(path)]
        assert kind in next(kinds for type_, kinds in KINDS.items() if isinstance(node, type_)), path
        assert isinstance(node, (File, Folder, Link))
        assert mode == node.mode, path


def test_a_request_that_is_not_written_yet_has_no_name_of_its_own(kernel: Kernel) -> None:
    id = kernel.admission.allocate("NAME")
    draft = layout.build(kernel).find(f"/agents/NAME/requests/{id}").node
    assert isinstance(draft, Folder)
    assert {f"agents/NAME/requests/ID/{name}" for name in draft.names()} <= set(documented_tree())


# aios-transaction(7)


def test_aios_transaction_7_has_every_key_of_a_json_request() -> None:
    documented = {
        term.split()[0]
        for section, term in terms("aios-transaction.7", "DESCRIPTION")
        if section == "JSON"
    }  # fmt: skip
    assert documented == chat.KEYS


# Markdown


def module(name: str) -> Path | None:
    path = ROOT / name.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def names_in(body: list[ast.stmt]) -> dict[str, list[ast.stmt]]:
    """All names of a module or class, nested ones too."""
    found: dict[str, list[ast.stmt]] = {}
    for one in body:
        if isinstance(one, ast.ClassDef):
            found[one.name] = one.body
        elif isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef):
            found[one.name] = []
        elif isinstance(one, ast.Assign | ast.AnnAssign):
            targets = one.targets if isinstance(one, ast.Assign) else [one.target]
            found |= {target.id: [] for target in targets if isinstance(target, ast.Name)}
    return found


def exists(name: str) -> bool:
    """Read the source instead of importing it, because aiosd.cores.engine imports torch."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        file = module(".".join(parts[:length]))
        if file is None:
            continue
        body = ast.parse(file.read_text()).body
        for part in parts[length:]:
            inside = names_in(body)
            if part not in inside:
                return False
            body = inside[part]
        return True
    return False


@pytest.mark.parametrize("file", MARKDOWN, ids=lambda path: path.name)
def test_every_function_that_is_named_exists(file: Path) -> None:
    assert not [name for name in CODE_NAME.findall(file.read_text()) if not exists(name)]


def test_the_life_of_a_syscall_names_its_functions_in_full() -> None:
    names = CODE_NAME.findall((DOCS / "life-of-a-syscall.md").read_text())
    assert len(names) > 50
    assert not exists("aiosd.scheduler.scheduler.Scheduler.no_such")
    assert not exists("aiosd.nothing.at_all")


@pytest.mark.parametrize("file", MARKDOWN, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(file: Path) -> None:
    links = [link for link in LINK.findall(file.read_text()) if "://" not in link and ":" not in link]
    assert not [link for link in links if not (file.parent / link).exists()]
