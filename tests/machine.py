"""A small Debian machine with systemd as PID 1 in a container, for boot tests.

    machine = Machine(root); machine.boot(); machine.run("alice", "cat /aios/status")

Its root comes from mmdebstrap, and is kept as a tar under build/. It has no network: what works in it works
offline. Commands enter the namespaces of its PID 1, and so need no service inside.

    BOOT_SUITE=trixie BOOT_PACKAGE=aiosd_VERSION_amd64.deb pytest tests/t5_systemd.py

boots another release than this machine's, with a package that was made there (its python3 is another).
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from tests.running import REPOSITORY, needs, wait_until

BASE = ["systemd", "systemd-sysv", "dbus", "procps", "apt"]
USERS = ("alice", "bob")
BOOT_S, STOP_S = 60.0, 30.0
BUILD_S = 1200.0
SUITE = os.environ.get("BOOT_SUITE") or platform.freedesktop_os_release()["VERSION_CODENAME"]
PACKAGE = os.environ.get("BOOT_PACKAGE")


class Machine:
    def __init__(self, root: Path) -> None:
        self.root = root
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._init = 0  # the machine's PID 1, as a pid outside the container

    def boot(self) -> None:
        with (self.root.parent / "console").open("ab") as console:
            self._nspawn = subprocess.Popen(
                # so that a killed test run also ends its machine
                ["setpriv", "--pdeathsig", "KILL", "systemd-nspawn", "--quiet", "-D", str(self.root),
                 f"--machine=aiosd-{os.getpid()}", "--boot", "--register=no", "--keep-unit",
                 "--private-network", "--bind=/dev/fuse", "--console=pipe"],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console,
            )  # fmt: skip
        wait_until(self._finds_init, "PID 1 of the machine", BOOT_S)
        wait_until(self._is_up, "the end of booting", BOOT_S)

    def power_off(self) -> None:
        if self._nspawn is None:
            return
        self.run("root", "systemctl poweroff", check=False)
        try:
            self._nspawn.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait()
            with suppress(ProcessLookupError):
                os.kill(self._init, signal.SIGKILL)  # it outlives systemd-nspawn; all others end with it
        self._nspawn = None

    def reboot(self) -> None:
        self.power_off()
        self.boot()

    def remove(self) -> None:
        self.power_off()
        subprocess.run(["rm", "-rf", "--one-file-system", self.root], check=True)

    def run(
        self, user: str, command: str, *, check: bool = True, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command as a user of the machine. In bash, as dash's echo says "I/O error" for every
        errno."""
        done = subprocess.run(
            self._enter(user, command),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s,
            start_new_session=True,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{user}: {command}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def start(self, user: str, command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._enter(user, command),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def out(self, user: str, command: str) -> str:
        return self.run(user, command).stdout.strip()

    def works(self, user: str, command: str) -> bool:
        return self.run(user, command, check=False).returncode == 0

    def _enter(self, user: str, command: str) -> list[str]:
        clean = [
            "env",
            "-i",
            "LC_ALL=C.UTF-8",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        ]
        shell = ["runuser", "-u", user, "--", "bash", "-c", command]
        return ["nsenter", "--all", "--target", str(self._init), "--", *clean, *shell]

    def _finds_init(self) -> bool:
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            raise AssertionError(f"systemd-nspawn ended:\n{(self.root.parent / 'console').read_text()}")
        own = os.readlink("/proc/self/ns/pid")
        for task in Path(f"/proc/{self._nspawn.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                if os.readlink(f"/proc/{child}/ns/pid") != own and _name(child) == "systemd":
                    self._init = int(child)
                    return True
        return False

    def _is_up(self) -> bool:
        state = self.run("root", "systemctl is-system-running", check=False).stdout.strip()
        return state in ("running", "degraded")


def _name(pid: str) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def missing() -> str:
    """Return why no machine can boot here, or an empty text."""
    if os.geteuid() != 0:
        return "not root"
    if not os.path.exists("/dev/fuse"):
        return "no /dev/fuse"
    for name in ("mmdebstrap", "systemd-nspawn", "dh", "dpkg-checkbuilddeps", "setpriv"):
        needs(name)
    if PACKAGE:
        return ""
    unmet = subprocess.run(["dpkg-checkbuilddeps"], cwd=REPOSITORY, capture_output=True, text=True)
    return f"{unmet.stderr.strip()}: ./setup --tests installs them" if unmet.returncode else ""


def base_root(packages: list[str]) -> Path:
    """Make a tar of a minimal root file system. The packages and what they need are not installed: their
    files lie in apt's cache, so apt installs them without a network.
    """
    digest = hashlib.sha256(" ".join([SUITE, *BASE, "/", *packages]).encode()).hexdigest()[:12]
    tar = REPOSITORY / "build" / f"boot-root-{digest}.tar"
    if tar.exists():
        return tar
    tar.parent.mkdir(exist_ok=True)
    new = tar.with_suffix(".new.tar")
    users = " && ".join(f'chroot "$1" useradd -m -s /bin/bash {user}' for user in USERS)
    fetch = f"apt-get install -y --no-install-recommends --download-only {' '.join(packages)}"
    cache = f'export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"; apt-get clean && {fetch}'
    alone = """echo 'APT::Install-Recommends "false";' > "$1"/etc/apt/apt.conf.d/10test"""
    command = [
        "mmdebstrap", "--variant=minbase", f"--include={','.join(BASE)}",
        f"--customize-hook={users}", f"--customize-hook={cache}",
        f"--customize-hook={alone}", "--skip=cleanup/apt",
        "--aptopt=Acquire::Retries 5", "--dpkgopt=force-unsafe-io",
        "--dpkgopt=path-exclude=/usr/share/locale/*", SUITE, str(new),
    ]  # fmt: skip
    if subprocess.run(command).returncode:  # a mirror may fail once
        subprocess.run(command, check=True)
    new.replace(tar)
    return tar


def depends(package: Path) -> list[str]:
    """The packages on which a .deb depends; of alternatives the first."""
    field = subprocess.run(["dpkg-deb", "-f", package, "Depends"], check=True, capture_output=True, text=True)
    names = {part.split("|")[0].split("(")[0].strip() for part in field.stdout.split(",")}
    return sorted(names)


def unpack(tar: Path, root: Path) -> None:
    root.mkdir(parents=True)
    subprocess.run(["tar", "-C", root, "--numeric-owner", "-xf", tar], check=True)


def build_package() -> Path:
    """Run `make deb`, which builds for the python3 of this machine's release."""
    if PACKAGE:
        return Path(PACKAGE).absolute()
    faulthandler.cancel_dump_traceback_later()  # the first build takes minutes
    began = time.time()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "deb"], cwd=REPOSITORY, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=BUILD_S,
    )  # fmt: skip
    assert done.returncode == 0, f"make deb failed:\n{done.stdout[-8000:]}"
    (package,) = [
        deb for deb in (REPOSITORY / "dist").glob("aiosd_*.deb") if deb.stat().st_mtime >= began - 1
    ]
    return package


def newer_package(package: Path, folder: Path, version: str) -> Path:
    """The same package with a higher version, in its control file and in `version`."""
    tree = folder / "newer"
    subprocess.run(["dpkg-deb", "-R", package, tree], check=True)
    control = tree / "DEBIAN/control"
    old = next(line.split()[1] for line in control.read_text().splitlines() if line.startswith("Version:"))
    control.write_text(control.read_text().replace(f"Version: {old}", f"Version: {version}"))
    (init,) = tree.glob("usr/lib/aios/lib/python3.*/site-packages/aiosd/__init__.py")
    init.write_text(init.read_text().replace(f'"{old}"', f'"{version}"'))
    for compiled in init.parent.glob("__pycache__/__init__.*"):
        compiled.unlink()
    target = folder / f"aiosd_{version}.deb"
    subprocess.run(["dpkg-deb", "-Znone", "-b", tree, target], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)
    return target
