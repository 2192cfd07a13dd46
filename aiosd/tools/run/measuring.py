"""The measure of work folders, in a process of its own: their users decide how much there is to look at.

No thread that others wait for looks into a user's folder. Users take turns. A folder that cannot be measured
in time ends the measuring process and the call that works there.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from os import close, scandir
from pathlib import Path

from aiosd.host import proc
from aiosd.host.beneath import opened
from aiosd.host.turns import Turns
from aiosd.host.unasked import FOLDER, SomethingMounted, enter, look
from aiosd.host.usage import free_bytes
from aiosd.syscall.judging import Died, Judge, serve

ENTRY_BYTES = 4096  # that any name in a work folder counts for
DEEPEST = 256  # folders in each other
CPU_S = 5.0  # that one look may take
MOUNTED = "something is mounted in its work folder, and what is written there cannot be bounded"
LATE = "its work folder has more in it than can be measured"


@dataclass(frozen=True, slots=True)
class Look:
    """One look into the folder NAME of a user's."""

    above: str  # the folder above, which only the daemon can change
    name: str
    most_bytes: int
    reserve_bytes: int  # of the disk


class Survey:
    """One thread, which hands one look after the other to the measuring process."""

    def __init__(self, tell: Callable[[int, str], None]) -> None:
        """`tell`: called on the thread with a call's id, and why the call must end; empty: it goes on."""
        self._tell = tell
        self._waiting = Turns[tuple[int, Look]]()
        self._judge: Judge | None = None
        self._thread = threading.Thread(target=self._run, name="survey", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ask(self, uid: int, id: int, wanted: Look) -> None:
        self._waiting.put(uid, (id, wanted))

    def _run(self) -> None:
        while True:
            id, wanted = self._waiting.get()
            self._tell(id, self._measured(wanted))

    def _measured(self, wanted: Look) -> str:
        """Why the call must end; empty: it goes on."""
        for _ in range(2):  # somebody may kill the process; of two it is the folder's doing
            try:
                self._judge = self._judge or Judge(__name__)
                said = self._judge.ask(json.dumps(asdict(wanted)))
            except Died:
                self._end_judge()
            else:
                if said is None:
                    break
                return said
        self._end_judge()
        return LATE

    def _end_judge(self) -> None:
        if self._judge:
            self._judge.end()
        self._judge = None


def why_not(wanted: Look) -> str:
    """Why a call may not go on in that folder; empty: it may."""
    above = Path(wanted.above)
    try:
        if proc.holds_mounts(above / wanted.name):
            return MOUNTED
        with opened(above, FOLDER) as at:
            used = size(at, wanted.name, wanted.most_bytes)
        if used > wanted.most_bytes:
            return f"its work folder has more than {wanted.most_bytes} bytes"
        if free_bytes(above) < wanted.reserve_bytes:  # also of files that it removed and holds open
            return "the disk is full"
    except SomethingMounted:
        return MOUNTED
    except OSError:  # it was removed with its agent, and the call is being ended
        pass
    return ""


def size(at: int, name: str, enough: int, depth: int = 0) -> int:
    """The bytes of a folder in a folder, counted no further than `enough`. Empty files count too, and folders
    that are very deep in each other count as too much. Raises SomethingMounted, OSError."""
    if depth > DEEPEST:
        return enough + 1
    total, folders = 0, list[str]()
    folder = enter(at, name)
    try:
        mount = look(folder).mount
        with scandir(folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # it was removed meanwhile
                    seen = look(folder, entry.name)
                    if seen.mount != mount:
                        raise SomethingMounted(entry.name)
                    total += max(ENTRY_BYTES, seen.disk_bytes)
                    if seen.is_folder:
                        folders.append(entry.name)
                if total > enough:
                    return total
        for below in folders:
            with suppress(FileNotFoundError, NotADirectoryError):
                total += size(folder, below, enough - total, depth + 1)
            if total > enough:
                break
    finally:
        close(folder)
    return total


if __name__ == "__main__":
    serve(lambda text: why_not(Look(**json.loads(text))), CPU_S)
