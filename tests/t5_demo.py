"""make demo on the real mount with the real and the built-in model, run to the end and interrupted."""

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples import demo

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples/demo.py"
pytestmark = pytest.mark.mount


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Mark all processes of the demo. After the test no process, mount or file may be left."""
    value = str(uuid.uuid4())
    had_mount_point = Path("/aios").exists()
    yield dict(
        os.environ, TMPDIR=str(tmp_path), XDG_RUNTIME_DIR=str(tmp_path), AIOSD_DEMO_TEST=value, MODEL="tiny"
    )
    assert processes_with(f"AIOSD_DEMO_TEST={value}") == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert list(tmp_path.iterdir()) == []
    assert Path("/aios").exists() == had_mount_point


def processes_with(mark: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text().replace("\0", " "))
    return found


def output_of(environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, DEMO],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_demo_remembers_calculates_and_shows_the_queue(environment: dict[str, str]) -> None:
    output = output_of(environment)
    assert "built-in model alone" in output
    assert re.search(r"^ada> What is my name\?\nada: .*Ada", output, re.M)
    assert re.search(r"^cyd> 37 \* 12 = 444, says bc\ncyd: .*444", output, re.M)
    for name in ("dan", "eve", "fay"):
        assert len(re.findall(rf"^{name}: .+", output, re.M)) == 4
    assert "RUNNING" in output.upper()
    assert re.search(r"First answer ([0-9.]+) s", output)


def test_the_demo_converses_with_the_real_model_and_calls_tools_with_the_built_in_one(
    environment: dict[str, str],
) -> None:
    if not demo.REAL_MODEL.exists():
        pytest.skip("no SmolLM2: ./setup --tests brings it")
    output = output_of({**environment, "MODEL": ""})
    assert re.search(r"^ada> What is the capital of France\?\nada: .*Paris", output, re.M)
    assert re.search(r"^ada> What is it famous for\?\nada: .*Paris.*Eiffel", output, re.M)
    assert re.search(r"^cyd> 37 \* 12 = 444, says bc\ncyd: .*444", output, re.M)
    assert len(re.findall(r"^(dan|eve|fay): .+", output, re.M)) == 10
    assert re.search(r"│ .*running.*smollm2", output)


class Terminal:
    """The demo on its own terminal, where Ctrl-C reaches the whole foreground group."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.output = ""
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, str(DEMO)], environment)

    def read_until(self, text: str, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            assert self._read(), self.output
            assert time.monotonic() < deadline, self.output

    def _read(self) -> bool:
        """Read more output. Return False at the end."""
        if not select.select([self._terminal], [], [], 0.2)[0]:
            return True
        try:
            data = os.read(self._terminal, 4096)
        except OSError:  # EIO: nobody has the terminal open any longer
            data = b""
        self.output += re.sub(r"\033\[[0-9;]*[mK]", "", data.decode(errors="replace"))
        return bool(data)

    def press_ctrl_c(self) -> None:
        os.write(self._terminal, b"\x03")

    def wait(self, timeout_s: float = 40) -> int:
        deadline = time.monotonic() + timeout_s
        while self._read():
            assert time.monotonic() < deadline, self.output
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.parametrize(
    ("moment", "presses"), [("aiosd on", 1), ("ready after", 3), ("> What is my name?", 1), ("dan> ", 3)]
)
def test_ctrl_c_leaves_nothing_behind(environment: dict[str, str], moment: str, presses: int) -> None:
    terminal = Terminal(environment)
    terminal.read_until(moment)
    for _ in range(presses):
        terminal.press_ctrl_c()
    assert terminal.wait() == 130
    assert "stopping" in terminal.output


@pytest.mark.parametrize(("content", "expected"), [([], "usual"), (["mine"], "private")])
def test_somebodys_folder_in_the_way_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: list[str], expected: str
) -> None:
    usual, private = tmp_path / "aios", tmp_path / "demo"
    usual.mkdir()
    for name in content:
        (usual / name).touch()
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with contextlib.ExitStack() as undo:
        chosen = demo.make_mount_point(private, undo)
        assert chosen == {"usual": usual, "private": private}[expected]
    assert [path.name for path in usual.iterdir()] == content
    assert not private.exists()
