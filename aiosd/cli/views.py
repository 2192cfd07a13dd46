"""The commands of aiosctl that list what a file or a folder of /aios has: status, queue, agents, tools, …"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import suppress
from typing import Any

from aiosd.cli import listing
from aiosd.client import Files

WORDS = {
    "agent",
    "default_model",
    "model",
    "policy",
    "state",
}  # never numbers, whatever their names look like


def status(files: Files, options: argparse.Namespace) -> None:
    """One object, so its JSON is no list, and its name is its state."""
    known = dict(line.split(" ", 1) for line in files.read("status").splitlines())
    if options.quiet:
        print(known["state"])
    elif options.json:
        ready = known["models_ready"]
        values = {key: value(key, text) for key, text in known.items()}
        print(json.dumps(values | {"models_ready": [] if ready == "-" else ready.split(",")}, indent=2))
    else:
        rows = [{"name": key, "value": text} for key, text in known.items()]
        listing.show(options, rows, {"VALUE": "value"})


def queue(files: Files, options: argparse.Namespace) -> None:
    titles, *lines = (line.split() for line in files.read("scheduler/queue").splitlines())
    keys = [title.lower() for title in titles]
    rows = [{key: value(key, text) for key, text in zip(keys, line, strict=True)} for line in lines]
    listing.show(options, rows, dict(zip(titles[1:], keys[1:], strict=True)), key="id")


def value(key: str, text: str) -> Any:
    """A number where the text is one; None for a dash, which stands for nothing."""
    if text == "-":
        return None
    if key not in WORDS:
        for kind in (int, float):
            with suppress(ValueError):
                return kind(text)
    return text


def agents(files: Files, options: argparse.Namespace) -> None:
    rows = []
    for name in files.names("agents"):
        if os.access(files.root / "agents" / name, os.X_OK):
            usage = dict(line.split() for line in files.read(f"agents/{name}/usage").splitlines())
            counted = {key: int(usage[key]) for key in ("requests", "completion_tokens")}
            rows.append({"name": name, "state": files.read(f"agents/{name}/state").strip(), **counted})
    listing.show(options, rows, {"REQUESTS": "requests", "TOKENS": "completion_tokens", "STATE": "state"})


def log(files: Files, options: argparse.Namespace) -> None:
    """Each line is about a file of the agent, or about the folder of a request."""
    notes = [json.loads(line) for line in files.read(f"agents/{options.agent}/log.jsonl").splitlines()]
    rows = [{"file": f"requests/{note.get('request')}", **note} for note in notes]
    columns: dict[str, listing.Column] = {"TIME": when, "STATE": "state", "MESSAGE": "message"}
    listing.show(options, rows, columns, key="file")


def when(row: listing.Row) -> str:
    return time.strftime("%F %T", time.localtime(row["time"]))


def policy(files: Files, options: argparse.Namespace) -> None:
    if options.name:
        files.write("scheduler/policy", options.name)
        return
    now = files.read("scheduler/policy").strip()
    names = files.read("scheduler/policies").split()
    rows = [{"name": name, "state": "in force" if name == now else None} for name in names]
    listing.show(options, rows, {"STATE": "state"})


def tools(files: Files, options: argparse.Namespace) -> None:
    rows = []
    for name in files.names("tools"):
        if os.access(files.root / "tools" / name / "call", os.W_OK):  # X_OK: the mount is noexec
            function = json.loads(files.read(f"tools/{name}/schema.json"))["function"]
            rows.append({"name": name, **{key: function[key] for key in ("description", "parameters")}})
    listing.show(options, rows, {"DESCRIPTION": "description"})


def access(files: Files, options: argparse.Namespace) -> None:
    rows = []
    for id in files.names("access/pending"):
        folder = f"access/pending/{id}"
        if os.access(files.root / folder, os.X_OK):
            act = json.loads(files.read(f"{folder}/request.json"))
            left_s = max(0, int(files.read(f"{folder}/expires")) - int(time.time()))
            rows.append({"id": int(id), **act, "left_s": left_s})
    columns: dict[str, listing.Column] = {"AGENT": "agent", "LEFT_S": "left_s", "TOOL": "tool"}
    listing.show(options, rows, columns | {"ARGUMENTS": asked}, key="id")


def asked(row: listing.Row) -> str:
    """The arguments of the call, or what an MCP server asks during it."""
    return str(row.get("question") or json.dumps(row["arguments"], ensure_ascii=False))
