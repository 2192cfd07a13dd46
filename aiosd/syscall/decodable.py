"""A JSON Schema in words that an answer can be made by. What has an equal in those words is said in them;
the rest stays, and the grammar refuses it. Loose schemas, with {"x-loose": true}, are made weaker
instead. Pure.
"""

from __future__ import annotations

import json
from itertools import combinations
from math import comb
from typing import Any

from aiosd.syscall.dialects import modern
from aiosd.syscall.references import References

LOOSE = "x-loose"
FORMATS = {
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid", "unknown",
}  # fmt: skip
PART = ("items", "additionalProperties", "contains", "if", "then", "else")
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
UNDECODABLE = (
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames",
    "dependentRequired", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems",
)  # fmt: skip
CHOICES = 60  # of properties that must be there, one of which is made
PARTS = 64  # of a oneOf that are compared with each other
COMPARED = 20_000  # pairs of parts, of one schema
TYPES = ("null", "boolean", "number", "string", "array", "object")
Schema = dict[str, Any]


def decodable(schema: Schema) -> Schema:
    loose = schema.get(LOOSE) is True
    made = _Words(References(schema), loose).of({k: v for k, v in schema.items() if k != LOOSE}, "")
    return made if isinstance(made, dict) else {}


class _Words:
    def __init__(self, references: References, loose: bool) -> None:
        self._references, self._loose, self._room = references, loose, COMPARED

    def of(self, schema: Any, base: str) -> Any:
        if not isinstance(schema, dict):
            return schema
        base = self._references.base_of(schema, base)
        schema = modern(schema)
        made: Schema = {}
        for key, value in schema.items():
            if key in LISTS and isinstance(value, list):
                made[key] = [self.of(one, base) for one in value]
            elif key in MAPS and isinstance(value, dict):
                made[key] = {name: self.of(one, base) for name, one in value.items()}
            else:
                made[key] = self.of(value, base) if key in PART else value
        if made.get("format", "date") not in FORMATS:  # an annotation, as the standard says
            del made["format"]
        for word in ("Ref", "Anchor"):
            if f"$dynamic{word}" in made:
                made["$" + word.lower()] = made.pop(f"$dynamic{word}")
        for rewrite in (_named, _dependent, _unevaluated, _patterns, self._one_of, _not, _counted):
            rewrite(made)
        return _weaker(made) if self._loose else made

    def _one_of(self, made: Schema) -> None:
        """As anyOf, where no value fits two of the parts."""
        parts = made.get("oneOf")
        if not isinstance(parts, list):
            return
        listed = [values(part) if isinstance(part, dict) else None for part in parts]
        if "anyOf" not in made and all(one is not None for one in listed):
            if sum(len(one or ()) for one in listed) == len(set[str]().union(*(one or () for one in listed))):
                made["anyOf"] = made.pop("oneOf")
            return
        if len(parts) > PARTS:
            return
        if all(only_required(part) for part in parts):
            names = {part["required"][0] for part in parts}
            made["anyOf" if "anyOf" not in made else "allOf"] = [
                {"properties": dict.fromkeys(names - set(part["required"]), False), **part} for part in parts
            ]
            del made["oneOf"]
        elif "anyOf" not in made and all(self._disjoint(a, b, made) for a, b in combinations(parts, 2)):
            made["anyOf"] = made.pop("oneOf")

    def _disjoint(self, a: Any, b: Any, around: Schema, deep: int = 4) -> bool:
        """Whether surely no value fits both; `around` holds what both are beside."""
        self._room -= 1
        if self._room < 0:
            return False
        a, b = self._target(a), self._target(b)
        if a is False or b is False:
            return True
        if not isinstance(a, dict) or not isinstance(b, dict) or not deep:
            return False
        if (one := values(a)) is not None and (two := values(b)) is not None:
            return not one & two
        if not types(a) & types(b):
            return True
        if types({**around, **a}) != {"object"} and types({**around, **b}) != {"object"}:
            return False
        beside = set(around.get("required", ()))
        needed = (beside | set(a.get("required", ()))) & (beside | set(b.get("required", ())))
        ours, theirs = a.get("properties", {}), b.get("properties", {})
        return any(
            self._disjoint(ours.get(name, {}), theirs.get(name, {}), {}, deep - 1) for name in needed
        ) or (lacks(a, b) or lacks(b, a))

    def _target(self, part: Any) -> Any:
        if isinstance(part, dict) and set(part) & {"$ref"}:
            found = self._references.find(part["$ref"], "")
            return modern(found[0]) if found and isinstance(found[0], dict) else part
        return part


def values(schema: Schema) -> set[str] | None:
    """All that fit, as JSON, where the schema lists them."""
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    return {json.dumps(one, sort_keys=True) for one in listed} if isinstance(listed, list) else None


def types(schema: Schema) -> set[str]:
    """That a value may have. Whole numbers are numbers."""
    kind = schema.get("type", TYPES)
    if "type" not in schema and (listed := values(schema)) is not None:
        kind = [type_of(json.loads(one)) for one in listed]
    return {"number" if one == "integer" else one for one in ([kind] if isinstance(kind, str) else kind)}


