"""Random made-up tools (verb x noun x parameters), requests for them, and what they answer.

A `Use` is one request for a tool with the exact call, a result and the answer that quotes it. The tools that
aiosd has built in are in built_in.py. Knows nothing of chat formats.
"""

import json
import random
from dataclasses import dataclass
from itertools import accumulate
from string import ascii_uppercase

from words import NOUNS, PARAMS, VERBS, Split, Words, phrasings

Value = str | int | float

ASKS = phrasings("""what is the {n}|what is the {n}|what's the {n}|tell me the {n}|I need the {n}|
do you know the {n}|the {n}|how is the {n}|which {n} is it|what is the {n} like|show me the {n}|
give me the {n}""")
ORDERS = phrasings("""{v} the {n}|{v} the {n}|{v} {n}|please {v} the {n}|can you {v} the {n}|
I want to {v} the {n}|{v} a {n}|could you {v} the {n}|I would like you to {v} the {n}|now {v} the {n}|
go and {v} the {n}""")
ROOTS = ("", "", "/", "/tmp/", "/etc/", "/home/", "docs/", "notes/", "/var/log/", "./")
SUFFIXES = ("", ".txt", ".txt", ".md", ".log", ".conf", ".json", ".py", ".csv")
DOMAINS = ("com", "org", "net", "io", "de", "example", "co.uk")
UNITS = (" km", " kg", " °C", "%", " EUR", " $", " m", " s", " MB")
GLUE = [
    "the",
    "a",
    "of",
    "and",
    "is",
    "in",
    "to",
    "was",
    "for",
    "with",
    "on",
    "has",
    "it",
    "that",
    "at",
    "by",
    "are",
    "not",
    "all",
    "this",
    "an",
    "or",
    "from",
    "be",
]
COUNTS = (0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3)  # of a tool's parameters
TRAINED_COUNTS = (0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3)
TYPES = ("string",) * 6 + ("integer", "number")
TRAINED_TYPES = ("string",) * 5 + ("integer", "number")
# How often a text is a name, a cased word, a phrase, a path, an e-mail address, a number, a code, a date
TEXTS = (0.4, 0.22, 0.1, 0.08, 0.05, 0.05, 0.05, 0.05)
TRAINED_TEXTS = (0.29, 0.2, 0.22, 0.07, 0.05, 0.08, 0.05, 0.04)
ERRORS = phrasings("""no such file|not found|permission denied|timed out|no such {}|{} is locked|
unknown {}|cannot open {}""")


@dataclass(frozen=True)
class Param:
    name: str
    type: str = "string"
    required: bool = True


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    params: tuple[Param, ...]
    verb: str = ""
    noun: str = ""

    @property
    def schema(self) -> dict[str, object]:
        """The OpenAI shape."""
        properties = {p.name: {"type": p.type} for p in self.params}
        parameters: dict[str, object] = {"type": "object", "properties": properties}
        if any(not p.required for p in self.params):
            parameters["required"] = [p.name for p in self.params if p.required]
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Use:
    tool: Tool
    request: str
    arguments: dict[str, Value]
    result: str
    answer: str


def made_tool(words: Words, noun: str = "") -> Tool:
    rng = words.rng
    verb = words.listed_or_made_up(VERBS, 0.25)
    noun = noun or words.listed_or_made_up(NOUNS, 0.35)
    trains = words.split is Split.TRAIN
    params: list[Param] = []
    for _ in range(rng.choice(TRAINED_COUNTS if trains else COUNTS)):
        name = words.listed_or_made_up(PARAMS, 0.2)
        if trains and params and rng.random() < 0.15:  # one that begins as another does
            name = params[-1].name.removesuffix("_id").removesuffix("_name")
        name += rng.choice(("", "", "", "", "", "", "_id", "_name")) if "_" not in name else ""
        if name != noun and name not in [p.name for p in params]:
            params.append(Param(name, rng.choice(TRAINED_TYPES if trains else TYPES)))
    if params and rng.random() < 0.12:
        params[-1] = Param(params[-1].name, params[-1].type, required=False)
    name, description = _name_and_description(words, verb, noun, params)
    return Tool(name, description, tuple(params), verb.replace("_", " "), noun)


def _name_and_description(words: Words, verb: str, noun: str, params: list[Param]) -> tuple[str, str]:
    rng = words.rng
    kind = rng.random()
    if kind < 0.62:
        name = f"{verb}_{noun}"
    elif kind < 0.7:
        name = verb.replace("_", "") + noun.capitalize()
    elif kind < 0.78:
        name = f"{verb}{rng.choice('.-')}{noun}"
    elif kind < 0.92:
        name = noun
    else:
        return words.made_up(), _describe(rng, verb, noun, params)
    return name, "" if rng.random() < 0.08 and kind < 0.78 else _describe(rng, verb, noun, params)


def _describe(rng: random.Random, verb: str, noun: str, params: list[Param]) -> str:
    verb = verb.replace("_", " ")
    names = [p.name.replace("_", " ") for p in params]
    base = f"{verb} {rng.choice(('the', 'the', 'a', 'one', 'the current'))} {noun}"
    if names and rng.random() < 0.7:
        forms = (" of a {}", " for a {}", " by {}", " in a {}", " of the given {}", " with {}")
        base += rng.choice(forms).format(names[0])
        if len(names) > 1 and rng.random() < 0.7:
            base += rng.choice((" and {}", " by {}", " with {}")).format(" and ".join(names[1:]))
    base = base[0].upper() + base[1:]
    return base + rng.choice(("", "", "", ".", ".", " (read only)", " of this machine", ". Returns text."))


