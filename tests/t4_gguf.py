"""A GGUF file as people have them, on the real mount: added, asked, unloaded, and refused with a reason."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import gguf_files
from tests.running import Daemon, wait_until

pytestmark = pytest.mark.mount


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for parent in [tmp_path, *tmp_path.parents][:4]:
        os.chmod(parent, 0o755)
    return tmp_path


def add(aios: Daemon, name: str, path: Path) -> str:
    """Add a model and return its state when it is known."""
    (aios.root / "models" / name).mkdir()
    aios.write(f"models/{name}/ctl", f"load {path}")
    state = aios.root / "models" / name / "state"
    wait_until(lambda: state.read_text().strip() in ("ready", "failed"), "the model", 60)
    return state.read_text().strip()


def test_a_file_is_served_with_its_weights_as_they_are(aios: Daemon, folder: Path) -> None:
    path = gguf_files.make(folder / "small.gguf", {"attn_v": "Q6_K", "ffn_up": "BF16", "": "Q4_K"})
    try:
        assert add(aios, "small", path) == "ready"
        info = json.loads(aios.read("models/small/info.json"))
        assert info["quantization"] == "Q4_K"
        assert info["stored_bytes"].keys() == {"F32", "Q4_K", "BF16", "Q6_K"}
        assert info["expanded_bytes"] == 2 * 4 * gguf_files.SIZES["hidden"] * gguf_files.SIZES["inner"]
        asked = json.dumps({"prompt": "hi", "max_tokens": 5, "ignore_eos": True})
        ask = f"exec 3<>models/small/llm; echo '{asked}' >&3; cat <&3"
        answers = [json.loads(aios.sh(ask).stdout) for _ in range(2)]
        assert answers[0]["usage"]["completion_tokens"] == 5
        assert answers[0]["choices"] == answers[1]["choices"]
    finally:
        (aios.root / "models/small").rmdir()


@pytest.mark.parametrize(("cut", "why"), [(9000, "truncated"), (0, "the file is empty")])
def test_a_file_that_cannot_be_served_is_named_with_a_remedy(
    make_daemon: Callable[..., Daemon], folder: Path, cut: int, why: str
) -> None:
    daemon = make_daemon().start()
    path = folder / "bad.gguf"
    path.write_bytes(gguf_files.make(folder / "whole", "Q4_0").read_bytes()[:cut])
    assert add(daemon, "bad", path) == "failed"
    said = json.loads(daemon.read("models/bad/info.json"))["error"]
    assert said.startswith(f"{path}: ")
    assert why in said
    assert "; download the file again" in said


def test_a_file_that_is_not_there_is_refused_at_once(aios: Daemon, folder: Path) -> None:
    (aios.root / "models/bad").mkdir()
    try:
        with pytest.raises(OSError, match="Invalid"):
            aios.write("models/bad/ctl", f"load {folder}/none.gguf")
        assert f"{folder}/none.gguf: no such file or folder" in aios.read("models/bad/error")
    finally:
        (aios.root / "models/bad").rmdir()


def test_a_folder_with_a_file_says_which_file_to_name(aios: Daemon, folder: Path) -> None:
    path = gguf_files.make(folder / "x.gguf", "Q4_0")
    (aios.root / "models/bad").mkdir()
    try:
        with pytest.raises(OSError, match="Invalid"):
            aios.write("models/bad/ctl", f"load {folder}")
        assert f"name the file: {path}" in aios.read("models/bad/error")
    finally:
        (aios.root / "models/bad").rmdir()
