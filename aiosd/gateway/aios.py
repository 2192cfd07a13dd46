"""The dialect of AIOS's kernel, which programs written with its SDK (Cerebrum) speak: its paths.

As there, what is wrong with the form of a request is an error of HTTP, and what fails later is told in the
response of a query.
"""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from aiosd.gateway.aios_agents import processes, status, submit
from aiosd.gateway.aios_errors import refusal
from aiosd.gateway.aios_query import query
from aiosd.gateway.client import Client
from aiosd.gateway.dialect import Dialect, Endpoint, HttpCall
from aiosd.gateway.refused import HttpRefused

MISSING = ("memory", "storage")  # parts of its kernel that aiosd does not have
PARTS = ("llms", "tool", "scheduler", "factory")
SET_UP = "aiosd is set up by its administrator; this has changed nothing"


async def models(call: HttpCall) -> Response:
    llms = [{"name": name, "backend": "aiosd", "provider": "aiosd"} for name in await names(call.client)]
    return JSONResponse({"status": "success", "llms": llms})


async def names(client: Client) -> list[str]:
    """The models that the client may use."""
    return [entry.name for entry in await client.list("models") if entry.open and not client.agent]


async def health(_: HttpCall) -> Response:
    said = f"aiosd runs, but it has no {' and no '.join(MISSING)}"
    return JSONResponse({"status": "warning", "message": said, "inactive_components": list(MISSING)})


async def parts(_: HttpCall) -> Response:
    return JSONResponse(dict.fromkeys(PARTS, "active") | dict.fromkeys(MISSING, "inactive"))


async def set_up(call: HttpCall) -> Response:
    """Version 0.0.3 of the SDK sets up its kernel before it submits an agent."""
    if call.parts["part"] == "llm" and call.json().get("llm_name") not in await names(call.client):
        raise HttpRefused(404, "there is no such model; GET /core/llms/list shows what there is")
    return JSONResponse({"status": "success", "message": SET_UP})


async def clean_up(_: HttpCall) -> Response:
    return JSONResponse({"status": "success", "message": SET_UP})


DIALECT = Dialect(
    "aios",
    (
        Endpoint("POST", "/query", query),
        Endpoint("POST", "/agents/submit", submit),
        Endpoint("GET", "/agents/ps", processes),
        Endpoint("GET", "/agents/{id}/status", status),
        Endpoint("GET", "/core/llms/list", models),
        Endpoint("GET", "/core/status", parts),
        Endpoint("GET", "/status", health),
        Endpoint("POST", "/core/{part}/setup", set_up),
        Endpoint("POST", "/core/cleanup", clean_up),
    ),
    refusal,
)
