"""Parse numbers in files and commands that users write. Only ASCII digits: int() accepts much more."""

from __future__ import annotations

import re

from aiosd.errors import BadValue

WHOLE = re.compile(r"-?[0-9]{1,18}")


def whole(text: str, least: int, most: int, meant: str) -> int:
    """Parse a whole number. `meant` names it in the error. Raises BadValue."""
    if not WHOLE.fullmatch(text) or not least <= int(text) <= most:
        raise BadValue(f"{meant} must be a whole number from {least} to {most}, not {text[:40]!r}")
    return int(text)
