"""C libraries by their soname, as a program that was linked with them finds them.

ctypes.util.find_library() asks the cache of ldconfig(8), and then a compiler. Where a library has just been
installed, that cache may not be made yet.
"""

from __future__ import annotations

import ctypes.util
from collections.abc import Iterator
from contextlib import contextmanager

SONAMES = {"fuse": "libfuse.so.2", "seccomp": "libseccomp.so.2", "c": None}  # None: the process's own
PACKAGES = {"fuse": "libfuse2 (libfuse2t64 since Debian 13)", "seccomp": "libseccomp2"}


@contextmanager
def needed(name: str) -> Iterator[None]:
    """What is imported inside loads this library by find_library(). Raises ImportError with the remedy."""
    find = ctypes.util.find_library
    ctypes.util.find_library = lambda name: SONAMES[name] if name in SONAMES else find(name)
    try:
        yield
    except OSError as error:
        raise ImportError(f"{error}; apt install {PACKAGES[name]}") from None
    finally:
        ctypes.util.find_library = find
