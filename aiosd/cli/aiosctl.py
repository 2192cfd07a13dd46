"""aiosctl: short commands for frequent tasks. Each only reads and writes files of /aios.

A command does the same as a few lines of shell, which `--verbose` shows.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from aiosd import __version__
from aiosd.cli import (
    audit_log,
    keys,
    listing,
    models,
    packaged,
    pulled,
    residents,
    sharing,
    torch_install,
    users,
    views,
)
from aiosd.cli.question import question
from aiosd.client import Failed, Files, explained, patiently, wait_for_daemon
from aiosd.config.config import private_mount

OUTPUT = "standard output"


def main() -> int:
    fill_standard()
    options = arguments().parse_args()
    files = Files(options.mount or find_mount(), options.verbose)
    try:
        if options.served:
            wait_for_daemon(files.root)
        options.run(files, options)
        sys.stdout.flush()
    except Failed as error:
        print(f"aiosctl: {error}", file=sys.stderr)
        return error.status
    except BrokenPipeError:  # `aiosctl queue | head -1`
        drop_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"aiosctl: {error.filename or OUTPUT}: {explained(files, error)}", file=sys.stderr)
        if not error.filename:
            drop_output()
        return 1
    except UnicodeError:
        print("aiosctl: the text is not UTF-8; iconv -t UTF-8 converts it", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def fill_standard() -> None:
    """Give numbers 0 to 2 to /dev/null where the caller closed them, so that no file of the tree gets them.

    It is opened to read: a write to a closed output fails.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            empty = os.open(os.devnull, os.O_RDONLY)
            if empty != number:
                os.dup2(empty, number)
                os.close(empty)
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


def drop_output() -> None:
    """The interpreter's last flush would fail, too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def find_mount() -> Path:
    """Return $AIOS if it is set, else /aios if aiosd serves it, else the private mount of this user."""
    if "AIOS" in os.environ:
        return Path(os.environ["AIOS"])
    try:
        is_served = patiently(Path("/aios/version").exists)
    except OSError:  # the command says which
        is_served = True
    return private_mount() if not is_served and os.getuid() else Path("/aios")


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

    listing.options(command("status", views.status, "the state of the daemon"))
    listing.options(command("queue", views.queue, "the waiting and running requests"))
    listing.options(command("agents", views.agents, "your agents and their state"))
    models.arguments(command)
    pulled.arguments(command)
    keys.arguments(command)
    listing.options(command("ps", residents.show, "the loaded models: size, device, requests, until when"))
    ask_parser = command("ask", ask, "ask an agent, or a model with -m, and print the answer")
    ask_parser.add_argument("-m", "--model", metavar="NAME", help="ask this model without an agent")
    ask_parser.add_argument("agent", nargs="?", help="an agent; a missing agent is made")
    ask_parser.add_argument("text", nargs="*", help="with standard input, if that is a pipe or a file")
    run_parser = command("run", run, "talk with a model, or ask it once")
    run_parser.add_argument("model", nargs="?", help="default: the model of agents that name none")
    run_parser.add_argument("text", nargs="*", help="ask this, with standard input, and end")
    log = command("log", views.log, "why an agent's requests were refused or failed")
    listing.options(log).add_argument("agent")
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
    policy = command("policy", views.policy, "show or switch the scheduling policy")
    listing.options(policy).add_argument("name", nargs="?")
    listing.options(command("tools", views.tools, "the tools that you may call"))
    access = command("access", views.access, "irreversible calls that wait for your decision")
    decisions = listing.options(access).add_subparsers(metavar="DECISION")
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
    program = packages.add_parser("run", help="run an agent as this process, as aios-agent@NAME.service does")
    program.add_argument("package", metavar="NAME|FOLDER")
    program.set_defaults(run=packaged.run, served=False)
    check = packages.add_parser("check", help="check an agent.toml")
    check.add_argument("package", metavar="NAME|FOLDER")
    check.set_defaults(run=packaged.check, served=False)
    shown = packages.add_parser("list", help="list packaged agents")
    listing.options(shown).set_defaults(run=packaged.show, served=False)
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


def ask(files: Files, options: argparse.Namespace) -> None:
    words = [*([options.agent] if options.model and options.agent else []), *options.text]
    if options.model:
        files.ask(f"models/{models.find(files, options.model)}/llm", question(words))
        return
    if not options.agent:
        raise Failed("name an agent, or a model with -m")
    text = question(words)
    if not (files.root / "agents" / options.agent).exists():
        files.make(f"agents/{options.agent}")
    files.ask(f"agents/{options.agent}/syscall/llm", text)


def run(files: Files, options: argparse.Namespace) -> None:
    from aiosd.cli import dialogue  # it reads the request formats, which the other commands need not wait for

    dialogue.run(files, options)


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
