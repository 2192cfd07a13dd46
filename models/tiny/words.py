"""The vocabulary of the training dialogues and its split into training and held-out words.

Whether a word is held out is a property of its spelling alone (a CRC), so the split needs no list:
the training generator cannot produce a held-out word. Knows nothing of dialogues.
"""

import random
import tomllib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path


def phrasings(text: str) -> list[str]:
    """What | separates, each without the spaces and newlines around it."""
    return [form.strip() for form in text.split("|")]


class Split(Enum):
    TRAIN = "train"
    HELD_OUT = "held-out"


_TEXT = Path(__file__).with_suffix(".toml").read_text()
_LISTS: dict[str, list[str]] = {key: text.split() for key, text in tomllib.loads(_TEXT).items()}
VERBS, NOUNS, PARAMS, KEYS = _LISTS["verbs"], _LISTS["nouns"], _LISTS["params"], _LISTS["keys"]
NAMES, CITIES, COLORS, THINGS = _LISTS["names"], _LISTS["cities"], _LISTS["colors"], _LISTS["things"]
ONSETS, VOWELS, CODAS = _LISTS["onsets"], _LISTS["vowels"], _LISTS["codas"]
# Words that the phrasings themselves use, and the years of dates: both splits may show them.
COMMON = frozenset(_LISTS["common"]) | {str(year) for year in range(2000, 2050)}
ACCENTS = {
    "a": "áäåà",
    "e": "éèëê",
    "i": "íï",
    "o": "öóøô",
    "u": "üúů",
    "c": "çč",
    "s": "šß",
    "n": "ñ",
    "l": "ł",
}


def split_of(word: str) -> Split:
    if word.lower() in COMMON:
        return Split.TRAIN
    return Split.HELD_OUT if zlib.crc32(word.lower().encode()) % 7 == 3 else Split.TRAIN


# What spliced words are made of: no part of them is from a held-out word.
TRAINED = [
    word
    for key in ("verbs", "nouns", "params", "keys", "things")
    for word in _LISTS[key]
    if split_of(word) is Split.TRAIN and "_" not in word
]


def _syllable(rng: random.Random) -> str:
    onset = rng.choice(ONSETS) if rng.random() < 0.88 else ""
    coda = rng.choice(CODAS) if rng.random() < 0.45 else ""
    return onset + rng.choice(VOWELS) + coda


def _made_up(rng: random.Random) -> str:
    if rng.random() < 0.1:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 6)))
    word = "".join(_syllable(rng) for _ in range(rng.choice((1, 2, 2, 2, 2, 3))))
    if rng.random() < 0.015:
        word = "".join(rng.choice(ACCENTS[c]) if c in ACCENTS and rng.random() < 0.4 else c for c in word)
    return word if len(word) > 2 else word + _syllable(rng)


@dataclass
class Words:
    """Draws content words of one split; `used` collects every word drawn, for the disjointness check."""

    rng: random.Random
    split: Split
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._lists: dict[int, list[str]] = {}

    def _keep(self, word: str) -> bool:
        return split_of(word) is self.split

    def pick(self, words: Sequence[str]) -> str:
        """One word of a list, of this split only."""
        if id(words) not in self._lists:
            self._lists[id(words)] = [word for word in words if self._keep(word)]
        word = self.rng.choice(self._lists[id(words)])
        self.used.add(word.lower())
        return word

    def made_up(self) -> str:
        splices = self.split is Split.TRAIN and self.rng.random() < 0.35
        while not self._keep(word := self.spliced() if splices else _made_up(self.rng)):
            pass
        self.used.add(word)
        return word

    def spliced(self) -> str:
        """The beginning of one listed word and the end of another: letters as in ordinary words."""
        one, two = (self.rng.choice(TRAINED) for _ in range(2))
        word = one[: self.rng.randint(1, len(one))] + two[-self.rng.randint(2, len(two)) :]
        return word if word not in COMMON else self.spliced()

    def listed_or_made_up(self, words: Sequence[str], made_up_share: float = 0.4) -> str:
        if self.split is Split.TRAIN:  # more kinds of words than are held out, so that each must be read
            made_up_share = max(made_up_share, 0.6)
        return self.made_up() if self.rng.random() < made_up_share else self.pick(words)

    def cased(self) -> str:
        """A made-up word in some letter case, sometimes with digits."""
        word, kind = self.made_up(), self.rng.random()
        if kind < 0.35:
            word = word.capitalize()
        elif kind < 0.41:
            word = word.upper()
        return word + str(self.rng.randint(0, 99)) if kind > 0.95 else word

    def proper(self) -> str:
        """A name or a place: listed or made up."""
        if self.rng.random() < 0.5:
            return self.made_up().capitalize()
        return self.pick(self.rng.choice((NAMES, CITIES)))

    def plain(self) -> str:
        return self.listed_or_made_up(THINGS, 0.55)

    def phrase(self, low: int, high: int) -> str:
        return " ".join(self.any() for _ in range(self.rng.randint(low, high)))

    def any(self) -> str:
        kind = self.rng.random()
        if kind < 0.55:
            return self.plain()
        if kind < 0.75:
            return self.proper()
        if kind < 0.9:
            return self.cased()
        return self.integer()

    def integer(self) -> str:
        digits = self.rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 6))
        while True:
            text = str(self.rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1))
            if len(text) < 3:
                return text
            if self._keep(text):
                self.used.add(text)
                return text

    def number(self) -> str:
        return self.integer() + (f".{self.rng.randint(0, 99)}" if self.rng.random() < 0.2 else "")
