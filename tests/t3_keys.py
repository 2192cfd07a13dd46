"""API keys without a mount: the files of keys/, their bounds, their ends, and what the audit log says."""

from __future__ import annotations

import dataclasses
import json
import os
import pwd
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aiosd.access.caller import Caller
from aiosd.access.permissions import Permission
from aiosd.database.schema import SCHEMA_VERSION
from aiosd.database.store import Store
from aiosd.errors import AiosError, BadRequest, BadValue, Denied, NotAllowed, NotFound, OverQuota, TooBig
from aiosd.fs import layout
from aiosd.fs.files import File, Handle, Opening
from aiosd.fs.tree import Folder, Tree
from aiosd.kernel import Kernel
from aiosd.objects import keys as key_objects

USERS = [pwd.getpwnam(name) for name in ("games", "man")]
GAMES, MAN = (Caller(user.pw_uid, user.pw_gid, 1 << 29) for user in USERS)
ROOT = Caller(0, 0, os.getpid())


@pytest.fixture
def kernel(make_kernel: Callable[..., Kernel]) -> Kernel:
    return make_kernel("[quota]\nkeys = 3\n")


@pytest.fixture
def tree(kernel: Kernel) -> Tree:
    return layout.build(kernel)


def opened(tree: Tree, path: str, caller: Caller, flags: int = os.O_RDWR) -> Handle:
    node = tree.find(path).node
    assert isinstance(node, File)
    return node.open(Opening(caller, flags, path))


def asked(tree: Tree, path: str, text: str, caller: Caller = GAMES) -> dict[str, Any]:
    handle = opened(tree, path, caller)
    handle.write(text.encode(), 0)
    data = handle.read(4096, len(text.encode()))
    assert data is not None
    said: dict[str, Any] = json.loads(data)
    return said


def info(tree: Tree, id: str) -> dict[str, Any]:
    data = opened(tree, f"/keys/{id}/info.json", GAMES, os.O_RDONLY).read(4096, 0)
    assert data is not None
    said: dict[str, Any] = json.loads(data)
    return said


def audited(kernel: Kernel, what: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in kernel.audit.file.read_text().splitlines()]
    return [line for line in lines if line["what"] == what]


def test_a_key_is_checked_for_its_user_and_nothing_stored_holds_it(kernel: Kernel, tree: Tree) -> None:
    made = asked(tree, "/keys/new", "laptop")
    assert set(made) == {"id", "key"}
    secret = made["key"].rpartition("-")[2]
    assert len(bytes.fromhex(secret)) == 32
    facts = {"id": made["id"], "uid": GAMES.uid, "user": "games", "agent": None}
    assert asked(tree, "/keys/check", made["key"], MAN) == facts | {"tokens_per_day": None, "expires": None}
    shown = info(tree, made["id"])
    assert (shown["name"], shown["uid"]) == ("laptop", GAMES.uid)
    assert abs(shown["created"] - time.time()) < 60
    assert shown["last_used"] == int(time.time()) // 3600 * 3600
    kernel.audit.close()
    files = [file for file in kernel.store.folder.rglob("*") if file.is_file()]
    assert len(files) > 2
    assert not [file for file in files if secret.encode() in file.read_bytes()]


def test_a_key_has_the_bounds_that_were_written(kernel: Kernel, tree: Tree) -> None:
    kernel.agent_objects.add("ada", GAMES)
    text = '{"name": "é", "agent": "ada", "expires": "30d", "tokens_per_day": 1000}'
    made = asked(tree, "/keys/new", text)
    said = asked(tree, "/keys/check", made["key"] + "\n")
    assert (said["agent"], said["tokens_per_day"]) == ("ada", 1000)
    assert abs(said["expires"] - time.time() - 30 * 86400) < 60
    assert said["expires"] == info(tree, made["id"])["expires"]
    (line,) = audited(kernel, "key made")
    assert (line["key"], line["agent"], line["by"]["uid"]) == (made["id"], "ada", GAMES.uid)


