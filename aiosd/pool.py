"""The worker processes: started, listened to, restarted. Mechanism only: who runs where is the scheduler's.

One listening thread a worker calls `events` (the scheduler). Submit and Remove are sent by the scheduler's
thread alone, so a worker sees them in the order they were decided.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from aiosd import wire
from aiosd.config import EngineConfig
from aiosd.errors import WireError
from aiosd.launch import Launcher, Process
from aiosd.messages import Id, about
from aiosd.models import Model, ModelState

log = logging.getLogger(__name__)

RESTART_S_MIN, RESTART_S_MAX = 0.5, 30.0
DEATHS_MAX = 6  # in a row, none of them ready in between
STOP_S = 3.0
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
    channel: wire.Channel | None = None  # None: it is being started
    state: WorkerState = WorkerState.LOADING
    started_s: float = field(default_factory=time.monotonic)
    stats: dict[str, int] = field(default_factory=dict)


class Events(Protocol):
    def worker_ready(self, worker: Worker) -> None: ...
    def worker_said(self, worker: Worker, message: wire.Message) -> None: ...
    def worker_died(self, worker: Worker) -> None: ...
    def model_failed(self, model: Model) -> None: ...


class Pool:
    def __init__(self, engine: EngineConfig, events: Events, launch: Launcher) -> None:
        self.engine = engine
        self._events, self._launch = events, launch
        self._lock = threading.Lock()
        self._workers: dict[int, Worker] = {}
        self._threads: list[threading.Thread] = []
        self._deaths: dict[str, int] = {}  # by model, since one was last ready
        self._stopping = threading.Event()
        self.restarts = 0

    def workers(self) -> list[Worker]:
        return list(self._workers.values())

    def of(self, model: Model) -> list[Worker]:
        """Those that serve a model, or are about to."""
        return [w for w in self.workers() if w.model is model and w.state is not WorkerState.STOPPING]

    def ready(self, model: Model) -> list[Worker]:
        return [w for w in self.of(model) if w.state is WorkerState.READY]

    def load(self, model: Model) -> None:
        """Starts the workers a model lacks; returns at once, the model's state tells the rest."""
        if model.state is not ModelState.READY:
            model.state, model.error = ModelState.LOADING, ""
        for _ in range(model.replicas - len(self.of(model))):
            self._start(model)

    def unload(self, model: Model) -> None:
        """Ends a model's workers; what ran on them waits again."""
        model.state = ModelState.ABSENT
        for worker in self.of(model):
            self._end(worker)

    def resize(self, model: Model, replicas: int) -> None:
        model.replicas = replicas
        for worker in self.of(model)[replicas:]:
            self._end(worker)
        self.load(model)

    def find(self, id: int | None) -> Worker | None:
        return self._workers.get(-1 if id is None else id)

    def send(self, worker: Worker, message: wire.Message, file: int | None = None) -> None:
        with suppress(OSError):  # it died; its listener is about to tell
            if worker.channel:
                worker.channel.send(message, file)

    def stop(self) -> None:
        self._stopping.set()
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

    def _start(self, model: Model) -> None:
        with self._lock:
            id = next(n for n in range(len(self._workers) + 1) if n not in self._workers)
            worker = self._workers[id] = Worker(id, model, self._launch(id, ENVIRONMENT))
        thread = threading.Thread(target=self._listen, args=(worker,), name=f"worker-{id}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _order(self, model: Model) -> wire.Load:
        e = self.engine
        return wire.Load(
            path=str(model.path),
            device=e.device,
            dtype=e.dtype,
            kv_bytes=e.kv_bytes,
            max_running=e.max_running,
            prefill_tokens=e.prefill_tokens,
            threads=e.threads,
            deterministic=e.deterministic,
            quantization=e.quantization,
        )

    def _listen(self, worker: Worker) -> None:
        failed: wire.LoadFailed | None = None
        try:
            worker.channel = worker.process.connect()
            words = worker.id, worker.model.name, worker.process.pid
            log.info(
                "worker %d started for model %s (pid %d)", *words, extra=facts(worker, Id.WORKER_STARTED)
            )
            self.send(worker, self._order(worker.model))
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
            log.error("worker %d: %s", worker.id, error, extra=facts(worker))
        worker.process.kill()
        how = worker.process.wait()
        worker.process.close()
        if worker.channel:
            worker.channel.close()
        self._ended(worker, failed, how)

    def _ready(self, worker: Worker, message: wire.Ready) -> None:
        model = worker.model
        if worker.state is WorkerState.STOPPING:  # unloaded while it loaded
            return
        worker.state = WorkerState.READY
        model.info, model.state, model.error = message.info, ModelState.READY, ""
        self._deaths[model.name] = 0
        words = worker.id, time.monotonic() - worker.started_s
        log.info("worker %d ready after %.1f s", *words, extra=facts(worker, Id.WORKER_READY))
        self._events.worker_ready(worker)

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
        if failed is not None:
            self._failed(model, f"{failed.reason}; {failed.hint}" if failed.hint else failed.reason)
            return
        log.error("worker %d died (%s)", worker.id, how, extra=facts(worker, Id.WORKER_DIED))
        self._restart(model)

    def _failed(self, model: Model, why: str) -> None:
        model.state, model.error = ModelState.FAILED, why
        extra = about(Id.MODEL_FAILED, model=model.name)
        log.error("model %s cannot be loaded: %s", model.name, why, extra=extra)
        self._events.model_failed(model)

    def _restart(self, model: Model) -> None:
        self.restarts += 1
        deaths = self._deaths[model.name] = self._deaths.get(model.name, 0) + 1
        if deaths > DEATHS_MAX:
            self._failed(model, f"{deaths} workers died one after the other; the journal may say why")
            return
        if not any(w.state is WorkerState.READY for w in self.of(model)):
            model.state = ModelState.LOADING
        # the first restart is at once: only a worker that dies again and again is made to wait
        pause_s = 0.0 if deaths == 1 else min(RESTART_S_MAX, RESTART_S_MIN * 2**deaths)
        while not self._stopping.wait(pause_s) and model.state is not ModelState.ABSENT:
            try:
                self.load(model)
                return
            except OSError as error:  # no process or no descriptor to be had
                words, extra = (model.name, error), about(model=model.name)
                log.error("a worker for model %s cannot be started yet: %s", *words, extra=extra)
                pause_s = RESTART_S_MAX


def facts(worker: Worker, id: Id | None = None) -> dict[str, object]:
    """For the log."""
    return about(id, worker=worker.id, model=worker.model.name)
