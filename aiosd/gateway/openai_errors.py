"""The shape of OpenAI's errors."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from aiosd.gateway.refused import HttpRefused

TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
}  # fmt: skip


def shape(refused: HttpRefused) -> dict[str, Any]:
    kind = TYPES.get(refused.status, "invalid_request_error" if refused.status < 500 else "server_error")
    return {"message": refused.reason, "type": kind, "param": refused.param, "code": refused.code}


def refusal(refused: HttpRefused) -> Response:
    return JSONResponse({"error": shape(refused)}, refused.status, refused.headers)
