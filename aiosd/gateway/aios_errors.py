"""The shapes of AIOS's errors: those of HTTP, and those in the response of a query."""

from __future__ import annotations

import json
from typing import Any, Never

from starlette.responses import JSONResponse, Response

from aiosd.gateway.refused import HttpRefused

Json = dict[str, Any]


class AsciiResponse(JSONResponse):
    """JSON of texts that need not be valid Unicode: a program may have printed them."""

    def render(self, content: Any) -> bytes:
        try:
            return json.dumps(content).encode()
        except RecursionError:
            raise HttpRefused(500, "the answer is nested too deep") from None


def parsed(text: str) -> Any:
    """JSON that a program or a model wrote. Raises ValueError."""
    try:
        return json.loads(text, parse_constant=no_number)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def no_number(word: str) -> Never:
    raise ValueError(f"{word} is not JSON")


def wrong(where: str, reason: str) -> HttpRefused:
    """The form of a request is wrong; `where` is the key, with dots between."""
    return HttpRefused(422, f"{where}: {reason}", param=where)


def refusal(refused: HttpRefused) -> Response:
    """The shape of FastAPI, with which AIOS is written: `detail`."""
    if refused.status in (400, 422):
        where = ["body", *(refused.param.split(".") if refused.param else [])]
        detail = [{"type": "value_error", "loc": where, "msg": refused.reason}]
        return AsciiResponse({"detail": detail}, 422)
    return AsciiResponse({"detail": refused.reason}, refused.status, refused.headers)


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
