"""SIGHUP: the running daemon takes over a good configuration whole. A bad one changes nothing."""

from __future__ import annotations

from pathlib import Path

from aiosd.access.rules import Rules
from aiosd.config.config import Config
from aiosd.cores import devices
from aiosd.host import mount
from aiosd.kernel import Kernel
from aiosd.policies import Policy
from aiosd.scheduler import chooser
from aiosd.tools import catalog
from aiosd.tools.manifest import Manifest


def reload(kernel: Kernel, config: Config) -> None:
    """Take over all keys that can change while running. Check everything first: if this raises, nothing has
    changed.

    Raises BadValue, ConfigError, ModelError.
    """
    policies, rules, manifests = judge(config)
    kernel.models.judge(kernel.config, config)
    kernel.pool.places.look()
    for entry in kernel.models.changed(kernel.config, config).values():
        if entry.devices:
            devices.parse_pin(kernel.pool.places.table, entry.devices)
    # From here on nothing raises.
    old, kernel.config = kernel.config, config
    limits(kernel, config)
    with kernel.permissions.making:
        kernel.calls.reload(config, manifests)
        kernel.tool_objects.oust()
    kernel.approvals.rules = rules
    kernel.approvals.configure(config)
    kernel.questions.configure(config)
    kernel.tool_objects.cancel_gone()
    kernel.chooser.take(policies)
    if old.scheduler.policy != config.scheduler.policy:
        kernel.chooser.switch(config.scheduler.policy)
    if old.scheduler.quantum != config.scheduler.quantum:
        kernel.scheduler.quantum_tokens = config.scheduler.quantum
    models(kernel, old, config)
    kernel.admission.fail_barred()
    kernel.scheduler.stir()


def judge(config: Config) -> tuple[dict[str, Policy], Rules, list[Manifest]]:
    """Read the files that the configuration names. Raises BadValue, ConfigError."""
    mount.check_place(Path(config.daemon.mount))
    folder = Path(config.scheduler.policies)
    policies = chooser.judge(config.scheduler.policy, folder)
    rules = Rules(folder / "access")
    return policies, rules, catalog.read_all(Path(config.tools.folder), config.tools.network, strict=True)


def limits(kernel: Kernel, config: Config) -> None:
    engine, bounds = config.engine, config.limits
    kernel.pool.places.engine = engine
    kernel.scheduler.max_running = engine.max_running
    kernel.residency.swap.resize(engine.host_kv_bytes, engine.disk_kv_bytes, bounds.disk_reserve_bytes)
    kernel.limits.reload(config)
    kernel.saving.keep = bounds.keep_requests
    kernel.audit.limits = bounds
    kernel.delivery.deaths_max = bounds.worker_deaths_per_request
    kernel.contexts.bytes_max = bounds.context_bytes


def models(kernel: Kernel, old: Config, config: Config) -> None:
    for model, entry in kernel.models.reload(old, config):
        moved, model.path = model.path != Path(entry.path), Path(entry.path)
        kernel.models.take(model, entry)
        kernel.demand.changed(model, moved)  # if it is moved, its requests continue on the new one
    kernel.model_objects.adopt()
    kernel.model_objects.let_go()
    kernel.pool.places.retry()
    kernel.pool.arrange()
    kernel.scheduler.wanting.set()  # keep_alive may be shorter now
