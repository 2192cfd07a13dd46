"""Admission: turn the bytes that a caller wrote into a queued request, or say by an error why not.

The handler of the request's kind interprets the bytes (aiosd.scheduler.handler). FUSE threads call.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from weakref import WeakValueDictionary

from aiosd.access.caller import Caller
from aiosd.access.permissions import Permissions
from aiosd.agents.agents import Agent, Agents
from aiosd.database.store import Store
from aiosd.errors import (
    BadRequest,
    Busy,
    Denied,
    NotAllowed,
    NotFound,
    OverQuota,
    ShuttingDown,
    in_words,
)
from aiosd.host.subuids import owner
from aiosd.scheduler.ending import Ending
from aiosd.scheduler.handler import Handler, Source
from aiosd.scheduler.ledger import Buckets
from aiosd.scheduler.limits import Limits
from aiosd.scheduler.newest import Newest
from aiosd.scheduler.notices import Notices
from aiosd.scheduler.numbers import Numbers
from aiosd.scheduler.queue import add
from aiosd.scheduler.saving import Saving
from aiosd.scheduler.scheduler import Scheduler
from aiosd.syscall import judging, response
from aiosd.syscall.foreign import is_object, parsed_bytes
from aiosd.syscall.request import Request, State
from aiosd.syscall.spec import Spec

REFUSED_BYTES = 64 << 10  # that are kept of a request that is refused
DRAFTS_MAX = 1000  # ids per agent that requests/new allocated and nobody has written yet
LOOKS_MS_PER_MINUTE, LOOKS_BURST_S = 6_000, 6.0  # a tenth of the time, of six seconds at once
HOPELESS = (BadRequest, NotFound, Denied, OverQuota)  # such a request is accepted and ends as failed
STOPPED = "the daemon stopped; the request goes on when it starts again"


class Admission:
    def __init__(
        self,
        handlers: Mapping[str, Handler],
        scheduler: Scheduler,
        ending: Ending,
        saving: Saving,
        limits: Limits,
        notices: Notices,
        store: Store,
        agents: Agents,
        permissions: Permissions,
    ) -> None:
        self._handlers, self._scheduler, self._ending, self._saving = handlers, scheduler, ending, saving
        self._limits, self._notices, self._store = limits, notices, store
        self._agents, self._permissions = agents, permissions
        self._lock = threading.Lock()
        self._submitting = threading.Lock()
        self.newest = Newest(store)
        self._read = WeakValueDictionary[int, Request]()  # ended requests, shared by all their readers
        self._drafts: dict[str, dict[int, None]] = {}  # by agent: allocated ids, oldest first
        self._numbers = Numbers(store)
        self._looks = Buckets(LOOKS_BURST_S)  # by person, in milliseconds

    def take_up(self) -> None:
        """Queue the requests that an earlier daemon accepted and did not end."""
        for request in self._store.unfinished():
            handler = self._handlers[request.spec.kind]
            request.state = State.QUEUED
            request.running_most = self._limits.quotas.running(Caller(request.uid, -1, 0), request.agent)
            why = handler.lost(request)
            if not why and not request.spec.understood:
                why = "the request could not be understood"  # the earlier daemon knew it
            why = why or handler.forbid(request)  # ask a person again, even if the call was allowed
            self._scheduler.queue.add(request, startable=not why)
            add(self._scheduler.queue.pending_bytes, owner(request.uid), request.size_bytes)
            if why:
                self._ending.finish(request, State.FAILED, why)
        self.fail_barred()

    def fail_barred(self) -> None:
        """Fail the requests that have not begun, of users and agents whose quota of requests is 0 by now."""
        bar = cache(self._limits.bar)
        for request in self._scheduler.unfinished():
            begun = request.state is not State.QUEUED or request.tokens or request.parked
            if not begun and not request.parent and (whose := bar(request.uid, request.agent)):
                why = f"the quota of {whose} is 0 requests by now: ask the administrator"
                self._ending.finish(request, State.FAILED, why)

    # judging

    def asks_groups(self, source: Source) -> bool:
        """Whether admitting or running a request of this file may need the caller's groups."""
        return self._handlers[source.kind].asks_groups(source) or bool(self._permissions.by_group)

    def is_json(self, source: Source, body: bytearray) -> bool:
        """Whether what was written so far is the beginning of JSON, or should be."""
        return not self._handlers[source.kind].takes_text or is_object(body)

    def check(self, caller: Caller, source: Source, size: int) -> None:
        """Refuse what can be refused before the request is complete. The first write() calls this."""
        self._limits.check_open()
        self._limits.check_room(caller, source.agent.name if source.agent else "", size)
        if source.agent:
            self._agents.check(source.agent)
        self._handlers[source.kind].check(caller, source)

    def judge(self, caller: Caller, source: Source, body: bytes) -> Spec:
        """Parse and check a complete request. Raises BadRequest, NotFound, Denied, OverQuota."""
        return self._handlers[source.kind].judge(caller, source, body)

    def look(self, caller: Caller, source: Source, body: bytes) -> None:
        """Judge a request that a write completes. The kernel lets all who write to the same file wait
        meanwhile. So one person may keep them waiting for a part of the time only, and after that only the
        submission waits for the verdict on a new schema. Raises as `judge`, and Busy.
        """
        person, began = owner(caller.uid), time.monotonic()
        with self._lock:
            left_s = self._looks.left(person, LOOKS_MS_PER_MINUTE, began) / 1000
        try:
            with judging.of(caller.uid, left_s):
                self.judge(caller, source, body)
        except judging.Later:
            pass
        finally:
            with self._lock:
                self._looks.spend(person, 1000 * (time.monotonic() - began))

    # submitting

    def submit(self, caller: Caller, source: Source, body: bytes, id: int | None = None) -> Request:
        """Queue a request. A wrong text is queued too: the request fails, and its readers see the reason."""
        hopeless, handler = "", self._handlers[source.kind]
        try:
            spec = handler.judge(caller, source, body)  # without the lock: a new schema takes a second
        except HOPELESS as error:
            written = body[:REFUSED_BYTES].decode("utf-8", "replace")
            hopeless, spec = error.explanation, replace(handler.misunderstood(source, body), refused=written)
        with self._submitting:
            request = self._submit(caller, source, body, id, spec, hopeless)
        if id is None:
            self.newest.came(source, caller.uid, request.id)
        self._withdraw_if_removed(source, request)
        return request

    def _submit(
        self, caller: Caller, source: Source, body: bytes, id: int | None, spec: Spec, hopeless: str
    ) -> Request:
        """Everybody's requests wait for the lock meanwhile: nothing here may take long."""
        if source.agent:
            self._agents.check(source.agent)
        self._limits.check_room(caller, source.agent.name if source.agent else "")
        try:  # what `judge` found still holds when the request enters the queue
            if not hopeless:
                self._handlers[source.kind].check_names(caller, source, spec)
        except HOPELESS as error:
            hopeless = error.explanation
        agent, agent_id = (source.agent.name, source.agent.id) if source.agent else ("", 0)
        request = Request(
            id or self.new_id(), caller.uid, agent, source.file, spec, agent_id, len(body), caller.pid
        )
        request.running_most = self._limits.quotas.running(caller, agent)
        self._claim(source, id)
        more = 0
        try:
            if not hopeless:
                parsed = parsed_bytes(body)
                self._limits.reserve(caller, parsed)
                request.size_bytes += parsed
                more = parsed
                more += self._handlers[spec.kind].begin(caller, request)
            self.admit(request, hopeless)
        except BaseException:
            self._limits.reserve(caller, -more)
            self._unclaim(source, id)
            raise
        return request

    def admit(self, request: Request, hopeless: str = "") -> None:
        """Accept a request; from here on it ends exactly once. The caller checked for room. Raises StoreFull.

        `hopeless`: why the request is wrong. Such a request ends as failed, with that reason.
        """
        scheduler, handler = self._scheduler, self._handlers[request.spec.kind]
        code = BadRequest.code if hopeless else ""
        hopeless = hopeless or handler.forbid(request)
        handler.record(request)
        self._notices.changed(request)
        with scheduler.deciding():
            scheduler.queue.add(request, startable=not hopeless)
            scheduler.trace.enter(request, "queued")
            scheduler.counters["admitted"] += 1
        try:
            self._store.add_request(request)  # a worker may compute it already; no user sees it yet
        except Exception as error:
            self._ending.cancel(request, in_words(error))
            raise
        if hopeless:
            self._ending.finish(request, State.FAILED, hopeless, code)
        else:
            handler.queued(request)
        if scheduler.stopped:  # its first write came before the stop, and it is stored
            request.answer.end(error=ShuttingDown(STOPPED))

    def _withdraw_if_removed(self, source: Source, request: Request) -> None:
        """End the request if its agent, context or tool was removed a moment ago."""
        if request.spec.understood and (why := self._handlers[request.spec.kind].orphaned(request)):
            self._ending.cancel(request, why)
        if source.agent is None:
            return
        try:
            self._agents.check(source.agent)
        except NotFound:
            self._ending.cancel(request, "its agent was removed")
            self._store.remove_request(request.id)

    def _claim(self, source: Source, id: int | None) -> None:
        """Use an allocated id. Raises NotAllowed if a request has this id already."""
        if id is None or source.agent is None:
            return
        with self._lock:
            if self._drafts.get(source.agent.name, {}).pop(id, 0) == 0:
                raise NotAllowed(f"request {id} was written already")

    def _unclaim(self, source: Source, id: int | None) -> None:
        """Give an allocated id back after a failed submit, so that its user may try again."""
        if id is not None and source.agent is not None:
            with self._lock:
                self._drafts.setdefault(source.agent.name, {})[id] = None

    # for fs.transaction.Draft

    @property
    def request_bytes(self) -> int:
        """The longest request that is accepted."""
        return self._limits.request_bytes

    def reserve(self, caller: Caller, size: int) -> None:
        """Count bytes of a request that is being written; a negative size gives them back. Raises Busy."""
        self._limits.reserve(caller, size)

    def abandon(self, request: Request) -> None:
        self._ending.cancel(request, "its file was closed before the answer was read")

    # finding

    def find(self, id: int) -> Request | None:
        """Return a request that runs or waits, or whose end is not stored yet."""
        with self._scheduler.lock:
            return self._saving.find(id) or self._scheduler.queue.get(id)

    def get(self, id: int) -> Request:
        """Return any request that is kept, unfinished or ended. Raises NotFound."""
        request = self.find(id) or self._read.get(id)
        if request is not None:
            return request
        request = self._store.request(id)
        if request is None:
            raise NotFound(f"no request {id}")
        self._read[id] = ended(request)
        return request

    def disown(self, uid: int, to: int) -> None:
        """Give the ended requests of a former account to another user."""
        self._store.give_requests(uid, to)
        for request in list(self._read.values()):
            if request.uid == uid:
                request.uid = to
        self.newest.disown(uid)

    def forget(self, agent: Agent) -> None:
        with self._lock:
            self._drafts.pop(agent.name, None)
        self.newest.forget(agent)

    # drafts: requests/new

    def new_id(self) -> int:
        return self._numbers.take()

    def allocate(self, agent: str) -> int:
        with self._lock:
            drafts = self._drafts.setdefault(agent, {})
            if len(drafts) >= DRAFTS_MAX:
                raise Busy(f"{DRAFTS_MAX} requests were allocated and never written", "write to those first")
            id = self.new_id()
            drafts[id] = None
            return id

    def drafts(self, agent: str) -> list[int]:
        with self._lock:
            return list(self._drafts.get(agent, ()))


def ended(request: Request) -> Request:
    """Rebuild the answer of an ended request from the stored text, for its readers."""
    response.grow(request, [])
    response.end(request)
    return request
