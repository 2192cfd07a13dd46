"""A reason is for people: it names the thing, and is never Python's own notation."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiosd.cores.engine.folder import unreadable
from aiosd.errors import TooLong, in_words


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TooLong("9 tokens", "shorten it"), "9 tokens; shorten it"),
        (MemoryError(5), "there is not enough memory"),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (KeyError(), "an error without a message (KeyError)"),
        (ValueError("no"), "no (ValueError)"),
        (OSError("it did not connect within 9 s"), "it did not connect within 9 s"),
    ],
)
def test_any_error_has_words(error: BaseException, said: str) -> None:
    assert in_words(error) == said


def test_a_model_file_that_may_not_be_read_is_not_to_be_copied() -> None:
    denied = unreadable(Path("/m/config.json"), PermissionError(13, "Permission denied"))
    assert str(denied) == "/m/config.json: Permission denied"
    assert "chmod a+r /m/config.json" in denied.hint
    assert "copy" in unreadable(Path("/m"), OSError(5, "Input/output error")).hint
