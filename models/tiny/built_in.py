"""Requests for the tools that aiosd has built in, with their calls, results and answers.

One function per tool gives a case: (request, arguments, result, answer).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from tools import Param, Tool, Use, Value, answered, path, prose, url, value
from words import CITIES, KEYS, Words, phrasings

Case = tuple[str, dict[str, Value], str, str]

CALC = phrasings("""What is {}?|What is {}?|what is {}|Compute {}|Calculate {}.|How much is {}?|
what's {}|{} = ?|Please work out {}.|Tell me {}|I need to know what {} is.|{}|How much is {}|
Can you compute {}?|Evaluate {}""")
NOW = phrasings("What time is it?|what time is it|Tell me the time.|What is the time?|What's the time?")
CLOCK = phrasings("""What time is it in {}?|Tell me the time in {}|Current time in {}?|
what's the time in {} now|What is the time in {}?|what time is it in {}""")
READ_FILE = phrasings("""Read {}|What is in the file {}?|Show me {}|Open {} and tell me what it says|
cat {}|Read the file {}.|What does {} say?|What is in {}?|Please read {}|Print the contents of {}""")
WRITE_FILE = phrasings("""Write {t} to {p}|Write {t} to the file {p}.|Save the text {t} in {p}|
Put {t} into {p}|Write "{t}" to {p}|Write {t} into the file {p}|Create the file {p} with the text {t}""")
LIST_DIR = phrasings("""List {}|What files are in {}?|ls {}|Show the directory {}|
Which files are in {}?|List the directory {}|List the files in {}|What is in the folder {}?""")
REMEMBER = phrasings("""Remember that my {} is {}.|Please remember: my {} is {}|
Remember that the {} is {}|Remember my {}: {}|Remember that my {} is {}|Store in memory that my {} is {}""")
RECALL = phrasings("""What is my {}?|Recall my {}|Do you remember my {}?|What did I say my {} was?|
Tell me my {}.|Look up my {} in memory""")
COMMANDS = [
    *phrasings("""ls -l|df -h|uptime|whoami|free -m|ps aux|uname -a|date|ls -la {a}|cat {a}.txt|
    grep {b} {a}.log|wc -l {a}.md|rm {b}|mkdir {a}|echo {a} {b}|cp {a} {b}|grep "{a}" {b}.txt|head -n 5 {b}|
    systemctl status {b}|df -h /{a}|du -sh {b}"""),
    "ls | grep {b}",
]
SHELL = phrasings("""Run {}|Execute the command {}|Run the shell command {}|run: {}|Run {} in the shell|
Run the command {}|Please run {}""")
HTTP_GET = phrasings("""Fetch {}|Get the page {}|Download {}|What does {} say?|Fetch the page {}|
Open the web page {}|Get {}""")
CODE = phrasings("""print({b})|print("{a}")|print(len('{a}'))|len("{a}")|print({b} * 2)|sum(range({b}))|
sorted('{a}')|import os; print(os.getcwd())|"{a}".upper()|max({b}, 7)|[x for x in range({b})]|
{a} = {b}; print({a})""")
PYTHON = phrasings("""Run this Python: {}|Run the Python code {}|Execute this Python code: {}|
python: {}|Run in Python: {}""")
SEARCH = phrasings("""Search for {}|Search the documents for {}|Find documents about {}|
What do my documents say about {}?|Look for {} in my documents|search {}|Search {}.""")


def _expression(words: Words) -> str:
    rng = words.rng
    gap = " " if rng.random() < 0.85 else ""
    kind = rng.random()

    def then(signs: str) -> str:
        return f"{gap}{rng.choice(signs)}{gap}{words.number()}"

    if kind < 0.65:
        return words.number() + then("+-*/")
    if kind < 0.83:
        return words.number() + then("+-*/") + then("+-*/")
    if kind < 0.95:
        return f"({words.number()}{then('+-')}){then('*/')}"
    return f"{words.number()}{gap}**{gap}{rng.randint(2, 9)}"


def calc(words: Words) -> Case:
    said, good = _expression(words), words.number()
    return words.rng.choice(CALC).format(said), {"expression": said}, good, f"{said} = {good}"


def _time(rng: random.Random) -> str:
    minutes = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    date = f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    return rng.choice((minutes, f"{minutes}:{rng.randint(0, 59):02}", f"{date} {minutes}"))


def clock(words: Words) -> Case:
    rng = words.rng
    good = _time(rng)
    if rng.random() < 0.2:
        return rng.choice(NOW), {"zone": "UTC"}, good, f"It is {good} in UTC."
    city = words.pick(CITIES)
    zone = rng.choice(("UTC", city, words.proper(), f"Europe/{city}", f"Asia/{city}"))
    return rng.choice(CLOCK).format(zone), {"zone": zone}, good, f"It is {good} in {zone}."


