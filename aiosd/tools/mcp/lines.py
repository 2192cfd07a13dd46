"""How the host of a session speaks to the daemon: one JSON object a line, on its standard output."""

from __future__ import annotations

import json
import sys
from typing import Any


def say(line: dict[str, Any]) -> None:
    """Half characters of what a server said become `?`: the daemon takes none."""
    sys.stdout.buffer.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    sys.stdout.buffer.flush()
