#!/usr/bin/env python3
"""make demo: starts aiosd on a mount, runs the scripts beside this file on it, shows what they ask and
get and the scheduler's queue, live; then unmounts and leaves nothing running, also after Ctrl-C.

Signals only set a flag, so that no exception can fall between making a thing and noting its undo. Everything
started here is a descendant of this process (a subreaper), which is how the end knows that nothing is left.
Knows aiosd only as a command and /aios only as files; needs nothing but the standard library.
"""

import codecs
import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

EXAMPLES = Path(__file__).resolve().parent
PYTHON = EXAMPLES.parent / ".venv/bin/python"  # this script itself runs with any
REAL_MODEL = EXAMPLES.parent / ".venv/models/SmolLM2-135M-Instruct.Q4_1.gguf"  # ./setup --model brings it
TINY = EXAMPLES.parent / "models/tiny"
PARTS = (
    ("chat", "A conversation: a context keeps what was said"),
    ("stream", "Streaming: cat prints the tokens as they are made"),
    ("sum", "A tool: the agent reads the model's call from the file and runs bc itself"),
    ("three", "Three agents at once, and the scheduler's queue meanwhile"),
)
READY_TIMEOUT_S = 180
SCRIPT_TIMEOUT_S = 180
TERMINATE_TIMEOUT_S = 10
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

libc = ctypes.CDLL(None, use_errno=True)
started_at = time.monotonic()


class Stopped(Exception):
    """The user wants it to end."""


class Failed(Exception):
    """With a message for the user."""


# ----------------------------------------------------------------------------------------------- signals


