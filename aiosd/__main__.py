"""aiosd, the daemon: reads the configuration, builds the kernel, mounts the tree, waits for a signal.

Order of start: mount, state, workers (they load in their own time), READY=1. Order of stop: end every wait,
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
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from aiosd import __version__, identity
from aiosd.config import Config, Daemon, load, private_mount
from aiosd.errors import AiosError
from aiosd.fs import layout
from aiosd.fs.libfuse import Server
from aiosd.fs.ops import Ops
from aiosd.kernel import Kernel
from aiosd.notify import notify
from aiosd.privilege import Helped
from aiosd.system import Own, System

log = logging.getLogger("aiosd")
JOIN_S = 5.0


def main() -> int:
    options = arguments().parse_args()
    try:
        if options.privileged:
            identity.serve_for_root()
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
    parser.add_argument("--privileged", type=Path, metavar="SOCKET", help="of aios-privileged, to act for it")
    parser.add_argument("--version", action="version", version=f"aiosd {__version__}")
    return parser


def configure(options: argparse.Namespace) -> Config:
    config = load(options.config)
    daemon = config.daemon
    mount, state = options.mount, options.state
    if not identity.is_root():  # the system's folders are not an ordinary user's
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
    with ExitStack() as undo:
        system: System = Helped(options.privileged) if options.privileged else Own()
        fd = system.mount(folder)
        undo.callback(system.unmount, folder)
        kernel = Kernel(config, options.model, system)
        server = Server(Ops(layout.build(kernel)), {"hard_remove": True, "big_writes": True})
        undo.callback(finish, kernel, server, lambda: system.unmount(folder))
        kernel.start()  # first takes up what an earlier daemon left, then lets new requests in
        server.serve(fd)
        notify(READY=1, STATUS=f"serving {folder}")
        log.info("aiosd %s serves %s (pid %d)", __version__, folder, os.getpid())
        status = wait(signals, server, lambda: reload(kernel, options))
        notify(STOPPING=1)
    log.info("aiosd stopped")
    return 1 if system.lost else status


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


if __name__ == "__main__":
    sys.exit(main())
