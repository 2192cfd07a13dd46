"""MCP sessions: for each server and user at most one process tree in a cage, which many calls share.

In it runs aiosd.tools.mcp.bridge, which speaks MCP with the server; here are JSON lines. What a session
says is foreign, as all in it runs as its user. The first call starts it; idle or dead, it is gone, and
the next call starts another. A call is never made twice. All but `call`, `cancel` and `list` is on the
runner's thread.

Large: a session has one life, from its first call to its last, and its calls are part of it.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from aiosd.config.mcp import Server
from aiosd.errors import AiosError, BadRequest
from aiosd.host import identity
from aiosd.host.subuids import owner
from aiosd.syscall.foreign import read_json
from aiosd.tools.catalog import shorten
from aiosd.tools.manifest import Manifest
from aiosd.tools.mcp.calling import Asked, News, Progress, Question, User, Withdrawn, attached
from aiosd.tools.mcp.program import about, program
from aiosd.tools.run.runner import STDERR_BYTES
from aiosd.tools.run.spawn import Bounds, Call, End, RunEvents
from aiosd.tools.run.toolrunner import ToolRunner

MOST = 64  # sessions at once
CPU_S = 3600  # of one process of a session
ADDRESS_BYTES = 64 << 30  # Node.js maps some 10 GiB that it never touches
PATIENCE_S = 10.0  # for a session to give up a call, or to end
LISTING_BYTES = 1 << 20
LIST_S = 60.0
NOISE_BYTES = 16 << 20
LINE_COST = 1000  # bytes that any line counts for
ASKS = 16  # questions of a server during one call that wait at once
LAST_LINES = 4  # of its standard error, that are told where it did not start


@dataclass(slots=True, eq=False)
class RunningCall:
    asked: Asked
    from_stderr: int  # bytes that the session had said there
    why: str = ""  # it is being given up
    asks: set[int] = field(default_factory=set)  # questions of the server that are not answered


@dataclass(slots=True, eq=False)
class Session:
    id: int
    server: Server
    user: User
    calls: dict[int, RunningCall] = field(default_factory=dict)
    line: bytearray = field(default_factory=bytearray)  # that is not whole yet
    used_s: float = field(default_factory=time.monotonic)
    noise_bytes: int = 0  # that nobody had asked for
    ready: bool = False  # the server has answered
    retired: bool = False  # no more calls come
    ending: bool = False


class SessionEvents(Protocol):
    def changed(self, server: Server) -> None:
        """A server says that it has other tools now. Called on the runner's thread."""


