"""`error` beside files that take requests and commands: why the reader's last one there came to nothing.

An errno says little, and a user of somebody else's agent or tool cannot read the owner's log.
"""

from __future__ import annotations

from collections.abc import Sequence

from aiosd.fs.files import File, Handle, Opening, Snapshot, encoded
from aiosd.kernel import Kernel
from aiosd.scheduler.handler import Source


class Reason(File):
    """Each reader sees what concerns that reader alone."""

    def __init__(self, kernel: Kernel, folder: str, sources: Sequence[Source] = ()) -> None:
        super().__init__(0o444)
        self._kernel, self._folder, self._sources = kernel, folder, sources

    @property
    def asks_groups(self) -> bool:
        return False

    def open(self, opening: Opening) -> Handle:
        why = self._why(opening.caller.uid)
        return Snapshot(encoded(f"{why}\n" if why else ""))

    def _why(self, uid: int) -> str:
        """The newer one of the last refusal and the newest request."""
        refused_s, _, why = self._kernel.reasons.last(uid, self._folder)
        newest = max((self._newest(source, uid) for source in self._sources), default=0)
        if newest:
            request = self._kernel.admission.get(newest)
            if request.submitted_s >= refused_s:
                return request.error
        return why

    def _newest(self, source: Source, uid: int) -> int:
        agent = source.agent.id if source.agent else 0
        return self._kernel.store.newest(agent, source.file, uid) or 0
