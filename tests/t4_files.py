"""The real mount with the built-in model, as shells and programs use the files."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.conftest import TINY
from tests.running import Daemon, together, wait_until

pytestmark = [pytest.mark.mount]
SLOW = '{"max_tokens": 1500, "ignore_eos": true}'  # goes on for seconds


def blocked(pid: int) -> bool:
    """Whether the process sleeps in a read(2) that waits for the daemon."""
    return Path(f"/proc/{pid}/wchan").read_text() == "request_wait_answer"


def ask(aios: Daemon, agent: str, text: str) -> str:
    """Ask and read on one descriptor, which is a private transaction."""
    fd = os.open(aios.root / agent / "syscall/llm", os.O_RDWR)
    try:
        os.write(fd, text.encode())
        return whole(fd).decode()
    finally:
        os.close(fd)


def whole(fd: int) -> bytes:
    """The rest of an answer."""
    return b"".join(iter(lambda: os.read(fd, 4096), b""))


def test_echo_asks_and_cat_answers(aios: Daemon, agent: str) -> None:
    done = aios.sh(
        f'echo "Repeat: mango" > {agent}/syscall/llm; cat {agent}/syscall/llm; cat {agent}/syscall/llm'
    )
    assert done.stdout == "mango\nmango\n", "reading does not consume"
    assert done.stderr == ""
    assert aios.table(f"{agent}/usage")["requests"] == "1"
    assert aios.read(f"{agent}/requests/latest/response") == "mango\n"
    assert (aios.root / agent / "requests/latest/response").stat().st_size == 6


def test_penalties_hold_over_a_kill_of_the_daemon(
    make_daemon: Callable[..., Daemon], slow_llama: Path
) -> None:
    """Also as an agent's params.json, and with keys that have no effect."""
    daemon = make_daemon(model=slow_llama).start()
    keys: dict[str, Any] = {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "logit_bias": {"100": 3}}
    for name in ("a", "b", "plain"):
        (daemon.root / f"agents/{name}").mkdir()
    daemon.write("agents/b/params.json", json.dumps({"max_tokens": 300, "ignore_eos": True, **keys}))
    body = {"prompt": "go on", "max_tokens": 300, "ignore_eos": True, "store": True, "metadata": {"job": "7"}}

    def answer(agent: str, **more: Any) -> str:
        return str(json.loads(ask(daemon, f"agents/{agent}", json.dumps({**body, **more})))["choices"])

    expected = answer("a", **keys)
    assert expected != answer("plain")
    assert json.loads(ask(daemon, "agents/b", '{"prompt": "go on"}'))["usage"]["completion_tokens"] == 300
    assert answer("b") == expected
    daemon.write("agents/a/syscall/llm", json.dumps({**body, **keys}))
    wait_until(lambda: int(daemon.table("status")["running"]) == 1, "the answer")
    daemon.kill()
    daemon.start()
    assert str(json.loads(daemon.read("agents/a/syscall/llm"))["choices"]) == expected


PYTHON = "from pathlib import *; Path('llm').write_text(Path('{}').read_text())"


@pytest.mark.parametrize("program", ["dd bs=1M of=llm if={}", f'python3 -c "{PYTHON}"'])
def test_the_rest_of_a_refused_write_is_no_request(
    aios: Daemon, agent: str, tmp_path: Path, program: str
) -> None:
    """The kernel splits a large write, and the daemon accepts the first parts."""
    file = tmp_path / "request"
    file.write_text(json.dumps({"prompt": "x" * 150_000, "temprature": 1}))
    done = aios.sh(f"cd {agent}/syscall; {program.format(file)}")
    assert done.returncode != 0
    assert "Invalid argument" in done.stderr
    assert "temprature" in aios.read(f"{agent}/log.jsonl")
    assert aios.sh(f"ls {agent}/requests").stdout == "new\n"


