"""Words of older JSON Schema drafts and of OpenAPI, said in those of 2020-12. One object at a time. Pure."""

from __future__ import annotations

from typing import Any


def modern(schema: dict[str, Any]) -> dict[str, Any]:
    """The same object in the words of 2020-12. The parts in it are not looked at."""
    found = dict(schema)
    for word, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):  # draft-04
        if isinstance(found.get(word), bool):
            excluded = found.pop(word)
            if excluded and bound in found:
                found[word] = found.pop(bound)
    if isinstance(found.get("items"), list):  # draft-07 and before: a tuple
        parts = found.pop("items")
        if parts:
            found["prefixItems"] = parts
        if "additionalItems" in found:
            found["items"] = found["additionalItems"]
    found.pop("additionalItems", None)
    if isinstance(found.get("required"), bool):  # draft-03: of a property itself
        del found["required"]
    if isinstance(needs := found.get("dependencies"), dict):
        del found["dependencies"]
        lists = {key: need for key, need in needs.items() if isinstance(need, list)}
        parts = {key: need for key, need in needs.items() if isinstance(need, (dict, bool))}
        found |= {"dependentRequired": lists} if lists else {}
        found |= {"dependentSchemas": parts} if parts else {}
    if found.pop("nullable", False) is True and "type" in found:  # OpenAPI 3.0
        return {"anyOf": [found, {"type": "null"}]}
    return found
