"""The daemon's messages and their fields in the journal of a real systemd-journald."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aiosd.host.message_ids import Id
from tests.journald import connect, journal, program
from tests.running import Daemon, wait_until

pytestmark = pytest.mark.mount


def test_the_journal_tells_what_happened_and_of_whom(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    with journal(tmp_path / "j") as found:
        daemon = connect(make_daemon("[quota.agent.ada]\nqueued_requests = 1\n")).start()
        pid = f"_PID={daemon.process.pid}" if daemon.process else ""
        daemon.sh("mkdir agents/ada agents/eve; echo '{\"max_tokens\": 3}' | tee agents/*/params.json")
        for agent in ("ada", "eve", "ada"):
            daemon.sh(f"echo hi > agents/{agent}/syscall/llm; cat agents/{agent}/syscall/llm")
        for model in ("random", "nosuch"):  # the second fails
            text = f'{{"prompt": "hi", "model": "{model}", "max_tokens": 2}}'
            daemon.sh(f"exec 3<>models/random/llm; echo '{text}' >&3; cat <&3")
        daemon.sh("echo pause > agents/ada/ctl; echo hi > agents/ada/syscall/llm")
        for _ in range(3):
            daemon.sh("echo hi > agents/ada/syscall/llm")
        os.kill(daemon.worker_pids()[0], signal.SIGKILL)
        wait_until(lambda: len(found.entries(pid, f"MESSAGE_ID={Id.WORKER_READY}")) == 2, "the next", 60)
        assert daemon.stop() == 0
        wait_until(lambda: bool(found.entries(pid, f"MESSAGE_ID={Id.STOPPED}")), "the end")
        ada = found.entries(pid, "AIOS_AGENT=ada")
        ends = [entry for entry in ada if entry.get("AIOS_STATE") == "done"]
        assert [entry["PRIORITY"] for entry in ends] == ["6", "6"]
        assert ends[0]["AIOS_UID"] == "0"
        assert ends[0]["AIOS_MODEL"] == "random"
        assert ends[0]["SYSLOG_IDENTIFIER"] == "aiosd"
        assert int(ends[0]["AIOS_REQUEST"]) < int(ends[1]["AIOS_REQUEST"])
        limits = [entry for entry in ada if entry.get("MESSAGE_ID") == Id.LIMIT]
        assert len(limits) == 1, "one a minute"
        assert limits[0]["PRIORITY"] == "5"
        story = [entry.get("MESSAGE_ID") for entry in found.entries(pid)]
        order = [Id.STARTED, Id.WORKER_STARTED, Id.READY, Id.WORKER_READY, Id.WORKER_DIED, Id.STOPPING]
        assert sorted(order, key=story.index) == [Id.STARTED, *sorted(order[1:], key=story.index)]
        assert story[-1] == Id.STOPPED
        [died] = found.entries(pid, f"MESSAGE_ID={Id.WORKER_DIED}")
        assert (died["AIOS_WORKER"], died["AIOS_MODEL"], died["PRIORITY"]) == ("0", "random", "3")
        assert daemon.log.read_text() == "", "nothing is told twice"


def test_each_line_of_the_audit_log_is_in_the_journal(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    with journal(tmp_path / "j") as found:
        daemon = connect(make_daemon()).start()
        pid = f"_PID={daemon.process.pid}" if daemon.process else ""
        daemon.sh('exec 3<>tools/calc/call; echo \'{"expression": "41+1"}\' >&3; cat <&3')
        wait_until(lambda: len(found.entries(pid, "AIOS_TOOL=calc")) == 2, "the call")
        called, done = found.entries(pid, "AIOS_TOOL=calc")
        assert (called["AIOS_WHAT"], called["AIOS_DECISION"], called["PRIORITY"]) == ("called", "allow", "5")
        assert (done["AIOS_WHAT"], done["AIOS_EXIT_STATUS"], done["PRIORITY"]) == ("done", "0", "6")
        assert "41+1" not in str([called, done])
        daemon.sh("mkdir agents/a; echo '{\"name\":\"shell\",\"arguments\":{\"command\":\"ls\"}}' >"
                  " agents/a/syscall/tool; echo deny > access/pending/*/decision")  # fmt: skip
        wait_until(lambda: bool(found.entries(pid, f"MESSAGE_ID={Id.DENIED}")), "the denial")
        [waits] = found.entries(pid, f"MESSAGE_ID={Id.CALL_WAITS}")
        assert "echo allow > access/pending/" in waits["MESSAGE"]
        assert found.entries(pid, f"MESSAGE_ID={Id.DENIED}")[0]["AIOS_AGENT"] == "a"


LOGS = """
import logging
from aiosd.host import journal
from aiosd.host.message_ids import Id, about

