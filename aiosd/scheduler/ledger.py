"""Who has been served how much: the counters that the fair and las policies decide by.

Virtual token counters after VTC (OSDI 2024): an output token costs twice an input token, nice divides the
price, and a user who was away is lifted to the least of those present. Called with the scheduler's lock held.
"""

from __future__ import annotations

from collections.abc import Collection

from aiosd.syscall.request import Request

INPUT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
NICE_STEP = 1.25  # a level of nice is worth a quarter more or less, as in the kernel's scheduler
RUN_IDLE_S = 60.0  # an agent idle for longer begins a new run
SEEN_MOST = 1024  # then the idle ones are forgotten


class Ledger:
    def __init__(self) -> None:
        self.users: dict[int, float] = {}
        self.agents: dict[tuple[int, str], float] = {}
        self.buckets = Buckets()
        self._last = -1  # the user who was served last
        self._seen_s: dict[tuple[int, str], float] = {}  # when an agent last ended a request

    def arrive(self, request: Request, present: Collection[int], now: float) -> None:
        """`present`: the users with unfinished requests, this one's not counted."""
        uid, run = request.uid, (request.uid, request.agent)
        if uid not in present:
            last = self.users.get(self._last, 0.0)  # nobody is there: the level of who was last
            floor = min((self.users.get(u, 0.0) for u in present), default=last)
            self.users[uid] = max(self.users.get(uid, 0.0), floor)
        if now - self._seen_s.get(run, now) > RUN_IDLE_S:
            self.agents.pop(run, None)
        self._seen_s[run] = now
        if len(self._seen_s) > SEEN_MOST:
            self._forget_idle(now)

    def charge(self, request: Request, *, input_tokens: int = 0, output_tokens: int = 0) -> None:
        self.buckets.spend(request.uid, input_tokens + output_tokens)
        self.buckets.spend(request.agent, input_tokens + output_tokens)
        service = input_tokens * INPUT_WEIGHT + output_tokens * OUTPUT_WEIGHT
        price = NICE_STEP**request.spec.nice
        self.users[request.uid] = self.users.get(request.uid, 0.0) + service * price
        run = request.uid, request.agent
        self.agents[run] = self.agents.get(run, 0.0) + input_tokens + output_tokens

    def leave(self, request: Request, now: float) -> None:
        self._seen_s[request.uid, request.agent] = now
        self._last = request.uid

    def _forget_idle(self, now: float) -> None:
        """Bounded by the agents of the last minute or so, not by all that ever were."""
        for run in [r for r, seen in self._seen_s.items() if now - seen > RUN_IDLE_S]:
            del self._seen_s[run]
            self.agents.pop(run, None)


class Buckets:
    """Token buckets: a minute's worth to begin with, filled again evenly. Spending may overdraw one."""

    def __init__(self) -> None:
        self._left: dict[object, tuple[float, float]] = {}  # tokens and when that was

    def left(self, who: object, per_minute: int, now: float) -> float:
        tokens, at = self._left.get(who, (float(per_minute), now))
        tokens = min(float(per_minute), tokens + (now - at) * per_minute / 60)
        self._left[who] = (tokens, now)
        return tokens

    def forget(self, who: object) -> None:
        """There is no bound, or no more. Needs no lock."""
        self._left.pop(who, None)

    def spend(self, who: object, tokens: int) -> None:
        """Of those that were asked about: the others have no bound."""
        if known := self._left.get(who):
            left, at = known
            self._left[who] = (left - tokens, at)
