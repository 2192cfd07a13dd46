"""The journal tells the daemon's story, with fields; a real systemd-journald receives it."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from aiosd.host.journal import Handler
from aiosd.host.message_ids import Id, about
from tests.journald import connect, journal
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


def test_a_message_is_one_entry_whatever_it_holds(tmp_path: Path) -> None:
    """A newline makes no field, and one that is too long for a datagram goes by a file."""
    log = logging.Logger("test")
    log.addHandler(Handler("aiosd"))
    pid = f"_PID={os.getpid()}"
    with journal(tmp_path / "j") as found:
        log.warning("one\nAIOS_AGENT=eve\n", extra=about(agent="ada", request=7))
        log.error("x" * 500_000, extra=about(agent="long"))
        wait_until(lambda: bool(found.entries(pid, "AIOS_AGENT=long")), "the long one")
        [entry] = found.entries(pid, "AIOS_AGENT=ada")
        assert entry["MESSAGE"] == "one\\nAIOS_AGENT=eve\\n"
        assert entry["PRIORITY"] == "4"
        assert not found.entries(pid, "AIOS_AGENT=eve")
        assert len(found.entries(pid, "AIOS_AGENT=long")[0]["MESSAGE"]) == 500_000
