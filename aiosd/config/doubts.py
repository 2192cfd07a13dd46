"""What a configuration says that is lawful and probably a mistake. Names are looked up on this machine."""

from __future__ import annotations

import grp
import pwd
from collections.abc import Callable

from aiosd.config.config import Config

LOOKUP: dict[str, Callable[[str], object]] = {"user": pwd.getpwnam, "group": grp.getgrnam}


def doubts(config: Config) -> list[str]:
    """One sentence each, for the log and `aiosd --check`."""
    found = [
        f"[quota.{kind}.{name}]: this machine has no {kind} {name}, so the quota is nobody's;"
        f" getent {'passwd' if kind == 'user' else 'group'} lists the names"
        for kind, name in config.quotas
        if kind in LOOKUP and not name.isdecimal() and not known(kind, name)
    ]
    defaults = [name for name, entry in config.models.items() if entry.default]
    if len(defaults) > 1:
        found.append(f"models {', '.join(defaults)} all have default = true; {defaults[0]} is the default")
    return found


def known(kind: str, name: str) -> bool:
    try:
        LOOKUP[kind](name)
    except KeyError:
        return False
    return True
