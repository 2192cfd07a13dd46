"""Write a model folder as the GGUF file that llama.cpp's converter would make of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from safetensors.torch import load_file
from transformers import AutoConfig

PAIRED = {"llama", "smollm3", "granite", "mixtral"}  # classes whose queries and keys the converter reorders
ARCHITECTURES = {
    "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "olmo3": "olmo2",
    "gemma3_text": "gemma3",
}  # fmt: skip
EXPERT = re.compile(r"(.*\.experts)\.(\d+)(\..*)")


def write(path: Path, folder: Path, more: dict[str, Any] | None = None, kind_of: str = "") -> Path:
    """`more`: tensors that the folder lacks; `kind_of`: of all matrices with whole blocks; else float32."""
    config: Any = AutoConfig.from_pretrained(folder)
    kind = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, kind)
    _describe(writer, config)
    _vocabulary(writer, folder, config.vocab_size)
    arch = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    others = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers
    )  # dense layers of Qwen MoE
    suffixes = (".weight", ".bias")
    for name, tensor in _stacked(load_file(folder / "model.safetensors")).items():
        ours = names.get_name(name, suffixes) or others.get_name(name, suffixes)
        assert ours, name
        values = _converted(config, name, tensor).contiguous().numpy()
        quantised = kind_of and values.ndim >= 2 and values.shape[-1] % 32 == 0
        if quantised:
            writer.add_tensor(ours, quantize(values, Kind[kind_of]), raw_dtype=Kind[kind_of])
        else:
            writer.add_tensor(ours, values)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _converted(config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if config.model_type in PAIRED and (found := re.search(r"\.(q|k)_proj\.", name)):
        heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
        return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor[0] if name.endswith("shared_expert_gate.weight") else tensor


def _stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of a layer as one tensor."""
    made: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if expert := EXPERT.fullmatch(name):
            made.setdefault(expert[1] + expert[3], {})[int(expert[2])] = tensor
        else:
            made[name] = tensor
    return {n: torch.stack([t[e] for e in sorted(t)]) if isinstance(t, dict) else t for n, t in made.items()}


def _describe(writer: gguf.GGUFWriter, c: Any) -> None:
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if getattr(c, "sliding_window", None):
        writer.add_sliding_window(c.sliding_window)
    if getattr(c, "layer_types", None):
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in c.layer_types])
    if c.model_type == "granite":
        writer.add_embedding_scale(c.embedding_multiplier)
        writer.add_residual_scale(c.residual_multiplier)
        writer.add_attention_scale(c.attention_multiplier)
        writer.add_logit_scale(c.logits_scaling)
    if c.model_type == "gemma2":
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    if hasattr(c, "num_experts_per_tok"):
        writer.add_expert_count(c.num_experts)
        writer.add_expert_used_count(c.num_experts_per_tok)
        if hasattr(c, "moe_intermediate_size"):
            writer.add_expert_feed_forward_length(c.moe_intermediate_size)
        if hasattr(c, "shared_expert_intermediate_size"):
            writer.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)


def _vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(2)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
