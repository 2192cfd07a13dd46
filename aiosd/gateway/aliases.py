"""Names that programs have for models, and what they mean here: --model-alias of aios-gateway(8)."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

NAME_MOST = 256  # characters
Alias = tuple[str, str]  # a pattern as of the shell, and the model or agent:NAME that is meant


def alias(text: str) -> Alias:
    """Parse PATTERN=NAME. Raises ValueError."""
    pattern, separator, name = text.partition("=")
    if not (pattern and separator and name):
        raise ValueError("an alias is PATTERN=NAME")
    return pattern, name


def meant(aliases: Sequence[Alias], model: object) -> object:
    """The model that a request means: the first pattern that fits counts."""
    if not isinstance(model, str) or len(model) > NAME_MOST:
        return model
    return next((name for pattern, name in aliases if fnmatchcase(model, pattern)), model)
