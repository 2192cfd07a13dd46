"""aios-privileged: the root process beside a daemon that has no privileges of its own.

It mounts the tree and passes the descriptor to the daemon, runs tools as their callers, and starts workers'
units. It knows no requests, reads no file of users and parses as little of their text as it can. It checks
the daemon's orders against what it has read and seen itself (aiosd.privilege.connection). It serves one
daemon at a time. When a daemon ends, its tools end, and the tree is mounted again for the next daemon. An
open waits meanwhile.
"""

from __future__ import annotations

import argparse
import logging
import os
import pwd
import signal
import socket
import stat
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import aiosd
from aiosd import __version__
from aiosd.cores.wire import Channel
from aiosd.errors import AiosError, ConfigError, Misconfigured, in_words
from aiosd.host import journal, mount
from aiosd.host.notify import notify
from aiosd.privilege import orders
from aiosd.privilege.administrator import Administrator
from aiosd.privilege.connection import DaemonConnection
from aiosd.privilege.peer import peer_of
from aiosd.privilege.users import Users
from aiosd.tools.run.workfolder import Work

log = logging.getLogger("aios-privileged")

STATE = "/var/lib/aios-privileged"
HANDED = "AIOS_PRIVILEGED_HANDED"  # by the program before an upgrade: descriptors of tree and socket, folder


def main() -> int:
    parser = argparse.ArgumentParser(prog="aios-privileged", description="Acts as root for aiosd.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="default /etc/aios/aiosd.toml")
    parser.add_argument("--socket", type=Path, metavar="PATH", default=Path("/run/aios/privileged"))
    parser.add_argument("--state", type=Path, metavar="DIR", default=os.environ.get("STATE_DIRECTORY", STATE))
    parser.add_argument("--user", default="aios", help="the daemon's user, by name or number")
    parser.add_argument("--version", action="version", version=f"aiosd {__version__}")
    options = parser.parse_args()
    journal.begin("info", "aios-privileged")
    try:
        Privileged(options.config, options.socket, options.state, uid_of(options.user)).serve()
    except (AiosError, OSError) as error:
        print(f"aios-privileged: {in_words(error)}", file=sys.stderr)
        return os.EX_CONFIG if isinstance(error, Misconfigured) else 1
    return 0


class Privileged:
    def __init__(self, file: Path | None, address: Path, state: Path, uid: int) -> None:
        """Raises Misconfigured."""
        self._address, self._uid = address, uid
        self._installed = installed()
        try:
            self._administrator = Administrator(file)
            self._folder = Path(self._administrator.config.daemon.mount)
            self._work = prepare(state, Path(self._administrator.config.daemon.state) / "work")
        except ConfigError as error:
            raise Misconfigured(str(error), error.hint) from None
        self._users = Users(state, Work(self._work))

    def serve(self) -> None:
        signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        with ExitStack() as undo:
            listener = None
            if handed := os.environ.pop(HANDED, ""):
                fuse, listening, at = handed.split(" ", 2)
                self._fuse, self._folder = int(fuse), Path(at)
                os.set_inheritable(self._fuse, False)
                listener = socket.socket(fileno=int(listening))  # Python's sockets are not inherited
                listener.set_inheritable(False)
            else:
                self._fuse = mounted(self._folder)
            undo.callback(lambda: mount.unmount(self._folder))
            listener = listener or self._listen()
            undo.enter_context(listener)
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
            notify(READY=1, STATUS=f"mounted {self._folder}")
            while (got := signal.sigwait(signals)) == signal.SIGHUP:
                self._administrator.reload()
            log.info("%s: stopping", signal.Signals(got).name)

    def _listen(self) -> socket.socket:
        """The socket gets its name when it accepts connections. Only the daemon may connect."""
        new = self._address.with_name(self._address.name + ".new")
        new.unlink(missing_ok=True)  # of one that was killed
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(str(new))
            os.chown(new, self._uid, -1)
            new.chmod(0o600)
            listener.listen(1)
            new.replace(self._address)
        except OSError as error:
            raise ConfigError(
                f"{self._address}: {error.strerror or error}", "name another place with --socket"
            ) from None
        return listener

    def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = listener.accept()
            pid, uid = peer_of(sock)
            if uid not in (0, self._uid):
                log.warning("user %d is not the daemon", uid)
                sock.close()
                continue
            log.info("the daemon is here (pid %d)", pid)
            try:
                self._move()
                channel = Channel(sock, orders.ORDERS)
                daemon = DaemonConnection(channel, self._administrator, self._users, self._work)
                daemon.serve(self._fuse)
                self._fuse = mount.replace(self._folder)
                log.info("the daemon is gone; who opens something below %s waits for the next", self._folder)
                daemon.end()
                if installed() != self._installed:
                    self._become_new(listener)
            except Exception:
                log.exception("the daemon's orders")
                logging.shutdown()
                os._exit(70)  # EX_SOFTWARE: tools die with it, and the service manager starts it again

    def _move(self) -> None:
        """Follow daemon.mount, which the daemon that is here now has read too."""
        before = self._folder
        try:
            folder = self._administrator.mount()
            if folder == before:
                return
            fuse = mounted(folder)
        except ConfigError as error:  # the daemon ends because of it
            log.error("the tree stays at %s: %s", before, error.explanation)
            return
        os.close(self._fuse)
        self._folder, self._fuse = folder, fuse
        self._administrator.reload()
        mount.unmount(before)
        if mount.is_guard(before):
            mount.unmount(before)
        notify(STATUS=f"mounted {folder}")
        log.info("the tree moved from %s to %s", before, folder)

    def _become_new(self, listener: socket.socket) -> None:
        """Go on as the program that an upgrade has installed. A daemon that connects meanwhile waits."""
        log.info("going on as the program that was installed meanwhile")
        logging.shutdown()
        for descriptor in (self._fuse, listener.fileno()):
            os.set_inheritable(descriptor, True)
        handed = f"{self._fuse} {listener.fileno()} {self._folder}"
        os.execve(sys.executable, sys.orig_argv, {**os.environ, HANDED: handed})


def mounted(folder: Path) -> int:
    """Mount a tree over an empty folder. Return its descriptor. Raises ConfigError."""
    for _ in range(2):  # a killed process may have left the next tree beneath the last
        mount.clear_stale(folder)
    mount.guard(folder)
    return mount.open_fuse(folder, shared=True)


def installed() -> tuple[int, int]:
    """Return what tells one installed package from another: dpkg replaces each file."""
    status = os.stat(aiosd.__file__)
    return status.st_ino, status.st_mtime_ns


def prepare(state: Path, former: Path) -> Path:
    """Make the folder of work folders, in a state folder that only root can change. Raises ConfigError.

    `former`: their place in the daemon's state folder, where earlier versions had them.
    """
    work = state / "work"
    try:
        state.mkdir(mode=0o711, parents=True, exist_ok=True)
        if not is_roots(state):
            raise ConfigError(
                f"{state} can be changed by others than root", f"chown root {state}; chmod 711 {state}"
            )
        state.chmod(0o711)  # users pass it to their work folders
        if not work.exists() and former.exists() and is_roots(former):
            former.rename(work)
            if not is_roots(work):  # another folder was put in its place meanwhile
                work.rename(state / "work.refused")
        work.mkdir(mode=0o711, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{state}: {error.strerror}", "name another folder with --state") from None
    return work


def is_roots(folder: Path) -> bool:
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and not status.st_uid and not status.st_mode & 0o022


def uid_of(user: str) -> int:
    try:
        return int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ConfigError(
            f"there is no user {user}", "systemd-sysusers makes it, or name one with --user"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