@pytest.mark.parametrize(
    "text",
    [
        "x" * 65, "a\x1b[31mb", "a\nb", "{", '{"name": 1}', '{"uid": 0}', '{"tokens_per_day": 0}',
        '{"tokens_per_day": 1.5}', '{"tokens_per_day": true}', '{"expires": 30}', '{"expires": "30"}',
        '{"expires": "2020-01-01"}', '{"expires": "soon"}', '{"expires": "0d"}',
        '{"expires": "9999-12-31T99"}',
        '{"name": "a", "name": "b"}',
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_by_the_write_and_makes_nothing(
    kernel: Kernel, tree: Tree, text: str
) -> None:
    handle = opened(tree, "/keys/new", GAMES)
    with pytest.raises((BadRequest, BadValue)):
        handle.write(text.encode(), 0)
    with pytest.raises(BadRequest, match="nothing was written"):
        handle.read(4096, len(text))
    assert kernel.keys.ids() == []


@pytest.mark.parametrize(
    ("text", "after_s"), [("90m", 5400), ("1.5h", 5400), ("2d", 172800), ("45s", 45), ("never", None)]
)
def test_an_expiry_is_a_time_from_now(text: str, after_s: int | None) -> None:
    found = key_objects.expiry(text, 1e9)
    assert found == (None if after_s is None else 1e9 + after_s)


def test_an_expiry_is_a_date_of_this_machine_or_a_time_with_a_zone() -> None:
    assert key_objects.expiry("2030-12-31", 1e9) == int(time.mktime((2030, 12, 31, 0, 0, 0, 0, 0, -1)))
    assert key_objects.expiry("2030-12-31T10:00:00Z", 1e9) == 1924941600
    assert key_objects.expiry("2030-12-31T10:00:00+01:00", 1e9) == 1924938000


def test_a_key_that_is_not_read_is_not_made(kernel: Kernel, tree: Tree) -> None:
    handle = opened(tree, "/keys/new", GAMES)
    handle.write(b"x", 0)
    handle.release()
    assert kernel.keys.ids() == []
    with pytest.raises(NotAllowed, match="nobody could read"):
        opened(tree, "/keys/new", GAMES, os.O_WRONLY).write(b"x", 0)


def test_one_write_makes_one_key_however_it_is_read(kernel: Kernel, tree: Tree) -> None:
    handle = opened(tree, "/keys/new", GAMES)
    handle.write(b"first\n", 0)
    parts = [handle.read(10, 6), handle.read(4096, 16), handle.read(4096, 4096)]
    assert parts[2] == b""
    first = json.loads(b"".join(part or b"" for part in parts))
    assert handle.read(4096, 0) == (parts[0] or b"") + (parts[1] or b"")
    assert kernel.keys.ids() == [first["id"]]
    handle.write(b"second\n", 200)
    second = json.loads(handle.read(4096, 207) or b"")
    assert kernel.keys.ids() == [first["id"], second["id"]]
    with pytest.raises(BadRequest):
        opened(tree, "/keys/new", GAMES).read(4096, 0)


@pytest.mark.parametrize("change", [lambda key: key[:-1] + ("0" if key[-1] != "0" else "1"),
                                    lambda key: key + "0",
                                    lambda key: key.upper(), lambda key: "aios-" + "0" * 12 + key[17:],
                                    lambda key: "", lambda key: key.rpartition("-")[0]])  # fmt: skip
def test_a_wrong_key_is_refused(kernel: Kernel, tree: Tree, change: Callable[[str], str]) -> None:
    key = asked(tree, "/keys/new", "x")["key"]
    handle = opened(tree, "/keys/check", MAN)
    with pytest.raises(Denied, match="no such key"):
        handle.write(change(key).encode(), 0)
    with pytest.raises(BadRequest):
        handle.read(4096, 0)


def test_the_answer_to_a_key_is_gone_when_the_next_one_is_wrong(kernel: Kernel, tree: Tree) -> None:
    key = asked(tree, "/keys/new", "x")["key"]
    handle = opened(tree, "/keys/check", MAN)
    handle.write(key.encode(), 0)
    with pytest.raises(Denied):
        handle.write(b"wrong", len(key))
    with pytest.raises(BadRequest):
        handle.read(4096, len(key))


@pytest.mark.parametrize("file", ["new", "check"])
def test_a_question_of_wrong_bytes_is_refused(tree: Tree, file: str) -> None:
    handle = opened(tree, f"/keys/{file}", GAMES)
    with pytest.raises(TooBig):
        handle.write(b"x" * 4097, 0)
    with pytest.raises(AiosError):
        handle.write(b"\xff\xfe", 0)


def test_an_expired_key_is_refused(kernel: Kernel, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    key = asked(tree, "/keys/new", '{"expires": "1h"}')["key"]
    asked(tree, "/keys/check", key)
    later_s = time.time() + 3601
    monkeypatch.setattr(time, "time", lambda: later_s)
    with pytest.raises(Denied, match="expired"):
        asked(tree, "/keys/check", key)


def test_a_flood_of_wrong_keys_is_one_audit_line_and_counted(
    kernel: Kernel, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(caller: Caller = GAMES) -> None:
        with pytest.raises(Denied):
            opened(tree, "/keys/check", caller).write(b"aios-" + b"0" * 12 + b"-" + b"1" * 64, 0)

    for _ in range(100):
        refused()
    refused(MAN)
    (first, second) = audited(kernel, "key refused")
    assert (first["more"], first["by"]["uid"], second["by"]["uid"]) == (0, GAMES.uid, MAN.uid)
    assert first["key"] == "0" * 12
    later_s = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later_s)
    refused()
    assert audited(kernel, "key refused")[-1]["more"] == 99
    assert not [line for line in kernel.audit.file.read_text().splitlines() if "1" * 64 in line]


def test_more_keys_than_the_quota_are_refused_by_write_and_read(kernel: Kernel, tree: Tree) -> None:
    handles = [opened(tree, "/keys/new", GAMES) for _ in range(4)]
    for handle in handles:
        handle.write(b"x", 0)
    for handle in handles[:3]:
        assert handle.read(4096, 1)
    with pytest.raises(OverQuota, match="3 keys"):
        handles[3].read(4096, 1)
    with pytest.raises(OverQuota):
        handles[3].write(b"x", 1)
    asked(tree, "/keys/new", "x", MAN)
    assert len(kernel.keys.ids()) == 4
    tree.remove(tree.find("/keys"), kernel.keys.ids()[0], GAMES)
    handles[3].write(b"x", 1)
    assert handles[3].read(4096, 2)


@pytest.mark.parametrize("caller", [ROOT, Caller(61001, 61001, 1 << 29)], ids=["root", "nameless"])
def test_who_has_no_account_of_his_own_makes_no_key(kernel: Kernel, tree: Tree, caller: Caller) -> None:
    with pytest.raises(Denied):
        asked(tree, "/keys/new", "x", caller)


def test_a_lent_uid_makes_no_key(kernel: Kernel, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_objects, "owner", lambda uid: MAN.uid)
    with pytest.raises(Denied, match="no account"):
        asked(tree, "/keys/new", "x")


def test_each_user_sees_and_revokes_only_own_keys(kernel: Kernel, tree: Tree) -> None:
    mine, other = asked(tree, "/keys/new", "x")["id"], asked(tree, "/keys/new", "x", MAN)["id"]
    folder = tree.find("/keys")
    assert isinstance(folder.node, Folder)
    assert list(folder.node.listed(GAMES)) == ["new", "check", mine]
    assert list(folder.node.listed(ROOT)) == ["new", "check", mine, other]
    assert tree.find(f"/keys/{mine}").permission.uid == GAMES.uid
    assert tree.find(f"/keys/{other}/info.json").permission.uid == MAN.uid
    with pytest.raises(Denied, match="not yours"):
        tree.remove(folder, other, GAMES)
    with pytest.raises(NotFound):
        tree.remove(folder, "new", ROOT)
    with pytest.raises(NotAllowed, match="mkdir makes no keys"):
        tree.make(folder, "0" * 12, GAMES, 0o700)
    tree.remove(folder, other, ROOT)
    tree.remove(folder, mine, GAMES)
    assert [line["key"] for line in audited(kernel, "key revoked")] == [other, mine]


def test_a_member_of_the_administrators_sees_all(make_kernel: Callable[..., Kernel]) -> None:
    kernel = make_kernel("[daemon]\nadmin_group = 'operator'\n")
    tree = layout.build(kernel)
    id = asked(tree, "/keys/new", "x")["id"]
    admin = Caller(MAN.uid, kernel.admins or 0, 1 << 29)
    folder = tree.find("/keys")
    assert isinstance(folder.node, Folder)
    assert id in folder.node.listed(admin)
    assert tree.find(f"/keys/{id}/info.json").permission == Permission(GAMES.uid, admin.gid, 0o440)
    tree.remove(folder, id, admin)
    assert kernel.keys.ids() == []


def test_a_key_of_an_agent_ends_with_it_and_not_with_its_name(kernel: Kernel, tree: Tree) -> None:
    kernel.agent_objects.add("ada", GAMES)
    key = asked(tree, "/keys/new", '{"agent": "ada"}')["key"]
    whole = asked(tree, "/keys/new", "all")["key"]
    kernel.agent_objects.remove("ada")
    kernel.agent_objects.add("ada", GAMES)
    with pytest.raises(Denied):
        asked(tree, "/keys/check", key)
    asked(tree, "/keys/check", whole)
    assert audited(kernel, "key revoked")[0]["why"] == "its agent ended"


def test_a_kill_between_the_end_of_an_agent_and_of_its_keys_leaves_none(
    kernel: Kernel, tree: Tree, make_kernel: Callable[..., Kernel]
) -> None:
    kernel.agent_objects.add("ada", GAMES)
    asked(tree, "/keys/new", '{"agent": "ada"}')
    kept = asked(tree, "/keys/new", "kept")
    kernel.agents.remove(kernel.agents.get("ada"))  # and here it is killed
    kernel.stop()
    again = make_kernel()
    assert again.keys.ids() == [kept["id"]]
    assert asked(layout.build(again), "/keys/check", kept["key"])["id"] == kept["id"]


def test_an_agent_that_the_maker_may_not_use_has_no_key(kernel: Kernel, tree: Tree) -> None:
    with pytest.raises(NotFound):
        asked(tree, "/keys/new", '{"agent": "nobody"}')
    kernel.agent_objects.add("ada", MAN)
    with pytest.raises(Denied, match="not yours to use"):
        asked(tree, "/keys/new", '{"agent": "ada"}')
    at = kernel.permissions.get("/agents/ada")
    assert at
    kernel.permissions.set("/agents/ada", dataclasses.replace(at, gid=GAMES.gid, mode=0o750))
    with pytest.raises(Denied, match="not yours to use"):
        asked(tree, "/keys/new", '{"agent": "ada"}')
    kernel.permissions.set("/agents/ada/syscall/llm", Permission(MAN.uid, GAMES.gid, 0o660))
    assert asked(tree, "/keys/new", '{"agent": "ada"}')["key"]


def test_a_key_ends_with_its_account(kernel: Kernel, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    key = asked(tree, "/keys/new", "x")
    other = asked(tree, "/keys/new", "x", MAN)
    for name in ("bob", ""):  # before anybody has seen him; without an account
        with monkeypatch.context() as patched:
            patched.setattr(key_objects, "name_of", lambda uid, name=name: name)
            with pytest.raises(Denied, match="has no account"):
                asked(tree, "/keys/check", key["key"])
    asked(tree, "/keys/check", key["key"])
    kernel.replaced(GAMES.uid, "games", "bob")
    assert kernel.keys.ids() == [other["id"]]
    with pytest.raises(Denied):
        asked(tree, "/keys/check", key["key"])


def test_a_state_of_the_version_before_gets_the_table(tmp_path: Path) -> None:
    Store(tmp_path, {}).close()
    with sqlite3.connect(tmp_path / "aios.db") as db:
        db.executescript("DROP TABLE keys; DROP TABLE notes; PRAGMA user_version=9;")
    db.close()
    store = Store(tmp_path, {})
    assert store.key_rows() == []
    store.close()
    with sqlite3.connect(tmp_path / "aios.db") as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    db.close()
