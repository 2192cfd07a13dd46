"""Who the daemon is to the users of its tree: root where it serves the machine, else who runs it.

A fact of the whole process, as its uid is: told once, by aiosd.__main__, before anything is built.
"""

from __future__ import annotations

import os

_for_root = False


def serve_for_root() -> None:
    """aios-privileged acts for this process, which has no privileges of its own."""
    global _for_root
    _for_root = True


def uid() -> int:
    return 0 if _for_root else os.geteuid()


def gid() -> int:
    return 0 if _for_root else os.getegid()


def is_root() -> bool:
    """Whether it can act as other users."""
    return uid() == 0
