"""The handler of models/NAME/tokenize."""

from __future__ import annotations

from aiosd.handlers.ontext import OnText
from aiosd.handlers.tokenize.spec import Tokenize


class TokenizeHandler(OnText):
    spec = Tokenize
