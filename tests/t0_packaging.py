"""The lock, the environment and the wheel agree with pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import aiosd
from aiosd.config.config import Config, load

ROOT = Path(__file__).parent.parent


def locked(name: str) -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def project() -> dict[str, list[str]]:
    """Extra (or "") → its requirements."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"": table["dependencies"], **table["optional-dependencies"]}


def pinned_version(requirement: Requirement) -> Version:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", requirement
    return Version(specifier.version)


@pytest.mark.parametrize("extra", ["", "engine", "mcp", "gateway", "systemd", "dev"])
def test_the_lock_fits_the_bounds_of_the_project(extra: str) -> None:
    lock = locked("requirements.lock")
    for wanted in map(Requirement, project()[extra]):
        assert pinned_version(lock[canonicalize_name(wanted.name)]) in wanted.specifier


def test_the_environment_is_the_lock() -> None:
    for name, requirement in locked("requirements.lock").items():
        if requirement.marker is None or requirement.marker.evaluate():
            installed = Version(metadata.version(name))
            assert Version(installed.public) == pinned_version(requirement), name


def test_the_locked_packages_need_nothing_outside_the_lock() -> None:
    lock = locked("requirements.lock") | locked("requirements-cuda.lock")
    for name in locked("requirements.lock"):
        for line in metadata.requires(name) or [] if _is_installed(name) else []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert canonicalize_name(needed.name) in lock, f"{name} needs {needed}"


def test_the_packages_aiosd_toml_shows_the_defaults(tmp_path: Path) -> None:
    shown = re.sub(r"(?m)^#(?=\[?[a-z_]+(\]| = ))", "", (ROOT / "debian/aiosd.toml").read_text())
    shown = shown.partition("# With a model here")[0]
    assert shown.count("\n[") == 4
    file = tmp_path / "aiosd.toml"
    file.write_text(shown)
    assert load(file) == Config()


def test_the_package_has_the_version_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (ROOT / "debian/changelog").read_text().startswith(f"aiosd ({version})")
    assert aiosd.__version__ == version


def test_ci_calls_nothing_but_make_test() -> None:
    lines = (ROOT / ".ci/run").read_text().splitlines()
    commands = [line for line in lines if not line.startswith("#")]
    assert commands == [
        "set -euo pipefail",
        'cd "$(dirname "${BASH_SOURCE[0]}")/.."',
        "exec make test </dev/null",
    ]
    dry = ["make", "--no-print-directory", "-n", "test"]
    env = {"PATH": os.environ["PATH"]}  # without the variables of an outer make
    make = subprocess.run(dry, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    assert make.stdout.splitlines() == ["./setup --tests", "tests/run "]


PROGRAMS = [
    "sh",
    "apt-get",
    "cat",
    "cksum",
    "date",
    "dirname",
    "find",
    "grep",
    "id",
    "python3",
    "sed",
    "sort",
    "tr",
]


@pytest.fixture
def copy() -> Iterator[Path]:
    """A folder that every user can read, with the files that ./setup reads."""
    with TemporaryDirectory(prefix="aiosd-setup-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "debian").mkdir()
        for file in (
            "setup",
            "pyproject.toml",
            "debian/control",
            *(lock.name for lock in ROOT.glob("*.lock")),
        ):
            shutil.copy(ROOT / file, folder / file)
        yield folder


def test_a_user_is_told_what_the_tests_need_in_one_line(copy: Path) -> None:
    """PATH has only the programs of a minimal machine."""
    programs = copy / "programs"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).symlink_to(f"/usr/bin/{name}")
    done = subprocess.run(
        ["./setup", "--tests"],
        cwd=copy, env={"PATH": str(programs)}, user=65534 if os.geteuid() == 0 else None,
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = [line for line in done.stderr.splitlines() if "sudo" in line]
    assert {"curl", "acl", "zsh", "go-md2man", "mmdebstrap", "debhelper", "g++", "libsystemd-dev"} <= set(
        line.split()
    )
    assert line.endswith(f" && sudo apt-get build-dep -y '{copy}'")
    assert not (copy / ".venv").exists()


@pytest.mark.usefixtures("own_pip")
@pytest.mark.slow
def test_a_step_of_the_setup_that_fails_shows_the_end_of_its_log_and_a_remedy(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (copy / "requirements.lock").write_text("pip==0.0.0.1\nsetuptools==0.0.0.1\n")
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(["./setup"], cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch("==> Virtual environment with Python [0-9.]+ ... failed\n", done.stdout)
    log = copy / ".venv/setup.log"
    assert "No matching distribution found for pip==0.0.0.1" in log.read_text()
    for said in ("No matching distribution found for pip==0.0.0.1", str(log), "check the network"):
        assert said in done.stderr


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.usefixtures("own_pip")
def test_a_wheel_holds_one_package_and_no_links(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("aiosd", "fs", "policies", "models", "completions"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    wheel_command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*wheel_command, "-w", str(tmp_path), str(tree)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"aiosd/__main__.py", "aiosd/fs/tree.py", "aiosd/fs/README.txt", "aiosd/policies/fifo.py"} <= set(
        names
    )
    for source in ROOT.glob("aiosd/tools/toolbox/*/*"):
        name = source.relative_to(ROOT).as_posix()
        mode = zipfile.ZipFile(wheel).getinfo(name).external_attr >> 16
        assert mode & 0o111 == source.stat().st_mode & 0o111, name
    shared = {name.partition(".data/data/share/")[2] for name in names}
    assert {"aios/models/tiny/model.safetensors", "bash-completion/completions/aiosctl.bash"} <= shared
    assert {name.split("/")[0].split("-")[0] for name in names} == {"aiosd"}
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    text = zipfile.ZipFile(wheel).read(entry_points).decode()
    assert "aiosd = aiosd.__main__:main" in text
    assert "aiosctl = aiosd.cli.aiosctl:main" in text
