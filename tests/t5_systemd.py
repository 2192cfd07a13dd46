"""The package on a machine that boots: installed, asked, killed, restarted, upgraded, purged, as users see it.

The tests share one machine and run in the order of this file; the last ones take the package away again.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import machine as machines
from tests.machine import Machine
from tests.running import wait_until

pytestmark = [pytest.mark.root, pytest.mark.mount, pytest.mark.slow]
ASK = 'echo "Repeat: mango" > /aios/agents/{0}/syscall/llm && cat /aios/agents/{0}/syscall/llm'
NEXT = "9.0.0"


@pytest.fixture(scope="module")
def package() -> Path:
    if why := machines.missing():
        pytest.skip(f"no machine can be booted here: {why}")
    return machines.build_package()


@pytest.fixture(scope="module")
def machine(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Booted, with nothing of ours on it but the file of the package."""
    root = tmp_path_factory.mktemp("machine") / "root"
    machines.unpack(machines.base_root(machines.depends(package)), root)
    machine = Machine(root)
    try:
        (root / "root/aiosd.deb").hardlink_to(package)
        machine.boot()
        yield machine
        print((root.parent / "console").read_text()[-4000:])
    finally:
        machine.remove()


def ready(machine: Machine, limit_s: float = 60.0) -> None:
    """Until the model answers."""
    wait_until(lambda: machine.out("root", "cat /aios/models/tiny/state") == "ready", "the model", limit_s)


def journal(machine: Machine, *options: str) -> str:
    return machine.out("root", " ".join(["journalctl", "--no-pager", *options]))


class Load:
    """Requests of one agent that take seconds, put into the queue and left there."""

    TOKENS = 350

    def __init__(self, machine: Machine, user: str, agent: str) -> None:
        self._machine, self._user, self._folder = machine, user, f"/aios/agents/{agent}"
        machine.run(user, f"mkdir {self._folder}")
        self.ids: list[int] = []

    def add(self, number: int) -> None:
        """They have been accepted when this returns."""
        request = {"prompt": "word", "max_tokens": self.TOKENS, "ignore_eos": True}
        script = f"""cd {self._folder}
            for i in $(seq {number}); do
                id=$(cat requests/new) && echo {shlex.quote(json.dumps(request))} > requests/$id/request || exit 1
                echo $id
            done"""
        self.ids += [int(line) for line in self._machine.out(self._user, script).split()]

    def unfinished(self) -> int:
        return sum(state not in ("done", "failed", "cancelled") for state in self._states())

    def ends_whole(self) -> None:
        """Each request is answered, in full, and was counted once."""
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


# --------------------------------------------------------------------------------------------- install and use


def test_it_installs_without_a_network_and_says_what_to_do_next(machine: Machine) -> None:
    done = machine.run("root", "apt-get install -y /root/aiosd.deb 2>&1", timeout_s=300)
    assert "mkdir /aios/agents/ada" in done.stdout
    assert machine.out("root", "systemctl is-enabled aiosd") == "enabled"
    machine.run("root", 'dpkg --audit && test -z "$(dpkg --audit)"')


def test_a_minute_after_its_start_a_shell_has_an_answer(machine: Machine) -> None:
    machine.run("root", "systemctl stop aiosd")
    began = time.monotonic()
    machine.run("root", "systemctl start aiosd")
    assert machine.out("alice", "mkdir /aios/agents/ada; " + ASK.format("ada")) == "mango"
    assert time.monotonic() - began < 60
    assert machine.out("root", "cat /aios/models/tiny/state") == "ready"


def test_the_compiled_operations_are_used(machine: Machine) -> None:
    machine_type = machine.out("root", "uname -m; cat /proc/cpuinfo").split()
    if machine_type[0] == "x86_64" and "avx2" in machine_type:
        assert '"path": "fused"' in machine.out("root", "cat /aios/models/tiny/info") or (
            "fused" in machine.out("root", "cat /aios/models/tiny/info")
        )


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


def test_the_unit_of_a_worker_has_the_device_that_its_model_is_pinned_to(machine: Machine) -> None:
    """Of a table: a GPU whose workers compute on the processor, and whose file in /dev is there."""
    table, extra = "/etc/aios/devices-table", "/etc/aios/conf.d/60-test.toml"
    uuid = "GPU-aaaaaaaa-0000-0000-0000-000000000000"
    facts = f'uuid = "{uuid}"\nbackend = "cpu"\ncpus = "0"\nnuma = 0\npaths = ["/dev/fuse"]\n'
    (machine.root / table.lstrip("/")).write_text(f"[[device]]\n{facts}")
    (machine.root / extra.lstrip("/")).write_text(f'[engine]\ndevice_table = "{table}"\n')
    machine.run("root", "systemctl reload aiosd")
    wait_until(lambda: uuid in machine.out("root", "cat /aios/devices"), "the table")

    def on(device: str) -> bool:
        return machine.out("root", "cat /aios/workers/*/device; cat /aios/models/tiny/state") == f"{device}\nready"

    machine.run("root", f"echo pin {uuid[:12]} > /aios/models/tiny/ctl")
    wait_until(lambda: on(uuid), "the device", 60)
    number = machine.out("root", "ls /aios/workers")
    shown = machine.out(
        "root", f"systemctl show aios-worker@{number} -p DeviceAllow -p CPUAffinity -p NUMAMask -p Environment"
    )
    assert {"DeviceAllow=/dev/fuse rw", "CPUAffinity=0", "NUMAMask=0"} <= set(shown.splitlines())
    assert f"CUDA_VISIBLE_DEVICES={uuid}" in shown
    assert machine.out("root", "mkdir -p /aios/agents/gpu; " + ASK.format("gpu")) == "mango"
    machine.run("root", f"rm {extra} {table}; systemctl reload aiosd; echo pin auto > /aios/models/tiny/ctl")
    wait_until(lambda: on("cpu"), "the processor", 60)
    assert machine.out("root", "mkdir -p /aios/agents/gpu; " + ASK.format("gpu")) == "mango"


