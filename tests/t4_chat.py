"""aiosctl run on a real tree, on a real terminal and in a pipe; and aiosctl ask with standard input."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from aiosd.cli.dialogue import read_message
from aiosd.host.terminal import safe
from tests.running import REPOSITORY, Daemon, wait_until
from tests.terminal import CTRL_C, CTRL_D, CTRL_U, Terminal, terminal

pytestmark = pytest.mark.mount
ENV = {"PYTHONPATH": str(REPOSITORY), "TERM": "dumb"}
AIOSCTL = [sys.executable, "-m", "aiosd.cli.aiosctl"]
ENDLESS = ("/set ignore_eos true", "/set max_tokens 100000")
Talk = Callable[..., AbstractContextManager[Terminal]]


@pytest.fixture
def talk(tmp_path: Path) -> Talk:
    @contextmanager
    def talk(daemon: Daemon, *words: str) -> Iterator[Terminal]:
        env = {**ENV, "XDG_STATE_HOME": str(tmp_path)}
        with terminal([*AIOSCTL, "--mount", str(daemon.root), "run", *words], env) as made:
            yield made

    return talk


def aiosctl(daemon: Daemon, *words: str, **how: Any) -> subprocess.CompletedProcess[str]:
    command = [*AIOSCTL, "--mount", str(daemon.root), *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, **how)


@pytest.fixture
def slow(make_daemon: Callable[..., Daemon], slow_llama: Path) -> Daemon:
    return make_daemon(model=slow_llama).start()


def running(daemon: Daemon) -> int:
    return int(daemon.table("status")["running"])


def nothing_is_left(daemon: Daemon) -> None:
    wait_until(lambda: not daemon.read("scheduler/queue").splitlines()[1:], "the end of the requests")
    assert os.listdir(daemon.root / "agents") == os.listdir(daemon.root / "contexts") == []


# the dialogue


def test_a_conversation_remembers_is_saved_and_loaded(aios: Daemon, talk: Talk, tmp_path: Path) -> None:
    before = os.listdir(aios.root / "agents")
    with talk(aios) as person:
        assert "tiny; /help" in person.until(">>> ")
        person.say("Hello, my name is Zoe")
        person.until(">>> ")
        person.say("What is my name?")
        assert "Zoe" in person.until(">>> ").replace("What is my name?", "")
        person.say("/save talked")
        person.until(">>> ")
        person.say("My city is Paris.")
        person.until(">>> ")
        person.type(CTRL_D)
        assert person.ended() == 0
    try:
        assert os.listdir(aios.root / "agents") == before
        lines = aios.read("contexts/talked/messages.jsonl").splitlines()
        said = [json.loads(line)["content"] for line in lines]
        assert said[::2] == ["Hello, my name is Zoe", "What is my name?", "My city is Paris."]
        with talk(aios, "tiny") as person:
            person.until(">>> ")
            person.say("/save talked")
            assert "/load talked continues it" in person.until(">>> ")
            person.say("/load talked")
            assert "(6 messages)" in person.until(">>> ")
            person.say("What is my city?")
            assert "Paris" in person.until(">>> ")
            person.say("/save other")
            person.until(">>> ")
            person.say("/clear")
            person.until(">>> ")
            person.say("What is my name?")
            assert "Zoe" not in person.until(">>> ")
        assert aios.read("contexts/other/messages.jsonl") == aios.read("contexts/talked/messages.jsonl")
        assert len(lines) + 2 == len(aios.read("contexts/other/messages.jsonl").splitlines())
    finally:
        for path in (aios.root / "contexts").iterdir():
            path.rmdir()
    history = tmp_path / "aios/history"
    assert "What is my city?" in history.read_text()
    assert (history.stat().st_mode & 0o777, history.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_settings_are_judged_at_once_and_kept_until_they_are_taken_back(aios: Daemon, talk: Talk) -> None:
    with talk(aios) as person:
        for line, said in (
            ("/set temperature hot", "temperature must be"),
            ("/set nosuch 1", "nothing is called 'nosuch'"),
            ("/set temperature 0.5", ""),
            ("/set system Answer briefly.", ""),
            ("/model nosuch", "no model 'nosuch'"),
            ("/nosuch", "/help shows them"),
            ("/load nosuch", "No such file"),
        ):
            person.until(">>> ")
            person.say(line)
            if said:
                person.until(said)
        person.until(">>> ")
        person.say("/show")
        shown = dict(line.split(maxsplit=1) for line in person.until(">>> ").splitlines()[1:])
        assert shown["temperature"] == "0.5"
        assert (shown["system"], shown["model"]) == ("Answer briefly.", "tiny (ready)")
        person.say("/set temperature")
        person.until(">>> ")
        person.say("/set max_tokens 1")
        person.until(">>> ")
        person.say("How do I see the queue?")
        assert "/set max_tokens N" in person.until(">>> ")
        person.say("/set max_tokens")
        person.until(">>> ")
        person.say("/show")
        shown = dict(line.split(maxsplit=1) for line in person.until(">>> ").splitlines()[1:])
        assert "temperature" not in shown
        assert shown["max_tokens"] == "1024", "without a value it is what it was at the start"


def test_ctrl_c_ends_the_answer_and_not_the_program(slow: Daemon, talk: Talk) -> None:
    with talk(slow) as person:
        for line in (*ENDLESS, "Hello"):
            person.until(">>> ")
            person.say(line)
        wait_until(lambda: running(slow) == 1, "the answer")
        person.type(CTRL_C)
        person.until("(cancelled; it is no part of the conversation)")
        wait_until(lambda: running(slow) == 0, "the end of the request")
        person.until(">>> ")
        person.type(f"half a line{CTRL_C}")
        person.until("(Ctrl-D ends)")
        person.until(">>> ")
        person.say("/show")
        assert "0 messages" in person.until(">>> ")
        person.type(CTRL_D)
        assert person.ended() == 0


def test_a_killed_program_leaves_nothing(slow: Daemon, talk: Talk) -> None:
    with talk(slow) as person:
        for line in (*ENDLESS, "Hello"):
            person.until(">>> ")
            person.say(line)
        wait_until(lambda: running(slow) == 1, "the answer")
        person.kill()
    nothing_is_left(slow)


def test_a_message_may_have_several_lines(aios: Daemon, talk: Talk) -> None:
    assert read_message(lines_of("one\\", "two")) == "one\ntwo"
    assert read_message(lines_of('"""one', "", 'two"""')) == "one\n\ntwo"
    assert read_message(lines_of('"""', "one\\", '"""')) == "one\\"
    assert read_message(lines_of('"""one"""')) == "one"
    with talk(aios) as person:
        person.until(">>> ")
        person.say("Hello, \\")
        person.until("... ")
        person.say("my name is Ada")
        assert "Ada" in person.until(">>> ")


def lines_of(*lines: str) -> Callable[[str], str]:
    left = iter(lines)
    return lambda prompt: next(left)


def test_tab_completes_commands_settings_and_names(aios: Daemon, talk: Talk) -> None:
    with talk(aios) as person:
        for typed, completed in (
            ("/sh", "/show "),
            ("/set temp", "/set temperature "),
            ("/model ti", "/model tiny "),
        ):
            person.until(">>> ")
            person.type(f"{typed}\t")
            person.until(completed)
            person.say(CTRL_U)


def test_a_loading_model_is_waited_for_and_the_reason_is_shown(
    make_daemon: Callable[..., Daemon], talk: Talk
) -> None:
    daemon = make_daemon().start(ready=False)
    with talk(daemon) as person:
        person.narrow(25)
        person.until(">>> ")
        person.say("Hello")
        person.until("model rand")
        assert not person.until("\r").startswith("om loads"), "it fits into the line, which is written over"
        person.until(">>> ")
        assert daemon.model_state() == "ready"


def test_the_end_of_the_daemon_ends_the_answer_and_not_the_conversation(slow: Daemon, talk: Talk) -> None:
    with talk(slow) as person:
        for line in (*ENDLESS, "Hello"):
            person.until(">>> ")
            person.say(line)
        wait_until(lambda: running(slow) == 1, "the answer")
        slow.kill()
        person.until("aiosd has ended before the end of the answer")
        slow.start()
        person.until(">>> ")
        person.say("/set max_tokens 2")
        person.until(">>> ")
        person.say("Hello")
        person.until("(cut off;")


# a hostile answer


def test_an_answer_reaches_a_terminal_without_its_controls(
    make_daemon: Callable[..., Daemon], talk: Talk
) -> None:
    """The random model says bytes by chance when it is hot."""
    assert (
        safe("a\x1b[2J\r\x07\x9b\u202eb\n\tc\ud800é👩‍👩‍👧")
        == "a\\x1b[2J\\r\\x07\\x9b\\u202eb\n\tc\\ud800é👩‍👩‍👧"
    )
    daemon = make_daemon().start()
    daemon.sh("mkdir agents/hot")
    daemon.write("agents/hot/params.json", '{"temperature": 50, "max_tokens": 400, "ignore_eos": true}')
    piped = aiosctl(daemon, "ask", "hot", "Hello", stdin=subprocess.DEVNULL).stdout
    assert controls(piped), "in a pipe they are as they are"
    with terminal([*AIOSCTL, "--mount", str(daemon.root), "ask", "hot", "Hello"], ENV) as person:
        assert person.ended() == 0
        assert controls(person.shown) == set()
        assert "\\x" in person.shown
    with talk(daemon) as person:
        for line in ("/set temperature 50", "/set max_tokens 400", "/set ignore_eos true", "Hello"):
            person.until(">>> ")
            person.say(line)
        shown = person.until("(cut off;")
        assert controls(shown) == set()
        assert "\\x" in shown


def controls(text: str) -> set[str]:
    return {c for c in text.replace("\r\n", "\n") if c < " " or "\x7f" <= c < "\xa0"} - {"\n", "\t"}


# words and standard input


def asked(daemon: Daemon, agent: str) -> str:
    return daemon.read(f"{agent}/requests/latest/request").rstrip("\n")


def test_words_and_standard_input_make_one_question(aios: Daemon, agent: str, tmp_path: Path) -> None:
    ask, name = [*AIOSCTL, "--mount", str(aios.root), "ask"], agent.removeprefix("agents/")
    (tmp_path / "log").write_text("disk full\nline two\n")

    def after(words: list[str], **how: Any) -> str:
        done = subprocess.run([*ask, name, *words], cwd=REPOSITORY, capture_output=True, timeout=60, **how)
        assert done.returncode == 0, done.stderr
        return asked(aios, agent)

    both = "what failed?\n\ndisk full\nline two"
    words = ["what", "failed?"]
    assert after(words, input=b"disk full\nline two\n") == both
    with (tmp_path / "log").open() as file:
        assert after(words, stdin=file) == both
        file.seek(4)
        assert after(words, stdin=file) == "what failed?", "the rest of a file is that of a loop"
        file.seek(5)
        assert after([*words, "-"], stdin=file) == "what failed?\n\nfull\nline two"
    with (tmp_path / "log").open() as file:
        assert after([], stdin=file) == "disk full\nline two"
        file.seek(0)
        assert after(["-"], stdin=file) == "disk full\nline two"
    assert after(words, stdin=subprocess.DEVNULL) == "what failed?"
    assert after(words, input=b"") == "what failed?"
    assert after(["1", "-", "1"], stdin=subprocess.DEVNULL) == "1 - 1"
    assert after(words, preexec_fn=lambda: os.close(0)) == "what failed?"
    here, there = socket.socketpair()
    with here, there:
        assert after(words, stdin=here) == "what failed?", "a socket stays open"
    assert json.loads(after(['{"prompt": "hi"}'], input=b"more"))["messages"][0]["content"] == "hi"


def test_a_loop_over_lines_asks_for_each(aios: Daemon, agent: str, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("one\ntwo\nthree\n")
    name, program = agent.removeprefix("agents/"), " ".join(AIOSCTL)
    aios.sh(
        f'cd {REPOSITORY}; while read -r line; do {program} --mount {aios.root} ask {name} "$line"; done'
        f" < {tmp_path}/lines"
    )
    assert aios.table(f"{agent}/usage")["requests"] == "3"


def test_a_pipe_that_stays_open_is_waited_for_and_said(aios: Daemon, agent: str) -> None:
    """As of ssh without -n."""
    command = [*AIOSCTL, "--mount", str(aios.root), "ask", agent.removeprefix("agents/"), "hello"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stderr
        assert process.stdin
        assert "< /dev/null ends it" in process.stderr.readline()
        process.stdin.close()
        assert process.wait(60) == 0
    assert asked(aios, agent) == "hello"


def test_a_terminal_is_not_read_for_words(aios: Daemon, agent: str) -> None:
    name = agent.removeprefix("agents/")
    with terminal([*AIOSCTL, "--mount", str(aios.root), "ask", name, "hello"], ENV) as person:
        assert person.ended() == 0
    assert asked(aios, agent) == "hello"


def test_run_in_a_pipe_joins_both_and_prints_the_answer_alone(aios: Daemon) -> None:
    done = aiosctl(aios, "run", "tiny", input="How do I see the queue?\n")
    assert done.stdout == "cat /aios/scheduler/queue\n"
    assert done.stderr == ""
    done = aiosctl(aios, "-v", "run", "tiny", "what failed?", input="a log\n")
    assert r'"content": "what failed?\n\na log\n"' in done.stderr


def test_a_model_that_is_not_there_is_named_with_those_that_are(aios: Daemon) -> None:
    for words in (["run", "smollm2", "hi"], ["ask", "-m", "smollm2", "hi"]):
        done = aiosctl(aios, *words, stdin=subprocess.DEVNULL)
        assert done.returncode == 1
        assert "no model 'smollm2' for you; there are tiny; aiosctl pull smollm2 gets it" in done.stderr
