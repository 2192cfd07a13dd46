"""The dialect of Ollama's API. Its errors are {"error": TEXT}, its streams are lines of JSON."""

from __future__ import annotations

import json

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from aiosd.gateway.dialect import Dialect, Endpoint, HttpCall
from aiosd.gateway.ollama.completions import chat, generate
from aiosd.gateway.ollama.models import copied, deleted, loaded, show, tags
from aiosd.gateway.ollama.pulls import pull
from aiosd.gateway.ollama.vectors import embed, embeddings
from aiosd.gateway.refused import HttpRefused

VERSION = "0.12.0"  # the API of Ollama's that this is; programs ask for it to know what they may send


def refusal(refused: HttpRefused) -> Response:
    """`json.dumps` escapes whatever text the request had. So every reason can be sent."""
    text = json.dumps({"error": refused.reason})
    return Response(text, refused.status, refused.headers, "application/json")


async def version(_: HttpCall) -> Response:
    return JSONResponse({"version": VERSION})


async def cannot_create(_: HttpCall) -> Response:
    raise HttpRefused(
        501, "models are not made here; for a system prompt and parameters of your own make an agent:"
        " mkdir /aios/agents/NAME, and use the model agent:NAME",
    )  # fmt: skip


async def cannot_push(_: HttpCall) -> Response:
    raise HttpRefused(501, "models are not published from here; the owner of the files publishes them")


async def missing(_: HttpCall) -> Response:
    raise HttpRefused(404, "no such path or method here; aios-gateway(8) lists them")


async def running(_: Request) -> Response:
    """Programs look here whether a server is up, before they have a key."""
    return PlainTextResponse("Ollama is running")


DIALECT = Dialect(
    "ollama",
    (
        Endpoint("POST", "/api/chat", chat),
        Endpoint("POST", "/api/generate", generate),
        Endpoint("POST", "/api/embed", embed),
        Endpoint("POST", "/api/embeddings", embeddings),
        Endpoint("GET", "/api/tags", tags),
        Endpoint("GET", "/api/ps", loaded),
        Endpoint("POST", "/api/show", show),
        Endpoint("POST", "/api/pull", pull),
        Endpoint("POST", "/api/copy", copied),
        Endpoint("DELETE", "/api/delete", deleted),
        Endpoint("GET", "/api/version", version),
        Endpoint("POST", "/api/create", cannot_create),
        Endpoint("POST", "/api/push", cannot_push),
        *(Endpoint(method, "/api/{path:path}", missing) for method in ("GET", "POST", "PUT", "DELETE")),
    ),
    refusal,
)
