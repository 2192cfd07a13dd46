"""The linters as tests: ruff, mypy --strict, shellcheck, and further rules."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHELL_SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [
        ROOT / "setup",
        ROOT / ".ci/run",
        ROOT / "tests/run",
        *ROOT.glob("examples/**/*"),
        *ROOT.glob("debian/*"),
    ]
    if path.is_file() and re.match(rb"#!.*\b(sh|bash)\b", path.read_bytes().splitlines()[0] or b"")
)
PROGRAMS = [  # programs of the tools, whose names lack .py
    (path.parent / path.parent.name).relative_to(ROOT).as_posix()
    for path in sorted(ROOT.glob("aiosd/tools/toolbox/*/tool.toml"))
]


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, "\n" + done.stdout


def run_tool(*command: str) -> None:
    run(sys.executable, "-m", *command)


def test_ruff_finds_nothing() -> None:
    run_tool("ruff", "check", ".")


def test_imports_run_downward() -> None:
    run(f"{Path(sys.executable).parent}/lint-imports", "--no-cache")


def test_code_is_formatted() -> None:
    run_tool("ruff", "format", "--check", ".")


def test_the_package_is_typed_strictly() -> None:
    run_tool("mypy", "-p", "aiosd")


@pytest.mark.parametrize("folder", ["tests", "examples", "bench"])
def test_what_is_beside_the_package_is_typed_strictly(folder: str) -> None:
    run_tool("mypy", folder)


def test_the_programs_of_the_tools_are_linted_and_typed_strictly() -> None:
    assert PROGRAMS
    command = [sys.executable, "-m", "ruff", "check", "--show-files"]
    linted = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    assert {str(ROOT / program) for program in PROGRAMS} <= set(linted)
    run_tool("mypy", "--scripts-are-modules", *PROGRAMS)


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_shellcheck_finds_nothing(script: str) -> None:
    run(f"{Path(sys.executable).parent}/shellcheck", script)


def test_examples_are_executable() -> None:
    for script in ROOT.glob("examples/*"):
        if script.is_file() and script.suffix != ".md":
            assert script.stat().st_mode & 0o100, script


def test_git_links_make_one_package() -> None:
    for name in ("fs", "policies"):
        link = ROOT / "aiosd" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


LINES_MOST, CLASS_LINES_MOST, METHODS_MOST = 400, 300, 25


def test_what_is_large_says_why() -> None:
    """A long module, or a class with many methods, has a sentence that begins with "Large:" in its
    docstring.
    """
    silent = []
    for file in sorted(ROOT.glob("aiosd/**/*.py")) + sorted(ROOT.glob("fs/*.py")):
        text = file.read_text()
        tree = ast.parse(text)
        about = ast.get_docstring(tree) or ""
        large = text.count("\n") > LINES_MOST
        for one in tree.body:
            if isinstance(one, ast.ClassDef):
                methods = sum(isinstance(part, ast.FunctionDef) for part in one.body)
                long = (one.end_lineno or 0) - one.lineno > CLASS_LINES_MOST
                large = large or methods > METHODS_MOST or long
                about += ast.get_docstring(one) or ""
        if large and "Large:" not in about:
            silent.append(file.relative_to(ROOT).as_posix())
    assert not silent


def test_no_two_classes_have_one_name() -> None:
    homes: dict[str, list[str]] = {}
    for file in (
        sorted(ROOT.glob("aiosd/**/*.py")) + sorted(ROOT.glob("fs/*.py")) + sorted(ROOT.glob("policies/*.py"))
    ):
        for one in ast.parse(file.read_text()).body:
            if isinstance(one, ast.ClassDef):
                homes.setdefault(one.name, []).append(file.relative_to(ROOT).as_posix())
    assert not {name: files for name, files in homes.items() if len(files) > 1}
