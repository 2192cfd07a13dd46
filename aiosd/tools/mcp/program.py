"""How the host of a session is started: the interpreter that every user can reach, and what it needs to see.

Imports nothing of the SDK: the daemon asks.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import aiosd
from aiosd.config.mcp import Server
from aiosd.errors import ConfigError
from aiosd.host import identity
from aiosd.tools.run.sandbox import WORK

PACKAGES = ("site-packages", "dist-packages")


@cache
def program() -> tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]:
    """Its command, the folders that it reads, its environment. Raises ConfigError."""
    if find_spec("mcp") is None:
        raise ConfigError("MCP servers need the MCP SDK", f"{sys.executable} -m pip install mcp")
    package = Path(aiosd.__file__).parent
    libraries = [path for path in map(Path, sys.path) if path.name in PACKAGES and path.is_dir()]
    base = Path(sys.base_prefix)
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    python = next((p for p in (base / "bin" / name, Path("/usr/bin", name)) if is_reached(p)), None)
    for path in (package, *libraries, python):
        if path is None or not is_reached(path):
            hint = "install aiosd and its Python below /usr or /opt"
            raise ConfigError(f"MCP servers need a Python that all users can reach, not {path or base}", hint)
    assert python is not None
    shown = [package, *libraries, *([base] if python.is_relative_to(base) else [])]
    read = tuple(str(path) for path in shown if not path.is_relative_to("/usr"))
    env = {"PYTHONPATH": ":".join(map(str, (package.parent, *libraries)))}
    return (str(python), "-P", "-S", "-m", "aiosd.tools.mcp.bridge"), read, env


def is_reached(path: Path) -> bool:
    """By everybody, by the modes of all that is on its way; of an ordinary user's daemon, by him."""
    if not identity.is_root():
        return os.access(path, os.R_OK)
    try:
        return all(step.stat().st_mode & 0o001 for step in (path, *path.parents))
    except OSError:
        return False


def about(server: Server) -> dict[str, Any]:
    """The first that the host of a session is told: what it is the host of."""
    facts: dict[str, Any] = {"env": dict(server.env), "roots": [WORK, *server.write]}
    if server.url:
        called = {"headers": dict(server.headers), "token_command": list(server.token_command)}
        return {**facts, **called, "url": server.url}
    return {**facts, "command": server.command}
