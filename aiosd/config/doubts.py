"""What a configuration says that is lawful and probably a mistake. Names are looked up on this machine."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Iterator

from aiosd.config.config import Config, DaemonConfig, SchedulerConfig, ToolsConfig

LOOKUP: dict[str, Callable[[str], object]] = {"user": pwd.getpwnam, "group": grp.getgrnam}


def doubts(config: Config) -> list[str]:
    """One sentence each, for the log and `aiosd --check`."""
    found = [
        f"[quota.{kind}.{name}]: this machine has no {kind} {name}, so the quota is nobody's;"
        f" getent {'passwd' if kind == 'user' else 'group'} lists the names"
        for kind, name in config.quotas
        if kind in LOOKUP and not name.isdecimal() and not known(kind, name)
    ]
    found += [
        f"[daemon] {key}: this machine has no group {name}, so only root {may}; groupadd {name}, and restart"
        for key, name, default, may in (
            ("group", config.daemon.group, DaemonConfig.group, "may use models and tools"),
            ("admin_group", config.daemon.admin_group, DaemonConfig.admin_group, "administers"),
        )
        if name not in ("", default) and not known("group", name)
    ]
    found += [
        f"[tools] system_users: this machine has no user {name}; getent passwd lists the names"
        for name in config.tools.system_users
        if not known("user", name)
    ]
    found += [f"{key}: {path} is not there" for key, path in missing(config)]
    defaults = [name for name, entry in config.models.items() if entry.default]
    if len(defaults) > 1:
        found.append(f"models {', '.join(defaults)} all have default = true; {defaults[0]} is the default")
    return found


def missing(config: Config) -> Iterator[tuple[str, str]]:
    """The files and folders that somebody named and that do not exist. Defaults need not exist."""
    scheduler, tools = config.scheduler, config.tools
    named = [
        ("[scheduler] policies", scheduler.policies, SchedulerConfig.policies),
        ("[tools] folder", tools.folder, ToolsConfig.folder),
        ("[tools] credentials", tools.credentials, ToolsConfig.credentials),
        ("[tools] notify", tools.notify, ToolsConfig.notify),
    ]
    named += [
        (f"[mcp.{name}] command", server.command[0], "")
        for name, server in config.mcp.items()
        if server.command
    ]
    for key, path, default in named:
        if path != default and path.startswith("/") and not os.path.lexists(path):
            yield key, path


def known(kind: str, name: str) -> bool:
    try:
        LOOKUP[kind](name)
    except KeyError:
        return False
    return True
