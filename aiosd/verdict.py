"""Judge a configuration without starting, and tell `systemctl reload` how a reload ended.

The running daemon writes its verdict on a reload into the service's runtime folder. The reload command waits
there for it: a signal alone has no answer. Main thread only.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from aiosd.config.config import Config
from aiosd.config.doubts import doubts
from aiosd.cores.models import check_folder, check_names
from aiosd.errors import AiosError, ConfigError
from aiosd.host.readable import Reader
from aiosd.reload import judge

WAIT_S, LOOK_S = 60.0, 0.02


def check(config: Config, workers_uid: int) -> tuple[list[str], list[str]]:
    """Return what is wrong in the configuration, and what is doubtful."""
    wrong: list[str] = []
    try:
        check_names(config)
        judge(config)
    except AiosError as error:
        wrong.append(error.explanation)
    reader = Reader.of(workers_uid)
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