def use_made(words: Words, tool: Tool, noun_is_unique: bool) -> Use:
    rng = words.rng
    given = [p for p in tool.params if p.required or rng.random() < 0.5]
    values = {p.name: value(words, p.type) for p in given}
    asks = noun_is_unique and rng.random() < 0.4
    request = rng.choice(ASKS if asks else ORDERS).format(v=tool.verb, n=tool.noun)
    request += _say_arguments(words, values)
    if rng.random() < 0.6:
        request = request[0].upper() + request[1:]
    request += rng.choice(("?", "?", "", "?")) if asks else rng.choice((".", "", "", " please", ", please."))
    outcome = result(words)
    subject = f"The {tool.noun} of {next(iter(values.values()))}" if values else f"The {tool.noun}"
    return answered(words, tool, request, values, outcome, f"{subject}: {outcome}")


def _say_arguments(words: Words, values: dict[str, Value]) -> str:
    """The arguments in words, in the order of the signature unless each is named."""
    rng = words.rng
    if not values:
        return ""
    pairs = [(name, name.replace("_", " "), text) for name, text in values.items()]
    first = rng.choice((" of", " of", " for", " in", " at", " from", " to", " about"))
    kind = rng.random()
    if kind < 0.5 and len(pairs) < 3:
        joint = rng.choice((" by", " with", " and", " to", " for", ","))
        return f"{first} {pairs[0][2]}" + "".join(f"{joint} {text}" for _, _, text in pairs[1:])
    if kind < 0.8:
        if rng.random() < (0.5 if words.split is Split.TRAIN else 0.3):
            rng.shuffle(pairs)
        start, joint = rng.choice((" with ", " for ", ", ")), rng.choice((" and ", ", ", " with "))
        return start + joint.join(f"{said} {text}" for _, said, text in pairs)
    if kind < 0.9:
        return rng.choice((" with ", ": ", " ")) + ", ".join(f"{name}={text}" for name, _, text in pairs)
    rest = "".join(f" and {said} {text}" for _, said, text in pairs[1:])
    return f"{first} {pairs[0][1]} {pairs[0][2]}{rest}"


def answered(
    words: Words, tool: Tool, request: str, arguments: dict[str, Value], good: str, answer: str
) -> Use:
    """The use, now and then with a result that is an error or empty, or a bare ok."""
    kind = words.rng.random()
    if kind < 0.07:
        reason = words.rng.choice(ERRORS).format(words.plain())
        good = words.rng.choice(
            (f"error: {reason}", f"error: {reason}", json.dumps({"error": reason}, ensure_ascii=False))
        )
        answer = f"The tool {tool.name} failed: {reason}"
    elif kind < 0.09:
        good, answer = "", f"The tool {tool.name} gave no output."
    elif good.lower() in ("ok", "done", "true"):
        answer = "Done."
    return Use(tool, request, arguments, good, answer)


def value(words: Words, type_: str) -> Value:
    rng = words.rng
    if type_ == "integer":
        return int(words.integer())
    if type_ == "number":
        if rng.random() < 0.6:
            return round(float(words.integer()) + rng.randint(1, 9) / 10, 1)
        return int(words.integer())
    trains, kind = words.split is Split.TRAIN, rng.random()
    proper, cased, phrase, file, mail, number, code, _ = accumulate(TRAINED_TEXTS if trains else TEXTS)
    if kind < proper:
        return words.proper()
    if kind < cased:
        return words.cased()
    if kind < phrase:
        return words.phrase(2, 5 if trains else 4)
    if kind < file:
        return path(words)
    if kind < mail:
        return email(words)
    if kind < number:
        return words.integer()
    if kind < code:
        return f"{rng.choice(ascii_uppercase)}{rng.choice(('', '-'))}{words.integer()}"
    return f"20{rng.randint(10, 39)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def path(words: Words) -> str:
    rng = words.rng
    root = rng.choice(ROOTS)
    return root + "/".join(words.plain() for _ in range(rng.choice((1, 1, 2, 3)))) + rng.choice(SUFFIXES)


def email(words: Words) -> str:
    rng = words.rng
    local = words.made_up() if rng.random() < 0.5 else words.proper().lower()
    if rng.random() < 0.4:
        local += rng.choice("._-") + words.made_up()
    return (
        f"{local}{rng.choice(('', '', '', str(rng.randint(1, 99))))}@{words.made_up()}.{rng.choice(DOMAINS)}"
    )


def url(words: Words) -> str:
    rng = words.rng
    tail = "" if rng.random() < 0.5 else "/" + "/".join(words.made_up() for _ in range(rng.randint(1, 2)))
    scheme = rng.choice(("https", "https", "http"))
    return f"{scheme}://{words.made_up()}.{rng.choice(('com', 'org', 'net', 'io'))}{tail}"


def result(words: Words) -> str:
    rng = words.rng
    kind = rng.random()
    if kind < 0.3:
        return words.number()
    if kind < 0.4:
        return words.integer() + rng.choice(UNITS)
    if kind < 0.6:
        return words.phrase(1, 3)
    if kind < 0.7:
        return prose(words, 3, 9)
    if kind < 0.78:
        keys = [words.plain() for _ in range(rng.randint(1, 2))]
        found = {key: rng.choice((words.proper(), int(words.integer()))) for key in keys}
        return json.dumps(found, ensure_ascii=False)
    return rng.choice(("ok", "done", "OK", "Done", "true"))


def prose(words: Words, low: int, high: int) -> str:
    rng = words.rng
    parts = [words.any() if rng.random() < 0.7 else rng.choice(GLUE) for _ in range(rng.randint(low, high))]
    text = " ".join(parts)
    return text[0].upper() + text[1:] + rng.choice((".", ".", "", "!")) if rng.random() < 0.6 else text
