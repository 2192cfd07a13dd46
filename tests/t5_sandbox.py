"""Tool calls of real users that try to leave the sandbox: each test tries a real way, which must fail."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aiosd.tools.manifest import read
from aiosd.tools.run.cgroups import Group
from aiosd.tools.run.runner import UNDYING_MOST
from aiosd.tools.run.sandbox import Cage
from aiosd.tools.run.spawn import popen
from tests.deaf_fuse import deaf
from tests.running import Daemon, together, wait_until
from tests.t5_users import ALICE, BOB, as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]
AGENTS = {ALICE: "alice", BOB: "bob", 0: "root"}
WORK_BYTES, OUTPUT_BYTES, MEMORY_BYTES = 32 << 20, 1 << 20, 256 << 20
PROGRAM = "import json, os, sys; os.execv('/bin/bash', ['bash', '-c', json.load(sys.stdin)['script']])"
MANIFEST: dict[str, Any] = {
    "description": "Runs a shell script.",
    "command": ["/usr/bin/python3", "-IS", "-c", PROGRAM],
    "memory_bytes": MEMORY_BYTES,
    "timeout_s": 20,
    "limit": 8,
}
SCRIPT = {
    "type": "object",
    "required": ["script"],
    "properties": {"script": {"type": "string"}},
    "additionalProperties": False,
}


def toml(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(v)}" for key, v in value.items()) + "}"
    return json.dumps(value)


def add_tool(folder: Path, name: str, **facts: object) -> None:
    (folder / name).mkdir(parents=True)
    manifest = {**MANIFEST, "name": name, "parameters": SCRIPT, **facts}
    text = "".join(f"{key} = {toml(value)}\n" for key, value in manifest.items())
    (folder / name / "tool.toml").write_text(text)


class Host:
    """A daemon with tools, and secrets on the machine that a tool must not get."""

    def __init__(self, folder: Path, model: Path) -> None:
        for parent in [folder, *folder.parents][:4]:
            parent.chmod(0o755)  # other users have to get through to the mount
        self.shown, self.tools = folder / "shown", folder / "tools"
        self.markers, self.outside = folder / "markers", folder / "outside"
        self.secret = self.own(folder / "secret", "the secret of bob", BOB)
        self.shown.mkdir()
        self.own(self.shown / "secret", "the secret of bob", BOB)
        self.own(self.shown / "key", "the secret of root", 0)
        shutil.copy("/usr/bin/id", self.shown / "id")
        (self.shown / "id").chmod(0o4755)
        for writable in (self.markers, self.outside):
            writable.mkdir()
            writable.chmod(0o1777)
        seen = {"read": [str(self.shown)], "write": [str(self.markers)]}
        add_tool(self.tools, "sh", **seen)
        add_tool(self.tools, "hurried", timeout_s=1, **seen)
        add_tool(self.tools, "few", limit=3, **seen)
        add_tool(self.tools, "one", exclusive="door", **seen)
        add_tool(self.tools, "other", exclusive="door", **seen)
        add_tool(self.tools, "grave", irreversible=True, **seen)
        count = "import json, sys; print(len(json.load(sys.stdin)['script'].encode()))"
        add_tool(self.tools, "count", command=["/usr/bin/python3", "-IS", "-c", count])
        add_tool(self.tools, "keyed", env={"API_KEY": "the-key-of-the-tool"})
        add_tool(self.tools, "loaded", env={"LD_DEBUG": "files", "LD_DEBUG_OUTPUT": f"{self.outside}/loaded"})
        add_tool(self.tools, "optioned", env={"X": "x\0--bind\0/\0/mnt"})
        config = (
            f'[tools]\nfolder = "{self.tools}"\nwork_bytes = {WORK_BYTES}\noutput_bytes = {OUTPUT_BYTES}\n'
        )
        self.daemon = Daemon(folder, model, config)

    @staticmethod
    def own(file: Path, text: str, uid: int) -> Path:
        file.write_text(text)
        file.chmod(0o600)
        os.chown(file, uid, uid)
        return file

    def start(self) -> Host:
        self.daemon.start(ready=False)
        for uid, name in AGENTS.items():
            assert as_user(self.daemon, uid, f"mkdir -p agents/{name}").returncode == 0
        return self

    def client(self, uid: int, path: str) -> subprocess.Popen[bytes]:
        """Write a request to a file of the mount, and return the answer."""
        script = f"exec 3<>{path} && cat >&3 && exec cat <&3"
        return subprocess.Popen(
            ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups", "bash", "-c", script],
            cwd=self.daemon.root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def begin(self, script: str, uid: int = ALICE, tool: str = "sh", said: str = "begun") -> Any:
        """Start a call that keeps running. Its script must report its start."""
        client = self.client(uid, f"tools/{tool}/call")
        assert client.stdin
        assert client.stdout
        client.stdin.write(json.dumps({"script": script}).encode())
        client.stdin.close()
        if said:
            assert client.stdout.readline().decode() == said + "\n"
        return client

    def say(self, script: str, uid: int = ALICE, tool: str = "sh") -> str:
        """The output of one call among many running ones."""
        client = self.client(uid, f"tools/{tool}/call")
        said, _ = client.communicate(json.dumps({"script": script}).encode(), 60)
        return said.decode()

    def call(self, script: str, uid: int = ALICE, tool: str = "sh") -> dict[str, Any]:
        """response.json of a call through the user's agent."""
        client = self.client(uid, f"agents/{AGENTS[uid]}/syscall/tool")
        client.communicate(json.dumps({"name": tool, "arguments": {"script": script}}).encode(), 60)
        latest = self.daemon.read(f"agents/{AGENTS[uid]}/requests/latest/response.json")
        facts: dict[str, Any] = json.loads(latest)
        return facts

    def work(self, uid: int = ALICE) -> Path:
        [folder] = (self.daemon.work / str(uid)).iterdir()
        return folder

    def empty_work(self) -> None:
        subprocess.run(["rm", "-rf", *map(str, self.work().iterdir())], check=True)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, random_llama: Path) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("sandbox"), random_llama).start()
    yield host
    try:
        assert host.daemon.stop() == 0
        assert "Traceback" not in host.daemon.log.read_text()
    finally:
        host.daemon.clean()


