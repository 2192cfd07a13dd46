"""aiosctl engine: the real pip installs a wheel made here beside the package's PyTorch."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from aiosd.cli import aiosctl, torch_install
from aiosd.host import torch_folder

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("own_pip")]


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "torch-9.9+cpu-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch/__init__.py", "__version__ = '9.9+cpu'\n")
        about = "Metadata-Version: 2.1\nName: torch\nVersion: 9.9+cpu\n"
        wheel.writestr("torch-9.9+cpu.dist-info/METADATA", about)
        wheel.writestr(
            "torch-9.9+cpu.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("torch-9.9+cpu.dist-info/RECORD", "")
    (tmp_path / "requirements.lock").write_text("torch==9.9  # via aiosd\n")
    monkeypatch.setattr(torch_install, "LOCKS", (tmp_path,))
    monkeypatch.setattr(torch_folder, "FOLDER", tmp_path / "engine")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["aiosctl", "engine", *words])
    return aiosctl.main()


def test_a_complete_installation_is_used_until_it_is_removed(
    wheels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert torch_folder.preferred() is None
    offline = ("--", "--no-index", f"--find-links={wheels}")
    assert run(monkeypatch, "install", "--cpu", *offline) == 0
    at = torch_folder.preferred()
    assert at
    found = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, '{at}'); import torch; print(torch.__version__)",
    ]
    assert subprocess.run(found, capture_output=True, text=True).stdout == "9.9+cpu\n"
    assert run(monkeypatch, "status") == 0
    assert "cpu-9.9" in capsys.readouterr().out
    assert run(monkeypatch, "remove") == 0
    assert torch_folder.preferred() is None


def test_a_failed_installation_changes_nothing(
    wheels: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "install", "--cpu", "--", "--no-index", f"--find-links={wheels.parent}") == 1
    assert "nothing was changed" in capfd.readouterr().err
    assert torch_folder.preferred() is None
    assert not list(torch_folder.FOLDER.iterdir())
