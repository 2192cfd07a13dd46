"""Read values of an untrusted JSON object. Raise BadRequest for a wrong type or a value out of bounds.

A missing or null key has its default. Pure.
"""

from __future__ import annotations

from typing import Any

from aiosd.errors import BadRequest

Keys = dict[str, Any]


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