def running(command: str) -> list[int]:
    """The processes of the machine with this text in the command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if command in file.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"):
                found.append(int(file.parent.name))
        except OSError:
            pass
    return found


def python(code: str) -> str:
    return f"python3 -IS - <<'END'\n{code}\nEND"


NOTHING = {  # each script must fail; it prints GOT if it succeeds
    "a file of another user that the tool is shown": "cat {shown}/secret {shown}/key && echo GOT",
    "a file of another user that it is not shown": "cat {secret} && echo GOT",
    "the passwords": "cat /etc/shadow && echo GOT",
    "the state folder": "ls {state} && echo GOT",
    "the database": "cat {state}/aios.db && echo GOT",
    "the home folders": "ls /root || ls /home && echo GOT",
    "the sockets of services": "ls /run/systemd || ls /run/dbus || ls /var/run && echo GOT",
    "the devices": "ls /dev/vda /dev/sda /dev/fuse /dev/kmsg /dev/mem /sys/class && echo GOT",
    "processes outside": "test -e /proc/{pid} && echo GOT; ps -e | grep -E 'aiosd|pytest' && echo GOT",
    "the memory of the first process": "head -c1 /proc/1/mem && echo GOT",
    "the root folder of the first process": "ls /proc/1/root/{state} && echo GOT",
    "signals to the daemon": "kill -0 {pid} && echo GOT; kill {pid} && echo GOT",
    "ptrace": python(
        "import ctypes, os\n"
        "c = ctypes.CDLL(None, use_errno=True)\n"
        "for pid in (os.getppid(), 1, {pid}):\n"
        "    if c.ptrace(16, pid, 0, 0) == 0: print('GOT')\n"
        "if c.ptrace(0, 0, 0, 0) == 0: print('GOT')\n"
    ),
    "process_vm_readv": python(
        "import ctypes\n"
        "c = ctypes.CDLL(None, use_errno=True)\n"
        "for pid in (1, {pid}):\n"
        "    print('GOT' if c.syscall(310, pid, 0, 0, 0, 0, 0) >= 0 else ctypes.get_errno())\n"
    ),
    "mounts": "mount -t tmpfs none /tmp && echo GOT; mount --bind /etc /tmp && echo GOT",
    "remounts": "mount -o remount,rw / && echo GOT; mount -o remount,bind,rw /usr && echo GOT",
    "the end of what hides": "umount /aios/access && echo GOT; umount -l /aios && echo GOT",
    "another root": "chroot / true && echo GOT; python3 -c 'import os; os.chroot(\"/\")' && echo GOT",
    "namespaces": "unshare -Ur true && echo GOT; unshare -m true && echo GOT; unshare -n true && echo GOT",
    "namespaces by clone": python(
        "import ctypes, os\n"
        "c = ctypes.CDLL(None, use_errno=True)\n"
        "for flags in (0x10000000, 0x10020000, 0x20000, 0x40000000):\n"
        "    pid = c.syscall(56, flags | 17, 0, 0, 0, 0)\n"
        "    if pid == 0: os._exit(0)\n"
        "    print('GOT' if pid > 0 else ctypes.get_errno())\n"
        "args = (ctypes.c_uint64 * 8)(0x10000000, 0, 0, 0, 17)\n"
        "pid = c.syscall(435, args, 64)\n"
        "if pid == 0: os._exit(0)\n"
        "print('GOT' if pid > 0 else ctypes.get_errno())\n"
    ),
    "namespaces of others": "nsenter -t 1 -m true && echo GOT; nsenter -t {pid} -n true && echo GOT",
    "system calls of other kinds": python(
        "import ctypes\n"
        "c = ctypes.CDLL(None, use_errno=True)\n"
        "for number in (298, 321, 323, 425, 248, 250, 304, 430, 428, 319, 29, 135):\n"
        "    if c.syscall(number, 0, 0, 0, 0, 0) >= 0 or ctypes.get_errno() != 1: print('GOT', number)\n"
    ),
    "capabilities": "grep -E '^Cap(Eff|Prm|Bnd|Amb)' /proc/self/status | grep -v '0000000000000000$'"
    " && echo GOT;"
    " grep -q 'NoNewPrivs:.1' /proc/self/status || echo GOT",
    "ids by set-uid files": "test $({shown}/id -u) = $(id -u) || echo GOT; echo | su -c 'echo GOT' 2>&1;"
    " python3 -c 'import os; os.setuid({bob}); print(\"GOT\")'",
    "the system's folders": "touch /usr/x && echo GOT; touch /etc/x && echo GOT; touch /x /tool && echo GOT;"
    " touch /bin/x && echo GOT",
    "settings of the kernel": "for file in core_pattern printk_ratelimit hostname; do"
    " cat /proc/sys/kernel/$file > /tmp/v && cat /tmp/v > /proc/sys/kernel/$file && echo GOT; done",
    "the magic of the kernel": "true > /proc/sysrq-trigger && echo GOT;"
    " find /proc/sys -type f -writable | grep . && echo GOT",
    "devices of its own": "mknod /tmp/disk b 254 0 && echo GOT; mknod disk b 254 0 && echo GOT",
    "descriptors of the daemon": "ls /proc/self/fd | grep -vxE '[0-3]' && echo GOT",  # 3 is ls's own
    "the environment of the daemon": "env | grep -vE '^(PATH|HOME|LANG|AIOS|PWD|SHLVL|_)=' && echo GOT",
    "a terminal": "true < /dev/tty && echo GOT; tty && echo GOT; true > /dev/console && echo GOT",
    "input to a terminal": python(
        "import fcntl\n"
        "for fd in (0, 1, 2):\n"
        "    try: fcntl.ioctl(fd, 0x5412, b'x'); print('GOT')\n"
        "    except OSError: pass\n"
    ),
    "memory that is nobody's": "head -c 90M /dev/zero > /dev/shm/a && echo GOT; touch /dev/a && echo GOT;"
    " touch /aios/access/a && echo GOT; python3 -c 'import os; os.memfd_create(\"a\"); print(\"GOT\")'",
    "the disk under /tmp": "head -c 90M /dev/zero > /tmp/a && echo GOT",
    "a new name for the daemon's files": "ln /aios/status x && echo GOT; mkdir /aios/access/pending"
    " && echo GOT; mv /aios/tools /aios/t && echo GOT",
    "keys": "ls /aios/keys /proc/1/root/aios/keys | grep -E 'new|check' && echo GOT;"
    " mkdir /aios/keys/a && echo GOT",
    "what waits for a decision": "cd /aios/agents; for at in /aios/access ../access /proc/1/root/aios/access"
    " /proc/self/cwd/../access; do ls $at | grep . && echo GOT; done",
}  # fmt: skip


ROOTS = ("a file of another user that the tool is shown", "the passwords")  # which root may read


@pytest.mark.parametrize(
    ("way", "uid"),
    [pytest.param(way, ALICE, id=f"{way}-a user") for way in NOTHING]
    + [pytest.param(way, 0, id=f"{way}-root") for way in NOTHING if way not in ROOTS],
)
def test_a_tool_gets_nothing_of(host: Host, way: str, uid: int) -> None:
    assert host.daemon.process
    names = {"shown": host.shown, "secret": host.secret, "state": host.daemon.state, "bob": BOB}
    script = NOTHING[way]
    for key, value in {**names, "pid": host.daemon.process.pid}.items():
        script = script.replace("{" + key + "}", str(value))
    facts = host.call(script + "\necho ran", uid)
    assert "GOT" not in facts["output"], facts
    assert facts["output"].endswith("ran\n"), facts
    assert facts["exit_status"] == 0
    assert host.daemon.table("status")["pid"] == str(host.daemon.process.pid)


def test_a_tool_has_no_network(host: Host) -> None:
    name = f"aios-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind("\0" + name)
        unix.listen()
        port = tcp.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()
        facts = host.call(
            python(f"""
