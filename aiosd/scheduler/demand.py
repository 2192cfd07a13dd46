"""Decide which models are loaded: a model comes with its first request, and goes some time after its last.

absent → (a request, or `load`) → waiting → loading → ready → (keep_alive is over, or another model needs the
room) → leaving → absent. A policy chooses the models that leave for another one. One thread decides, and the
threads of commands beside it, one at a time. `ended` and `came` are called with the scheduler's lock held;
all other methods without it.

Large: one class holds the lock under which models come and go.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from dataclasses import dataclass

from aiosd.access.permissions import Permissions
from aiosd.config import duration
from aiosd.context.residency import Residency
from aiosd.cores.models import Model, Models, ModelState
from aiosd.cores.pool import Pool
from aiosd.cores.rooms import Fit, Rooms
from aiosd.errors import NoRoom
from aiosd.host import identity
from aiosd.host.message_ids import about
from aiosd.policies.residence import Full, Resident
from aiosd.scheduler.scheduler import Scheduler
from aiosd.syscall.request import Request

log = logging.getLogger(__name__)

DRAIN_S = 20.0  # how long the requests of a model that leaves for another may go on
LOOK_S = 0.25  # while a model waits: memory that another program frees sends no event
IDLE_LOOK_S = 60.0
AGAIN_S = 5.0  # after a worker could not be started


@dataclass(frozen=True, slots=True)
class Going:
    """A model that leaves for another one."""

    to: str
    by_s: float  # then its requests wait again


@dataclass(frozen=True, slots=True)
class Busyness:
    """What a model has to do."""

    running: int
    waiting: int
    since_s: float  # since when a request waits for it; infinite: none does


@dataclass(frozen=True, slots=True)
class Round:
    """One decision about all models."""

    now: float
    work: dict[str, Busyness]
    taken: Counter[str]  # bytes by device, for the models that were decided about before


class Demand:
    def __init__(
        self,
        models: Models,
        pool: Pool,
        rooms: Rooms,
        scheduler: Scheduler,
        residency: Residency,
        permissions: Permissions,
    ) -> None:
        self._models, self._pool, self._rooms = models, pool, rooms
        self._scheduler, self._residency, self._permissions = scheduler, residency, permissions
        self._lock = threading.RLock()
        self._going: dict[str, Going] = {}
        self._next_s = 0.0  # when the thread looks again
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="demand", daemon=True)

    # life

    def start(self) -> None:
        """Load the models that are always there, and those that have requests. The others wait for one."""
        self.look()
        self._thread.start()

    def stop(self) -> None:
        """Load and unload nothing more."""
        self._stopping.set()
        self._scheduler.wanting.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            pause_s = self.look()
            self._next_s = time.monotonic() + pause_s
            self._scheduler.wanting.wait(pause_s)
            self._scheduler.wanting.clear()

    # reports

    def came(self, request: Request) -> None:
        """Note a new request: it loads also a model that a command has unloaded."""
        model = self._models.find(request.queue)
        if model and model.stay.unloaded:
            model.stay.unloaded = False
            self._scheduler.wanting.set()

    def ended(self, request: Request, model: Model) -> None:
        until_s = model.stay.ended(request.uid, time.monotonic(), request.spec.keep_alive_s)
        if until_s < self._next_s or model.stay.yields:
            self._scheduler.wanting.set()

    # commands

    def check(self, model: Model) -> None:
        """Refuse a model that is too large for this machine. Raises NoRoom."""
        if model.state in (ModelState.ABSENT, ModelState.WAITING):
            self._rooms.check(model)

    def load(self, model: Model) -> None:
        """Load a model now, or as soon as there is room. Raises NoRoom."""
        self._rooms.check(model)
        with self._lock:
            if model.state is ModelState.FAILED:
                model.state, model.error = ModelState.ABSENT, ""
            model.stay.unloaded, model.stay.wanted_s = False, time.monotonic()
            self.look()
        self._scheduler.wanting.set()

    def unload(self, model: Model) -> None:
        """End a model's workers now. Its requests wait until the next request or command loads it."""
        with self._lock:
            model.stay.unloaded, model.stay.wanted_s = True, None
            self._leave(model)
        self._scheduler.wanting.set()

    def keep_alive(self, model: Model, text: str) -> None:
        """Raises BadValue."""
        self._models.keep_alive(model, text)
        self._scheduler.wanting.set()

    def changed(self, model: Model, moved: bool) -> None:
        """Follow a change of the model's entry in the configuration. `moved`: it is another folder."""
        with self._lock:
            loaded = self._pool.holds(model)
            if moved or model.state is ModelState.FAILED:
                self._leave(model)
            if loaded and not moved:
                self._pool.load(model)
            elif loaded:
                model.stay.wanted_s = time.monotonic()
            model.stay.unloaded = False
            self.look()
        self._scheduler.wanting.set()

    def why(self, model: Model) -> str:
        """Say what the model's waiting requests wait for; empty: for a place on its workers."""
        stay, name = model.stay, model.name
        if model.state is ModelState.WAITING:
            return f"model {name} waits: {model.error}"
        if stay.yields:
            going = self._going.get(name)
            return f"model {name} leaves for {going.to}" if going else f"model {name} leaves"
        if model.state is ModelState.LOADING:
            return f"model {name} loads"
        if model.state is ModelState.ABSENT and stay.unloaded:
            return f"model {name} was unloaded; a new request or a load brings it back"
        return f"model {name} loads soon" if model.state is ModelState.ABSENT else ""

    # deciding

    def look(self) -> float:
        """Load and unload what is due. Return in how many seconds to look again."""
        with self._lock:
            if self._stopping.is_set():
                return IDLE_LOOK_S
            round = Round(time.monotonic(), self._work(), Counter())
            self._expire(round)
            wanted = self._wanted(round)
            self._call_off({model.name for model, _ in wanted})
            for model, since_s in wanted:
                self._admit(model, round.now - since_s, round)
            self._drain(round.now)
            self._pool.warm(any(not model.stay.always for model in self._models.all()))
            waits = any(model.state is ModelState.WAITING for model, _ in wanted)
            return LOOK_S if self._going or waits else self._pause(round)

    def _pause(self, round: Round) -> float:
        ends = [model.stay.until_s - round.now for model in self._idle(round)]
        return max(0.0, min([IDLE_LOOK_S, *ends]))

    def _idle(self, round: Round) -> list[Model]:
        """Return the models that are ready and have no requests."""
        ready = [model for model in self._models.all() if model.state is ModelState.READY]
        work = round.work
        return [m for m in ready if m.name in work and not (work[m.name].running or work[m.name].waiting)]

    def _work(self) -> dict[str, Busyness]:
        scheduler = self._scheduler
        with scheduler.lock:
            running = Counter(request.queue for request in scheduler.queue.running.values())
            found = {}
            for model in self._models.all():
                jobs = scheduler.queue.ready(model.name).jobs
                first = next(iter(jobs.values())).queued_s if jobs else math.inf
                found[model.name] = Busyness(running[model.name], len(jobs), first)
            return found

    def _wanted(self, round: Round) -> list[tuple[Model, float]]:
        """Return the models that are to be loaded, each with the time since when. The administrator's come
        first, then those that wait longest."""
        found = []
        for model in self._models.all():
            stay, load = model.stay, round.work.get(model.name)
            if model.state is ModelState.READY:
                stay.wanted_s = None
            if load is None or model.state not in (ModelState.ABSENT, ModelState.WAITING) or stay.unloaded:
                continue
            if not model.path.name:  # a pull of it has not ended
                continue
            since_s = min(load.since_s, round.now if stay.wanted_s is None else stay.wanted_s)
            if load.waiting or stay.wanted_s is not None or stay.always:
                found.append((model, max(since_s, stay.left_s)))
            elif model.state is ModelState.WAITING and not self._pool.holds(model):
                model.state, model.error = ModelState.ABSENT, ""  # its requests were cancelled
        return sorted(found, key=lambda one: (-self._rank(one[0]), not one[0].stay.always, one[1]))

    def _rank(self, model: Model) -> int:
        """1: the administrator's. 0: a user's own, which comes after them."""
        at = self._permissions.get(f"/models/{model.name}")
        return int(at is None or at.uid in (0, identity.uid()))

    def _admit(self, model: Model, waited_s: float, round: Round) -> None:
        """Load a model if there is room, or choose the models that leave for it."""
        holds = self._pool.holds(model)  # it waits for a device, and the pool starts it when one is free
        if model.stay.always and not holds:
            self._start(model, *self._rooms.always(model))
            return
        try:
            if not holds:
                self._rooms.check(model)
        except NoRoom as error:  # the machine or the model has become another since the request came
            self._pool.fail(model, error.explanation)
            return
        fits = self._rooms.fits(model, round.taken, frozenset(self._going))
        fitting = next((fit for fit in fits if fit.free_bytes >= fit.bytes), None)
        if fitting and not holds:
            self._start(model, fitting.bytes, fitting.kv_bytes)
            return
        for fit in fits:
            if fit.coming_bytes < fit.bytes:
                going = self._choose(model, waited_s, fit, round)
                if not going:
                    continue
                for one in going:
                    self._going[one] = Going(model.name, round.now + DRAIN_S)
                    log.info("model %s leaves for model %s", one, model.name, extra=about(model=one))
            round.taken[fit.device] += fit.bytes
            break
        if not holds:
            self._wait(model, self._words(model, round.work))

    def _choose(self, model: Model, waited_s: float, fit: Fit, round: Round) -> list[str]:
        """Ask the policy which models leave the device."""
        residents = []
        for name, bytes in fit.models.items():
            one, load = self._models.find(name), round.work.get(name)
            if one is None or load is None or one.state is not ModelState.READY or name in self._going:
                continue
            stay, requests = one.stay, load.running + load.waiting
            residents.append(
                Resident(
                    model=name,
                    bytes=bytes,
                    rank=self._rank(one),
                    pinned=stay.always,
                    requests=requests,
                    idle_s=0.0 if requests else round.now - stay.used_s,
                    served_s=round.now - (stay.ready_s or round.now),
                    load_s=stay.load_s,
                )
            )
        rank, free = self._rank(model), fit.coming_bytes
        return self._scheduler.chooser.leave(
            Full(model.name, fit.bytes, free, rank, waited_s, tuple(residents))
        )

    def _words(self, model: Model, work: dict[str, Busyness]) -> str:
        leaving = sorted(name for name, going in self._going.items() if going.to == model.name)
        if leaving:
            return f"until {', '.join(leaving)} leaves"
        busy = [name for name, load in work.items() if load.running and name != model.name]
        return self._rooms.words(model) + (f"; busy: {', '.join(sorted(busy))}" if busy else "")

    def _call_off(self, wanted: set[str]) -> None:
        """Let the models stay that would leave for one that nobody wants any more."""
        for name, going in list(self._going.items()):
            model = self._models.find(name)
            if going.to not in wanted or model is None or model.state is not ModelState.READY:
                del self._going[name]
                if model:
                    model.stay.yields = False
                self._scheduler.stir()

    # acting

    def _start(self, model: Model, bytes: int, kv_bytes: int) -> None:
        model.stay.bytes, model.stay.kv_bytes = bytes, kv_bytes
        try:
            self._pool.load(model)
        except OSError as error:  # no process or no descriptor left
            self._pool.unload(model)
            model.stay.left_s = time.monotonic() + AGAIN_S
            self._wait(model, f"a worker cannot be started yet: {error}")

    def _wait(self, model: Model, why: str) -> None:
        if model.state is not ModelState.WAITING:
            log.info("model %s waits: %s", model.name, why, extra=about(model=model.name))
        model.state, model.error = ModelState.WAITING, why

    def _expire(self, round: Round) -> None:
        """Unload the models whose time is over."""
        for model in self._idle(round):
            if round.now >= model.stay.until_s and self._yields(model):
                words = model.name, duration.shown(model.stay.keep_alive_s)
                log.info("model %s leaves: idle, keep_alive is %s", *words, extra=about(model=model.name))
                self._leave(model)

    def _drain(self, now: float) -> None:
        """Unload the models that leave for another one, when they are idle or their time is up."""
        for name, going in list(self._going.items()):
            model = self._models.find(name)
            if model is None:
                continue
            model.stay.yields = True  # from here on it starts no request
            if self._yields(model) or now >= going.by_s:
                self._leave(model)

    def _yields(self, model: Model) -> bool:
        """Let the model start no more requests if it runs none now."""
        with self._scheduler.lock:
            if any(request.queue == model.name for request in self._scheduler.queue.running.values()):
                return False
            model.stay.yields = True
            return True

    def _leave(self, model: Model) -> None:
        self._going.pop(model.name, None)
        if model.state is ModelState.READY and self._yields(model):
            self._rooms.learn(model)
            self._residency.leave(self._pool.ready(model))
        self._pool.unload(model)
