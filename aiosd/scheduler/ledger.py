"""How much service each user and agent had: the counters of the fair and las policies.

Virtual token counters after VTC (OSDI 2024): an output token costs twice an input token, nice changes the
price, and a user who returns gets at least the lowest counter of the present users. Calls of tools have
counters of their own, in seconds: the tokens of a model say nothing about the time of a tool. A user is one
with all lent uids (aiosd.host.subuids). The caller holds the scheduler's lock.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping

from aiosd.host.subuids import owner
from aiosd.syscall.request import Request

INPUT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
NICE_STEP = 1.25  # one level of nice changes the price by a quarter, as in the kernel's scheduler
RUN_IDLE_S = 60.0  # an agent idle for longer begins a new run
SEEN_MOST = 1024  # above it, idle agents are forgotten
STARTED_S = 0.01  # a call that has just started counts for this much


class Shares:
    """Service of one resource, by user and by the run of an agent."""

    def __init__(self) -> None:
        self.users: dict[int, float] = {}
        self.agents: dict[tuple[int, str], float] = {}
        self._present = Counter[int]()  # unfinished requests, by user
        self._last = -1  # the user who was served last
        self._seen_s: dict[tuple[int, str], float] = {}  # when an agent last ended a request

    def arrive(self, request: Request, now: float) -> None:
        uid, run = owner(request.uid), run_of(request)
        if uid not in self._present:
            # the floor if nobody is present: the counter of the last user
            last = self.users.get(self._last, 0.0)
            floor = min((self.users.get(u, 0.0) for u in self._present), default=last)
            self.users[uid] = max(self.users.get(uid, 0.0), floor)
        self._present[uid] += 1
        if now - self._seen_s.get(run, now) > RUN_IDLE_S:
            self.agents.pop(run, None)
        self._seen_s[run] = now
        if len(self._seen_s) > SEEN_MOST:
            self._forget_idle(now)

    def charge(self, request: Request, service: float, attained: float) -> None:
        """`service`: for the user, before nice changes its price; `attained`: for the agent's run."""
        price = NICE_STEP**request.spec.nice
        user, run = owner(request.uid), run_of(request)
        self.users[user] = self.users.get(user, 0.0) + service * price
        self.agents[run] = self.agents.get(run, 0.0) + attained

    def leave(self, request: Request, now: float) -> None:
        user = owner(request.uid)
        self._present[user] -= 1
        if self._present[user] <= 0:
            del self._present[user]
        self._seen_s[run_of(request)] = now
        self._last = user

    def forget(self, uid: int) -> None:
        self.users.pop(uid, None)
        for run in [run for run in self.agents if run[0] == uid]:
            del self.agents[run]

    def _forget_idle(self, now: float) -> None:
        """Keep only the agents of the last RUN_IDLE_S, so that memory stays bounded."""
        for run in [r for r, seen in self._seen_s.items() if now - seen > RUN_IDLE_S]:
            del self._seen_s[run]
            self.agents.pop(run, None)


def run_of(request: Request) -> tuple[int, str]:
    return owner(request.uid), request.agent


class Ledger:
    def __init__(self) -> None:
        self.tokens = Shares()  # of models
        self.seconds = Shares()  # of tools
        self.buckets = Buckets()

    def forget(self, uid: int) -> None:
        self.tokens.forget(uid)
        self.seconds.forget(uid)
        self.buckets.forget(uid)

    def arrive(self, request: Request, now: float) -> None:
        self._of(request).arrive(request, now)

    def leave(self, request: Request, now: float) -> None:
        self._of(request).leave(request, now)

    def _of(self, request: Request) -> Shares:
        return self.seconds if request.spec.acts else self.tokens

    def charge(self, request: Request, *, input_tokens: int = 0, output_tokens: int = 0) -> None:
        self.buckets.spend(owner(request.uid), input_tokens + output_tokens)
        self.buckets.spend(request.agent, input_tokens + output_tokens)
        service = input_tokens * INPUT_WEIGHT + output_tokens * OUTPUT_WEIGHT
        self.tokens.charge(request, service, input_tokens + output_tokens)

    def charge_call(self, request: Request, took_s: float) -> None:
        self.seconds.charge(request, took_s, took_s)

    def users_of_calls(self, running: Iterable[Request]) -> Mapping[int, float]:
        """Seconds of tools by user, with those of calls that run: a free place goes to the user who has
        fewer.
        """
        now, users = time.time(), dict(self.seconds.users)
        for request in running:
            so_far_s = now - request.started_s if request.started_s else 0.0
            user = owner(request.uid)
            users[user] = users.get(user, 0.0) + max(so_far_s, STARTED_S)
        return users


class Buckets:
    """Token buckets: each starts full and refills evenly. Spending may overdraw a bucket."""

    def __init__(self, holds_s: float = 60.0) -> None:
        """`holds_s`: a full bucket has the tokens of so many seconds."""
        self._holds = holds_s / 60
        self._left: dict[object, tuple[float, float]] = {}  # (tokens, at which time)

    def left(self, who: object, per_minute: int, now: float) -> float:
        most = per_minute * self._holds
        tokens, at = self._left.get(who, (most, now))
        tokens = min(most, tokens + (now - at) * per_minute / 60)
        self._left[who] = (tokens, now)
        return tokens

    def forget(self, who: object) -> None:
        """Drop the bucket of a user or agent without a bound. Needs no lock."""
        self._left.pop(who, None)

    def spend(self, who: object, tokens: float) -> None:
        """Take tokens from the bucket. Without a bucket there is no bound."""
        if known := self._left.get(who):
            left, at = known
            self._left[who] = (left - tokens, at)