def test_writes_after_a_refusal_fail_until_a_read_has_reported_it(aios: Daemon, agent: str) -> None:
    done = aios.sh(f"(echo '{{\"prompt\": x,'; echo '\"b\":1}}') > {agent}/syscall/llm; ls {agent}/requests")
    assert done.stderr.count("Invalid argument") == 2
    assert done.stdout == "new\n"
    fd = os.open(aios.root / agent / "syscall/llm", os.O_RDWR)
    try:
        for wrong in (b"a\0", b'{"prompt": x}'):
            with pytest.raises(OSError, match="Invalid"):
                os.write(fd, wrong)
        os.write(fd, b"Repeat: mango")  # no byte of the earlier writes is left
        assert whole(fd) == b"mango\n"
        wrong = json.dumps({"prompt": "x" * 150_000, "temprature": 1}).encode()
        assert os.write(fd, wrong) < len(wrong)
        with pytest.raises(OSError, match="Invalid"):
            os.write(fd, b"more")
        with pytest.raises(OSError, match="Invalid"):
            os.read(fd, 100)
        os.write(fd, b"Repeat: fig")
        assert whole(fd) == b"fig\n"
    finally:
        os.close(fd)


def test_an_empty_line_goes_back_to_the_default(aios: Daemon, agent: str) -> None:
    for name, value, default in (("nice", "7", "0"), ("max_steps", "3", "8")):
        aios.write(f"{agent}/{name}", value)
        aios.write(f"{agent}/{name}", "\n")
        assert aios.read(f"{agent}/{name}") == f"{default}\n"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("max_steps", "9" * 5000), ("nice", "٣"), ("nice", "1_0"), ("tools", "nosuch"),
        ("../../scheduler/quantum", "9" * 5000), ("../../tools/calc/limit", "9" * 5000),
        ("../../models/tiny/ctl", "replicas " + "9" * 5000),
    ],
)  # fmt: skip
def test_an_invalid_value_is_einval(aios: Daemon, agent: str, file: str, text: str) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        aios.write(f"{agent}/{file}", text)


def test_a_call_that_ends_within_a_character_fails_with_a_reason(aios: Daemon, agent: str) -> None:
    fd = os.open(aios.root / agent / "syscall/tool", os.O_RDWR)
    try:
        os.write(fd, b'{"name": "calc", "arguments": "\xc3')
        with pytest.raises(OSError, match="Input/output"):
            os.read(fd, 100)
    finally:
        os.close(fd)
    assert "not UTF-8" in aios.read(f"{agent}/requests/latest/error")


def test_a_shell_has_a_private_transaction_on_one_descriptor(aios: Daemon, agent: str) -> None:
    done = aios.sh(
        f'exec 3<>{agent}/syscall/llm; echo "Repeat: kiwi" >&3; cat <&3; echo "Repeat: fig" >&3; cat <&3'
    )
    assert done.stdout == "kiwi\nfig\n"


@pytest.mark.parametrize(
    "script",
    [
        "{{ printf 'Repeat: '; echo plum; }} > {llm}",
        "printf 'Repeat: plum' | tee {llm} > /dev/null",
        "printf 'Repeat: plum' > $TMP && cp $TMP {llm}",
        "printf 'Repeat: plum' | dd bs=1 of={llm} status=none",
        "exec 4>{llm}; printf 'Repeat: ' >&4; echo plum >&4; exec 4>&-",
        "(printf 'Repeat: '; sh -c 'echo plum') >> {llm}",
        'python3 -c \'open("{llm}", "w").write("Repeat: plum")\'',
        "printf 'Repeat: plum' | sh -c 'cat > {llm}'",
    ],
)
def test_every_tool_writes_one_request(aios: Daemon, agent: str, script: str, tmp_path: Path) -> None:
    done = aios.sh(
        script.format(llm=f"{agent}/syscall/llm") + f"; cat {agent}/syscall/llm",
        env={**os.environ, "TMP": str(tmp_path / "x")},
    )
    assert done.stdout == "plum\n", done.stderr
    assert aios.table(f"{agent}/usage")["requests"] == "1"


