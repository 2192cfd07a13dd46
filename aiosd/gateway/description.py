"""The gateway's own description of its paths, as OpenAPI 3.1 has it: GET /openapi.json.

It tells the shape of bodies as far as programs commonly send them. A key that is not listed may count too, or
be refused; aios-gateway(8) has the words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from aiosd.gateway.dialect import Dialect

Json = dict[str, Any]
TEXT: Json = {"type": "string"}
FLAG: Json = {"type": "boolean"}
OBJECT: Json = {"type": "object"}
OBJECTS: Json = {"type": "array", "items": OBJECT}
TEXTS: Json = {"type": "array", "items": TEXT}
COUNT: Json = {"type": "integer", "minimum": 1, "maximum": 4096}
SHARE: Json = {"type": "number", "minimum": 0, "maximum": 1}
WARMTH: Json = {"type": "number", "minimum": 0, "maximum": 2}
SEED: Json = {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}
ONE_OR_MORE: Json = {"anyOf": [TEXT, TEXTS]}
SAMPLING: Json = {"temperature": WARMTH, "top_p": SHARE}


def message(*roles: str) -> Json:
    said = {"role": {"enum": list(roles)}, "content": TEXT}
    return {"type": "object", "properties": said, "required": ["role", "content"]}


def turns(*roles: str) -> Json:
    return {"type": "array", "items": message(*roles), "minItems": 1}


def body(required: Iterable[str], **properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(required)}


CHAT = turns("system", "user", "assistant")
BODIES: dict[str, Json] = {
    "/v1/chat/completions": body(
        ("model", "messages"), model=TEXT, messages=CHAT, stream=FLAG, max_tokens=COUNT, seed=SEED,
        n={"type": "integer", "minimum": 1, "maximum": 16}, stop=ONE_OR_MORE, tools=OBJECTS, logprobs=FLAG,
        **SAMPLING,
    ),
    "/v1/completions": body(
        ("model", "prompt"), model=TEXT, prompt=ONE_OR_MORE, stream=FLAG, max_tokens=COUNT, seed=SEED,
        **SAMPLING,
    ),
    "/v1/embeddings": body(
        ("model", "input"), model=TEXT, input=ONE_OR_MORE, encoding_format={"enum": ["float", "base64"]}
    ),
    "/v1/responses": body(
        ("model", "input"), model=TEXT, input=TEXT, instructions=TEXT, previous_response_id=TEXT, stream=FLAG,
        store=FLAG, max_output_tokens=COUNT, tools=OBJECTS, **SAMPLING,
    ),
    "/v1/conversations": body((), metadata=OBJECT, items=OBJECTS),
    "/v1/conversations/{id}": body(("metadata",), metadata=OBJECT),
    "/v1/conversations/{id}/items": body(("items",), items=OBJECTS),
    "/v1/messages": body(
        ("model", "messages", "max_tokens"), model=TEXT, messages=turns("user", "assistant"),
        max_tokens=COUNT, system=TEXT, stream=FLAG, tools=OBJECTS, stop_sequences=TEXTS, temperature=SHARE,
        top_p=SHARE,
    ),
    "/v1/messages/count_tokens": body(
        ("model", "messages"), model=TEXT, messages=turns("user", "assistant"), system=TEXT,
        tools=OBJECTS,
    ),
    "/api/chat": body(
        ("model", "messages"), model=TEXT, messages=CHAT, stream=FLAG, options=OBJECT, tools=OBJECTS
    ),
    "/api/generate": body(
        ("model", "prompt"), model=TEXT, prompt=TEXT, system=TEXT, stream=FLAG, options=OBJECT
    ),
    "/api/embed": body(("model", "input"), model=TEXT, input=ONE_OR_MORE),
    "/api/embeddings": body(("model", "prompt"), model=TEXT, prompt=TEXT),
    "/api/show": body(("model",), model=TEXT),
    "/api/pull": body(("model",), model=TEXT, stream=FLAG),
    "/api/copy": body(("source", "destination"), source=TEXT, destination=TEXT),
    "/api/delete": body(("model",), model=TEXT),
    "/query": body(
        ("query_type", "agent_name", "query_data"), query_type={"enum": ["llm", "tool"]}, agent_name=TEXT,
        query_data=OBJECT,
    ),
    "/agents/submit": body(("agent_id",), agent_id=TEXT, agent_config=OBJECT),
}  # fmt: skip
ABSENT = ("/api/create", "/api/push", "/api/{path:path}")  # only told that they are not there


def description(dialects: Iterable[Dialect], version: str) -> Json:
    paths: Json = {}
    for dialect in dialects:
        for endpoint in dialect.endpoints:
            path = re.sub(r":path\}", "}", endpoint.path)
            if endpoint.path not in ABSENT and not endpoint.header:
                operation = described(path, dialect.name, endpoint.method)
                paths.setdefault(path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "aios-gateway", "version": version, "description": "See aios-gateway(8)."},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}],
    }


def described(path: str, tag: str, method: str) -> Json:
    names = re.findall(r"\{(\w+)\}", path)
    found: Json = {
        "tags": [tag],
        "parameters": [{"name": name, "in": "path", "required": True, "schema": TEXT} for name in names],
        "responses": {"default": {"description": "The answer, or an error in the shape of the API."}},
    }
    if method != "GET":
        content = {"application/json": {"schema": BODIES.get(path, OBJECT)}}
        found["requestBody"] = {"required": path in BODIES, "content": content}
    return found
