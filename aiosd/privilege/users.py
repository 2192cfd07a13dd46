"""The users that aios-privileged acts for: /proc has shown that a process of theirs writes to the tree.

The daemon says which user calls, and it may lie. So it names the process while the process waits in write(2).
/proc then tells the process's user and groups, and whether it has a file of the tree open to write. Such a
sighting holds for a week, because a request outlives its process: it waits in the queue, or for a restart.
System accounts are refused in any case. Only the thread that receives orders uses this.
"""

from __future__ import annotations

import json
import logging
import os
import pwd
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aiosd.errors import Denied
from aiosd.host import proc

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
    def __init__(self, file: Path) -> None:
        """`file` keeps the sightings over a restart. Only root can change it."""
        self._file = file
        self._seen: dict[int, list[Sighting]] = {}
        self._read()

    def see(self, uid: int, pids: Iterable[int], device: bytes) -> bool:
        """Whether one of these processes is that user's and has a file of the device open to write."""
        for pid in pids:
            groups = writer(pid, uid, device)
            if groups is not None:
                self._note(uid, groups, time.time())
                return True
        return False

    def check(self, uid: int, groups: Collection[int], system_users: Sequence[str]) -> None:
        """Raises Denied: tools do not run as that user with these groups."""
        check_account(uid, system_users)
        since_s = time.time() - LASTS_S
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
            for uid, sightings in json.loads(self._file.read_bytes()).items():
                self._seen[int(uid)] = [Sighting(frozenset(groups), at_s) for groups, at_s in sightings]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, AttributeError, TypeError) as error:
            log.error("%s: %s; a user is seen again at the next write", self._file, error)
            self._seen = {}

    def _write(self, now: float) -> None:
        fresh = {u: [s for s in known if s.at_s > now - LASTS_S] for u, known in self._seen.items()}
        last = sorted((max(s.at_s for s in known), uid) for uid, known in fresh.items() if known)[
            -USERS_MOST:
        ]
        self._seen = {uid: fresh[uid] for _, uid in last}
        new = self._file.with_suffix(".new")
        try:
            new.write_text(
                json.dumps(
                    {uid: [[sorted(s.groups), s.at_s] for s in known] for uid, known in self._seen.items()}
                )
            )
            new.chmod(0o600)
            new.replace(self._file)
        except OSError as error:
            log.error("%s: %s; a restart loses which users were seen", self._file, error)


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
            if fsuid != uid or not any(writable for _, writable in proc.files_on(folder, device)):
                return None
            return frozenset({fsgid, *map(int, facts[b"Groups"].split())})
    except (OSError, KeyError, ValueError):  # no such process, or no more
        return None


def holds(pid: int, path: str, device: bytes) -> bool:
    """Whether the process has a file of the device open whose path ends so."""
    wanted = os.fsencode(path)
    try:
        with proc.opened(pid) as folder:
            for number, _ in proc.files_on(folder, device):
                with suppress(OSError):  # another thread may close it meanwhile
                    if os.fsencode(os.readlink(f"fd/{number}", dir_fd=folder)).endswith(wanted):
                        return True
    except (OSError, KeyError, ValueError):
        return False
    return False
