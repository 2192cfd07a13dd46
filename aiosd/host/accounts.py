"""Accounts: whom a uid stands for. An account is a uid and a name together.

userdel and useradd may give a uid to another person. A uid that comes under another name than the remembered
one is another account; usermod -l looks the same. A missing name says nothing: the name service may be down.
The daemon and aios-privileged each remember names of their own. Any thread may call.
"""

from __future__ import annotations

import os
import pwd
import threading
import time
from collections.abc import Callable
from typing import Protocol

from aiosd.errors import StoreFailed
from aiosd.host import identity

PASSWD = "/etc/passwd"
AGAIN_S = 60.0  # a name is looked up again after this time, or when PASSWD has changed
CHECKED_MOST = 10_000


class AccountEvents(Protocol):
    def replaced(self, uid: int, before: str, now: str) -> None:
        """Take all from the former account. May be called twice. Raises AiosError: the new one waits."""
        ...


class Accounts:
    def __init__(
        self, names: dict[int, str], keep: Callable[[int, str], None], events: AccountEvents
    ) -> None:
        """`names`: the remembered ones; `keep` stores another."""
        self._names, self._keep, self._events = names, keep, events
        self._exempt = {0, identity.uid(), os.geteuid()}
        self._checked: dict[int, tuple[object, float]] = {}  # by uid: PASSWD as it was, and until when
        self._taking: dict[int, threading.RLock] = {}  # by uid: a name service may hang for one of them

    def check(self, uid: int, fresh: bool = False) -> None:
        """Before a user gets anything: remember a new account, and end the former one of its uid.

        `fresh`: look its name up in any case. Raises AiosError when that fails; the user then gets nothing.
        """
        if fresh:
            self._checked.pop(uid, None)
        if self._look(uid):
            self._take(uid)

    def replaced(self, uid: int) -> bool:
        """Whether the uid is another account than the remembered one. Ends nothing, and takes no lock."""
        return bool(self._look(uid)) and uid in self._names

    def unknown(self, uid: int) -> bool:
        return uid not in self._names

    def fresh(self, uid: int) -> bool:
        """Whether the uid's name was looked up lately. Never waits for the name service."""
        return uid in self._exempt or self._is_fresh(uid, passwd_version(), time.monotonic())

    def _is_fresh(self, uid: int, passwd: object, now: float) -> bool:
        checked = self._checked.get(uid)
        return checked is not None and checked[0] == passwd and now < checked[1]

    def _look(self, uid: int) -> str:
        """Return the uid's name if it is not the remembered one."""
        if uid in self._exempt:
            return ""
        passwd, now = passwd_version(), time.monotonic()
        if self._is_fresh(uid, passwd, now):
            return ""
        name = name_of(uid)
        if name and name != self._names.get(uid):
            return name
        if len(self._checked) >= CHECKED_MOST:
            self._checked.clear()
        self._checked[uid] = passwd, now + AGAIN_S
        return ""

    def _take(self, uid: int) -> None:
        with self._taking.setdefault(uid, threading.RLock()):
            name, before = self._look(uid), self._names.get(uid)  # another thread may have done it
            if not name:
                return
            if before is not None:
                self._events.replaced(uid, before, name)
            try:
                self._keep(uid, name)
            except StoreFailed:
                if before is None:  # who is new on a full disk may read, and is remembered later
                    return
                raise
            self._names[uid] = name


def passwd_version() -> object:
    try:
        at = os.stat(PASSWD)
    except OSError:
        return None
    return at.st_mtime_ns, at.st_ino


def name_of(uid: int) -> str:
    """Return the name in the user database; empty: there is none, or it cannot be asked."""
    try:
        return pwd.getpwuid(uid).pw_name.encode("utf-8", "backslashreplace").decode()
    except KeyError:
        return ""
