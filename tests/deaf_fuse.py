"""A file system of a hostile user: it takes every request of the kernel, and answers none but the first."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aiosd.host import mount

INIT = 26
IN_HEADER = struct.Struct("=IIQQIIII")  # struct fuse_in_header of <linux/fuse.h>
OUT_HEADER = struct.Struct("=IiQ")
INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
MAJOR, MINOR, BUFFER = 7, 31, 1 << 17


@contextmanager
def deaf(folder: Path) -> Iterator[None]:
    """It is mounted there. At the end its connection is gone, and with it who waits for an answer."""
    fuse = mount.open_fuse(folder, shared=True)
    threading.Thread(target=_take, args=(fuse,), daemon=True).start()
    try:
        yield
    finally:
        mount.unmount(folder)
        os.close(fuse)


def _take(fuse: int) -> None:
    with suppress(OSError):
        while request := os.read(fuse, BUFFER):
            _, operation, number, *_ = IN_HEADER.unpack_from(request)
            if operation == INIT:
                said = INIT_OUT.pack(MAJOR, MINOR, 0, 0, 16, 12, 4096, 1, 0, 0, 0)
                os.write(fuse, OUT_HEADER.pack(OUT_HEADER.size + len(said), 0, number) + said)
