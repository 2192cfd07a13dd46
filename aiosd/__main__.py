"""aiosd, the daemon: read the configuration, mount the tree, build the kernel, wait for a signal.

Order of start: mount, state, workers (they load in the background), READY=1. Order of stop: let running
requests end, stop the workers, end every wait, unmount, close the state. The main thread only waits for
signals.
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from aiosd import __version__, verdict
from aiosd.config.changes import story
from aiosd.config.config import Config, DaemonConfig, load, private_mount
from aiosd.config.doubts import doubts
from aiosd.cores.models import check_path
from aiosd.errors import AiosError, BadValue, ConfigError, Misconfigured, in_words
from aiosd.fs import layout
from aiosd.fs.libfuse import FuseServer
from aiosd.fs.ops import Ops
from aiosd.heartbeat import Heartbeat
from aiosd.host import identity, journal
from aiosd.host.message_ids import Id, about
from aiosd.host.mount import check_place
from aiosd.host.notify import notify
from aiosd.kernel import Kernel
from aiosd.privilege.helped import Helped
from aiosd.privilege.system import Own, System
from aiosd.reload import reload as take_over

log = logging.getLogger("aiosd")
JOIN_S = 5.0
START_S = 300  # for reading a large state; the service manager adds it to its own limit
STOP_S = 60  # for the stop after draining; added in the same way
DRAIN_LOOK_S = 0.1


def main() -> int:
    options = arguments().parse_args()
    try:
        if options.check is not None:
            return check(options)
        if options.reload:
            return ask(options)
        if options.privileged:
            identity.serve_for_root()
        with misconfigured():
            config = configure(options)
        journal.begin(config.daemon.log_level)
        status = serve(config, options)
        logging.shutdown()
        # libfuse cancels its threads. One that was in perror(3) keeps the lock of stderr, and Python's end
        # would wait for it without end.
        os._exit(status)
    except AiosError as error:
        print(f"aiosd: {error.explanation}", file=sys.stderr)
        return os.EX_CONFIG if isinstance(error, Misconfigured) else 1


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aiosd", description="Serve language models as files.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="default /etc/aios/aiosd.toml")
    parser.add_argument("--mount", metavar="DIR", help="where the tree appears (root: /aios)")
    parser.add_argument("--state", metavar="DIR", help="what survives a restart (root: /var/lib/aios)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="serve this model folder, as the default")
    parser.add_argument("--privileged", type=Path, metavar="SOCKET", help="of aios-privileged, to act for it")
    parser.add_argument("--check", nargs="?", type=Path, const=False, metavar="FILE",
                        help="judge the configuration, of FILE if named, and start nothing")  # fmt: skip
    parser.add_argument("--reload", type=int, metavar="PID", help="have the service reload, and wait for it")
    parser.add_argument("--version", action="version", version=f"aiosd {__version__}")
    return parser


def check(options: argparse.Namespace) -> int:
    """Judge as the next start or reload would, and print all that is wrong."""
    wrong, doubtful = verdict.check(options.check or options.config)
    for line in wrong:
        print(f"aiosd: {line}", file=sys.stderr)
    for line in doubtful:
        print(f"aiosd: warning: {line}", file=sys.stderr)
    return 1 if wrong else 0


def ask(options: argparse.Namespace) -> int:
    if refused := verdict.ask_reload(options.reload):
        print(f"aiosd: not reloaded, the old configuration stays: {refused}", file=sys.stderr)
    return 1 if refused else 0


@contextmanager
def misconfigured() -> Iterator[None]:
    """The service manager does not start again what a person has to put right first."""
    try:
        yield
    except (BadValue, ConfigError) as error:
        raise Misconfigured(str(error), error.hint) from None


def configure(options: argparse.Namespace) -> Config:
    config = load(options.config)
    daemon = config.daemon
    mount, state = options.mount, options.state
    if not identity.is_root():  # the system's folders are not an ordinary user's
        mount = mount or (private_mount() if daemon.mount == DaemonConfig.mount else None)
        home = Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local/state")) / "aios"
        state = state or (home if daemon.state == DaemonConfig.state else None)
    if options.model:
        check_path(options.model)
    mount, state = os.path.abspath(mount or daemon.mount), os.path.abspath(state or daemon.state)
    check_place(Path(mount))
    return replace(config, daemon=replace(daemon, mount=mount, state=state))


def serve(config: Config, options: argparse.Namespace) -> int:
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    # every thread inherits the mask; `wait` receives the signals
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    signal.signal(signal.SIGUSR1, lambda *_: None)  # at the stop it only interrupts libfuse's wait

    threading.excepthook = die
    faulthandler.enable()  # on the watchdog's SIGABRT, log where each thread is
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each kv file and client takes a descriptor
    folder = Path(config.daemon.mount)
    words = __version__, config.daemon.state
    log.info("aiosd %s starts with the state of %s", *words, extra=about(Id.STARTED))
    notify(STATUS=f"reading {config.daemon.state}", EXTEND_TIMEOUT_USEC=START_S * 10**6)
    with ExitStack() as undo:
        system: System = Helped(options.privileged) if options.privileged else Own()
        fd = system.mount(folder)
        undo.callback(system.unmount, folder)
        with misconfigured():
            kernel = Kernel(config, options.model, system)
        express(config)
        server = FuseServer(Ops(layout.build(kernel)), {"hard_remove": True, "big_writes": True})
        undo.callback(finish, kernel, server, system)
        kernel.start()  # takes up the requests of an earlier daemon before `serve` lets in new ones
        server.serve(fd)
        heartbeat = Heartbeat(kernel, folder)
        undo.callback(heartbeat.stop)
        notify(READY=1, STATUS=f"serving {folder}")
        heartbeat.start()
        log.info("aiosd serves %s (pid %d)", folder, os.getpid(), extra=about(Id.READY))
        status = wait(signals, server, lambda: reload(kernel, options, system), kernel.model_objects.let_go)
        if not system.lost:
            drain(kernel, signals)
    return 1 if system.lost else status


def wait(
    signals: set[signal.Signals], server: FuseServer, reload: Callable[[], None], look: Callable[[], None]
) -> int:
    """Until SIGTERM, SIGINT, or the tree was unmounted from outside; the exit status. `look` runs every
    second."""
    while True:
        look()
        got = signal.sigtimedwait(signals, 1.0)
        number = got.si_signo if got else 0  # Python may return garbage from an interrupted wait
        if number == signal.SIGHUP:
            reload()
        elif number in signals:
            log.info("%s: stopping", signal.Signals(number).name, extra=about(Id.STOPPING))
            return 0
        elif not server.serving:
            log.error("the tree was unmounted from outside: stopping", extra=about(Id.STOPPING))
            return 1


def express(config: Config) -> None:
    for line in doubts(config):
        log.warning("%s", line)


def reload(kernel: Kernel, options: argparse.Namespace, system: System) -> None:
    """SIGHUP: take over a good configuration whole. A bad one changes nothing."""
    notify(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)
    old = kernel.config
    try:
        config = configure(options)
        take_over(kernel, config)
        system.reload()
    except (AiosError, OSError) as error:
        kernel.reload_refused = True
        why = in_words(error)
        log.error("not reloaded, the old configuration stays: %s", why, extra=about(Id.REFUSED))
        verdict.write_verdict(why)
    else:
        kernel.reload_refused = False
        logging.getLogger().setLevel(config.daemon.log_level.upper())
        log.info("configuration reloaded: %s", story(old, config), extra=about(Id.RELOADED))
        express(config)
        verdict.write_verdict("")
    notify(READY=1)


def drain(kernel: Kernel, signals: set[signal.Signals]) -> None:
    """Refuse and start nothing more. Let running requests end within drain_s, or until a second signal to
    stop.
    """
    scheduler, end_s = kernel.scheduler, time.monotonic() + kernel.config.daemon.drain_s
    notify(STOPPING=1, EXTEND_TIMEOUT_USEC=(kernel.config.daemon.drain_s + STOP_S) * 10**6)
    kernel.drain()
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
            verdict.write_verdict("the daemon is stopping")
    notify(STATUS="stopping")


def finish(kernel: Kernel, server: FuseServer, system: System) -> None:
    def leave() -> None:
        system.unmount(Path(kernel.config.daemon.mount))
        ended.append(server.join(JOIN_S))

    ended: list[bool] = []
    kernel.stop(leave)  # ends every blocked read first, so that the unmount can succeed
    left = len(kernel.scheduler.unfinished())
    later = f"; {left} requests go on when it starts again" if left else ""
    log.info("aiosd stopped%s", later, extra=about(Id.STOPPED))
    if not all(ended):
        log.warning("a client still holds a file open; leaving it behind")
        logging.shutdown()
        os._exit(int(system.lost))  # nothing else ends a thread of libfuse; all state is stored and closed


def die(what: threading.ExceptHookArgs) -> None:
    """End the daemon after an error in a thread, because it only looks alive then. systemd restarts it."""
    trace = (what.exc_type, what.exc_value or what.exc_type(), what.exc_traceback)
    log.critical("thread %s ended by an error", what.thread and what.thread.name, exc_info=trace)
    logging.shutdown()
    os._exit(70)  # EX_SOFTWARE


if __name__ == "__main__":
    sys.exit(main())
