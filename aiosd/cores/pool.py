"""Start, watch and restart the worker processes. The scheduler decides which request runs on which worker.

Each worker has one listening thread, which calls `events` (the scheduler). Only one thread at a time sends
the scheduler's orders, so a worker gets Submit and Remove in the order of the decisions.

Large: a worker has many ways to start, end and be replaced, and one lock orders them all.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from aiosd.config.config import EngineConfig
from aiosd.cores import devices, wire
from aiosd.cores.assignment import Assignment, Place, Probe
from aiosd.cores.footprint import LEAST_KV_BYTES
from aiosd.cores.launch import Launcher, Process
from aiosd.cores.models import Model, ModelState
from aiosd.cores.warm import Spare, Spares
from aiosd.errors import WireError, in_words
from aiosd.host import memory
from aiosd.host.message_ids import Id, about

log = logging.getLogger(__name__)

RESTART_S_MIN, RESTART_S_MAX = 0.5, 30.0
DEATHS_MAX = 6  # restarts in one place, without one worker ready in between
STOP_S = 3.0
ANYWHERE = Place((devices.CPU,), 1.0)
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class WorkerState(StrEnum):
    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"
    DEAD = "dead"


@dataclass(slots=True, eq=False)
class Worker:
    id: int
    model: Model
    process: Process
    channel: wire.Channel | None = None  # None: the process is starting
    state: WorkerState = WorkerState.LOADING
    started_s: float = field(default_factory=time.monotonic)
    stats: dict[str, int] = field(default_factory=dict)
    loaded_bytes: int = 0  # of its own memory when it was ready
    place: Place = ANYWHERE
    leaving: bool = False  # it serves until a worker of its model in another place is ready


class PoolEvents(Protocol):
    def worker_ready(self, worker: Worker) -> None: ...
    def worker_said(self, worker: Worker, message: wire.Message) -> None: ...
    def worker_died(self, worker: Worker) -> None: ...
    def model_failed(self, model: Model) -> None: ...
    def model_waits(self, model: Model) -> None: ...
    def device_failed(self, uuid: str, why: str) -> None: ...


class Pool:
    def __init__(self, engine: EngineConfig, launch: Launcher, probe: Probe) -> None:
        self.places = Assignment(engine, probe)
        self._launch = launch
        self._events: PoolEvents
        self._lock = threading.Lock()
        self._arranging = threading.RLock()  # only one thread at a time decides about the workers
        self._models: dict[str, Model] = {}  # the models that should be loaded
        self._workers: dict[int, Worker] = {}
        self._spares = Spares()
        self._threads: list[threading.Thread] = []
        self._deaths: dict[tuple[str, Place], int] = {}  # deaths since a worker was last ready there
        self._blamed: dict[str, str] = {}  # model → the device its workers died on; ends with a ready worker
        self._stopping = threading.Event()
        self.restarts = 0

    def report_to(self, events: PoolEvents) -> None:
        """Set the receiver of the workers' events. Call it before the first model is loaded."""
        self._events = events

    def workers(self) -> list[Worker]:
        return list(self._workers.values())

    def of(self, model: Model) -> list[Worker]:
        """The workers that serve this model, or load it."""
        return [w for w in self.workers() if w.model is model and w.state is not WorkerState.STOPPING]

    def ready(self, model: Model) -> list[Worker]:
        return [w for w in self.workers() if w.model is model and w.state is WorkerState.READY]

    def load(self, *models: Model) -> None:
        """Start the missing workers; do not wait until they have loaded. Raises OSError."""
        for model in models:
            self._models[model.name] = model
            if model.state is not ModelState.READY:
                model.state, model.error = ModelState.LOADING, ""
                model.stay.began_s = time.monotonic()
        self.arrange()

    def unload(self, model: Model) -> None:
        """End a model's workers. Their running requests wait again."""
        with self._arranging:
            model.state, model.error = ModelState.ABSENT, ""
            self._models.pop(model.name, None)
            for worker in self.of(model):
                self._end(worker)
            model.stay.left(time.monotonic())
            self.arrange()  # other models may use the freed devices

    def holds(self, model: Model) -> bool:
        """Whether the model is loaded, or will be as soon as a device is free."""
        return self._models.get(model.name) is model

    def held(self) -> list[Model]:
        """The models that are loaded or will be."""
        return self._wanted()

    def fail(self, model: Model, why: str) -> None:
        """Give a model up, and its requests."""
        self._models.pop(model.name, None)
        model.state, model.error = ModelState.FAILED, why
        model.stay.left(time.monotonic())
        extra = about(Id.MODEL_FAILED, model=model.name)
        log.error("model %s cannot be loaded: %s", model.name, why, extra=extra)
        self._events.model_failed(model)

    def warm(self, wanted: bool) -> None:
        """Keep a spare process on each device while no model loads, or none."""
        with self._arranging, self._lock:
            wanted = wanted and self.places.engine.warm and not self._stopping.is_set()
            loading = any(w.state is WorkerState.LOADING for w in self.workers())
            lacking = self._spares.lacking(self.places.anywhere() if wanted else ())
            for place in () if loading else lacking:
                id = self._free_id()
                try:
                    self._spares.add(Spare(id, self._launched(id, place), place))
                except OSError as error:  # no process or no descriptor left
                    log.info("no worker is kept warm: %s", error)
                    return

    def spares(self) -> list[Spare]:
        return self._spares.all()

    def _free_id(self) -> int:
        used = self._workers.keys() | self._spares.ids
        return next(n for n in range(len(used) + 1) if n not in used)

    def _launched(self, id: int, on: tuple[str, ...]) -> Process:
        env = dict(ENVIRONMENT)
        if on != (devices.CPU,):
            env |= devices.environment(self.places.on(on))
        return self._launch(id, env, on)

    def resize(self, model: Model, replicas: int) -> None:
        """Change the number of workers. Raises BadValue when a pinned model has no room for them."""
        self.judge(model, model.pins, replicas)
        model.replicas = replicas
        if self.holds(model):
            self.load(model)

    def judge(self, model: Model, pins: tuple[str, ...], replicas: int) -> None:
        """Check that the devices have room for these pins and replicas. Raises BadValue."""
        wished = replace(model, pins=pins, replicas=replicas)
        with self._arranging:
            self.places.judge(wished, [m for m in self._wanted() if m is not model], self._now())

    def _wanted(self) -> list[Model]:
        gone = ModelState.ABSENT, ModelState.FAILED
        return [model for model in list(self._models.values()) if model.state not in gone]

    def _now(self) -> dict[str, list[tuple[str, ...]]]:
        return {m.name: [w.place.devices for w in self.of(m) if not w.leaving] for m in self._wanted()}

    def arrange(self) -> None:
        """End workers in the wrong places, and start the missing ones."""
        with self._arranging:
            for uuid in self.places.newly_failed():
                self._tell_failed(uuid)
            wanted = self._wanted()
            plan = self.places.plan(wanted, self._now())
            lacking: list[tuple[Model, Place]] = []
            surplus: list[Worker] = []
            for model in wanted:
                left = sorted(self.of(model), key=lambda worker: worker.leaving)
                for place in plan[model.name]:
                    if there := next((w for w in left if w.place == place), None):
                        left.remove(there)
                        there.leaving = False
                    else:
                        lacking.append((model, place))
                surplus += left
                if not plan[model.name]:
                    self._wait(model)
            taken = {device for _, place in lacking for device in place.devices}
            for worker in surplus:
                replaced = worker.leaving or any(model is worker.model for model, _ in lacking)
                self._move(worker, replaced, taken)
            for model, place in lacking:
                if model.state is ModelState.WAITING:
                    model.state, model.error = ModelState.LOADING, ""
                self._start(model, place)

    def _move(self, worker: Worker, replaced: bool, taken: set[str]) -> None:
        """End a worker in the wrong place. It first waits for its replacement if no new worker needs its
        devices."""
        on = {uuid for uuid in worker.place.devices if uuid != devices.CPU}
        if on & self.places.failed.keys():
            worker.state = WorkerState.STOPPING
            worker.process.kill()  # a process blocked on a lost device reacts to no other signal
        elif replaced and worker.state is WorkerState.READY and not on & taken:
            worker.leaving = True
        else:
            self._end(worker)

    def _wait(self, model: Model) -> None:
        if model.state is not ModelState.WAITING:
            model.state, model.error = ModelState.WAITING, self.places.why_not(model)
            extra = about(Id.DEVICE_LACKS, model=model.name)
            log.error("model %s waits for a device: %s", model.name, model.error, extra=extra)
            self._events.model_waits(model)

    def find(self, id: int | None) -> Worker | None:
        return self._workers.get(-1 if id is None else id)

    def send(self, worker: Worker, message: wire.Message, file: int | None = None) -> None:
        with suppress(OSError):  # the worker died; its listening thread reports that
            if worker.channel:
                worker.channel.send(message, file)

    def stop(self) -> None:
        self._stopping.set()
        self.warm(False)
        for worker in self.workers():
            self._end(worker)
        for worker in self.workers():
            try:
                worker.process.wait(STOP_S)
            except TimeoutError:
                worker.process.kill()
        for thread in list(self._threads):
            thread.join(STOP_S)

    @staticmethod
    def _end(worker: Worker) -> None:
        worker.state = WorkerState.STOPPING
        worker.process.terminate()

    def _start(self, model: Model, place: Place) -> None:
        with self._lock:
            if spare := self._spares.take(place.devices):
                id, process = spare.id, spare.process
            else:
                id = self._free_id()
                process = self._launched(id, place.devices)
            worker = self._workers[id] = Worker(id, model, process, place=place)
        thread = threading.Thread(target=self._listen, args=(worker,), name=f"worker-{id}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _order(self, model: Model, place: Place) -> wire.Load:
        e, on = self.places.engine, self.places.on(place.devices)
        return wire.Load(
            path=str(model.path),
            device=self.places.torch_device(place, bool(model.pins)),
            fraction=place.fraction,
            cpus=devices.cpus_of(on),
            nodes=devices.numa_of(on),
            dtype=e.dtype,
            kv_bytes=model.stay.kv_bytes or e.kv_bytes or LEAST_KV_BYTES,
            max_running=e.max_running,
            prefill_tokens=e.prefill_tokens,
            threads=e.threads,
            deterministic=e.deterministic,
            quantization=e.quantization,
        )

    def _listen(self, worker: Worker) -> None:
        failed: wire.LoadFailed | None = None
        why = ""
        try:
            worker.channel = worker.process.connect()
            words = worker.id, worker.model.name, worker.process.pid
            log.info(
                "worker %d started for model %s (pid %d)", *words, extra=facts(worker, Id.WORKER_STARTED)
            )
            self.send(worker, self._order(worker.model, worker.place))
            while (message := worker.channel.receive()) is not None:
                match message:
                    case wire.Ready():
                        self._ready(worker, message)
                    case wire.LoadFailed():
                        failed = message
                    case wire.Step():
                        worker.stats = message.stats
                        self._events.worker_said(worker, message)
                    case _:
                        self._events.worker_said(worker, message)
        except (WireError, OSError) as error:
            why = in_words(error)
            log.error("worker %d: %s", worker.id, why, extra=facts(worker))
        worker.process.kill()
        how = worker.process.wait()
        worker.process.close()
        if worker.channel:
            worker.channel.close()
        self._ended(worker, failed, why or how)

    def _ready(self, worker: Worker, message: wire.Ready) -> None:
        model = worker.model
        if worker.state is WorkerState.STOPPING:  # the model was unloaded meanwhile
            return
        worker.state, worker.loaded_bytes = WorkerState.READY, memory.resident(worker.process.pid)[0]
        model.stay.ready(time.monotonic())
        model.info, model.state, model.error = message.info, ModelState.READY, ""
        self.places.heard(worker.place, message.info.get("warning", ""))
        self._deaths.pop((model.name, worker.place), None)
        self._blamed.pop(model.name, None)
        words = worker.id, time.monotonic() - worker.started_s
        log.info("worker %d ready after %.1f s", *words, extra=facts(worker, Id.WORKER_READY))
        self._events.worker_ready(worker)
        for old in self.of(model):
            if old.leaving:
                self._end(old)

    def _ended(self, worker: Worker, failed: wire.LoadFailed | None, how: str) -> None:
        model, wanted = worker.model, worker.state is WorkerState.STOPPING
        worker.state = WorkerState.DEAD
        with self._lock:
            self._workers.pop(worker.id, None)
            self._threads.remove(threading.current_thread())
        self._events.worker_died(worker)
        if wanted:
            log.info("worker %d ended", worker.id, extra=facts(worker))
            return
        if self._lost(worker):
            return
        if failed is not None:
            self.fail(model, f"{failed.reason}; {failed.hint}" if failed.hint else failed.reason)
            return
        log.error("worker %d died (%s)", worker.id, how, extra=facts(worker, Id.WORKER_DIED))
        self._restart(worker, how)

    def _lost(self, worker: Worker) -> bool:
        """Return whether the worker's device has failed. Then start the worker elsewhere."""
        if worker.place.devices == (devices.CPU,):
            return False
        with self._arranging:
            self.places.look()
        if not self.places.failed.keys() & set(worker.place.devices):
            return False
        log.error("worker %d died with its device", worker.id, extra=facts(worker, Id.WORKER_DIED))
        self.restarts += 1
        self._begin_again(worker.model, 0.0)
        return True

    def _tell_failed(self, uuid: str) -> None:
        why = self.places.failed[uuid]
        log.error("device %s has failed: %s", uuid, why, extra=about(Id.DEVICE_FAILED, device=uuid))
        self._events.device_failed(uuid, why)

    def _restart(self, worker: Worker, how: str) -> None:
        model, place = worker.model, worker.place
        self.restarts += 1
        deaths = self._deaths[model.name, place] = self._deaths.get((model.name, place), 0) + 1
        if deaths > DEATHS_MAX:
            del self._deaths[model.name, place]
            self._condemn(model, place, deaths, how)
            return
        if not any(w.state is WorkerState.READY for w in self.of(model)):
            model.state = ModelState.LOADING
        # The first restart is immediate. Only a worker that dies repeatedly waits.
        self._begin_again(model, 0.0 if deaths == 1 else min(RESTART_S_MAX, RESTART_S_MIN * 2**deaths))

    def _condemn(self, model: Model, place: Place, deaths: int, how: str) -> None:
        """Mark the device as failed. If the model's workers died on another device too, blame the model."""
        divided = [uuid for uuid in place.devices if uuid != devices.CPU]
        before = self._blamed.pop(model.name, "")
        if before or not divided:
            self.places.failed.pop(before, None)
            self.fail(model, f"{deaths} workers died one after the other, the last one: {how}")
            return
        self._blamed[model.name] = divided[0]
        self.places.failed[divided[0]] = f"{deaths} workers of model {model.name} died on it"
        self._begin_again(model, 0.0)

    def _begin_again(self, model: Model, pause_s: float) -> None:
        while not self._stopping.wait(pause_s) and model.state is not ModelState.ABSENT:
            try:
                self.arrange()
                return
            except OSError as error:  # no process or no descriptor left
                words, extra = (model.name, error), about(model=model.name)
                log.error("a worker for model %s cannot be started yet: %s", *words, extra=extra)
                pause_s = RESTART_S_MAX


def facts(worker: Worker, id: Id | None = None) -> dict[str, object]:
    """Fields for the log."""
    return about(id, worker=worker.id, model=worker.model.name)
