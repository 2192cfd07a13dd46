"""Access rules, privilege groups and users' own tools, with real users on the real mount."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.running import Daemon, wait_until
from tests.t5_tools import call, pending
from tests.t5_users import ALICE, BOB, as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]

GREET = """description = "Greet somebody"
command = ["./program"]
[parameters]
type = "object"
required = ["name"]
properties.name.type = "string"
"""
PROGRAM = "#!/bin/sh\necho hello from $(id -u): $(cat)\n"


@pytest.fixture
def greet(aios: Daemon, tmp_path: Path) -> Iterator[str]:
    """A tool of alice that all users may call."""
    (tmp_path / "tool.toml").write_text(GREET)
    (tmp_path / "greet").write_text(PROGRAM)
    let_in(tmp_path)
    made = as_user(
        aios,
        ALICE,
        f"mkdir tools/greet && cp {tmp_path}/tool.toml tools/greet/manifest && "
        f"cp {tmp_path}/greet tools/greet/program && chmod 755 tools/greet",
    )
    assert made.stderr == ""
    yield "tools/greet"
    as_user(aios, ALICE, "rmdir tools/greet; echo > access/owners")
    as_user(aios, BOB, "echo > access/owners")


def let_in(folder: Path) -> None:
    """A folder that other users can reach."""
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)


def run(file: str, text: str) -> str:
    return f"exec 3<>{file} && echo '{text}' >&3 && cat <&3"


# users' own tools


def test_a_users_own_tool_is_a_folder_with_a_manifest_and_a_program(aios: Daemon, greet: str) -> None:
    assert os.listdir(aios.root / greet) == [
        "schema.json", "info", "call", "error", "limit", "stats", "manifest", "program",
    ]  # fmt: skip
    assert aios.read(f"{greet}/manifest") == GREET
    assert (aios.root / greet / "program").stat().st_size == len(PROGRAM)
    done = as_user(aios, ALICE, run(f"{greet}/call", '{"name":"ada"}'))
    assert done.stdout == f'hello from {ALICE}: {{"name": "ada"}}\n'
    assert "Invalid" in as_user(aios, ALICE, run(f"{greet}/call", "{}")).stderr


def test_anothers_tool_runs_once_its_owner_is_allowed(aios: Daemon, greet: str) -> None:
    ask = run(f"{greet}/call", '{"name":"bob"}')
    assert "denied" in as_user(aios, BOB, ask).stderr
    assert "denied" in as_user(aios, 0, ask).stderr
    remedy = f"echo {ALICE} >> access/owners"
    script = "mkdir agents/bo; echo greet > agents/bo/tools; cat agents/bo/log.jsonl; rmdir agents/bo"
    assert remedy in as_user(aios, BOB, script).stdout
    assert "Invalid" in as_user(aios, BOB, "echo nosuchuser > access/owners").stderr
    done = as_user(aios, BOB, f"echo {ALICE} >> access/owners; cat access/owners; {ask}")
    assert done.stdout == f'{ALICE}\nhello from {BOB}: {{"name": "bob"}}\n'
    assert aios.read("access/owners") == "\n"
    assert "denied" in as_user(aios, BOB, f"echo > access/owners; {ask}").stderr


def test_only_the_owner_changes_a_tool(aios: Daemon, greet: str) -> None:
    for script in ("echo x > manifest", "echo x > program", "echo 1 > limit", "chmod 777 ."):
        done = as_user(aios, BOB, f"cd {greet}; {script}")
        assert "denied" in done.stderr or "not permitted" in done.stderr
    assert "not permitted" in as_user(aios, BOB, f"rmdir {greet}").stderr
    assert "exists" in as_user(aios, BOB, f"mkdir {greet}").stderr
    assert "exists" in as_user(aios, BOB, "mkdir tools/calc").stderr
    assert "not permitted" in aios.sh("rmdir tools/calc").stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('network = ["example.org:443"]', "network is only for tools of the administrator"),
        ('exclusive = "db"', "exclusive is only for tools of the administrator"),
        ('write = ["/home"]', "write is only for tools of the administrator"),
        ("limit = 500", "limit is at most 16"),
        ("timeout_s = nan", "a value is a date, nan or inf"),
        ("parameters.default = 2020-01-01", "a value is a date, nan or inf"),
        (".".join("a" * 20_000) + " = 1", "more than 200 dots"),
        ('command = ["./other"]', "command names a file other than ./program"),
        ('name = "calc"', "the tool 'calc' is in a folder 'greet'"),
        ("a = " + "[" * 2000 + "]" * 2000, "nested too deep"),
        ("= 5", "Invalid"),
    ],
)
def test_a_bad_manifest_is_refused_and_info_says_why(aios: Daemon, greet: str, line: str, said: str) -> None:
    kept = [one for one in GREET.splitlines() if one.partition(" ")[0] != line.partition(" ")[0]]
    if line.startswith("parameters."):
        line, kept = "", [*kept, line.removeprefix("parameters.")]
    with pytest.raises(OSError, match="Invalid argument"):
        aios.write(f"{greet}/manifest", "\n".join([line, *kept]))
    assert said in json.loads(aios.read(f"{greet}/info"))["error"]
    assert aios.read(f"{greet}/manifest") == GREET


def test_checks_that_could_take_for_ever_are_left_to_the_program(aios: Daemon, greet: str) -> None:
    slow = """properties.name.pattern = "(a+)+$"\nproperties.again."$ref" = "#"\n"""
    assert as_user(aios, ALICE, f"cat > {greet}/manifest <<'E'\n{GREET}{slow}E\n").stderr == ""
    done = as_user(aios, ALICE, run(f"{greet}/call", json.dumps({"name": "a" * 40 + "!", "again": {}})))
    assert "hello" in done.stdout or "Invalid" in done.stderr


def test_arguments_of_very_many_parts_are_refused(aios: Daemon, greet: str) -> None:
    aios.write(
        f"{greet}/manifest", GREET + 'properties.list.items.anyOf = [{type="string"}, {type="null"}]\n'
    )
    many = """(echo -n '{"name": "a", "list": ['; yes 0, | head -50000; echo '0]}')"""
    script = f"exec 3<>{greet}/call; {many} >&3; cat <&3"
    assert "Input/output error" in as_user(aios, ALICE, script).stderr


def test_a_tool_without_a_manifest_cannot_be_called(aios: Daemon) -> None:
    done = as_user(aios, ALICE, "mkdir tools/bare; echo '{}' > tools/bare/call; rmdir tools/bare")
    assert "No such file" in done.stderr


def test_a_line_of_very_many_owners_is_refused(aios: Daemon) -> None:
    many = " ".join(map(str, range(10_000, 11_000)))
    assert "Invalid" in as_user(aios, ALICE, f"echo {many} > access/owners").stderr


def test_a_call_that_waits_ends_with_its_tool(aios: Daemon, greet: str) -> None:
    aios.write(f"{greet}/manifest", f"irreversible = true\n{GREET}")
    as_user(
        aios,
        ALICE,
        """mkdir agents/al; echo '{"name":"greet","arguments":{"name":"x"}}' > agents/al/syscall/tool""",
    )
    wait_until(lambda: bool(pending(aios)), "the call to wait")
    as_user(aios, ALICE, "rmdir tools/greet")
    wait_until(lambda: not pending(aios), "the call to end")
    done = as_user(aios, ALICE, "cat agents/al/requests/latest/error; rmdir agents/al")
    assert done.stdout == "its tool was removed\n"


def test_own_tools_are_there_after_kill_9(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    let_in(tmp_path)
    daemon = make_daemon().start()
    made = as_user(
        daemon, ALICE,
        f"mkdir tools/greet; echo '{GREET}' > tools/greet/manifest; printf '{PROGRAM}' > tools/greet/program;"
        f"echo {BOB} > access/owners",
    )  # fmt: skip
    assert made.stderr == ""
    daemon.kill()
    daemon.start()
    done = as_user(daemon, ALICE, run("tools/greet/call", '{"name":"ada"}') + "; cat access/owners")
    assert done.stdout == f'hello from {ALICE}: {{"name": "ada"}}\n{BOB}\n'
    assert "denied" in as_user(daemon, BOB, "ls tools/greet").stderr


def test_the_administrators_tool_takes_the_place_of_a_users(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    let_in(tmp_path)
    daemon = make_daemon(f"[tools]\nfolder = '{tmp_path}/tools.d'\n").start()
    as_user(daemon, ALICE, f"mkdir tools/greet; echo '{GREET}' > tools/greet/manifest; chmod 755 tools/greet")
    assert "Invalid" in as_user(daemon, ALICE, "mkdir tools/server.tool").stderr
    folder = tmp_path / "tools.d/greet"
    folder.mkdir(parents=True)
    (folder / "tool.toml").write_text('name = "greet"\n' + GREET.replace("./program", "/bin/true"))
    assert daemon.process
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: (daemon.root / "tools/greet").stat().st_uid == 0, "the reload")
    assert "/bin/true" in daemon.read("tools/greet/info")
    assert as_user(daemon, BOB, run("tools/greet/call", '{"name":"b"}')).stderr == ""
    assert "not permitted" in as_user(daemon, ALICE, "chmod 700 tools/greet").stderr
    assert not (daemon.state / "tools/greet").exists()


def test_a_tool_makes_no_tool(aios: Daemon) -> None:
    """Otherwise a tool could make another tool that runs with all rights of the caller."""
    code = "import os; os.mkdir('/aios/tools/evil')"
    done = as_user(aios, ALICE, run("tools/python/call", json.dumps({"code": code})) + "; ls tools")
    assert "evil" not in done.stdout


def test_a_quota_bounds_the_tools_of_a_user(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon("[quota]\ntools = 2\n").start()
    assert "quota" in as_user(daemon, ALICE, "mkdir tools/a tools/b tools/c").stderr.lower()


# rules


RULES = """
[[rule]]
tool = "calc"
arguments = { expression = ["*1/0*", "*cheat*"] }
decision = "deny"
why = "nobody divides by zero here"

