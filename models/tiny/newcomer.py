"""Questions of a newcomer to /aios with their answers, in many phrasings; the topics are in newcomer.toml.

The last phrase of each list there is held out: training never sees it. Knows nothing of dialogues or tokens.
"""

import random
import tomllib
from pathlib import Path

from words import Split, phrasings

TOPICS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())["topic"]
OPENERS = phrasings("""How do I|how do I|How can I|how can i|How to|how to|How do you|Tell me how to|
Show me how to|What do I type to|What is the command to|Which command lets me|I want to|Explain how to|
How does one|Can you tell me how to|How would I|What must I do to""")
HELD_OUT_OPENERS = ["How do I", "How can I", "Please tell me how to", "how do i"]
TAILS = ["", "", "", "", "?", "?", "?", "?", "?", ".", " please?", " in aios?", " here?", " with aios?"]
HEADS = ["Hi! ", "Please: ", "Hello, ", "I am new here. ", "A question: "]


def question(rng: random.Random, split: Split) -> tuple[str, str]:
    """A question and its answer."""
    topic = rng.choice(TOPICS)
    kind = rng.choice([key for key in ("how", "ask") if key in topic])
    if split is Split.HELD_OUT:
        phrase = topic[kind][-1]
        return (f"{rng.choice(HELD_OUT_OPENERS)} {phrase}?" if kind == "how" else phrase), topic["answer"]
    text = rng.choice(topic[kind][:-1])
    if kind == "how":
        text = f"{rng.choice(OPENERS)} {text}{rng.choice(TAILS)}"
    elif rng.random() < 0.3:
        text = text.rstrip("?.!").lower() + rng.choice(("", "?"))
    if rng.random() < 0.1:
        text = rng.choice(HEADS) + text
    return text, topic["answer"]