import socket
def attempt(*kind, to):
    try:
        with socket.socket(*kind) as s:
            s.settimeout(2)
            s.connect(to)
            s.send(b"x")
        print("GOT", kind, to)
    except OSError as error:
        print(error)
attempt(socket.AF_INET, socket.SOCK_STREAM, to=("127.0.0.1", {port}))
attempt(socket.AF_INET, socket.SOCK_STREAM, to=("192.0.2.1", 80))
attempt(socket.AF_INET, socket.SOCK_DGRAM, to=("192.0.2.1", 53))
attempt(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP, to=("192.0.2.1", 1))
attempt(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP, to=("127.0.0.1", 1))
attempt(socket.AF_UNIX, socket.SOCK_STREAM, to="\\0{name}")
for family in (16, 17, 38, 40, 31, 29, 44):
    try:
        socket.socket(family, socket.SOCK_RAW if family in (16, 17) else socket.SOCK_STREAM).close()
        print("GOT" if family != 16 else "", family)
    except OSError as error:
        print(error)
print([name for _, name in socket.if_nameindex()])
""")
        )
    assert "GOT" not in facts["output"], facts
    assert facts["output"].endswith("['lo']\n"), facts


@pytest.mark.parametrize("uid", [ALICE, 0], ids=["a user", "root"])
def test_a_fork_bomb_ends_at_its_bound_while_the_daemon_answers(host: Host, uid: int) -> None:
    if uid == 0 and "without cgroups" in host.daemon.log.read_text():
        pytest.skip("no cgroups here that the daemon may use, and an rlimit does not bind root")
    bomb = python("""
