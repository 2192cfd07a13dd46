"""Secrets that manifests name: of the service manager (systemd.exec(5)), else of the configured folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from aiosd.errors import NotFound
from aiosd.host.beneath import open_owned

log = logging.getLogger(__name__)

MOST_BYTES = 64 << 10  # of each


def read(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Raises NotFound; the log alone says why."""
    given = os.environ.get("CREDENTIALS_DIRECTORY")
    found = {}
    for name in names:
        place = Path(given) if given and Path(given, name).exists() else folder
        try:
            with os.fdopen(open_owned(place, name), "rb") as file:
                if os.fstat(file.fileno()).st_mode & 0o077:
                    raise ValueError(f"{place / name} may be read by others; chmod 600 it")
                found[name] = file.read(MOST_BYTES)
        except (OSError, ValueError) as error:
            log.error("credential %s: %s", name, error)
            raise NotFound(
                f"its credential {name} cannot be used; the log says why", f"see {folder}"
            ) from None
    return found
