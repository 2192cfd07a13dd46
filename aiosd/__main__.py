"""aiosd, the daemon: reads the configuration, builds the kernel, mounts the tree, waits for a signal.

Order of start: state, workers (they load in their own time), mount, READY=1. Order of stop: end every wait,
unmount, workers, state. The main thread only waits for signals.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from aiosd import __version__
from aiosd.config import Config, Daemon, load, private_mount
from aiosd.errors import AiosError
from aiosd.fs import layout, mount
from aiosd.fs.libfuse import Server
from aiosd.fs.ops import Ops
from aiosd.kernel import Kernel
from aiosd.notify import notify

log = logging.getLogger("aiosd")
JOIN_S = 5.0


def main() -> int:
    options = arguments().parse_args()
    try:
        config = configure(options)
        logging.basicConfig(
            level=config.daemon.log_level.upper(),
            format="%(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        return serve(config, options)
    except AiosError as error:
        print(f"aiosd: {error.explanation}", file=sys.stderr)
        return 1


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aiosd", description="Serve language models as files.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="default /etc/aios/aiosd.toml")
    parser.add_argument("--mount", metavar="DIR", help="where the tree appears (root: /aios)")
    parser.add_argument("--state", metavar="DIR", help="what survives a restart (root: /var/lib/aios)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="serve this model folder, as the default")
    parser.add_argument("--version", action="version", version=f"aiosd {__version__}")
    return parser


def configure(options: argparse.Namespace) -> Config:
    config = load(options.config)
    daemon = config.daemon
    mount, state = options.mount, options.state
    if os.geteuid() != 0:  # the system's folders are not an ordinary user's
        mount = mount or (private_mount() if daemon.mount == Daemon.mount else None)
        home = Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local/state")) / "aios"
        state = state or (home if daemon.state == Daemon.state else None)
    mount, state = os.path.abspath(mount or daemon.mount), os.path.abspath(state or daemon.state)
    return replace(config, daemon=replace(daemon, mount=mount, state=state))


def serve(config: Config, options: argparse.Namespace) -> int:
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # every thread inherits it; main waits for them below
    signal.signal(signal.SIGUSR1, lambda *_: None)  # only breaks a wait of libfuse at the end

    threading.excepthook = die
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # kv files and clients take one each
    folder = Path(config.daemon.mount)
    mount.clear_stale(folder)
    made_here = not folder.exists()
    with ExitStack() as undo:
        kernel = Kernel(config, options.model)
        server = Server(Ops(layout.build(kernel)), {"hard_remove": True, "big_writes": True})
        if made_here:
            undo.callback(remove_if_empty, folder)
        fd = mount.open_fuse(folder, shared=mount.others_allowed())
        undo.callback(finish, kernel, server, lambda: mount.unmount(folder))
        kernel.start()  # first takes up what an earlier daemon left, then lets new requests in
        server.serve(fd)
        notify(READY=1, STATUS=f"serving {folder}")
        log.info("aiosd %s serves %s (pid %d)", __version__, folder, os.getpid())
        status = wait(signals, server, lambda: reload(kernel, options))
        notify(STOPPING=1)
    log.info("aiosd stopped")
    return status


def wait(signals: set[signal.Signals], server: Server, reload: Callable[[], None]) -> int:
    """Until SIGTERM, SIGINT, or the tree was unmounted from outside; the exit status."""
    while True:
        got = signal.sigtimedwait(signals, 1.0)
        number = got.si_signo if got else 0  # of an interrupted wait Python may give garbage
        if number == signal.SIGHUP:
            reload()
        elif number in signals:
            log.info("%s: stopping", signal.Signals(number).name)
            return 0
        elif not server.serving:
            log.error("the tree was unmounted from outside: stopping")
            return 1


def reload(kernel: Kernel, options: argparse.Namespace) -> None:
    """SIGHUP: all of a good configuration, or nothing of a bad one."""
    try:
        config = configure(options)
        kernel.reload(config)
    except AiosError as error:
        log.error("not reloaded, the old configuration stays: %s", error.explanation)
        return
    logging.getLogger().setLevel(config.daemon.log_level.upper())
    log.info("configuration reloaded")


def finish(kernel: Kernel, server: Server, unmount: Callable[[], None]) -> None:
    kernel.stop()  # ends every blocked read, so that the unmount can
    unmount()
    if not server.join(JOIN_S):
        log.warning("a client still holds a file open; leaving it behind")
        logging.shutdown()
        os._exit(0)  # a thread of libfuse cannot be ended otherwise; all state is stored and closed


def die(what: threading.ExceptHookArgs) -> None:
    """A daemon without one of its threads would only look alive: end, and be started again."""
    trace = (what.exc_type, what.exc_value or what.exc_type(), what.exc_traceback)
    log.critical("thread %s ended by an error", what.thread and what.thread.name, exc_info=trace)
    logging.shutdown()
    os._exit(70)  # EX_SOFTWARE


def remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


if __name__ == "__main__":
    sys.exit(main())
