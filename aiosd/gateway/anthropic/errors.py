"""The shape of Anthropic's errors."""

from __future__ import annotations

import json
import secrets
from typing import Any

from starlette.responses import Response

from aiosd.gateway.refused import HttpRefused

NO_THREADS = "thread_unsupported_request"  # a client that reads this sends the whole conversation itself
TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


def shape(refused: HttpRefused) -> dict[str, Any]:
    kind = TYPES.get(refused.status, "invalid_request_error" if refused.status < 500 else "api_error")
    reason, more = refused.reason, {}
    if refused.code == "context_length_exceeded":
        reason = f"prompt is too long: {reason}"  # clients look for these words, and shorten it
    if refused.code == NO_THREADS:
        more = {"details": {"error_code": NO_THREADS, "unsupported": ["thread"]}}
    return {"type": "error", "error": {"type": kind, "message": reason, **more}}


def refusal(refused: HttpRefused) -> Response:
    id = request_id(secrets.token_hex(12))
    told = json.dumps(shape(refused) | {"request_id": id})  # escapes whatever text the request had
    return Response(told, refused.status, refused.headers | header(id), "application/json")


def request_id(of: str) -> str:
    return f"req_{of}"


def header(id: str) -> dict[str, str]:
    return {"request-id": id}
