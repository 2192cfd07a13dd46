"""Ollama's /api/embed and the older /api/embeddings."""

from __future__ import annotations

import asyncio
import time

from starlette.responses import JSONResponse, Response

from aiosd.gateway.dialect import HttpCall, model_file
from aiosd.gateway.ollama import names, request
from aiosd.gateway.openai_text import AT_ONCE, TEXTS_MOST, embedding
from aiosd.gateway.refused import HttpRefused


async def embed(call: HttpCall) -> Response:
    began_ns, body = time.monotonic_ns(), call.json()
    name, texts = names.given(body), several(body.get("input"))
    vectors, tokens = await embedded(call, name, texts)
    size = len(vectors[0]) if vectors else 0
    if body.get("dimensions") not in (None, 0, size):
        raise HttpRefused(400, f"the vectors of this model have {size} dimensions", param="dimensions")
    return JSONResponse(
        {
            "model": name, "embeddings": vectors, "total_duration": time.monotonic_ns() - began_ns,
            "load_duration": 0, "prompt_eval_count": tokens,
        }
    )  # fmt: skip


async def embeddings(call: HttpCall) -> Response:
    body = call.json()
    prompt = request.text(body, "prompt")
    vectors, _ = await embedded(call, names.given(body), several(prompt))
    return JSONResponse({"embedding": vectors[0] if vectors else []})


def several(given: object) -> list[str]:
    """The texts of an input. An empty text is none."""
    if isinstance(given, str) or given is None:
        return [given] if given else []
    if isinstance(given, list) and len(given) <= TEXTS_MOST and all(isinstance(one, str) for one in given):
        return given
    raise HttpRefused(400, f"input is a text, or a list of at most {TEXTS_MOST} texts", param="input")


async def embedded(call: HttpCall, name: str, texts: list[str]) -> tuple[list[list[float]], int]:
    """The vectors, and how many tokens the texts have. A few requests of the files at once."""
    path = model_file(call.client, call.client.meant(names.local(name)), "embed")
    vectors, tokens = list[list[float]](), 0
    for start in range(0, len(texts), AT_ONCE):
        asking = [embedding(call, path, text) for text in texts[start : start + AT_ONCE]]
        for document in await asyncio.gather(*asking):
            vectors.append(document["data"][0]["embedding"])
            tokens += document["usage"]["prompt_tokens"]
    return vectors, tokens
