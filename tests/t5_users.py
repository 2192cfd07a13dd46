"""Two real users on the real mount: privacy, sharing, and attempts to take another user's objects."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.running import Daemon, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.root]
ALICE, BOB, STAFF = 61001, 61002, 61100
MakeDaemon = Callable[..., Daemon]


def as_user(aios: Daemon, uid: int, script: str, *, groups: str = "") -> subprocess.CompletedProcess[str]:
    who = [
        "--reuid",
        str(uid),
        "--regid",
        str(uid),
        *(["--groups", groups] if groups else ["--clear-groups"]),
    ]
    return subprocess.run(
        ["setpriv", *who, "bash", "-c", script], cwd=aios.root, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def ada(aios: Daemon) -> Iterator[str]:
    """An agent of alice's."""
    done = as_user(aios, ALICE, "mkdir agents/ada && mkdir contexts/chat && echo chat > agents/ada/context")
    assert done.returncode == 0, done.stderr
    yield "agents/ada"
    (aios.root / "agents/ada").rmdir()
    (aios.root / "contexts/chat").rmdir()


def test_an_agent_belongs_to_its_maker(aios: Daemon, ada: str) -> None:
    status = (aios.root / ada).stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (ALICE, ALICE, 0o700)
    asked = as_user(aios, ALICE, f"echo 'Repeat: mango' > {ada}/syscall/llm; cat {ada}/syscall/llm")
    assert asked.stdout == "mango\n"
    assert "61001" in as_user(aios, BOB, f"echo paused > {ada}/ctl; cat status; stat -c %u {ada}").stdout


@pytest.mark.parametrize(
    "script",
    [
        "ls agents/ada",
        "cat agents/ada/state",
        "echo hi > agents/ada/syscall/llm",
        "cat agents/ada/requests/latest/response",
        "cat agents/ada/log.jsonl",
        "rmdir agents/ada",
        "chmod 777 agents/ada",
        "chown $UID agents/ada",
        "cat contexts/chat/messages.jsonl",
        "rmdir contexts/chat",
        "echo rr > scheduler/policy",
        "echo 5 > scheduler/quantum",
        "mkdir models/mine",
        "echo unload > models/tiny/ctl",
        "echo restart > workers/0/ctl",
        "mkdir agents/mine; echo chat > agents/mine/context",
    ],
)
def test_another_user_gets_nothing(aios: Daemon, ada: str, script: str) -> None:
    done = as_user(aios, BOB, script)
    as_user(aios, BOB, "rmdir agents/mine 2>/dev/null")
    assert done.returncode != 0
    assert done.stdout == ""
    assert "Permission denied" in done.stderr or "not permitted" in done.stderr


def test_a_context_named_in_a_request_is_checked_as_a_path_is(aios: Daemon, ada: str) -> None:
    request = '{"messages":[{"role":"user","content":"x"}],"context":"chat"}'
    done = as_user(
        aios, BOB, f"mkdir agents/b; echo '{request}' > agents/b/syscall/llm; echo $?; rmdir agents/b"
    )
    assert done.stdout == "1\n"
    assert "Permission denied" in done.stderr


def test_a_group_is_let_in_by_chgrp_and_chmod_and_out_again(aios: Daemon, ada: str) -> None:
    share = f"chgrp {STAFF} {ada}{{,/syscall/llm}}; chmod 750 {ada}; chmod 660 {ada}/syscall/llm"
    assert as_user(aios, ALICE, share, groups=str(STAFF)).returncode == 0
    asking = f"exec 3<>{ada}/syscall/llm; echo 'Repeat: fig' >&3 && cat <&3"
    assert as_user(aios, BOB, asking, groups=str(STAFF)).returncode != 0, "her context is not shared"
    assert as_user(aios, ALICE, f"echo > {ada}/context").returncode == 0
    assert as_user(aios, BOB, asking, groups=str(STAFF)).stdout == "fig\n"
    assert as_user(aios, BOB, asking).returncode != 0, "without the group"
    assert as_user(aios, ALICE, f"chmod 700 {ada}").returncode == 0
    assert as_user(aios, BOB, asking, groups=str(STAFF)).returncode != 0


def test_a_context_that_a_group_may_write_is_continued_by_its_members(aios: Daemon, ada: str) -> None:
    make = "mkdir contexts/shared agents/b; echo shared > agents/b/context"
    share = f"chgrp {STAFF} contexts/shared; chmod 770 contexts/shared"
    asking = "mkdir agents/c; echo shared > agents/c/context && exec 3<>agents/c/syscall/llm"
    asking += " && echo 'Repeat: fig' >&3 && cat <&3; s=$?; rmdir agents/c; exit $s"
    assert as_user(aios, ALICE, make).returncode == 0
    assert as_user(aios, BOB, asking, groups=str(STAFF)).returncode != 0, "not yet"
    assert as_user(aios, ALICE, share, groups=str(STAFF)).returncode == 0
    assert as_user(aios, BOB, asking, groups=str(STAFF)).stdout == "fig\n"
    assert "Permission denied" in as_user(aios, BOB, asking).stderr
    unshare = "chmod 700 contexts/shared; rmdir agents/b contexts/shared"
    assert as_user(aios, ALICE, unshare).returncode == 0


