"""How much room the devices have for a model: what it takes, what is free, and which models take the rest.

Estimates come from the model's files (aiosd.cores.footprint) until a worker of it was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from aiosd.cores.devices import CPU
from aiosd.cores.footprint import PROCESS_BYTES, Footprint, footprint
from aiosd.cores.models import Model
from aiosd.cores.pool import Pool, Worker, WorkerState
from aiosd.errors import NoRoom
from aiosd.host import memory
from aiosd.host.memory import Memory
from aiosd.host.sizes import size

UNKNOWN_BYTES = 1 << 40  # of a device that does not say how much it has
GPU_SHARE = 0.85  # of a GPU's memory for weights and KV; the rest is for activations
Key = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """One way to load a model."""

    device: str
    bytes: int  # that it takes
    kv_bytes: int  # of those
    free_bytes: int
    coming_bytes: int  # free when those that leave are gone
    models: dict[str, int] = field(default_factory=dict)  # that are there, with the bytes that each takes


class Rooms:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.memory: Callable[[], Memory] = memory.memory
        self._known: dict[str, tuple[Key, Footprint]] = {}
        self._took: dict[Path, int] = {}  # that a worker without KV took

    def check(self, model: Model) -> None:
        """Refuse a model that no device can hold, even without any other. Raises NoRoom."""
        candidates = self._pool.places.candidates(model)
        if not candidates or any(self._least(model, at) <= self._whole(model, at) for at in candidates):
            return
        at = candidates[-1]
        raise NoRoom(
            f"model {model.name} does not fit: {self._needs(model, at)}; {self._has(model, at)}",
            "use a smaller model, or quantised weights",
        )

    def words(self, model: Model) -> str:
        """Say why the model waits."""
        candidates = self._pool.places.candidates(model)
        if not candidates:
            return self._pool.places.why_not(model)
        return f"{self._needs(model, candidates[-1])}; {self._has(model, candidates[-1])}"

    def always(self, model: Model) -> tuple[int, int]:
        """Return the bytes, and of those the KV, of a model that is loaded even if there is no room."""
        for at in self._pool.places.candidates(model):
            fits = self._fits(model, at, Counter(), frozenset())
            best = next((fit for fit in fits if fit.free_bytes >= fit.bytes), None)
            return (best.bytes, best.kv_bytes) if best else (self._least(model, at), 0)
        return 0, 0

    def fits(self, model: Model, taken: Counter[str], going: Collection[str]) -> list[Fit]:
        """Return the ways to load the model, the best first. `taken`: bytes by device for others before it;
        `going`: models that leave."""
        found: list[Fit] = []
        for at in self._pool.places.candidates(model):
            found += self._fits(model, at, taken, going)
        return sorted(found, key=lambda fit: fit.free_bytes < fit.bytes)

    def learn(self, model: Model) -> None:
        """Remember what a worker of this model takes without KV. It replaces the estimate."""
        for worker in self._pool.ready(model):
            if worker.place.devices == (CPU,) and worker.loaded_bytes:
                took = worker.loaded_bytes + self._print(model, (CPU,)).mapped
                self._took[model.path] = max(PROCESS_BYTES, took)

    # one device

    def _fits(
        self, model: Model, at: tuple[str, ...], taken: Counter[str], going: Collection[str]
    ) -> list[Fit]:
        if at != (CPU,):
            return [self._on_gpu(model, at, taken, going)]
        there = {m.name: self._committed(m) for m in self._loaded(at)}
        free = self._free() - taken[CPU]
        coming = free + sum(there[name] for name in going if name in there)
        fixed, least, most = self._fixed(model, at), self._least(model, at), self._most(model, at)
        engine = self._pool.places.engine
        wishes = [most, least] if engine.kv_bytes else [least]
        found = []
        for bytes in wishes:
            kv = bytes - fixed
            if bytes == least and free > least:  # more than the least, as far as there is room
                left = free - fixed
                kv = min(most - fixed, max(kv, left if engine.kv_bytes else left // 2))
            found.append(Fit(CPU, bytes if free < bytes else fixed + kv, kv, free, coming, there))
        return found

    def _on_gpu(self, model: Model, at: tuple[str, ...], taken: Counter[str], going: Collection[str]) -> Fit:
        """On GPUs a worker gets a fraction of the memory, whatever it takes of that."""
        there = {m.name: int(m.fraction * self._bytes(at[0])) for m in self._loaded(at)}
        need = int(model.fraction * self._bytes(at[0]))
        used = [sum(m.fraction for m in self._loaded((uuid,))) for uuid in at]
        free = int((1 - max(used)) * self._bytes(at[0])) - max(taken[uuid] for uuid in at)
        coming = free + sum(there[name] for name in going if name in there)
        kv = self._pool.places.engine.kv_bytes or max(
            self._print(model, at).least_kv(0), self._whole(model, at) - self._print(model, at).weights
        )
        return Fit(at[0], need, kv, free + 1, coming + 1, there)  # + 1: fractions are rounded

    def _loaded(self, at: tuple[str, ...]) -> list[Model]:
        on = (w.model for w in self._pool.workers() if w.state is not WorkerState.STOPPING
              and set(at) & set(w.place.devices))  # fmt: skip
        return list(dict.fromkeys([*on, *self._between(at)]))

    def _between(self, at: tuple[str, ...]) -> list[Model]:
        """The models whose worker has died a moment ago, and whose next one has not started yet."""
        without = (model for model in self._pool.held() if not self._pool.of(model))
        return [model for model in without if at in self._pool.places.candidates(model)[:1]]

    def _free(self) -> int:
        """What is free for workers: not what those that run have not used yet of theirs."""
        owed = 0
        for worker in self._pool.workers():
            if worker.place.devices == (CPU,) and worker.state is not WorkerState.STOPPING:
                owed += max(0, worker.model.stay.bytes - self._own(worker))
        owed += sum(model.stay.bytes for model in self._between((CPU,)))
        return max(0, self.memory().free - owed)

    @staticmethod
    def _own(worker: Worker) -> int:
        return memory.resident(worker.process.pid)[0]

    def _committed(self, model: Model) -> int:
        return model.stay.bytes * max(1, len(self._pool.of(model)))

    def _whole(self, model: Model, at: tuple[str, ...]) -> int:
        """What the devices have for this model when it is alone."""
        if at == (CPU,):
            return self.memory().total
        return int(GPU_SHARE * model.fraction * sum(self._bytes(uuid) for uuid in at))

    def _bytes(self, uuid: str) -> int:
        found = self._pool.places.on([uuid])
        return (found[0].memory_bytes if found else 0) or UNKNOWN_BYTES

    def _print(self, model: Model, at: tuple[str, ...]) -> Footprint:
        engine, on_gpu = self._pool.places.engine, at != (CPU,)
        try:
            changed = model.path.stat().st_mtime_ns
        except OSError:
            changed = 0
        key = (model.path, changed, on_gpu, engine.dtype, engine.quantization)
        known = self._known.get(model.name)
        if known is None or known[0] != key:
            known = self._known[model.name] = key, footprint(model.path, engine, on_gpu)
        return known[1]

    def _fixed(self, model: Model, at: tuple[str, ...]) -> int:
        if at != (CPU,):
            return self._print(model, at).weights
        return self._took.get(model.path) or self._print(model, at).fixed

    def _least(self, model: Model, at: tuple[str, ...]) -> int:
        return self._fixed(model, at) + self._print(model, at).least_kv(self._pool.places.engine.kv_bytes)

    def _most(self, model: Model, at: tuple[str, ...]) -> int:
        engine = self._pool.places.engine
        most = self._fixed(model, at) + self._print(model, at).most_kv(engine.kv_bytes, engine.max_running)
        return max(self._least(model, at), min(most, self._whole(model, at)))

    def _needs(self, model: Model, at: tuple[str, ...]) -> str:
        fixed, least = self._fixed(model, at), self._least(model, at)
        weights = self._print(model, at).weights
        return (
            f"it needs {size(least)} ({size(weights)} of weights, {size(least - fixed)} of KV at least,"
            f" {size(max(0, fixed - weights))} for the process)"
        )

    def _has(self, model: Model, at: tuple[str, ...]) -> str:
        if at == (CPU,):
            return f"{size(self._free())} of {size(self.memory().total)} of memory are free"
        return f"{', '.join(at)} has {size(self._whole(model, at))} for it"
