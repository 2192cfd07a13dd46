"""The HTTP server with which bench.fs compares a transaction. It answers at once, without a model.

`python -m uvicorn bench.http_peer:app` serves the same two calls as bench.fuse_floor.
"""

from __future__ import annotations

from fastapi import FastAPI


def status() -> dict[str, str]:
    return {"state": "running"}


def llm(request: dict[str, str]) -> dict[str, str]:
    return {"text": request["prompt"]}


app = FastAPI()
app.add_api_route("/status", status)
app.add_api_route("/llm", llm, methods=["POST"])
