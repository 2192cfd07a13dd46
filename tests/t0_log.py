"""No thread waits for the receiver of its log messages: a journal, a terminal, a service manager."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiosd.host.backlog import Backlog
from tests.journald import fill
from tests.running import REPOSITORY


class Slow:
    """A receiver that takes messages only while it is open, and fails while it is broken."""

    def __init__(self) -> None:
        self.open, self.broken = threading.Event(), False
        self.has: list[str] = []

    def write(self, record: logging.LogRecord) -> None:
        self.open.wait()
        if self.broken:
            raise OSError
        self.has.append(record.getMessage())


@pytest.fixture
def slow() -> Iterator[Slow]:
    slow = Slow()
    yield slow
    slow.open.set()


def logger(backlog: Backlog) -> logging.Logger:
    log = logging.Logger("test")
    log.addHandler(backlog)
    return log


def test_lost_messages_are_counted_and_reported_after_the_waiting_ones(slow: Slow) -> None:
    log = logger(backlog := Backlog(slow.write, waiting=3))
    for number in range(10):
        log.info("%d", number)
    slow.open.set()
    backlog.flush()
    assert slow.has == ["0", "1", "2", "7 messages are not in this log: it did not take them in time"]
    log.info("10")
    backlog.flush()
    assert slow.has[4:] == ["10"], "it is told once"


def test_messages_that_could_not_be_written_are_reported_later(slow: Slow) -> None:
    log = logger(backlog := Backlog(slow.write))
    slow.broken = True
    slow.open.set()
    log.info("0")
    log.info("1")
    backlog.flush()
    slow.broken = False
    log.info("2")
    backlog.flush()
    assert slow.has == ["2", "2 messages are not in this log: it did not take them in time"]


def test_a_message_is_as_it_was_when_it_was_logged(slow: Slow) -> None:
    log = logger(backlog := Backlog(slow.write))
    running = [1]
    log.info("running: %s", running)
    running.append(2)
    slow.open.set()
    backlog.flush()
    assert slow.has == ["running: [1]"]


STANDS_STILL = """
import logging, os, signal, time
from aiosd.host import journal

journal.begin("info")
for number in range(3000):
    logging.getLogger("test").info("%d %s", number, "x" * 100)
print("through", flush=True)
print(signal.sigwait({signal.SIGTERM}).name, flush=True)
"""


@pytest.mark.slow
def test_no_thread_waits_for_the_reader_of_standard_error() -> None:
    """Not at the exit either. The writing thread leaves signals to the main thread."""
    code = "import signal; from aiosd.host.backlog import SIGNALS\n" + STANDS_STILL.replace(
        'print("through"', 'signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS); print("through"'
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as logs:
        assert logs.stdout
        assert logs.stdout.readline() == "through\n"
        logs.send_signal(signal.SIGTERM)
        assert logs.stdout.readline() == "SIGTERM\n"
        assert logs.wait(20) == 0


def test_no_thread_waits_for_a_stopped_service_manager(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    code = "from aiosd.host.notify import notify; notify(READY=1, STATUS='a \\udcff'); print('through')"
    command = [sys.executable, "-c", code]
    env = {**os.environ, "NOTIFY_SOCKET": address}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        subprocess.run(command, cwd=REPOSITORY, env=env, check=True, timeout=20)
        assert manager.recv(100) == b"READY=1\nSTATUS=a \\udcff"
        while fill(address):
            pass
        done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, timeout=20)
    assert done.stdout == b"through\n"
