"""Keys of the OpenAI chat-completion API that have no effect, or are refused. Pure.

A key that does not change the answer is taken without effect, so that clients need no change. A key that
would change it and cannot be honoured is refused with the remedy.
"""

from __future__ import annotations

from typing import Any

from aiosd.errors import BadRequest

TOOLS_INSTEAD = 'write tools, as {"type":"function","function":{…}}, and tool_choice'
NO_EFFECT = (
    "metadata",
    "modalities",
    "n",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "user",
    "verbosity",
)
REFUSED = {
    "audio": ("audio is not made here: models answer in text", "leave audio out"),
    "web_search_options": (
        "web_search_options: no model here searches the web",
        "give the agent a tool that does, in its tools",
    ),
    "functions": ("functions is the old name of tools", TOOLS_INSTEAD),
    "function_call": ("function_call is the old name of tool_choice", TOOLS_INSTEAD),
}


def refuse(raw: dict[str, Any]) -> None:
    """Raise BadRequest for a key that cannot be honoured, and take out those that say nothing."""
    for key, (why, hint) in REFUSED.items():
        if raw.pop(key, None) not in (None, [], {}):
            raise BadRequest(why, hint)
    if raw.get("n") not in (None, 1):
        raise BadRequest(
            "n must be 1: a request has one answer", "write a request, with a seed, for each answer"
        )
    if raw.get("modalities") not in (None, [], ["text"]):
        raise BadRequest('modalities must be ["text"]: models here answer in text', "leave modalities out")
