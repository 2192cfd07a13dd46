"""The handler of models/NAME/embed."""

from __future__ import annotations

from aiosd.handlers.embed.spec import Embed
from aiosd.handlers.ontext import OnText


class EmbedHandler(OnText):
    spec = Embed
