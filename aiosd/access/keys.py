"""API keys: who shows one acts as the user who made it, within the bounds that the user gave it.

Holds every key in memory and writes changes through to the store. A key itself is nowhere, only its SHA-256:
it has 256 random bits, so no slow hash is needed. Any thread may call; who adds or removes one holds
Permissions.making.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

from aiosd.database.store import Store
from aiosd.errors import Denied, StoreFailed

FORM = re.compile(r"aios-([0-9a-f]{12})-[0-9a-f]{64}")
ID_BYTES, SECRET_BYTES = 6, 32
NOBODYS = "0" * 64  # no SHA-256 of a key
USED_S = 3600  # the grain of the last use, so that a key in use is stored once an hour


@dataclass(slots=True)
class Key:
    id: str
    sha256: str  # of the whole key, in hexadecimal
    uid: int
    user: str  # its name when the key was made: the uid under another name is another account
    name: str
    created_s: int
    agent: str = ""  # the only one that it may use; empty: all of the user's
    agent_id: int = 0
    expires_s: int | None = None
    tokens_per_day: int | None = None
    used_s: int = 0  # the beginning of the hour of its last use; 0: never used


class Keys:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._by_id = {key.id: key for key in (Key(*row) for row in store.key_rows())}

    def ids(self) -> list[str]:
        return list(self._by_id)

    def find(self, id: str) -> Key | None:
        return self._by_id.get(id)

    def of(self, belongs: Callable[[Key], bool]) -> list[Key]:
        return [key for key in list(self._by_id.values()) if belongs(key)]

    def new(self) -> tuple[str, str]:
        """Return the id of a key that nobody has, and the key."""
        while (id := secrets.token_hex(ID_BYTES)) in self._by_id:
            pass
        return id, f"aios-{id}-{secrets.token_hex(SECRET_BYTES)}"

    def add(self, key: Key) -> None:
        self._store.add_key(asdict(key))
        self._by_id[key.id] = key

    def remove(self, key: Key) -> None:
        self._store.remove_key(key.id)
        del self._by_id[key.id]

    def judge(self, text: str, now_s: float) -> Key:
        """Return the key that this text is. Raises Denied.

        A wrong secret gets the answer of an unknown key, and takes as long.
        """
        key = self._by_id.get(id_of(text))
        if not hmac.compare_digest(digest(text), key.sha256 if key else NOBODYS) or key is None:
            raise Denied("there is no such key, or it was revoked", "aiosctl key new makes one")
        if key.expires_s is not None and now_s >= key.expires_s:
            raise Denied(f"key {key.id} has expired", "aiosctl key new makes another")
        return key

    def use(self, key: Key, now_s: float) -> None:
        """Note that the key was used, unless that is known of this hour. Works also on a full disk."""
        hour_s = int(now_s) // USED_S * USED_S
        if hour_s > key.used_s:
            key.used_s = hour_s
            with suppress(StoreFailed):
                self._store.save_key_use(key.id, hour_s)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def id_of(text: str) -> str:
    """Return the id in a key; empty: it is no key."""
    form = FORM.fullmatch(text)
    return form[1] if form else ""
