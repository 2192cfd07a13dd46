"""Each family of models: a GGUF file answers with the bits of the folder it was made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aiosd.cores.engine import weights
from aiosd.cores.engine.config import read
from aiosd.cores.engine.family import FAMILIES, spec_of
from aiosd.cores.engine.folder import ModelFolder
from aiosd.cores.engine.fused import FusedLlama
from aiosd.cores.engine.gguf import GgufFile
from aiosd.cores.engine.gguf_config import ARCHITECTURES, of_gguf
from aiosd.cores.engine.model import load
from aiosd.cores.engine.ops import library
from aiosd.cores.engine.stored import StoredTensor
from aiosd.errors import ModelError
from aiosd.syscall.sampling import Sampling
from tests import gguf_families
from tests.t1_engine_models import Answer, alone, folder, model, prompt
from tests.t1_gguf import exactly, logits

GREEDY = Sampling(max_tokens=24, ignore_eos=True, logprobs=2)
MADE = [
    "llama", "qwen2", "qwen3", "smollm3", "phi3", "phi3-sliding", "phi4-mini", "granite", "olmo2", "olmo3",
    "gemma2", "gemma3", "glm4", "mixtral", "qwen2-moe", "qwen3-moe",
]  # fmt: skip


def changed(name: str, path: Path, **changes: Any) -> Path:
    """A copy of a model folder with other words in its config.json."""
    shutil.copytree(folder(name), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def close(got: Answer, expected: Answer) -> bool:
    pairs = zip(got.logprobs, expected.logprobs, strict=True)
    return got.tokens == expected.tokens and all(abs(a.logprob - b.logprob) < 1e-3 for a, b in pairs)


@pytest.mark.parametrize("core", ["fused", "torch"])
@pytest.mark.parametrize("name", MADE)
def test_a_file_answers_with_the_bits_of_its_folder(name: str, core: str, tmp_path: Path) -> None:
    if core == "fused" and library() is None:
        pytest.skip("compiled operations are not built")
    source = folder(name)
    if name.startswith("gemma"):  # llama.cpp knows this number of each real model
        source = changed(name, tmp_path / "folder", query_pre_attn_scalar=24 if name == "gemma2" else 16)
    file = gguf_families.write(tmp_path / "x.gguf", source)
    expected, got = (load(path, threads=2, core=core) for path in (source, file))
    torch.set_num_threads(1)
    assert got.info["core"] == core
    assert got.context_length == expected.context_length
    assert alone(got, prompt(90), GREEDY) == alone(expected, prompt(90), GREEDY)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("name", ["phi3", "glm4", "gemma3", "mixtral", "qwen2-moe"])
def test_quantised_weights_give_the_bits_of_their_floats(name: str, kind: str, tmp_path: Path) -> None:
    """Joined tensors, reordered heads and experts, cut out of what is stored."""
    if (lib := library()) is None:
        pytest.skip("compiled operations are not built")
    file = GgufFile(gguf_families.write(tmp_path / "x.gguf", folder(f"{name}-wide"), kind_of=kind))
    spec = spec_of(of_gguf(file))
    assert spec
    packed = FusedLlama(spec, weights.read_stored(file, spec), lib, 2, kind)
    assert sum(one.type == kind for one in file.tensors.values()) >= 4 * len(spec.layers)
    for n, one in file.tensors.items():
        file.tensors[n] = StoredTensor("F32", one.shape, exactly(one).numpy().data.cast("B"))
    expected = FusedLlama(
        spec, weights.read_weights(file, spec, torch.device("cpu"), torch.float32), lib, 2, "none"
    )
    tokens = prompt(60)
    for cuts in ([60], [1] * 60, [2, 5, 53]):
        assert torch.equal(logits(packed, tokens, cuts), logits(expected, tokens, [60])), cuts


def test_every_architecture_of_gguf_is_of_a_family() -> None:
    assert {architecture for _, architecture, _ in ARCHITECTURES.values()} <= FAMILIES.keys()


def test_the_frequencies_of_llama_3_are_divided(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    source = changed("llama", tmp_path / "folder", rope_parameters=rope)
    expected = load(source)
    spec = spec_of(read(ModelFolder(source)))
    assert spec
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16)
    divisors = {"rope_freqs.weight": (plain / spec.ropes[0].inv_freq).numpy()}
    got = load(gguf_families.write(tmp_path / "x.gguf", source, divisors))
    assert close(alone(got, prompt(90), GREEDY), alone(expected, prompt(90), GREEDY))
    undivided = load(gguf_families.write(tmp_path / "y.gguf", source))
    assert not close(alone(undivided, prompt(90), GREEDY), alone(expected, prompt(90), GREEDY))


def test_phi_with_two_sets_of_frequencies_serves_the_short_one(tmp_path: Path) -> None:
    source = folder("phi3-long")
    both = {f"rope_factors_{n}.weight": np.full(8, by, np.float32) for n, by in (("short", 1), ("long", 4))}
    got = load(gguf_families.write(tmp_path / "x.gguf", source, both))
    assert got.context_length == 64
    assert close(alone(got, prompt(38), GREEDY), alone(model("phi3-long"), prompt(38), GREEDY))


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("expert_used_count", 0, "expert_used_count"),
        ("expert_used_count", 19, "own forward pass"),
        ("expert_count", 17, "shape"),
        ("rope.dimension_count", 96, "own forward pass"),
        ("attention.head_count_kv", 3, "own forward pass"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(tmp_path: Path, key: str, value: int, why: str) -> None:
    file = gguf_families.write(tmp_path / "x.gguf", folder("qwen3-moe"))
    data = bytearray(file.read_bytes())
    at = data.index(f"qwen3moe.{key}".encode()) + len(f"qwen3moe.{key}") + 4
    data[at : at + 4] = value.to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(ModelError, match=why):
        load(file)