# ------------------------------------------------------------------------------------------- reload and restart


def test_a_reload_with_a_mistake_keeps_the_old_configuration_and_says_where(machine: Machine) -> None:
    machine.run(
        "root",
        "printf '[scheduler]\\nquantum = 32\\n' > /etc/aios/conf.d/50-test.toml; systemctl reload aiosd",
    )
    wait_until(lambda: machine.out("root", "cat /aios/scheduler/quantum") == "32", "the new quantum")
    machine.run("root", "printf '[scheduler]\\nquantum = 16\\nspeed = 9\\n' > /etc/aios/conf.d/50-test.toml")
    machine.run("root", "systemctl reload aiosd", check=False)
    wait_until(lambda: "50-test.toml:3" in journal(machine, "-u aiosd"), "the reason in the journal")
    assert machine.out("root", "cat /aios/scheduler/quantum") == "32"
    assert machine.out("root", "systemctl is-active aiosd") == "active"
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


def test_an_upgrade_under_load_answers_each_request_once(
    machine: Machine, package: Path, tmp_path: Path
) -> None:
    newer = machines.newer_package(package, tmp_path, NEXT)
    newer.rename(machine.root / "root/newer.deb")
    load = Load(machine, "alice", "upgraded")
    before = main_pid(machine)
    load.add(40)
    done = machine.start("root", "apt-get install -y /root/newer.deb 2>&1")
    while done.poll() is None:  # there is work at every moment of it
        if machine.works("alice", "test -e /aios/status") and load.unfinished() < 10:
            load.add(10)
    assert done.wait() == 0, done.stdout and done.stdout.read()
    assert main_pid(machine) != before
    assert machine.out("root", "cat /aios/version") == NEXT
    load.ends_whole()


def test_the_journal_tells_the_story(machine: Machine) -> None:
    story = journal(machine, "-u aiosd -o cat")
    for line in (
        "aiosd 0.1.0 serves /aios",
        f"aiosd {NEXT} serves /aios",
        "SIGTERM: stopping",
        "Main process exited, code=killed",
        "not reloaded, the old configuration stays",
        "request",
    ):
        assert line in story
    assert "Traceback" not in story


# ------------------------------------------------------------------------------------------- stop and go away


def test_a_stop_leaves_no_mount_and_no_process(machine: Machine) -> None:
    machine.run("root", "systemctl stop aiosd", timeout_s=120)
    assert machine.out("root", "systemctl is-active aiosd || true") == "inactive"
    leaves_nothing_running(machine)
    machine.run("root", "systemctl start aiosd")
    assert machine.out("alice", ASK.format("ada")) == "mango"


def test_removal_and_return_keep_what_users_have(machine: Machine) -> None:
    machine.run("root", "apt-get remove -y aiosd", timeout_s=120)
    leaves_nothing_running(machine)
    assert machine.works("root", "test -e /etc/aios/aiosd.toml")
    machine.run("root", "apt-get install -y /root/aiosd.deb", timeout_s=300)
    assert machine.out("alice", ASK.format("ada")) == "mango"


def test_a_purge_leaves_the_data_and_nothing_else(machine: Machine) -> None:
    done = machine.run("root", "apt-get purge -y aiosd 2>&1", timeout_s=120)
    assert "rm -r /var/lib/aios" in done.stdout
    leaves_nothing_running(machine)
    left = machine.out(
        "root",
        "find /etc /usr /lib /run /var -xdev -not -path '/var/lib/dpkg/*' -not -path '/var/log/*' -not -path '/var/lib/aios/*'"
        " | grep -i aios || true",
    )
    assert left.splitlines() == ["/var/lib/aios"]
    assert "aios" not in machine.out(
        "root", "systemctl list-unit-files --no-legend; systemctl list-units --all --no-legend"
    )
    assert not machine.works("root", "test -e /aios")


def test_a_purge_that_is_told_to_removes_the_data(machine: Machine) -> None:
    machine.run("root", "apt-get install -y /root/aiosd.deb", timeout_s=300)
    machine.run("root", "kill -9 $(systemctl show -p MainPID --value aiosd)")
    machine.run("root", "touch /etc/aios/purge-data; apt-get purge -y aiosd 2>&1", timeout_s=120)
    leaves_nothing_running(machine)
    assert not machine.works("root", "test -e /var/lib/aios || test -e /etc/aios")


def main_pid(machine: Machine) -> int:
    return int(machine.out("root", "systemctl show -p MainPID --value aiosd"))


def leaves_nothing_running(machine: Machine) -> None:
    assert machine.out("root", "grep -E 'aios|fuse' /proc/mounts || true") == ""
    assert machine.out("root", "pgrep -af 'aios' -u root,alice,bob | grep -v pgrep || true") == ""
    assert "aios" not in machine.out(
        "root", "ps -eo user:20,args --no-headers | grep -v 'ps -eo\\|nsenter\\|runuser\\|grep' || true"
    )
