"""aiosctl models and aiosctl model: which models there are, and to add, load, unload and remove one."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from aiosd.cli import listing
from aiosd.client import Failed, Files, group, user
from aiosd.host.terminal import one_line, safe

POLL_S = 0.1
COMING = ("loading", "waiting", "leaving")
Run = Callable[[Files, argparse.Namespace], None]


def arguments(command: Callable[[str, Run, str], argparse.ArgumentParser]) -> None:
    """Define the commands. `command` makes one."""
    listing.options(command("models", show, "the models and their state"))
    model = command("model", show, "add, load, unload or remove a model").add_subparsers(required=True)
    adding = model.add_parser("add", help="serve a folder with a Hugging Face model, or a GGUF file")
    adding.add_argument("path", type=Path)
    adding.add_argument("--name", help="default: the folder's name")
    adding.add_argument("--replace", action="store_true", help="serve this folder under a name that is taken")
    adding.set_defaults(run=add)
    for verb in ("load", "unload", "remove"):
        one = model.add_parser(verb)
        one.add_argument("name")
        one.set_defaults(run=obey, verb=verb)


def show(files: Files, options: argparse.Namespace) -> None:
    rows = [
        {"name": name, **json.loads(files.read(f"models/{name}/info.json"))} for name in files.names("models")
    ]
    listing.show(options, rows, {"STATE": "state", "PATH": "path", "ERROR": "error"})


def find(files: Files, name: str) -> str:
    """The model of this name, or the default one. Raises Failed."""
    there = [one for one in files.names("models") if os.access(files.root / "models" / one, os.X_OK)]
    if not name:
        known = dict(line.split(" ", 1) for line in files.read("status").splitlines())
        name = known["default_model"]
        if name == "-":
            raise Failed("there is no model yet; aiosctl pull smollm2 gets a small one")
    if name not in there:
        raise Failed(
            f"no model {name!r} for you; there are {', '.join(there) or 'none'}; aiosctl pull {name} gets it"
        )
    return name


def add(files: Files, options: argparse.Namespace) -> None:
    path = options.path.resolve()
    name = options.name or re.sub(r"[^A-Za-z0-9._-]", "-", path.name.removesuffix(".gguf"))
    if not name:
        raise Failed(f"{path} gives the model no name: add --name NAME")
    made = not (files.root / "models" / name).exists()
    if made:
        make(files, name)
    elif not options.replace:
        check_same(files, name, path)
    try:
        files.write(f"models/{name}/ctl", f"load {path}")
        wait(files, name)
    except (OSError, Failed):
        if made:  # leave no model behind that cannot answer
            with suppress(OSError):
                files.remove(f"models/{name}")
        raise


def make(files: Files, name: str) -> None:
    """Make a model without a file. Raises Failed where only an administrator may."""
    try:
        files.make(f"models/{name}")
    except PermissionError:
        at = (files.root / "models").stat()
        raise Failed(
            f"you may not make models here; {user(at.st_uid)} and the group {group(at.st_gid)} may: ask an"
            " administrator, or use those that aiosctl ls shows"
        ) from None


def check_same(files: Files, name: str, path: Path) -> None:
    """Raise Failed if the name serves another folder: its users would get another model without a word."""
    served = json.loads(files.read(f"models/{name}/info.json"))["path"]
    if served != str(path):
        raise Failed(
            f"model {name} is there already and serves {served}; choose another name with --name,"
            " or replace it for everybody with --replace"
        )


def wait(files: Files, name: str) -> None:
    """Wait until a model is ready, and say for what a model without room waits. Raises Failed."""
    began, said = time.monotonic(), ""
    while (state := (files.root / "models" / name / "state").read_text().strip()) in COMING:
        why = error_of(files, name) if state == "waiting" else ""
        if sys.stderr.isatty():
            words = one_line(safe(f"{name}: {state}, {time.monotonic() - began:.0f} s {why}"))
            print(f"\r{words}\x1b[K", end="", file=sys.stderr, flush=True)
        elif why and state != said:
            print(f"{name}: waits: {why}", file=sys.stderr)
        said = state
        time.sleep(POLL_S)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if state != "ready":
        raise Failed(f"{name}: {error_of(files, name) or state}")
    print(f"{name}: ready")


def error_of(files: Files, name: str) -> str:
    return str(json.loads(files.read(f"models/{name}/info.json")).get("error", ""))


def obey(files: Files, options: argparse.Namespace) -> None:
    if options.verb == "remove":
        files.remove(f"models/{options.name}")
        return
    files.write(f"models/{options.name}/ctl", options.verb)
    if options.verb == "load":
        wait(files, options.name)
        return
    waiting = json.loads(files.read(f"models/{options.name}/info.json"))["waiting"]
    left = f"; requests that wait for it: {waiting}" if waiting else ""
    print(f"{options.name}: unloaded; the next request or load brings it back{left}")
