"""aiosctl agent, which aios-agent@NAME.service runs: make an agent with files of /aios, then become its
program.

Needs no privileges: it does mkdir, some echo >, and exec, which --verbose shows.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import shlex
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from aiosd.cli import listing
from aiosd.client import Failed, Files
from aiosd.config import packages
from aiosd.config.packages import Package
from aiosd.errors import ConfigError

WRONG = 78  # EX_CONFIG of sysexits(3): a restart would not help, so the unit does not restart
SERVED_S = 30.0  # how long to wait for /aios
ENDED_S = 10.0  # how long to wait for the end of the agent's previous process
POLL_S = 0.1


def run(files: Files, options: argparse.Namespace) -> NoReturn:
    package = find(options.package)
    wait_until_served(files)
    claim(files, package)
    configure(files, package)
    execute(files, package)


def check(files: Files, options: argparse.Namespace) -> None:
    package = find(options.package)
    print(f"{package.name}: {package.description}")


def show(files: Files, options: argparse.Namespace) -> None:
    rows = []
    for name, folder in packages.names():
        row = {"name": name, "folder": str(folder)}
        try:
            row["description"] = packages.read(folder, trusted=True).description
        except ConfigError as error:
            row["error"] = str(error)
        rows.append(row)
    listing.show(options, rows, {"FOLDER": "folder", "DESCRIPTION": about})


def about(row: listing.Row) -> str:
    return f"wrong: {row['error']}" if "error" in row else str(row["description"])


def find(name: str) -> Package:
    try:
        return packages.find(name)
    except ConfigError as error:
        raise Failed(error.explanation, WRONG) from None


def wait_until_served(files: Files) -> None:
    end, told = time.monotonic() + SERVED_S, False
    while True:
        with suppress(OSError):  # as from a mount whose daemon has just ended
            if (files.root / "version").read_text():
                return
        if not told:
            print(f"aiosctl: waiting for aiosd at {files.root}", file=sys.stderr)
            told = True
        if time.monotonic() > end:
            raise Failed(f"{files.root}: aiosd did not start within {SERVED_S:.0f} s; systemctl status aiosd")
        time.sleep(POLL_S)


def claim(files: Files, package: Package) -> None:
    """Make the agent and bind it to this process, so that it ends with the process even after a failure.

    Take an existing agent if it is this user's own and has no process. If its process has just ended, wait
    until aiosd notices that.
    """
    folder = f"agents/{package.name}"
    end = time.monotonic() + ENDED_S
    while True:
        try:
            files.make(folder)
            break
        except FileExistsError:
            with suppress(FileNotFoundError):  # the agent ended meanwhile
                if free(files, folder, package, give_up=time.monotonic() > end):
                    break
            time.sleep(POLL_S)
    files.write(f"{folder}/pid", str(os.getpid()))


def free(files: Files, folder: str, package: Package, give_up: bool) -> bool:
    path = files.root / folder
    owner = path.stat().st_uid
    if owner != os.geteuid():
        raise Failed(
            f"{path} is an agent of {user_name(owner)}: rmdir it as that user or as root, "
            f"or give the folder {package.folder} another name"
        )
    pid = files.read(f"{folder}/pid").strip()
    if pid and give_up:
        raise Failed(f"{path} is the agent of process {pid}: end that process first")
    return not pid


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def configure(files: Files, package: Package) -> None:
    for name, text in package.settings.items():
        path = f"agents/{package.name}/{name}"
        try:
            if name == "context":
                with suppress(FileExistsError):
                    files.make(f"contexts/{text}")
            files.write(path, text)
        except OSError as error:
            raise Failed(f"{package.lines[name]}: {why(files, package, error)}") from None


def why(files: Files, package: Package, error: OSError) -> str:
    """The last line of the agent's log, which says more than an errno."""
    with suppress(OSError, IndexError, ValueError, KeyError):
        lines = (files.root / f"agents/{package.name}/log.jsonl").read_text().splitlines()
        return str(json.loads(lines[-1])["message"])
    return f"{error.filename}: {error.strerror}"


def execute(files: Files, package: Package) -> NoReturn:
    """Replace this process by the program. The pid stays the same, so the agent ends with the program."""
    root, state = files.root.absolute(), state_folder(package.name).absolute()
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    environment = {
        "AIOS": str(root),
        "AIOS_AGENT": str(root / "agents" / package.name),
        "AIOS_FOLDER": str(package.folder),
        "STATE_DIRECTORY": str(state),
    }
    given = " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())
    files.show(f"cd {shlex.quote(str(state))}; export {given}; exec {shlex.join(package.command)}")
    os.chdir(state)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and the program would inherit that
    try:
        os.execvpe(package.command[0], package.command, os.environ | environment)
    except OSError as error:  # for example a script without an interpreter
        raise Failed(f"{package.command[0]}: {error.strerror}", WRONG) from None


def state_folder(name: str) -> Path:
    """systemd's StateDirectory=, else a folder below the user's state folder."""
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given)
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(home) / "aios-agents" / name
