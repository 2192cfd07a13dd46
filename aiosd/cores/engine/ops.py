"""Finds and opens the compiled operations (ops.cpp, made by build.py), if this machine can use them.

The package works without them. Declares their C interface; says nothing about models.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

ABI = 6
HERE = Path(__file__).parent
NEEDS = {  # best first
    "avx512": {"avx512f", "avx512vl", "avx512dq", "avx512bw", "avx2", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
}
P, I, L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
SIGNATURES = {
    "aiosd_new": (P, [P, P, P, P, P, P, P, I, I]),
    "aiosd_free": (None, [P]),
    "aiosd_layer": (None, [P, I, L, L]),
    "aiosd_linear": (None, [P, I, I, P, P, L, L]),
    "aiosd_stored_embedding": (None, [P, I, P]),
    "aiosd_stored": (None, [P, I, I, I, P, L, L, L, L, L]),
    "aiosd_bias": (None, [P, I, I, P, L]),
    "aiosd_norm": (None, [P, I, I, P, L]),
    "aiosd_kv_floats": (L, [P]),
    "aiosd_forward": (None, [P, P, L, P, L, P, P, P, L, P, L, P, P]),
}


@cache
def library(variant: str | None = None) -> ctypes.CDLL | None:
    """The best variant, or the one asked for; None, with one line in the log, when there is none."""
    flags = cpu_flags()
    for name, needs in NEEDS.items():
        path = HERE / f"_ops_{name}.so"
        if variant in (None, name) and needs <= flags and path.exists():
            return _open(path)
    log.warning(
        "compiled operations are not usable here: the slower torch path runs "
        "(build them with `python -m aiosd.cores.engine.build`; they need a CPU with AVX2 and FMA)"
    )
    return None


def _open(path: Path) -> ctypes.CDLL | None:
    try:
        lib = ctypes.CDLL(str(path))
        found = lib.aiosd_abi()
    except (OSError, AttributeError) as error:
        log.warning("%s cannot be loaded, the slower torch path runs: %s", path, error)
        return None
    if found != ABI:
        log.warning("%s is of another version, the slower torch path runs: build it again", path)
        return None
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()  # not x86
