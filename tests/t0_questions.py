"""Answers to questions of MCP servers, whose schemas are foreign."""

from __future__ import annotations

from typing import Any

import pytest

from aiosd.errors import BadRequest, BadValue
from aiosd.handlers.tool.questions import content

NAME: dict[str, Any] = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


@pytest.mark.parametrize(
    ("schema", "text", "answer"),
    [({}, "allow", {}), (NAME, '{"name": "ada"}', {"name": "ada"}), ({"properties": {}}, "allow", {})],
)
def test_an_answer_fits_the_question(schema: dict[str, Any], text: str, answer: dict[str, Any]) -> None:
    assert content(schema, text) == answer


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({}, '{"name": "ada"}'),
        (NAME, "allow"),
        (NAME, '{"name": 3}'),
        (NAME, "ada"),
        (NAME, "{"),
        ({"type": "array"}, "allow"),
        ({"$ref": "#/$defs/gone", "properties": 5, "type": "array"}, "yes"),
    ],
)
def test_a_wrong_answer_is_refused(schema: dict[str, Any], text: str) -> None:
    with pytest.raises((BadValue, BadRequest)):
        content(schema, text)
