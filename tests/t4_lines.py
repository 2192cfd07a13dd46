"""Reading line by line from files that block, by every program that scripts do it with: nothing is lost, and
nothing comes twice. Some read a byte at a time, some read ahead and seek back to the end of their line."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import Daemon, wait_until
from tests.t5_events import opened

pytestmark = [pytest.mark.mount]
LINES = ["one", "zwei ü", "x" * 5000, "four", "😀"]
ANSWER = "".join(f"{line}\n" for line in LINES)
WHILE = 'while read -r l <&3; do echo "$l"; done'
PYTHON = f"{sys.executable} -c 'import sys; [print(l, end=\"\", flush=True) for l in sys.stdin]' <&3"
SHELLS = ("bash", "dash", "zsh", "ksh", "mksh", "busybox")
OPENINGS = {
    "private": 'exec 3<>lines/call; echo "{}" >&3',
    "newest": 'echo "{}" > lines/call; exec 3<lines/call',
    "again": 'exec 3<>lines/call; echo "{}" >&3; while read -r l <&3; do :; done; echo "{}" >&3',
}
READERS = {  # each prints the answer
    **{shell: (shell, WHILE) for shell in SHELLS},
    **{f"{shell}-t": (shell, WHILE.replace("-r", "-t 9 -r")) for shell in ("bash", "zsh", "ksh", "busybox")},
    "to-the-end": ("bash", """IFS= read -r -d '' l <&3; printf %s "$l" """),
    "to-a-letter": ("bash", 'while IFS= read -r -d e l <&3; do printf %se "$l"; done; printf %s "$l"'),
    "two-at-a-time": ("bash", 'while IFS= read -r -N 2 l <&3; do printf %s "$l"; done; printf %s "$l"'),
    "mapfile": ("bash", "mapfile l <&3; printf %s \"${l[@]}\""),
    "mapfile-in-parts": ("bash", 'for i in 1 2 3; do mapfile -n 2 l <&3; printf %s "${l[@]}"; done'),
    "read-then-cat": ("bash", 'read -r l <&3; echo "$l"; cat <&3'),
    "head": ("bash", "head -1 <&3; head -2 <&3; cat <&3"),
    "sed": ("bash", "sed q <&3; sed q <&3; cat <&3"),
    "grep": ("bash", "grep -m1 . <&3; cat <&3"),
    "mawk": ("bash", "mawk 1 <&3"),
    "gawk": ("bash", "gawk 1 <&3"),
    "perl": ("bash", "perl -ne print <&3"),
    "python": ("bash", PYTHON),
    "dd": ("bash", "dd bs=3 status=none <&3"),
    "tail": ("bash", "tail -n +1 <&3"),
}  # fmt: skip


@pytest.fixture(scope="module")
def lines(aios: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tool that prints them, in two parts; the folder it is in."""
    folder = aios.root / "tools/lines"
    folder.mkdir()
    (folder / "manifest").write_text(
        'description = "x"\ncommand = ["./program"]\n[parameters]\ntype = "object"\n'
    )
    first, second = ANSWER[:20], ANSWER[20:]
    (folder / "program").write_text(f"#!/bin/sh\nprintf '{first}'\nsleep 0.05\nprintf '{second}'\n")
    yield folder.parent
    folder.rmdir()


def need(*programs: str) -> None:
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed: .ci/run installs it")


def run(shell: str, script: str, folder: Path) -> str:
    command = ["busybox", "sh"] if shell == "busybox" else [shell]
    env = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run([*command, "-c", script], cwd=folder, env=env, capture_output=True, timeout=30)
    assert done.stderr == b""
    return done.stdout.decode()


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("reader", READERS)
def test_a_script_gets_every_line_of_an_answer(lines: Path, reader: str, opening: str) -> None:
    shell, script = READERS[reader]
    need(shell, *({reader} & {"mawk", "gawk"}))
    assert run(shell, f"{OPENINGS[opening]}; {script}", lines) == ANSWER


@pytest.mark.parametrize("mode", ["r+", "w+", "a+"])
@pytest.mark.parametrize("seek", ["", "f.seek(0); "])
def test_python_reads_what_it_asked_for(lines: Path, mode: str, seek: str) -> None:
    script = f"f = open('lines/call', '{mode}'); f.write('{{}}'); f.flush(); {seek}print(''.join(f), end='')"
    assert run("bash", f'{sys.executable} -c "{script}"', lines) == ANSWER


def test_perl_reads_what_it_asked_for(lines: Path) -> None:
    script = 'open(my $f, "+<", "lines/call"); syswrite($f, "{}"); while (<$f>) { print }'
    assert run("bash", f"perl -e '{script}'", lines) == ANSWER


def test_the_chunks_of_a_stream_come_one_by_one(aios: Daemon, agent: str) -> None:
    request = '{"prompt": "Repeat: mango plum fig", "stream": true}'
    asked = f"exec 3<>{agent}/syscall/llm; echo '{request}' >&3"
    chunks = list(map(json.loads, run("bash", f"{asked}; {WHILE}", aios.root).splitlines()))
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert said == "mango plum fig"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


EVENTS = {
    **{shell: (shell, WHILE) for shell in SHELLS},
    "slow": ("bash", 'while read -r l <&3; do echo "$l"; sleep 0.02; done'),
    "head": ("bash", "while head -1 <&3; do :; done"),
    "sed": ("bash", "while sed -n '1p;1q' <&3; do :; done"),
    "python": ("bash", f"exec {PYTHON}"),
    "perl": ("bash", "exec perl -ne '$| = 1; print' <&3"),
    "gawk": ("bash", "exec gawk '{ print; fflush() }' <&3"),
    "mapfile": ("bash", 'while mapfile -n 1 l <&3; do printf %s "${l[@]}"; done'),
}  # fmt: skip


@pytest.mark.parametrize("reader", EVENTS)
def test_a_script_gets_every_event(aios: Daemon, reader: str) -> None:
    shell, script = EVENTS[reader]
    need(shell, *({reader} & {"gawk"}))
    command = ["busybox", "sh"] if shell == "busybox" else [shell]
    names = [f"lines-{reader}-{i}" for i in range(12)]
    with subprocess.Popen(
        [*command, "-c", f"exec 3<events.jsonl; {script}"], cwd=aios.root, stdout=subprocess.PIPE, bufsize=0,
        start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout
        wait_until(lambda: opened(process.pid, "/events.jsonl"), "the reader")
        try:
            for name in names:
                (aios.root / "agents" / name).mkdir()
            found = list(read_lines(process.stdout.fileno(), len(names)))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    for name in names:
        (aios.root / "agents" / name).rmdir()
    assert [(event["agent"], event["state"]) for event in map(json.loads, found)] == [
        (n, "made") for n in names
    ]


def read_lines(fd: int, count: int, limit_s: float = 5) -> Iterator[str]:
    data = b""
    while data.count(b"\n") < count:
        assert select.select([fd], [], [], limit_s)[0], data
        data += os.read(fd, 65536)
    yield from data.decode().splitlines()
