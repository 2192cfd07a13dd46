"""agent.toml: its keys, the errors for a wrong file, and aios-agent(5)."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from aiosd.config import packages
from aiosd.errors import ConfigError
from tests.running import REPOSITORY

PAGE = (REPOSITORY / "man" / "aios-agent.5.md").read_text()
PLAIN = 'description = "Does it"\ncommand = ["sh", "./run", "x"]\n'


def folder(tmp_path: Path, text: str, name: str = "ada") -> Path:
    made = tmp_path / name
    made.mkdir(parents=True)
    (made / packages.FILE).write_text(text)
    return made


def wrong(path: Path, trusted: bool = False) -> str:
    with pytest.raises(ConfigError) as error:
        packages.read(path, trusted)
    return error.value.explanation


def test_the_keys_become_the_agents_settings(tmp_path: Path) -> None:
    text = PLAIN + 'model = "tiny"\ncontext = "chat"\nsystem = "Be\\nbrief"\ntools = ["calc", "clock"]\n'
    text += "max_steps = 3\nnice = -1\n[params]\ntemperature = 0.5\n"
    found = packages.read(folder(tmp_path, text))
    assert (found.name, found.description) == ("ada", "Does it")
    assert found.command == ("sh", f"{tmp_path}/ada/run", "x")
    assert found.settings == {
        "model": "tiny", "context": "chat", "system": "Be\nbrief", "tools": "calc clock", "max_steps": "3",
        "nice": "-1", "params.json": '{"temperature": 0.5}',
    }  # fmt: skip
    assert found.lines["nice"] == f"{tmp_path}/ada/agent.toml:8"
    assert packages.read(folder(tmp_path, PLAIN, "bob")).settings == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"agent.toml: 'description' is a required property"),
        (PLAIN + "\nmodell = 'x'\n", r"agent.toml:4: unknown key 'modell'; keys are description, command, "),
        (PLAIN + "[unit]\n", r"agent.toml:3: unknown key 'unit'"),
        (PLAIN + "nice = 20\n", r"agent.toml:3: nice: 20 is greater than the maximum of 19"),
        (PLAIN + "nice = true\n", r"agent.toml:3: nice: True is not of type 'integer'"),
        (PLAIN + "context = '../chat'\n", r"agent.toml:3: context: "),
        (PLAIN + "tools = 'calc'\n", r"agent.toml:3: tools: 'calc' is not of type 'array'"),
        (PLAIN + "[params]\nseed = 2026-11-22\n", r"agent.toml: params: "),
        (PLAIN + "[params]\ntop_p = nan\n", r"agent.toml: "),
        ("description = 'x'\ncommand = []\n", r"agent.toml:2: command: "),
        ("description = 'x'\ncommand = ['./run']\n", r"agent.toml:2: /.*/ada/run is not .*; chmod \+x "),
        ("description = 'x'\ncommand = ['no-such-program']\n", r"agent.toml:2: no-such-program is not an"),
        ("description = \n", r"agent.toml: .*line 1"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_file_and_line(tmp_path: Path, text: str, said: str) -> None:
    assert re.search(said, wrong(folder(tmp_path, text)))


@pytest.mark.parametrize("name", ["a" * 21, "a.b", "-a", "ä"])
def test_a_name_has_to_fit_that_of_its_user(tmp_path: Path, name: str) -> None:
    assert "its name must be 1 to 20 of" in wrong(folder(tmp_path, PLAIN, name))
    longest = "aios-agent-" + "a" * 20
    assert len(longest) == 31, "what systemd takes as the name of a dynamic user"
    assert "User=aios-agent-%i\n" in (REPOSITORY / "units/aios-agent@.service").read_text()


def test_the_first_package_of_a_name_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "FOLDERS", (tmp_path / "etc", tmp_path / "none", tmp_path / "lib"))
    folder(tmp_path / "lib", PLAIN)
    assert packages.find("ada").folder == tmp_path / "lib/ada"
    folder(tmp_path / "etc", PLAIN)
    assert packages.find("ada").folder == tmp_path / "etc/ada"
    folder(tmp_path / "lib", PLAIN, "bob")
    assert list(packages.names()) == [("ada", tmp_path / "etc/ada"), ("bob", tmp_path / "lib/bob")]
    for name in ("eve", ".", ".."):
        with pytest.raises(ConfigError, match="no packaged agent"):
            packages.find(name)


def test_a_system_package_that_others_can_write_is_refused(tmp_path: Path) -> None:
    ada = folder(tmp_path, "description = 'x'\ncommand = ['./run']\n")
    program = ada / "run"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert packages.read(ada, trusted=True)
    for path in (program, ada / packages.FILE, ada):
        mode = path.stat().st_mode
        path.chmod(mode | 0o022)
        assert f"{path} may be written by others; chmod go-w it" in wrong(ada, trusted=True)
        assert packages.read(ada), "one's own is one's own matter"
        path.chmod(mode)


def test_aios_agent_5_has_every_key() -> None:
    section = PAGE.partition("\n## AGENT.TOML\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\*\*(\w+)\*\* = ", section, re.MULTILINE) == list(packages.SCHEMA["properties"])


def test_the_example_of_aios_agent_5_is_valid(tmp_path: Path) -> None:
    example = PAGE.partition("\n## EXAMPLES\n")[2]
    [toml] = re.findall(r"```toml\n(.*?)```", example, re.DOTALL)
    ada = folder(tmp_path, toml)
    assert tomllib.loads((ada / packages.FILE).read_text())["params"]
    (ada / "run").write_text("#!/bin/sh\n")
    (ada / "run").chmod(0o755)
    assert packages.read(ada).settings["nice"] == "5"


def test_the_examples_are_packaged_agents() -> None:
    examples = sorted((REPOSITORY / "examples/agents").iterdir())
    assert examples
    for path in examples:
        assert packages.read(path).name == path.name