def read_file(words: Words) -> Case:
    name, good = path(words), prose(words, 1, 14)
    return words.rng.choice(READ_FILE).format(name), {"path": name}, good, f"{name} says: {good}"


def write_file(words: Words) -> Case:
    name, text, good = path(words), words.phrase(1, 6), words.rng.choice(("ok", "done", "ok", "written"))
    request = words.rng.choice(WRITE_FILE).format(t=text, p=name)
    return request, {"path": name, "content": text}, good, f"{name}: {good}"


def list_dir(words: Words) -> Case:
    rng = words.rng
    name = rng.choice(("/", ".", "/tmp", "/etc", path(words), path(words), "/home/" + words.plain()))
    files = [words.plain() + rng.choice((".txt", ".md", "", ".py", "/")) for _ in range(rng.randint(1, 6))]
    good = "\n".join(files)
    return rng.choice(LIST_DIR).format(name), {"path": name}, good, f"{name} holds:\n{good}"


def remember(words: Words) -> Case:
    key, item = words.pick(KEYS), str(value(words, "string"))
    request = words.rng.choice(REMEMBER).format(key, item)
    return request, {"key": key, "value": item}, words.rng.choice(("ok", "done", "stored")), "Done."


def recall(words: Words) -> Case:
    key, good = words.pick(KEYS), str(value(words, "string"))
    return words.rng.choice(RECALL).format(key), {"key": key}, good, f"Your {key} is {good}."


def shell(words: Words) -> Case:
    command = words.rng.choice(COMMANDS).format(a=words.plain(), b=words.made_up())
    good = prose(words, 1, 8)
    return words.rng.choice(SHELL).format(command), {"command": command}, good, f"The output is: {good}"


def http_get(words: Words) -> Case:
    target, good = url(words), prose(words, 1, 10)
    return words.rng.choice(HTTP_GET).format(target), {"url": target}, good, f"{target} says: {good}"


def python(words: Words) -> Case:
    code = words.rng.choice(CODE).format(a=words.plain(), b=words.integer())
    good = words.phrase(1, 3)
    return words.rng.choice(PYTHON).format(code), {"code": code}, good, f"The output is: {good}"


def search(words: Words) -> Case:
    query, good = words.phrase(1, 3), prose(words, 2, 10)
    return words.rng.choice(SEARCH).format(query), {"query": query}, good, f"I found: {good}"


@dataclass(frozen=True)
class BuiltIn:
    params: tuple[str, ...]
    descriptions: list[str]
    case: Callable[[Words], Case]


BUILT_IN = {
    "calc": BuiltIn(
        ("expression",),
        phrasings(
            "Evaluate an arithmetic expression|Evaluate an arithmetic expression exactly.|A calculator"
        ),
        calc,
    ),
    "clock": BuiltIn(
        ("zone",),
        phrasings("Tell the current time in a time zone|The time in a time zone.|Current date and time"),
        clock,
    ),
    "read_file": BuiltIn(
        ("path",), phrasings("Read a text file|Read a file.|Return the contents of a file"), read_file
    ),
    "write_file": BuiltIn(
        ("path", "content"), phrasings("Write a text file|Write text to a file."), write_file
    ),
    "list_dir": BuiltIn(("path",), phrasings("List a directory|List the files of a directory."), list_dir),
    "remember": BuiltIn(
        ("key", "value"), phrasings("Store a fact in memory|Keep a note in memory."), remember
    ),
    "recall": BuiltIn(("key",), phrasings("Look up a fact in memory|Read a note from memory."), recall),
    "shell": BuiltIn(
        ("command",), phrasings("Run a shell command|Run a command and return its output."), shell
    ),
    "http_get": BuiltIn(("url",), phrasings("Fetch a web page|Fetch a URL."), http_get),
    "python": BuiltIn(
        ("code",), phrasings("Run Python code|Run a Python program and return its output."), python
    ),
    "search": BuiltIn(
        ("query",), phrasings("Search the stored documents|Search documents by words."), search
    ),
}


def built_in_tool(rng: random.Random, name: str) -> Tool:
    built_in = BUILT_IN[name]
    return Tool(name, rng.choice(built_in.descriptions), tuple(Param(p) for p in built_in.params))


def use_built_in(words: Words, tool: Tool) -> Use:
    request, arguments, good, answer = BUILT_IN[tool.name].case(words)
    return answered(words, tool, request, arguments, good, answer)
