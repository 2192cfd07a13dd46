"""TOML that people write into files: UTF-8 whatever the locale is, and errors that a person can use.

A TOMLDecodeError says that more text could make it right, and another ValueError that it could not.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any


def text(file: Path) -> str:
    """Raises OSError, ValueError."""
    return decoded(file.read_bytes())


def decoded(data: bytes) -> str:
    """Raises ValueError, which names the line."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        kind = tomllib.TOMLDecodeError if error.reason == "unexpected end of data" else ValueError
        raise kind(f"line {line}: byte 0x{data[error.start]:02x} is not UTF-8 text") from None


def parse(text: str) -> dict[str, Any]:
    """Raises ValueError."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # of int(), which has no other reason
        raise ValueError(f"a number has more than {sys.get_int_max_str_digits()} digits") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
