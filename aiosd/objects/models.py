"""Models: mkdir, rmdir, and the commands of models/NAME/ctl."""

from __future__ import annotations

import logging
from pathlib import Path

from aiosd.access.caller import Caller
from aiosd.config import duration
from aiosd.cores import devices
from aiosd.cores.models import Model, Models
from aiosd.cores.pool import Pool
from aiosd.errors import BadValue, Denied, Exists, NotEmpty
from aiosd.host import identity
from aiosd.objects.making import Making, administers
from aiosd.objects.pulls import PullObjects
from aiosd.scheduler.demand import Demand
from aiosd.syscall.number import whole

log = logging.getLogger(__name__)

COMMANDS = "load [PATH], unload, pull [SOURCE], cancel, copy MODEL, keep_alive TIME, replicas N, pin DEVICE…"
REPLICAS_MAX = 64


class ModelObjects:
    def __init__(
        self,
        making: Making,
        models: Models,
        pool: Pool,
        demand: Demand,
        pulls: PullObjects,
        admins: int | None,
    ) -> None:
        """`admins`: the group that administers models as root does."""
        self._making, self._models, self._pool, self._admins = making, models, pool, admins
        self._demand, self._pulls = demand, pulls

    # making and ending

    def add(self, name: str, caller: Caller, mode: int = 0o700) -> None:
        """A model that an administrator adds is root's, and for all users."""
        with self._making.lock:
            if self._models.find(name):
                raise Exists(f"model {name} exists")
            root = Caller(identity.uid(), identity.gid(), caller.pid)
            owner, mode = (root, 0o755) if administers(caller, self._admins) else (caller, mode)
            with self._making.permissions.made(f"/models/{name}", owner, mode):
                self._models.add(name)

    def remove(self, name: str) -> None:
        model = self._models.get(name)
        if model.configured:
            if self._models.is_built_in(name):
                remedy = "it goes when aiosd.toml(5) has a section [models.NAME]"
                raise NotEmpty(f"model {name} is built in and served where no other is configured", remedy)
            raise NotEmpty(f"model {name} is in the configuration", "remove it there, reload, then rmdir")
        self._pulls.check_unused(name)
        model.leaving = True  # from here on no request is admitted for it
        self._pulls.cancel(model)
        self._demand.unload(model)
        with self._making.lock:
            self._pulls.remove(name)  # first: on a full disk there is room for the rest only after it
        self._making.cancel(lambda request: request.spec.target == name, f"model {name} was removed")
        with self._making.lock:
            self._models.remove(name)
            self._making.permissions.forget(f"/models/{name}")

    def let_go(self) -> None:
        """Remove the models that left the configuration and have no requests any more."""
        for model in [model for model in self._models.all() if model.leaving]:
            if not self._making.used(model.name):
                self.remove(model.name)
                log.info("model %s, which left the configuration, is gone", model.name)

    def adopt(self) -> None:
        """The configuration has taken the names of added models: it decides about their folders from now on,
        and the users who added them do not own them any more."""
        for name in self._models.taken():
            at = self._making.permissions.get(f"/models/{name}")
            if at and at.uid not in (0, identity.uid()):
                self._making.permissions.forget(f"/models/{name}")
            self._models.forget_path(name)
            log.warning("model %s was added by aiosctl and is in the configuration now, which decides", name)

    # commands

    def command(self, model: Model, caller: Caller, verb: str, argument: str) -> None:
        """Obey one line of ctl."""
        if verb == "load":
            self.load(model, argument)
        elif verb == "unload" and not argument:
            self._demand.unload(model)
        elif verb == "keep_alive":
            self.keep_alive(model, caller, argument)
        elif verb == "replicas":
            self._pool.resize(model, whole(argument, 1, REPLICAS_MAX, "replicas"))
        elif verb == "pin":
            self.pin(model, argument)
        elif verb == "pull":
            self._pulls.pull(model, caller, argument)
        elif verb == "cancel" and not argument:
            self._pulls.cancel(model)
        elif verb == "copy":
            self._pulls.copy(model, caller, argument)
        else:
            raise BadValue(f"no command {f'{verb} {argument}'.strip()[:40]!r}", COMMANDS)

    def load(self, model: Model, path: str) -> None:
        if path and (model.configured or model.leaving):
            if Path(path) != model.path:
                raise BadValue(
                    f"model {model.name} is in the configuration, which says where its folder is",
                    "change path there and reload, or add the folder under another name",
                )
        elif path:
            self._pulls.check_idle(model)
            self._models.set_path(model, Path(path))
            self._pulls.remove(model.name)
            self._demand.unload(model)  # its running requests continue on the new one
        if not model.path.name:
            raise BadValue(f"model {model.name} has no files yet", "load PATH, or pull SOURCE")
        if not self._pool.holds(model):
            self._demand.load(model)

    def keep_alive(self, model: Model, caller: Caller, text: str) -> None:
        """Raises BadValue, Denied."""
        if duration.seconds(text) == duration.ALWAYS and not administers(caller, self._admins):
            raise Denied("only an administrator keeps a model for always", "name a time: keep_alive 1h")
        self._demand.keep_alive(model, text)

    def pin(self, model: Model, argument: str) -> None:
        """Put a worker on each of these devices (aiosd.cores.devices.parse_pin). `auto`: the daemon chooses.

        Raises BadValue.
        """
        pool, words = self._pool, argument.split()
        pins: tuple[str, ...] = ()
        if words != ["auto"]:
            pool.places.look()
            named = devices.parse_pin(pool.places.table, words)
            pool.places.retry(uuid for pin in named for uuid in pin)
            pins = tuple(",".join(pin) for pin in named)
            if gone := pool.places.failed.keys() & {uuid for pin in named for uuid in pin}:
                raise BadValue(
                    f"{min(gone)}: {pool.places.failed[min(gone)]}", "choose another; cat devices lists all"
                )
        pool.judge(model, pins, len(pins) or model.replicas)
        self._models.set_pins(model, pins)
        if pool.holds(model):
            pool.load(model)
