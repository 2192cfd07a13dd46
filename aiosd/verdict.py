"""Judge a configuration without starting, and tell `systemctl reload` how a reload ended.

The running daemon writes its verdict on a reload into the service's runtime folder. The reload command waits
there for it: a signal alone has no answer. Main thread only.
"""

from __future__ import annotations

import os
import pwd
import signal
import time
from pathlib import Path

from aiosd.config.config import Config, load
from aiosd.config.doubts import doubts
from aiosd.cores.models import check_folder, check_names
from aiosd.errors import AiosError, ConfigError
from aiosd.host.readable import Reader
from aiosd.privilege.worker_unit import workers_uid
from aiosd.reload import judge

DAEMON = "aios"  # the user of aiosd.service
WAIT_S, LOOK_S = 60.0, 0.02


def check(file: Path | None) -> tuple[list[str], list[str]]:
    """Return what is wrong in the configuration, and what is doubtful. Raises ConfigError.

    A file that is named may be root's draft. All else is read as the service reads it, as its user. This
    process becomes that user for good.
    """
    config, models_uid = load(file) if file else None, os.geteuid()
    if models_uid == 0:
        models_uid = workers_uid()
        become_daemon()
    return judged(config or load(None), models_uid)


def become_daemon() -> None:
    """Nothing changes on a machine without the service's user."""
    try:
        user = pwd.getpwnam(DAEMON)
    except KeyError:
        return
    os.setgroups(os.getgrouplist(DAEMON, user.pw_gid))
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)


def judged(config: Config, models_uid: int) -> tuple[list[str], list[str]]:
    wrong: list[str] = []
    try:
        check_names(config)
        judge(config)
    except AiosError as error:
        wrong.append(error.explanation)
    reader = Reader.of(models_uid)
    for name, entry in config.models.items():
        try:
            check_folder(Path(entry.path), reader)
        except AiosError as error:
            wrong.append(f"[models.{name}]: {error.explanation}")
    return wrong, doubts(config)


def verdict_file() -> Path | None:
    """None: the daemon does not run as a service."""
    folder = os.environ.get("RUNTIME_DIRECTORY")
    return Path(folder) / "reloaded" if folder else None


def write_verdict(refused: str) -> None:
    """The last reload was refused for this reason; empty: it was taken over."""
    if file := verdict_file():
        new = file.with_suffix(".new")
        new.write_text(refused)
        new.replace(file)


def ask_reload(pid: int) -> str:
    """Have the daemon reload; return why it refused, or nothing. Raises ConfigError."""
    file = verdict_file()
    if file is None:
        raise ConfigError("--reload is for the service: RUNTIME_DIRECTORY is not set", f"kill -HUP {pid}")
    file.unlink(missing_ok=True)
    try:
        os.kill(pid, signal.SIGHUP)
    except OSError as error:
        raise ConfigError(f"process {pid}: {error.strerror}", "systemctl status aiosd") from None
    end_s = time.monotonic() + WAIT_S
    while time.monotonic() < end_s:
        try:
            return file.read_text()
        except FileNotFoundError:
            time.sleep(LOOK_S)
    return f"the daemon has not answered within {WAIT_S:.0f} s; systemctl status aiosd shows how it stands"
