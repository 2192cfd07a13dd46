"""Print a chat template as transformers prints it, without its import, which is half of a worker's start.

A template is a stranger's program: it runs in jinja's sandbox and sees plain JSON only. The tests compare the
output with that of transformers. Knows no tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

REASONING = ("reasoning_content", "thinking", "reasoning")  # names that templates have for the same


def render(
    template: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    variables: Mapping[str, Any],
) -> str:
    """Return the conversation up to where the assistant's next turn begins. Raises whatever the template
    raises."""
    said = [_named({key: value for key, value in one.items() if value is not None}) for one in messages]
    return _compiled(template).render(
        **{"documents": None, **variables, "messages": said, "tools": tools, "add_generation_prompt": True}
    )


def _named(message: dict[str, Any]) -> dict[str, Any]:
    found = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


class _Generation(Extension):
    """{% generation %} … {% endgeneration %} marks what the model wrote, for training."""

    tags = {"generation"}  # noqa: RUF012  as the base class has it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Space(Namespace):
    """A namespace without names that lead into Python's own objects."""

    def __init__(
        *args: Any, **kwargs: Any
    ) -> None:  # no `self`: a template may have an argument of that name
        space, *rest = args
        for name in (given := dict(*rest, **kwargs)):
            _check(name)
        Namespace.__init__(space, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check(name)
        Namespace.__setitem__(self, name, value)


def _check(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template cannot store {name!r}")


class _Dict:
    """The function `dict`, and none of its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    made.filters["tojson"] = _json
    made.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Space,
    }
    return made.from_string(template)
