"""Numbers that users write into files and commands: ASCII digits only. int() accepts much more."""

from __future__ import annotations

import re

from aiosd.errors import BadValue

WHOLE = re.compile(r"-?[0-9]{1,18}")


def whole(text: str, least: int, most: int, meant: str) -> int:
    """Parse a whole number. Raises BadValue, which names what is `meant`."""
    if not WHOLE.fullmatch(text) or not least <= int(text) <= most:
        raise BadValue(f"{meant} must be a whole number from {least} to {most}, not {text[:40]!r}")
    return int(text)
