"""OpenAI's embeddings."""

from __future__ import annotations

import array
import asyncio
import base64
import json
from typing import Any

from starlette.responses import JSONResponse, Response

from aiosd.gateway.dialect import HttpCall, failed, model_file
from aiosd.gateway.refused import HttpRefused

TEXTS_MOST = 2048
AT_ONCE = 8

Json = dict[str, Any]


async def embeddings(call: HttpCall) -> Response:
    """One request of the files for each text, a few at once."""
    body = call.json()
    path, given, encoding = (
        model_file(call.client, call.client.meant(body.get("model")), "embed"),
        texts(body),
        encoding_of(body),
    )
    documents = list[Json]()
    for start in range(0, len(given), AT_ONCE):
        asking = [embedding(call, path, text) for text in given[start : start + AT_ONCE]]
        documents += await asyncio.gather(*asking)
    data, tokens = [], 0
    for i, document in enumerate(documents):
        vector = document["data"][0]["embedding"]
        if body.get("dimensions") not in (None, len(vector)):
            reason = f"the vectors of this model have {len(vector)} dimensions"
            raise HttpRefused(400, reason, param="dimensions")
        data.append({"object": "embedding", "index": i, "embedding": encoded(vector, encoding)})
        tokens += document["usage"]["prompt_tokens"]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": documents[0]["model"], "usage": usage})


async def embedding(call: HttpCall, path: str, text: str) -> Json:
    reply = await call.client.ask(path, json.dumps({"input": text}).encode() + b"\n")
    document = await reply.document()
    if "error" in document:
        raise failed(document)
    return document


def texts(body: Json) -> list[str]:
    given = body.get("input")
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, list) or not 1 <= len(found) <= TEXTS_MOST:
        reason = f"input is a text, or a list of 1 to {TEXTS_MOST} texts"
        raise HttpRefused(400, reason, param="input")
    if not all(isinstance(text, str) for text in found):
        raise HttpRefused(400, "input has tokens in place of texts: send texts", param="input")
    return found


def encoding_of(body: Json) -> str:
    encoding = body.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise HttpRefused(400, "encoding_format is float or base64", param="encoding_format")
    return str(encoding)


def encoded(vector: list[float], encoding: str) -> list[float] | str:
    """base64: of the numbers as 32-bit floats, little-endian as every machine that aiosd runs on."""
    return base64.b64encode(array.array("f", vector).tobytes()).decode() if encoding == "base64" else vector
