"""A server of the Hugging Face hub's shape, and of a package index's, for the tests of pulls.

It answers as huggingface.co does: redirects of LFS files to a content server with ranges, X-Linked-Etag,
X-Linked-Size, X-Repo-Commit, X-Error-Code; and as pypi.org does (PEP 691, PEP 503).
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    files: Mapping[str, bytes]
    gated: bool = False
    private: bool = False
    licence: str = "apache-2.0"


@dataclass
class Hub:
    repositories: dict[str, Repository] = field(default_factory=dict)
    wheels: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by package: file name → content
    token: str = ""  # that opens gated and private repositories
    cuts: list[int] = field(default_factory=list)  # the next downloads end after so many bytes
    hold_after: int = -1  # a download waits there until `release` is set
    held_path: str = ""  # only one with this in its path
    release: threading.Event = field(default_factory=threading.Event)
    ignores_ranges: bool = False
    wrong_digests: bool = False
    html_only: bool = False
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    strangers_token: bool = False  # whether the content server was given a token
    url: str = ""

    def downloads(self) -> list[str]:
        """The ranges of the downloads so far; empty: from the start."""
        return [wanted for method, path, wanted in self.asked if method == "GET" and "/content/" in path]

    @contextmanager
    def serve(self) -> Iterator[Hub]:
        hub = self

        class Answering(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                answer(hub, self)

            do_GET = do_HEAD

        server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self.release.set()
            server.shutdown()
            server.server_close()

    @property
    def content_url(self) -> str:
        """Another host, as the hub's content server is."""
        return self.url.replace("127.0.0.1", "localhost") + "/content"

    @property
    def env(self) -> dict[str, str]:
        """The variables of a puller that shall ask this server."""
        return {
            "HF_ENDPOINT": self.url, "PIP_INDEX_URL": f"{self.url}/simple", "PIP_EXTRA_INDEX_URL": "",
            "PIP_CONFIG_FILE": "/dev/null", "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost", "HF_TOKEN_PATH": "/nonexistent", "HF_TOKEN": "",
        }  # fmt: skip


def answer(hub: Hub, http: BaseHTTPRequestHandler) -> None:
    path = http.path.partition("?")[0]
    hub.asked.append((http.command, path, http.headers.get("Range", "")))
    if path.startswith("/content/"):
        hub.strangers_token |= "Authorization" in http.headers
    parts = path.strip("/").split("/")
    if path.startswith("/api/models/"):
        about(hub, http, "/".join(parts[2:4]))
    elif path.startswith("/simple/"):
        page(hub, http, parts[1])
    elif parts[0] == "content":
        content(hub, http, held(hub, path))
    elif len(parts) > 4 and parts[2] == "resolve":
        resolve(hub, http, "/".join(parts[:2]), "/".join(parts[4:]))
    else:
        say(http, 404, b"")


