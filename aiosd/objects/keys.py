"""API keys: making, checking and revoking them, with the audit lines.

A key gives all rights of its user, so a process that has fewer makes none: a tool does not see keys/, and a
lent uid (subuid(5)) or one without a name has no account that a key could end with.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from aiosd.access.audit import Audit
from aiosd.access.caller import Caller
from aiosd.access.keys import Key, Keys, digest, id_of
from aiosd.access.permissions import EXECUTE, WRITE, Permission, may
from aiosd.agents.agents import Agents
from aiosd.config import duration
from aiosd.errors import BadRequest, BadValue, Denied, NotFound, OverQuota
from aiosd.host.accounts import name_of
from aiosd.host.subuids import owner
from aiosd.objects.making import Making, administers
from aiosd.syscall import keys
from aiosd.syscall.foreign import read_json

NAME_MAX = 64
TOKENS_MAX = 10**15
EXPIRES = 'write "30d", "12h", a date like "2030-12-31", or "never"'
AGAIN_S = 60.0  # one audit line in this time says how many keys a user tried in vain
TRIED_MAX = 1000  # users of whom that is known


@dataclass(frozen=True, slots=True)
class WantedKey:
    """What a user writes to keys/new."""

    name: str = ""
    agent: str = ""
    expires_s: int | None = None
    tokens_per_day: int | None = None


class KeyObjects:
    def __init__(self, making: Making, table: Keys, agents: Agents, audit: Audit, admins: int | None) -> None:
        """`admins`: the group that sees and revokes the keys of all users, as root does."""
        self._making, self._keys, self._agents = making, table, agents
        self._audit, self._admins = audit, admins
        self._lock = threading.Lock()
        self._tried: dict[int, tuple[float, int]] = {}  # by user: when a line was written, refused since then

    # making

    def check_new(self, caller: Caller, wanted: WantedKey) -> None:
        """Check that the caller may make such a key. Raises Denied, NotFound, OverQuota, StoreFull."""
        if caller.uid == 0:
            raise Denied("nobody acts as root by a key", "make it as the user who is to act")
        if owner(caller.uid) != caller.uid or not name_of(caller.uid):
            raise Denied(f"uid {caller.uid} is no account, with which a key could end", "make it as a user")
        most = self._making.limits.quotas.of(caller).keys
        if len(self._keys.of(lambda key: key.uid == caller.uid)) >= most:
            raise OverQuota(f"your quota of {most} keys is used up", "rmdir some of your keys")
        self._making.limits.check_disk(0)
        if wanted.agent:
            self._check_agent(caller, wanted.agent)

    def _check_agent(self, caller: Caller, name: str) -> None:
        """Check that the caller may use the agent, as the kernel would."""
        self._agents.get(name)
        at = self._making.permissions.get(f"/agents/{name}") or Permission(0, 0, 0o700)
        file = self._making.permissions.get(f"/agents/{name}/syscall/llm") or Permission(
            at.uid, at.gid, 0o600
        )
        if not may(caller, at, EXECUTE) or not may(caller, file, WRITE):
            raise Denied(f"agent {name} is not yours to use", "ask its owner for access")

    def make(self, caller: Caller, wanted: WantedKey) -> dict[str, Any]:
        """Make a key, and return it with its id: nobody can read it again."""
        with self._making.lock:
            self.check_new(caller, wanted)
            id, text = self._keys.new()
            agent_id = self._agents.get(wanted.agent).id if wanted.agent else 0
            key = Key(
                id, digest(text), caller.uid, name_of(caller.uid), wanted.name, int(time.time()),
                wanted.agent, agent_id, wanted.expires_s, wanted.tokens_per_day,
            )  # fmt: skip
            self._audit.granted("key made", caller, **said(key))
            self._keys.add(key)
        return {"id": id, "key": text}

    # checking

    def check(self, caller: Caller, text: str) -> dict[str, Any]:
        """Return whose key this is, and its bounds. Raises Denied."""
        now_s = time.time()
        try:
            key = self._keys.judge(text, now_s)
            if name_of(key.uid) != key.user:
                raise Denied(f"user {key.user}, whose key {key.id} is, has no account now", "make another")
        except Denied as error:
            self._note_refused(caller, id_of(text), str(error))
            raise
        self._keys.use(key, now_s)
        facts = {"id": key.id, "uid": key.uid, "user": key.user, "agent": key.agent or None}
        return facts | {"tokens_per_day": key.tokens_per_day, "expires": key.expires_s}

    def _note_refused(self, caller: Caller, id: str, why: str) -> None:
        """Write an audit line, unless this user got one within a minute: then the next line counts this."""
        person, now = owner(caller.uid), time.monotonic()
        with self._lock:
            told_s, refused = self._tried.pop(person, (-AGAIN_S, 0))
            told = now < told_s + AGAIN_S
            if len(self._tried) >= TRIED_MAX:
                del self._tried[next(iter(self._tried))]
            self._tried[person] = (told_s, refused + 1) if told else (now, 0)
        if not told:
            self._audit.noted("key refused", caller, key=id, why=why, more=refused)

    # seeing and revoking

    def seen_by(self, caller: Caller) -> list[str]:
        if administers(caller, self._admins):
            return self._keys.ids()
        return [key.id for key in self._keys.of(lambda key: key.uid == caller.uid)]

    def revoke(self, id: str, caller: Caller) -> None:
        with self._making.lock:
            key = self._keys.find(id)
            if key is None:
                raise NotFound(f"no key {id[:40]}")
            if key.uid != caller.uid and not administers(caller, self._admins):
                raise Denied(f"key {id} is not yours to revoke", "ask its owner or an administrator")
            self._keys.remove(key)
        self._audit.noted("key revoked", caller, **said(key))

    def agent_ended(self, agent_id: int) -> None:
        self._end(lambda key: key.agent_id == agent_id, "its agent ended")

    def account_ended(self, uid: int) -> None:
        self._end(lambda key: key.uid == uid, "its user was removed")

    def _end(self, belongs: Callable[[Key], bool], why: str) -> None:
        with self._making.lock:
            for key in self._keys.of(belongs):
                self._keys.remove(key)
                self._audit.noted("key revoked", None, **said(key), why=why)


def said(key: Key) -> dict[str, object]:
    """What the audit log says of a key."""
    facts = {"key": key.id, "uid": key.uid, "name": key.name, "agent": key.agent}
    return facts | {"expires": key.expires_s, "tokens_per_day": key.tokens_per_day}


def wanted(text: str) -> WantedKey:
    """Parse what was written to keys/new: JSON, or the name alone. Raises BadRequest, BadValue."""
    raw = read_json(text) if text.startswith("{") else {"name": text}
    keys.only(raw, "", "name", "agent", "expires", "tokens_per_day")
    name = keys.string(raw, "name", "")
    if len(name) > NAME_MAX or not name.isprintable():
        raise BadRequest(f"the name of a key has at most {NAME_MAX} characters, which can be printed")
    tokens = keys.integer(raw, "tokens_per_day", 0, 1, TOKENS_MAX) or None
    expires_s = expiry(keys.string(raw, "expires", "never"), time.time())
    return WantedKey(name, keys.string(raw, "agent", ""), expires_s, tokens)


def expiry(text: str, now_s: float) -> int | None:
    """Return when a key expires, in seconds since 1970; None: never. A date is the machine's local time and
    begins at midnight. Raises BadValue.
    """
    if text == "never":
        return None
    form = duration.FORM.fullmatch(text)
    try:
        if form and form[2]:
            at_s = now_s + float(form[1]) * duration.UNITS[form[2]]
        else:
            at_s = datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise BadValue(f"{text[:40]!r} is not when a key expires", EXPIRES) from None
    if at_s <= now_s:
        raise BadValue(f"{text[:40]!r} is in the past", EXPIRES)
    return int(at_s)