journal.begin("info")
log = logging.getLogger("test")
"""


def test_a_message_is_one_entry_whatever_it_holds(tmp_path: Path) -> None:
    """A newline in a message makes no field, and a message too long for a datagram travels in a file."""
    code = (
        LOGS
        + r"""
log.warning("one\nAIOS_AGENT=eve\n", extra=about(agent="ada", request=7))
log.warning("of %s", "a\udcff\0b", extra=about(agent="bytes"))
log.error("x" * 500_000, extra=about(agent="long"))
"""
    )
    with journal(tmp_path / "j") as found:
        with program(code, tmp_path / "log") as logs:
            pid = f"_PID={logs.pid}"
        assert logs.returncode == 0
        wait_until(lambda: bool(found.entries(pid, "AIOS_AGENT=long")), "the long one")
        [entry] = found.entries(pid, "AIOS_AGENT=ada")
        assert entry["MESSAGE"] == "one\\nAIOS_AGENT=eve\\n"
        assert (entry["PRIORITY"], entry["LOGGER"], entry["AIOS_REQUEST"]) == ("4", "test", "7")
        assert not found.entries(pid, "AIOS_AGENT=eve")
        assert found.entries(pid, "AIOS_AGENT=bytes")[0]["MESSAGE"] == "of a\\udcff\\x00b"
        assert len(found.entries(pid, "AIOS_AGENT=long")[0]["MESSAGE"]) == 500_000
    assert (tmp_path / "log").read_text() == ""


def test_the_last_messages_are_in_the_journal(tmp_path: Path) -> None:
    """At an exit, and after the death of a thread."""
    ends = "for number in range(3000): log.info('number %d', number)"
    dies = "import threading; from aiosd.__main__ import die; threading.excepthook = die\n"
    dies += "thread = threading.Thread(target=lambda: 1 / 0, name='t'); thread.start(); thread.join()"
    with journal(tmp_path / "j") as found:
        with program(LOGS + ends, tmp_path / "log") as exits, program(LOGS + dies, tmp_path / "log") as dead:
            pass
        assert (exits.returncode, dead.returncode) == (0, 70)
        last = f"_PID={exits.pid}", "MESSAGE=number 2999"
        wait_until(lambda: bool(found.entries(*last)), "the last message")
        assert len(found.entries(f"_PID={exits.pid}")) == 3000
        wait_until(lambda: bool(found.entries(f"_PID={dead.pid}")), "the error")
        [entry] = found.entries(f"_PID={dead.pid}")
        assert entry["PRIORITY"] == "2"
        assert entry["MESSAGE"].startswith("thread t ended by an error\nTraceback")
        assert entry["MESSAGE"].endswith("ZeroDivisionError: division by zero")


def test_a_journal_that_stands_still_holds_up_no_request(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    with journal(tmp_path / "j") as found:
        daemon = connect(make_daemon()).start()
        pid = f"_PID={daemon.process.pid}" if daemon.process else ""
        daemon.sh("mkdir agents/ada; echo '{\"max_tokens\": 3}' > agents/ada/params.json")
        with found.stands_still():
            began = time.monotonic()
            for _ in range(10):
                assert daemon.sh("echo hi > agents/ada/syscall/llm && cat agents/ada/syscall/llm").stdout
            assert time.monotonic() - began < 5
        wait_until(lambda: len(found.entries(pid, "AIOS_AGENT=ada", "AIOS_STATE=done")) == 10, "the entries")
        with found.stands_still():
            assert daemon.stop() == 0
        assert daemon.log.read_text() == ""


def test_a_daemon_starts_while_the_journal_stands_still(tmp_path: Path) -> None:
    with journal(tmp_path / "j") as found, found.stands_still():
        code = LOGS + "log.info('one')"
        with program(code, tmp_path / "log") as logs:
            assert logs.wait(20) == 0


def test_without_systemd_python_standard_error_has_the_log_and_says_so_once(tmp_path: Path) -> None:
    code = "import sys; sys.modules['systemd'] = None\n" + LOGS + "log.info('one'); log.info('two')"
    with journal(tmp_path / "j") as found:
        with program(code, tmp_path / "log") as logs:
            pass
        lines = (tmp_path / "log").read_text().splitlines()
        assert logs.returncode == 0
        assert lines[0].startswith("WARNING aiosd: systemd-python is missing")
        assert lines[1:] == ["INFO test: one", "INFO test: two"]
        assert not found.entries(f"_PID={logs.pid}")
    with program(code, tmp_path / "log", journal=False):
        pass
    assert (tmp_path / "log").read_text().splitlines() == lines[1:], "elsewhere nothing is missing"
