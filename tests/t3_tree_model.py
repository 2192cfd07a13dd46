"""Compare the tree with a simple model of it, for random actions of users and restarts of the kernel."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from aiosd.access.caller import Caller
from aiosd.config.config import NAME, load
from aiosd.errors import AiosError, BadValue, Exists, NotAllowed, NotFound, OverQuota
from aiosd.fs import layout
from aiosd.fs.files import File, Opening
from aiosd.fs.tree import Tree
from aiosd.kernel import Kernel

MOST = 3  # quota of agents, and of contexts, for each user
CONFIG = f"[quota]\nagents = {MOST}\ncontexts = {MOST}\n"
USERS = {uid: Caller(uid, uid + 100, os.getpid()) for uid in (5001, 5002)}
ROOT = Caller(0, 0, os.getpid())
NAMES = st.sampled_from(["a", "b", "c.d", "_", "9", "x" * 64])
BAD_NAMES = st.sampled_from([".hidden", "", "x" * 65, "sp ace", "naïve", "new\nline", "..", "a/b"])
KINDS = st.sampled_from(["agents", "contexts"])
MODES = st.integers(0, 0o777)


@dataclass
class Object:
    uid: int
    gid: int
    mode: int
    values: dict[str, str] = field(default_factory=dict)  # of an agent
    said: list[dict[str, str]] = field(default_factory=list)  # in a context


class TreeMachine(RuleBasedStateMachine):
    objects = Bundle("objects")  # paths; some may be gone

    def __init__(self) -> None:
        super().__init__()
        self._scratch = tempfile.TemporaryDirectory()
        folder = Path(self._scratch.name)
        (folder / "aiosd.toml").write_text(CONFIG)
        config = load(folder / "aiosd.toml")
        self._config = replace(config, daemon=replace(config.daemon, state=str(folder / "state")))
        self.model: dict[str, Object] = {}
        self._open()

    def _open(self) -> None:
        self.kernel = Kernel(self._config)
        self.tree: Tree = layout.build(self.kernel)

    def teardown(self) -> None:
        self.kernel.stop()
        self._scratch.cleanup()

    def count(self, kind: str, uid: int) -> int:
        return sum(path.startswith(f"/{kind}/") and o.uid == uid for path, o in self.model.items())

    def write(self, path: str, text: str, uid: int, flags: int = os.O_WRONLY) -> None:
        node = self.tree.find(path).node
        assert isinstance(node, File)
        if flags & os.O_TRUNC:
            node.truncate()
        handle = node.open(Opening(USERS[uid], flags, path))
        handle.write(text.encode(), 0)
        handle.flush(os.getpid())
        handle.release()

    def read(self, path: str) -> str:
        node = self.tree.find(path).node
        assert isinstance(node, File)
        return (node.open(Opening(USERS[5001], os.O_RDONLY, path)).read(1 << 20, 0) or b"").decode()

    @rule(target=objects, kind=KINDS, name=NAMES, uid=st.sampled_from(list(USERS)), mode=MODES)
    def mkdir(self, kind: str, name: str, uid: int, mode: int) -> str:
        path = f"/{kind}/{name}"
        refused = Exists if path in self.model else OverQuota if self.count(kind, uid) >= MOST else None
        if refused:
            with pytest.raises(refused):
                self.tree.make(self.tree.find(f"/{kind}"), name, USERS[uid], mode)
        else:
            self.tree.make(self.tree.find(f"/{kind}"), name, USERS[uid], mode)
            self.model[path] = Object(uid, uid + 100, mode & 0o700)
        return path

    @rule(kind=KINDS, name=BAD_NAMES)
    def mkdir_of_a_bad_name(self, kind: str, name: str) -> None:
        assert not NAME.fullmatch(name)
        with pytest.raises(AiosError):
            self.tree.make(self.tree.find(f"/{kind}"), name, USERS[5001], 0o700)

    @rule(path=consumes(objects))
    def rmdir(self, path: str) -> None:
        _, kind, name = path.split("/")
        if path in self.model:
            self.tree.remove(self.tree.find(f"/{kind}"), name, ROOT)
            del self.model[path]
        else:
            with pytest.raises(NotFound):
                self.tree.remove(self.tree.find(f"/{kind}"), name, ROOT)

    @rule(path=objects, mode=MODES)
    def chmod(self, path: str, mode: int) -> None:
        if path in self.model:
            owner, other = (replace(USERS[5001], uid=uid) for uid in (self.model[path].uid, 7777))
            with pytest.raises(NotAllowed):
                self.tree.chmod(path, other, mode)
            self.tree.chmod(path, owner, mode)
            self.model[path].mode = mode
        else:
            with pytest.raises(NotFound):
                self.tree.chmod(path, USERS[5001], mode)

    @rule(path=objects, uid=st.sampled_from(list(USERS)), gid=st.integers(100, 103))
    def chown(self, path: str, uid: int, gid: int) -> None:
        with suppress(NotFound):
            self.tree.chown(path, ROOT, uid, gid)
            self.model[path].uid, self.model[path].gid = uid, gid

    @rule(
        path=objects,
        value=st.sampled_from([("nice", "5"), ("nice", "19"), ("system", "be brief\nand kind"),
                               ("system", ""), ("params.json", '{"seed": 3}'), ("params.json", "{}")]),
    )  # fmt: skip
    def set(self, path: str, value: tuple[str, str]) -> None:
        if path in self.model and path.startswith("/agents/"):
            name, text = value
            if name == "nice" and int(text) < int(self.model[path].values.get("nice", "0")):
                return  # that takes root
            self.write(f"{path}/{name}", text, 5001)
            self.model[path].values[name] = text

    @rule(
        path=objects,
        value=st.sampled_from([("nice", "20"), ("nice", "x"), ("model", "none"), ("context", "none"),
                               ("params.json", '{"seed": "x"}'), ("params.json", "[]"), ("pid", "0x1")]),
    )  # fmt: skip
    def set_badly(self, path: str, value: tuple[str, str]) -> None:
        if path in self.model and path.startswith("/agents/"):
            with pytest.raises(BadValue):
                self.write(f"{path}/{value[0]}", value[1], 5001)

    @rule(path=objects, text=st.text(st.characters(codec="utf-8"), max_size=20), clear=st.booleans())
    def say(self, path: str, text: str, clear: bool) -> None:
        if path in self.model and path.startswith("/contexts/"):
            said = {"role": "user", "content": text}
            flags = os.O_WRONLY | (os.O_TRUNC if clear else os.O_APPEND)
            try:
                self.write(f"{path}/messages.jsonl", json.dumps(said) + "\n", 5001, flags)
            except AiosError:  # a text that no message can hold; the context stays truncated
                said = {}
            kept = [] if clear else self.model[path].said
            self.model[path].said = [*kept, said] if said else kept

    @rule(path=objects, turns=st.integers(0, 4))
    def truncate(self, path: str, turns: int) -> None:
        if path in self.model and path.startswith("/contexts/"):
            context = self.kernel.contexts.get(path.rsplit("/", 1)[1])
            self.kernel.contexts.truncate(context, turns)
            self.model[path].said = self.model[path].said[:turns]

    @rule(target=objects, path=objects, name=NAMES)
    def fork(self, path: str, name: str) -> str:
        new = f"/contexts/{name}"
        if path in self.model and path.startswith("/contexts/"):
            old = self.model[path]
            context = self.kernel.contexts.get(path.rsplit("/", 1)[1])
            caller = replace(USERS[5001], uid=old.uid)
            refused = Exists if new in self.model else self.count("contexts", old.uid) >= MOST and OverQuota
            if refused:
                with pytest.raises(refused):
                    self.kernel.context_objects.fork(context, name, caller)
            else:
                self.kernel.context_objects.fork(context, name, caller)
                self.model[new] = Object(old.uid, caller.gid, 0o700, said=list(old.said))
        return new

    @rule()
    def restart(self) -> None:
        self.kernel.stop()
        self._open()

    @invariant()
    def the_tree_is_as_the_model(self) -> None:
        for kind in ("agents", "contexts"):
            names: Any = self.tree.find(f"/{kind}").node
            assert {f"/{kind}/{n}" for n in names.names()} == {
                p for p in self.model if p.startswith(f"/{kind}/")
            }
        for path, known in self.model.items():
            owner = self.tree.find(path).permission
            assert (owner.uid, owner.gid, owner.mode) == (known.uid, known.gid, known.mode)
            for name, text in known.values.items():
                assert self.read(f"{path}/{name}") == f"{text}\n"
            if path.startswith("/contexts/"):
                *lines, rest = self.read(f"{path}/messages.jsonl").split("\n")
                assert ([json.loads(line) for line in lines], rest) == (known.said, "")


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