class Stop:
    """SIGINT, SIGTERM and SIGHUP: sets a flag and wakes whoever selects on `wakeup`."""

    def __init__(self) -> None:
        self.asked = False
        self.wakeup, self._write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        with contextlib.suppress(BlockingIOError):
            os.write(self._write_end, b"x")

    def check(self) -> None:
        if self.asked:
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Sleeps; raises Stopped at once when asked."""
        select.select([self.wakeup], [], [], seconds)
        self.check()


# ---------------------------------------------------------------------------------------------- terminal


class Screen:
    """Colours agents' names on a terminal and keeps lines whole when other text comes between."""

    COLOURS = (36, 33, 35, 32, 34, 31)

    def __init__(self) -> None:
        self.tty = sys.stdout.isatty()
        self._colour_of: dict[str, int] = {}
        self._line = ""  # what of the current line of an agent has been held back or printed
        self._held = True
        self._progress = ""

    def style(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.tty else text

    def say(self, text: str = "") -> None:
        self._end_line()
        print(text, flush=True)

    def progress(self, text: str) -> None:
        """Over itself on a terminal, else not at all."""
        if self.tty and text != self._progress:
            self._end_line()
            print(text, end="", flush=True)
            self._progress = text

    def agents_output(self, text: str) -> None:
        if self._progress:
            self._end_line()
        for piece in text.splitlines(keepends=True):
            self._line += piece
            if not self._held:
                print(piece, end="", flush=True)
            elif " " in self._line or piece.endswith("\n"):  # the name at its start is complete
                print(self._coloured(self._line), end="", flush=True)
                self._held = False
            if piece.endswith("\n"):
                self._line, self._held = "", True

    def _coloured(self, line: str) -> str:
        name, mark, rest = self._split(line)
        if not mark:
            return line
        colour = self._colour_of.setdefault(name, self.COLOURS[len(self._colour_of) % len(self.COLOURS)])
        return self.style(f"1;{colour}", name) + mark + rest

    @staticmethod
    def _split(line: str) -> tuple[str, str, str]:
        for mark in ("> ", ": "):
            name, found, rest = line.partition(mark)
            if found and name.isalnum():
                return name, mark, rest
        return "", "", line

    def _end_line(self) -> None:
        if self._progress:
            print("\r\033[K", end="")
            self._progress = ""
        if self._line:
            print(self._line if self._held else "", flush=True)
            self._line, self._held = "", True


# -------------------------------------------------------------------------------------- processes and mount


def die_with_parent() -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def descendants() -> list[int]:
    """Every process below this one; as a subreaper it keeps those whose parent died."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents[int(entry.name)] = int(fields[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid()})


def end_process(process: subprocess.Popen[bytes]) -> bool:
    """SIGTERM to its whole group, later SIGKILL; says whether SIGTERM was enough."""
    gentle = True
    for number, seconds in ((signal.SIGTERM, TERMINATE_TIMEOUT_S), (signal.SIGKILL, 5)):
        if process.poll() is not None:
            break
        gentle = number == signal.SIGTERM
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    return gentle


def is_mounted(path: Path) -> bool:
    text = str(path).replace(" ", "\\040")
    return any(line.split()[4] == text for line in Path("/proc/self/mountinfo").read_text().splitlines())


def unmount(path: Path) -> None:
    for command in (["fusermount", "-u", "-z", str(path)], ["umount", "-l", str(path)]):
        if is_mounted(path):
            with contextlib.suppress(OSError):
                subprocess.run(command, check=False, stderr=subprocess.DEVNULL)


def make_mount_point(private: Path, undo: contextlib.ExitStack) -> Path:
    """/aios for root, $XDG_RUNTIME_DIR/aios for others; a folder of our own where that is in use."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    usual = private
    if os.getuid() == 0:
        usual = Path("/aios")
    elif os.access(runtime, os.W_OK):
        usual = Path(runtime, "aios")
    if is_mounted(usual) or (usual.exists() and any(usual.iterdir())):
        usual = private
    if not usual.exists():
        usual.mkdir(mode=0o755)
        undo.callback(remove_if_empty, usual)
    return usual.resolve()


def remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def check_fuse() -> None:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise Failed(
            "this machine has no /dev/fuse: modprobe fuse"
            " (a container needs --device /dev/fuse --cap-add SYS_ADMIN)"
        ) from None
    except PermissionError:
        raise Failed(
            "you may not open /dev/fuse: as root, chmod 666 /dev/fuse, or run the demo as root"
        ) from None


# --------------------------------------------------------------------------------------------- the demo


class Demo:
    def __init__(self, stop: Stop, screen: Screen, undo: contextlib.ExitStack) -> None:
        self.stop, self.screen, self.undo = stop, screen, undo
        self.first_answer_s: float | None = None
        self._beginning = b""
        self.left_mounted = False
        self.left_processes = 0

    def start(self) -> None:
        check_fuse()
        self.base = Path(tempfile.mkdtemp(prefix="aios-demo-"))
        self.undo.callback(shutil.rmtree, self.base, ignore_errors=True)
        self.log = self.base / "log"
        self.mount = make_mount_point(self.base / "mount", self.undo)
        self.undo.callback(unmount, self.mount)
        self.screen.say(f"aiosd on {self.mount}, a state folder of its own in {self.base}")
        # More options for the daemon, such as --model DIR, may follow on the command line.
        folders: list[str | Path] = ["--mount", self.mount, "--state", self.base / "state", *self._models()]
        with self.log.open("wb") as log:
            self.daemon = subprocess.Popen(
                [PYTHON if PYTHON.exists() else sys.executable, "-m", "aiosd", *folders, *sys.argv[1:]],
                cwd=EXAMPLES.parent,
                env={**os.environ, "TMPDIR": str(self.base)},  # torch leaves a folder in it
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the demo, which ends the daemon in good order
                preexec_fn=die_with_parent,  # noqa: PLW1509  no thread runs yet
            )
        self.undo.callback(self._end_daemon)
        self._wait_until_ready()

    def _models(self) -> list[str | Path]:
        """The options for the models: SmolLM2 converses, and the built-in model calls tools."""
        if "--model" in sys.argv:
            return []
        if os.environ.get("MODEL") == "tiny" or not REAL_MODEL.exists():
            self.screen.say(
                "with the small built-in model alone; make demo without MODEL=tiny gets a real one"
            )
            return ["--model", TINY]
        self.screen.say("SmolLM2 (135M) converses; the built-in model, tiny, calls tools")
        config = self.base / "aiosd.toml"
        config.write_text(
            f'[models.smollm2]\npath = "{REAL_MODEL}"\ndefault = true\n\n[models.tiny]\npath = "{TINY}"\n'
        )
        return ["--config", config]

    def _end_daemon(self) -> None:
        if not end_process(self.daemon):
            self.screen.say(f"aiosd did not end within {TERMINATE_TIMEOUT_S} s and was killed")
        self.left_mounted = is_mounted(self.mount)

    def _wait_until_ready(self) -> None:
        began = time.monotonic()
        states: dict[str, str] = {}
        with Watch(lambda: states.update(self._model_states()), period_s=0.05):
            while "ready" not in states.values():  # the other one loads when it is asked
                if self.daemon.poll() is not None:
                    raise Failed(f"aiosd ended with status {self.daemon.returncode}\n{self._log_tail()}")
                if "failed" in states.values() or time.monotonic() - began > READY_TIMEOUT_S:
                    raise Failed(f"no model is ready: {states}\n{self._log_tail()}")
                if set(states.values()) == {"absent"}:  # else the first question would wait for the load
                    next(self.mount.glob("models/*/ctl")).write_text("load\n")
                said = ", ".join(f"{name} {state}" for name, state in states.items()) or "starting"
                self.screen.progress(f"{said} … {time.monotonic() - began:.0f} s")
                self.stop.wait(0.05)
        names = ", ".join(name for name, state in states.items() if state == "ready")
        self.screen.say(f"model {names} ready after {time.monotonic() - began:.1f} s")

    def _model_states(self) -> dict[str, str]:
        return {path.parent.name: path.read_text().strip() for path in self.mount.glob("models/*/state")}

    def _log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-20:]
        return "the end of its log:\n" + "\n".join("    " + line for line in lines)

    def run_part(self, number: int, script: str, title: str) -> None:
        self.screen.say()
        self.screen.say(self.screen.style("1", f"{number}. {title}") + f"  (examples/{script})")
        with contextlib.ExitStack() as cleanup:
            process = subprocess.Popen(
                [EXAMPLES / script],
                env={**os.environ, "AIOS": str(self.mount)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            cleanup.callback(end_process, process)
            queue = QueueWatch(self.mount) if script == "three" else None
            if queue:
                cleanup.enter_context(queue)
            self._show(process, queue)
        if process.returncode:
            raise Failed(f"examples/{script} failed with status {process.returncode}\n{self._log_tail()}")
        if queue:
            self.screen.say(queue.summary())

    def _show(self, process: subprocess.Popen[bytes], queue: "QueueWatch | None") -> None:
        assert process.stdout
        output = process.stdout.fileno()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a read may end within a character
        deadline = time.monotonic() + SCRIPT_TIMEOUT_S
        while True:
            readable, _, _ = select.select([output, self.stop.wakeup], [], [], 0.05)
            self.stop.check()
            if output in readable:
                data = os.read(output, 4096)
                if not data:
                    break
                self._note_first_answer(data)
                self.screen.agents_output(decoder.decode(data))
            for table in queue.news() if queue else ():
                for line in table.splitlines():
                    self.screen.say(self.screen.style("2", f"    │ {line}"))
            if time.monotonic() > deadline:
                raise Failed(f"no end after {SCRIPT_TIMEOUT_S} s\n{self._log_tail()}")
        process.wait(SCRIPT_TIMEOUT_S)

    def _note_first_answer(self, data: bytes) -> None:
        if self.first_answer_s is None:
            self._beginning += data
            if self._beginning.partition(b": ")[2]:
                self.first_answer_s = time.monotonic() - started_at


class Watch:
    """Calls `look` again and again in a thread of its own: a read of the mount may block for ever."""

    def __init__(self, look: Callable[[], object], period_s: float) -> None:
        self._look, self._period_s = look, period_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._end.wait(self._period_s):
            with contextlib.suppress(OSError):  # not there yet, or no longer
                self._look()

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()


class QueueWatch(Watch):
    """Samples scheduler/queue; `news` gives what the user has not seen, at most a table each 0.4 s."""

    def __init__(self, mount: Path) -> None:
        super().__init__(self._sample, period_s=0.02)
        self._file = mount / "scheduler/queue"
        self._samples: list[str] = []
        self._shown_at = 0.0
        self._shown = ""

    def _sample(self) -> None:
        self._samples.append(self._file.read_text())

    @staticmethod
    def _requests(table: str) -> int:
        return max(0, len(table.splitlines()) - 1)  # less the header

    def news(self) -> Iterator[str]:
        latest = self._samples[-1] if self._samples else ""
        if self._requests(latest) and latest != self._shown and time.monotonic() - self._shown_at > 0.4:
            self._shown, self._shown_at = latest, time.monotonic()
            yield latest

    def summary(self) -> str:
        most = max(map(self._requests, self._samples), default=0)
        return f"The queue was looked at {len(self._samples)} times: up to {most} requests at once."


def show(demo: Demo) -> None:
    demo.start()
    for number, (script, title) in enumerate(PARTS, 1):
        demo.run_part(number, script, title)
    demo.screen.say()
    demo.screen.say(f"First answer {demo.first_answer_s:.1f} s after the start.")


def kill_what_is_left(demo: Demo) -> None:
    for pid in descendants():
        demo.left_processes += 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def main() -> int:
    stop, screen, status = Stop(), Screen(), 0
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    with contextlib.ExitStack() as undo:
        demo = Demo(stop, screen, undo)
        undo.callback(kill_what_is_left, demo)
        try:
            show(demo)
        except Stopped:
            screen.say("stopping")
            status = 130
        except Failed as failure:
            screen.say(f"demo: {failure}")
            status = 1
    if demo.left_processes or demo.left_mounted:
        screen.say(
            f"demo: aiosd left {demo.left_processes} processes, {demo.left_mounted:d} mounts; gone now"
        )
        return 1
    if status == 0:
        screen.say("Unmounted; nothing left running. To go on by yourself: make run MOUNT=DIR STATE=DIR,")
        screen.say("and in another terminal AIOS=DIR examples/chat")
    return status


if __name__ == "__main__":
    sys.exit(main())
