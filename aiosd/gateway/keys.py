"""What a key is: the tree's keys/check tells it to everybody who has the key.

The front asks to know the user. The session asks again before it becomes that user, so that a front that was
taken over can act only as those who came to it.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import re
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path

from aiosd.gateway.refused import HttpRefused

PREFIX = "aios-"
FORM = re.compile(r"aios-([0-9a-z]{1,64})-[0-9a-z]{1,128}")
CHECKED_S = 1.0  # that a key is taken for good: a revoked one works no longer
KNOWN_MOST = 4096
WRONG_ID_MOST, WRONG_MOST = 10, 300  # wrong secrets of one id, and of all, in a minute: each costs the daemon
MINUTE_S = 60.0
STOPPED = "aiosd is not running: systemctl start aiosd"


@dataclass(frozen=True, slots=True)
class KnownKey:
    id: str
    uid: int
    agent: str  # the only one that it may use; empty: all that its user may use
    tokens_per_day: int | None


class NoSuchKey(PermissionError):
    """There is no key with this id."""


def check(root: Path, key: str) -> KnownKey:
    """Raises OSError: the key is none, or the tree does not answer."""
    form = FORM.fullmatch(key)
    if not form:
        raise NoSuchKey(errno.EACCES, "there is no such key")
    try:  # this costs little; a wrong key that is written costs the writer a part of his quota
        os.lstat(root / "keys" / form[1])
    except FileNotFoundError:
        if not runs(root):
            raise OSError(errno.ESHUTDOWN, STOPPED) from None
        raise NoSuchKey(errno.EACCES, "there is no such key") from None
    with open(root / "keys/check", "r+b", buffering=0) as file:
        file.write(key.encode())
        known = json.loads(file.read() or b"{}")
    return KnownKey(
        str(known["id"]), int(known["uid"]), known.get("agent") or "", known.get("tokens_per_day")
    )


def runs(root: Path) -> bool:
    """Whether the tree is there. Without it an empty file system guards the folder."""
    return (root / "version").exists()


class KeyRing:
    """The keys that were right lately, and how many were wrong. Only the front has one, on its event loop."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._right = OrderedDict[bytes, tuple[float, KnownKey]]()  # by digest; the last is the newest
        self._wrong, self._minute_s = Counter[str](), 0.0

    async def of(self, word: str) -> KnownKey:
        """Raises HttpRefused."""
        if not word:
            reason = "no key: send Authorization: Bearer KEY, from aiosctl key new"
            raise HttpRefused(401, reason, "missing_key")
        form, now, digest = FORM.fullmatch(word), time.monotonic(), hashlib.sha256(word.encode()).digest()
        if not form:
            raise invalid()
        known = self._right.get(digest)
        if known and known[0] > now - CHECKED_S:
            return known[1]
        if not known:
            self._bound(form[1], now)
        try:
            key = await asyncio.to_thread(check, self._root, word)
        except PermissionError as error:
            self._right.pop(digest, None)
            if not isinstance(error, NoSuchKey):
                self._wrong[form[1]] += 1
            raise invalid() from None
        except (OSError, ValueError, KeyError) as error:
            why = str(error) if await asyncio.to_thread(runs, self._root) else STOPPED
            raise HttpRefused(503, f"the key cannot be checked: {why}") from None
        self._right[digest] = now, key
        self._right.move_to_end(digest)
        while len(self._right) > KNOWN_MOST:
            self._right.popitem(last=False)
        return key

    def _bound(self, id: str, now: float) -> None:
        """Bound what wrong keys cost. A key that was right lately does not come here."""
        if now > self._minute_s + MINUTE_S:
            self._wrong, self._minute_s = Counter(), now
        if self._wrong[id] >= WRONG_ID_MOST or self._wrong.total() >= WRONG_MOST:
            wait_s = int(self._minute_s + MINUTE_S - now) + 1
            raise HttpRefused(429, "too many wrong keys lately", "wrong_keys", retry_s=wait_s)


def invalid() -> HttpRefused:
    return HttpRefused(401, "this key is none, or was revoked; aiosctl key new makes one", "invalid_key")
