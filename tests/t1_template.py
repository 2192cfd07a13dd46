"""Chat templates are printed as transformers prints them, and cannot reach Python's objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from jinja2.exceptions import SecurityError, TemplateError, UndefinedError
from transformers.utils.chat_template_utils import render_jinja_template

from aiosd.cores.engine import template
from aiosd.cores.engine.gguf import GgufFile
from aiosd.cores.engine.vocabulary import PLAIN_TEMPLATE
from tests import chat_templates, gguf_files

CALL = {"function": {"name": "add", "arguments": {"a": 1, "b": ["<é>", None]}}, "id": "1", "type": "function"}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "1 + 2 < 4 & 'é'?"},
    {"role": "assistant", "content": None, "reasoning": "easy", "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "1", "name": "add"},
    {"role": "assistant", "content": "3", "reasoning_content": "I see"},
    {"role": "user", "content": "thanks"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "é": 1.5}}}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "enable_thinking": False}
EACH = "{% for m in messages %}"
PARTS = {
    "json": "{{ messages[2] | tojson }} {{ tools | tojson(indent=2) }} {{ 'é' | tojson(ensure_ascii=true) }}",
    "reasoning": EACH + "{{ m.thinking }}|{{ m.reasoning_content }}|{{ 'content' in m }}\n{% endfor %}",
    "generation": EACH + "{% generation %}{% set x = 1 %}{{ m.role }} {% endgeneration %}{% endfor %}",
    "loops": EACH + "{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "spaces": "{% set ns = namespace(self=2) %} {% if 1 %}\n  {% set ns.a = 5 %}\n{{ ns.a }}{% endif %}",
    "dicts": "{{ dict(a=1).a }} {{ dict.fromkeys(['x']) }} {{ {'b': 2} | items | list }}",
    "given": "{{ bos_token }}{{ enable_thinking }}{{ add_generation_prompt }}{{ x }}{{ documents }}",
    "time": "{{ strftime_now('%Y') }}",
}  # fmt: skip


def outcome(render: Callable[[], str]) -> str:
    """The text, or the error of a template that needs other messages."""
    try:
        return render()
    except (UndefinedError, TypeError) as error:
        return repr(error)


@pytest.mark.parametrize("kind", [*PARTS, *chat_templates.CALLS, "plain", "real"])
def test_a_template_prints_what_transformers_prints(kind: str) -> None:
    if kind == "real":
        text = GgufFile(gguf_files.REAL).metadata["tokenizer.chat_template"]
    elif kind == "plain":
        text = PLAIN_TEMPLATE
    else:
        text = PARTS.get(kind) or chat_templates.template(kind, "<think>", "</think>")
    said = [{key: value for key, value in one.items() if value is not None} for one in MESSAGES]
    theirs: Any = render_jinja_template  # untyped

    def both(n: int, tools: list[dict[str, Any]] | None) -> list[str]:
        given = {"tools": tools, "chat_template": text, "add_generation_prompt": True, **SPECIAL}
        return [
            outcome(lambda: theirs([said[:n]], **given)[0][0]),
            outcome(lambda: template.render(text, MESSAGES[:n], tools, SPECIAL)),
        ]

    for want, got in (both(2, None), both(6, None), both(6, TOOLS)):
        assert got == want


def test_a_template_refuses_by_itself() -> None:
    with pytest.raises(TemplateError, match="no system"):
        template.render("{{ raise_exception('no system') }}", MESSAGES, None, {})


@pytest.mark.parametrize(
    "text",
    [
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now.__globals__.sys }}",
    ],
)
def test_a_template_cannot_reach_out(text: str) -> None:
    with pytest.raises(SecurityError):
        template.render(text, MESSAGES, None, {})
