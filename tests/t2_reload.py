"""A reload reaches every part that holds something of the configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aiosd.config.changes import AT_RESTART, BY_NEW_WORKERS, flat, story
from aiosd.config.config import Config, load
from aiosd.cores.models import ModelState
from aiosd.errors import AiosError
from aiosd.kernel import Kernel
from aiosd.reload import reload

MakeKernel = Callable[..., Kernel]


def changed(kernel: Kernel, file: Path, text: str) -> str:
    file.write_text(text)
    old, new = kernel.config, load(file)
    reload(kernel, new)
    return story(old, new)


@pytest.mark.parametrize(
    ("key", "value", "get"),
    [
        ("limits.context_bytes", 5, lambda k: k.contexts.bytes_max),
        ("limits.request_bytes", 5, lambda k: k.config.limits.request_bytes),
        ("limits.disk_reserve_bytes", 5, lambda k: k.residency.swap._reserve_bytes),
        ("engine.host_kv_bytes", 5, lambda k: k.residency.swap.host_bytes),
        ("engine.disk_kv_bytes", 5, lambda k: k.residency.swap.disk_bytes),
        ("engine.threads", 5, lambda k: k.pool.places.engine.threads),
        ("scheduler.quantum", 5, lambda k: k.scheduler.quantum_tokens),
        ("tools.pending_s", 5, lambda k: k.approvals.pending_s),
        ("tools.output_bytes", 5, lambda k: k.sessions.output_bytes),
        ("tools.work_bytes", 5, lambda k: k.sessions.work_bytes),
        ("daemon.drain_s", 7, lambda k: k.config.daemon.drain_s),
    ],
)
def test_a_key_that_applies_at_once_does(
    make_kernel: MakeKernel, tmp_path: Path, key: str, value: int, get: Callable[[Kernel], Any]
) -> None:
    kernel = make_kernel()
    section, _, name = key.partition(".")
    assert get(kernel) != value
    said = changed(kernel, tmp_path / "new.toml", f"[{section}]\n{name} = {value}\n")
    assert get(kernel) == value
    assert key in said
    assert ("workers started from now on: " + key in said) == (key in BY_NEW_WORKERS)


def test_the_keys_that_wait_exist() -> None:
    assert flat(Config()).keys() >= AT_RESTART | BY_NEW_WORKERS


def test_models_come_change_and_go(make_kernel: MakeKernel, tmp_path: Path, random_llama: Path) -> None:
    kernel, file = make_kernel(), tmp_path / "new.toml"
    entry = f"[models.second]\npath = '{random_llama}'\n"
    changed(kernel, file, entry)
    second = kernel.models.get("second")
    assert second.state is ModelState.LOADING
    assert len(kernel.pool.of(second)) == 1
    assert changed(kernel, file, entry + "replicas = 2\n") == "models.second"
    assert len(kernel.pool.of(second)) == 2
    kernel.pool.resize(second, 1)
    changed(kernel, file, entry + "replicas = 2\n[limits]\nkeep_requests = 3\n")
    assert second.replicas == 1, "what was changed by ctl stays while its entry does"
    with pytest.raises(AiosError, match="no such folder"):
        changed(kernel, file, "[models.second]\npath = '/nonexistent'\n")
    assert second.path == random_llama
    changed(kernel, file, "")
    kernel.model_objects.remove("second")
    assert not kernel.models.find("second")
