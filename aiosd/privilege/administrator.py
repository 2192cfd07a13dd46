"""The administrator's configuration, tools and MCP servers, as aios-privileged has read them itself."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from pathlib import Path

from aiosd.config.config import Config, load
from aiosd.config.mcp import Server
from aiosd.errors import AiosError, ConfigError, Denied
from aiosd.tools.catalog import Tools
from aiosd.tools.manifest import Manifest

log = logging.getLogger(__name__)

NOWHERE = Path("/nonexistent")  # users' own tools are not read here
RELOAD_S = 1.0  # between two reloads, however often the daemon asks for one


class Administrator:
    """Reloaded by any thread; read by all."""

    def __init__(self, file: Path | None) -> None:
        """Raises ConfigError."""
        self._file = file
        self._lock = threading.Lock()
        self._read_s = 0.0
        self._read()

    def _read(self) -> None:
        self.config: Config = load(self._file)
        tools = self.config.tools
        self._tools = Tools(Path(tools.folder), NOWHERE, tools.network)
        self._read_s = time.monotonic()

    def reload(self) -> None:
        """A configuration with a mistake is logged, and the old one stays."""
        with self._lock:
            time.sleep(max(0.0, self._read_s + RELOAD_S - time.monotonic()))
            self._read_s = time.monotonic()
            try:
                self._read()
                log.info("configuration reloaded")
            except AiosError as error:
                log.error("not reloaded, the old configuration stays: %s", error.explanation)

    def tool(self, name: str) -> Manifest:
        """Raises Denied."""
        found = self._tool(name)
        if found is None:  # it may be new, because the daemon reloads first
            self.reload()
            found = self._tool(name)
        if found is None:
            raise Denied(f"the administrator has no tool {name}", "systemctl reload aiosd")
        return found

    def _tool(self, name: str) -> Manifest | None:
        tool = self._tools.find(name)
        return replace(tool.manifest, description="", parameters={}, judge=None) if tool else None

    def server(self, name: str) -> Server:
        """Raises Denied."""
        if name not in self.config.mcp:
            self.reload()
        try:
            return self.config.mcp[name]
        except KeyError:
            raise Denied(f"the administrator has no MCP server {name}", "systemctl reload aiosd") from None

    def mount(self) -> Path:
        """Read the configuration again, because the next daemon does. Raises ConfigError."""
        return Path(load(self._file).daemon.mount)

    def devices_table(self) -> str:
        """Read the configuration again, because the daemon may have reloaded it.

        While the file has a mistake, the configuration in force counts, as in the daemon, so models go on
        being loaded.
        """
        try:
            return load(self._file).engine.device_table
        except ConfigError:
            return self.config.engine.device_table
