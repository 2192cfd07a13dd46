"""What a model will take, estimated from the headers of its files, and how long it stays."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.config import duration
from aiosd.config.config import EngineConfig, load
from aiosd.cores.footprint import PROCESS_BYTES, Footprint, footprint
from aiosd.cores.stay import Stay
from aiosd.errors import BadValue, ConfigError
from aiosd.host import memory
from tests.conftest import TINY

ENGINE = EngineConfig()


def test_the_built_in_model_is_estimated_from_its_folder() -> None:
    config = json.loads((TINY / "config.json").read_text())
    found = footprint(TINY, ENGINE, False)
    assert found.weights == pytest.approx((TINY / "model.safetensors").stat().st_size, rel=0.05)
    assert found.kv_per_token == 9216, "as its worker says in info.json"
    assert found.context_length == config["max_position_embeddings"]
    assert found.fixed == PROCESS_BYTES + found.weights
    assert footprint(TINY, EngineConfig(dtype="bfloat16"), True).weights == found.weights // 2
    assert footprint(TINY, EngineConfig(quantization="int8"), False).weights == found.weights // 4


def test_the_kv_of_one_context_is_the_least_and_that_of_a_full_batch_the_most() -> None:
    found = Footprint(0, 0, kv_per_token=1000, context_length=2000)
    assert found.least_kv(1 << 30) == 2_000_000
    assert found.least_kv(1000) == 1000
    assert found.most_kv(0, 64) == 64 * 2_000_000
    assert found.most_kv(12345, 64) == 12345


def gguf(path: Path, tensors: list[tuple[str, tuple[int, ...], int]], **facts: int | str) -> Path:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts) + 1)
    data += text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc")
    for key, value in facts.items():
        named = text("general.architecture" if key == "of" else f"llama.{key}".replace("__", "."))
        data += named
        data += struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value)
    for name, shape, kind in tensors:
        data += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        data += struct.pack("<IQ", kind, 0)
    path.write_bytes(data)
    return path


FACTS: dict[str, int | str] = {
    "of": "llama", "block_count": 2, "context_length": 128, "embedding_length": 64,
    "attention__head_count": 8, "attention__head_count_kv": 2,
}  # fmt: skip


def test_a_gguf_file_is_estimated_from_its_header(tmp_path: Path) -> None:
    tensors = [("q", (64, 32), 2), ("norm", (64,), 0)]  # Q4_0: 18 bytes for 32 values
    found = footprint(gguf(tmp_path / "m.gguf", tensors, **FACTS), ENGINE, False)
    assert found == Footprint(64 * 32 // 32 * 18 + 64 * 4, 64 * 32 // 32 * 18, 2 * 2 * 16 * 4, 128)


@given(st.integers(0, 300), st.integers(0, 255))
def test_a_damaged_gguf_file_never_raises(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int
) -> None:
    path = gguf(tmp_path_factory.mktemp("g") / "m.gguf", [("q", (64, 32), 2)], **FACTS)
    data = bytearray(path.read_bytes())
    data[at % len(data)] = byte
    path.write_bytes(data)
    footprint(path, ENGINE, False)
    path.write_bytes(data[:at])
    footprint(path, ENGINE, False)


def test_what_is_no_model_counts_nothing_and_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    os.mkfifo(tmp_path / "m.gguf")
    for path in (tmp_path, tmp_path / "m.gguf", tmp_path / "none.gguf"):
        assert footprint(path, ENGINE, False) == Footprint()
    (tmp_path / "list").mkdir()
    (tmp_path / "list/config.json").write_text("[]")
    assert footprint(tmp_path / "list", ENGINE, False) == Footprint()


def test_the_memory_of_this_machine_is_known() -> None:
    found = memory.memory()
    assert 0 <= found.free <= found.total
    own, shared = memory.resident(os.getpid())
    assert own > 1 << 20
    assert shared > 0
    assert memory.resident(1 << 22) == (0, 0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90", 90), ("500ms", 0.5), ("5m", 300), ("1.5h", 5400), ("7d", 604800), ("always", math.inf)],
)
def test_a_duration_is_read_and_shown(text: str, seconds: float) -> None:
    assert duration.seconds(text) == seconds
    assert duration.seconds(duration.shown(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "-1", "5 m", "5x", "1e9", "m", "9999d", "٣m", "forever"])
def test_another_text_is_no_duration(text: str) -> None:
    with pytest.raises(BadValue):
        duration.seconds(text)


def test_the_configuration_takes_auto_and_durations_only_where_they_belong(tmp_path: Path) -> None:
    file = tmp_path / "aiosd.toml"
    file.write_text('[engine]\nkv_bytes = "auto"\n[models.a]\npath = "/a"\nkeep_alive = "always"\n')
    assert load(file).engine.kv_bytes == 0
    for wrong, why in (
        ("[engine]\nkv_bytes = 0\n", "aiosd.toml:2: kv_bytes must be at least 1"),
        ('[engine]\nthreads = "auto"\n', "must be a whole number"),
        ('[engine]\nkeep_alive = "soon"\n', "aiosd.toml:2: keep_alive: 'soon' is not how long"),
        ('[models.a]\npath = "/a"\nkeep_alive = "x"\n', "aiosd.toml:3: keep_alive"),
    ):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match=why):
            load(file)


def test_each_users_last_request_keeps_a_model() -> None:
    stay = Stay(300.0)
    stay.began_s = 10.0
    stay.ready(12.0)
    assert (stay.load_s, stay.until_s) == (2.0, 312.0)
    assert stay.ended(1, 20.0, None) == 320.0
    assert stay.ended(2, 30.0, 0.0) == 30.0
    assert stay.until_s == 320.0, "another user's request does not shorten it"
    assert stay.ended(1, 40.0, 0.0) == 40.0
    assert stay.until_s == 40.0
    stay.keep(math.inf)
    assert stay.until_s == math.inf
