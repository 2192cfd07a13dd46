"""aiosctl ps: the models that are loaded or wait to be, what they take and how long they stay."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

from aiosd.cli import listing
from aiosd.client import Files


def show(files: Files, options: argparse.Namespace) -> None:
    infos = (json.loads(files.read(f"models/{name}/info.json")) for name in files.names("models"))
    columns: dict[str, listing.Column] = {
        "STATE": "state",
        "DEVICE": lambda row: ",".join(row.get("devices", ())),
        "SIZE": lambda row: size(row, "rss_bytes"),
        "ESTIMATE": lambda row: size(row, "estimated_bytes"),
        "RUNNING": "running",
        "WAITING": "waiting",
        "UNTIL": until,
        "WHY": "error",
    }
    listing.show(options, [row for row in infos if row["state"] not in ("absent", "failed")], columns)


def size(row: Mapping[str, Any], key: str) -> str:
    return listing.size(row[key]) if row.get(key) else ""


def until(row: Mapping[str, Any]) -> str:
    """How long the model stays if no request comes."""
    if row["keep_alive"] == "always":
        return "always"
    if "until" not in row:
        return f"{row['keep_alive']} after its last request"
    left_s = max(0, round(row["until"] - time.time()))
    return f"{left_s // 60}m {left_s % 60}s" if left_s >= 60 else f"{left_s}s"
