"""systemd checks units/ without running them: the units are valid, and their privileges are bounded."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.running import needs

ROOT = Path(__file__).parent.parent
UNITS = ROOT / "units"
SERVICES = sorted(path.name for path in UNITS.glob("*.service"))
ALL = sorted(
    path.name for kind in ("service", "slice", "socket", "timer", "mount") for path in UNITS.glob(f"*.{kind}")
)
EXPOSURE = {  # highest allowed exposure of 10, as measured by systemd-analyze security
    "aiosd.service": 2.0,
    "aios-worker@.service": 2.0,
    "aios-agent@.service": 1.5,
    "aios-pull@.service": 1.5,
    "aios-gateway.service": 1.5,
    "aios-session@.service": 2.5,  # it becomes its user
    # It acts as root, and has no mount namespace, because all users must see the tree.
    "aios-privileged.service": 7.0,
}


def run(*command: str | Path) -> str:
    """Run a command and return its output. Fail with the output."""
    done = subprocess.run(
        [str(part) for part in command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def values(unit: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", (UNITS / unit).read_text(), re.MULTILINE)


def settings(unit: str) -> list[str]:
    return [line for line in (UNITS / unit).read_text().splitlines() if re.match(r"\w+=", line)]


@pytest.mark.parametrize("unit", ALL)
def test_systemd_finds_nothing_wrong(unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test checks a copy with /bin/true as programs, because aiosd is not installed here."""
    for name in ALL:
        text = (UNITS / name).read_text()
        (tmp_path / name).write_text(
            re.sub(r"(?m)^(Exec\w+=[-+!@:]*)/usr/(lib/aios/)?bin/\S+", r"\1/bin/true", text)
        )
    monkeypatch.setenv("SYSTEMD_UNIT_PATH", f"{tmp_path}:")  # then the system's own units
    said = run(needs("systemd-analyze"), "verify", "--man=no", tmp_path / unit)
    assert not [line for line in said.splitlines() if "aios" in line]


@pytest.mark.parametrize("unit", SERVICES)
def test_a_service_may_do_little(unit: str) -> None:
    threshold = f"--threshold={EXPOSURE[unit] * 10:.0f}"
    run(needs("systemd-analyze"), "security", "--no-pager", "--offline=true", threshold, UNITS / unit)


@pytest.mark.parametrize("unit", ALL)
def test_all_that_a_unit_names_exists(unit: str) -> None:
    pages = {path.name.removesuffix(".md") for path in (ROOT / "man").iterdir()}
    (documented,) = values(unit, "Documentation")
    for page in documented.split():
        assert re.sub(r"man:([\w.-]+)\((\d)\)", r"\1.\2", page) in pages, page
    for name in values(unit, "Slice"):
        assert (UNITS / name).exists()


@pytest.mark.parametrize("unit", ALL)
def test_a_unit_has_each_setting_once(unit: str) -> None:
    assert len(set(settings(unit))) == len(settings(unit))


def test_apparmor_accepts_the_profile() -> None:
    parser = needs("apparmor_parser")
    for profile in (UNITS / "apparmor.d").iterdir():
        run(parser, "--skip-kernel-load", "--skip-cache", profile)


@pytest.mark.root
def test_users_and_folders_are_made(tmp_path: Path) -> None:
    needs("systemd-sysusers")
    (tmp_path / "etc").mkdir()
    for kind, program in (("sysusers.d", "systemd-sysusers"), ("tmpfiles.d", "systemd-tmpfiles")):
        options = ["--create"] if kind == "tmpfiles.d" else []
        assert "aios.conf:" not in run(program, *options, f"--root={tmp_path}", UNITS / kind / "aios.conf")
    users = [line.split(":") for line in (tmp_path / "etc/passwd").read_text().splitlines()]
    assert {user[0]: user[5:] for user in users if user[0].startswith("aios")} == {
        "aios": ["/var/lib/aios", "/usr/sbin/nologin"],
        "aios-worker": ["/", "/usr/sbin/nologin"],
        "aios-pull": ["/", "/usr/sbin/nologin"],
        "aios-gateway": ["/", "/usr/sbin/nologin"],
    }
    assert "aios-admin:" in (tmp_path / "etc/group").read_text()
    assert (tmp_path / "aios").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "etc/aios/credentials").stat().st_mode & 0o777 == 0o700
    (tmp_path / "aios").chmod(0o700)
    run("systemd-tmpfiles", "--create", f"--root={tmp_path}", UNITS / "tmpfiles.d" / "aios.conf")
    assert (tmp_path / "aios").stat().st_mode & 0o777 == 0o700, "it may be the mounted tree"


@pytest.mark.parametrize("unit", ["aiosd.service", "aios-privileged.service"])
def test_a_configuration_that_cannot_be_used_is_tried_once(unit: str) -> None:
    assert values(unit, "RestartPreventExitStatus") == [str(os.EX_CONFIG)]
