"""Domain errors of aiosd: what went wrong and what to do about it.

Raised anywhere, turned into an errno in one place only (aiosd/fs/ops.py) and into text for people
wherever a person reads it. No errno numbers and no I/O here; imports nothing of aiosd.
"""

from __future__ import annotations

import copy

REASON_MAX = 300  # characters: a reason may quote what a hostile user wrote


class AiosError(Exception):
    """`str(error)` is the reason; `hint` is the remedy, a sentence or empty."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason if len(reason) <= REASON_MAX else reason[:REASON_MAX] + "…")
        self.hint = hint

    def again(self) -> AiosError:
        """The same error to raise once more: one that is kept and raised twice keeps both callers' frames."""
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
    """The text or JSON of a request is not one."""


class BadValue(AiosError):
    """A value or command written to a control file is not one of those it takes."""


class TooBig(AiosError):
    """A request grew over its byte limit."""


class NotFound(AiosError):
    """A request names a model, agent, context or file that does not exist."""


class Exists(AiosError):
    """The name is taken."""


class NotEmpty(AiosError):
    """The object cannot be removed while others hold it."""


class Denied(AiosError):
    """The mode bits of what a request names do not let this caller use it."""


class NotAllowed(AiosError):
    """The operation makes no sense on this kind of file (rm of a control file, say)."""


class Busy(AiosError):
    """A bound that empties by itself is reached: try again later."""


class OverQuota(AiosError):
    """A bound that does not empty by itself is reached: remove something first."""


class TooLong(AiosError):
    """The prompt does not fit the model's context length."""


class StoreFull(AiosError):
    """The disk under the state folder is full."""


class StoreFailed(AiosError):
    """The state database cannot be read or written."""


class ModelError(AiosError):
    """A model folder cannot be loaded; the reason names the file."""


class TooManyOpen(AiosError):
    """A user has as many files of the mount open as he may."""


class NoNetwork(AiosError):
    """The network that a tool was granted cannot be made or reached."""


class BadSnapshot(AiosError):
    """A kv file is not one, is damaged, or belongs to another model."""


class WireError(AiosError):
    """A message between daemon and worker breaks the protocol."""


class Interrupted(AiosError):
    """The waiting process got a signal."""


class WouldBlock(AiosError):
    """Nothing to read yet and the file is open with O_NONBLOCK."""


class RequestFailed(AiosError):
    """The request this read waits for ended without an answer."""


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
    return f"{str(error) or 'an error without a message'} ({type(error).__name__})"
