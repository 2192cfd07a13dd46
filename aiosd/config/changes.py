"""Name the keys that a reload changes, and when each change takes effect. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from aiosd.config.config import Config

# All other keys take effect at once, except those of BY_NEW_WORKERS.
AT_RESTART = {
    "daemon.mount",
    "daemon.state",
    "daemon.group",
    "daemon.admin_group",
}
BY_NEW_WORKERS = {
    "engine.kv_bytes", "engine.prefill_tokens", "engine.threads", "engine.deterministic",
    "engine.quantization", "engine.dtype",
}  # fmt: skip


def changed(old: Config, new: Config) -> list[str]:
    """Return the changed keys: `limits.keep_requests`, `models.qwen`, `quota.user.ada`, …"""
    before, now = flat(old), flat(new)
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def flat(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in fields(config):
        section = getattr(config, field.name)
        if is_dataclass(section):
            found |= {f"{field.name}.{f.name}": getattr(section, f.name) for f in fields(section)}
        elif field.name == "quotas":
            found |= {f"quota.{kind}.{name}": dict(table) for (kind, name), table in section.items()}
        elif isinstance(section, Mapping):
            found |= {f"{field.name}.{name}": value for name, value in section.items()}
    return found


def story(old: Config, new: Config) -> str:
    """Describe the changed keys for the log: those in effect now, for new workers, and after a restart."""
    keys = changed(old, new)
    if not keys:
        return "no key changed; policies, rules and tools were read again"
    parts = [
        ("", [key for key in keys if key not in AT_RESTART | BY_NEW_WORKERS]),
        ("for workers that start from now on: ", [key for key in keys if key in BY_NEW_WORKERS]),
        ("after a restart of the daemon: ", [key for key in keys if key in AT_RESTART]),
    ]
    return "; ".join(word + ", ".join(some) for word, some in parts if some)
