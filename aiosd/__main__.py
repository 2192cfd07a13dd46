"""aiosd, the daemon: reads the configuration, builds the kernel, mounts the tree, waits for a signal.

Order of start: mount, state, workers (they load in their own time), READY=1. Order of stop: let what runs
end, workers, end every wait, unmount, state. The main thread only waits for signals.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from aiosd import __version__
from aiosd.config.changes import story
from aiosd.config.config import Config, Daemon, load, private_mount
from aiosd.errors import AiosError
from aiosd.fs import layout
from aiosd.fs.libfuse import Server
from aiosd.fs.ops import Ops
from aiosd.heartbeat import Heartbeat
from aiosd.host import identity, journal
from aiosd.host.message_ids import Id, about
from aiosd.host.notify import notify
from aiosd.kernel import Kernel
from aiosd.privilege.helped import Helped
from aiosd.privilege.system import Own, System

log = logging.getLogger("aiosd")
JOIN_S = 5.0
START_S = 300  # that reading a large state may take, beside what the service manager allows
STOP_S = 60  # as much for what comes after draining
DRAIN_LOOK_S = 0.1


def main() -> int:
    options = arguments().parse_args()
    try:
        if options.privileged:
            identity.serve_for_root()
        config = configure(options)
        journal.begin(config.daemon.log_level)
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
    faulthandler.enable()  # the watchdog's SIGABRT leaves in the log where each thread was
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # kv files and clients take one each
    folder = Path(config.daemon.mount)
    words = __version__, config.daemon.state
    log.info("aiosd %s starts with the state of %s", *words, extra=about(Id.STARTED))
    notify(STATUS=f"reading {config.daemon.state}", EXTEND_TIMEOUT_USEC=START_S * 10**6)
    with ExitStack() as undo:
        system: System = Helped(options.privileged) if options.privileged else Own()
        fd = system.mount(folder)
        undo.callback(system.unmount, folder)
        kernel = Kernel(config, options.model, system)
        server = Server(Ops(layout.build(kernel)), {"hard_remove": True, "big_writes": True})
        undo.callback(finish, kernel, server, system)
        kernel.start()  # first takes up what an earlier daemon left, then lets new requests in
        server.serve(fd)
        heartbeat = Heartbeat(kernel, folder)
        undo.callback(heartbeat.stop)
        notify(READY=1, STATUS=f"serving {folder}")
        heartbeat.start()
        log.info("aiosd serves %s (pid %d)", folder, os.getpid(), extra=about(Id.READY))
        status = wait(signals, server, lambda: reload(kernel, options, system))
        if not system.lost:
            drain(kernel, signals)
    return 1 if system.lost else status


def wait(signals: set[signal.Signals], server: Server, reload: Callable[[], None]) -> int:
    """Until SIGTERM, SIGINT, or the tree was unmounted from outside; the exit status."""
    while True:
        got = signal.sigtimedwait(signals, 1.0)
        number = got.si_signo if got else 0  # of an interrupted wait Python may give garbage
        if number == signal.SIGHUP:
            reload()
        elif number in signals:
            log.info("%s: stopping", signal.Signals(number).name, extra=about(Id.STOPPING))
            return 0
        elif not server.serving:
            log.error("the tree was unmounted from outside: stopping", extra=about(Id.STOPPING))
            return 1


def reload(kernel: Kernel, options: argparse.Namespace, system: System) -> None:
    """SIGHUP: all of a good configuration, or nothing of a bad one."""
    notify(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)
    old = kernel.config
    try:
        config = configure(options)
        kernel.reload(config)
        system.reload()
    except (AiosError, OSError) as error:
        kernel.reload_refused = True
        why = error.explanation if isinstance(error, AiosError) else str(error)
        log.error("not reloaded, the old configuration stays: %s", why, extra=about(Id.REFUSED))
    else:
        kernel.reload_refused = False
        logging.getLogger().setLevel(config.daemon.log_level.upper())
        log.info("configuration reloaded: %s", story(old, config), extra=about(Id.RELOADED))
    notify(READY=1)


def drain(kernel: Kernel, signals: set[signal.Signals]) -> None:
    """Nothing new is let in, nothing starts; what runs may come to its end within drain_s, or until the
    daemon is told again to stop."""
    scheduler, end_s = kernel.scheduler, time.monotonic() + kernel.config.daemon.drain_s
    notify(STOPPING=1, EXTEND_TIMEOUT_USEC=(kernel.config.daemon.drain_s + STOP_S) * 10**6)
    scheduler.drain()
    said = ""
    while (running := scheduler.computing) and (left_s := end_s - time.monotonic()) > 0:
        line = f"stopping: requests that still run: {running}; they have {math.ceil(left_s)} s"
        if not said:
            log.info("%s", line, extra=about(Id.STOPPING))
        if line != said:
            notify(STATUS=line)
        said = line
        got = signal.sigtimedwait(signals, min(DRAIN_LOOK_S, left_s))
        if got and got.si_signo in (signal.SIGTERM, signal.SIGINT):
            log.info("%s again: stopping at once", signal.Signals(got.si_signo).name)
            break
        if got and got.si_signo == signal.SIGHUP:
            log.info("not reloaded: the daemon is stopping")
    notify(STATUS="stopping")


def finish(kernel: Kernel, server: Server, system: System) -> None:
    def leave() -> None:
        system.unmount(Path(kernel.config.daemon.mount))
        ended.append(server.join(JOIN_S))

    ended: list[bool] = []
    kernel.stop(leave)  # ends every blocked read, so that the unmount can
    left = len(kernel.scheduler.unfinished())
    later = f"; {left} requests go on when it starts again" if left else ""
    log.info("aiosd stopped%s", later, extra=about(Id.STOPPED))
    if not all(ended):
        log.warning("a client still holds a file open; leaving it behind")
        logging.shutdown()
        os._exit(
            int(system.lost)
        )  # a thread of libfuse cannot be ended otherwise; all state is stored and closed


def die(what: threading.ExceptHookArgs) -> None:
    """A daemon without one of its threads would only look alive: end, and be started again."""
    trace = (what.exc_type, what.exc_value or what.exc_type(), what.exc_traceback)
    log.critical("thread %s ended by an error", what.thread and what.thread.name, exc_info=trace)
    logging.shutdown()
    os._exit(70)  # EX_SOFTWARE


if __name__ == "__main__":
    sys.exit(main())
