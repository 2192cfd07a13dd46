"""Quantised safetensors: each format gives the bits of the floats that its numbers stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from aiosd.cores.engine.model import load
from aiosd.errors import ModelError
from tests.t1_engine_models import SHAPE, tokenizer
from tests.t1_gguf import logits

TOKENS = [int(i) for i in torch.randint(3, 380, (40,), generator=torch.Generator().manual_seed(1))]
Made = tuple[
    dict[str, torch.Tensor], torch.Tensor
]  # a linear's tensors by the ends of their names; its floats
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's order_map


def groups(weight: torch.Tensor, size: int, bits: int, middle: bool) -> tuple[torch.Tensor, ...]:
    """Numbers [outputs, inputs], scales and zero points [outputs, groups]; the zero point in the middle?"""
    most = (1 << bits) - 1
    parts = weight.view(len(weight), -1, size)
    low, high = parts.amin(-1), parts.amax(-1)
    if middle:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / most).clamp(min=1e-4).half()
    zero = torch.full_like(low, (most + 1) // 2) if middle else (-low / scale).round().clamp(1, most)
    numbers = (parts / scale[..., None] + zero[..., None]).round().clamp(0, most).view_as(weight)
    return numbers.int(), scale, zero.int()


def floats(
    numbers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    return (numbers - zero[:, index]).float() * scale.float()[:, index]


def words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Join the numbers of a row, the lowest bits first."""
    each = 32 // bits
    made = torch.zeros(len(numbers), numbers.shape[1] // each, dtype=torch.int64)
    for i in range(each):
        made |= numbers[:, i::each].long() << bits * i
    return (made - (made >> 31 << 32)).int()


def gptq(weight: torch.Tensor, bits: int = 4, mixed: bool = False, stored_less: int = 1) -> Made:
    numbers, scale, zero = groups(weight, 32, bits, middle=bits == 8)
    index = torch.arange(weight.shape[1]) // 32
    if mixed:  # act-order: neighbours belong to different groups
        index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(2))]
    made = {
        "qweight": words(numbers, bits).t().contiguous(),
        "qzeros": words(zero.t() - stored_less, bits),
        "scales": scale.t().contiguous(),
        "g_idx": index.int(),
    }
    return made, floats(numbers, scale, zero, index)