class Sessions:
    def __init__(self, runner: ToolRunner) -> None:
        self._runner = runner
        self._events: SessionEvents
        self._by_id: dict[int, Session] = {}
        self._ids = itertools.count(-1, -1)
        self.output_bytes = self.work_bytes = self.reserve_bytes = 0  # as of tool calls

    def report_to(self, events: SessionEvents) -> None:
        self._events = events

    def call(self, server: Server, user: User, asked: Asked) -> None:
        self._runner.order(partial(self._call, server, user, asked))

    def list(self, server: Server, user: User, told: Callable[[Any, str], None]) -> None:
        """Tells of its tools as they were said, or None and why not."""
        said: list[bytes] = []

        def ended(end: End) -> None:
            told(None if end.why else json.loads(b"".join(said)), end.why)

        events = RunEvents(lambda: True, said.append, ended)
        self.call(server, user, Asked(next(self._ids), "", {}, events))

    def cancel(self, id: int) -> None:
        self._runner.order(partial(self._give_up_call, id, "cancelled"))

    def keep(self, servers: Collection[Server]) -> None:
        """Sessions of others end, when their calls have."""

        def keep() -> None:
            for session in list(self._by_id.values()):
                if session.server not in servers:
                    session.retired = True
                    self._look(session)

        self._runner.order(keep)

    def end_of(self, uid: int) -> None:
        """End the sessions of a user whose account has ended."""

        def end() -> None:
            for session in list(self._by_id.values()):
                if session.user.uid == uid:
                    self._kill(session, "the account of its user has ended")

        self._runner.order(end)

    # down

    def _call(self, server: Server, user: User, asked: Asked) -> None:
        if not asked.events.began():
            return
        try:
            session = self._session(server, user)
        except AiosError as error:
            asked.events.ended(End(-1, "", error.explanation))
            return
        session.calls[asked.id] = RunningCall(asked, self._runner.stderr(session.id)[0])
        self._runner.rest(session.id, False)
        order = {"id": asked.id, "method": asked.method, "params": asked.params, "output": asked.output}
        self._tell(session, order if asked.method else {"list": True})
        if session.ready:
            self._hurry(session, asked)

    def _hurry(self, session: Session, asked: Asked) -> None:
        """From now on it may take so long."""
        after_s = session.server.timeout_s if asked.method else LIST_S
        self._runner.later(after_s, partial(self._end_if_late, session, asked, after_s))

    def _end_if_late(self, session: Session, asked: Asked, after_s: float) -> None:
        call = session.calls.get(asked.id)
        if call and call.asks:  # it waits for a person or a model, whose time is bounded elsewhere
            self._hurry(session, asked)
        else:
            self._give_up_call(asked.id, f"it took more than {after_s:g} s")

    def _session(self, server: Server, user: User) -> Session:
        for session in self._by_id.values():
            if (session.server, session.user) == (server, user) and not (session.retired or session.ending):
                return session
        self._check_share(user)
        if len(self._by_id) >= MOST:
            idle = [session for session in self._by_id.values() if not session.calls]
            if not idle:
                raise BadRequest(f"{MOST} MCP sessions run already", "try again when some of them are idle")
            self._kill(min(idle, key=lambda session: session.used_s), "another needed its place")
        session = Session(next(self._ids), server, user)
        manifest = host(server)
        self._by_id[session.id] = session
        events = RunEvents(lambda: True, partial(self._said, session), partial(self._ended, session))
        bounds = Bounds(sys.maxsize, self.work_bytes, self.reserve_bytes)
        self._runner.later(server.start_s, partial(self._end_if_slow, session))
        whose = user.uid, user.groups, user.folder, user.sees_aios
        first = opening(server, self.output_bytes)
        self._runner.run(Call(session.id, manifest, None, *whose, bounds, events, opening=first))
        return session

    def _check_share(self, user: User) -> None:
        """One user, with all lent uids, gets half of the sessions that others leave. Raises BadRequest."""
        mine = sum(owner(session.user.uid) == owner(user.uid) for session in self._by_id.values())
        if mine >= (MOST - (len(self._by_id) - mine)) // 2 and user.uid not in (0, identity.uid()):
            raise BadRequest(f"{mine} MCP sessions of yours run already", "try again when some have ended")

    def _tell(self, session: Session, order: dict[str, Any]) -> None:
        line = json.dumps(order).encode() + b"\n"
        self._runner.order(partial(self._runner.tell, session.id, line))  # after it was started

    def _give_up_call(self, id: int, why: str) -> None:
        """The server is told; the call ends when that was heard, or with the session."""
        for session in self._by_id.values():
            call = session.calls.get(id)
            if call and not call.why:
                call.why = why
                self._tell(session, {"cancel": id})
                self._runner.later(PATIENCE_S, partial(self._end_if_deaf, session, call))

    def _end_if_deaf(self, session: Session, call: RunningCall) -> None:
        if session.calls.get(call.asked.id) is call:
            self._kill(session, "it does not give up calls")

    def _end_if_slow(self, session: Session) -> None:
        if not session.ready:
            hint = f"raise start_s in [mcp.{session.server.name}] if it only needs longer"
            self._kill(session, f"it was not ready within {session.server.start_s:g} s; {hint}")

    def _kill(self, session: Session, why: str) -> None:
        session.ending = True
        self._runner.kill(session.id, why)

    # up

    def _said(self, session: Session, data: bytes) -> None:
        *lines, rest = data.split(b"\n")
        for line in lines:
            self._heed(session, bytes(session.line + line))
            session.line.clear()
        session.line += rest
        if len(session.line) > 8 * max(self.output_bytes, LISTING_BYTES):  # JSON may take six for one
            session.line.clear()
            self._kill(session, "it said too long a line")

    def _heed(self, session: Session, line: bytes) -> None:
        if session.ending and not session.calls:
            return
        try:
            match read_json(line.decode()):
                case {"ready": True} if not session.ready:
                    session.ready = True
                    for waiting in session.calls.values():
                        self._hurry(session, waiting.asked)
                case {"changed": True}:
                    self._hear_noise(session, line)
                    if all(
                        call.asked.method for call in session.calls.values()
                    ):  # else the list is on its way
                        self._events.changed(session.server)
                case {"id": int(id), "text": str(text), "error": bool(failed), **more}:
                    if (call := session.calls.get(id)) and call.asked.method:
                        self._news(call, attached(more))
                        self._answer(session, call, text, failed)
                    else:
                        self._hear_noise(session, line)
                case {"tools": found, **more}:
                    self._hear_noise(session, line)
                    for one in [c for c in session.calls.values() if not c.asked.method]:
                        size = 0 if found is None else len(line)
                        why = "its tools are too many" if size > LISTING_BYTES else str(more.get("error", ""))
                        self._answer(session, one, why or line.decode(), bool(why) or found is None)
                case {"id": int(id), "progress": [int() | float() as done, total, message]}:
                    self._hear_noise(session, line)
                    if call := session.calls.get(id):
                        of = total if isinstance(total, (int, float)) else None
                        said = " ".join(message.split()) if isinstance(message, str) else ""
                        self._news(call, Progress(done, of, shorten(said)))
                case {"ask": int(number), "of": int(id), "what": str(what), **facts}:
                    self._hear_noise(session, line)
                    self._ask(session, id, number, what, facts)
                case {"withdrawn": int(number)}:
                    for call in [c for c in session.calls.values() if number in c.asks]:
                        call.asks.discard(number)
                        call.asked.news(Withdrawn(number))
                case _:
                    self._kill(session, "it says what its host does not")
        except (AiosError, UnicodeDecodeError):
            self._kill(session, "it says what is not JSON")

    @staticmethod
    def _news(call: RunningCall, news: News) -> None:
        if not call.why:  # who has given it up wants to hear no more
            call.asked.news(news)

    def _ask(self, session: Session, id: int, number: int, what: str, facts: dict[Any, Any]) -> None:
        call = session.calls.get(id)

        def reply(answer: dict[str, Any] | str) -> None:
            self._runner.order(partial(self._reply, session, id, number, answer))

        if call is None or call.why or len(call.asks) >= ASKS:
            reply("its call is over, or asks too much at once")
            return
        call.asks.add(number)
        call.asked.news(Question(number, what, facts, reply))

    def _reply(self, session: Session, id: int, number: int, answer: dict[str, Any] | str) -> None:
        if call := session.calls.get(id):
            call.asks.discard(number)
        if session.id in self._by_id:
            self._tell(session, {"ask": number, "answer": answer})

    def _hear_noise(self, session: Session, line: bytes) -> None:
        session.noise_bytes += LINE_COST + len(line)
        if session.noise_bytes > NOISE_BYTES:
            self._kill(session, "it says too much that nobody asked for")

    def _answer(self, session: Session, call: RunningCall, text: str, failed: bool) -> None:
        if call.why:
            self._end_call(session, call, End(-1, self._stderr(session, call), call.why))
            return
        data = text.encode()
        if call.asked.method and len(data) > self.output_bytes:
            data, failed, text = b"", True, f"it printed more than {self.output_bytes} bytes"
        why = (shorten(text.strip()) or "it failed without a word") if failed else ""
        if data and why != text.strip():  # an error is there whole
            call.asked.events.said(data)
        self._end_call(session, call, End(int(failed), self._stderr(session, call), why))

    def _stderr(self, session: Session, call: RunningCall) -> str:
        """What the session said there since the call began, be it for this one or for another."""
        count, last = self._runner.stderr(session.id)
        new = min(count - call.from_stderr, len(last))
        return last[len(last) - new :].decode("utf-8", "replace")

    def _end_call(self, session: Session, call: RunningCall, end: End) -> None:
        del session.calls[call.asked.id]
        self._withdraw(call)
        session.retired |= not call.asked.method  # one that was told the list is asked by nobody again
        if not session.calls:
            session.used_s = time.monotonic()
            self._runner.rest(session.id, True)
            self._runner.later(session.server.idle_s, partial(self._look, session))
            self._look(session)
        call.asked.events.ended(end)

    @staticmethod
    def _withdraw(call: RunningCall) -> None:
        for number in call.asks:
            call.asked.news(Withdrawn(number))

    def _look(self, session: Session) -> None:
        """Ends it when nobody has used it for long."""
        unused_s = time.monotonic() - session.used_s
        if session.calls or session.ending:
            return
        if not session.retired and unused_s < session.server.idle_s - 0.01:
            return
        session.ending = True
        self._runner.shut(session.id)
        self._runner.later(PATIENCE_S, partial(self._runner.kill, session.id, "it did not end"))

    def _ended(self, session: Session, end: End) -> None:
        del self._by_id[session.id]
        lines = end.stderr.strip().split("\n")[-1 if session.ready else -LAST_LINES :]
        last = " | ".join(filter(None, map(str.strip, lines)))
        why = "the server ended" + (f": {end.why}" if end.why else "")
        if last and not (session.ready and end.why):
            why += f"; it said: {shorten(last)}" if end.why else f": {shorten(last)}"
        for call in list(session.calls.values()):
            self._withdraw(call)
            call.asked.events.ended(End(-1, end.stderr[-STDERR_BYTES:], call.why or why))
        session.calls.clear()


def opening(server: Server, output_bytes: int) -> bytes:
    """The first line that the host of a session reads: which server it is to start or to reach."""
    return json.dumps({**about(server), "output_bytes": output_bytes}).encode() + b"\n"


def host(server: Server) -> Manifest:
    """What holds a session of it, as the cage knows programs."""
    command, read, env = program()
    return Manifest(
        server.name, "", command, {}, Path("/"),
        read=(*read, *server.read), write=server.write, env=env, network=server.reached,
        credentials=server.credentials,
        timeout_s=math.inf, cpu_s=CPU_S, memory_bytes=server.memory_bytes,
        address_bytes=max(server.memory_bytes, ADDRESS_BYTES),
    )  # fmt: skip
