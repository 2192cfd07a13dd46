"""Who may what: the table of aios(7), each cell tried on the real mount by a real user of that column.

The groups of the daemon are groups of Debian, which every machine has.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import TINY
from tests.running import REPOSITORY, Daemon

pytestmark = [pytest.mark.mount, pytest.mark.root]
USERS, SHARED, ADMINS = "games", "staff", "operator"
OWNER = "games"  # a user of Debian, whose group of the same name is the users' here


def uid_of(name: str) -> int:
    return pwd.getpwnam(name).pw_uid


COLUMNS = {  # uid, of a user of Debian, and groups
    "aios": (uid_of("man"), [USERS]),
    "share": (uid_of("lp"), [SHARED]),
    "admin": (uid_of("mail"), [ADMINS]),
    "none": (uid_of("news"), []),
    "root": (0, []),
}
CONFIG = f"[daemon]\ngroup = '{USERS}'\nadmin_group = '{ADMINS}'\n"
ASK = """
ask() { exec 3<>"$1" && echo "$2" >&3 && cat <&3 >/dev/null; }
make_key() { exec 3<>keys/new && echo "$1" >&3 && read -r line <&3 && id=${line:8:12}; }
"""
SHORT = '{"prompt": "x", "max_tokens": 1}'
TRIED = {  # each line of the table: scripts, all of which say the same
    "read *status*, *scheduler/queue*": [
        "cat status", "cat metrics", "cat scheduler/queue", "cat models/tiny/info.json"
    ],
    "use a model": [
        f"ask models/tiny/llm '{SHORT}'", "ask models/tiny/embed x", "ask models/tiny/tokenize x",
    ],
    "call a tool of the administrator": ["""ask tools/calc/call '{"expression": "1+1"}'"""],
    "make an agent, a context, a tool": [
        "mkdir agents/made && rmdir agents/made", "mkdir contexts/made && rmdir contexts/made",
        "mkdir tools/made && rmdir tools/made",
    ],
    "make an API key": ["make_key && rmdir keys/$id"],
    "see and revoke other users' API keys": [
        "id=$(ls keys | grep -vxE 'new|check' | head -1) && cat keys/$id/info.json && rmdir keys/$id",
    ],
    "use a shared agent": [
        f"ask agents/shared/syscall/llm '{SHORT}'",
        """ask agents/shared/syscall/tool '{"name": "calc", "arguments": {"expression": "1+1"}}'""",
    ],
    "change its settings": [
        "echo 5 > agents/shared/nice", "echo cancel all > agents/shared/ctl",
    ],
    "continue the context shared with it": [
        """ask agents/shared/syscall/llm '{"prompt": "x", "max_tokens": 1, "context": "shared"}'""",
    ],
    "use other objects of other users": [
        "cat agents/secret/state", f"ask agents/secret/syscall/llm '{SHORT}'", "ls contexts/secret",
        """ask tools/secret/call '{}'; test -e tools/secret/manifest""",
    ],
    "add, load, unload, remove models": [
        "mkdir models/made && echo unload > models/made/ctl && rmdir models/made",
        "echo load > models/tiny/ctl",
    ],
    "switch the policy, read the audit log": [
        "echo fair > scheduler/policy", ": > workers/0/ctl", "cat access/audit.jsonl",
    ],
}  # fmt: skip


def table() -> dict[str, dict[str, bool]]:
    lines = re.findall(r"^\|(.*) \|$", (REPOSITORY / "man/aios.7.md").read_text(), re.MULTILINE)
    head, *rows = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    return {
        what: dict(zip(head[1:], [cell == "yes" for cell in cells], strict=True)) for what, *cells in rows
    }


def as_user(uid: int | str, gid: int | str, groups: list[str], script: str, daemon: Daemon) -> bool:
    more = [f"--groups={','.join(groups)}"] if groups else ["--clear-groups"]
    command = ["setpriv", f"--reuid={uid}", f"--regid={gid}", *more, "bash", "-c", ASK + script]
    done = subprocess.run(command, cwd=daemon.root, capture_output=True, text=True, timeout=60)
    print(script, done.stderr, sep="\n")  # of a test that fails
    return done.returncode == 0


AIOSCTL = """
import os, sys
from aiosd.cli.aiosctl import main
group, gid, uid = (int(sys.argv.pop(1)) for _ in range(3))
os.setgroups([group])
os.setresgid(gid, gid, gid)
os.setresuid(uid, uid, uid)
sys.exit(main())
"""


def aiosctl(daemon: Daemon, *words: str) -> None:
    """As the owner. The python of the tests may be root's alone, so it is started as root."""
    user, group = pwd.getpwnam(OWNER), grp.getgrnam(SHARED)
    who = [str(group.gr_gid), str(user.pw_gid), str(user.pw_uid)]
    subprocess.run(
        [sys.executable, "-c", AIOSCTL, *who, *words], cwd=REPOSITORY, check=True,
        env={**os.environ, "AIOS": str(daemon.root)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("who")
    for parent in [folder, *folder.parents][:4]:
        parent.chmod(0o755)
    daemon = Daemon(folder, TINY, CONFIG).start()
    try:
        made = """
            mkdir agents/{shared,secret} contexts/{shared,secret} tools/secret
            echo shared > agents/shared/context
            make_key first && make_key second
        """
        assert as_user(OWNER, USERS, [SHARED], made, daemon)
        aiosctl(daemon, "share", "shared", "--group", SHARED, "--with-context")
        yield daemon
    finally:
        daemon.clean()


def test_the_table_has_a_line_for_each_try() -> None:
    assert list(table()) == list(TRIED)
    assert all(list(cells) == list(COLUMNS) for cells in table().values())


@pytest.mark.parametrize("column", COLUMNS)
def test_each_user_may_what_the_table_says(machine: Daemon, column: str) -> None:
    uid, groups = COLUMNS[column]
    gid = uid or 0
    wrong = {
        script: may
        for what, scripts in TRIED.items()
        for script in scripts
        if (may := as_user(uid, gid, groups, script, machine)) != table()[what][column]
    }
    assert not wrong


def test_what_was_shared_is_taken_back(machine: Daemon) -> None:
    ask = f"ask agents/shared/syscall/llm '{SHORT}'"
    uid, groups = COLUMNS["share"]
    assert as_user(uid, uid, groups, ask, machine)
    aiosctl(machine, "unshare", "shared")
    assert not as_user(uid, uid, groups, ask, machine)
    assert not os.stat(machine.root / "contexts/shared").st_mode & 0o070
    assert as_user(OWNER, USERS, [], ask, machine)


def test_contexts_that_the_agent_had_before_are_taken_back_too(machine: Daemon) -> None:
    """Not those of other agents that are still shared with the group."""
    made = """
        mkdir agents/{moving,staying} contexts/{first,second,kept}
        echo first > agents/moving/context; echo kept > agents/staying/context
    """
    assert as_user(OWNER, USERS, [SHARED], made, machine)
    for agent in ("moving", "staying"):
        aiosctl(machine, "share", agent, "--group", SHARED, "--with-context")
    assert as_user(OWNER, USERS, [], "echo second > agents/moving/context", machine)
    aiosctl(machine, "unshare", "moving")
    for name, shared in (("first", False), ("second", False), ("kept", True)):
        assert bool(os.stat(machine.root / f"contexts/{name}").st_mode & 0o070) is shared, name
