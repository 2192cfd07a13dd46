"""What this machine says of itself and hears of the daemon: names are bytes, and lines end at newlines."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from aiosd.errors import BadValue, ConfigError, StoreFailed, StoreFull, shown
from aiosd.host import disk, journal, mount, proc, subuids, toml
from aiosd.host.notify import notify
from aiosd.host.turns import Turns
from aiosd.tools.run.cgroups import Cgroups
from tests.running import REPOSITORY

NAMES = (b"caf\xe9", b"two  words", b"new\nline", b"back\\slash\\040", "ünï-日本".encode(), "😀".encode(),
         b"tab\tcr\rvt\x0bff\x0c", "line\u2028next\x85".encode(), b"#hash")  # fmt: skip
ESCAPED = re.compile(rb"[\\ \t\n#]")


def octal(byte: re.Match[bytes]) -> bytes:
    return b"\\%03o" % byte[0][0]


def table(folder: Path, *mounts: tuple[bytes, bytes]) -> Path:
    """A /proc/PID of a process with these mounts, as the kernel writes it."""
    lines = (b"none /mnt/" + ESCAPED.sub(octal, name) + b" " + rest + b" 0 0\n" for name, rest in mounts)
    (folder / "mounts").write_bytes(b"".join(lines))
    return folder


def test_a_mount_has_any_name(tmp_path: Path) -> None:
    found = list(proc.mounts(table(tmp_path, *((name, b"tmpfs rw,size=1") for name in NAMES))))
    assert [bytes(mount.folder) for mount in found] == [b"/mnt/" + name for name in NAMES]
    assert {(mount.kind, mount.options) for mount in found} == {("tmpfs", ("rw", "size=1"))}


def test_a_name_is_never_another_mount(tmp_path: Path) -> None:
    """A user's own mount would otherwise say where the control groups are."""
    forged = b"x\x0bnone /tmp cgroup2 rw\x85cgroup2 /tmp cgroup2 rw 0 0"
    found = list(proc.mounts(table(tmp_path, (forged, b"fuse.x rw"))))
    assert [mount.kind for mount in found] == ["fuse.x"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_mounted_in_a_folder_is_seen_without_asking_it(name: bytes, tmp_path: Path) -> None:
    folder = Path("/mnt") / os.fsdecode(name)
    assert proc.holds_mounts(folder, table(tmp_path, (name, b"tmpfs rw")))
    assert proc.holds_mounts(folder, table(tmp_path, (name + b"/deep down", b"tmpfs rw")))
    assert not proc.holds_mounts(
        folder, table(tmp_path, (name + b"x", b"tmpfs rw"), (b"x" + name, b"tmpfs rw"))
    )


def test_control_groups_are_found_among_foreign_names(tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"v2 \xe9")
    own = root / os.fsdecode(b"own \xe9:x")
    own.mkdir(parents=True)
    (root / "cgroup.controllers").write_text("memory pids\n")
    named = bytes(root).replace(b" ", b"\\040")
    (tmp_path / "mounts").write_bytes(b"x /m\xe9 tmpfs rw 0 0\ncgroup " + named + b" cgroup2 rw 0 0\n")
    (tmp_path / "cgroup").write_bytes(b"1:name=systemd:/\n0::/" + own.name.encode("utf-8", "surrogateescape"))
    found = Cgroups()
    found.find(tmp_path)
    assert set(found._parents.values()) == {root / "aios-tools"}


def test_the_name_of_a_process_is_no_field_of_it() -> None:
    before = Path("/proc/self/comm").read_bytes()
    plain = proc.stat(os.getpid())
    try:
        Path("/proc/self/comm").write_bytes(b"\xe9) Z 1 (\n")
        assert proc.stat(os.getpid())[0] in "RS"
        assert proc.stat(os.getpid())[19] == plain[19], "when it started"
    finally:
        Path("/proc/self/comm").write_bytes(before)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_no_mount_and_neither_is_what_is_not_there(name: bytes, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(name)
    assert not mount.is_mounted(folder)
    folder.mkdir()
    assert not mount.is_mounted(folder)
    (tmp_path / "link").symlink_to(folder)
    assert not mount.is_mounted(tmp_path / "link")
    assert not mount.is_mounted(Path("/"))


def test_a_link_to_a_mount_is_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc")
    assert mount.is_mounted(tmp_path / "link")


def test_what_cannot_be_looked_at_is_an_error_and_no_answer(tmp_path: Path) -> None:
    """Else a tool would lose /aios, and a second daemon would be let onto the mount."""
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        mount.is_mounted(tmp_path / "loop")
    with pytest.raises(ConfigError, match="symbolic links"):
        mount.clear_stale(tmp_path / "loop")


def test_a_mount_of_somebody_elses_is_left_alone() -> None:
    with pytest.raises(ConfigError, match="/proc is mounted already"):
        mount.clear_stale(Path("/proc"))
    assert mount.is_mounted(Path("/proc"))


@pytest.mark.parametrize("name", NAMES)
def test_a_service_manager_and_the_journal_hear_any_name(
    name: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.fsdecode(name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0aiosd-names-{os.getpid()}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@aiosd-names-{os.getpid()}")
        notify(STATUS=f"serving {path}", READY=1)
        said = manager.recv(4096)
    assert said.startswith(b"STATUS=serving ")
    assert said.endswith(b"\nREADY=1")
    assert said.count(b"\n") == 1, "a name brings no field of its own"
    assert said.decode()
    record = logging.LogRecord("x", logging.INFO, "x", 1, "%s", (path,), None)
    assert str(journal.fields(record)["MESSAGE"]).encode()


def test_what_is_no_utf8_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "file.toml"
    file.write_bytes(b"a = 1\nb = 'caf\xe9'\n")
    with pytest.raises(ValueError, match="line 2: byte 0xe9 is not UTF-8 text") as wrong:
        toml.text(file)
    assert not isinstance(wrong.value, tomllib.TOMLDecodeError)
    with pytest.raises(tomllib.TOMLDecodeError):
        toml.decoded("é".encode()[:1])  # the rest may come


@pytest.mark.parametrize(
    ("text", "said"),
    [("a = " + "9" * 5000, "more than 4300 digits"), ("a = " + "[" * 9999, "nested too deep")],
)
def test_toml_that_python_cannot_take_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        toml.parse(text)


@pytest.mark.parametrize(
    ("number", "kind", "remedy"),
    [
        (errno.ENOSPC, StoreFull, "free some space"),
        (errno.EDQUOT, StoreFull, "free some space"),
        (errno.EIO, StoreFailed, "dmesg"),
        (errno.EROFS, StoreFailed, "writable"),
        (errno.EACCES, StoreFailed, "modes"),
        (errno.ELOOP, StoreFailed, "look at the folder"),
    ],
)
def test_an_error_of_the_disk_has_the_remedy_of_its_own(
    number: int, kind: type[StoreFailed], remedy: str
) -> None:
    found = disk.failed(Path("/state"), OSError(number, os.strerror(number)))
    assert type(found) is kind
    assert str(found) == f"/state: {os.strerror(number)}"
    assert remedy in found.hint


def test_a_database_that_cannot_be_written_is_not_called_full(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for a disk that fails: SQLite has an I/O error of both."""
    script = """
import resource, sys
from pathlib import Path
from aiosd.database.store import Store
store = Store(Path(sys.argv[1]), {})
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    while True:
        store.save_model("m", "x" * 9999)
except Exception as error:
    print(type(error).__name__, error.explanation)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout.startswith(f"StoreFailed {tmp_path}: disk I/O error; the disk is failing"), done


@pytest.mark.parametrize(
    "text", ["\x1b[2J\x1b]0;x\x07", "a\rb", "a\nERROR forged", "\x9b1m", "\u202egnp", "\udce9"]
)
def test_nothing_in_a_log_is_obeyed_by_a_terminal(text: str) -> None:
    record = logging.LogRecord("x", logging.ERROR, "x", 1, "said %s", (text,), None)
    line = journal.LINE.format(record)
    assert line.isprintable()
    assert line.startswith("ERROR x: said ")
    assert str(journal.fields(record)["MESSAGE"]).isprintable()
    assert str(BadValue(f"no {text}")).isprintable()
    try:
        raise ValueError(text)
    except ValueError:
        record.exc_info = sys.exc_info()
    assert all(line.isprintable() for line in journal.LINE.format(record).split("\n"))
    assert shown("Zoë – 日本 😀") == "Zoë – 日本 😀"


def test_the_kernels_own_lines_count_before_those_that_hold_names_of_users() -> None:
    data = b"pos:\t0\nflags:\t0100002\nmnt_id:\t7\n0: x\rmnt_id:\t8\nmnt_id:\t9\nno key\n"
    assert (proc.facts(data)[b"mnt_id"], proc.facts(data)[b"flags"]) == (b"7", b"0100002")


def test_an_open_file_is_on_the_device_of_its_mount(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        number = proc.mount_id(file.fileno())
        process = subprocess.Popen(["sleep", "1000"], stdout=file)  # it has few files open
    with process, proc.opened(process.pid) as folder:
        device = proc.devices_of_mounts(folder)[str(number).encode()]
        assert os.O_WRONLY in proc.files_on(folder, device)
        assert list(proc.files_on(folder, device, os.fsencode(tmp_path / "file"))) == [os.O_WRONLY]
        assert not list(proc.files_on(folder, device, b"/another"))
        process.kill()
    with pytest.raises(FileNotFoundError):
        proc.device_of(tmp_path / "none")


def test_users_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also one who has many uids."""
    (tmp_path / "subuid").write_text("1000:200000:10\n")
    monkeypatch.setattr(subuids, "_subuids", subuids.SubUids(tmp_path / "subuid"))
    turns = Turns[str]()
    assert all(turns.put(uid, f"a{uid}", most=3) for uid in (1000, 200001, 200002))
    assert not turns.put(200003, "too many", most=3)
    assert turns.put(1001, "b", most=3)
    assert [turns.get() for _ in range(4)] == ["a1000", "b", "a200001", "a200002"]
