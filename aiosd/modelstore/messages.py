"""The messages between the daemon and a puller, as frames of aiosd.cores.wire.

The puller names files and describes them. Only the daemon opens them: HandFile carries one to write, LookAt
one to read. So the puller needs no access to the store, and one that was taken over can change nothing in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# daemon → puller


@dataclass(frozen=True, slots=True)
class Fetch:
    source: str
    credential: bool  # whether the administrator's token for the hub may be used


@dataclass(frozen=True, slots=True)
class HandFile:
    """The answer to WantFile, with the file; `present`: the store has it already, and no file comes."""

    name: str
    have: int  # bytes that an earlier pull left in it
    present: bool


@dataclass(frozen=True, slots=True)
class FileKept:
    """The answer to GotFile of a temporary file: its digest is right."""

    name: str


@dataclass(frozen=True, slots=True)
class LookAt:
    """Tell what model this is, by the file that comes with it."""

    name: str


# puller → daemon


@dataclass(frozen=True, slots=True)
class FilesFound:
    """What the source has: each file with name, size, digest (sha256, empty: unknown), mark (changes with the
    content) and temporary (not a file of the model)."""

    files: list[dict[str, Any]]
    licence: str
    revision: str


@dataclass(frozen=True, slots=True)
class WantFile:
    name: str


@dataclass(frozen=True, slots=True)
class PullProgress:
    """How many bytes the file has that is being written."""

    name: str
    done: int


@dataclass(frozen=True, slots=True)
class GotFile:
    name: str


@dataclass(frozen=True, slots=True)
class AllGot:
    """The source has no more files."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PullFailed:
    reason: str
    hint: str


TO_PULLER: tuple[type[Any], ...] = (Fetch, HandFile, FileKept, LookAt)
FROM_PULLER: tuple[type[Any], ...] = (
    FilesFound,
    WantFile,
    PullProgress,
    GotFile,
    AllGot,
    ModelFacts,
    PullFailed,
)
