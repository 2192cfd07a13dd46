"""What the readers of a request get: its text as it grows, the end, and the document response.json.

The shapes are those of the request's kind (aiosd.syscall.spec.Spec). Only the scheduler calls `grow` and
`end`.
"""

from __future__ import annotations

import json
from typing import Any

from aiosd.errors import RequestFailed
from aiosd.syscall.request import Request, State

ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def grow(request: Request, logprobs: list[Any], last: bool = False) -> None:
    """Append the new text, which may lag behind its tokens. With `last`, the request ends at once."""
    text, request.read = request.text[request.read :], len(request.text)
    data = request.spec.part(request, text, logprobs)
    if last and not request.spec.json:
        data += request.spec.left(request)
        data += b"" if ends_line(request, data) else b"\n"
    request.answer.append(data, last)


def end(request: Request) -> None:
    """Complete the answer of a request that has ended."""
    done, spec = request.state is State.DONE, request.spec
    if not spec.json:
        left = b"" if request.answer.whole else spec.left(request)
        lacks = done and spec.ends_line() and not ends_line(request, left)
        reason = f"request {request.id} {request.state}: {request.error}"
        request.answer.end(left + (b"\n" if lacks else b""), None if done else RequestFailed(reason))
        return
    rest = spec.rest(request) if done else None
    request.answer.end((document(request) if rest is None else rest).encode())


def ends_line(request: Request, data: bytes) -> bool:
    """Whether the answer ends in a newline once `data` is appended."""
    return data.endswith(b"\n") if data else request.answer.ends_line


def document(request: Request) -> str:
    """response.json, made once, when it is first asked for; empty while the request goes on."""
    if not request.document and request.state.final:
        own = request.state is State.DONE or request.spec.documents_failure
        request.document = request.spec.document(request) if own else failure(request)
    return request.document


def failure(request: Request) -> str:
    facts = {"message": request.error, "type": str(request.state), "code": request.error_code or None}
    return line({"error": facts | {"request": request.id}})


def line(document: dict[str, Any]) -> str:
    text = ENCODER.encode(document) + "\n"
    return text.encode("utf-8", "replace").decode()  # a model may say half a surrogate pair in a call
