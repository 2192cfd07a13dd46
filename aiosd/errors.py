"""Domain errors of aiosd: each says what is wrong and what to do about it.

Any module raises them. Only aiosd/fs/ops.py turns them into an errno. No errno numbers and no I/O here;
imports nothing of aiosd.
"""

from __future__ import annotations

import copy
from typing import ClassVar

REASON_MAX = 300  # characters: a reason may quote what a hostile user wrote


def shown(text: str) -> str:
    """Text in one line that no terminal obeys: what cannot be printed is written as Python writes it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class AiosError(Exception):
    """`str(error)` is the reason; `hint` is the remedy, or empty. `code` is for programs."""

    code: ClassVar[str] = ""

    def __init__(self, reason: str, hint: str = "") -> None:
        reason = shown(reason)
        super().__init__(reason if len(reason) <= REASON_MAX else reason[:REASON_MAX] + "…")
        self.hint = hint

    def again(self) -> AiosError:
        """Return a copy to raise. A kept error that is raised twice would keep the frames of both callers."""
        fresh = copy.copy(self)
        return fresh.with_traceback(None)

    @property
    def explanation(self) -> str:
        return f"{self}; {self.hint}" if self.hint else str(self)


class ConfigError(AiosError):
    """The configuration cannot be used; the reason names file and line."""


class Misconfigured(ConfigError):
    """The daemon cannot start with this configuration, however often it is started."""


class BadRequest(AiosError):
    """The text or JSON of a request is malformed."""

    code = "invalid_request"


class BadValue(AiosError):
    """A control file does not take the value or command that was written."""


class TooBig(AiosError):
    """A request grew over its byte limit."""


class NotFound(AiosError):
    """A request names a model, agent, context or file that does not exist."""


class Exists(AiosError):
    """The name is taken."""


class NotEmpty(AiosError):
    """The object cannot be removed while something else needs it."""


class Denied(AiosError):
    """The permissions of an object do not let this caller use it."""


class NotAllowed(AiosError):
    """This kind of file does not have the operation, for example rm of a control file."""


class Busy(AiosError):
    """A limit is reached that frees itself: try again later."""


class OverQuota(AiosError):
    """A limit is reached that does not free itself: remove something first."""


class NoRoom(AiosError):
    """A model does not fit into the memory of this machine, even alone."""


class TooLong(AiosError):
    """The prompt does not fit the model's context length."""

    code = "context_length_exceeded"


class StoreFailed(AiosError):
    """The state cannot be read or written."""


class StoreFull(StoreFailed):
    """The disk under the state folder is full."""


class ModelError(AiosError):
    """A model folder cannot be loaded; the reason names the file."""

    code = "model_unavailable"


class TooManyOpen(AiosError):
    """The user has as many files of the mount open as allowed."""


class NoNetwork(AiosError):
    """The network that a tool was granted cannot be built or reached."""


class BadSnapshot(AiosError):
    """A kv file is malformed, damaged, or belongs to another model."""

    def __init__(self, reason: str, hint: str = "copy the context's messages.jsonl instead") -> None:
        super().__init__(reason, hint)


class WireError(AiosError):
    """A message between daemon and worker breaks the protocol."""


class Interrupted(AiosError):
    """The waiting process got a signal."""


class WouldBlock(AiosError):
    """There is nothing to read yet, and the file is open with O_NONBLOCK."""


class RequestFailed(AiosError):
    """The request that this read waits for ended without an answer."""


class ShuttingDown(AiosError):
    """The daemon is stopping."""


def in_words(error: BaseException) -> str:
    """Any exception as a reason for people: never Python's own notation."""
    if isinstance(error, AiosError):
        return error.explanation
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, OSError) and str(error):  # the words are ours
        return str(error)
    return f"{str(error) or 'an error without a message'} ({type(error).__name__})"
