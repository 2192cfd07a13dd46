"""Keep the calling process on CPUs and memory near its device. Call it before torch starts threads.

Best effort: a container or an administrator may allow less, and what is allowed wins.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Sequence

from aiosd.cores.devices import cpu_numbers

log = logging.getLogger(__name__)

SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}  # of asm/unistd.h; glibc has no function for it
MPOL_PREFERRED, MPOL_INTERLEAVE = 1, 3  # linux/mempolicy.h
BITS = 8 * ctypes.sizeof(ctypes.c_ulong)


def stay_near(cpus: str, nodes: Sequence[int]) -> None:
    """Set CPUs and memory for this thread and all threads that it starts."""
    try:
        if near := cpu_numbers(cpus) & os.sched_getaffinity(0):
            os.sched_setaffinity(0, near)
        if nodes:
            set_mempolicy(MPOL_PREFERRED if len(nodes) == 1 else MPOL_INTERLEAVE, nodes)
    except (OSError, ValueError) as error:
        log.info("the worker may run far from its device: %s", error)


def set_mempolicy(mode: int, nodes: Sequence[int]) -> None:
    """set_mempolicy(2). Raises OSError."""
    words = (ctypes.c_ulong * (max(nodes) // BITS + 1))()
    for node in nodes:
        words[node // BITS] |= 1 << node % BITS
    number = SET_MEMPOLICY.get(platform.machine())
    if number is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    # the kernel uses one bit less than this number
    if libc.syscall(number, mode, words, ctypes.c_ulong(len(words) * BITS + 1)):
        errno = ctypes.get_errno()
        raise OSError(errno, f"set_mempolicy: {os.strerror(errno)}")
