"""Completion of aiosctl: each shell offers the parser's commands and options, and the names of a real
tree."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiosd.cli import aiosctl
from tests.running import REPOSITORY, Daemon, needs, wait_until

COMPLETIONS = REPOSITORY / "completions"
BASH = """
source "$1/aiosctl.bash"
while IFS= read -r line; do
    read -ra COMP_WORDS <<<"$line"
    if [[ $line == *' ' ]]; then COMP_WORDS+=(''); fi
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
    _aiosctl
    printf '%s\\n' "${COMPREPLY[@]}" ''
done
"""
FISH = """
source $argv[1]/aiosctl.fish
while read -l line
    complete -C "$line" | string replace -r '\\t.*' ''
    echo
end
"""
SHELLS = {
    "bash": ["bash", "-c", BASH, "bash"],
    "zsh": ["zsh", "-f", str(Path(__file__).with_name("complete.zsh"))],
    "fish": ["fish", "--no-config", "-c", FISH],
}


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> str:
    needs(request.param)
    return str(request.param)


def offered(shell: str, lines: list[str], aios: str, programs: Path) -> list[set[str]]:
    """What the shell offers at the end of each line."""
    program = programs / "aiosctl"
    module = "aiosd.cli.aiosctl"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} -P -m {module} "$@"\n')
    program.chmod(0o755)
    env = {**os.environ, "AIOS": aios, "PATH": f"{programs}:{os.environ['PATH']}", "TERM": "xterm"}
    done = subprocess.run(
        [*SHELLS[shell], str(COMPLETIONS)], input="".join(f"{line}\n" for line in lines),
        stdout=subprocess.PIPE, cwd=programs, env=env, text=True, timeout=60, check=True,
    )  # fmt: skip
    answers = blocks(done.stdout)
    assert len(answers) == len(lines)
    return answers


def blocks(text: str) -> list[set[str]]:
    """Split the output at empty lines, one part for each completed line."""
    found: list[set[str]] = [set()]
    for line in text.splitlines():
        if line:
            found[-1].add(line)
        else:
            found.append(set())
    return found[:-1]


def parsers(parser: argparse.ArgumentParser, path: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield path, parser
    for verb, below in subcommands(parser).items():
        yield from parsers(below, f"{path}{verb} ")


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(groups[0].choices) if groups else {}


def test_each_shell_offers_the_commands_and_options_of_the_parser(shell: str, tmp_path: Path) -> None:
    expected = {}
    for path, parser in parsers(aiosctl.arguments()):
        expected[f"aiosctl {path}-"] = {name for a in parser._actions for name in a.option_strings}
        if verbs := subcommands(parser):
            expected[f"aiosctl {path}"] = set(verbs)
    assert "aiosctl access allow -" in expected
    lines = list(expected)
    assert dict(zip(lines, offered(shell, lines, "/nonexistent", tmp_path), strict=True)) == expected


@pytest.mark.mount
def test_each_shell_offers_the_names_of_the_tree(
    shell: str, aios: Daemon, agent: str, tmp_path: Path
) -> None:
    name = agent.removeprefix("agents/")
    aios.write(f"{agent}/ctl", "pause")
    aios.write(f"{agent}/syscall/llm", "Hello")
    aios.write("tools/shell/call", '{"command": "true"}')
    wait_until(lambda: bool(os.listdir(aios.root / "access/pending")), "a call that waits")
    (asked,) = os.listdir(aios.root / "access/pending")
    request = os.readlink(aios.root / agent / "requests/latest")
    folder = tmp_path / "somewhere"
    folder.mkdir()
    expected = {
        "aiosctl ask ": name, "aiosctl log ": name, f"aiosctl log {name[:3]}": name,
        "aiosctl cancel ": request, "aiosctl policy ": "fair", "aiosctl ask -m ": "tiny",
        "aiosctl run ": "tiny",
        "aiosctl mcp serve --agent ": name, "aiosctl model unload ": "tiny",
        "aiosctl access allow ": asked, "aiosctl access deny ": asked,
        f"aiosctl --mount {aios.root} -v log ": name, "aiosctl model add ": "somewhere",
    }  # fmt: skip
    found = dict(zip(expected, offered(shell, list(expected), str(aios.root), tmp_path), strict=True))
    aios.write(f"access/pending/{asked}/decision", "deny")
    for line, word in expected.items():
        assert word in {one.rstrip("/") for one in found[line]}, line
    assert found["aiosctl policy "] == set(aios.read("scheduler/policies").split())
