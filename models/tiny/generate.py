"""The deterministic generator of the dialogues that train and test the built-in model.

`dialogue(seed, split)` gives one dialogue in the OpenAI shape: the same seed, the same dialogue. It is a row
of fragments (a tool call with its answer, a fact, a question about it, ...) over one set of offered tools.
`render` writes it as the chat template does; evaluate.py checks that the two agree. No torch in here.
Run it to read some dialogues: .venv/bin/python models/tiny/generate.py
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import built_in
import fragments
from fragments import Message, Scene
from tools import Tool, made_tool, prose
from words import Split, Words, phrasings

SYSTEMS = phrasings("""You are a helpful agent.|You are an agent of this system.|
You are a helpful assistant.|Answer briefly.|You are a careful agent. Use a tool when it helps.|
Be concise.|You are an assistant.|Use the tools.|You are a helpful assistant. Answer in one line.|
You help the users of this machine.""")


@dataclass(frozen=True)
class Dialogue:
    """`target` is the index of the message that an evaluation scores; `subjects` has the name, the verb and
    the noun of each made-up tool, for pointers.py."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, object], ...]
    target: int
    words: frozenset[str]
    subjects: tuple[tuple[str, str, str], ...] = ()


Fragment = Callable[[Scene], list[Message]]

# skill -> (how to make it, share of training fragments, which message of the fragment is scored)
SKILLS: dict[str, tuple[Fragment, float, int]] = {
    "tool call": (fragments.tool_fragment, 0.37, 1),
    "answer from result": (fragments.tool_fragment, 0.0, 3),
    "two calls in turn": (fragments.chain_fragment, 0.03, 3),
    "recall": (fragments.recall_fragment, 0.10, 1),
    "fact": (fragments.fact_fragment, 0.09, 1),
    "fact not told": (fragments.unknown_fact_fragment, 0.02, 1),
    "echo": (fragments.echo_fragment, 0.07, 1),
    "e-mail": (fragments.email_fragment, 0.05, 1),
    "first/last word": (fragments.edge_word_fragment, 0.05, 1),
    "no tool": (fragments.no_tool_fragment, 0.07, 1),
    "cannot calculate": (fragments.calc_refusal_fragment, 0.02, 1),
    "greeting": (fragments.greet_fragment, 0.015, 1),
    "thanks": (fragments.thanks_fragment, 0.01, 1),
    "identity": (fragments.identity_fragment, 0.015, 1),
    "newcomer": (fragments.newcomer_fragment, 0.12, 1),
    "does not know": (fragments.unknown_fragment, 0.03, 1),
}
NEEDS_TOOLS = {
    "drill": 3,
    "built-in drill": 2,
    "chain": 2,
    "tool call": 1,
    "answer from result": 1,
    "two calls in turn": 2,
}
# What a training dialogue is about, and how often; a drill calls tools of one list, without results
LEADS = {
    "drill": 0.24,
    "built-in drill": 0.1,
    "tool call": 0.15,
    "chain": 0.22,
    "recall": 0.14,
    "newcomer": 0.1,
    "any": 0.11,
}
# What tells a request for a built-in tool from a fact, a question about one, and what no offered tool can do
BUILT_IN_DRILL = {
    "tool call": 0.6,
    "fact": 0.14,
    "fact not told": 0.1,
    "no tool": 0.1,
    "cannot calculate": 0.06,
}


