"""Ollama's names of models, as names of the tree and as sources of the model store. Pure.

smollm2:latest is models/smollm2, smollm2:135m is models/smollm2-135m and hf.co/org/Model-GGUF:Q4_K_M is
models/Model-Q4_K_M: the names that aiosctl pull gives too.
"""

from __future__ import annotations

import re

from aiosd.gateway.dialect import AGENT
from aiosd.gateway.refused import HttpRefused

LATEST = ":latest"
PART = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,95}"
OLLAMA = re.compile(rf"(?:(?:registry\.ollama\.ai/)?library/)?({PART})(?::({PART}))?")
HUB = re.compile(rf"(?:hf\.co|huggingface\.co)/({PART}/({PART}))(?::({PART}))?")
NAME_CHARS = 64


def given(body: dict[str, object], *keys: str) -> str:
    """The name in a request. Raises HttpRefused."""
    name = next((body[key] for key in keys or ("model", "name") if body.get(key)), None)
    if not isinstance(name, str):
        raise HttpRefused(400, "model is required: a name that GET /api/tags shows", "missing_model", "model")
    return name


def local(name: str) -> str:
    """The name in the tree, or agent:NAME. Raises HttpRefused."""
    if name.startswith(AGENT):
        return name.removesuffix(LATEST)
    name = name.removesuffix(LATEST)
    if found := HUB.fullmatch(name):
        _, whole, tag = found.groups()
        whole = re.sub(r"[-_.]gguf$", "", whole, flags=re.IGNORECASE)
    elif found := OLLAMA.fullmatch(name):
        whole, tag = found.groups()
    else:
        raise not_found(name)
    return "-".join(filter(None, (whole, tag)))[:NAME_CHARS]


def tagged(name: str) -> str:
    """The name in Ollama's lists, which every entry has with a tag."""
    return name if ":" in name else name + LATEST


def source(name: str) -> str:
    """What `pull` of a model's ctl takes. Raises HttpRefused."""
    name = name.removesuffix(LATEST)
    if found := HUB.fullmatch(name):
        repository, _, tag = found.groups()
        return f"hf:{repository}" + (f":{tag}" if tag else "")
    if not name.startswith(AGENT) and (found := OLLAMA.fullmatch(name)):
        whole, tag = found.groups()
        return ":".join(filter(None, (whole, tag)))
    raise HttpRefused(
        400, f"{shown(name)} is not a model to pull: write a name of the catalogue in aios-model(7), or"
        " hf.co/ORG/REPO:QUANT", param="model",
    )  # fmt: skip


def not_found(name: str) -> HttpRefused:
    reason = f"model '{shown(name)}' not found; GET /api/tags shows the models and agents that you may use"
    return HttpRefused(404, reason, "model_not_found", "model")


def shown(text: str) -> str:
    return text if len(text) <= 100 else text[:100] + "…"
