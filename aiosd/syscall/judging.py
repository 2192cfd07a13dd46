"""Judges of schemas: processes of their own, as some small schemas take for ever. They stay, so that a new
schema costs its compilation and no start; one that takes too long ends its judge, and another starts.

Users take turns, and one user, with all lent uids, has not all judges at once. Any thread may ask.
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from aiosd.errors import Busy
from aiosd.host.subuids import owner

JUDGES = 2
CPU_S = 1.0  # of the processor, that one schema may take
WAIT_S = 20.0  # and by the clock
END_S = 1.0  # that a killed one has to be gone
NICE = 10  # models and the daemon come first
JUDGED_MOST = 2000  # by one process: what its libraries do not give back is bounded
DATA_BYTES = 1 << 30
OPEN_MOST = 64  # questions of one user that are not answered yet
LEFT_MOST = 64  # answers that nobody has waited for, and that are kept for who asks again
NOBODY = -1  # who asks for the daemon itself
ALONE = {
    "PYTHONPATH": ":".join(filter(None, [str(Path(__file__).parents[2]), *sys.path])),
    "RAYON_NUM_THREADS": "1",
}
asking: ContextVar[int] = ContextVar("asking", default=NOBODY)
until: ContextVar[float] = ContextVar("until", default=math.inf)


@contextmanager
def of(uid: int, patience_s: float = math.inf) -> Iterator[None]:
    """What is judged within is asked for by that user. After `patience_s`, all in all, it raises Later."""
    tokens = asking.set(owner(uid)), until.set(time.monotonic() + patience_s)
    try:
        yield
    finally:
        asking.reset(tokens[0])
        until.reset(tokens[1])


class Later(Exception):
    """Who asked waits no longer. The verdict is sought all the same, for who asks again."""


class Died(Exception):
    """A judge did, and not of the schema's length."""


class Judge:
    """One process: a line with a schema in, a line with the verdict out."""

    def __init__(self, module: str) -> None:
        self._judged = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, **ALONE},
        )  # fmt: skip

    @property
    def is_done(self) -> bool:
        return self._judged >= JUDGED_MOST

    def ask(self, schema: str) -> str | None:
        """The verdict; None: it takes too long, and has ended this judge. Raises Died."""
        assert self._process.stdin
        assert self._process.stdout
        self._judged += 1
        try:
            self._process.stdin.write(json.dumps(schema).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise Died from None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        if not poll.poll(WAIT_S * 1000):
            return None
        line = self._process.stdout.readline()
        if line.endswith(b"\n"):
            return str(json.loads(line))
        if self._process.wait() != -signal.SIGPROF:
            raise Died
        return None

    def end(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                assert pipe
                pipe.close()
        with suppress(subprocess.TimeoutExpired):  # it waits for a disk or a server: nobody waits for it
            self._process.wait(END_S)


class Court:
    """The judges, and who waits for one. Started when they are needed."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._changed = threading.Condition()
        self._waiting: dict[int, deque[object]] = {}  # by user, who has waited longest for a turn first
        self._holding: dict[int, int] = {}
        self._idle: list[Judge] = []
        self._asked: dict[tuple[int, str], Future[str | None]] = {}  # by user and schema

    def verdict(self, schema: str) -> str | None:
        """Of a judge; None: it takes too long. Raises Later, Busy."""
        question = asking.get(), schema
        answer = self._ask(*question)
        left_s = until.get() - time.monotonic()
        try:
            said = answer.result(None if left_s == math.inf else max(0.0, left_s))
        except TimeoutError:
            raise Later from None
        finally:
            if answer.done():
                with self._changed:
                    self._asked.pop(question, None)
        return said

    def _ask(self, uid: int, schema: str) -> Future[str | None]:
        with self._changed:
            if known := self._asked.get((uid, schema)):
                return known
            if (
                uid != NOBODY
                and sum(not a.done() for (u, _), a in self._asked.items() if u == uid) >= OPEN_MOST
            ):
                raise Busy(f"{OPEN_MOST} new schemas of yours are judged", "try again in a second")
            for left in [key for key, answer in self._asked.items() if answer.done()][:-LEFT_MOST]:
                del self._asked[left]
            answer = self._asked[uid, schema] = Future()
        threading.Thread(target=self._seek, args=(uid, schema, answer), name="judge", daemon=True).start()
        return answer

    def _seek(self, uid: int, schema: str, answer: Future[str | None]) -> None:
        try:
            answer.set_result(self._verdict(uid, schema))
        except BaseException as error:  # noqa: BLE001 - who asked gets it
            answer.set_exception(error)

    def _verdict(self, uid: int, schema: str) -> str | None:
        with suppress(Died):  # one may be killed at any time; of two it is the schema's doing
            return self._judged(uid, schema)
        with suppress(Died):
            return self._judged(uid, schema)
        return None

    def _judged(self, uid: int, schema: str) -> str | None:
        judge = self._take(uid)
        said = None
        try:
            judge = judge or Judge(self._module)
            said = judge.ask(schema)
            return said
        finally:
            self._give_back(uid, judge, said is not None)

    def held(self, uid: int) -> int:
        """Judges that a user has now."""
        return self._holding.get(uid, 0)

    def _take(self, uid: int) -> Judge | None:
        """A judge when it is this one's turn; None: one is to be started."""
        me = object()
        with self._changed:
            self._waiting.setdefault(uid, deque()).append(me)
            self._changed.wait_for(lambda: self._next() == uid and self._waiting[uid][0] is me)
            mine = self._waiting.pop(uid)
            mine.popleft()
            if mine:
                self._waiting[uid] = mine  # behind all others
            self._holding[uid] = self._holding.get(uid, 0) + 1
            self._changed.notify_all()
            return self._idle.pop() if self._idle else None

    def _next(self) -> int | None:
        """Whose turn it is; None: no judge is free for anybody who waits."""
        if sum(self._holding.values()) >= JUDGES:
            return None
        return next((uid for uid in self._waiting if self._holding.get(uid, 0) < max(1, JUDGES - 1)), None)

    def _give_back(self, uid: int, judge: Judge | None, is_well: bool) -> None:
        if judge and (not is_well or judge.is_done):
            judge.end()
            judge = None
        with self._changed:
            self._holding[uid] -= 1
            if not self._holding[uid]:
                del self._holding[uid]
            if judge:
                self._idle.append(judge)
            self._changed.notify_all()


def serve(verdict: Callable[[str], str], cpu_s: float = CPU_S) -> None:
    """The judge's side. A question that takes too long ends this process, also within a library."""
    with suppress(PermissionError):  # a service manager's filter may refuse it
        os.nice(NICE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        said = verdict(json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()
