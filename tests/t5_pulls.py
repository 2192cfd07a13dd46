"""Who may pull, what counts in whose quota, and that nobody gets a model of others by the store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import gguf_files
from tests.hub import Hub, Repository
from tests.running import REPOSITORY, Daemon, wait_until
from tests.t5_users import ALICE, BOB, as_user

pytestmark = [pytest.mark.mount, pytest.mark.root]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return gguf_files.make(tmp_path_factory.mktemp("pulled") / "m.gguf", "Q4_0").read_bytes()


@pytest.fixture
def server(gguf: bytes) -> Iterator[Hub]:
    with Hub(token="hf_right").serve() as made:
        made.repositories["org/m"] = Repository({"m.gguf": gguf})
        made.repositories["org/gated"] = Repository({"m.gguf": gguf}, gated=True)
        yield made


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon], server: Hub, gguf: bytes, tmp_path: Path) -> Daemon:
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials/hf-token").write_text("hf_right\n")
    quota = f"[quota]\nmodel_bytes = {2 * len(gguf)}\n"
    daemon = make_daemon(f"[tools]\ncredentials = '{tmp_path}/credentials'\n{quota}")
    daemon.env = server.env
    daemon.start()
    for folder in (tmp_path, tmp_path.parent, daemon.root.parent):
        folder.chmod(0o755)
    (daemon.root / "models").chmod(0o1777)  # an administrator lets all users add models
    return daemon


def state(daemon: Daemon, name: str) -> str:
    wait_until(lambda: daemon.read(f"models/{name}/state").strip() in ("absent", "failed"), "the end", 60)
    return daemon.read(f"models/{name}/state").strip()


def why(daemon: Daemon, name: str) -> str:
    return str(json.loads(daemon.read(f"models/{name}/info.json")).get("error"))


def test_a_users_own_models_count_in_his_quota(daemon: Daemon, gguf: bytes) -> None:
    for name in ("a", "b"):
        asked = f"mkdir models/{name}; echo pull hf:org/m > models/{name}/ctl"
        assert as_user(daemon, ALICE, asked).stderr == ""
        assert state(daemon, name) == "absent"
    as_user(daemon, ALICE, "mkdir models/c; echo pull hf:org/m > models/c/ctl")
    assert state(daemon, "c") == "failed"
    assert f"c takes {len(gguf)} bytes, and your models have {2 * len(gguf)}" in why(daemon, "c")
    copied = as_user(daemon, ALICE, "mkdir models/d; echo copy a > models/d/ctl; cat models/d/error")
    assert "Disk quota exceeded" in copied.stderr
    as_user(daemon, ALICE, "rmdir models/b; echo pull > models/c/ctl")
    assert state(daemon, "c") == "absent"
    assert as_user(daemon, BOB, "mkdir models/e; echo pull hf:org/m > models/e/ctl").stderr == ""
    assert state(daemon, "e") == "absent", "it is his own quota"
    (daemon.root / "models/f").mkdir()
    daemon.write("models/f/ctl", "pull hf:org/m")
    assert state(daemon, "f") == "absent", "root has none"


def test_a_user_reads_no_model_of_another(daemon: Daemon) -> None:
    as_user(daemon, ALICE, "mkdir models/hers; echo pull hf:org/m > models/hers/ctl")
    assert state(daemon, "hers") == "absent"
    for command in (
        "cat models/hers/info.json",
        "echo hi > models/hers/llm",
        "echo cancel > models/hers/ctl",
        "mkdir models/his; echo copy hers > models/his/ctl",
        f"cat {daemon.state}/models/names/hers/m.gguf",
        f"cat {daemon.state}/models/blobs/*",
    ):
        assert as_user(daemon, BOB, command).returncode, command
    assert "not yours to copy" in as_user(daemon, BOB, "cat models/his/error").stdout


def test_a_user_has_no_token_and_no_file_of_this_machine(daemon: Daemon, tmp_path: Path, gguf: bytes) -> None:
    (daemon.root / "models/roots").mkdir()
    daemon.write("models/roots/ctl", "pull hf:org/gated")
    assert state(daemon, "roots") == "absent"
    as_user(daemon, ALICE, "mkdir models/m; echo pull hf:org/gated > models/m/ctl")
    assert state(daemon, "m") == "failed"
    assert "is gated" in why(daemon, "m")
    secret = tmp_path / "secret.gguf"
    secret.write_bytes(gguf)
    secret.chmod(0o600)
    refused = as_user(daemon, ALICE, f"echo pull {secret} > models/m/ctl; cat models/m/error")
    assert "Permission denied" in refused.stderr
    assert "only root and aios-admin" in refused.stdout


def test_who_may_not_add_models_may_not_pull(daemon: Daemon) -> None:
    (daemon.root / "models").chmod(0o775)
    assert "Permission denied" in as_user(daemon, ALICE, "mkdir models/m").stderr
    assert "Permission denied" in as_user(daemon, ALICE, "echo pull smollm2 > models/random/ctl").stderr
    become = f"os.setgroups([]); os.setgid({ALICE}); os.setuid({ALICE})"
    run = f"import os; from aiosd.cli import aiosctl; {become}; aiosctl.main()"
    for words in (["pull", "hf:org/m"], ["cp", "random", "m"], ["model", "add", "/srv/m"]):
        done = subprocess.run(
            [sys.executable, "-c", run, "--mount", ".", *words],
            cwd=daemon.root, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert "you may not make models here; root and the group" in done.stderr, words