def test_a_model_takes_x_permission_to_use(aios: Daemon) -> None:
    asking = "exec 3<>models/tiny/llm && echo 'Repeat: fig' >&3 && cat <&3"
    assert as_user(aios, BOB, asking).stdout == "fig\n"
    (aios.root / "models/tiny").chmod(0o750)
    try:
        assert as_user(aios, BOB, asking).returncode != 0
        done = as_user(aios, BOB, "mkdir agents/b; echo hi > agents/b/syscall/llm; echo $?; rmdir agents/b")
        assert done.stdout == "1\n"
        assert "Permission denied" in done.stderr
    finally:
        (aios.root / "models/tiny").chmod(0o755)


def test_root_sees_all(aios: Daemon, ada: str) -> None:
    assert aios.read(f"{ada}/state") == "idle\n"
    assert aios.sh(f"ls {ada}/requests").returncode == 0


def test_the_queue_shows_that_others_wait_and_not_what_they_ask(aios: Daemon, ada: str) -> None:
    as_user(aios, ALICE, f"echo pause > {ada}/ctl; echo 'my secret' > {ada}/syscall/llm")
    seen = as_user(aios, BOB, "cat scheduler/queue").stdout
    assert "ada" in seen
    assert "secret" not in seen


def test_ioctl_gives_nothing_of_the_daemons_memory(aios: Daemon) -> None:
    """libfuse 2.9 answers an unhandled ioctl with an uninitialised buffer."""
    with (aios.root / "version").open() as file:
        for size in (8, 512, 4096, 16000):
            for direction in (1, 2, 3):
                data = bytearray(1 << 14)
                with pytest.raises(OSError, match="Inappropriate ioctl"):
                    fcntl.ioctl(file, direction << 30 | size << 16 | 0x7801, data, True)
                assert not any(data), f"{size} bytes in direction {direction}"


def test_root_of_a_user_namespace_is_the_user_outside(aios: Daemon, ada: str) -> None:
    """As in a rootless container: its files belong to the user outside, and other users' files stay
    protected."""
    script = f"id -u; mkdir agents/boxed && cat agents/boxed/state; cat {ada}/state; chown 5 agents/boxed"
    done = as_user(aios, BOB, f"unshare --user --map-root-user bash -c '{script}'; stat -c %u agents/boxed")
    as_user(aios, BOB, "rmdir agents/boxed")
    assert done.stdout == f"0\nidle\n{BOB}\n"
    assert "Permission denied" in done.stderr
    assert "chown" in done.stderr


HOLDER = """
import os, sys, time
fd = os.open(sys.argv[1], os.O_RDONLY)
print("held", flush=True)
sys.stdin.readline()
time.sleep(1.1)  # until the kernel's cached attributes expire
os.lseek(fd, 0, os.SEEK_END)  # the kernel asks again, about this descriptor
print(oct(os.fstat(fd).st_mode & 0o777), flush=True)
try:
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    print("opened", os.read(again, 4096))
except OSError as error:
    print(error.strerror)
"""


