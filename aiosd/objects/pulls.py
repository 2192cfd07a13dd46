"""Pulled models: who may pull, what it may take, and what becomes of a model when its pull ends.

The commands pull, cancel and copy of models/NAME/ctl. Implements aiosd.modelstore.pulls.PullEvents, on the
threads of the pulls.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from aiosd.access.caller import Caller
from aiosd.access.rules import user_name
from aiosd.cores.models import Model, Models, ModelState
from aiosd.errors import BadValue, Busy, Denied, NotEmpty, OverQuota, StoreFull
from aiosd.host import identity
from aiosd.host.message_ids import about
from aiosd.host.readable import Reader
from aiosd.modelstore.pulls import Pulls
from aiosd.modelstore.source import alternatives
from aiosd.modelstore.store import ModelManifest
from aiosd.objects.making import Making, administers
from aiosd.scheduler.demand import Demand

log = logging.getLogger(__name__)


class PullObjects:
    def __init__(
        self, making: Making, models: Models, demand: Demand, pulls: Pulls, admins: int | None
    ) -> None:
        self._making, self._models, self._demand, self._admins = making, models, demand, admins
        self._pulls, self._store = pulls, pulls.store
        pulls.report_to(self)

    def start(self) -> None:
        """Go on with the pulls that the last daemon did not end."""
        for manifest in self._store.pulls():
            model = self._models.find(manifest.name)
            if model is None or model.configured:
                self._store.remove(manifest.name)
            elif manifest.error:
                self._fail(model, manifest.error)
            else:
                self._start(manifest)

    def _start(self, manifest: ModelManifest) -> None:
        self._pulls.start(manifest, trusted=manifest.uid == identity.uid())

    # commands

    def pull(self, model: Model, caller: Caller, source: str) -> None:
        """Without a source: go on with the last one, or look whether it has something newer."""
        if model.configured or model.leaving:
            raise BadValue(
                f"model {model.name} is in the configuration, which says where its files are",
                "pull under another name",
            )
        known = self._store.find_pull(model.name) or self._store.find(model.name)
        source = source or (known.source if known else "")
        if not source:
            raise BadValue("pull what?", "pull SOURCE; see aios-model(7)")
        trusted = administers(caller, self._admins)
        if all(one.is_local for one in alternatives(source)) and not trusted:
            raise Denied("only root and aios-admin pull files of this machine", "pull hf: or pypi:")
        uid = identity.uid() if trusted else caller.uid
        self._start(ModelManifest(model.name, source, uid, time.time()))

    def cancel(self, model: Model) -> None:
        self._pulls.cancel(model.name)

    def copy(self, model: Model, caller: Caller, name: str) -> None:
        """Give the files of another model this name too."""
        self.check_idle(model)
        if model.configured or model.path != Path():
            raise BadValue(f"model {model.name} has files already", "copy to a new name")
        whole = self._store.find(self._models.get(name).name)
        if whole is None:
            raise BadValue(f"model {name} was not pulled", "aiosctl model add PATH serves its folder again")
        owner = self._making.permissions.get(f"/models/{name}")
        if not administers(caller, self._admins) and (owner is None or owner.uid != caller.uid):
            raise Denied(f"model {name} is not yours to copy", "ask its owner, or pull it again")
        size = sum(file.size for file in whole.files if not file.place)
        uid = identity.uid() if administers(caller, self._admins) else caller.uid
        files = [replace(file) for file in whole.files]
        if any(file.place for file in files):
            files = [replace(file, name=f"{model.name}.gguf") for file in files]
        manifest = replace(whole, name=model.name, uid=uid, began_s=time.time(), files=files)
        self.check_size(manifest, size, 0)
        self._store.begin(manifest)  # so that it counts as a model of the store from now on
        self.pulled(manifest)

    def check_idle(self, model: Model) -> None:
        if self._pulls.runs(model.name):
            raise Busy(f"a pull of {model.name} runs", "wait for it, or echo cancel > its ctl")

    def check_unused(self, name: str) -> None:
        """Raise NotEmpty if the configuration serves the files of this model under another name."""
        for model in self._models.all():
            if model.configured and self._store.holds(model.path, name):
                why = f"the configuration serves the files of {name} as {model.name}"
                raise NotEmpty(why, f"remove [models.{model.name}] there, reload, then rmdir")

    def remove(self, name: str) -> None:
        self._store.remove(name)

    def facts(self, name: str) -> dict[str, Any]:
        """What info.json says of a pulled model."""
        manifest, model = self._store.find(name) or self._store.find_pull(name), self._models.find(name)
        if manifest is None or (model and model.configured and not self._store.holds(model.path, name)):
            return {}
        files = [{"name": f.name, "size": f.size, "sha256": f.digest} for f in manifest.files]
        facts = {"source": manifest.source, "from": manifest.used, "revision": manifest.revision,
                 "licence": manifest.licence, "size_bytes": manifest.size, "pulled_s": manifest.pulled_s,
                 "pulled_by": user_name(manifest.uid)}  # fmt: skip
        return {**manifest.facts, **{key: value for key, value in facts.items() if value}, "files": files}

    # events of the pulls

    def pulling(self, name: str, words: str) -> None:
        if model := self._models.find(name):
            if model.pulling is None:
                self._emit(model, "pulling")
            model.pulling = words

    def check_size(self, manifest: ModelManifest, size: int, missing: int) -> None:
        limits = self._making.limits
        try:
            limits.check_disk(missing)
        except StoreFull:
            free = self._store.free_bytes
            words = f"{missing} bytes are still to come, and the disk of {self._store.folder} has {free} free"
            raise StoreFull(words, "free some space there, then pull again: it goes on") from None
        at = self._making.permissions.get(f"/models/{manifest.name}")
        if at is None or at.uid == identity.uid():
            return
        most = limits.quotas.of(Caller(at.uid, at.gid, 0, Reader.of(at.uid).groups)).model_bytes
        names = {model.name for model in self._models.all() if self._owner(model.name) == at.uid}
        used = sum(self._store.size(name) for name in names if name != manifest.name)
        if used + size > most:
            words = f"{manifest.name} takes {size} bytes, and your models have {used} of your {most}"
            raise OverQuota(words, "remove one of your models, or choose a smaller quantisation")

    def _owner(self, name: str) -> int | None:
        at = self._making.permissions.get(f"/models/{name}")
        return at.uid if at else None

    def pulled(self, manifest: ModelManifest) -> None:
        with self._making.lock:
            model = self._models.find(manifest.name)
            if model is None:
                return
            before = self._store.find(manifest.name)
            self._store.commit(manifest)
            self._models.set_pulled(model, self._store.path(manifest))
        words = manifest.name, manifest.used, manifest.size / 1e6
        log.info("model %s was pulled from %s (%.0f MB)", *words, extra=about(model=manifest.name))
        model.pulling, model.error = None, ""
        self._emit(model, "pulled")
        if model.state is ModelState.READY and before and before.files == manifest.files:
            return
        self._demand.changed(model, moved=True)  # its running requests go on with the new files

    def failed(self, manifest: ModelManifest) -> None:
        model = self._models.find(manifest.name)
        if model is None:
            return
        log.warning("pull of model %s: %s", manifest.name, manifest.error, extra=about(model=manifest.name))
        self._fail(model, manifest.error)
        self._emit(model, "failed")

    def _fail(self, model: Model, why: str) -> None:
        model.error = why
        if model.path == Path():  # else it still serves what it had before
            model.state = ModelState.FAILED
        model.pulling = None

    def _emit(self, model: Model, state: str) -> None:
        path = f"/models/{model.name}"
        self._making.events.emit("model", path, self._owner(model.name) or 0, model=model.name, state=state)
