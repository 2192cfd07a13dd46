"""The users that aios-privileged acts for: /proc has shown that a process of theirs writes to the tree.

The daemon says which user calls, and it may lie. So it names the process while the process waits in write(2).
/proc then tells the process's user and groups, and whether it has a file of the tree open to write. Such a
sighting holds for a week, because a request outlives its process: it waits in the queue, or for a restart.
System accounts are refused in any case. A uid under another name than the remembered one is another account
(aiosd.host.accounts): it has not been seen, and the former work folders are set aside. Any thread may call.
"""

from __future__ import annotations

import json
import logging
import os
import pwd
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiosd.errors import Denied, StoreFailed
from aiosd.host import disk, proc
from aiosd.host.accounts import Accounts
from aiosd.host.message_ids import NOTICE
from aiosd.tools.run.workfolder import Work

log = logging.getLogger(__name__)

NOBODY = 65534
LASTS_S = 7 * 86400
RENEW_S = 3600  # an older sighting is written again
USERS_MOST = 1 << 16
EACH_MOST = 16  # sightings of one user, each with other groups
LOGIN_DEFS = Path("/etc/login.defs")
UID_MIN = 1000  # of login.defs(5), where that file says nothing


@dataclass(slots=True)
class Sighting:
    groups: frozenset[int]
    at_s: float


class Users:
    """Implements aiosd.host.accounts.AccountEvents."""

    def __init__(self, state: Path, work: Work) -> None:
        """`state`: keeps the sightings and the names of users over a restart. Only root can change it."""
        self._file, self._work = state / "users.json", work
        self._lock = threading.RLock()
        self._seen: dict[int, list[Sighting]] = {}
        self._read()
        self._names_file = state / "accounts.json"
        self._names = {int(uid): str(name) for uid, name in read(self._names_file).items()}
        self._accounts = Accounts(self._names, self._remember, self)

    def replaced(self, uid: int, before: str, now: str) -> None:
        self._seen.pop(uid, None)
        self._write(time.time())
        self._work.set_aside(uid)
        log.log(NOTICE, "user %d is %s and was %s, whose work folders are set aside", uid, now, before)

    def _remember(self, uid: int, name: str) -> None:
        write(self._names_file, {**self._names, uid: name})

    def see(self, uid: int, pids: Iterable[int], device: bytes) -> bool:
        """Whether one of these processes is that user's and has a file of the device open to write.

        Raises StoreFailed.
        """
        for pid in pids:
            groups = writer(pid, uid, device)
            if groups is not None:
                with self._lock:
                    self._accounts.check(uid, fresh=True)  # the daemon may have seen another name already
                    self._note(uid, groups, time.time())
                return True
        return False

    def check(self, uid: int, groups: Collection[int], system_users: Sequence[str]) -> None:
        """Raises Denied: tools do not run as that user with these groups. Raises StoreFailed."""
        check_account(uid, system_users)
        since_s = time.time() - LASTS_S
        with self._lock:
            if uid in self._seen:
                self._accounts.check(uid)
            fresh = [sighting for sighting in self._seen.get(uid, ()) if sighting.at_s > since_s]
        if not fresh:
            days = LASTS_S // 86400
            raise Denied(
                f"no process of user {uid} has written to the tree for {days} days",
                "write a request as that user, then call again",
            )
        if not any(sighting.groups.issuperset(groups) for sighting in fresh):
            raise Denied(f"no process of user {uid} was seen with all of these groups", "log in again")

    def _note(self, uid: int, groups: frozenset[int], now: float) -> None:
        known = self._seen.setdefault(uid, [])
        same = next((sighting for sighting in known if sighting.groups == groups), None)
        if same and same.at_s > now - RENEW_S:
            return
        if same:
            same.at_s = now
        else:
            known.append(Sighting(groups, now))
        known.sort(key=lambda sighting: sighting.at_s)
        del known[:-EACH_MOST]
        self._write(now)

    # what is kept

    def _read(self) -> None:
        try:
            for uid, sightings in read(self._file).items():
                self._seen[int(uid)] = [Sighting(frozenset(groups), at_s) for groups, at_s in sightings]
        except (ValueError, TypeError) as error:
            log.error("%s: %s; a user is seen again at the next write", self._file, error)
            self._seen = {}

    def _write(self, now: float) -> None:
        fresh = {u: [s for s in known if s.at_s > now - LASTS_S] for u, known in self._seen.items()}
        last = sorted((max(s.at_s for s in known), uid) for uid, known in fresh.items() if known)[
            -USERS_MOST:
        ]
        self._seen = {uid: fresh[uid] for _, uid in last}
        rows = {uid: [[sorted(s.groups), s.at_s] for s in known] for uid, known in self._seen.items()}
        try:
            write(self._file, rows)
        except StoreFailed as error:
            log.error("%s; a restart loses which users were seen", error)


def read(file: Path) -> dict[str, Any]:
    """A table in JSON. It is empty if the file is missing or damaged, which the log says."""
    try:
        found = json.loads(file.read_bytes())
        if isinstance(found, dict):
            return found
        log.error("%s: it has no table, and is left aside", file)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.error("%s: %s; it is left aside", file, error)
    return {}


def write(file: Path, table: Mapping[int, object]) -> None:
    """Raises StoreFailed."""
    new = file.with_suffix(".new")
    try:
        new.write_text(json.dumps(table))
        new.chmod(0o600)
        new.replace(file)
    except OSError as error:
        raise disk.failed(file, error) from None


def check_account(uid: int, system_users: Sequence[str]) -> None:
    """Raises Denied for an account below the login range that the administrator has not named."""
    if uid >= login_min() and uid != NOBODY:
        return
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    if name not in system_users:
        hint = (
            f'use an account that people log in with, or system_users = ["{name}"] in [tools] of aiosd.toml'
        )
        raise Denied(f"tools do not run as {name}, which is a system account", hint)


def login_min() -> int:
    try:
        for line in LOGIN_DEFS.read_bytes().splitlines():
            words = line.split()
            if len(words) == 2 and words[0] == b"UID_MIN" and words[1].isdigit():
                return max(1, int(words[1]))
    except OSError:
        pass
    return UID_MIN


def writer(pid: int, uid: int, device: bytes) -> frozenset[int] | None:
    """The groups of a process of that user that has a file of the device open to write; else None."""
    try:
        with proc.opened(pid) as folder:
            facts = proc.facts(proc.content(folder, "status"))
            _, _, _, fsuid = map(int, facts[b"Uid"].split())
            *_, fsgid = map(int, facts[b"Gid"].split())
            if fsuid != uid or set(proc.files_on(folder, device)) <= {os.O_RDONLY}:
                return None
            return frozenset({fsgid, *map(int, facts[b"Groups"].split())})
    except (OSError, KeyError, ValueError):  # no such process, or no more
        return None


def holds(pid: int, path: str, device: bytes) -> bool:
    """Whether the process has a file of the device whose path ends so open to write and not to read."""
    try:
        with proc.opened(pid) as folder:
            return os.O_WRONLY in proc.files_on(folder, device, os.fsencode(path))
    except (OSError, KeyError, ValueError):
        return False
