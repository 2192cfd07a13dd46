"""The systemd journal, where there is one: an entry with fields for each line of the audit log.

`journalctl AIOS_AGENT=ada` finds what an agent did. Any thread may tell; nothing waits for the journal.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

try:
    from systemd import journal
except ImportError:  # an optional part of the installation
    journal = None

MESSAGE_ID = "0d5b4f2c7a7e4ab0b5a1d0b2a8f3c6e1"  # of all of them: journalctl MESSAGE_ID=…


def tell(what: str, facts: Mapping[str, object]) -> None:
    """`facts`: as the audit log has them, no secrets; a field each."""
    if journal is None:
        return
    fields = {f"AIOS_{key.upper()}": text(value) for key, value in facts.items()}
    about = " ".join(f"{key}={text(facts[key])}" for key in ("tool", "agent", "request") if facts.get(key))
    with suppress(OSError):
        journal.send(
            f"{what} {about}".strip(),
            MESSAGE_ID=MESSAGE_ID,
            SYSLOG_IDENTIFIER="aiosd",
            PRIORITY="5" if what in ("denied", "allowed", "allowed always") else "6",
            AIOS_WHAT=what,
            **fields,
        )


def text(value: object) -> str:
    """A list is its words; of a caller its uid and program."""
    if isinstance(value, dict):
        return " ".join(str(part) for part in value.values())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
