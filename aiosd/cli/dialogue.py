"""aiosctl run: talk with a model on the terminal, or ask it once in a pipe.

Lines are edited by readline, which Python brings: it has history, completion and bracketed paste.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from aiosd.cli.conversation import SETTINGS, Conversation, waits_for
from aiosd.cli.models import find
from aiosd.cli.question import question
from aiosd.client import Failed, Files, explained
from aiosd.host.terminal import one_line, safe

PROMPT, MORE = ">>> ", "... "
QUOTES = '"""'
HISTORY_LINES = 2000
DIM, PLAIN, ERASE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"


def run(files: Files, options: argparse.Namespace) -> None:
    model = find(files, options.model or "")
    conversation = Conversation(files, model)
    if options.text or sys.stdin is None or not sys.stdin.isatty():
        once(conversation, question(options.text))
    else:
        Dialogue(conversation).talk()


def once(conversation: Conversation, text: str) -> None:
    """Print the answer alone, as it is made."""
    shown = safe if sys.stdout.isatty() else str
    waiting, last = Waiting(conversation), "\n"
    with closing(conversation.ask(text, waiting)) as pieces:
        for piece, is_thought in pieces:
            if not is_thought:
                waiting.end()
                last = piece
                print(shown(piece), end="", flush=True)
    waiting.end()
    if not last.endswith("\n"):
        print()


class Waiting:
    """While no answer comes, say why on standard error, if that is a terminal. A call says it again."""

    def __init__(self, conversation: Conversation) -> None:
        self._files = conversation.files
        self._terminal, self._said = sys.stderr.isatty(), False
        self._before = set(self._files.names("requests")) if self._terminal else set()
        self._began_s = time.monotonic()

    def __call__(self) -> None:
        if self._terminal:
            with suppress(OSError, ValueError):  # it is told again soon
                if why := waits_for(self._files, self._before):
                    waited_s = time.monotonic() - self._began_s
                    words = one_line(safe(f"waits {waited_s:.0f} s: {why}"))
                    self._print(f"{ERASE}{DIM}{words}{PLAIN}")
                    self._said = True
                else:
                    self.end()

    def end(self) -> None:
        if self._said:
            self._print(ERASE)
            self._said = False

    def _print(self, text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)


