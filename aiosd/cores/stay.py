"""How long one model stays loaded. Times are on the monotonic clock. aiosd.scheduler.demand decides by it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

KEPT_MAX = 1000  # users whose last request a model remembers


@dataclass(slots=True, eq=False)
class Stay:
    keep_alive_s: float  # after its last request; infinite: always loaded, and it leaves for no other
    by_ctl: bool = False  # a command has set keep_alive, so it stays until the model's entry changes
    wanted_s: float | None = None  # since when it is to be loaded without a request: by `load`, or always
    unloaded: bool = False  # by a command: requests that came before it do not load it again
    yields: bool = False  # it leaves soon, and starts no more requests
    began_s: float = 0.0  # when it was last sent to load
    ready_s: float | None = None  # since when it is ready
    load_s: float = 0.0  # how long its load took
    used_s: float = 0.0  # when its last request ended
    left_s: float = 0.0  # when its workers were ended last
    kv_bytes: int = 0  # that its workers get
    bytes: int = 0  # that one worker takes, by the estimate
    _until: dict[int, float] = field(default_factory=dict)  # by user

    @property
    def always(self) -> bool:
        return self.keep_alive_s == math.inf

    def ready(self, now: float) -> None:
        """Note that a worker is ready. The first one begins the stay."""
        if self.ready_s is None:
            self.ready_s = self.used_s = now
            self.load_s = now - self.began_s

    def ended(self, uid: int, now: float, keep_alive_s: float | None) -> float:
        """Note that a request of this user has ended. Return until when it keeps the model.

        Each user has one time, so that nobody shortens the time of another.
        """
        self.used_s = now
        self._until.pop(uid, None)
        if len(self._until) >= KEPT_MAX:
            del self._until[next(iter(self._until))]
        self._until[uid] = now + (self.keep_alive_s if keep_alive_s is None else keep_alive_s)
        return self._until[uid]

    @property
    def until_s(self) -> float:
        """When the model goes if no request comes."""
        if self.always:
            return math.inf
        since = self.used_s if self.ready_s is None else self.ready_s
        return max(self._until.values(), default=since + self.keep_alive_s)

    def keep(self, keep_alive_s: float) -> None:
        """Set keep_alive. It counts for the requests that have ended too."""
        self.keep_alive_s = keep_alive_s
        self._until = dict.fromkeys(self._until, self.used_s + keep_alive_s)

    def left(self, now: float) -> None:
        """Note that its workers are ended."""
        self.ready_s, self.yields, self.left_s = None, False, now
        self._until.clear()
