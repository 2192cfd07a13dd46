"""What a dialect of HTTP is: its routes, and the shape of its errors. A dialect is a module of its own.

A handler gets an HttpCall and gives a response of starlette, which may be a stream. It opens files only
through `call.client`. It may raise HttpRefused, of which `Dialect.refusal` makes a response. A stream that
has begun tells an HttpRefused in its own way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, QueryParams
from starlette.responses import Response

from aiosd.gateway.client import Client
from aiosd.gateway.refused import HttpRefused

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
AGENT = "agent:"
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\0")  # or text in UTF-16
# The status of a request that was accepted and failed, by `code` of aios-transaction(7). Any other is 500.
FAILED = {"invalid_request": 400, "context_length_exceeded": 400, "model_unavailable": 503}


@dataclass(frozen=True, slots=True)
class HttpCall:
    """One HTTP request of a client, with its whole body."""

    client: Client
    body: bytes
    headers: Headers
    query: QueryParams
    parts: dict[str, Any]  # of the path

    def json(self) -> dict[str, Any]:
        """The body as a JSON object. Raises HttpRefused."""
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise HttpRefused(400, f"the body is not JSON: {error}", "invalid_json") from None
        if not isinstance(found, dict):
            raise HttpRefused(400, "the body is not a JSON object", "invalid_json")
        if SURROGATE.search(self.body):
            try:
                json.dumps(found, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                reason = "half a surrogate pair (\\ud800 to \\udfff) is not a character"
                raise HttpRefused(400, reason, "invalid_json") from None
        return found


Handler = Callable[[HttpCall], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    method: str
    path: str
    handle: Handler
    header: str = ""  # only for requests that have it; such an endpoint stands before that without


@dataclass(frozen=True, slots=True)
class Dialect:
    name: str
    endpoints: tuple[Endpoint, ...]
    refusal: Callable[[HttpRefused], Response]


def chat_file(client: Client, model: object) -> str:
    """The file that chats with a model, or with `agent:NAME`. Raises HttpRefused."""
    model = client.meant(model)
    if not isinstance(model, str) or not model.startswith(AGENT):
        return model_file(client, model, "llm")
    agent = model.removeprefix(AGENT)
    if client.agent not in ("", agent):
        raise another(client)
    if not NAME.fullmatch(agent):
        raise unknown(model)
    return f"agents/{agent}/syscall/llm"


def model_file(client: Client, model: object, name: str) -> str:
    """A file of a model of this name, which is no alias. Raises HttpRefused."""
    if not isinstance(model, str) or not model:
        reason = "model is missing; GET /v1/models shows what there is"
        raise HttpRefused(400, reason, "missing_model", "model")
    if client.agent:
        raise another(client)
    if not NAME.fullmatch(model):
        raise unknown(model)
    return f"models/{model}/{name}"


def another(client: Client) -> HttpRefused:
    return HttpRefused(403, f"this key may use only {AGENT}{client.agent}", "model_not_allowed", "model")


def unknown(model: str) -> HttpRefused:
    shown = model if len(model) <= 100 else model[:100] + "…"
    reason = f"there is no model {shown}; GET /v1/models shows what there is"
    return HttpRefused(404, reason, "model_not_found", "model")


def failed(answer: dict[str, Any]) -> HttpRefused:
    """What the JSON of a request says that was accepted and ended without an answer."""
    error = answer["error"]
    code = error.get("code") or error.get("type") or "failed"
    return HttpRefused(FAILED.get(code, 500), str(error.get("message") or "the request failed"), str(code))
