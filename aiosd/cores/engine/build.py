"""Compile ops.cpp into this package: `python -m aiosd.cores.engine.build [FOLDER]`. Needs g++ 10 or newer.

One shared object for each instruction set; ops.py loads the best that the CPU has. Their results are
equal bit by bit. They link with the C and C++ libraries only: not with Python, not with torch.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

from aiosd.errors import AiosError

HERE = Path(__file__).parent
VARIANTS = {"avx512": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw"], "avx2": []}
# Contraction of a * b + c would be the compiler's choice: every fused multiply-add is written out.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-mavx2",
    "-mfma",
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
    """The objects made. Each replaces its predecessor at once: a running worker keeps the old one."""
    if platform.machine() != "x86_64":
        raise AiosError(f"no fused operations for {platform.machine()}", "the torch path runs everywhere")
    made = []
    for name, flags in variants.items():
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
                f"{compiler} failed with status {error.returncode}", "its messages are above"
            ) from None
        new.replace(target)
        made.append(target)
    return made


if __name__ == "__main__":
    try:
        for path in build(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE):
            print(path)
    except AiosError as error:
        sys.exit(f"aiosd.cores.engine.build: {error.explanation}")
