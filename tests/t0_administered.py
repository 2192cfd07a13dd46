"""Files of the administrator that the daemon may not read are an error, and do not count as missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aiosd.errors import ConfigError
from aiosd.host.administered import is_there, listed
from tests.running import REPOSITORY, open_to_all

NOBODY = 65534
READ = {
    "conf.d": "from aiosd.config.config import load; load(at / 'aiosd.toml')",
    "policies": "from aiosd.scheduler.chooser import judge; judge('fifo', at / 'policies')",
    "access": "from aiosd.access.rules import Rules; Rules(at / 'access')",
    "tools.d": "from aiosd.tools.catalog import read_all; read_all(at / 'tools.d', {}, strict=True)",
    "tools.d/x": "from aiosd.tools.catalog import read_all; read_all(at / 'tools.d', {}, strict=True)",
}
FILES = {"conf.d": "x.toml", "policies": "x.py", "access": "x.toml", "tools.d/x": "tool.toml"}
AS_NOBODY = f"""
import os, sys
from pathlib import Path
from aiosd.errors import ConfigError
at = Path(sys.argv[1])
{{imports}}
os.setgroups([]); os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
try:
    {{read}}
except ConfigError as error:
    print(error.explanation)
"""


def test_the_files_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.toml", "a.toml", "c.txt"):
        (tmp_path / name).touch()
    assert listed(tmp_path, "*.toml") == [tmp_path / "a.toml", tmp_path / "b.toml"]
    assert listed(tmp_path / "missing", "*.toml") == listed(tmp_path / "c.txt", "*") == []
    assert not is_there(tmp_path / "c.txt/x")
    (tmp_path / "x.toml").symlink_to("x.toml")
    with pytest.raises(ConfigError, match="Too many levels"):
        is_there(tmp_path / "x.toml")


def test_a_folder_with_the_name_of_a_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "aiosd.toml").touch()
    (tmp_path / "conf.d/x.toml").mkdir(parents=True)
    done = _check(tmp_path / "aiosd.toml")
    assert f"x.toml: Is a directory; files of the configuration have such names: mv {tmp_path}" in done
    (tmp_path / "conf.d/x.toml").rmdir()
    (tmp_path / "conf.d/x.toml").symlink_to("/nonexistent")
    assert "x.toml: No such file or directory; remove the link" in _check(tmp_path / "aiosd.toml")


def _check(file: Path) -> str:
    command = [sys.executable, "-m", "aiosd", "--check", str(file)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60).stderr


@pytest.mark.root
@pytest.mark.parametrize("closed", ["folder", "file"])
@pytest.mark.parametrize("kind", READ)
def test_what_the_daemon_may_not_read_is_an_error_with_the_remedy(
    kind: str, closed: str, tmp_path: Path
) -> None:
    """An administrator whose umask is 077 makes such files."""
    (tmp_path / "aiosd.toml").touch()
    (tmp_path / kind).mkdir(parents=True)
    file = tmp_path / kind / FILES.get(kind, "x/tool.toml")
    file.parent.mkdir(exist_ok=True)
    file.touch()
    open_to_all(tmp_path)
    shut, bits = (tmp_path / kind, "rx") if closed == "folder" else (file, "r")
    shut.chmod(0o700 if closed == "folder" else 0o600)
    imports, _, read = READ[kind].partition("; ")
    script = AS_NOBODY.format(imports=imports, read=read)
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert "Permission denied; user nobody has to read it" in done.stdout, done.stderr
    assert f"chmod a+{bits} {shut}" in done.stdout
