"""Run the examples of the man pages as printed, with the tree of a real daemon at /aios.

Each page has one shell for all its examples, in the order of the page, as a reader would type them. The shell
is in a mount namespace of its own, where the daemon's mount is bound at /aios.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.manual import PAGES, Block, blocks, source
from tests.running import REPOSITORY, Daemon

pytestmark = [pytest.mark.mount, pytest.mark.root]
LIMIT_S = 60
MARK = "@@ended@@"
TROUBLE = re.compile(r"^(bash|sh|cat|cc|cp|python3|Traceback|aiosctl|aiosd)\b.*: ", re.MULTILINE)
PROGRAM = re.compile(r"\*(\w+\.(?:c|py))\*:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Example:
    """One command, perhaps of several lines, and its output. `...` stands for any text."""

    place: str
    command: str
    expected: str = ""


def examples(block: Block) -> Iterator[Example]:
    """Parse `$ command`, or `# command` for root, its further lines after `> `, and then the output."""
    now = None
    for number, line in enumerate(block.text.splitlines(), block.line):
        if line.startswith(("$ ", "# ")):
            if now:
                yield now
            now = Example(f"man/{block.page}.md:{number}", line[2:])
        elif now and not now.expected and (line.startswith("> ") or line == ">"):
            now.command += "\n" + line[2:]
        else:
            assert now, f"{block.place}: no command before {line!r}"
            now.expected += line + "\n"
    if now:
        yield now


def fits(expected: str, printed: str) -> bool:
    if TROUBLE.search(printed) and not TROUBLE.search(expected):
        return False  # which `...` does not stand for
    pattern = ".*".join(map(re.escape, expected.rstrip("\n").split("...")))
    return re.fullmatch(pattern, printed.strip("\n"), re.DOTALL) is not None


@pytest.fixture(scope="module")
def shell(aios: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The command that starts bash with the tree at /aios and the checkout's programs."""
    folder = tmp_path_factory.mktemp("programs")
    for name, module in {"aiosd": "aiosd", "aiosctl": "aiosd.cli.aiosctl"}.items():
        program = folder / name
        program.write_text(f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} -P -m {module} "$@"\n')
        program.chmod(0o755)
    place = Path("/aios")
    made = not place.exists()
    place.mkdir(exist_ok=True)
    enter = f"mount --bind '{aios.root}' /aios && PATH={folder}:$PATH exec bash script"
    yield ["unshare", "--mount", "--propagation", "private", "sh", "-c", enter]
    if made:
        place.rmdir()


@pytest.fixture
def restored(aios: Daemon) -> Iterator[None]:
    """Undo all that the examples of a page made or set."""
    values = {name: aios.read(name) for name in ("scheduler/policy", "scheduler/quantum")}
    folders = [aios.root / name for name in ("agents", "contexts", "tools", "access/groups", "models")]
    before = {path for folder in folders for path in folder.iterdir()}
    aios.write("scheduler/policy", "fair")  # the pages assume this policy
    yield
    for path in {path for folder in folders for path in folder.iterdir()} - before:
        path.rmdir()
    for name, value in values.items():
        aios.write(name, value)


APART = ("aios-operations.7", "aios-gateway.8")  # have tests of their own


@pytest.mark.parametrize("page", [page for page in PAGES if page not in APART])
@pytest.mark.usefixtures("restored")
def test_the_examples_of_a_page_do_what_it_says(page: str, shell: list[str], tmp_path: Path) -> None:
    wanted = [example for block in blocks(page, "sh") for example in examples(block)]
    assert wanted, "a page has examples that can be run"
    (tmp_path / "home").mkdir()
    for name, program in PROGRAM.findall(source(page)):
        (tmp_path / "home" / name).write_text(program)
    script = "".join(f"{example.command}\necho; echo {MARK}\n" for example in wanted)
    printed = run(shell, script, tmp_path).split(f"\n{MARK}\n")
    wrong = [
        f"{example.place}: {example.command}\n{got}"
        for example, got in zip(wanted, printed, strict=False)
        if not fits(example.expected, got)
    ]
    assert not wrong, "\n".join(wrong)
    assert len(printed) == len(wanted) + 1


@pytest.mark.usefixtures("restored")
def test_the_example_of_the_readme_is_true(shell: list[str], tmp_path: Path) -> None:
    page = (REPOSITORY / "README.md").read_text()
    lines = [line[4:] for line in page[: page.index("## Try it")].splitlines() if line.startswith("    ")]
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "...", "\n".join(lines))
    wanted = list(examples(Block("README", 0, "sh", text)))
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("Hello, my name is Ada")
    script = "".join(f"{example.command}\necho; echo {MARK}\n" for example in wanted)
    printed = run(shell, script, tmp_path).split(f"\n{MARK}\n")
    assert len(printed) == len(wanted) + 1
    for example, got in zip(wanted, printed, strict=False):
        assert fits(example.expected or "...", got), f"{example.command}\n{got}"
    assert (tmp_path / "home/chat.kv").stat().st_size > 0


def run(shell: list[str], script: str, folder: Path) -> str:
    """The output of the script, with errors as an interactive bash prints them."""
    (folder / "script").write_text(f"cd home\n{script}")
    environment = {**os.environ, "HOME": f"{folder}/home", "AIOS": "/aios", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        shell, cwd=folder, env=environment, text=True, timeout=LIMIT_S,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return re.sub(r"^script: line \d+: ", "bash: ", done.stdout, flags=re.MULTILINE)