class Dialogue:
    """What a person at a terminal says, and gets."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation, self._files = conversation, conversation.files
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/set": (self._set, "NAME VALUE: temperature, system, max_tokens, …; without VALUE the default"),
            "/show": (self._show, "the model, the settings and the length of the conversation"),
            "/model": (self._model, "NAME: continue with another model"),
            "/save": (self._save, "NAME: keep the conversation as a context, and continue there"),
            "/load": (self._load, "NAME: continue a context"),
            "/clear": (self._clear, "forget the conversation; a saved context stays"),
            "/help": (self._help, "this list"),
        }

    def talk(self) -> None:
        edit_lines(self._completions)
        print(f"{self._conversation.model}; /help shows the commands, Ctrl-D ends")
        while True:
            try:
                text = read_message(ask_line)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D ends)")
                continue
            if text.strip():
                self._take(text)

    def _take(self, text: str) -> None:
        """A command or a question. What fails is told, and the dialogue goes on."""
        try:
            if text.startswith("/"):
                self._obey(text)
            else:
                self._ask(text)
        except KeyboardInterrupt:
            print("\n(cancelled; it is no part of the conversation)")
        except Failed as error:
            print(safe(f"aiosctl: {error}"), file=sys.stderr)
        except OSError as error:
            place = error.filename or self._files.root
            print(safe(f"aiosctl: {place}: {explained(self._files, error)}"), file=sys.stderr)
        except UnicodeError:
            print("aiosctl: the text is not UTF-8", file=sys.stderr)

    def _ask(self, text: str) -> None:
        waiting, dim = Waiting(self._conversation), False
        try:
            with closing(self._conversation.ask(text, waiting)) as pieces:
                for piece, is_thought in pieces:
                    waiting.end()
                    if is_thought != dim:
                        dim = is_thought
                        print(DIM if dim else f"{PLAIN}\n", end="")
                    print(safe(piece), end="", flush=True)
        finally:
            waiting.end()
            if dim:
                print(PLAIN, end="")
        print()
        if self._conversation.finish_reason == "length":
            print("(cut off; /set max_tokens N allows more)")

    def _obey(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        if name not in self._commands:
            raise Failed(f"no command {name}; /help shows them. A blank before the / makes it a question")
        self._commands[name][0](rest.strip())

    # commands

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        self._conversation.set(name, value.strip())

    def _show(self, rest: str) -> None:
        now = self._conversation
        said = f"context {now.context}" if now.context else f"{len(now.messages)} messages, not saved"
        used = now.usage
        values = {
            "model": f"{now.model} ({self._files.read(f'models/{now.model}/state').strip()})",
            "conversation": said + (f", {used['total_tokens']} tokens" if used else ""),
            "system": now.system,
            **now.settings,
        }
        for name, value in values.items():
            print(f"{name:14} {safe(str(value)) or '-'}")

    def _model(self, rest: str) -> None:
        self._conversation.model = find(self._files, named(rest, "model"))

    def _save(self, rest: str) -> None:
        name = named(rest, "context")
        self._conversation.save(name)
        print(f"(kept in {self._files.root}/contexts/{name}, as all that follows)")

    def _load(self, rest: str) -> None:
        count = self._conversation.load(named(rest, "context"))
        print(f"({count} messages)")

    def _clear(self, rest: str) -> None:
        self._conversation.clear()

    def _help(self, rest: str) -> None:
        for name, (_, about) in self._commands.items():
            print(f"{name:8} {about}")
        print(f"\\ at the end of a line, or {QUOTES} around lines: a message of several lines")
        print("Ctrl-C   end the answer")
        print("Ctrl-D   end the conversation")

    def _completions(self, line: str) -> Iterator[str]:
        """The words that may come at the end of the line."""
        command, blank, _ = line.partition(" ")
        if not blank:
            yield from self._commands
        elif command == "/set":
            yield from ("system", *SETTINGS)
        elif command == "/model":
            yield from self._files.names("models")
        elif command == "/load":
            yield from self._files.names("contexts")


def named(rest: str, kind: str) -> str:
    if not rest or "/" in rest:
        raise Failed(f"name a {kind}")
    return rest


def read_message(line_of: Callable[[str], str]) -> str:
    """Read lines until a message is complete. `line_of` takes the prompt."""
    line = line_of(PROMPT)
    if line.lstrip().startswith(QUOTES):
        lines = [line.lstrip().removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(line_of(MORE))
        return "\n".join(lines).rstrip().removesuffix(QUOTES).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(line_of(MORE))
    return "\n".join(lines)


def ask_line(prompt: str) -> str:
    line = input(prompt)
    if line.strip():
        remember(line)
    return line


# readline


def edit_lines(completions: Callable[[str], Iterator[str]]) -> None:
    try:
        import readline
    except ImportError:  # a Python without it reads plain lines
        return
    found: list[str] = []

    def complete(word: str, number: int) -> str | None:
        nonlocal found
        if number == 0:
            found = []
            with suppress(OSError):
                before = readline.get_line_buffer()[: readline.get_endidx()]
                found = [f"{one} " for one in completions(before) if one.startswith(word)]
        return found[number] if number < len(found) else None

    readline.set_completer_delims(" \t\n")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    readline.set_auto_history(False)
    readline.set_history_length(HISTORY_LINES)
    with suppress(OSError):
        readline.read_history_file(history())


def remember(line: str) -> None:
    """Add a line to the history, also that of the next time. One that begins with a blank stays out."""
    if "readline" in sys.modules and not line.startswith(" "):
        import readline

        readline.add_history(line)
        with suppress(OSError):  # a full disk does not end the conversation
            readline.append_history_file(1, history())


def history() -> str:
    """The file, made so that nobody else reads it."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    folder = Path(home) / "aios"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = os.open(folder / "history", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.fchmod(file, 0o600)
    os.close(file)
    return str(folder / "history")
