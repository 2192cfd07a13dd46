"""What bench.fs compares a transaction with: the usual way to offer a model, answering at once.

`python -m uvicorn bench.http_peer:app --uds SOCKET`; the same two calls as bench.fuse_floor.
"""

from __future__ import annotations

from fastapi import FastAPI
from pydantic import BaseModel

app = FastAPI()


class Request(BaseModel):
    prompt: str


@app.get("/status")
def status() -> dict[str, str]:
    return {"state": "running"}


@app.post("/llm")
def llm(request: Request) -> dict[str, str]:
    return {"text": request.prompt}
