"""The main messages of the log: a number each, by which the journal finds them and the catalog explains them.

`journalctl -x` shows what units/aiosd.catalog says of one; tests hold the two against each other.
"""

from __future__ import annotations

import logging
from enum import StrEnum

NOTICE = 25  # normal, and worth a look: between INFO and WARNING, as in syslog(3)
logging.addLevelName(NOTICE, "NOTICE")


class Id(StrEnum):
    STARTED = "9039d2169aad498698b045d352e20b22"
    READY = "19ce29343acd49cdabd6af8d72ea0bf2"
    STOPPING = "050f6f10d3b844c7a7dc2387bb9520f3"
    STOPPED = "87d002151a5f437e954b3a56197bb723"
    HANGS = "c36a1e831207437283893d66a40fc593"
    RELOADED = "e8a7dc80cd85468fa5b7aee4d3c08545"
    REFUSED = "fa8ec89d4e854cb592e1fcae98acef1e"
    WORKER_STARTED = "2867fd6e6cdd43fdb4d28c9d283528a4"
    WORKER_READY = "cdb1ac1555f24b49ba63c0caf6221237"
    WORKER_DIED = "6508000f40ed4c3dbf95f416385da828"
    MODEL_FAILED = "46ae08f67a1e44a28a137573e33593b4"
    DEVICE_FAILED = "3b7e0c5d1f9a4a0e8a6f2d94c1b75e30"
    DEVICE_LACKS = "c2d85e7a64b14f6f9e0b3a7d8f12c649"
    REQUEST_FAILED = "81f05a763e4f47d486ffc12aba7a8483"
    CALL_WAITS = "4572f5ec2f894b8297ffd901a8a9197f"
    DENIED = "d8ca646072bf4207b2919767206b042d"
    LIMIT = "62d308f0921d4c00ba122ee3a3ac12f6"
    AUDIT = "0d5b4f2c7a7e4ab0b5a1d0b2a8f3c6e1"  # the other lines of the audit log


def about(id: Id | None = None, **facts: object) -> dict[str, object]:
    """`extra` of a log call: `about(Id.READY, agent="ada")` → AIOS_AGENT=ada. What is empty is left out."""
    named = {f"AIOS_{name.upper()}": value for name, value in facts.items() if value not in ("", None)}
    return named if id is None else {"MESSAGE_ID": id.value, **named}