def test_after_a_refused_write_an_older_answer_is_not_taken_for_the_new_one(aios: Daemon, agent: str) -> None:
    llm, ask = f"{agent}/syscall/llm", "echo 'Repeat: pear' > {0} && cat {0}"
    assert aios.sh(ask.format(llm)).stdout == "pear\n"
    refused = aios.sh(f"echo '{{\"nonsense\": 1}}' > {llm}; cat {llm}")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "Invalid argument" in refused.stderr.splitlines()[-1]
    assert aios.sh(f"cat {llm}; cat {llm}").returncode == 1, "and so until there is a newer request"
    assert aios.sh(f"exec 3<>{llm}; echo 'Repeat: fig' >&3; cat <&3").stdout == "fig\n"
    assert aios.sh(f"cat {llm}").stdout == "fig\n"
    assert aios.sh(f"exec 3<>{llm}; echo '{{}}' >&3; cat <&3").returncode == 1
    assert aios.sh(f"cat {llm}").stdout == "fig\n", "a private transaction is nobody else's"


def test_a_private_descriptor_of_the_file_delays_no_question(aios: Daemon, agent: str) -> None:
    """The shell that holds it also writes by `>`: each close of that is the last."""
    llm = f"{agent}/syscall/llm"
    asking = f"for w in mango fig kiwi mango fig; do echo Repeat: $w > {llm} && cat {llm}; done"
    assert aios.sh(f"exec 3<>{llm}; {asking}").stdout.split() == ["mango", "fig", "kiwi", "mango", "fig"]


@pytest.mark.parametrize(
    "script",
    [
        ": > {llm}",
        "printf '' > {llm}",
        "cat /dev/null > {llm}",
        "cp /dev/null {llm}",
        "sh -c 'exec 4>{llm}; exec 4>&-'",
        'python3 -c \'open("{llm}", "w").close()\'',
        "exec 3<>{llm}; cat /dev/null >&3; cat <&3 && exit 9",
    ],
)
def test_an_older_answer_is_not_taken_for_that_to_an_empty_question(
    aios: Daemon, agent: str, script: str
) -> None:
    """A script asks nothing when the program that makes its question prints nothing."""
    llm = f"{agent}/syscall/llm"
    assert aios.sh(f"echo 'Repeat: pear' > {llm} && cat {llm}").stdout == "pear\n"
    done = aios.sh(script.format(llm=llm))
    assert (done.returncode != 9, done.stdout) == (True, "")
    if "exec 3" not in script:  # that one is nobody else's
        read = aios.sh(f"cat {llm}")
        assert (read.returncode, read.stdout) == (1, "")
    assert "empty" in aios.read(f"{agent}/syscall/error")
    assert aios.sh(f"echo 'Repeat: fig' > {llm} && cat {llm}").stdout == "fig\n"
    assert aios.table(f"{agent}/usage")["requests"] == "2"


def test_json_in_json_out(aios: Daemon, agent: str) -> None:
    request = {"messages": [{"role": "user", "content": "Repeat: lime"}], "logprobs": True, "top_logprobs": 2}
    answer = json.loads(ask(aios, agent, json.dumps(request)))
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "lime"}
    assert choice["finish_reason"] == "stop"
    tokens = choice["logprobs"]["content"]
    assert "".join(t["token"] for t in tokens).startswith("lime")
    assert all(len(t["top_logprobs"]) == 2 and t["logprob"] <= 0 for t in tokens)
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + len(tokens)


