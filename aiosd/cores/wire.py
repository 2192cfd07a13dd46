"""The protocol between daemon and worker: all messages, and their encoding on the socket.

A frame is a 4-byte little-endian length and a JSON object `{"is": NAME, …fields}`. Restore and Saved carry an
open file too (SCM_RIGHTS). Both sides check: an unknown name, a missing or extra field or an oversized frame
is a WireError and ends the connection. A faulty worker must not harm the daemon. aiosd.privilege.orders uses
the same frames with other messages.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, get_args

from aiosd.errors import WireError

FRAME_BYTES_MAX = 64 << 20
FILES_MAX = 4  # that came and were not taken: one for each frame of one receive
CLOEXEC = socket.MSG_CMSG_CLOEXEC
LENGTH = struct.Struct("<I")
DECODER = json.JSONDecoder()
COMPACT = json.JSONEncoder(separators=(",", ":"))


# daemon → worker


@dataclass(frozen=True, slots=True)
class Load:
    path: str
    device: str  # PyTorch's name; auto: cuda if there is a GPU; span: all visible GPUs together
    fraction: float  # share of each GPU's memory
    cpus: str  # CPUs to run on, as in cpuset(7); empty: any
    nodes: list[int]  # preferred memory nodes
    dtype: str
    kv_bytes: int
    max_running: int
    prefill_tokens: int
    threads: int
    deterministic: bool
    quantization: str


@dataclass(frozen=True, slots=True)
class Submit:
    id: int
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    decoded: list[str]
    sampling: dict[str, Any]
    owner: str  # prefix blocks are shared within one owner only
    resume: list[int]  # tokens this request already has
    context: int  # its conversation; 0: none
    # embed, raw and tokenize take the last message's text without a template; prompt only reads it
    operation: str = "llm"
    schema: str = ""  # JSON Schema of the answer; empty: none
    tool_choice: str = "auto"  # see aiosd.syscall.chat.Chat
    parallel: bool = True  # the answer may have several calls
    template: dict[str, Any] = field(default_factory=dict)  # more variables of the chat template


@dataclass(frozen=True, slots=True)
class Remove:
    """Preempt (`keep`) or cancel between two steps. Removed answers it, unless the request ended before."""

    id: int
    keep: bool  # whether the KV stays


@dataclass(frozen=True, slots=True)
class Save:
    """Ask for a conversation's KV. `evict` also frees it. The answer is Saved or NotSaved."""

    context: int
    evict: bool


@dataclass(frozen=True, slots=True)
class Restore:
    """Give a conversation its KV back, in the file (aiosd.cores.snapshot). The answer is Restored."""

    context: int
    owner: str
    check: bool  # a user wrote the file, so check all of it


@dataclass(frozen=True, slots=True)
class Keep:
    """Pin, unpin or drop a conversation's KV."""

    context: int
    how: str


@dataclass(frozen=True, slots=True)
class Fork:
    context: int
    to: int


# worker → daemon


@dataclass(frozen=True, slots=True)
class Ready:
    info: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LoadFailed:
    reason: str
    hint: str


@dataclass(frozen=True, slots=True)
class Started:
    """The worker has rendered the prompt and accepted the request."""

    id: int
    prompt_tokens: int
    opened: str = ""  # the mark of thinking at the end of the prompt, which the answer continues


@dataclass(frozen=True, slots=True)
class Refused:
    id: int
    reason: str
    hint: str
    code: str = ""  # of AiosError


@dataclass(frozen=True, slots=True)
class Tokens:
    id: int
    tokens: list[int]
    text: str
    logprobs: list[Any]
    cached_tokens: int
    finish: str  # empty: more tokens follow; stop, length; preempted: KV memory ran out
    stopped: str = ""  # the stop string that ended the text


@dataclass(frozen=True, slots=True)
class Removed:
    id: int


@dataclass(frozen=True, slots=True)
class Saved:
    """Carries KV in a file: the answer to Save, or (`evicted`, without a Save) KV that had to make room."""

    context: int
    tokens: int
    evicted: bool


@dataclass(frozen=True, slots=True)
class NotSaved:
    """This worker has no KV of that conversation."""

    context: int


@dataclass(frozen=True, slots=True)
class Restored:
    context: int
    tokens: int  # tokens whose KV was restored
    error: str


@dataclass(frozen=True, slots=True)
class Step:
    """The outputs of one step of the engine, and the engine's counters."""

    outputs: list[Tokens]
    stats: dict[str, int]


