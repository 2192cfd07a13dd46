"""aiosctl agent run, which aios-agent@NAME.service runs, as real users on the real mount."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aiosd.tools.mcp.program import program
from tests.running import REPOSITORY, Daemon, wait_until
from tests.t5_users import ALICE, BOB, as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]
Start = Callable[..., subprocess.Popen[str]]
PLAIN = "description = 'x'\ncommand = ['sleep', '1000']\n"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder of alice's packages and their state."""
    for parent in [tmp_path, *tmp_path.parents][:4]:
        parent.chmod(0o755)
    made = tmp_path / "home"
    made.mkdir()
    os.chown(made, ALICE, ALICE)
    return made


@pytest.fixture
def start(aios: Daemon, home: Path) -> Iterator[Start]:
    """aiosctl agent run FOLDER."""
    (python, *_), _, env = program()
    started: list[subprocess.Popen[str]] = []

    def begin(folder: Path, root: Path = aios.root) -> subprocess.Popen[str]:
        who = ["setpriv", "--reuid", str(ALICE), "--regid", str(ALICE), "--clear-groups"]
        process = subprocess.Popen(
            [*who, python, "-S", "-m", "aiosd.cli.aiosctl", "--mount", root, "agent", "run", folder],
            env={**os.environ, **env, "XDG_STATE_HOME": str(home)}, cwd="/", text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()
    wait_until(lambda: not list((aios.root / "agents").glob("packed*")), "the end of the agents")


def package(home: Path, text: str = PLAIN, name: str = "packed") -> Path:
    made = home / name
    made.mkdir()
    (made / "agent.toml").write_text(text)
    return made


def made(aios: Daemon, process: subprocess.Popen[str], name: str = "packed") -> Path:
    folder = aios.root / "agents" / name
    wait_until(lambda: (folder / "pid").read_text() == f"{process.pid}\n", "the agent")
    return folder


def failed(process: subprocess.Popen[str]) -> tuple[int, str]:
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


def test_the_greeter_greets_and_ends_with_its_process(aios: Daemon, home: Path, start: Start) -> None:
    folder = home / "packed"
    shutil.copytree(REPOSITORY / "examples/agents/greeter", folder)
    process = start(folder)
    assert process.stdout is not None
    state = home / "aios-agents" / "packed"
    assert process.stdout.readline() == f"waiting for names in {state}/names\n"
    agent = aios.root / "agents/packed"
    assert (agent.stat().st_uid, (agent / "pid").read_text()) == (ALICE, f"{process.pid}\n")
    assert [(agent / name).read_text() for name in ("nice", "system")] == ["5\n", "Answer briefly.\n"]
    for name in ("Ada", "Grace"):
        (state / "names").write_text(name + "\n")
        assert name in process.stdout.readline()
    wait_until(lambda: (state / "greeted").read_text() == "Ada\nGrace\n", "the record")
    process.terminate()
    wait_until(lambda: not agent.exists(), "the agent's end")


def test_all_settings_arrive_and_a_program_gets_its_environment(
    aios: Daemon, home: Path, start: Start
) -> None:
    text = """
        description = "x"
        command = ["sh", "-c", '''
            echo $PWD $STATE_DIRECTORY $AIOS $AIOS_AGENT $AIOS_FOLDER; echo $0; exec sleep 1000''', "./a"]
        model = "tiny"
        context = "packed"
        tools = ["calc", "clock"]
        max_steps = 3
        params = { temperature = 0.5, stop = ["x"] }
    """
    process = start(package(home, text))
    assert process.stdout is not None
    state, root = home / "aios-agents/packed", aios.root
    assert process.stdout.readline().split() == [
        str(path) for path in (state, state, root, root / "agents/packed", home / "packed")
    ]
    assert process.stdout.readline() == f"{home}/packed/a\n"
    assert aios.sh("cd agents/packed; cat model context tools max_steps params.json").stdout.splitlines() == [
        "tiny", "packed", "calc clock", "3", '{"temperature": 0.5, "stop": ["x"]}',
    ]  # fmt: skip
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert not int(status.partition("SigIgn:\t")[2].split()[0], 16) >> signal.SIGPIPE - 1 & 1
    aios.sh("rmdir contexts/packed")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('model = "nosuch"', "agent.toml:3: no model 'nosuch'; models are tiny"),
        ('tools = ["nosuch"]', "agent.toml:3: no tool 'nosuch'"),
        ("nice = -5", "agent.toml:3: "),
        ("params = { temprature = 1 }", "agent.toml:3: unknown key 'temprature'"),
    ],
)
def test_a_refused_setting_is_named_with_its_line(
    aios: Daemon, home: Path, start: Start, line: str, said: str
) -> None:
    status, error = failed(start(package(home, PLAIN + line + "\n")))
    assert said in error
    assert (status, error.count("\n")) == (1, 1)
    wait_until(lambda: not (aios.root / "agents/packed").exists(), "the agent's end")


def test_a_wrong_file_is_status_78(home: Path, start: Start) -> None:
    status, error = failed(start(package(home, PLAIN + "modell = 'x'\n")))
    assert (status, error.partition(";")[0]) == (
        78,
        f"aiosctl: {home}/packed/agent.toml:3: unknown key 'modell'",
    )


def test_an_agent_of_another_user_is_left_alone(aios: Daemon, home: Path, start: Start) -> None:
    assert as_user(aios, BOB, "mkdir agents/packed").returncode == 0
    status, error = failed(start(package(home)))
    assert status == 1
    assert f"agents/packed is an agent of uid {BOB}: rmdir it as that user or as root" in error
    assert (aios.root / "agents/packed").stat().st_uid == BOB
    (aios.root / "agents/packed").rmdir()


def test_an_agent_without_a_process_is_taken_and_ends_with_the_process(
    aios: Daemon, home: Path, start: Start
) -> None:
    as_user(aios, ALICE, "mkdir agents/packed; echo Hi > agents/packed/system")
    process = start(package(home))
    assert (made(aios, process) / "system").read_text() == "Hi\n"


def test_a_start_right_after_a_kill_gets_an_agent_that_stays(aios: Daemon, home: Path, start: Start) -> None:
    """aiosd notices the end of the earlier process late. That end must not remove the next process's
    agent."""
    folder = package(home)
    for _ in range(5):
        process = start(folder)
        made(aios, process)
        process.kill()
    process = start(folder)
    agent = made(aios, process)
    assert (
        as_user(aios, ALICE, f"cd agents/packed && cat pid && test $(stat -c %u .) = {ALICE}").returncode == 0
    )
    assert (agent / "pid").read_text() == f"{process.pid}\n"


def test_a_second_start_names_the_running_process(aios: Daemon, home: Path, start: Start) -> None:
    folder = package(home)
    first = start(folder)
    made(aios, first)
    status, error = failed(start(folder))
    assert (status, first.poll()) == (1, None)
    assert f"is the agent of process {first.pid}: end that process first" in error


def test_it_waits_for_aiosd(aios: Daemon, home: Path, start: Start, tmp_path: Path) -> None:
    later = tmp_path / "later"
    process = start(package(home), root=later)
    assert process.stderr is not None
    assert process.stderr.readline() == f"aiosctl: waiting for aiosd at {later}\n"
    later.symlink_to(aios.root)
    made(aios, process)
