"""The shapes of AIOS's errors: those of HTTP, and those in the response of a query."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from aiosd.gateway.refused import HttpRefused

Json = dict[str, Any]


def wrong(where: str, reason: str) -> HttpRefused:
    """The form of a request is wrong; `where` is the key, with dots between."""
    return HttpRefused(422, f"{where}: {reason}", param=where)


def refusal(refused: HttpRefused) -> Response:
    """The shape of FastAPI, with which AIOS is written: `detail`."""
    if refused.status in (400, 422):
        where = ["body", *(refused.param.split(".") if refused.param else [])]
        detail = [{"type": "value_error", "loc": where, "msg": refused.reason}]
        return JSONResponse({"detail": detail}, 422)
    return JSONResponse({"detail": refused.reason}, refused.status, refused.headers)


def failure(kind: str, refused: HttpRefused) -> Json:
    """What a query answers that failed; `kind` is its query_class."""
    shape: Json = {"response_class": kind, "response_message": None, "error": refused.reason}
    if kind == "memory":
        empty = {"memory_id": None, "content": None, "metadata": None, "search_results": None}
        return {"response_class": kind, **empty, "success": False, "error": refused.reason}
    if kind == "llm":
        shape |= {"tool_calls": None}
    if kind == "tool":  # its agents show the message to the model
        shape |= {"response_message": f"Tool calling error: {refused.reason}"}
    return shape | {"finished": kind != "tool", "status_code": refused.status}