Message = (
    Load | Submit | Remove | Save | Restore | Keep | Fork
    | Ready | LoadFailed | Started | Refused | Removed | Saved | NotSaved | Restored | Step
)  # fmt: skip
MESSAGES: tuple[type[Any], ...] = get_args(Message)
BY_NAME: Mapping[str, type[Any]] = {kind.__name__: kind for kind in MESSAGES}
FIELDS = {"float": float, "int": int, "str": str, "bool": bool, "list": list, "dict": dict}


def encode(message: Any) -> bytes:
    fields_ = {"is": type(message).__name__, **plain(message)}
    if isinstance(message, Step):
        fields_["outputs"] = [plain(one) for one in message.outputs]
    try:
        body = COMPACT.encode(fields_).encode()
    except (RecursionError, ValueError) as error:
        raise WireError(f"{type(message).__name__} cannot be sent: {error}") from None
    if len(body) > FRAME_BYTES_MAX:
        raise WireError(f"{type(message).__name__} of {len(body)} bytes is over {FRAME_BYTES_MAX}")
    return LENGTH.pack(len(body)) + body


def plain(message: Any) -> dict[str, Any]:
    """The fields of a dataclass. Nested dataclasses stay as they are, unlike with asdict."""
    kind: Any = type(message)
    return {name: getattr(message, name) for name in types_of(kind)}


@cache
def types_of(kind: Any) -> dict[str, type[Any]]:
    return {f.name: FIELDS.get(str(f.type).partition("[")[0], object) for f in fields(kind)}


def decode(body: bytes, kinds: Mapping[str, type[Any]] = BY_NAME) -> Any:
    try:
        text = body.decode()
        raw, end = DECODER.raw_decode(text)  # json.loads also looks for white space around the value
        if end != len(text):
            raise ValueError(f"extra data at {end}")
        kind = kinds[raw.pop("is")]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise WireError(f"not a message: {error!r}") from None
    if kind is Step and isinstance(raw.get("outputs"), list):
        raw["outputs"] = [_build(Tokens, one) for one in raw["outputs"]]
    return _build(kind, raw)


def _build(kind: Any, raw: object) -> Any:
    types = types_of(kind)
    if isinstance(raw, dict) and [*raw] == [*types] and [*map(type, raw.values())] == [*types.values()]:
        return kind(*raw.values())  # as it is sent; what follows says what is wrong
    if not isinstance(raw, dict) or raw.keys() != types.keys():
        raise WireError(f"{kind.__name__} with other fields than its own")
    for name, wanted in types.items():
        if not isinstance(raw[name], wanted):
            raise WireError(f"{kind.__name__}.{name} is {type(raw[name]).__name__}, not {wanted.__name__}")
    return kind(**raw)


class Channel:
    """One end of the connection. Any thread may send; one thread receives."""

    def __init__(self, sock: socket.socket, kinds: Collection[type[Any]] = MESSAGES) -> None:
        """`kinds`: the messages that this end may receive."""
        self._socket = sock
        self._kinds = {kind.__name__: kind for kind in kinds}
        self.closed = False
        self._sending = threading.Lock()
        self._buffer = bytearray()
        self._files: deque[int] = deque()  # received files that nobody has taken yet

    def send(self, message: Any, file: int | None = None) -> None:
        """Send a message. The caller still closes `file`. Raises OSError when the other side is gone."""
        frame = encode(message)
        with self._sending:
            if file is not None:
                socket.send_fds(self._socket, [frame[:1]], [file])
                frame = frame[1:]
            self._socket.sendall(frame)

    def receive(self) -> Any:
        """The next message; None when the other side closed."""
        header = self._exactly(LENGTH.size)
        if header is None:
            return None
        (length,) = LENGTH.unpack(header)
        if length > FRAME_BYTES_MAX:
            raise WireError(f"a frame of {length} bytes is over {FRAME_BYTES_MAX}")
        body = self._exactly(length)
        if body is None:
            raise WireError("the connection ended inside a frame")
        return decode(body, self._kinds)

    def take_file(self) -> int | None:
        """The file of the message just received. The caller closes it. None: the file was lost, because this
        process had no free descriptor."""
        return self._files.popleft() if self._files else None

    def shut(self) -> None:
        """End the connection for both sides. A thread that receives here wakes up."""
        self.closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()
        while self._files:
            os.close(self._files.popleft())

    def _exactly(self, size: int) -> bytes | None:
        while len(self._buffer) < size:
            try:
                data, files, _, _ = socket.recv_fds(
                    self._socket, max(65536, size - len(self._buffer)), 4, CLOEXEC
                )
            except ConnectionResetError:  # the other side was killed before it read our messages
                return None
            self._files += files
            if len(self._files) > FILES_MAX:
                raise WireError(f"more than {FILES_MAX} open files that no message came with")
            if not data:
                return None
            self._buffer += data
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken
