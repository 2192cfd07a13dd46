"""What another user may read agrees with what the kernel lets that user read."""

from __future__ import annotations

import os
import pwd
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from aiosd.cores.models import check_folder
from aiosd.errors import ModelError
from aiosd.host.readable import PASS, READ, Reader, first_closed
from tests.running import REPOSITORY, needs, open_to_all

OTHER = pwd.getpwnam("nobody")
READER = Reader.of(OTHER.pw_uid)
STRANGER = 4242  # owns the files that are not the reader's


@pytest.fixture(autouse=True)
def reachable(tmp_path: Path) -> None:
    """pytest makes its folders for one user; the user of workers has to get through to the one of the
    test.
    """
    for step in tmp_path.parents:
        if step != Path("/") and step.stat().st_mode & 0o055 != 0o055:
            step.chmod(0o755)


def as_reader(path: Path, want: int) -> bool:
    """Ask the kernel, as the reader."""
    flag = {READ: "-r", PASS: "-x"}[want]
    command = ["setpriv", f"--reuid={OTHER.pw_uid}", f"--regid={OTHER.pw_gid}", "--init-groups", "test", flag]
    return subprocess.run([*command, path]).returncode == 0


@pytest.mark.root
def test_modes_and_acls_mean_what_the_kernel_means(tmp_path: Path) -> None:
    setfacl, chance = needs("setfacl"), random.Random(1)
    open_to_all(tmp_path)
    file = tmp_path / "file"
    file.touch()
    for _ in range(60):
        subprocess.run([setfacl, "-b", file], check=True)
        os.chown(file, chance.choice([STRANGER, OTHER.pw_uid]), chance.choice([STRANGER, OTHER.pw_gid]))
        file.chmod(chance.randrange(0o1000))
        for entry in chance.sample(["u:nobody", "u:4243", f"g:{OTHER.pw_gid}", "g:4243", "m:"], 3):
            bits = stat.filemode(chance.randrange(8))[-3:]
            if chance.random() < 0.5:
                subprocess.run([setfacl, "-m", f"{entry}:{bits}", file], check=True)
        for want in (READ, PASS):
            assert READER.may(file, want) == as_reader(file, want), f"{file.stat()} {want}"


@pytest.mark.root
@pytest.mark.parametrize("closed", [".", "..", "model.safetensors", "config.json"])
def test_a_model_that_the_user_of_workers_may_not_read_is_refused_with_the_command_that_helps(
    tmp_path: Path, random_llama: Path, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiosd.cores.models.HIDDEN", ())
    open_to_all(tmp_path)
    model = tmp_path / "above" / "model"
    shutil.copytree(random_llama, model)
    for path in [model.parent, model, *model.iterdir()]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    check_folder(model, READER)
    path = Path(os.path.normpath(model / closed))
    path.chmod(0o700 if path.is_dir() else 0o600)
    assert first_closed(READER, sorted(model.iterdir())) == (path if closed != "." else model)
    with pytest.raises(ModelError, match="user nobody, who loads models, may not read it") as refused:
        check_folder(model, READER)
    assert str(path) in str(refused.value)
    assert subprocess.run(["sh", "-c", refused.value.hint]).returncode == 0
    check_folder(model, READER)


@pytest.mark.root
def test_a_folder_that_is_closed_to_the_daemon_too_is_named_with_the_command_that_helps(
    tmp_path: Path,
) -> None:
    """The daemon is nobody here: it may not even look for the file."""
    open_to_all(tmp_path)
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o700)
    (shut / "m.gguf").touch()
    script = (
        "import os, sys, pytest; from pathlib import Path; from aiosd.cores import models;"
        "from aiosd.host.readable import Reader; models.HIDDEN = ();"
        f"os.setgroups([]); os.setgid({OTHER.pw_gid}); os.setuid({OTHER.pw_uid});"
        "error = pytest.raises(models.ModelError, models.check_folder, Path(sys.argv[1]), Reader.of(1));"
        "print(error.value.explanation)"
    )
    command = [sys.executable, "-c", script, str(shut / "m.gguf")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    said = f"{shut}: user nobody, who loads models, may not read it; chmod a+x {shut}"
    assert said in done.stdout, done.stderr


@pytest.mark.root
def test_what_a_link_points_to_counts(tmp_path: Path, random_llama: Path) -> None:
    open_to_all(tmp_path)
    blobs, model = tmp_path / "blobs", tmp_path / "model"
    shutil.copytree(random_llama, blobs)
    blobs.chmod(0o700)
    model.mkdir(mode=0o755)
    for file in blobs.iterdir():
        (model / file.name).symlink_to(file)
    assert first_closed(READER, [model / "config.json"]) == blobs


def test_a_folder_that_is_no_model_says_what_is_missing(tmp_path: Path) -> None:
    me = Reader.of(os.geteuid())
    gguf = tmp_path / "m.gguf"
    for path, word in (
        (Path("models/m"), "not an absolute path"),
        (tmp_path / "none", "no such file or folder"),
        (tmp_path, "config.json: no such file"),
    ):
        with pytest.raises(ModelError, match=word):
            check_folder(path, me)
    gguf.touch()
    check_folder(gguf, me)
    with pytest.raises(ModelError, match="but GGUF files") as refused:
        check_folder(tmp_path, me)
    assert refused.value.hint == f"name the file: {gguf}"


def test_a_folder_that_the_service_does_not_see_is_to_be_copied() -> None:
    """ProtectHome= and PrivateTmp= hide it whatever its mode is."""
    with pytest.raises(ModelError) as refused:
        check_folder(Path("/root/nothing-of-this-name"), Reader(12345, "aios-worker", frozenset()))
    assert "/srv/models" in refused.value.hint