def opened(hub: Hub, http: BaseHTTPRequestHandler, name: str, *, listing: bool) -> Repository | None:
    repository = hub.repositories.get(name)
    knows = bool(hub.token) and http.headers.get("Authorization") == f"Bearer {hub.token}"
    if repository is None or (repository.private and not knows):
        say(http, 401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        return None
    if repository.gated and not knows and not listing:
        said = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"}
        say(http, 403 if http.headers.get("Authorization") else 401, b"{}", said)
        return None
    return repository


def about(hub: Hub, http: BaseHTTPRequestHandler, name: str) -> None:
    if repository := opened(hub, http, name, listing=True):
        siblings = [{"rfilename": path} for path in repository.files]
        facts = {"_id": "1", "id": name, "modelId": name, "sha": COMMIT, "siblings": siblings,
                 "private": False, "gated": "manual" if repository.gated else False,
                 "tags": [f"license:{repository.licence}"], "downloads": 0, "likes": 0}  # fmt: skip
        say(http, 200, json.dumps(facts).encode(), {"Content-Type": "application/json"})


def resolve(hub: Hub, http: BaseHTTPRequestHandler, name: str, path: str) -> None:
    repository = opened(hub, http, name, listing=False)
    if repository is None:
        return
    data = repository.files.get(path)
    if data is None:
        say(http, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
    elif path.endswith((".gguf", ".safetensors")):
        digest = "0" * 64 if hub.wrong_digests else hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": COMMIT}
        say(http, 302, b"", {**linked, "Location": f"{hub.content_url}/{name}/{path}"})
    else:
        etag = f'"{hashlib.sha1(b"blob %d" % len(data) + bytes(1) + data).hexdigest()}"'
        content(hub, http, data, {"ETag": etag, "X-Repo-Commit": COMMIT})


def held(hub: Hub, path: str) -> bytes:
    _, _, kind, *rest = path.split("/", 3)
    if kind == "wheels":
        return next(files[rest[0]] for files in hub.wheels.values() if rest[0] in files)
    organisation, name = kind, rest[0].partition("/")
    return hub.repositories[f"{organisation}/{name[0]}"].files[name[2]]


def page(hub: Hub, http: BaseHTTPRequestHandler, package: str) -> None:
    if package not in hub.wheels:
        say(http, 404, b"")
        return
    files = [
        {"filename": name, "url": f"{hub.content_url}/wheels/{name}", "size": len(data), "yanked": False,
         "hashes": {"sha256": "0" * 64 if hub.wrong_digests else hashlib.sha256(data).hexdigest()}}
        for name, data in hub.wheels[package].items()
    ]  # fmt: skip
    if hub.html_only:
        links = [f'<a href="{f["url"]}#sha256={f["hashes"]["sha256"]}">{f["filename"]}</a>' for f in files]  # type: ignore[index]
        say(http, 200, "".join(links).encode(), {"Content-Type": "text/html"})
        return
    kind = "application/vnd.pypi.simple.v1+json"
    say(http, 200, json.dumps({"files": files}).encode(), {"Content-Type": kind})


def content(
    hub: Hub, http: BaseHTTPRequestHandler, data: bytes, headers: Mapping[str, str] | None = None
) -> None:
    wanted, first = http.headers.get("Range", ""), 0
    if wanted.startswith("bytes=") and not hub.ignores_ranges:
        first = int(wanted[6:].partition("-")[0])
    part = data[first:]
    more = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"} if first else {}
    http.send_response(206 if first else 200)
    for key, value in {**(headers or {}), **more, "Content-Length": str(len(part))}.items():
        http.send_header(key, value)
    http.end_headers()
    if http.command == "HEAD":
        return
    holds = 0 <= hub.hold_after < len(part) and hub.held_path in http.path
    try:
        if hub.cuts:
            http.wfile.write(part[: hub.cuts.pop(0)])
            http.close_connection = True
        elif holds:
            http.wfile.write(part[: hub.hold_after])
            http.wfile.flush()
            hub.release.wait(120)
            http.wfile.write(part[hub.hold_after :])
        else:
            http.wfile.write(part)
    except OSError:
        http.close_connection = True


def say(
    http: BaseHTTPRequestHandler, status: int, body: bytes, headers: Mapping[str, str] | None = None
) -> None:
    http.send_response(status)
    for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
        http.send_header(key, value)
    http.end_headers()
    if http.command != "HEAD":
        http.wfile.write(body)


def wheel(files: Mapping[str, bytes], package: str = "model", version: str = "1.0") -> tuple[str, bytes]:
    """Return the name and content of a wheel."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(f"{package}/{name}", data)
        meta = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\nLicense: MIT\n"
        archive.writestr(f"{package}-{version}.dist-info/METADATA", meta)
    return f"{package}-{version}-py3-none-any.whl", written.getvalue()


def folder(path: Any) -> dict[str, bytes]:
    """The files of a model's folder, as those of a repository."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
