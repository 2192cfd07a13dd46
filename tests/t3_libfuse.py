"""The binding to libfuse on threads that libfuse, not Python, has made."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections.abc import Callable

import psutil
import pytest

from aiosd.fs.libfuse import keep_thread, thread_atexit
from tests.running import REPOSITORY

BODY = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
libc = ctypes.CDLL(None)


def run_threads(number: int, body: Callable[[object], None]) -> None:
    """Run threads one after the other, started by C."""
    start = BODY(body)
    for _ in range(number):
        thread = ctypes.c_ulong()
        assert libc.pthread_create(ctypes.byref(thread), None, start, None) == 0
        assert libc.pthread_join(thread, None) == 0


def test_pythons_state_of_a_thread_lasts_as_long_as_the_thread() -> None:
    local, told = threading.local(), list[str]()

    class Leaving:
        def __del__(self) -> None:
            told.append("gone")

    def later(_: object) -> None:
        told.append("kept" if hasattr(local, "value") else "lost")

    later_c = BODY(later)

    def body(_: object) -> None:
        keep_thread()
        local.value = Leaving()
        thread_atexit(later_c, None, later_c)  # another call of the same thread

    run_threads(1, body)
    assert told == ["kept", "gone"]


def test_thousands_of_threads_leave_nothing() -> None:
    def body(_: object) -> None:
        keep_thread()

    run_threads(100, body)
    before = psutil.Process().memory_info().rss
    run_threads(5000, body)
    assert psutil.Process().memory_info().rss - before < 5_000_000  # each would leave 17 kB


@pytest.mark.root
def test_the_libraries_are_found_on_a_machine_that_has_just_installed_them() -> None:
    """Before the trigger of ldconfig has run, and without a compiler to ask."""
    script = 'mount --bind /dev/null /etc/ld.so.cache && exec env PATH=/nonexistent "$0" -c "$1"'
    modules = "import aiosd.fs.libfuse, aiosd.tools.run.sandbox, aiosd.privilege.helper"
    command = ["unshare", "--mount", "sh", "-c", script, sys.executable, modules]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("name", "package"), [("fuse", "libfuse2"), ("seccomp", "libseccomp2")])
def test_a_library_that_is_not_there_is_named_with_its_package(name: str, package: str) -> None:
    script = f"""
from aiosd.host import libraries
libraries.SONAMES["{name}"] = "lib{name}.so.none"
import aiosd.fs.libfuse, aiosd.tools.run.sandbox
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert f"ImportError: lib{name}.so.none: cannot open shared object file" in done.stderr
    assert f"apt install {package}" in done.stderr
