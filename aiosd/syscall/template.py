"""Variables for a model's chat template, in a request or in an agent's params.json. Pure."""

from __future__ import annotations

from aiosd.errors import BadRequest
from aiosd.syscall.keys import boolean, choice
from aiosd.syscall.spec import Message

TEMPLATE_KEYS = ("chat_template_kwargs", "enable_thinking", "reasoning_effort")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
# variables of a chat template that the daemon sets
TEMPLATE_OWN = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
TEMPLATE_OWN |= {"chat_template", "tokenize", "bos_token", "eos_token"}


def variables(raw: Message, base: Message) -> Message:
    """Return the variables of `base`, with those that `raw` changes or adds. Raises BadRequest."""
    given = raw.get("chat_template_kwargs")
    if not isinstance(given, (dict, type(None))):
        raise BadRequest("chat_template_kwargs must be an object", '{"enable_thinking":false}')
    made = {**base, **(given or {})}
    if taken := sorted(made.keys() & TEMPLATE_OWN):
        why = f"chat_template_kwargs: the daemon sets {taken[0]} itself"
        raise BadRequest(why, "leave it out, and use the keys of the request")
    if raw.get("enable_thinking") is not None:
        made["enable_thinking"] = boolean(raw, "enable_thinking", True)
    if raw.get("reasoning_effort") is not None:
        made["reasoning_effort"] = choice(raw, "reasoning_effort", "medium", *EFFORTS)
    return made
