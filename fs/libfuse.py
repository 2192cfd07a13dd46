"""fusepy, completed: poll, interrupts of blocked calls, and serving a /dev/fuse descriptor we were given.

The only module that knows libfuse 2.9 and ctypes. fusepy 3.0.1 lacks `poll` in its operations struct, does
not show interrupts, always mounts by itself, and its error path has a NameError. Sources: fuse.h,
fuse_lowlevel.h and fuse_i.h of libfuse 2.9.9.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import logging
import signal
import threading
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from aiosd.host import libraries

with libraries.needed("fuse"):
    import fuse

log = logging.getLogger(__name__)
lib = ctypes.CDLL(fuse._libfuse._name)  # CDLL, never PyDLL: libfuse calls back with a lock of its own held

FILE_INFO = ctypes.POINTER(fuse.fuse_file_info)
CLIENTS_S = 0.5  # for clients that are between an open and a close when the tree is unmounted
READS_ONLY = 2  # _IOC_READ without _IOC_WRITE: a buffer goes back that nothing was copied into
INTERRUPT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)


class fuse_operations(ctypes.Structure):
    """fusepy's struct stops before poll."""

    _fields_ = (
        *fuse.fuse_operations._fields_,
        ("poll", ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_char_p, FILE_INFO, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint))),
        ("write_buf", ctypes.c_void_p),
        ("read_buf", ctypes.c_void_p),
        ("flock", ctypes.c_void_p),
        ("fallocate", ctypes.c_void_p),
    )  # fmt: skip


class FuseContext(ctypes.Structure):
    """struct fuse_context_i: what stands behind fuse_get_context()."""

    _fields_ = (
        ("fuse", ctypes.c_void_p),
        ("uid", ctypes.c_uint),
        ("gid", ctypes.c_uint),
        ("pid", ctypes.c_int),
        ("private_data", ctypes.c_void_p),
        ("umask", ctypes.c_uint),
        ("request", ctypes.c_void_p),
    )


def context() -> FuseContext:
    """Of the call that this thread is in."""
    return get_context().contents  # type: ignore[no-any-return]  # untyped


class Args(ctypes.Structure):
    """struct fuse_args"""

    _fields_ = (
        ("argc", ctypes.c_int),
        ("argv", ctypes.POINTER(ctypes.c_char_p)),
        ("allocated", ctypes.c_int),
    )


get_context = ctypes.PyDLL(lib._name).fuse_get_context  # only looks: no reason to give up the GIL
get_context.restype = ctypes.POINTER(FuseContext)
lib.fuse_kern_chan_new.restype = ctypes.c_void_p
lib.fuse_kern_chan_new.argtypes = [ctypes.c_int]
libc = ctypes.CDLL(None)
libc.dlvsym.restype = ctypes.c_void_p
libc.dlvsym.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]
# libfuse keeps five fuse_new of five ABIs, and plain dlsym finds the oldest
fuse_new = ctypes.CFUNCTYPE(
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.POINTER(Args),
    ctypes.POINTER(fuse_operations),
    ctypes.c_size_t,
    ctypes.c_void_p,
)(libc.dlvsym(lib._handle, b"fuse_new", b"FUSE_2.6"))
lib.fuse_req_interrupt_func.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
lib.fuse_req_interrupt_func.restype = None
lib.fuse_notify_poll.argtypes = [ctypes.c_void_p]
lib.fuse_pollhandle_destroy.argtypes = [ctypes.c_void_p]
lib.fuse_pollhandle_destroy.restype = None
for name in ("fuse_loop_mt", "fuse_exit", "fuse_destroy"):
    getattr(lib, name).argtypes = [ctypes.c_void_p]

# registers what is called when the thread ends: destructors of C++'s thread_local come here
thread_atexit = getattr(libc, "__cxa_thread_atexit_impl")  # a class would mangle the name
KEPT = threading.local()


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # type: ignore[untyped-decorator]
def let_go(_: object) -> None:
    ctypes.pythonapi.PyGILState_Release(0)  # ctypes, which took it for this call, then releases the last


def keep_thread() -> None:
    """What Python knows of a thread that C has started lasts as long as the thread, not as this call.

    To make that anew takes as long as all else of a short read.
    """
    KEPT.state = ctypes.pythonapi.PyGILState_Ensure()
    thread_atexit(let_go, None, let_go)  # the last: any address, to say which library it is of


