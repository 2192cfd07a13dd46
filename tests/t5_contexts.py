"""Contexts with cp, cat, echo and chmod on the real mount, with the built-in model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.running import Daemon, wait_until
from tests.t5_users import ALICE, BOB, STAFF, as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]
TALK = """mkdir agents/ada contexts/chat && echo chat > agents/ada/context
echo 'My name is Zorvik.' > agents/ada/syscall/llm && cat agents/ada/syscall/llm"""
WHO = "echo 'What is my name?' > agents/ada/syscall/llm && cat agents/ada/syscall/llm"


@pytest.fixture
def chat(aios: Daemon) -> Iterator[None]:
    done = as_user(aios, ALICE, TALK)
    assert done.returncode == 0, done.stderr
    yield
    for path in ("agents/ada", *(f"contexts/{p.name}" for p in (aios.root / "contexts").iterdir())):
        (aios.root / path).rmdir()


def test_a_context_is_copied_out_and_in_with_cp(aios: Daemon, chat: None, tmp_path: Path) -> None:
    """Any safetensors reader opens the copied file."""
    file = tmp_path / "chat.kv"
    assert aios.sh(f"cp contexts/chat/kv {file}").stderr == ""
    with safe_open(file, "np") as opened:
        assert opened.metadata()["aios_kv"] == "1"
        assert b"Zorvik" in opened.get_tensor("about").tobytes()
        assert opened.get_tensor("tokens").shape[0] > 16
        assert opened.get_tensor("kv.0").any()
    done = aios.sh(f"mkdir contexts/copy && cp {file} contexts/copy/kv && cat contexts/copy/state")
    assert (done.stdout, done.stderr) == ("host\n", "")
    assert aios.read("contexts/copy/messages.jsonl") == aios.read("contexts/chat/messages.jsonl")
    aios.sh("echo copy > agents/ada/context")
    asked = aios.sh(WHO)
    assert "Zorvik" in asked.stdout
    assert aios.read("contexts/copy/state") == "resident\n"
    assert aios.read("contexts/copy/model") == "tiny\n"
    assert int(aios.table("agents/ada/requests/latest/usage")["cached_tokens"]) >= 16
    assert (
        aios.sh(f"cat {file} > contexts/copy/kv && dd bs=1000 if={file} of=contexts/copy/kv").returncode == 0
    )


@pytest.mark.parametrize(
    "spoil",
    [
        "echo garbage > contexts/bad/kv",
        "head -c 300 $kv > contexts/bad/kv",
        "head -c -1 $kv > contexts/bad/kv",
        "(cat $kv; echo) > contexts/bad/kv",
        "(head -c 2000 $kv; head -c -2000 $kv) > contexts/bad/kv",
        "head -c 9000000 /dev/urandom > contexts/bad/kv",
        "head -c 9000000 /dev/zero > contexts/bad/kv",
        "dd if=$kv of=contexts/bad/kv bs=1000 seek=1",
    ],
)
def test_bytes_that_are_no_kv_file_are_refused_by_their_write(
    aios: Daemon, chat: None, tmp_path: Path, spoil: str
) -> None:
    done = aios.sh(f"mkdir contexts/bad; kv={tmp_path}/kv; cat contexts/chat/kv > $kv; {spoil}")
    assert "Invalid argument" in done.stderr
    assert aios.sh("cat contexts/*/state").returncode == 0


def test_commands(aios: Daemon, chat: None) -> None:
    done = aios.sh("""cd contexts/chat; for tier in host disk; do echo "evict $tier" > ctl; cat state; done
        echo fork twin > ctl; echo truncate 1 > ctl; wc -l < messages.jsonl; wc -l < ../twin/messages.jsonl
        echo pin > ctl; echo unpin > ctl; echo evict cold > ctl; cat state""")
    assert (done.stdout.split(), done.stderr) == (["host", "disk", "1", "2", "cold"], "")
    for bad in ("fork twin", "fork ..", "truncate -1", "evict moon", "dance", ""):
        assert aios.sh(f"echo '{bad}' > contexts/chat/ctl").returncode == 1


def test_sharing_by_mode_bits(aios: Daemon, chat: None) -> None:
    """r on the folder allows to fork, w to continue. The fork is private."""
    steal = "echo fork mine > contexts/chat/ctl"
    read = "cat contexts/chat/kv > /dev/null"
    for script in (steal, read):
        assert "Permission denied" in as_user(aios, BOB, script, groups=str(STAFF)).stderr
    (aios.root / "contexts/chat").chmod(0o750)
    as_user(aios, 0, f"chgrp {STAFF} contexts/chat")
    done = as_user(aios, BOB, f"{steal} && stat -c '%u %a' contexts/mine", groups=str(STAFF))
    assert done.stdout == f"{BOB} 700\n", done.stderr
    for script in (read, "echo evict > contexts/chat/ctl", "echo x > contexts/chat/messages.jsonl"):
        assert "Permission denied" in as_user(aios, BOB, script, groups=str(STAFF)).stderr
    ask = """mkdir agents/bob && echo chat > agents/bob/context; echo mine > agents/bob/context
        echo 'What is my name?' > agents/bob/syscall/llm && cat agents/bob/syscall/llm; rmdir agents/bob"""
    done = as_user(aios, BOB, ask, groups=str(STAFF))
    assert "Zorvik" in done.stdout
    assert "Permission denied" in done.stderr
    (aios.root / "contexts/chat").chmod(0o770)
    done = as_user(aios, BOB, ask.replace("echo mine", "echo chat"), groups=str(STAFF))
    assert "Zorvik" in done.stdout
    assert done.stderr == ""


def test_a_daemon_restart_in_the_middle_of_an_answer(
    make_daemon: Callable[..., Daemon], slow_llama: Path, tmp_path: Path
) -> None:
    """cp copies the context during an answer. A daemon with a new state then continues from the copy."""
    body = json.dumps({"prompt": "a long story", "max_tokens": 600, "ignore_eos": True, "temperature": 1,
                       "seed": 3, "context": "talk"})  # fmt: skip
    here = make_daemon(model=slow_llama).start()
    here.sh(f"mkdir agents/a contexts/talk; echo '{body}' > agents/a/syscall/llm")
    wait_until(lambda: here.read("scheduler/queue").split()[16:17] not in ([], ["0"]), "a token")
    assert here.sh(f"cp contexts/talk/kv {tmp_path}/talk.kv").stderr == ""
    with safe_open(tmp_path / "talk.kv", "np") as opened:
        so_far = json.loads(opened.get_tensor("about").tobytes())["unfinished"]["tokens"]
    assert 0 < len(so_far) < 600
    whole = json.loads(here.sh("cat agents/a/syscall/llm").stdout)["choices"][0]["message"]["content"]
    here.stop()
    there = make_daemon(model=slow_llama, state=tmp_path / "elsewhere").start()
    there.sh(f"mkdir agents/a contexts/talk; cp {tmp_path}/talk.kv contexts/talk/kv")
    there.sh("""echo '{"context": "talk", "resume": true}' > agents/a/syscall/llm""")
    answer = json.loads(there.sh("cat agents/a/syscall/llm").stdout)
    assert answer["choices"][0]["message"]["content"] == whole
    assert answer["usage"]["completion_tokens"] == 600
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16


def test_a_note_is_for_who_may_use_the_context(aios: Daemon, chat: None) -> None:
    done = as_user(
        aios, ALICE, "echo one > contexts/chat/note; echo two >> contexts/chat/note; cat contexts/chat/note"
    )
    assert (done.stdout, done.stderr) == ("one\ntwo\n", "")
    assert as_user(aios, BOB, "cat contexts/chat/note").returncode != 0
    long = "head -c 1000000 /dev/zero | tr '\\0' x"
    assert (
        as_user(aios, ALICE, f"{long} > contexts/chat/note; wc -c < contexts/chat/note").stdout == "1000001\n"
    )
    assert as_user(aios, ALICE, f"({long}; {long}) > contexts/chat/note").returncode != 0
    assert "Zorvik" in as_user(aios, ALICE, "cat contexts/chat/messages.jsonl").stdout