[[rule]]
tool = ["clock", "sleep*"]
user = "61001"
decision = "ask"
by = "%s"

[[rule]]
privilege = "night"
tool = "shell"
decision = "allow"
"""


@pytest.fixture
def ruled(make_daemon: Callable[..., Daemon], tmp_path: Path) -> Daemon:
    let_in(tmp_path)
    folder = tmp_path / "policies/access"
    folder.mkdir(parents=True)
    (folder / "house.toml").write_text(RULES % "games")
    return make_daemon(f"[scheduler]\npolicies = '{tmp_path}/policies'\n").start()


def test_a_rule_denies_by_what_the_arguments_say(ruled: Daemon) -> None:
    ruled.sh("mkdir agents/a")
    assert call(ruled, "tools/calc/call", '{"expression": "1/2"}') == (0, "0.5\n")
    ruled.write("agents/a/syscall/tool", '{"name": "calc", "arguments": {"expression": "2+1/0"}}')
    with pytest.raises(OSError, match="Input/output"):
        ruled.read("agents/a/syscall/tool")
    assert "nobody divides by zero here" in ruled.read("agents/a/requests/latest/error")
    last = [json.loads(line) for line in ruled.read("access/audit.jsonl").splitlines()]
    assert {"what": "called", "decision": "deny", "rule": "house.toml, rule 1"}.items() <= last[-2].items()
    assert "nobody divides" in ruled.read("access/rules")


def test_where_a_rule_names_a_group_its_members_decide_and_not_the_caller(ruled: Daemon) -> None:
    import grp

    games = str(grp.getgrnam("games").gr_gid)
    as_user(ruled, ALICE, "mkdir agents/al; echo clock > access/allowed/al/tools")
    ask = """echo '{"name":"clock","arguments":{"zone":"UTC"}}' > agents/al/syscall/tool"""
    assert as_user(ruled, ALICE, ask).stderr == ""
    [id] = pending(ruled)
    assert "denied" in as_user(ruled, ALICE, f"echo allow > access/pending/{id}/decision").stderr
    assert "denied" in as_user(ruled, BOB, f"cat access/pending/{id}/request.json").stderr
    shown = as_user(ruled, BOB, f"cat access/pending/{id}/request.json", groups=games)
    assert json.loads(shown.stdout)["tool"] == "clock"
    always = as_user(ruled, BOB, f"echo allow always > access/pending/{id}/decision", groups=games)
    assert "Invalid" in always.stderr
    allow = as_user(ruled, BOB, f"echo allow > access/pending/{id}/decision", groups=games)
    assert allow.stderr == ""
    assert "20" in as_user(ruled, ALICE, "cat agents/al/syscall/tool").stdout
    assert call(ruled, "tools/clock/call", '{"zone": "UTC"}')[0] == 0  # no rule asks about other tools


def test_a_privilege_group_is_of_agents_and_lasts_no_longer_than_they(ruled: Daemon) -> None:
    shell = '{"name": "shell", "arguments": {"command": "echo done"}}'
    assert "denied" in as_user(ruled, ALICE, "mkdir access/groups/night").stderr
    ruled.sh("mkdir agents/owl access/groups/night; echo owl > access/groups/night/agents")
    assert call(ruled, "agents/owl/syscall/tool", shell) == (0, "done\n")
    with pytest.raises(OSError, match="No such file"):
        ruled.write("access/groups/night/agents", "nosuch")
    ruled.kill()
    ruled.start()
    assert ruled.read("access/groups/night/agents") == "owl\n"
    ruled.sh("rmdir agents/owl; mkdir agents/owl")
    assert ruled.read("access/groups/night/agents") == "\n"
    ruled.write("agents/owl/syscall/tool", shell)
    wait_until(lambda: bool(pending(ruled)), "the call of another owl to wait")
    ruled.sh(f"cd access/groups/night; chgrp {BOB} . agents; chmod 750 .; chmod 660 agents")
    assert as_user(ruled, BOB, "echo owl > access/groups/night/agents").stderr == ""
    assert "denied" in as_user(ruled, ALICE, "cat access/groups/night/agents").stderr
    ruled.sh("rmdir access/groups/night; mkdir access/groups/night")
    assert "denied" in as_user(ruled, BOB, "cat access/groups/night/agents").stderr


def test_bad_rules_are_not_taken_over(ruled: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "policies/access/house.toml"
    file.write_text('[[rule]]\ndecision = "perhaps"\n')
    assert ruled.process
    ruled.process.send_signal(1)
    wait_until(lambda: "not reloaded" in ruled.log.read_text(), "the reload")
    assert "nobody divides" in ruled.read("access/rules")
    ruled.stop()
    with pytest.raises(AssertionError, match="'perhaps' is not one of"):
        ruled.start()


# who is told


def test_the_administrators_program_notifies_the_user_who_decides(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    let_in(tmp_path)
    (tmp_path / "told").mkdir()
    (tmp_path / "told").chmod(0o777)
    hook = tmp_path / "notify"
    hook.write_text(
        f'#!/bin/sh\necho "$AIOS_TOOL $AIOS_AGENT $(id -u)" > {tmp_path}/told/$AIOS_REQUEST; sleep 60\n'
    )
    hook.chmod(0o755)
    daemon = make_daemon(f"[tools]\nnotify = '{hook}'\n").start()
    shell = '{"name": "shell", "arguments": {"command": "true"}}'
    as_user(daemon, ALICE, f"mkdir agents/al; echo '{shell}' > agents/al/syscall/tool")
    [id] = pending(daemon)
    told = tmp_path / "told" / id
    wait_until(lambda: told.read_text() != "", "the program to tell")
    assert told.read_text() == f"shell al {ALICE}\n"


# credentials

SECRET = """name = "secret"
description = "Say a secret"
command = ["/bin/sh", "-c", "cd $CREDENTIALS_DIRECTORY; stat -c %a token; cat token; ls"]
credentials = ["token"]
parameters.type = "object"
"""


def test_a_tool_gets_the_secrets_that_its_manifest_names_and_no_log_has_them(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    let_in(tmp_path)
    folder, secrets = tmp_path / "tools.d/secret", tmp_path / "credentials"
    folder.mkdir(parents=True)
    secrets.mkdir()
    (folder / "tool.toml").write_text(SECRET)
    for name in ("token", "other"):
        (secrets / name).write_text("s3cret-of-ours\n")
        (secrets / name).chmod(0o644)
    daemon = make_daemon(f"[tools]\nfolder = '{tmp_path}/tools.d'\ncredentials = '{secrets}'\n").start()
    ask = run("tools/secret/call", "{}")
    assert "Input/output" in as_user(daemon, ALICE, ask).stderr
    daemon.says("may be read by others; chmod 600 it")
    (secrets / "token").chmod(0o600)
    done = as_user(daemon, ALICE, ask)
    assert done.stdout == "400\ns3cret-of-ours\ntoken\n", done.stderr
    assert "s3cret" not in daemon.read("access/audit.jsonl") + daemon.log.read_text()