import os, time
print("begun", flush=True)
n = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            time.sleep(600)
        n += 1
    except OSError:
        pass
print(n)
""")
    client = host.begin(bomb, uid)
    assert host.daemon.table("status")["running"] != ""
    said = client.stdout.read()
    assert 30 < int(said) < 64
    assert host.say("echo next") == "next\n"


def test_memory_is_bounded_of_one_process_and_of_many(host: Host) -> None:
    facts = host.call(python(f"bytearray({MEMORY_BYTES * 2})"))
    assert "MemoryError" in facts["stderr"]
    assert f"more than {MEMORY_BYTES} bytes of memory" in host.call(HOLD.format(n=5))["error"]


HOLD = python(f"""
import os, time
for i in range({{n}}):
    if os.fork() == 0:
        break
else:
    i = "none"
held = bytearray({MEMORY_BYTES // 4})
for at in range(0, len(held), 4096):
    held[at] = 1
open(f"/work/{{{{i}}}}", "w").close()
time.sleep(20)
""")


def test_memory_is_bounded_between_two_checks(host: Host) -> None:
    """The processes would take four times as much between two checks of the runner."""
    if "without cgroups" in host.daemon.log.read_text():
        pytest.skip("no cgroups here that the daemon may use")
    facts = host.call(HOLD.format(n=15))
    full = len(list(host.work().iterdir()))
    host.empty_work()
    assert f"more than {MEMORY_BYTES} bytes of memory" in facts["error"]
    assert full < 15  # other processes take the place of killed ones


BURN = "import time; held = bytearray(20_000_000); [0 for _ in iter(lambda: time.process_time() > 0.4, True)]"


def test_the_usage_of_a_call_counts_all_its_processes(host: Host) -> None:
    """With control groups, killed processes count too, although no parent waited for them."""
    burn = f"/usr/bin/python3 -c '{BURN}'"
    facts = host.call(f"{burn} & {burn} & wait")
    assert 0.8 <= facts["cpu_seconds"] < 3
    line = json.loads(host.daemon.read("access/audit.jsonl").splitlines()[-1])
    assert line["cpu_seconds"] == facts["cpu_seconds"]
    if "without cgroups" in host.daemon.log.read_text():
        return
    assert 40_000_000 <= facts["memory_bytes"] < MEMORY_BYTES
    killed = host.call("while :; do :; done", tool="hurried")
    assert "it took more than 1 s" in killed["error"]
    assert killed["cpu_seconds"] > 0.1  # the sandbox itself takes a hundredth of this


def groups() -> list[Path]:
    """The control groups of calls, in all hierarchies."""
    return [
        file for at in Path("/sys/fs/cgroup").glob("**/aios-tools") for file in at.iterdir() if file.is_dir()
    ]


def test_a_call_has_a_control_group_that_ends_with_it(host: Host) -> None:
    if "without cgroups" in host.daemon.log.read_text():
        pytest.skip("no cgroups here that the daemon may use")
    owner = host.daemon.privileged or host.daemon.process
    assert owner
    pid = f"{owner.pid}."

    def own() -> list[Path]:
        return [group for group in groups() if group.name.startswith(pid)]

    client = host.begin("sleep 4716 & sleep 4716 & echo begun; wait")
    held = {group: set(map(int, (group / "cgroup.procs").read_text().split())) for group in own()}
    assert held
    assert any(set(running("sleep 4716")) <= pids for pids in held.values())  # one may be ending
    said = host.call(
        "for at in $(find / -name aios-tools 2>/dev/null); do echo $$ > $at/cgroup.procs; done; ls /sys"
    )
    assert said["output"] == ""
    client.kill()
    client.wait()
    wait_until(lambda: not own(), "the end of the groups")


@pytest.mark.parametrize(
    "fill",
    [
        f"head -c {WORK_BYTES * 2} /dev/zero > huge",
        f"for i in $(seq 40); do head -c {WORK_BYTES // 20} /dev/zero > $i; done",
        f"seq {WORK_BYTES // 4096 + 9} | xargs touch",
        python("import os\nfor i in range(300):\n    os.mkdir('d')\n    os.chdir('d')"),
    ],
    ids=["one huge file", "many files", "many empty files", "folders very deep in each other"],
)
def test_the_work_folder_cannot_be_filled_with(host: Host, fill: str) -> None:
    facts = host.call(fill + "\nsleep 20")
    host.empty_work()
    assert f"its work folder has more than {WORK_BYTES} bytes" in facts["error"]


@pytest.mark.parametrize("place", ["", "below"])
def test_a_call_ends_when_something_is_mounted_in_its_work_folder(host: Host, place: str) -> None:
    """A user may do that with FUSE: how much is beneath could not be seen, and who looks there might hang."""
    host.call("mkdir -p below")
    at = host.work() / place
    wrong: list[str] = []

    def mount() -> None:
        wait_until((host.work() / "begun").exists, "the call")
        subprocess.run(["mount", "-t", "tmpfs", "none", at], check=True)

    together(mount, lambda: wrong.append(host.call("touch begun; sleep 20")["error"]))
    subprocess.run(["umount", "-l", at], check=True)
    host.empty_work()
    assert "something is mounted in its work folder" in wrong[0]


@pytest.mark.parametrize("place", ["", "below"])
def test_nobody_waits_for_a_file_system_in_a_work_folder_that_never_answers(host: Host, place: str) -> None:
    """Not even SIGKILL ends who asks it."""
    host.call("mkdir -p below")
    with deaf(host.work() / place):
        facts = host.call("ls below; sleep 20")
        assert "something is mounted" in facts["error"]
        assert host.call("echo here", BOB)["output"] == "here\n"
    host.empty_work()


def test_a_daemon_ends_though_its_tools_wait_for_a_file_system_that_never_answers(
    tmp_path: Path, random_llama: Path
) -> None:
    host = Host(tmp_path, random_llama).start()
    try:
        host.call("mkdir below")
        assert host.daemon.stop() == 0
        with deaf(host.work() / "below"):
            host.start()  # aios-privileged shows its tools what was mounted before it first started one
            for _ in range(UNDYING_MOST):
                assert "something is mounted" in host.call("exec cat below/file")["error"]
            if "without cgroups" not in host.daemon.log.read_text():
                wait_until(lambda: "fusermount" in host.call("echo here")["error"], "the refusal")
            assert host.call("echo here", BOB)["output"] == "here\n"
            assert as_user(host.daemon, ALICE, "rmdir agents/alice").returncode == 0
            assert host.daemon.stop() == 0
    finally:
        host.daemon.clean()


def test_a_work_folder_of_any_depth_goes_with_its_agent(host: Host) -> None:
    as_user(host.daemon, ALICE, "mkdir agents/deep")
    own = host.daemon.work / str(ALICE)
    before = set(own.iterdir()) if own.exists() else set()
    client = host.client(ALICE, "agents/deep/syscall/tool")
    call = {"name": "sh", "arguments": {"script": "echo here"}}
    assert client.communicate(json.dumps(call).encode(), 60)[0] == b"here\n"
    [folder] = set(own.iterdir()) - before
    dig = "import os\nfor i in range(1500):\n    os.mkdir('d')\n    os.chdir('d')"
    # outside, because a call that is seen to dig so deep is ended
    subprocess.run(["/usr/bin/python3", "-IS", "-c", dig], cwd=folder, check=True)
    count = len(list(own.iterdir()))
    assert as_user(host.daemon, ALICE, "rmdir agents/deep").returncode == 0
    wait_until(lambda: len(list(own.iterdir())) == count - 1, "the folder to go with the agent")


def test_links_in_the_work_folder_lead_nowhere(host: Host) -> None:
    host.call("true")
    work, state = host.work(), host.daemon.state
    plant = f"ln -s {host.secret} bob; ln -s {state} state; ln -s / root; ln -s {state}/aios.db db"
    assert as_user(host.daemon, ALICE, f"cd {work} && {plant}").returncode == 0
    assert as_user(host.daemon, ALICE, f"cd {work} && ln {host.secret} hard").returncode != 0
    facts = host.call("cat bob db root/etc/shadow hard; ls state/ root/home; echo > db; echo > bob")
    host.empty_work()
    assert facts["output"] == ""
    assert host.secret.read_text() == "the secret of bob"


def test_nothing_can_be_put_in_the_place_of_a_work_folder(host: Host) -> None:
    """The daemon would change the owner of the replaced folder to the user."""
    host.call("true")
    own = host.work().parent
    for script in (
        f"mv {own}/* {own}/x",
        f"ln -s /etc {own}/99",
        f"rmdir {own}/*",
        f"mkdir {own}/98",
        f"ls {own}",
    ):
        assert as_user(host.daemon, ALICE, script).returncode != 0, script
    assert (own.stat().st_uid, host.work().stat().st_uid) == (0, ALICE)


def test_files_left_in_the_work_folder_are_the_callers_and_nothing_more(host: Host) -> None:
    """No tool can make a set-uid file of root, and a user's files stay the user's."""
    host.call("cp /usr/bin/id mine; chmod 6755 mine; chown root mine; echo x > kept")
    status = (host.work() / "mine").stat()
    assert status.st_uid == ALICE
    assert host.call("cat kept")["output"] == "x\n", "the folder is there for the next call"
    host.call("chmod 777 /work")
    assert host.call("ls", BOB)["output"] == ""
    assert as_user(host.daemon, BOB, f"ls {host.work()}").returncode != 0
    assert as_user(host.daemon, BOB, f"cat {host.work()}/kept").returncode != 0
    host.empty_work()


def test_processes_that_a_call_leaves_running_end_with_it(host: Host) -> None:
    leave = "(setsid bash -c 'trap \"\" HUP TERM; sleep 4711 & sleep 4711' >/dev/null 2>&1 &)\n"
    assert host.say(leave + "(setsid sleep 4711 &)\nsleep 0.2; echo begun") == "begun\n"
    wait_until(lambda: not running("sleep 4711"), "the end of what it left", 2)


def test_a_call_whose_time_is_up_ends_with_all_it_started(host: Host) -> None:
    began = time.monotonic()
    facts = host.call("trap '' TERM INT HUP; setsid sleep 4712 & (sleep 4712 &) ; wait", tool="hurried")
    assert "it took more than 1 s" in facts["error"]
    assert time.monotonic() - began < 4
    wait_until(lambda: not running("sleep 4712"), "the end of all", 1)


def test_a_call_ends_within_a_second_when_its_file_is_closed(host: Host) -> None:
    client = host.begin("setsid sleep 4713 & echo begun; sleep 4713")
    wait_until(lambda: len(running("sleep 4713")) > 1, "what it started")
    client.kill()
    client.wait()
    wait_until(lambda: not running("sleep 4713"), "the end of all", 1)


def test_output_is_cut_at_its_bound(host: Host) -> None:
    facts = host.call("yes")
    assert len(facts["output"]) == OUTPUT_BYTES
    assert f"it printed more than {OUTPUT_BYTES} bytes" in facts["error"]
    facts = host.call("yes >&2 | head -c 1; sleep 20", tool="hurried")
    assert len(facts["stderr"]) <= 64 << 10
    assert len(facts["error"]) < 1000


def test_a_process_outside_that_holds_its_output_open_does_not_keep_a_call(host: Host) -> None:
    """It is a process of the caller, which got the descriptor through a socket in the work folder."""
    host.call("true")
    holder = f"""
import array, os, socket, sys, time
os.chdir("{host.work()}")
s = socket.socket(socket.AF_UNIX)
s.bind("s")
s.listen()
print("bound", flush=True)
c, _ = s.accept()
_, given, _, _ = c.recvmsg(1, socket.CMSG_SPACE(8))
time.sleep(60)
"""
    hold = subprocess.Popen(
        ["setpriv", "--reuid", str(ALICE), "--regid", str(ALICE), "--clear-groups",
         "/usr/bin/python3", "-IS", "-c", holder], stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert hold.stdout
        assert hold.stdout.readline() == b"bound\n"
        began = time.monotonic()
        facts = host.call(
            python("""
import array, socket
s = socket.socket(socket.AF_UNIX)
s.connect("s")
s.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1, 2]))])
print("given", flush=True)
""")
        )
        assert facts["output"] == "given\n"
        assert facts["exit_status"] == 0
        assert time.monotonic() - began < 5
    finally:
        hold.kill()
        hold.wait()
        host.empty_work()


def test_arguments_come_as_they_were_given(host: Host) -> None:
    said = 'é 漢字 🦀 "quoted" \\ $HOME `x` \t\u2028 end'
    facts = host.call(f"cat <<'END'\n{said}\nEND")
    assert facts["output"] == said + "\n"
    assert host.call("ß" * (1 << 19), tool="count")["output"] == f"{1 << 20}\n"


def test_status_output_and_errors_of_a_call_are_reported(host: Host) -> None:
    facts = host.call("echo out; echo one >&2; echo two >&2; exit 7")
    assert (facts["output"], facts["stderr"], facts["exit_status"]) == ("out\n", "one\ntwo\n", 7)
    assert facts["error"] == "exit status 7: two"
    assert host.call("kill -9 $$")["exit_status"] == 137
    wrong = host.client(ALICE, "agents/alice/syscall/tool")
    body = json.dumps({"name": "sh", "arguments": {"script": ["x" * 1_000_000]}})
    assert wrong.communicate(body.encode(), 60)[0] == b""
    assert "script: [" in host.daemon.read("agents/alice/log.jsonl")
    assert len(host.daemon.read("agents/alice/log.jsonl")) < 100_000


def test_only_the_tool_sees_its_configured_environment(host: Host) -> None:
    client = host.begin("echo begun; sleep 4714; echo $API_KEY", tool="keyed")
    try:
        seen = as_user(
            host.daemon, BOB, "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\\0' '\\n'"
        ).stdout
        assert "4714" in seen, "that it runs may be seen"
        assert "the-key-of-the-tool" not in seen
    finally:
        client.kill()
        client.wait()
    assert host.say("echo $API_KEY", tool="keyed") == "the-key-of-the-tool\n"


def test_another_user_sees_nothing_of_a_call(host: Host) -> None:
    facts = host.call("echo mine")
    assert facts["output"] == "mine\n"
    host.say("echo mine")
    script = (
        "for f in agents/alice/requests/{n}/{{response,response.json,request}} tools/sh/call; do cat $f; done"
    )
    done = as_user(host.daemon, BOB, script.format(n=facts["request"]))
    assert done.stdout == ""
    assert as_user(host.daemon, ALICE, "cat tools/sh/call").stdout == "mine\n"
    assert "script" not in as_user(host.daemon, BOB, "cat scheduler/queue").stdout


def spans(host: Host, tools: list[str], n: int) -> list[tuple[int, int]]:
    """Run `n` calls at once. Return when each began and ended."""
    began: list[tuple[int, int]] = []
    clock = "date +%s%N"

    def one(i: int) -> None:
        start, end = host.say(f"{clock}; sleep 0.1; {clock}", tool=tools[i % len(tools)]).split()
        began.append((int(start), int(end)))

    together(*(lambda i=i: one(i) for i in range(n)))
    assert len(began) == n
    return began


def most_at_once(spans: list[tuple[int, int]]) -> int:
    return max(sum(start <= at <= end for start, end in spans) for at, _ in spans)


def test_the_limit_bounds_the_calls_that_run_at_once(host: Host) -> None:
    assert most_at_once(spans(host, ["few"], 20)) <= 3
    assert most_at_once(spans(host, ["one", "other"], 12)) == 1


def pending(host: Host, uid: int = ALICE) -> list[str]:
    return as_user(host.daemon, uid, "ls access/pending").stdout.split()


def test_no_tool_decides_for_its_caller(host: Host) -> None:
    """A call from inside a tool cannot decide either: it waits like all calls."""
    call = {"name": "grave", "arguments": {"script": f"touch {host.markers}/acted"}}
    within = f"""