def type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    kinds = {str: "string", int: "number", float: "number", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def lacks(a: Schema, b: Schema) -> bool:
    """Whether `a` lets no property in that `b` requires."""
    if a.get("additionalProperties") is not False or "patternProperties" in a:
        return False
    return any(a.get("properties", {}).get(name, False) is False for name in b.get("required", ()))


def only_names(part: Any) -> bool:
    return isinstance(part, dict) and part.keys() == {"required"} and isinstance(part["required"], list)


def only_required(part: Any) -> bool:
    return only_names(part) and len(part["required"]) == 1


def absent(name: str) -> Schema:
    return {"properties": {name: False}}


def also(made: Schema, *parts: Schema) -> None:
    made["allOf"] = [*made.get("allOf", ()), *parts]


def _named(made: Schema) -> None:
    """propertyNames, of an object that has no other rule about names."""
    rule = made.get("propertyNames")
    if rule is True:
        del made["propertyNames"]
    if not isinstance(rule, dict) or made.keys() & {"properties", "patternProperties"}:
        return
    more = made.get("additionalProperties", {})
    if rule.keys() <= {"enum", "type"} and isinstance(rule.get("enum"), list):
        made["properties"] = {str(name): more for name in rule["enum"]}
    elif rule.keys() <= {"pattern", "type"} and isinstance(rule.get("pattern"), str):
        made["patternProperties"] = {rule["pattern"]: more}
    elif rule.keys() <= {"minLength", "maxLength", "type"}:
        pattern = f"^.{{{rule.get('minLength', 0)},{rule.get('maxLength', '')}}}$"
        made["patternProperties"] = {pattern: more}
    else:
        return
    del made["propertyNames"]
    made["additionalProperties"] = False


def _dependent(made: Schema) -> None:
    needs = {name: {"required": more} for name, more in made.pop("dependentRequired", {}).items()}
    for name, part in [*needs.items(), *made.pop("dependentSchemas", {}).items()]:
        there: Schema = {"required": [name]}
        also(made, {"anyOf": [absent(name), {"allOf": [there, part]}]})


def _unevaluated(made: Schema) -> None:
    """As additionalProperties and items, where nothing but the object itself and its allOf say what there
    is."""
    applied = made.keys() & {"anyOf", "oneOf", "if", "not", "$ref", "dependentSchemas"}
    parts = made.get("allOf", [])
    simple = {"type", "properties", "required"}
    plain = all(isinstance(part, dict) and part.keys() <= simple for part in parts)
    if "unevaluatedProperties" in made and not applied and plain:
        rest = made.pop("unevaluatedProperties")
        if "additionalProperties" not in made:
            known = {name: True for part in parts for name in part.get("properties", {})}
            made["properties"] = {**known, **made.get("properties", {})}
            made["additionalProperties"] = rest
    if "unevaluatedItems" in made and not applied and not parts and "contains" not in made:
        rest = made.pop("unevaluatedItems")
        made.setdefault("items", rest)


def _patterns(made: Schema) -> None:
    """patternProperties of one value, as one pattern: else they would have to be disjoint."""
    found = made.get("patternProperties")
    if isinstance(found, dict) and len(found) > 1:
        rules = {json.dumps(rule, sort_keys=True) for rule in found.values()}
        if len(rules) == 1:
            pattern = "|".join(f"(?:{one})" for one in found)
            made["patternProperties"] = {pattern: next(iter(found.values()))}


def _not(made: Schema) -> None:
    rule = made.get("not")
    if not isinstance(rule, dict):
        return
    kind = types(rule) if rule.keys() == {"type"} and rule["type"] != "integer" else set()
    if rule.keys() == {"required"} and rule["required"]:
        also(made, {"anyOf": [absent(name) for name in rule["required"]]})
    elif kind and "integer" not in rule["type"]:
        also(made, {"type": [one for one in TYPES if one not in kind]})
    elif (refused := values(rule)) is not None and rule.keys() <= {"const", "enum"} and "enum" in made:
        made["enum"] = [one for one in made["enum"] if json.dumps(one, sort_keys=True) not in refused]
    elif rule.keys() == {"anyOf"} and all(only_names(part) for part in rule["anyOf"]):
        for part in rule["anyOf"]:
            also(made, {"anyOf": [absent(name) for name in part["required"]]})
    else:
        return
    del made["not"]


def _counted(made: Schema) -> None:
    """minProperties and maxProperties of an object that has no other properties than those it names."""
    names = list(made.get("properties", {}))
    optional = [name for name in names if name not in made.get("required", ())]
    if not optional or "patternProperties" in made:
        return
    least, most = made.get("minProperties", 0), made.get("maxProperties", len(names))
    if least <= len(names) - len(optional):
        made.pop("minProperties", None)
    closed = made.get("additionalProperties") is False
    if closed and most >= len(names):
        made.pop("maxProperties", None)
    missing = least - (len(names) - len(optional))
    few = 0 < missing <= len(optional) and comb(len(optional), missing) <= CHOICES
    if closed and few and "minProperties" in made:
        del made["minProperties"]
        also(made, {"anyOf": [{"required": list(some)} for some in combinations(optional, missing)]})


def _weaker(made: Schema) -> Schema:
    """Without what an answer cannot be made by."""
    kept = {key: value for key, value in made.items() if key not in UNDECODABLE}
    if "oneOf" in kept and "anyOf" not in kept:
        kept["anyOf"] = kept.pop("oneOf")
    kept.pop("oneOf", None)
    if any(name not in kept.get("required", ()) for name in kept.get("properties", {})):
        kept = {key: value for key, value in kept.items() if key not in ("minProperties", "maxProperties")}
    if len(kept.get("patternProperties", {})) > 1:
        del kept["patternProperties"]
        kept.pop("additionalProperties", None)
    if "(?" in str(kept.get("pattern", "")):
        del kept["pattern"]
    return kept
