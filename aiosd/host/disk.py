"""What an errno of the disk means to a person: whether it is full, or what else is wrong, and the remedy."""

from __future__ import annotations

import errno
from pathlib import Path

from aiosd.errors import StoreFailed, StoreFull

FULL = (errno.ENOSPC, errno.EDQUOT)
REMEDIES = {
    errno.EIO: "the disk is failing: dmesg says more",
    errno.EROFS: "mount it writable; dmesg says why it is not",
    errno.EACCES: "look at its owner and modes",
    errno.EPERM: "look at its owner and modes",
    errno.EMFILE: "raise LimitNOFILE of the service",
    errno.EXDEV: "unmount it",
    errno.ENFILE: "raise fs.file-max",
}
LOOK = "look at the folder and its disk"


def failed(at: Path, error: OSError) -> StoreFailed:
    """To be raised."""
    if error.errno in FULL:
        return StoreFull(f"{at}: {error.strerror}", "free some space there")
    return StoreFailed(f"{at}: {error.strerror}", REMEDIES.get(error.errno or 0, LOOK))
