"""Admission: the bytes a caller wrote become a request in the queue, or an error that says why not.

Here the names a request mentions (model, context) are checked against the caller's uid, groups and the
mode bits, as the kernel checks paths. FUSE threads call; the lock is the scheduler's own.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

from aiosd.access import permissions
from aiosd.access.caller import Caller
from aiosd.access.permissions import EXECUTE, WRITE, Permission, Permissions
from aiosd.access.rules import user_name
from aiosd.access.trust import Trust
from aiosd.agents.agents import Agent
from aiosd.cores.models import ModelState
from aiosd.errors import AiosError, BadRequest, Busy, Denied, NotAllowed, NotFound, OverQuota
from aiosd.host import identity
from aiosd.scheduler.queue import add
from aiosd.scheduler.scheduler import Scheduler, ended
from aiosd.syscall import response
from aiosd.syscall.request import Request
from aiosd.syscall.spec import GREEDY, REFUSED, Defaults, Message, Spec, parse
from aiosd.tools import catalog
from aiosd.tools.catalog import Tool

EVERYBODY = Permission(0, 0, 0o755)
REGROUPED = ("your groups decide since the file was opened, and were not asked for then", "open it again")
REFUSED_BYTES = 64 << 10  # that are kept of what was written
DRAFTS_MAX = 1000  # allocated by requests/new and not yet written, per agent


@dataclass(frozen=True, slots=True)
class Source:
    """The transaction file a request comes through."""

    file: str  # its path, as "the newest request of that file" is found by it
    agent: Agent | None = None
    model: str = ""  # of models/NAME/llm; else the agent's
    operation: str = "llm"
    tool: str = ""  # of tools/NAME/call; an agent's syscall/tool names one in each call


class Admission:
    def __init__(self, scheduler: Scheduler, permissions: Permissions, trust: Trust) -> None:
        self.scheduler, self.trust = scheduler, trust
        scheduler.loops.judge = self.judge_call
        self.permissions = permissions
        self._lock = threading.Lock()
        self._submitting = threading.Lock()
        self._newest: dict[tuple[int, str, int | None], int] = {}
        self._read = WeakValueDictionary[int, Request]()  # ended ones, shared by all who read them
        self._incoming_kv: Counter[int] = Counter()  # by user: bytes of kv files being written
        self._drafts: dict[str, dict[int, None]] = {}  # by agent: allocated ids, oldest first

    # judging

    def judge(self, caller: Caller, source: Source, body: bytes) -> Spec:
        """Raises BadRequest, NotFound, Denied."""
        if source.operation == "tool":
            return self._judge_call(caller, source, body)
        defaults = self.defaults(source)
        spec = parse(body, defaults)
        if spec.nice < defaults.nice:
            check_nice(caller, spec.nice)
        self.check_model(caller, spec.model)
        if spec.context:
            self.check_context(caller, spec.context)
            self.check_kv(caller)
            spec = replace(spec, context_id=self.scheduler.contexts.get(spec.context).id)
        if spec.steps:
            self._check_tools(caller, spec.tools)
            spec = replace(spec, groups=acting(caller))
        return self._unfinished(spec)[0] if spec.resume else spec

    def _judge_call(self, caller: Caller, source: Source, body: bytes) -> Spec:
        try:
            text = body.decode()
        except UnicodeDecodeError as error:  # the draft has seen to all but a character that lacks its end
            raise BadRequest(f"byte {error.start} is not UTF-8 text") from None
        name, given = (source.tool, text) if source.tool else catalog.call(text)
        return self.judge_call(caller, name, given, source.agent.settings.nice if source.agent else 0)

    def judge_call(self, caller: Caller, name: str, given: str, nice: int) -> Spec:
        """Of a tool, with its arguments as JSON. Raises BadRequest, NotFound, Denied."""
        tool = self.check_tool(caller, name)
        said = json.dumps(catalog.arguments(tool, given), ensure_ascii=False)
        return Spec(
            ({"role": "user", "content": said},),
            GREEDY,
            tool.queue,
            nice=nice,
            operation="tool",
            groups=acting(caller),
        )

    def _check_tools(self, caller: Caller, functions: Iterable[Message]) -> None:
        for one in functions:
            self.check_tool(caller, one["function"]["name"])

    def check_tool(self, caller: Caller, name: str) -> Tool:
        """Raises NotFound, Denied."""
        tool = self.scheduler.calls.tools.get(name)
        own = identity.uid(), identity.gid()
        owner = self.permissions.get(f"/tools/{name}")
        if tool.own and owner is None:
            raise NotFound(f"tool {name} is being removed")
        for path, mode in ((f"/tools/{name}", 0o755), (f"/tools/{name}/call", 0o777)):
            if not may(caller, self.permissions.get(path) or Permission(*own, mode), EXECUTE):
                raise Denied(f"tool {name} is not yours to call", "ask its owner for x on its call file")
        if owner and owner.uid not in (0, own[0], caller.uid, *self.trust.owners(caller.uid)):
            who = user_name(owner.uid)
            raise Denied(f"tool {name} is of {who} and would run as you", f"echo {who} >> access/owners")
        return tool

    def check(self, caller: Caller, source: Source, size: int) -> None:
        """What can be refused before the request is whole: called by the write() that begins it."""
        self.scheduler.bounds.check_open()
        self.scheduler.bounds.check_room(caller, source.agent.name if source.agent else "", size)
        if source.agent:
            self.scheduler.agents.check(source.agent)
        if source.operation == "tool":
            if source.tool:
                self.check_tool(caller, source.tool)
            return
        defaults = self.defaults(source)
        self.check_model(caller, defaults.model)
        if defaults.steps:
            self._check_tools(caller, defaults.tools)
        if defaults.context:
            self.check_context(caller, defaults.context)
            self.check_kv(caller)

    def defaults(self, source: Source) -> Defaults:
        if source.operation == "tool":
            return Defaults(catalog.QUEUE + source.tool, operation="tool")
        default_model = self.scheduler.models.default
        if source.agent is None:
            return Defaults(model=source.model, operation=source.operation)
        s = source.agent.settings
        known = map(self.scheduler.calls.tools.find, s.tools) if s.tools else ()
        offered = [tool.manifest for tool in known if tool and tool.ready]
        return Defaults(
            s.model or default_model,
            s.context,
            s.system,
            s.nice,
            s.sampling,
            tools=tuple(one.function for one in offered),
            decoded=tuple(one.decoded for one in offered),
            steps=s.max_steps,
        )

    def asks_groups(self, source: Source) -> bool:
        """Whether a request through it may be decided by the caller's groups, or act with them."""
        acts = source.operation == "tool" or (source.agent is not None and source.agent.settings.tools)
        return bool(acts or self.permissions.by_group)

    def check_model(self, caller: Caller, name: str) -> None:
        models = self.scheduler.models
        if not name:
            raise NotFound("no model is configured", "aiosctl model add PATH")
        model = models.get(name)
        at = self.permissions.get(f"/models/{name}") or EVERYBODY
        if not may(caller, at, EXECUTE):
            raise Denied(f"model {name} is not yours to use", "ask its owner for x on its folder")
        if model.state is ModelState.FAILED:
            raise NotFound(f"model {name} is not loaded: {model.error}", f"echo load > models/{name}/ctl")
        if model.state is ModelState.ABSENT:
            raise NotFound(f"model {name} is not loaded", f"echo load > models/{name}/ctl")

    def check_context(self, caller: Caller, name: str) -> None:
        self.scheduler.contexts.get(name)
        at = self.permissions.get(f"/contexts/{name}")
        if at is None or not may(caller, at, WRITE | EXECUTE):
            raise Denied(f"context {name} is not yours to continue", "ask its owner for w on its folder")

    def _unfinished(self, spec: Spec) -> tuple[Spec, dict[str, Any]]:
        """What a request with `resume` goes on with: what was asked, and its tokens and text so far."""
        context = self.scheduler.contexts.find(spec.context)
        if context is None or not context.unfinished:
            raise BadRequest("there is nothing to resume", "copy a kv file that has an unfinished answer")
        if self.scheduler.turn(context) is not None:
            raise BadRequest("the context has a turn going on", "resume when it is done")
        raw = json.loads(context.unfinished)
        length = self.scheduler.models.get(spec.model).info.get("context_length", 0)
        if len(raw["tokens"]) > length:
            raise BadRequest(
                f"what is to be resumed is longer than the {length} tokens of the model's context"
            )
        if raw["tokens"] and raw["model"] != self.scheduler.models.get(spec.model).info.get("identity"):
            raise BadRequest(f"what is to be resumed was not begun by model {spec.model}", "name that model")
        asked = parse(json.dumps(raw["request"]).encode(), Defaults(spec.model))
        whole = replace(
            spec,
            messages=asked.messages,
            tools=asked.tools,
            decoded=asked.decoded,
            tool_choice=asked.tool_choice,
            schema=asked.schema,
            sampling=asked.sampling,
            system=raw["system"],
        )
        return whole, raw

    def check_kv(self, caller: Caller, more: int = 0) -> None:
        """Raises OverQuota when the KV of a user's contexts takes too much, or would with `more` bytes."""
        most, held = self.scheduler.bounds.quotas.of(caller).kv_bytes, self._incoming_kv[caller.uid]
        for context in self.scheduler.contexts.all():
            size = self.scheduler.residency.bytes(context)
            at = self.permissions.get(f"/contexts/{context.name}") if size else None
            held += size if at and at.uid == caller.uid else 0
        if held + more > most:
            raise OverQuota(f"the KV of your contexts may take {most} bytes", "echo evict cold > ctl of some")

    def reserve_kv(self, caller: Caller, size: int) -> None:
        """Bytes of kv files being written; negative gives them back. Raises OverQuota."""
        with self._lock:
            if size > 0:
                self.check_kv(caller, size)
            add(self._incoming_kv, caller.uid, size)

    # submitting

    def submit(self, caller: Caller, source: Source, body: bytes, id: int | None = None) -> Request:
        """Enqueues; what is wrong with the text now ends the request as failed, told to its readers."""
        if b'"response_format"' in body or b'"tools"' in body:
            with suppress(AiosError):  # a schema may take long the first time: not while others wait
                parse(body, self.defaults(source))
        with self._submitting:  # what was judged still holds when the request is in the queue
            request = self._submit(caller, source, body, id)
        with self._lock:
            if id is None:
                shared = self._shared(source, caller.uid)
                self._newest[shared] = max(request.id, self._newest.get(shared, 0))
        self._withdraw_if_removed(source, request)
        return request

    def _submit(self, caller: Caller, source: Source, body: bytes, id: int | None) -> Request:
        if source.agent:
            self.scheduler.agents.check(source.agent)
        self.scheduler.bounds.check_room(caller, source.agent.name if source.agent else "")
        hopeless, begun = "", None
        try:
            spec = self.judge(caller, source, body)
            begun = self._unfinished(spec)[1] if spec.resume else None
        except (BadRequest, NotFound, Denied, OverQuota) as error:
            hopeless = error.explanation
            d = self.defaults(source)
            as_json = source.operation != "tool" and (body[:1] == b"{" or source.operation != "llm")
            written = body[:REFUSED_BYTES].decode("utf-8", "replace")
            said = {"role": REFUSED, "content": written}
            spec = Spec((said,), d.sampling, d.model, json=as_json, operation=source.operation)
        agent, agent_id = (source.agent.name, source.agent.id) if source.agent else ("", 0)
        number = id or self.scheduler.new_id()
        request = Request(number, caller.uid, agent, source.file, spec, agent_id, len(body))
        request.running_most, request.pid = self.scheduler.bounds.quotas.running(caller, agent), caller.pid
        self._claim(source, id)
        more = 0
        try:
            more = self._resume(caller, request, begun) if begun else 0
            self.scheduler.admit(request, hopeless)
        except BaseException:
            self.scheduler.bounds.reserve(caller, -more)
            self._unclaim(source, id)
            raise
        return request

    def _resume(self, caller: Caller, request: Request, begun: dict[str, Any]) -> int:
        """Goes on with an unfinished answer, which its context keeps until the turn is done. Gives its bytes,
        which count as if they had been written."""
        request.tokens, request.text = begun["tokens"], begun["text"]
        size = len(json.dumps(begun))
        self.scheduler.bounds.check_disk(size)
        self.scheduler.bounds.reserve(caller, size)
        request.size_bytes += size
        response.grow(request, request.text, [])
        return size

    def _withdraw_if_removed(self, source: Source, request: Request) -> None:
        """Agent, context or tool may have been removed a moment ago: then the request ends."""
        spec = request.spec
        if spec.context and self.scheduler.contexts.of(spec) is None:
            self.scheduler.cancel(request, "its context was removed")
        called = spec.operation == "tool" and not spec.refused
        if called and self.scheduler.calls.tools.of(spec.model) is None:
            self.scheduler.cancel(request, "its tool is gone")
        if source.agent is None:
            return
        try:
            self.scheduler.agents.check(source.agent)
        except NotFound:
            self.scheduler.cancel(request, "its agent was removed")
            self.scheduler.store.remove_request(request.id)

    def _claim(self, source: Source, id: int | None) -> None:
        """An allocated id is used by the first who submits with it."""
        if id is None or source.agent is None:
            return
        with self._lock:
            if self._drafts.get(source.agent.name, {}).pop(id, 0) == 0:
                raise NotAllowed(f"request {id} was written already")

    def _unclaim(self, source: Source, id: int | None) -> None:
        """It could not be stored; he may try again."""
        if id is not None and source.agent is not None:
            with self._lock:
                self._drafts.setdefault(source.agent.name, {})[id] = None

    @staticmethod
    def _shared(source: Source, uid: int) -> tuple[int, str, int | None]:
        """An agent's file is one for all who may use it; of a model's file each user sees his own."""
        return (source.agent.id, source.file, None) if source.agent else (0, source.file, uid)

    # finding

    def newest(self, source: Source, uid: int) -> int | None:
        key = self._shared(source, uid)
        with self._lock:
            known = self._newest.get(key)
        return known if known is not None else self.scheduler.store.newest(*key)

    def get(self, id: int) -> Request:
        """Any request that is kept, running or ended. Raises NotFound."""
        request = self.scheduler.find(id) or self._read.get(id)
        if request is not None:
            return request
        request = self.scheduler.store.request(id)
        if request is None:
            raise NotFound(f"no request {id}")
        self._read[id] = ended(request)
        return request

    def forget(self, agent: Agent) -> None:
        with self._lock:
            self._drafts.pop(agent.name, None)
            self._newest = {key: id for key, id in self._newest.items() if key[0] != agent.id}

    # drafts: requests/new

    def allocate(self, agent: str) -> int:
        with self._lock:
            drafts = self._drafts.setdefault(agent, {})
            if len(drafts) >= DRAFTS_MAX:
                raise Busy(f"{DRAFTS_MAX} requests were allocated and never written", "write to them first")
            id = self.scheduler.new_id()
            drafts[id] = None
            return id

    def drafts(self, agent: str) -> list[int]:
        with self._lock:
            return list(self._drafts.get(agent, ()))


def may(caller: Caller, permission: Permission, want: int) -> bool:
    """As permissions.may. Raises Denied where it would have to guess."""
    if permissions.asks_groups(caller, permission, want):
        raise Denied(*REGROUPED)
    return permissions.may(caller, permission, want)


def acting(caller: Caller) -> tuple[int, ...]:
    """The groups that his tools run with. Raises Denied."""
    if not caller.grouped:
        raise Denied(*REGROUPED)
    return caller.gid, *sorted(caller.groups)


def check_nice(caller: Caller, nice: int) -> None:
    """As nice(2): only who is privileged goes before the others."""
    if nice < 0 and caller.uid not in (0, identity.uid()):
        raise Denied(f"nice {nice} is for root", "0 to 19 is everybody's")
