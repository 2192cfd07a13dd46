"""aiosctl: short commands for frequent tasks. Each only reads and writes files of /aios.

A command does the same as a few lines of shell, which `--verbose` shows.
"""

from __future__ import annotations

import argparse
import errno
import grp
import json
import os
import pwd
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from aiosd import __version__
from aiosd.cli import audit_log, listing, models, packaged, pulled, sharing, torch_install, users
from aiosd.client import Failed, Files, patiently, wait_for_daemon
from aiosd.config.config import private_mount


def main() -> int:
    options = arguments().parse_args()
    files = Files(options.mount or find_mount(), options.verbose)
    try:
        if options.served:
            wait_for_daemon(files.root)
        options.run(files, options)
    except Failed as error:
        print(f"aiosctl: {error}", file=sys.stderr)
        return error.status
    except BrokenPipeError:  # `aiosctl queue | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's last flush
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"aiosctl: {error.filename or files.root}: {explained(files, error)}", file=sys.stderr)
        return 1
    except UnicodeError:
        print("aiosctl: the text is not UTF-8; iconv -t UTF-8 converts it", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def find_mount() -> Path:
    """Return $AIOS if it is set, else /aios if aiosd serves it, else the private mount of this user."""
    if "AIOS" in os.environ:
        return Path(os.environ["AIOS"])
    try:
        is_served = patiently(Path("/aios/version").exists)
    except OSError:  # the command says which
        is_served = True
    return private_mount() if not is_served and os.getuid() else Path("/aios")


def explained(files: Files, error: OSError) -> str:
    """The errno, and why: the daemon's reason, or whose file it is where the kernel refused."""
    said, file = str(error.strerror or error), Path(str(error.filename or files.root))
    if why := files.why(file):
        return f"{said}: {why}"
    if error.errno not in (errno.EACCES, errno.EPERM):
        return said
    try:
        at = file.stat()
        return (
            f"{said}; it is of {user(at.st_uid)} and group {group(at.st_gid)}, mode {at.st_mode & 0o7777:o}"
        )
    except OSError:
        return f"{said}; a folder above it is closed to you: ls -ld {file.parent}"


def user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aiosctl", description="Use /aios from the command line.")
    parser.add_argument("--mount", type=Path, metavar="DIR", help="default $AIOS, else /aios")
    parser.add_argument("-v", "--verbose", action="store_true", help="print equivalent shell commands")
    parser.add_argument("--version", action="version", version=f"aiosctl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[Files, argparse.Namespace], None], about: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run, served=True)
        return sub

    command("status", status, "the state of the daemon")
    command("queue", queue, "the waiting and running requests")
    listing.options(command("agents", agents, "your agents and their state"))
    models.arguments(command)
    pulled.arguments(command)
    ask_parser = command("ask", ask, "ask an agent, or a model with -m, and print the answer")
    ask_parser.add_argument("-m", "--model", metavar="NAME", help="ask this model without an agent")
    ask_parser.add_argument("agent", nargs="?", help="an agent; a missing agent is made")
    ask_parser.add_argument("text", nargs="*", help="default: standard input")
    command("log", log, "why an agent's requests were refused or failed").add_argument("agent")
    cancel = command("cancel", users.cancel, "end unfinished requests")
    which = cancel.add_mutually_exclusive_group(required=True)
    which.add_argument("id", nargs="?", help="a number of aiosctl queue")
    which.add_argument("--user", metavar="NAME|UID", help="all requests of this user")
    user = command("user", users.remove, "users who go").add_subparsers(required=True)
    gone = user.add_parser("remove", help="cancel a user's requests and remove his objects (root)")
    gone.add_argument("user", metavar="NAME|UID")
    gone.add_argument("--to", metavar="USER", help="give the objects to this user instead")
    gone.set_defaults(run=users.remove)
    shared = command("share", sharing.share, "let a group use one of your agents")
    shared.add_argument("agent")
    shared.add_argument("--group", required=True)
    shared.add_argument("--with-context", action="store_true", help="let it continue the conversation too")
    command("unshare", sharing.unshare, "take it back").add_argument("agent")
    policy_parser = command("policy", policy, "show or switch the scheduling policy")
    policy_parser.add_argument("name", nargs="?")
    command("tools", tools, "the tools that you may call")
    access = command("access", pending, "irreversible calls that wait for your decision")
    decisions = access.add_subparsers(metavar="DECISION")
    for verb in ("allow", "deny"):
        decision = decisions.add_parser(verb, help=f"{verb} a call")
        decision.add_argument("id")
        if verb == "allow":
            decision.add_argument(
                "--always", action="store_true", help="also all later calls of this tool by this agent"
            )
        decision.set_defaults(run=decide, verb=verb, always=False)
    logged = command("audit", audit_log.verify, "the audit log").add_subparsers(required=True)
    whole = logged.add_parser("verify", help="check that no line was changed or removed")
    whole.add_argument("files", nargs="*", type=Path, metavar="FILE", help="each continues the one before")
    whole.set_defaults(run=audit_log.verify, served=False)
    trace_parser = command("trace", trace, "a timeline of the requests, as JSON or as a picture")
    trace_parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the timeline: svg, png or pdf")
    served = command("mcp", mcp_serve, "serve the tree to an MCP client").add_subparsers(required=True)
    mcp = served.add_parser("serve", help="your agents, contexts and tools, over standard input and output")
    mcp.add_argument("--agent", default="", metavar="NAME", help="call tools through this agent")
    mcp.set_defaults(run=mcp_serve)
    packages = command("agent", packaged.show, "packaged agents, aios-agent(5)").add_subparsers(required=True)
    run = packages.add_parser("run", help="run an agent as this process, as aios-agent@NAME.service does")
    run.add_argument("package", metavar="NAME|FOLDER")
    run.set_defaults(run=packaged.run, served=False)
    check = packages.add_parser("check", help="check an agent.toml")
    check.add_argument("package", metavar="NAME|FOLDER")
    check.set_defaults(run=packaged.check, served=False)
    packages.add_parser("list", help="list packaged agents").set_defaults(run=packaged.show, served=False)
    engine = command("engine", torch_install.status, "the PyTorch of workers").add_subparsers(required=True)
    install = engine.add_parser("install", help="install a PyTorch other than that of the package (root)")
    kind = install.add_mutually_exclusive_group(required=True)
    kind.add_argument("--cuda", action="store_true", help="for NVIDIA GPUs: some 3 GB")
    kind.add_argument("--cpu", action="store_true")
    install.add_argument("pip", nargs="*", metavar="-- OPTION", help="more options of pip install")
    install.set_defaults(run=torch_install.install, served=False)
    engine.add_parser("status", help="the PyTorch in use").set_defaults(
        run=torch_install.status, served=False
    )
    engine.add_parser("remove", help="go back to the PyTorch of the package (root)").set_defaults(
        run=torch_install.remove, served=False
    )
    return parser


def status(files: Files, options: argparse.Namespace) -> None:
    print(files.read("status"), end="")


def queue(files: Files, options: argparse.Namespace) -> None:
    print(files.read("scheduler/queue"), end="")


def agents(files: Files, options: argparse.Namespace) -> None:
    rows = []
    for name in files.names("agents"):
        if os.access(files.root / "agents" / name, os.X_OK):
            usage = dict(line.split() for line in files.read(f"agents/{name}/usage").splitlines())
            counted = {key: int(usage[key]) for key in ("requests", "completion_tokens")}
            rows.append({"name": name, "state": files.read(f"agents/{name}/state").strip(), **counted})
    listing.show(options, rows, {"REQUESTS": "requests", "TOKENS": "completion_tokens", "STATE": "state"})


def ask(files: Files, options: argparse.Namespace) -> None:
    words = [*([options.agent] if options.model and options.agent else []), *options.text]
    text = " ".join(words) or sys.stdin.read()
    if options.model:
        files.ask(f"models/{options.model}/llm", text)
        return
    if not options.agent:
        raise Failed("name an agent, or a model with -m")
    if not (files.root / "agents" / options.agent).exists():
        files.make(f"agents/{options.agent}")
    files.ask(f"agents/{options.agent}/syscall/llm", text)


def log(files: Files, options: argparse.Namespace) -> None:
    for line in files.read(f"agents/{options.agent}/log.jsonl").splitlines():
        note = json.loads(line)
        when = time.strftime("%F %T", time.localtime(note["time"]))
        print(when, note.get("file") or f"request {note.get('request')}", note["message"], sep="  ")


def policy(files: Files, options: argparse.Namespace) -> None:
    if options.name:
        files.write("scheduler/policy", options.name)
        return
    now = files.read("scheduler/policy").strip()
    for name in files.read("scheduler/policies").split():
        print(f"{'*' if name == now else ' '} {name}")


def tools(files: Files, options: argparse.Namespace) -> None:
    for name in files.names("tools"):
        if os.access(files.root / "tools" / name / "call", os.W_OK):  # X_OK: the mount is noexec
            function = json.loads(files.read(f"tools/{name}/schema.json"))["function"]
            print(f"{name:24} {function['description']}")


def pending(files: Files, options: argparse.Namespace) -> None:
    for id in files.names("access/pending"):
        folder = f"access/pending/{id}"
        if os.access(files.root / folder, os.X_OK):
            act = json.loads(files.read(f"{folder}/request.json"))
            left_s = max(0, int(files.read(f"{folder}/expires")) - int(time.time()))
            said = json.dumps(act["arguments"], ensure_ascii=False)
            print(f"{id:>8}  {act['agent'] or '-'}  {act['tool']} {said}  ({left_s} s left)")


def decide(files: Files, options: argparse.Namespace) -> None:
    try:
        files.write(
            f"access/pending/{options.id}/decision", options.verb + (" always" if options.always else "")
        )
    except FileNotFoundError:
        raise Failed(f"call {options.id} does not wait; aiosctl access lists the calls that do") from None


def trace(files: Files, options: argparse.Namespace) -> None:
    text = files.read("scheduler/trace.json")
    if options.plot is None:
        print(text, end="")
        return
    try:
        from aiosd.cli.plot import plot

        plot(json.loads(text), options.plot)
    except ImportError:
        raise Failed(f"drawing needs matplotlib: {sys.executable} -m pip install matplotlib") from None
    except ValueError as error:  # a suffix that is no format
        raise Failed(f"{options.plot}: {error}") from None


def mcp_serve(files: Files, options: argparse.Namespace) -> None:
    try:
        from aiosd.cli.mcp import serve
    except ImportError:
        raise Failed(f"this needs the MCP SDK: {sys.executable} -m pip install mcp") from None
    if options.agent and not os.access(files.root / "agents" / options.agent, os.X_OK):
        raise Failed(f"you have no agent {options.agent}; mkdir {files.root}/agents/{options.agent} makes it")
    serve(files.root, options.agent)


if __name__ == "__main__":
    sys.exit(main())
