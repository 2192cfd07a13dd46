"""Files that the daemon trusts: only root or the daemon's own user may be able to write them."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def check_owner(path: Path, status: os.stat_result) -> None:
    """Raises ValueError, with the command that mends it."""
    if status.st_uid not in (0, os.geteuid()):
        raise ValueError(f"{path} belongs to user {status.st_uid}; chown root it")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"{path} may be written by others; chmod go-w it")
