"""What a key is: the tree's keys/check tells it to everybody who has the key.

The front asks to know the user. The session asks again before it becomes that user, so that a front that was
taken over can act only as those who came to it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

KEY_MOST = 256  # characters
PREFIX = "aios-"
STOPPED = "aiosd is not running: systemctl start aiosd"


@dataclass(frozen=True, slots=True)
class KnownKey:
    id: str
    uid: int
    agent: str  # the only one that it may use; empty: all that its user may use
    tokens_per_day: int | None


def check(root: Path, key: str) -> KnownKey:
    """Raises OSError: the key is none, or the tree does not answer."""
    if len(key) > KEY_MOST:
        raise PermissionError(13, "the key is too long")
    with open(root / "keys/check", "r+b", buffering=0) as file:
        file.write(key.encode("utf-8", "replace"))
        known = json.loads(file.read() or b"{}")
    return KnownKey(
        str(known["id"]), int(known["uid"]), known.get("agent") or "", known.get("tokens_per_day")
    )


def runs(root: Path) -> bool:
    """Whether the tree is there. Without it an empty file system guards the folder."""
    return (root / "version").exists()
