"""Read keys of an untrusted JSON object. A value of the wrong type or out of bounds raises BadRequest.

A missing key, or null, gives the default. Pure.
"""

from __future__ import annotations

from typing import Any

from aiosd.errors import BadRequest

Keys = dict[str, Any]


def only(raw: Keys, where: str, *known: str) -> None:
    """Refuse any other key, unless its value is null or empty, which says nothing."""
    for key, value in raw.items():
        if key not in known and (not where or value not in (None, "", [], {})):
            at = f"{where}: " if where else ""
            raise BadRequest(f"{at}unknown key {key[:40]!r}", f"keys are {', '.join(sorted(known))}")


def integer(raw: Keys, key: str, default: int, low: int, high: int) -> int:
    value = raw.get(key)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise BadRequest(f"{key} must be a whole number from {low} to {high}")
    return value


def number(raw: Keys, key: str, default: float | None, low: float, high: float) -> float | None:
    value = raw.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not low <= value <= high:
        raise BadRequest(f"{key} must be a number from {low:g} to {high:g}")
    return float(value)


def boolean(raw: Keys, key: str, default: bool) -> bool:
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise BadRequest(f"{key} must be true or false")
    return value


def string(raw: Keys, key: str, default: str) -> str:
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise BadRequest(f"{key} must be text")
    return value


def choice(raw: Keys, key: str, default: str, *choices: str) -> str:
    value = string(raw, key, default)
    if value not in choices:
        raise BadRequest(f"{key} must be one of {', '.join(choices)}")
    return value