def awq(weight: torch.Tensor) -> Made:
    numbers, scale, zero = groups(weight, 32, 4, middle=False)

    def packed(values: torch.Tensor) -> torch.Tensor:
        return words(values.view(len(values), -1, 8)[..., list(AWQ_ORDER)].flatten(1), 4)

    made = {"qweight": packed(numbers.t()), "qzeros": packed(zero.t()), "scales": scale.t().contiguous()}
    return made, floats(numbers, scale, zero, torch.arange(weight.shape[1]) // 32)


def compressed(weight: torch.Tensor, form: str, **how: Any) -> Made:
    """By the library of compressed-tensors itself."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**how), format=form)
    size = how.get("group_size") or weight.shape[1]
    if how["strategy"] == "block":
        parts = weight.view(len(weight) // 32, 32, -1, 32).abs().amax((1, 3))
    else:
        parts = weight.view(len(weight), -1, size).abs().amax(-1)
    scale = (parts / (448 if how["type"] == "float" else (1 << how["num_bits"] - 1) - 1)).bfloat16().float()
    state = {"weight": weight, "weight_scale": scale}
    if not how["symmetric"]:
        state["weight_zero_point"] = torch.randint(-3, 4, scale.shape, dtype=torch.int8)
    library = BaseCompressor.get_value_from_registry(form)
    stored = library.compress(state, scheme)
    plain = library.decompress(dict(stored), scheme)["weight"].float()
    return {key: value.contiguous() for key, value in stored.items()}, plain


INT: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
INT8 = {**INT, "num_bits": 8, "strategy": "channel", "group_size": None}
BLOCKS = {**FP8, "strategy": "block", "block_structure": [32, 32]}
PACKED, BYTES = "pack-quantized", "float-quantized"


def config(form: str, how: dict[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": how}},
    }  # fmt: skip


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
FORMS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Made], str]] = {  # and the types in memory
    "gptq": (GPTQ, gptq, "I4"),
    "gptq-8": ({**GPTQ, "bits": 8}, lambda w: gptq(w, 8), "I8"),
    "gptq-v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, lambda w: gptq(w, stored_less=0), "I4"),
    "gptq-mixed": (GPTQ, lambda w: gptq(w, mixed=True), "F32"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq, "I4"),
    "int4": (config(PACKED, INT), lambda w: compressed(w, PACKED, **INT), "I4"),
    "int4-channel": (
        config(PACKED, {**INT, "strategy": "channel"}),
        lambda w: compressed(w, PACKED, **{**INT, "strategy": "channel", "group_size": None}),
        "I4",
    ),
    "int4-zero": (
        config(PACKED, {**INT, "symmetric": False}),
        lambda w: compressed(w, PACKED, **{**INT, "symmetric": False}),
        "I4",
    ),
    "int8-packed": (config(PACKED, INT8), lambda w: compressed(w, PACKED, **INT8), "I8"),
    "int8": (config("int-quantized", INT8), lambda w: compressed(w, "int-quantized", **INT8), "I8"),
    "fp8": (config(BYTES, FP8), lambda w: compressed(w, BYTES, **FP8), "F8"),
    "fp8-blocks": (config(BYTES, BLOCKS), lambda w: compressed(w, BYTES, **BLOCKS), "F8"),
}


def written(
    tmp_path: Path, quantization: dict[str, Any], pack: Callable[[torch.Tensor], Made]
) -> tuple[Path, Path]:
    """Two folders of the same model: with quantised weights, and with their floats."""
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    torch.manual_seed(0)
    new: Any = AutoModelForCausalLM
    model = new.from_config(LlamaConfig(**{**SHAPE, "intermediate_size": 192}))
    for path in (packed, plain):
        model.save_pretrained(path)
        tokenizer().save_pretrained(path)
    weights = load_file(plain / "model.safetensors")
    stored = dict(weights)
    for name in weights:
        if name.endswith("proj.weight"):
            made, weights[name] = pack(stored.pop(name))
            stored |= {name.removesuffix("weight") + key: value for key, value in made.items()}
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    described = json.loads((packed / "config.json").read_text()) | {"quantization_config": quantization}
    (packed / "config.json").write_text(json.dumps(described))
    return packed, plain


def same(packed: Path, plain: Path, quantization: str = "none") -> dict[str, Any]:
    """Compare all logits, with rows alone and together; return info."""
    small, whole = load(packed, quantization=quantization, threads=2), load(plain, threads=2)
    want = logits(whole.core, TOKENS, [40])  # type: ignore[arg-type]
    for cuts in ([40], [1] * 40, [2, 3, 5, 30]):
        assert torch.equal(logits(small.core, TOKENS, cuts), want), cuts  # type: ignore[arg-type]
    return small.info


@pytest.mark.parametrize("form", FORMS)
def test_quantised_weights_give_the_bits_of_their_floats(tmp_path: Path, form: str) -> None:
    quantization, pack, kind = FORMS[form]
    packed, plain = written(tmp_path, quantization, pack)
    info = same(packed, plain)
    assert info["quantization"] == quantization["quant_method"]
    linears = 4 * sum(p.numel() for n, p in load_file(plain / "model.safetensors").items() if "proj" in n)
    assert (info["expanded_bytes"] > 0) == (kind == "F32")
    assert info["stored_bytes"][kind] > linears / 8 - 1
    slow = load(packed, core="torch")  # any other core and device gets floats
    exact = load(plain, core="torch")
    assert torch.equal(*(logits(m.core, TOKENS, [40]) for m in (slow, exact)))  # type: ignore[arg-type]


def test_int4_makes_4_bit_weights_of_floats(tmp_path: Path) -> None:
    def pack(weight: torch.Tensor) -> Made:
        kind = gguf.GGMLQuantizationType.Q4_1
        made = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
        return {"weight": weight}, torch.from_numpy(made)

    packed, plain = written(tmp_path, {}, pack)
    (packed / "config.json").write_bytes((plain / "config.json").read_bytes())
    weights = load_file(plain / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        kind = gguf.GGMLQuantizationType.Q8_0
        weights[name] = torch.from_numpy(
            gguf.quants.dequantize(gguf.quants.quantize(weights[name].numpy(), kind), kind)
        )
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    small, whole = (load(path, quantization=how) for path, how in ((packed, "int4"), (plain, "none")))
    assert small.info["quantization"] == "int4"
    a, b = (logits(m.core, TOKENS, [40]) for m in (small, whole))  # type: ignore[arg-type]
    assert torch.allclose(a, b, atol=1e-4), "the library rounds offset and product apart"


@pytest.mark.parametrize(
    ("quantization", "why"),
    [
        (config("nvfp4-pack-quantized", {}), "'nvfp4-pack-quantized' of compressed-tensors"),
        ({**GPTQ, "bits": 3}, "GPTQ with 3 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv' of AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ],
)
def test_a_format_that_is_not_read_is_named(tmp_path: Path, quantization: dict[str, Any], why: str) -> None:
    packed, _ = written(tmp_path, quantization, gptq)
    with pytest.raises(ModelError, match=why) as caught:
        load(packed)
    assert "GGUF" in caught.value.hint


@pytest.mark.parametrize("wrong", ["shape", "lost", "groups"])
def test_weights_that_do_not_fit_are_named(tmp_path: Path, wrong: str) -> None:
    packed, _ = written(tmp_path, GPTQ, gptq)
    stored = load_file(packed / "model.safetensors")
    name = "model.layers.1.mlp.down_proj."
    if wrong == "shape":
        stored[f"{name}qweight"] = stored[f"{name}qweight"][:-1].contiguous()
    elif wrong == "lost":
        del stored[f"{name}scales"]
    else:
        stored[f"{name}scales"] = stored[f"{name}scales"][:-1].contiguous()
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj"):
        load(packed)
