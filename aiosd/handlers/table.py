"""The kinds of syscall. A new kind is a folder beside this file and a row here (docs/adding-a-syscall.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from aiosd.handlers.embed.handler import EmbedHandler
from aiosd.handlers.embed.spec import Embed
from aiosd.handlers.llm.handler import ChatHandler
from aiosd.handlers.loop.handler import LoopHandler
from aiosd.handlers.parts import Parts
from aiosd.handlers.tokenize.handler import TokenizeHandler
from aiosd.handlers.tokenize.spec import Tokenize
from aiosd.handlers.tool.handler import ToolHandler
from aiosd.scheduler.handler import Handler
from aiosd.syscall.chat import Chat, Loop
from aiosd.syscall.spec import Spec
from aiosd.syscall.toolcall import ToolCall


class Kind(NamedTuple):
    spec: type[Spec]
    handler: Callable[[Parts], Handler]


KINDS: Mapping[str, Kind] = {
    "llm": Kind(Chat, ChatHandler),
    "loop": Kind(Loop, LoopHandler),
    "embed": Kind(Embed, EmbedHandler),
    "tokenize": Kind(Tokenize, TokenizeHandler),
    "tool": Kind(ToolCall, ToolHandler),
}
SPECS = {name: kind.spec for name, kind in KINDS.items()}