mkdir /aios/agents/within
echo '{json.dumps(call)}' > /aios/agents/within/syscall/tool
sleep 0.3
for at in /aios/access /proc/self/root/aios/access /proc/1/cwd/../aios/access /aios/tools/../access; do
    for decision in $at/pending/*/decision; do echo allow > $decision; done
    for id in $(seq 1 500); do echo allow > $at/pending/$id/decision; done
done 2>/dev/null
echo done
"""
    assert host.say(within) == "done\n"
    [id] = pending(host)
    asked = as_user(host.daemon, ALICE, f"cat access/pending/{id}/request.json").stdout
    assert json.loads(asked)["tool"] == "grave"
    for script in ("cat {}/request.json", "echo allow > {}/decision", "chmod 777 {}", "ls {}"):
        assert as_user(host.daemon, BOB, script.format(f"access/pending/{id}")).returncode != 0
    assert as_user(host.daemon, ALICE, f"chmod 666 access/pending/{id}/decision").returncode != 0
    assert not (host.markers / "acted").exists()
    assert as_user(host.daemon, ALICE, f"echo allow > access/pending/{id}/decision").returncode == 0
    wait_until((host.markers / "acted").exists, "the act")
    wait_until(lambda: not pending(host), "its end")
    assert as_user(host.daemon, ALICE, "rmdir agents/within").returncode == 0


def test_calls_that_were_cancelled_while_they_waited_take_no_memory(host: Host) -> None:
    def resident() -> int:
        assert host.daemon.process
        pages = Path(f"/proc/{host.daemon.process.pid}/statm").read_text().split()[1]
        return int(pages) * 4096

    script = "x" * 3_000_000

    def once() -> None:
        fd = os.open(host.daemon.root / "tools/grave/call", os.O_RDWR)
        os.write(fd, json.dumps({"script": script}).encode())
        os.set_blocking(fd, False)
        with pytest.raises(BlockingIOError):
            os.read(fd, 1)
        os.close(fd)  # which cancels it

    for _ in range(5):
        once()
    before = resident()
    for _ in range(20):
        once()
    assert resident() - before < 40_000_000
    assert pending(host, 0) == []


def test_the_environment_of_a_tool_is_not_that_of_what_makes_its_cage(host: Host) -> None:
    """Otherwise the LD_PRELOAD of a user's tool would run as its caller outside the sandbox."""
    assert "done\n" in host.call("echo done", tool="loaded")["output"]
    assert not list(host.outside.iterdir())
    assert "NUL" in json.dumps(host.call("ls /mnt", tool="optioned"))


def test_a_call_that_has_no_memory_to_start_with_harms_no_other(host: Host) -> None:
    """On cgroup v1 the thread that starts calls was in such a group, and could not get out of it."""
    for number in range(3):
        script = f"""
            mkdir -p tools/tiny{number}
            cat > tools/tiny{number}/manifest <<END
description = "starved"
command = ["/bin/true"]
parameters = {{ type = "object" }}
memory_bytes = 1
END
            exec 3<>tools/tiny{number}/call; echo '{{}}' >&3; cat <&3; rmdir tools/tiny{number}"""
        done = as_user(host.daemon, BOB, script)
        assert done.returncode or "error" in done.stderr
        assert host.say("echo well") == "well\n"
    owner = host.daemon.privileged or host.daemon.process
    assert owner
    where = [(task / "cgroup").read_text() for task in Path(f"/proc/{owner.pid}/task").iterdir()]
    assert not [text for text in where if "/aios-tools/" in text]


def test_with_cgroup_v2_the_program_starts_in_its_group(tmp_path: Path) -> None:
    """The test needs no controllers of v2, because the machine may use them with v1."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    root = next((Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"), None)
    if root is None or not os.access(root, os.W_OK):
        pytest.skip("no cgroup v2 here")
    folder = root / f"aios-test-{os.getpid()}"
    folder.mkdir()
    group = Group({"pids": folder, "memory": folder})
    add_tool(tmp_path, "sh")
    try:
        cage = Cage(read(tmp_path / "sh/tool.toml"), None)
        arguments = json.dumps({"script": "sleep 4741 & wait"})
        call: Any = SimpleNamespace(program=None, given=arguments, uid=ALICE, groups=(ALICE,))
        process = popen(call, cage, None, group)
        sleeps = partial(running, "sleep 4741")
        wait_until(lambda: bool(sleeps()), "the program's child")
        inside = set(map(int, (folder / "cgroup.procs").read_text().split()))
        assert {process.pid, *sleeps()} <= inside
        process.kill()
        process.communicate(timeout=20)
        wait_until(group.remove, "the end of the group")
        with pytest.raises(FileNotFoundError):
            popen(call, cage, None, group)
        assert not running("aios-test-")
    finally:
        group.remove()


@pytest.fixture
def own_host(tmp_path: Path, random_llama: Path) -> Iterator[Host]:
    host = Host(tmp_path, random_llama).start()
    yield host
    host.daemon.clean()


def test_a_killed_daemon_takes_its_calls_with_it_and_runs_none_twice(own_host: Host) -> None:
    host, mark = own_host, own_host.markers
    write = "agents/alice/syscall/tool"

    def ask(script: str, tool: str) -> None:
        body = json.dumps({"name": tool, "arguments": {"script": script}})
        done = as_user(host.daemon, ALICE, f"cat > {write} <<'END'\n{body}\nEND")
        assert done.returncode == 0, done.stderr

    ask(f"echo x >> {mark}/started; setsid sleep 4715 & sleep 4715", "one")
    wait_until(lambda: (mark / "started").exists() and bool(running("sleep 4715")), "the first")
    ask(f"echo x >> {mark}/waited", "one")
    ask(f"echo x >> {mark}/asked", "grave")
    ids = sorted(
        int(name) for name in os.listdir(host.daemon.root / "agents/alice/requests") if name.isdigit()
    )
    assert host.daemon.process
    killed = host.daemon.process.pid
    host.daemon.kill()
    wait_until(lambda: not running("sleep 4715"), "the end of what ran", 2)
    host.daemon.start(ready=False)
    wait_until((mark / "waited").exists, "the call that had waited")
    at = "agents/alice/requests"
    assert host.daemon.read(f"{at}/{ids[0]}/state") == "failed\n"
    assert "interrupted" in host.daemon.read(f"{at}/{ids[0]}/error")
    wait_until(lambda: host.daemon.read(f"{at}/{ids[1]}/state") == "done\n", "the second")
    assert (mark / "started").read_text() == "x\n"
    assert (mark / "waited").read_text() == "x\n"
    assert not (mark / "asked").exists(), "it still waits for a decision"
    assert pending(host) == [str(ids[2])]
    assert as_user(host.daemon, ALICE, f"echo deny > access/pending/{ids[2]}/decision").returncode == 0
    assert "denied" in host.daemon.read(f"{at}/{ids[2]}/error")
    assert not (mark / "asked").exists()
    assert not [group for group in groups() if group.name.startswith(f"{killed}.")]
