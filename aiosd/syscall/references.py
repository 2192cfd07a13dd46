"""References within a JSON Schema: JSON pointers, anchors, and addresses that the schema gives its own parts.

Nothing is ever fetched: a reference to another document names nothing here. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

VALUES = {"enum", "const", "default", "examples"}  # keywords that hold data, in which "$id" means nothing


class References:
    """Finds the parts of one schema. `base` is the address of the part that makes the reference."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._named: dict[str, tuple[Any, str]] = {}  # by address, with or without #anchor
        self._named[""] = root, ""
        for node, base in _parts(root, ""):
            self._named.setdefault(base, (node, base))
            for key in ("$anchor", "$dynamicAnchor"):
                if isinstance(anchor := node.get(key), str):
                    self._named.setdefault(f"{base}#{anchor}", (node, base))
            own = node.get("$id", node.get("id"))
            if isinstance(own, str) and own.startswith("#"):  # the anchors of draft-06 and draft-07
                self._named.setdefault(base + own, (node, base))

    def lost(self) -> list[str]:
        """The references that name nothing in it."""
        made = [(node["$ref"], base) for node, base in _parts(self._named[""][0], "") if "$ref" in node]
        return [str(reference) for reference, base in made if self.find(reference, base) is None]

    def base_of(self, node: dict[str, Any], base: str) -> str:
        return _base(node, base)

    def find(self, reference: object, base: str) -> tuple[Any, str] | None:
        """The part that a reference names, and its address. None: it is elsewhere or names nothing."""
        if not isinstance(reference, str):
            return None
        address, fragment = urldefrag(_join(base, reference))
        if fragment and not fragment.startswith("/"):
            return self._named.get(f"{address}#{unquote(fragment)}")
        if (start := self._named.get(address)) is None:
            return None
        node, base = start
        for step in fragment.split("/")[1:]:
            node = _step(node, unquote(step).replace("~1", "/").replace("~0", "~"))
            if node is None:
                return None
            base = _base(node, base)
        return node, base


def _parts(value: Any, base: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Each object in a schema, with its address; without recursion, as a stranger says how deep it is."""
    waiting = [(value, base)]
    while waiting:
        node, base = waiting.pop()
        if isinstance(node, dict):
            base = _base(node, base)
            yield node, base
            waiting += [(child, base) for key, child in node.items() if key not in VALUES]
        elif isinstance(node, list):
            waiting += [(child, base) for child in node]


def _base(node: Any, base: str) -> str:
    own = node.get("$id") if isinstance(node, dict) else None
    return urldefrag(_join(base, own))[0] if isinstance(own, str) and not own.startswith("#") else base


def _join(base: str, reference: str) -> str:
    try:
        return urljoin(base, reference)
    except ValueError:  # a bracket that is no IPv6 address
        return reference


def _step(node: Any, name: str) -> Any:
    if isinstance(node, dict):
        return node.get(name)
    if isinstance(node, list) and name.isdecimal() and len(name) < 6 and int(name) < len(node):
        return node[int(name)]
    return None
