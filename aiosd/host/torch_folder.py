"""Where `aiosctl engine install` puts another PyTorch, and whether a worker may import it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

FOLDER = Path("/var/lib/aios-engine")  # below it: KIND-VERSION-PYTHON, and the link CURRENT to one of them
CURRENT = "current"
PYTHON = f"py{sys.version_info.major}.{sys.version_info.minor}"  # compiled modules are for one


def preferred() -> Path | None:
    """What a worker is to import first: root's, or nothing."""
    at = FOLDER / CURRENT
    try:
        trusted = at.stat().st_uid == 0 and FOLDER.stat().st_uid == 0
        return at if trusted and os.readlink(at).endswith(PYTHON) else None
    except OSError:
        return None
