"""Compile ops.cpp into this package: `python -m aiosd.cores.engine.build [FOLDER]`. Needs g++ 10 or newer.

Makes one shared object for each instruction set. ops.py loads the best one that the CPU supports. All give
the same bits. They link with the C and C++ libraries only, not with Python or torch.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from aiosd.errors import AiosError

HERE = Path(__file__).parent
VARIANTS = {"avx512": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw"], "avx2": []}
# The code writes out every fused multiply-add. -ffp-contract=off stops the compiler from making others.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-mavx2",
    "-mfma",
    "-mf16c",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fvisibility=default",
    "-Wall",
    "-Wextra",
    "-s",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]  # g++ 12 finds these in its own immintrin.h


def build(folder: Path = HERE, variants: dict[str, list[str]] = VARIANTS) -> list[Path]:
    """Compile and return the paths. Each new file replaces the old one atomically, so a running worker keeps
    the old code. Raises AiosError."""
    if platform.machine() != "x86_64":
        raise AiosError(f"no fused operations for {platform.machine()}", "do without: the torch path is used")
    with ThreadPoolExecutor() as pool:
        return list(pool.map(partial(_compiled, folder), variants, variants.values()))


def _compiled(folder: Path, name: str, flags: list[str]) -> Path:
    target = folder / f"_ops_{name}.so"
    new = target.with_suffix(".new")
    compiler = os.environ.get("CXX", "g++")
    try:
        subprocess.run([compiler, *FLAGS, *flags, str(HERE / "ops.cpp"), "-o", str(new)], check=True)
    except FileNotFoundError:
        raise AiosError(
            f"{compiler}: not found", "apt install g++, or do without: the torch path is used"
        ) from None
    except subprocess.CalledProcessError as error:
        raise AiosError(
            f"{compiler} failed with status {error.returncode}", "see the compiler's messages above"
        ) from None
    return new.replace(target)


if __name__ == "__main__":
    try:
        for path in build(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE):
            print(path)
    except AiosError as error:
        sys.exit(f"aiosd.cores.engine.build: {error.explanation}")