class Interrupts:
    """Ends a wait inside a FUSE call when the calling process gets a signal.

    A process blocked in a FUSE read cannot be killed, not even by SIGKILL, until the daemon answers: every
    wait of a handler has to go through here.
    """

    def __init__(self) -> None:
        self._waits: dict[int, SimpleQueue[bool]] = {}
        self._keys = itertools.count(1)
        self._callback = INTERRUPT(self._fire)  # kept: C holds no reference
        self._pointer = ctypes.cast(self._callback, ctypes.c_void_p)

    def _fire(self, request: int, key: int) -> None:
        if (changes := self._waits.get(key)) is not None:
            changes.put(True)

    def wait(self, changes: SimpleQueue[bool], most_s: float | None = None) -> bool:
        """For the next of them, not for ever where that is said; True when it is an interrupt."""
        request = context().request
        key = next(self._keys)
        self._waits[key] = changes
        lib.fuse_req_interrupt_func(request, self._pointer, key)  # fires at once if it came before
        try:
            return changes.get(timeout=most_s)
        except Empty:
            return False
        finally:
            del self._waits[key]  # one that comes now finds nobody; libfuse forgets it with the request


class PollHandle:
    """Wakes who polls an open file. Keep the newest only, notify on each change."""

    def __init__(self, pointer: int) -> None:
        self._pointer: int | None = pointer
        self._lock = threading.Lock()

    def notify(self) -> None:
        with self._lock:
            if self._pointer:
                lib.fuse_notify_poll(self._pointer)

    def close(self) -> None:
        with self._lock:
            pointer, self._pointer = self._pointer, None
            if pointer:
                lib.fuse_pollhandle_destroy(pointer)


class FuseServer(fuse.FUSE):  # type: ignore[misc]
    """fusepy's glue over a descriptor that is already mounted."""

    def __init__(self, operations: Callable[..., Any], options: dict[str, str | bool]) -> None:
        self.operations, self.raw_fi, self.encoding, self.use_ns = operations, True, "utf-8", True
        self._struct = fuse_operations()
        for field, prototype in ((f[0], f[1]) for f in fuse_operations._fields_):
            given = getattr(
                operations, field.removeprefix("f") if field in ("ftruncate", "fgetattr") else field, None
            )
            if given is None and field != "ioctl":
                continue
            if hasattr(prototype, "argtypes"):
                given = prototype(partial(self._guard, getattr(self, field)))
            setattr(self._struct, field, given)
        arguments = ["aiosd", "-o", ",".join(k if v is True else f"{k}={v}" for k, v in options.items())]
        self._argv = (ctypes.c_char_p * len(arguments))(*(a.encode() for a in arguments))
        self._fuse: int | None = None
        self._thread: threading.Thread | None = None

    @staticmethod
    def _guard(function: Callable[..., int | None], *arguments: object) -> int:
        """The broad handler of the FUSE threads: an exception must not run into C."""
        if not hasattr(KEPT, "state"):
            keep_thread()
        try:
            return function(*arguments) or 0
        except OSError as error:
            return -(error.errno or errno.EIO)
        except UnicodeDecodeError:
            return -errno.EILSEQ  # a name that is not UTF-8
        except Exception:
            log.exception("FUSE operation %s", getattr(function, "__name__", function))
            return -errno.EIO

    def ioctl(self, path: object, command: int, arg: object, info: object, flags: int, data: int) -> int:
        """No file has any. Without this libfuse 2.9 hands its callers what malloc(3) gave it: our memory."""
        size = command >> 16 & 0x3FFF
        if command >> 30 == READS_ONLY and size and data:
            ctypes.memset(data, 0, size)
        return -errno.ENOTTY

    def poll(self, path: bytes | None, info: Any, handle: int | None, events: Any) -> int:
        events[0] = self.operations("poll", None, info.contents, PollHandle(handle) if handle else None)
        return 0

    def serve(self, fd: int) -> None:
        """Starts answering the kernel on `fd`, in threads of libfuse's own."""
        channel = lib.fuse_kern_chan_new(fd)
        args = Args(len(self._argv), self._argv, 0)
        size = ctypes.sizeof(self._struct)
        self._fuse = fuse_new(channel, ctypes.byref(args), ctypes.byref(self._struct), size, None)
        if not self._fuse:
            raise OSError(errno.EINVAL, "libfuse does not take these options")
        self._thread = threading.Thread(target=lib.fuse_loop_mt, args=(self._fuse,), name="fuse", daemon=True)
        self._thread.start()

    @property
    def serving(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def join(self, timeout_s: float) -> bool:
        """Ends the loop after the unmount; False when a thread of it does not end."""
        if self._thread is None or self._thread.ident is None:
            return True
        self._thread.join(CLIENTS_S)  # the unmount ends it, unless a client holds a file open
        lib.fuse_exit(self._fuse)
        if self._thread.is_alive():
            signal.pthread_kill(self._thread.ident, signal.SIGUSR1)  # breaks its sem_wait
        self._thread.join(timeout_s)
        return not self._thread.is_alive()
