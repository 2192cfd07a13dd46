"""8-bit weights: their values, and how close the answers stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aiosd.cores.engine.model import load
from aiosd.errors import ModelError
from aiosd.syscall.sampling import Sampling
from tests.conftest import TINY
from tests.t1_engine_exact import get
from tests.t1_engine_models import alone, folder, prompt

MADE = Sampling(max_tokens=30, ignore_eos=True, logprobs=3)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Round to the nearest of 255 multiples of each output's scale, independently of ops.cpp."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (weight / scale).round() * scale


def test_int8_is_the_float_model_with_rounded_weights(tmp_path: Path) -> None:
    """Prefill uses the code for large batches, decoding the code for small ones."""
    shutil.copytree(folder("llama-odd"), tmp_path / "m")
    weights = load_file(tmp_path / "m/model.safetensors")
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert not config["tie_word_embeddings"], "the embedding stays as it is"
    for name in weights:
        if name.endswith("proj.weight") or name == "lm_head.weight":
            weights[name] = rounded(weights[name])
    save_file(weights, tmp_path / "m/model.safetensors", {"format": "pt"})
    expected = alone(load(tmp_path / "m", core="fused"), prompt(90), MADE)
    got = alone(get("llama-odd", "int8"), prompt(90), MADE)
    assert got.tokens == expected.tokens
    for a, b in zip(got.logprobs, expected.logprobs, strict=True):
        assert abs(a.logprob - b.logprob) < 1e-3


def test_the_built_in_model_says_the_same_with_int8() -> None:
    whole, small = load(TINY), load(TINY, quantization="int8")
    assert small.info["quantization"] == "int8"
    assert small.kv_layout != whole.kv_layout, "their KV is not each other's"
    for question in ("Repeat: mango cloud river", "What are you?", "My name is Zorvik."):
        asked = whole.render([{"role": "user", "content": question}])
        a, b = (alone(m, asked, Sampling(max_tokens=40, logprobs=1)) for m in (whole, small))
        assert a.text == b.text
        assert max(abs(x.logprob - y.logprob) for x, y in zip(a.logprobs, b.logprobs, strict=True)) < 0.3


@pytest.mark.parametrize(("name", "dtype"), [("phi", "auto"), ("llama", "bfloat16")])
def test_int8_is_refused_where_it_does_not_work(name: str, dtype: str) -> None:
    with pytest.raises(ModelError, match=r"no own forward pass|not usable here"):
        load(folder(name), quantization="int8", dtype=dtype)
