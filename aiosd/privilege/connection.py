"""The connection of one daemon, which may have been taken over. Nothing that it says is trusted.

The fields of each order are checked (aiosd.privilege.orders), and so is its user (aiosd.privilege.users).
Manifests, MCP servers, bounds and folders come from the configuration that this process has read. An order
that no honest daemon sends ends the connection. An order that is not allowed ends as a failed call.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from aiosd.access.caller import proc_status
from aiosd.cores.wire import Channel
from aiosd.errors import AiosError, Denied, WireError, in_words
from aiosd.host.proc import device_of
from aiosd.host.processes import Direct
from aiosd.host.turns import Turns
from aiosd.privilege import orders
from aiosd.privilege.administrator import NOWHERE, Administrator
from aiosd.privilege.orders import Answered, Ended, Erred, Mounted, Said
from aiosd.privilege.pace import Pace
from aiosd.privilege.sealed import Sealed
from aiosd.privilege.systemctl import Systemctl
from aiosd.privilege.users import NOBODY, Users, holds
from aiosd.tools.manifest import OWN_BYTES, PROGRAM, Manifest
from aiosd.tools.mcp import sessions
from aiosd.tools.run.runner import CALLS_MOST, Places, Runner
from aiosd.tools.run.spawn import Bounds, Call, End, RunEvents

log = logging.getLogger(__name__)

SESSIONS_MOST = 80  # MCP sessions at once; the daemon keeps to fewer (aiosd.tools.mcp.sessions)
ACTS_PER_S, ACTS_AT_ONCE = 200.0, 1000
JSON_GROWS = 8  # the most bytes of JSON text for each byte of a request
QUESTIONS_MOST = 64  # about processes of one user, that wait for their answers
Run = orders.RunTool | orders.RunOwn | orders.RunServer


class DaemonConnection:
    def __init__(self, channel: Channel, administrator: Administrator, users: Users, work: Path) -> None:
        config = administrator.config
        self._channel, self._administrator, self._users = channel, administrator, users
        self._folder = Path(config.daemon.mount)
        self._device = device_of(self._folder)
        places = Places(work, Path(config.tools.credentials), self._folder)
        self._runner = Runner(places, Sealed(self._folder))
        self._systemctl = Systemctl(administrator, self._send)
        self._pace = Pace(ACTS_PER_S, ACTS_AT_ONCE)
        self._live = set[int]()  # calls and sessions
        self._questions = Turns[orders.See | orders.Holds | None]()  # None: the daemon is gone
        self._answering = threading.Thread(target=self._answer, name="questions", daemon=True)

    def serve(self, fuse: int) -> None:
        """Obey until the daemon ends, or sends an order that no honest daemon sends."""
        self._runner.start()
        self._answering.start()
        self._systemctl.start()
        try:
            self._send(Mounted(str(self._folder)), fuse)
            os.close(fuse)
            while (message := self._channel.receive()) is not None:
                orders.judge(message)
                if isinstance(message, orders.ACTS):
                    self._pace.wait()
                self._obey(message)
        except (OSError, WireError) as error:
            log.error("the daemon's connection: %s", error)

    def end(self) -> None:
        self._systemctl.stop()
        self._runner.stop()
        self._questions.put(NOBODY, None)
        self._channel.close()

    def _obey(self, message: Any) -> None:
        runner = self._runner
        match message:
            case orders.RunTool() | orders.RunOwn() | orders.RunServer():
                self._run(message)
            case orders.Kill():
                runner.kill(message.id, message.why)
            case orders.Tell():
                self._check_size(message.data)
                runner.order(partial(runner.tell, message.id, message.data.encode("latin-1")))
            case orders.Shut():
                runner.order(partial(runner.shut, message.id))
            case orders.Rest():
                runner.order(partial(runner.rest, message.id, message.resting))
            case orders.Forget():
                runner.forget(message.agent)
            case orders.ForgetBut():
                runner.forget_but(message.agents)
            case orders.Notify():
                self._notify(message)
            case orders.WorkerOrder() | orders.PullOrder():
                self._systemctl.order(message)
            case orders.Probe():
                self._systemctl.probe()
            case orders.Reload():
                self._administrator.reload()
            case orders.See():
                self._ask(message.uid, message)
            case orders.Holds():
                self._ask(uid_of(message.pid), message)
            case orders.Program():
                self._send(Answered(message.number, Direct().program(message.pid)))

    def _ask(self, uid: int, question: orders.See | orders.Holds) -> None:
        """Answer on another thread: who has many files open makes the answer take long."""
        if not self._questions.put(uid, question, QUESTIONS_MOST):
            self._send(Answered(question.number, ""))

    def _answer(self) -> None:
        while question := self._questions.get():
            answer = ""
            try:
                if isinstance(question, orders.Holds):
                    answer = "held" if holds(question.pid, question.path, self._device) else ""
                elif self._users.see(question.uid, question.pids, self._device):
                    answer = "seen"
            except (AiosError, OSError, ValueError) as error:  # the daemon waits for each answer
                log.error("a question about a process: %s", in_words(error))
            self._send(Answered(question.number, answer))

    # calls and sessions

    def _run(self, order: Run) -> None:
        is_session = isinstance(order, orders.RunServer)
        if order.id in self._live or is_session != (order.id < 0):
            raise WireError(f"{order.id} is no number for a new call or session")
        try:
            self._check_room(is_session)
            call = self._call(order)
        except WireError:
            raise
        except (AiosError, OSError) as error:
            why = in_words(error)
            log.error("call %d: %s", order.id, why)
            self._send(Ended(order.id, -1, "", why, {}))
            return
        self._live.add(order.id)
        self._runner.run(call)

    def _check_room(self, is_session: bool) -> None:
        """Raises Denied."""
        live = sum((id < 0) == is_session for id in self._live.copy())
        most = SESSIONS_MOST if is_session else CALLS_MOST
        if live >= most:
            raise Denied(f"{most} {'MCP sessions' if is_session else 'calls'} run already", "try again later")

    def _call(self, order: Run) -> Call:
        """Raises AiosError, OSError; the program that came with it is closed by then."""
        if isinstance(order, orders.RunServer):
            return self._session(order)
        program = self._channel.take_file() if isinstance(order, orders.RunOwn) else None
        try:
            self._check_user(order.uid, order.groups)
            self._check_size(order.given)
            if isinstance(order, orders.RunOwn):
                manifest = own(order)
                check_program(program, manifest)
            else:
                manifest = self._administrator.tool(order.name)
        except BaseException:
            if program is not None:
                os.close(program)
            raise
        folder = str(order.agent) if order.agent else ""
        who = order.uid, tuple(order.groups), folder, True
        return Call(order.id, manifest, order.given, *who, self._bounds, self._events(order.id), program)

    def _session(self, order: orders.RunServer) -> Call:
        server = self._administrator.server(order.name)
        who: tuple[int, tuple[int, ...], str, bool] = NOBODY, (NOBODY,), "", False
        if not order.listing:
            self._check_user(order.uid, order.groups)
            who = order.uid, tuple(order.groups), f"mcp-{server.name}", True
        bounds = replace(self._bounds, output_bytes=sys.maxsize)
        first = sessions.opening(server, self._administrator.config.tools.output_bytes)
        manifest, events = sessions.host(server), self._events(order.id)
        return Call(order.id, manifest, None, *who, bounds, events, opening=first)

    @property
    def _bounds(self) -> Bounds:
        config = self._administrator.config
        return Bounds(config.tools.output_bytes, config.tools.work_bytes, config.limits.disk_reserve_bytes)

    def _check_user(self, uid: int, groups: list[int]) -> None:
        if uid == NOBODY:
            raise Denied("nobody calls no tools")
        self._users.check(uid, groups, self._administrator.config.tools.system_users)

    def _check_size(self, text: str) -> None:
        most = JSON_GROWS * self._administrator.config.limits.request_bytes
        if len(text) > most:
            raise WireError(f"more than {most} characters for a tool")

    def _events(self, id: int) -> RunEvents:
        return RunEvents(
            lambda: True,
            lambda data: self._send(Said(id, data.decode("latin-1"))),
            partial(self._ended, id),
            lambda data: self._send(Erred(id, data.decode("latin-1"))) if id < 0 else None,
        )

    def _ended(self, id: int, end: End) -> None:
        self._live.discard(id)
        self._send(Ended(id, end.status, end.stderr, end.why, asdict(end.spent) if end.spent else {}))

    def _send(self, message: Any, file: int | None = None) -> None:
        with suppress(OSError):  # it is gone, and serve() is about to see it
            self._channel.send(message, file)

    # the administrator's program that tells of calls

    def _notify(self, order: orders.Notify) -> None:
        config = self._administrator.config
        if not config.tools.notify:
            return
        uid, gid = order.uid, order.groups[0]
        try:
            if order.group:
                uid = gid = NOBODY
            else:
                self._check_user(uid, order.groups)
        except Denied as error:
            log.error("notify for call %d: %s", order.id, error.explanation)
            return
        decision = f"{config.daemon.mount}/access/pending/{order.id}/decision"
        facts = {"REQUEST": str(order.id), "TOOL": order.tool, "AGENT": order.agent_name}
        facts |= {"GROUP": order.group, "UID": str(order.uid), "DECISION": decision}
        named = {f"AIOS_{key}": value for key, value in facts.items()}
        self._runner.notify(config.tools.notify, named, uid, gid)


def uid_of(pid: int) -> int:
    """Whose process it is; nobody's if it has ended. The owner of its folder in /proc may be root."""
    words = proc_status(pid, "Uid")
    return int(words[3]) if len(words) == 4 else NOBODY


def own(order: orders.RunOwn) -> Manifest:
    """A user's own tool: nothing in it grants anything."""
    return Manifest(
        order.name, "", tuple(order.command), {}, NOWHERE, env=order.env,
        timeout_s=order.timeout_s, cpu_s=order.cpu_s, memory_bytes=order.memory_bytes,
    )  # fmt: skip


def check_program(program: int | None, manifest: Manifest) -> None:
    """Check that the program cannot change, and that a read of it never waits. Raises Denied, OSError."""
    wanted = {part for part in manifest.command if part.startswith("./")}
    if wanted - {f"./{PROGRAM}"} or bool(wanted) != (program is not None):
        raise Denied(f"the file of a user's own tool is ./{PROGRAM}, and comes with the call")
    if program is None:
        return
    if fcntl.fcntl(program, fcntl.F_GET_SEALS) & orders.SEALS != orders.SEALS:
        raise Denied("the program of a tool is not sealed")
    if os.fstat(program).st_size > OWN_BYTES[PROGRAM]:
        raise Denied(f"a program has at most {OWN_BYTES[PROGRAM]} bytes")
    os.lseek(program, 0, os.SEEK_SET)
