"""Limit the KV bytes that one user's contexts and half-written kv files may hold. A user is one with all lent
uids (aiosd.host.subuids). Any thread may call.
"""

from __future__ import annotations

import threading
from collections import Counter

from aiosd.access.caller import Caller
from aiosd.access.permissions import Permissions
from aiosd.context.contexts import Contexts
from aiosd.context.residency import Residency
from aiosd.errors import OverQuota
from aiosd.host.subuids import owner
from aiosd.scheduler.limits import Limits
from aiosd.scheduler.queue import add


class KvBudget:
    def __init__(
        self, limits: Limits, permissions: Permissions, contexts: Contexts, residency: Residency
    ) -> None:
        self._limits, self._permissions = limits, permissions
        self._contexts, self._residency = contexts, residency
        self._lock = threading.Lock()
        self._incoming: Counter[int] = Counter()  # by user: bytes of half-written kv files

    def check(self, caller: Caller, more: int = 0) -> None:
        """Raise OverQuota if the user's KV and `more` bytes exceed his quota."""
        most, held = self._limits.quotas.of(caller).kv_bytes, self._incoming[owner(caller.uid)]
        for context in self._contexts.all():
            size = self._residency.bytes(context)
            at = self._permissions.get(f"/contexts/{context.name}") if size else None
            held += size if at and owner(at.uid) == owner(caller.uid) else 0
        if held + more > most:
            raise OverQuota(f"your contexts' KV may take {most} bytes", "echo evict cold > contexts/NAME/ctl")

    def reserve(self, caller: Caller, size: int) -> None:
        """Count bytes of a kv file that is being written; a negative size gives them back. Raises
        OverQuota.
        """
        with self._lock:
            if size > 0:
                self.check(caller, size)
            add(self._incoming, owner(caller.uid), size)
