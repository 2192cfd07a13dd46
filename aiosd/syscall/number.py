"""Numbers that users write, into files and as commands. ASCII digits alone: int() takes much more."""

from __future__ import annotations

import re

from aiosd.errors import BadValue

WHOLE = re.compile(r"-?[0-9]{1,18}")


def whole(text: str, least: int, most: int, meant: str) -> int:
    """Raises BadValue, which says what was `meant`."""
    if not WHOLE.fullmatch(text) or not least <= int(text) <= most:
        raise BadValue(f"{meant} is a whole number from {least} to {most}, not {text[:40]!r}")
    return int(text)
