"""How long a model stays after its last request: 90, "5m", "2h", "0" or "always". Pure."""

from __future__ import annotations

import math
import re

from aiosd.errors import BadValue

ALWAYS = math.inf
LONGEST_S = 365 * 86400
FORM = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)(ms|s|m|h|d)?", re.ASCII)
UNITS = {"ms": 0.001, "": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
HINT = 'write 90, "30s", "5m", "2h", "0" or "always"'


def seconds(text: str) -> float:
    """Raises BadValue."""
    if text == "always":
        return ALWAYS
    found = FORM.fullmatch(text)
    if found is None or (value := float(found[1]) * UNITS[found[2] or ""]) > LONGEST_S:
        raise BadValue(f"{text[:40]!r} is not how long a model stays", HINT)
    return value


def shown(value: float) -> str:
    """300.0 → 5m"""
    if value == ALWAYS:
        return "always"
    for unit in ("d", "h", "m"):
        if value and value % UNITS[unit] == 0:
            return f"{value / UNITS[unit]:g}{unit}"
    return f"{value:g}s" if value else "0"
