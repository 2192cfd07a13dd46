"""aiosctl key: make, list and revoke API keys."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable

from aiosd.cli import listing
from aiosd.client import Failed, Files

ID = re.compile(r"[0-9a-f]{12}")
Run = Callable[[Files, argparse.Namespace], None]


def arguments(command: Callable[[str, Run, str], argparse.ArgumentParser]) -> None:
    """Define the commands. `command` makes one."""
    verbs = command("key", show, "API keys, by which other programs act as you").add_subparsers(required=True)
    new = verbs.add_parser("new", help="make a key, and print it this once")
    new.add_argument("name", nargs="?", help="for you to know it by")
    new.add_argument("--agent", metavar="NAME", help="the key may use this agent only")
    new.add_argument("--expires", metavar="TIME", help="30d, 12h or a date; default: never")
    new.add_argument("--tokens-per-day", type=int, metavar="N", help="default: no bound of its own")
    new.set_defaults(run=make)
    listing.options(verbs.add_parser("list", help="your keys; for administrators, those of all users"))
    revoked = verbs.add_parser("revoke", help="end keys")
    revoked.add_argument("ids", nargs="+", metavar="ID")
    revoked.set_defaults(run=revoke)


def make(files: Files, options: argparse.Namespace) -> None:
    asked = {key: getattr(options, key) for key in ("name", "agent", "expires", "tokens_per_day")}
    given = {key: value for key, value in asked.items() if value is not None}
    answer = b"".join(files.answer("keys/new", json.dumps(given, ensure_ascii=False)))
    made = json.loads(answer)
    print(made["key"])
    if sys.stderr.isatty():
        print(f"key {made['id']}: nobody can see it again", file=sys.stderr)


def show(files: Files, options: argparse.Namespace) -> None:
    rows = []
    for id in filter(ID.fullmatch, files.names("keys")):
        if os.access(files.root / "keys" / id, os.X_OK):
            rows.append(json.loads(files.read(f"keys/{id}/info.json")))
    columns: dict[str, listing.Column] = {
        "NAME": "name", "USER": "user", "AGENT": "agent", "TOKENS_PER_DAY": "tokens_per_day",
        "EXPIRES": lambda row: when(row["expires"]), "LAST_USED": lambda row: when(row["last_used"]),
    }  # fmt: skip
    listing.show(options, rows, columns, key="id")


def when(time_s: int | None) -> str:
    return time.strftime("%F %H:%M", time.localtime(time_s)) if time_s is not None else ""


def revoke(files: Files, options: argparse.Namespace) -> None:
    for id in options.ids:
        if not ID.fullmatch(id):
            raise Failed(f"{id} is not the ID of a key; aiosctl key list shows yours")
    for id in options.ids:
        try:
            files.remove(f"keys/{id}")
        except FileNotFoundError:
            raise Failed(f"no key {id}; aiosctl key list shows yours") from None