def offer_tools(words: Words, least: int, most: int, lead: str) -> list[Tool]:
    """Tools that a request can tell apart: no two share both verb and noun, or a name."""
    drill = lead == "drill"
    rng = words.rng
    count = rng.randint(least, most)
    own = rng.choice((0, 0, 0, count // 2, count, rng.randint(0, count)))
    if drill and rng.random() < 0.4:
        own = 0
    if lead == "built-in drill" or (lead == "chain" and rng.random() < 0.5):
        own = rng.randint((count + 1) // 2, count)
    tools = [built_in.built_in_tool(rng, name) for name in rng.sample(list(built_in.BUILT_IN), own)]
    while len(tools) < count:
        near_miss = rng.random() < (0.35 if drill else 0.2) and len(tools) > own  # the noun of another tool
        tool = made_tool(words, tools[-1].noun if near_miss else "")
        same = [t for t in tools if t.name == tool.name or (t.verb, t.noun) == (tool.verb, tool.noun)]
        if not same and tool.verb != tool.noun:
            tools.append(tool)
    rng.shuffle(tools)
    return tools


def dialogue(seed: str, split: Split, skill: str | None = None) -> Dialogue:
    """A training dialogue of several fragments, or, with a skill, one that ends at its scored message."""
    rng = random.Random(f"{split.value} {seed}")
    words = Words(rng, split)
    lead = skill or rng.choices(list(LEADS), list(LEADS.values()))[0]
    least = NEEDS_TOOLS.get(lead, 0)
    offers_some = least or rng.random() < (0.4 if skill or lead == "any" else 0.25)
    brief = lead in ("drill", "built-in drill")
    scene = Scene(words, offer_tools(words, least, 6, lead) if offers_some else [], brief=brief)
    plan = (
        _scored_plan(rng, skill, len(scene.tools)) if skill else _training_plan(rng, lead, len(scene.tools))
    )
    messages: list[Message] = []
    if rng.random() < (0.6 if scene.tools else 0.35):
        system = rng.choice(SYSTEMS) if rng.random() < 0.8 else prose(words, 3, 12)
        messages.append({"role": "system", "content": system})
    target = 0
    for name in plan:
        make, _, scored = SKILLS[name]
        target = len(messages) + scored
        messages += make(scene)
    if skill:
        messages = messages[: target + 1]
    tools = tuple(tool.schema for tool in scene.tools)
    if tools and all(tool.name in built_in.BUILT_IN for tool in scene.tools) and rng.random() < 0.25:
        tools = ()
        target += messages[0]["role"] != "system"
        messages = _written_out(messages, scene.tools)
    subjects = tuple((tool.name, tool.verb, tool.noun) for tool in scene.tools if tool.noun)
    return Dialogue(tuple(messages), tools, target, frozenset(words.used), subjects)


def _written_out(messages: list[Message], tools: list[Tool]) -> list[Message]:
    """The tools in the system text, the name first, as a person writes them into an agent's file."""
    lines = (f"- {tool.name}({', '.join(p.name for p in tool.params)}): {tool.description}" for tool in tools)
    written = "\n".join(("Tools:", *lines))
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{written}"}, *messages[1:]]
    return [{"role": "system", "content": written}, *messages]


def _fillers(rng: random.Random, tools: int, count: int, without: tuple[str, ...] = ()) -> list[str]:
    """Fragments of any skill that so many tools allow, by the shares in SKILLS."""
    names = [name for name in SKILLS if NEEDS_TOOLS.get(name, 0) <= tools and name not in without]
    return rng.choices(names, [SKILLS[name][1] for name in names], k=count)


def _facts_and_distractors(rng: random.Random, tools: int) -> list[str]:
    plan = ["fact"] * rng.randint(1, 3) + _fillers(rng, tools, rng.randint(0, 4), ("fact", "recall"))
    rng.shuffle(plan)
    return plan


def _scored_plan(rng: random.Random, skill: str, tools: int) -> list[str]:
    if skill == "recall":
        return [*_facts_and_distractors(rng, tools), skill]
    return [*_fillers(rng, tools, rng.choice((0, 0, 0, 1, 1, 2, 3))), skill]


def _training_plan(rng: random.Random, lead: str, tools: int) -> list[str]:
    if lead == "newcomer":
        others = ["identity"] * rng.randint(0, 1) + _fillers(rng, tools, rng.randint(0, 2))
        return ["newcomer"] * rng.randint(1, 4) + others + ["newcomer"]
    if lead == "recall" and rng.random() < 0.4:
        return ["fact"] * rng.randint(2, 6) + ["recall"] * rng.randint(3, 6)
    if lead == "recall":
        return _facts_and_distractors(rng, tools) + ["recall"] * rng.choice((1, 1, 2, 3))
    if lead == "drill":
        return rng.choices(("tool call", "no tool"), (0.88, 0.12), k=rng.randint(4, 7))
    if lead == "built-in drill":
        return rng.choices(list(BUILT_IN_DRILL), list(BUILT_IN_DRILL.values()), k=rng.randint(5, 8))
    if lead == "chain":
        return rng.choices(("two calls in turn", "tool call"), (0.6, 0.4), k=rng.randint(2, 3))
    if lead == "any":
        return _fillers(rng, tools, rng.choice((1, 1, 1, 2, 2, 3, 4, 6)))
    count = rng.choice((1, 2, 3, 3, 4, 5))
    refusals = ["no tool", "no tool", "cannot calculate"]  # of what is not offered
    chosen = rng.choices((lead, "refusal", "filler"), (0.68, 0.16, 0.16), k=count)
    return [
        rng.choice(refusals)
        if kind == "refusal"
        else _fillers(rng, tools, 1)[0]
        if kind == "filler"
        else lead
        for kind in chosen
    ]


def call_text(name: str, arguments: dict[str, Any] | str) -> str:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>{{"name": "{name}", "arguments": {text}}}</tool_call>'


def content(message: Message) -> str:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return (message["content"] or "") + "\n".join(call_text(c["name"], c["arguments"]) for c in calls)


def tool_line(tool: dict[str, Any]) -> str:
    function = tool["function"]
    parameters = function["parameters"]
    shown = []
    for name, schema in parameters["properties"].items():
        optional = "required" in parameters and name not in parameters["required"]
        kind = "" if schema.get("type", "string") == "string" else f": {schema['type']}"
        shown.append(name + ("?" if optional else "") + kind)
    described = f"{function['description']}: " if function["description"] else ""
    return f"- {described}{function['name']}({', '.join(shown)})"


def render(dialogue: Dialogue) -> list[tuple[str, str]]:
    """(role, text) of each turn; the chat template puts <|im_start|> and <|im_end|> around them."""
    turns = [(message["role"], content(message)) for message in dialogue.messages]
    system = turns.pop(0)[1] if turns[0][0] == "system" else ""
    tools = "Tools:\n" + "\n".join(tool_line(tool) for tool in dialogue.tools) if dialogue.tools else ""
    head = "\n\n".join(part for part in (system, tools) if part)
    return [("system", head), *turns] if head else turns


if __name__ == "__main__":
    for number in range(12):
        for role, text in render(dialogue(str(number), Split.TRAIN)):
            print(f"{role:9} | {text}")
        print()
