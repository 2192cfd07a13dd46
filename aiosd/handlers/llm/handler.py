"""Requests for a model's answer, alone or as a turn of a conversation."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from aiosd.access.caller import Caller
from aiosd.cores import wire
from aiosd.cores.models import Models
from aiosd.cores.pool import Worker
from aiosd.errors import BadRequest
from aiosd.handlers.onworker import OnWorker
from aiosd.scheduler import parking
from aiosd.scheduler.handler import Source
from aiosd.scheduler.names import acting, check_nice
from aiosd.syscall import response
from aiosd.syscall.chat import Chat, Defaults, Loop, parse
from aiosd.syscall.foreign import is_object
from aiosd.syscall.request import Request, State
from aiosd.syscall.spec import Message, Spec

CONTEXT_GONE = "its context was removed"


class ChatHandler(OnWorker):
    # admission

    def asks_groups(self, source: Source) -> bool:
        agent = source.agent
        return agent is not None and (bool(agent.settings.tools) or self._parts.names.asks_groups(agent.name))

    def check(self, caller: Caller, source: Source) -> None:
        defaults, agent = self.defaults(source), source.agent.name if source.agent else ""
        self._parts.names.check_model(caller, defaults.model, agent)
        if defaults.steps:
            self._parts.names.check_tools(caller, names_of(defaults.tools), agent)
        if defaults.context:
            self._parts.names.check_context(caller, defaults.context)
            self._parts.kv_budget.check(caller)

    def judge(self, caller: Caller, source: Source, body: bytes) -> Chat:
        defaults = self.defaults(source)
        asked = parse(body, defaults)
        if asked.nice < defaults.nice:
            check_nice(caller, asked.nice)
        self.check_names(caller, source, asked)
        if asked.context:
            asked = replace(asked, context_id=self._parts.contexts.get(asked.context).id)
        if isinstance(asked, Loop):
            asked = replace(asked, groups=acting(caller))
        return resumed(asked, self._unfinished(asked)) if asked.resume else asked

    def check_names(self, caller: Caller, source: Source, spec: Spec) -> None:
        assert isinstance(spec, Chat)
        names, agent = self._parts.names, source.agent.name if source.agent else ""
        names.check_model(caller, spec.model, agent)
        if spec.context:
            names.check_context(caller, spec.context)
            self._parts.kv_budget.check(caller)
        if isinstance(spec, Loop):
            names.check_tools(caller, names_of(spec.tools), agent)

    def misunderstood(self, source: Source, body: bytes) -> Chat:
        defaults = self.defaults(source)
        return Chat((), defaults.sampling, defaults.model, json=is_object(body))

    def defaults(self, source: Source) -> Defaults:
        """Return the settings that a request of this file starts from."""
        if source.agent is None:
            return Defaults(source.target)
        s = source.agent.settings
        known = map(self._parts.tools.find, s.tools) if s.tools else ()
        offered = [tool for tool in known if tool and tool.ready]
        return Defaults(
            s.model or self._parts.models.default,
            s.context,
            s.system,
            s.nice,
            s.sampling,
            tools=tuple(one.function for one in offered),
            decoded=tuple(one.manifest.decoded for one in offered),
            parallel=s.parallel,
            template=s.template,
            steps=s.max_steps,
        )

    def _unfinished(self, asked: Chat) -> dict[str, Any]:
        """Return the unfinished answer that a request with `resume` continues. Raises BadRequest."""
        context = self._parts.contexts.find(asked.context)
        if context is None or not context.unfinished:
            raise BadRequest("there is nothing to resume", "first write a kv file with an unfinished answer")
        if self._parts.scheduler.turn(context.id) is not None:
            raise BadRequest("the context has an unfinished turn", "resume after it has ended")
        raw: dict[str, Any] = json.loads(context.unfinished)
        check_resumable(raw, asked.model, self._parts.models)
        return raw

    def begin(self, caller: Caller, request: Request) -> int:
        """For `resume`: take over the unfinished answer. Its bytes count as if they were written."""
        asked = request.spec
        assert isinstance(asked, Chat)
        if not asked.resume:
            return 0
        begun = self._unfinished(asked)
        request.tokens, request.text = begun["tokens"], begun["text"]
        size = len(json.dumps(begun))
        self._parts.limits.check_disk(size)
        self._parts.limits.reserve(caller, size)
        request.size_bytes += size
        request.family = self._parts.models.get(asked.model).family
        response.grow(request, [])
        return size

    def orphaned(self, request: Request) -> str:
        gone = request.spec.context_name and self._parts.contexts.of(request.spec) is None
        return CONTEXT_GONE if gone else ""

    # running

    def start(self, request: Request, worker: Worker | None) -> None:
        assert worker is not None
        if why := self.orphaned(request):
            self._parts.ending.finish(request, State.FAILED, why)
            return
        request.family = worker.model.family
        if request.parked:
            self._unpark(request, worker)
        super().start(request, worker)

    def _unpark(self, request: Request, worker: Worker) -> None:
        """Continue from the tokens that an earlier daemon stored when it stopped."""
        with self._parts.scheduler.lock:
            goes_on = parking.unpack(request, worker.model)
        if goes_on:
            response.grow(request, request.logprobs)
            if request.parent:
                self._parts.scheduler.step_said(request)

    def message(self, request: Request, owner: str, context: int) -> wire.Submit:
        asked = request.spec
        assert isinstance(asked, Chat)
        return wire.Submit(
            id=request.id,
            messages=self._parts.contexts.whole(asked),
            tools=list(asked.tools),
            decoded=list(asked.decoded),
            sampling=wire.plain(asked.sampling),
            owner=owner,
            resume=list(request.tokens),
            context=context,
            operation="raw" if asked.raw else "llm",
            schema=asked.schema,
            tool_choice=asked.tool_choice,
            parallel=asked.parallel,
            template=asked.template,
        )

    # the end

    def account(self, request: Request) -> None:
        super().account(request)
        context = self._parts.dispatch.conversation(request)
        if context and request.state is State.DONE:
            context.tokens = request.spent.prompt_tokens + request.spent.completion_tokens
            context.model, context.unfinished = request.spec.target, ""


def names_of(functions: tuple[Message, ...]) -> list[str]:
    return [one["function"]["name"] for one in functions]


def check_resumable(raw: dict[str, Any], model: str, models: Models) -> None:
    """Raise BadRequest if the model cannot continue an unfinished answer."""
    info = models.get(model).info
    if not info:
        why = f"model {model} was not loaded yet, so whether it began the unfinished answer is not known"
        raise BadRequest(why, f"echo load > models/{model}/ctl, then resume")
    length = info.get("context_length", 0)
    if len(raw["tokens"]) > length:
        raise BadRequest(f"the unfinished answer is longer than the model's context of {length} tokens")
    if raw["tokens"] and raw["model"] != info.get("identity"):
        raise BadRequest(f"model {model} did not begin the unfinished answer", "name the model that did")


def resumed(asked: Chat, raw: dict[str, Any]) -> Chat:
    """Return the request with everything that the unfinished answer was asked with."""
    before = parse(json.dumps(raw["request"]).encode(), Defaults(asked.model))
    return replace(
        asked,
        messages=before.messages,
        tools=before.tools,
        decoded=before.decoded,
        tool_choice=before.tool_choice,
        parallel=before.parallel,
        template=before.template,
        schema=before.schema,
        sampling=before.sampling,
        system=raw["system"],
        leads=before.leads,
    )