@contextmanager
def holding(aios: Daemon, path: str) -> Iterator[list[str]]:
    """Bob keeps a file open. Return what he sees and gets through the descriptor after the object has
    ended."""
    said: list[str] = []
    who = ["setpriv", "--reuid", str(BOB), "--regid", str(BOB), "--clear-groups"]
    with subprocess.Popen(
        [*who, sys.executable, "-c", HOLDER, aios.root / path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as bob:
        assert bob.stdin
        assert bob.stdout
        assert bob.stdout.readline() == "held\n"
        yield said
        bob.stdin.write("\n")
        bob.stdin.close()
        said += bob.stdout.read().splitlines()


@pytest.mark.parametrize("path", ["agents/ada/syscall/llm", "agents/ada/system"])
def test_an_open_descriptor_loses_a_permission_that_is_taken_back(aios: Daemon, ada: str, path: str) -> None:
    assert as_user(aios, ALICE, f"echo > {ada}/context; chmod 755 {ada}; chmod 644 {path}").returncode == 0
    with holding(aios, path) as said:
        revoke = f"chmod 600 {path}; echo 'Repeat: mango' > {ada}/syscall/llm; cat {ada}/syscall/llm"
        assert as_user(aios, ALICE, revoke).stdout == "mango\n"
    assert said == ["0o600", "Permission denied"]


@pytest.mark.parametrize("file", ["syscall/llm", "system", "log.jsonl"])
def test_a_descriptor_of_an_ended_agent_does_not_reach_the_next_of_its_name(aios: Daemon, file: str) -> None:
    """The daemon ends the agent without a system call, so the kernel keeps the inode."""
    assert as_user(aios, BOB, "mkdir agents/reused").returncode == 0
    with holding(aios, f"agents/reused/{file}") as said:
        as_user(aios, BOB, "sleep 60 & echo $! > agents/reused/pid; kill $!")
        wait_until(lambda: "reused" not in os.listdir(aios.root / "agents"), "its end")
        # after the kernel's cached attributes have expired
        make = "sleep 1.1; mkdir agents/reused && echo secret > agents/reused/system"
        made = as_user(
            aios, ALICE, f"{make}; chmod 644 agents/reused/log.jsonl; stat -c %u agents/reused/{file}"
        )
        assert made.stdout == f"{ALICE}\n", made.stderr
    assert said[1:] == ["Permission denied"]
    assert (
        as_user(aios, ALICE, f"stat -c %u agents/reused/{file}; rmdir agents/reused").stdout == f"{ALICE}\n"
    )


@pytest.mark.parametrize(("mode", "opened_again"), [("750", "fig\n"), ("705", "")])
def test_groups_that_decide_since_the_file_was_opened_are_not_guessed(
    aios: Daemon, mode: str, opened_again: str
) -> None:
    asking = "echo 'Repeat: fig' >&3 && cat <&3"
    wait = f"exec 3<>models/tiny/llm; read; {asking}; exec 3<>models/tiny/llm; {asking}"
    try:
        with subprocess.Popen(
            ["setpriv", "--reuid", str(BOB), "--regid", str(BOB), "--groups", str(STAFF), "bash", "-c", wait],
            cwd=aios.root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as bob:  # fmt: skip
            wait_until(lambda: os.path.exists(f"/proc/{bob.pid}/fd/3"), "bob's open file")
            assert aios.sh(f"chgrp {STAFF} models/tiny; chmod {mode} models/tiny").returncode == 0
            answers, errors = bob.communicate("\n", timeout=30)
            assert answers == opened_again
            assert "Permission denied" in errors
    finally:
        aios.sh("chgrp 0 models/tiny; chmod 755 models/tiny")


def test_the_memory_of_open_files_is_bounded(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[quota]\nopen_bytes = 3000000\n").start()
    script = """
mkdir contexts/full; full=contexts/full/messages.jsonl
head -c 900000 /dev/zero | tr '\\0' x | sed 's/^/{"role":"user","content":"/;s/$/"}/' > $full
for n in {4..20}; do eval "exec $n<$full" || break; done
echo $n; exec 4<&-; until exec 4<status; do sleep 0.1; done; echo open
"""
    done = as_user(daemon, BOB, script)
    assert "Disk quota exceeded" in done.stderr
    assert done.stdout == "8\nopen\n"
    assert as_user(daemon, BOB, "cat status contexts/full/messages.jsonl").returncode == 0, "nothing is left"


REFUSED = """
import errno, os, sys
body, seen = b'{"prompt": "' + b"x" * (1 << 20) + b'", "no such key": 1}', []
for i in range(200):
    file = os.open(sys.argv[1], os.O_WRONLY)
    try:
        for at in range(0, len(body), 1 << 17):
            os.write(file, body[at : at + (1 << 17)])
    except OSError as error:
        seen.append(errno.errorcode[error.errno])
    try:
        os.close(file)
    except OSError:
        pass
print(seen[0], seen[-1], len(seen), seen.count("EINVAL") < 100)
"""


def test_writes_that_are_refused_cost_their_user_and_nobody_else(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("[quota]\nwriting_ms_per_minute = 300\n").start()
    for parent in [daemon.root.parent, *daemon.root.parents][:4]:
        parent.chmod(0o755)
    for uid, name in ((ALICE, "ada"), (BOB, "bo")):
        done = as_user(
            daemon, uid, f"mkdir agents/{name}; echo '{{\"max_tokens\": 2}}' > agents/{name}/params.json"
        )
        assert done.returncode == 0, done.stderr
    (daemon.root.parent / "refused.py").write_text(REFUSED)
    done = as_user(daemon, ALICE, f"/usr/bin/python3 {daemon.root.parent}/refused.py agents/ada/syscall/llm")
    assert done.stdout == "EINVAL EAGAIN 200 True\n", done.stderr
    assert "ms of the processor" in as_user(daemon, ALICE, "tail -1 refused.jsonl").stdout
    reading = as_user(daemon, ALICE, "cat agents/ada/syscall/llm")
    assert "Resource temporarily unavailable" in reading.stderr, "no older answer is read for the refused one"
    asked = as_user(daemon, BOB, "echo x > agents/bo/syscall/llm && cat agents/bo/syscall/llm")
    assert asked.returncode == 0, asked.stderr
    assert not asked.stderr
