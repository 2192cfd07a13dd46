"""The man pages: built without a warning, complete, and with examples that the real loaders take."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

import aiosd
from aiosd.access import rules
from aiosd.config import config, packages
from aiosd.config.config import Config
from aiosd.tools import manifest
from tests.manual import PAGES, Block, blocks, sections, source
from tests.running import needs

ROOT = Path(__file__).parent.parent
OURS = re.compile(r"\*\*(aios[\w.-]*)\*\*\((\d)\)")
EXAMPLES = [block for page in PAGES for block in blocks(page, "toml")]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_its_header_and_its_sections(page: str) -> None:
    name, _, section = page.rpartition(".")
    title, number, date, version, _ = shlex.split(source(page).splitlines()[0])
    assert (title, number, version) == (name, section, f"aiosd {aiosd.__version__}")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", date)
    assert source(page).partition("## NAME\n\n")[2].startswith(f"{name} - ")
    assert {"NAME", "DESCRIPTION", "EXAMPLES", "SEE ALSO"} <= set(sections(page))
    assert sections(page)[0] == "NAME"
    assert sections(page)[-1] == "SEE ALSO"


@pytest.mark.parametrize("page", PAGES)
def test_every_page_that_our_pages_refer_to_exists(page: str) -> None:
    named = {f"{name}.{section}" for name, section in OURS.findall(source(page))}
    assert named
    assert named <= set(PAGES)


def test_every_page_is_built_without_a_warning(tmp_path: Path) -> None:
    needs("go-md2man")
    needs("groff")
    make = ["make", "--no-print-directory", "-s", "man", f"MANUAL={tmp_path}"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(page.name for page in tmp_path.iterdir()) == PAGES
    for page in tmp_path.iterdir():
        groff = ["groff", "-man", "-t", "-Tutf8", "-P-cbou", "-ww", str(page)]
        read = subprocess.run(groff, capture_output=True, text=True)
        assert (read.returncode, read.stderr) == (0, ""), page
        assert set(sections(page.name)) <= set(read.stdout.splitlines())
        printed = re.sub("[‐−]", "-", read.stdout)
        lost = [line for line in code(page.name) if line.strip() not in printed]
        assert not lost, page


def code(page: str) -> list[str]:
    """The lines of all fenced blocks."""
    fenced = re.findall(r"^```\w+\n(.*?)^```$", source(page), re.MULTILINE | re.DOTALL)
    assert fenced
    return "".join(fenced).splitlines()


@pytest.mark.parametrize("block", EXAMPLES, ids=lambda block: block.place)
def test_a_toml_example_fits_the_format_of_its_page(block: Block, tmp_path: Path) -> None:
    file = (
        tmp_path
        / "example"
        / {"aios-tool.5": "tool.toml", "aios-agent.5": "agent.toml"}.get(block.page, "x.toml")
    )
    file.parent.mkdir(mode=0o755)
    file.write_text(block.text)
    for program in re.findall(r"\./(\w+)", block.text):
        (file.parent / program).write_text("#!/bin/sh\n")
        (file.parent / program).chmod(0o755)
    match block.page:
        case "aios-tool.5":
            folder = file.parent.rename(tmp_path / name_of(block))
            assert manifest.read(folder / file.name).description
        case "aios-agent.5":
            assert packages.read(file.parent).description
        case "aios-access.5":
            assert list(rules.parse(file, rules.read(file)))
        case _:
            assert config.load(file) != Config()


def name_of(block: Block) -> str:
    found = re.search(r'^name = "(.*)"$', block.text, re.MULTILINE)
    assert found
    return found[1]
