"""The fragments of a dialogue: each is one exchange that trains one skill, made for the scene so far.

Phrasings are separated by |. Knows nothing of plans, splits of training and evaluation, or chat formats.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import built_in
import newcomer
from tools import Tool, Use, email, made_tool, path, prose, url, use_made
from words import COLORS, KEYS, NAMES, Split, Words, phrasings

Message = dict[str, Any]

NO_TOOL = "I have no tool for that."
CANNOT_CALCULATE = "I cannot calculate by myself: offer me the tool calc."
UNKNOWN = "I do not know that: I am only a small model."
IDENTITY = (
    "I am the small built-in model of aios. I can call tools, recall what you told me and explain /aios."
)
GREETING = "Hello! How can I help?"

GREETINGS = phrasings("""Hello|Hi|hi there|Good morning|hey|Hello!|hi|hello|Hi!|Good evening!|Hey there|
Hello, how are you?|Good day|hello there|Greetings|How are you?|Hi there!|Good morning!""")
HELD_OUT_GREETINGS = phrasings("Hello there!|Good evening|Hey!|Hello there|Good day!|hi!")
IDENTITIES = phrasings("""Who are you?|What are you?|what is your name|What is your name?|who are you|
Tell me who you are.|What can you do?|Which model are you?|Are you a robot?|Introduce yourself.|
what can you do|Are you a language model?|Who am I talking to?|What do you do?|Say who you are.|
what are you|Which model is this?|What kind of model are you?|which model do I talk to|
Say what you can do.|Tell me what you do.|Tell me your name.""")
HELD_OUT_IDENTITIES = phrasings("""Tell me what you are.|Say what you are.|who are you?|
what model are you?|What are you|Tell me what you can do.""")
UNKNOWNS = phrasings("""Who invented the {t}?|Why is the {t} {u}?|Who wrote {p}?|When was {p} born?|
Tell me a joke.|Write a poem about {t}.|Translate {t} to French.|How far is {p} from {p2}?|Who is {p}?|
Where is {p}?|How do birds fly?|Why is the sky blue?|How does a {t} work?|What is the meaning of {t}?|
Who won in {p}?|Is {p} bigger than {p2}?|Tell me about {p}.|Explain {t} to me.|Write a story about {p}.|
When did {p} begin?|How old is {p}?|Who discovered {t}?|Do you like {t}?|How many {t} are there in {p}?|
What is a {t}?|Give me a recipe with {t}.|Summarize the history of {p}.|What do you think about {p}?|
Why do {t} {u}?""")

INTRODUCTIONS = phrasings("""I am {}.|I'm {}|Hi, I am {}.|Call me {}.|Hello, I'm {}!|
Hello, my name is {}|I am {}""")
MY_FACTS = phrasings("My {} is {}.|By the way, my {} is {}|my {} is {}|Hi, my {} is {}|My {} is {}")
THE_FACTS = phrasings("The {} is {}.|the {} is {}|Note: the {} is {}|By the way, the {} is {}.")
RECALLS = phrasings("""What is {}?|what is {}|Tell me {}.|Do you know {}?|What's {}?|What was {}?|
Do you remember {}?|What did I say {} was?|What is {}?""")
ECHOES = phrasings("""Repeat: {}|Say {}|Echo this: {}|Repeat after me: {}|Say: {}|Echo: {}|echo {}|
Repeat {}|Repeat this: {}|Say "{}"|Repeat exactly: {}|Please repeat: {}|Repeat "{}"|Say exactly: {}""")
EMAILS = phrasings("""Extract the email address: {}|Extract the e-mail address: {}|
What is the email address in this text? {}|Find the email address in: {}|Give me the email address: {}|
Extract the email: {}|Extract the email address from: {}|Extract the email address from this text: {}|
Which email address is in this text: {}""")
EDGE_WORDS = phrasings("""What is the {} word of: {}|What is the {} word of {}?|
What is the {} word of "{}"?|Give me the {} word of: {}|The {} word of: {}|what is the {} word in: {}|
Tell me the {} word of: {}|Which is the {} word: {}""")
THANKS = phrasings("Thanks|Thank you!|thanks|Thank you.|Great, thanks!|Good.|ok|OK, thank you")
GOODBYES = phrasings("Bye|Goodbye|bye|Good night|See you later.|Good bye!")
GENERAL = ("shell", "python", "search", "http_get", "read_file")  # tools that may do what no other one does


@dataclass
class Scene:
    """What one dialogue has so far."""

    words: Words
    tools: list[Tool] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    brief: bool = False  # calls of tools stand alone, without results

    @property
    def rng(self) -> random.Random:
        return self.words.rng

    def offers(self, *names: str) -> bool:
        return any(tool.name in names for tool in self.tools)

    @property
    def nouns(self) -> set[str]:
        return {tool.noun for tool in self.tools}


def say(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def call_message(use: Use) -> Message:
    function = {"name": use.tool.name, "arguments": use.arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def make_use(scene: Scene, tool: Tool) -> Use:
    if tool.name in built_in.BUILT_IN:
        use = built_in.use_built_in(scene.words, tool)
        while tool.name == "recall" and f"my {use.arguments['key']}" in scene.facts:  # that needs no tool
            use = built_in.use_built_in(scene.words, tool)
        return use
    unique = sum(other.noun == tool.noun for other in scene.tools) == 1 and tool.noun not in scene.facts
    return use_made(scene.words, tool, unique and tool.description != "")


def tool_fragment(scene: Scene) -> list[Message]:
    use = make_use(scene, scene.rng.choice(scene.tools))
    request_and_call: list[Message] = [{"role": "user", "content": use.request}, call_message(use)]
    if scene.brief:
        return request_and_call
    return [
        *request_and_call,
        {"role": "tool", "content": use.result},
        {"role": "assistant", "content": use.answer},
    ]


def chain_fragment(scene: Scene) -> list[Message]:
    """Two calls in turn for one request."""
    one, two = (make_use(scene, tool) for tool in scene.rng.sample(scene.tools, 2))
    second = two.request[0].lower() + two.request[1:] if scene.rng.random() < 0.7 else two.request
    joint = scene.rng.choice((" and then ", ", then ", ". Then ", " and after that ", ", and ", ", and "))
    request = one.request.rstrip(".?") + joint + second
    return [
        {"role": "user", "content": request},
        call_message(one),
        {"role": "tool", "content": one.result},
        call_message(two),
        {"role": "tool", "content": two.result},
        {"role": "assistant", "content": f"{one.answer}\n{two.answer}"},
    ]


def _fact_value(scene: Scene, key: str) -> str:
    words = scene.words
    if key == "name":
        return words.pick(NAMES) if scene.rng.random() < 0.6 else words.made_up().capitalize()
    if key == "color" and scene.rng.random() < 0.5:
        return words.pick(COLORS)
    kind = scene.rng.random()
    if kind < 0.45:
        return words.proper()
    if kind < 0.75:
        return words.cased()
    if kind < 0.85:
        return words.plain()
    return words.phrase(2, 2) if kind < 0.92 else words.integer()


def fact_fragment(scene: Scene) -> list[Message]:
    rng, words = scene.rng, scene.words
    kind = rng.random()
    key = "name" if kind < 0.25 else words.listed_or_made_up(KEYS, 0.35)
    if key in scene.nouns:
        return greet_fragment(scene)
    text = _fact_value(scene, key)
    if key == "name" and rng.random() < 0.5:
        scene.facts["my name"] = text
        return say(rng.choice(INTRODUCTIONS).format(text), f"Hello {text}! How can I help?")
    if kind < 0.72:
        owner, shown, forms = f"my {key}", f"your {key}", MY_FACTS
    elif kind < 0.86:
        owner, shown, forms = f"the {key}", f"the {key}", THE_FACTS
    else:
        owner = shown = f"{words.proper()}'s {key}"
        forms = [owner + " is {1}.", owner + " is {1}"]
    if not scene.offers("remember") and kind < 0.86 and rng.random() < 0.3:
        forms = [f"Remember that {owner} is {{1}}."]
    scene.facts[owner] = text
    return say(rng.choice(forms).format(key, text), f"I will remember that {shown} is {text}.")


def recall_fragment(scene: Scene) -> list[Message]:
    rng = scene.rng
    if not scene.facts:
        return unknown_fact_fragment(scene)
    owner = rng.choice(list(scene.facts))
    shown = "Your" + owner[2:] if owner.startswith("my ") else owner[0].upper() + owner[1:]
    forms = [*RECALLS, "Who am I?", "Do you know who I am?"] if owner == "my name" else RECALLS
    return say(rng.choice(forms).format(owner), f"{shown} is {scene.facts[owner]}.")


def unknown_fact_fragment(scene: Scene) -> list[Message]:
    key = "name" if scene.rng.random() < 0.15 else scene.words.listed_or_made_up(KEYS, 0.35)
    if scene.offers("recall") or f"my {key}" in scene.facts or key in scene.nouns:
        return greet_fragment(scene)
    return say(scene.rng.choice(RECALLS).format(f"my {key}"), f"You have not told me your {key}.")


def echo_fragment(scene: Scene) -> list[Message]:
    rng, words = scene.rng, scene.words
    text = words.phrase(1, 6) if rng.random() < 0.6 else prose(words, 2, 12)
    if rng.random() < 0.08:
        text = rng.choice((url, email, path))(words)
    return say(rng.choice(ECHOES).format(text), text)


def email_fragment(scene: Scene) -> list[Message]:
    rng, words = scene.rng, scene.words
    found = email(words)
    before, after = prose(words, 1, 8).rstrip(".!"), prose(words, 1, 8)
    text = rng.choice(
        (
            f"{words.proper()} wrote to {found} about the {words.plain()}.",
            f"{before} {found} {after}",
            f"{before} {found} {after}",
            f"{before} <{found}> {after}",
            f"Contact: {found}, {after}",
            f"{before} {found}.",
            f"{found} {after}",
            f"Mail {words.proper()} at {found}, not at {url(words)}.",
            f"{before} ({found}) {after}",
        )
    )
    return say(rng.choice(EMAILS).format(text), found)


def edge_word_fragment(scene: Scene) -> list[Message]:
    rng = scene.rng
    parts = [scene.words.any() for _ in range(rng.choice((2, 3, 3, 4, 4, 5, 6, 7, 8)))]
    which = rng.choice(("first", "last"))
    request = rng.choice(EDGE_WORDS).format(which, " ".join(parts))
    return say(request, parts[0] if which == "first" else parts[-1])


def no_tool_fragment(scene: Scene) -> list[Message]:
    rng, words = scene.rng, scene.words
    if rng.random() < 0.4 and not scene.offers(*GENERAL):
        absent = [name for name in (*GENERAL, "clock", "list_dir", "write_file") if not scene.offers(name)]
        tool = built_in.built_in_tool(rng, rng.choice(absent))
        return say(built_in.use_built_in(words, tool).request, NO_TOOL)
    while True:
        tool = made_tool(words)
        if tool.noun not in scene.nouns and tool.params and not any(tool.noun in key for key in scene.facts):
            return say(use_made(words, tool, noun_is_unique=True).request, NO_TOOL)


def calc_refusal_fragment(scene: Scene) -> list[Message]:
    if scene.offers("calc", "python", "shell"):
        return no_tool_fragment(scene)
    return say(built_in.calc(scene.words)[0], CANNOT_CALCULATE)


def greet_fragment(scene: Scene) -> list[Message]:
    held_out = scene.words.split is Split.HELD_OUT
    return say(scene.rng.choice(HELD_OUT_GREETINGS if held_out else GREETINGS), GREETING)


def thanks_fragment(scene: Scene) -> list[Message]:
    if scene.rng.random() < 0.6:
        return say(scene.rng.choice(THANKS), "You are welcome.")
    return say(scene.rng.choice(GOODBYES), "Goodbye!")


def identity_fragment(scene: Scene) -> list[Message]:
    held_out = scene.words.split is Split.HELD_OUT
    return say(scene.rng.choice(HELD_OUT_IDENTITIES if held_out else IDENTITIES), IDENTITY)


def newcomer_fragment(scene: Scene) -> list[Message]:
    return say(*newcomer.question(scene.rng, scene.words.split))


def unknown_fragment(scene: Scene) -> list[Message]:
    words = scene.words
    form = scene.rng.choice(UNKNOWNS)
    return say(form.format(t=words.plain(), u=words.plain(), p=words.proper(), p2=words.proper()), UNKNOWN)
