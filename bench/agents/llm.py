"""The language model of an agent program, descriptor 3. Write a line of JSON, read a line of JSON.

It is a transaction file of /aios, or a socket to a model of this agent's own. The program sees no difference.
"""

import json
import os
import sys
from typing import Any

FACTS = os.path.join(os.path.dirname(__file__), "facts.txt")
TOKENS = int(os.environ.get("TOKENS", "16"))  # of an answer


def ask(*messages: tuple[str, str]) -> str:
    """Each message is a role and a text. Return the answer, and print it for who compares."""
    body = {"messages": [{"role": role, "content": text} for role, text in messages], "max_tokens": TOKENS}
    data = json.dumps(body).encode() + b"\n"
    while data:
        data = data[os.write(3, data) :]
    line = b""
    while not line.endswith(b"\n"):
        if not (more := os.read(3, 1 << 16)):
            sys.exit("the model has ended")
        line += more
    said: Any = json.loads(line)
    answer = str(said["choices"][0]["message"]["content"])
    print(json.dumps(answer), flush=True)
    return answer


def search(word: str) -> str:
    """The tool: the first line of the file of facts that has the word."""
    with open(FACTS) as file:
        return next((line.strip() for line in file if word.lower() in line.lower()), "nothing found")