def test_the_bytes_of_tokens_add_up_where_their_texts_do_not(aios: Daemon, agent: str) -> None:
    """A token may hold a part of a character, whose text is a replacement character."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "🦜"}}}
    request = {"prompt": "Who are you?", "response_format": form, "logprobs": True, "top_logprobs": 1}
    [choice] = json.loads(ask(aios, agent, json.dumps(request)))["choices"]
    tokens = choice["logprobs"]["content"]
    assert b"".join(bytes(t["bytes"]) for t in tokens).decode() == choice["message"]["content"] == '"🦜"'
    assert any("\N{REPLACEMENT CHARACTER}" in t["token"] for t in tokens), "no token had half of it"
    assert all(isinstance(top["bytes"], list) for t in tokens for top in t["top_logprobs"])


def test_a_json_stream_adds_up_to_the_answer(aios: Daemon, agent: str) -> None:
    request = {"messages": [{"role": "user", "content": "Repeat: Paris London Rome"}], "stream": True}
    chunks = [json.loads(line) for line in ask(aios, agent, json.dumps(request)).splitlines()]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Paris London Rome"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert len(chunks) > 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_names_the_text_that_stopped_it(aios: Daemon, agent: str, stream: bool) -> None:
    request = {"prompt": "Repeat: Paris London Rome", "stop": ["nowhere", " Rome"], "stream": stream}
    [choice] = json.loads(ask(aios, agent, json.dumps(request)).splitlines()[-1])["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", " Rome")
    [choice] = json.loads(ask(aios, agent, json.dumps(request | {"stop": ["nowhere"]})).splitlines()[-1])[
        "choices"
    ]
    assert "stop_reason" not in choice


def test_the_answer_streams_while_it_is_made(aios: Daemon, agent: str) -> None:
    aios.write(f"{agent}/params.json", SLOW)
    fd = os.open(aios.root / agent / "syscall/llm", os.O_RDWR)
    os.write(fd, b"Hello")
    os.read(fd, 1)
    assert aios.read(f"{agent}/state") == "running\n", "the first byte is there before the last"
    os.close(fd)
    wait_until(lambda: aios.read(f"{agent}/requests/latest/state") == "cancelled\n", "the cancel")


def test_pread_at_any_offset(aios: Daemon, agent: str) -> None:
    assert ask(aios, agent, "Repeat: abcdef") == "abcdef\n"
    fd = os.open(aios.root / agent / "syscall/llm", os.O_RDONLY)
    assert os.pread(fd, 3, 2) == b"cde"
    assert os.pread(fd, 100, 0) == b"abcdef\n"
    assert os.pread(fd, 100, 7) == b""
    assert os.pread(fd, 100, 1 << 40) == b""
    os.close(fd)


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_reader_killed_while_blocked_exits_at_once(aios: Daemon, agent: str, signal_: int) -> None:
    aios.write(f"{agent}/ctl", "pause")
    aios.write(f"{agent}/syscall/llm", "Hello")
    reader = subprocess.Popen(  # where the tests run in the background, SIGINT is ignored
        ["env", "--default-signal=INT", "cat", aios.root / agent / "syscall/llm"], stdout=subprocess.PIPE
    )
    wait_until(lambda: blocked(reader.pid), "the block")
    began = time.monotonic()
    reader.send_signal(signal_)
    reader.wait(5)
    assert time.monotonic() - began < 1.0  # 0.1 s on a quiet machine; what is tested is that it does not wait
    assert aios.read(f"{agent}/requests/latest/state") == "queued\n", "closing a reader cancels nothing"


def test_a_killed_private_client_frees_its_request(aios: Daemon, agent: str) -> None:
    aios.write(f"{agent}/params.json", SLOW)
    llm = aios.root / agent / "syscall/llm"
    client = subprocess.Popen(["sh", "-c", f"exec 3<>{llm}; echo Hello >&3; cat <&3 >/dev/null"])
    wait_until(lambda: aios.read(f"{agent}/state") == "running\n", "its start")
    subprocess.run(["pkill", "-KILL", "-P", str(client.pid)])
    client.kill()
    client.wait()
    wait_until(lambda: aios.read(f"{agent}/requests/latest/state") == "cancelled\n", "the cancel")


def test_nonblocking_reads_poll_and_epoll(aios: Daemon, agent: str) -> None:
    aios.write(f"{agent}/ctl", "pause")
    fd = os.open(aios.root / agent / "syscall/llm", os.O_RDWR | os.O_NONBLOCK)
    os.write(fd, b"Repeat: pear")
    with pytest.raises(BlockingIOError):
        os.read(fd, 100)
    poll, epoll = select.poll(), select.epoll()
    poll.register(fd, select.POLLIN)
    epoll.register(fd, select.EPOLLIN | select.EPOLLET)
    assert poll.poll(0) == []
    assert epoll.poll(0) == []
    threading.Timer(0.2, lambda: aios.write(f"{agent}/ctl", "resume")).start()
    assert poll.poll(20000), "poll(2) sleeps until there is something"
    assert epoll.poll(20)
    answer = b""
    while not answer.endswith(b"\n"):
        try:
            answer += os.read(fd, 100)
        except BlockingIOError:
            poll.poll(20000)
    assert answer == b"pear\n"
    os.close(fd)


def test_one_asyncio_thread_waits_on_many_requests(aios: Daemon, agent: str) -> None:
    async def one(i: int) -> str:
        fd = os.open(aios.root / agent / "syscall/llm", os.O_RDWR | os.O_NONBLOCK)
        os.write(fd, f"Repeat: word{i}".encode())
        loop, answer = asyncio.get_running_loop(), b""
        while not answer.endswith(b"\n"):
            ready = asyncio.Event()
            loop.add_reader(fd, ready.set)
            await ready.wait()
            loop.remove_reader(fd)
            try:
                answer += os.read(fd, 4096)
            except BlockingIOError:
                continue
        os.close(fd)
        return answer.decode()

    async def all_of_them() -> list[str]:
        return await asyncio.wait_for(asyncio.gather(*(one(i) for i in range(40))), 60)

    alone = [ask(aios, agent, f"Repeat: word{i}") for i in range(40)]
    assert asyncio.run(all_of_them()) == alone


def test_64_shell_clients_at_once_each_get_their_own_answer(aios: Daemon, agent: str) -> None:
    """Each answer must equal the answer to the same question asked alone."""
    words = ["Paris", "London", "Rome", "Berlin", "Madrid", "Oslo", "Lima", "Cairo"]
    questions = [f"Repeat: {one} {other}" for one in words for other in words]
    alone = {i: ask(aios, agent, question) for i, question in enumerate(questions)}
    assert len(set(alone.values())) > 30, "the answers tell the questions apart"
    answers: dict[int, str] = {}

    def client(i: int) -> None:
        llm = f"agents/c{i}/syscall/llm"
        done = aios.sh(f'mkdir agents/c{i}; echo "{questions[i]}" > {llm}; cat {llm}; rmdir agents/c{i}')
        answers[i] = done.stdout
        assert done.stderr == ""

    together(*(lambda i=i: client(i) for i in range(64)))
    assert answers == alone


def test_a_conversation_remembers(aios: Daemon, agent: str) -> None:
    (aios.root / "contexts/talk").mkdir()
    try:
        aios.write(f"{agent}/context", "talk")
        ask(aios, agent, "My name is Ada.")
        assert "Ada" in ask(aios, agent, "What is my name?")
        lines = [json.loads(line) for line in aios.read("contexts/talk/messages.jsonl").splitlines()]
        assert [m["role"] for m in lines] == ["user", "assistant"] * 2
        assert int(aios.read("contexts/talk/tokens")) > 10
        assert aios.read("contexts/talk/state") == "resident\n"
        assert aios.sh("> contexts/talk/messages.jsonl").returncode == 0
        assert aios.read("contexts/talk/messages.jsonl") == ""
    finally:
        (aios.root / "contexts/talk").rmdir()


def test_a_request_allocated_by_new_is_used_by_its_id(aios: Daemon, agent: str) -> None:
    done = aios.sh(
        f"id=$(cat {agent}/requests/new); echo 'Repeat: date' > {agent}/requests/$id/request;"
        f"cat {agent}/requests/$id/response {agent}/requests/$id/state;"
        f"readlink {agent}/requests/latest; echo $id"
    )
    answer, state, latest, id = done.stdout.split()
    assert (answer, state, latest) == ("date", "done", id)


def test_a_running_request_is_cancelled_and_its_reader_told(aios: Daemon, agent: str) -> None:
    aios.write(f"{agent}/params.json", SLOW)
    aios.write(f"{agent}/syscall/llm", "Hello")
    id = os.readlink(aios.root / agent / "requests/latest")
    threading.Timer(0.3, lambda: aios.write(f"{agent}/requests/{id}/ctl", "cancel")).start()
    done = aios.sh(f"cat {agent}/syscall/llm")
    assert done.returncode == 1
    assert "Input/output error" in done.stderr
    assert aios.read(f"{agent}/requests/{id}/error") == "cancelled\n"
    assert "cancelled" in aios.read(f"{agent}/log.jsonl")


def test_rmdir_ends_an_agent_under_a_blocked_reader(aios: Daemon, agent: str) -> None:
    aios.write(f"{agent}/ctl", "pause")
    aios.write(f"{agent}/syscall/llm", "Hello")
    reader = subprocess.Popen(["cat", aios.root / agent / "syscall/llm"], stderr=subprocess.PIPE)
    wait_until(lambda: blocked(reader.pid), "the block")
    (aios.root / agent).rmdir()
    assert reader.wait(5) == 1


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("head -c 1000 /dev/urandom > {llm}", "Invalid argument"),
        ("echo > {llm}", "Invalid argument"),
        ("head -c 100000000 /dev/zero | tr '\\0' x > {llm}", "File too large"),
        ("echo nosuch > {agent}/model", "Invalid argument"),
        (
            """echo '{{"messages":[{{"role":"user","content":"x"}}],"model":"nosuch"}}' > {llm}""",
            "No such file",
        ),
        ("echo 77 > {agent}/nice", "Invalid argument"),
        ("rm -f {agent}/state", "Operation not permitted"),
        ("mv {agent} agents/else", "Operation not permitted"),
        ("touch {agent}/new", "Operation not permitted"),
        ("mkdir {agent}/new", "Operation not permitted"),
        ("mkdir agents/.hidden", "Invalid argument"),
        ("ln -s /etc/passwd {agent}/x", "Operation not permitted"),
        ("cat {agent}/ctl", "Operation not permitted"),
        ("cat {agent}/requests/99999/state", "No such file"),
    ],
)
def test_misuse_gets_an_errno_at_the_call(aios: Daemon, agent: str, script: str, words: str) -> None:
    done = aios.sh(script.format(agent=agent, llm=f"{agent}/syscall/llm"))
    assert done.returncode != 0
    assert words in done.stderr
    assert aios.table("status")["state"] == "running"
    assert aios.table(f"{agent}/usage")["requests"] == "0"


def test_garbage_names_and_calls_leave_the_daemon_alive(aios: Daemon, agent: str) -> None:
    root = os.fsencode(aios.root)
    for name in (b"\xff\xfe", b"a" * 300, b"x\ny"):
        with pytest.raises(OSError):
            os.stat(root + b"/agents/" + name)
        with pytest.raises(OSError):
            os.mkdir(root + b"/agents/" + name)
    fd = os.open(aios.root / agent / "nice", os.O_RDWR)
    for call in (lambda: os.pread(fd, 10, 1 << 62), lambda: os.ftruncate(fd, 1 << 40), lambda: os.fsync(fd)):
        try:
            call()
        except OSError as error:
            assert error.errno in (errno.EINVAL, errno.EFBIG, errno.EPERM)
    os.close(fd)
    assert aios.read("version")


def test_the_policy_is_switched_live_and_nothing_is_lost(aios: Daemon, agent: str) -> None:
    alone = [ask(aios, agent, f"Repeat: item{i}") for i in range(30)]
    answers: dict[int, str] = {}

    def client(i: int) -> None:
        answers[i] = ask(aios, agent, f"Repeat: item{i}")

    def switch() -> None:
        for name in ("rr", "fifo") * 10:
            aios.write("scheduler/policy", name)
            time.sleep(0.02)

    before = {name: aios.read(name) for name in ("scheduler/policy", "scheduler/quantum")}
    aios.write("scheduler/quantum", "2")
    try:
        together(switch, *(lambda i=i: client(i) for i in range(30)))
    finally:
        for name, value in before.items():
            aios.write(name, value)
    assert answers == dict(enumerate(alone))


def test_the_daemon_is_small_and_never_imports_torch(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon().start()
    assert daemon.process is not None
    process = Path(f"/proc/{daemon.process.pid}")
    rss_kb = next(
        int(line.split()[1])
        for line in (process / "status").read_text().splitlines()
        if line.startswith("VmRSS")
    )
    assert rss_kb < 48 * 1024
    assert "torch" not in (process / "maps").read_text()
    assert daemon.stop() == 0


def test_a_text_is_tokenized_and_embedded(aios: Daemon) -> None:
    def asked(file: str, text: str) -> dict[str, Any]:
        path = f"models/tiny/{file}"
        aios.write(path, text)
        answer: dict[str, Any] = json.loads(aios.read(path))
        return answer

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    text = "What is the tallest building in Zorvik?"
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    for written in (text, text + "\n", json.dumps({"prompt": text})):
        assert asked("tokenize", written) == {"count": len(tokens), "tokens": tokens, "model": "tiny"}
    answer = asked("embed", text)
    assert answer["usage"] == {"prompt_tokens": len(tokens), "total_tokens": len(tokens)}
    vector = answer["data"][0]["embedding"]
    assert len(vector) == 192
    assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-5)
    assert asked("embed", json.dumps({"input": text, "model": "tiny"})) == answer

    def likeness(other: str) -> float:
        there = asked("embed", other)["data"][0]["embedding"]
        return float(sum(x * y for x, y in zip(vector, there, strict=True)))

    assert likeness("What is the tallest building in Zorvok?") > likeness("echo pause > ctl")
    for file in ("embed", "tokenize"):
        for wrong in ('{"input": 5}', '{"text": "x"}', "{}", '{"input": " "}', "\n",
                      '{"input": "x", "prompt": "y"}', '{"input": "x", "model": "other"}'):  # fmt: skip
            with pytest.raises(OSError, match="Invalid argument"):
                aios.write(f"models/tiny/{file}", wrong)
    ends = json.dumps({"input": f"{text}\n\n"})
    assert asked("tokenize", ends)["count"] > len(tokens), "in JSON the text is what it is"
    assert asked("tokenize", "word " * 20_000)["count"] > 20_000
    assert asked("embed", "word " * 20_000)["error"]["message"].startswith("the prompt has")


def test_the_tokens_of_a_conversation_are_those_of_its_prompt(aios: Daemon) -> None:
    def asked(file: str, **keys: object) -> dict[str, Any]:
        aios.write(f"models/tiny/{file}", json.dumps(keys))
        answer: dict[str, Any] = json.loads(aios.read(f"models/tiny/{file}"))
        return answer

    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"}]
    function = {"name": "calc", "description": "Calculate", "parameters": {"type": "object"}}
    keys = {"messages": said, "tools": [{"type": "function", "function": function}], "enable_thinking": False}
    counts = [asked("tokenize", messages=said)["count"], asked("tokenize", **keys)["count"]]
    used = [asked("llm", messages=said, max_tokens=1)["usage"], asked("llm", **keys, max_tokens=1)["usage"]]
    assert counts == [usage["prompt_tokens"] for usage in used]
    assert counts[0] < counts[1]
    assert asked("tokenize", **keys, tool_choice="none")["count"] == counts[0]
    for wrong in ({"messages": ""}, {"max_tokens": 1}, {"model": "other"}, {"input": "x"}):
        with pytest.raises(OSError, match="Invalid argument"):
            asked("tokenize", **{"messages": said, **wrong})


def test_a_crowd_of_readers_gets_the_whole_answer_and_can_be_killed(aios: Daemon, agent: str) -> None:
    """More threads of one user wait than the daemon wakes at once."""
    read = f"""
import threading
got = []
def read():
    with open("{agent}/syscall/llm", "rb", buffering=0) as file:
        got.append(b"".join(iter(lambda: file.read(100), b"")))
threads = [threading.Thread(target=read) for _ in range(150)]
for thread in threads:
    thread.start()
print("begun", flush=True)
for thread in threads:
    thread.join()
print(len(got), len(set(got)), len(got[0]) > 300)
"""
    for kill in (True, False):
        aios.write(f"{agent}/ctl", "pause")
        aios.write(
            f"{agent}/syscall/llm", '{"prompt": "x", "max_tokens": 400, "ignore_eos": true, "stream": true}'
        )
        crowd = subprocess.Popen(
            [sys.executable, "-c", read], cwd=aios.root, stdout=subprocess.PIPE, text=True
        )
        assert crowd.stdout
        assert crowd.stdout.readline() == "begun\n"
        if kill:
            time.sleep(0.5)
            crowd.kill()
            assert crowd.wait(20) == -signal.SIGKILL
        aios.write(f"{agent}/ctl", "resume")
        wait_until(lambda: aios.read(f"{agent}/state") == "idle\n", "the answer", 60)
        assert kill or crowd.stdout.read() == "150 1 True\n"
        crowd.stdout.close()
