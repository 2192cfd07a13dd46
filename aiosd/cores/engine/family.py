"""The Llama family as data: shapes and switches from config.json, weights by their Hugging Face names.

Decides which models llama.py and fused.py may run. foreign.py runs every model with a property that is not
known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from aiosd.cores.engine.folder import ModelFolder
from aiosd.cores.engine.gguf import GgufFile, StoredTensor

FAMILY = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
ROPE = {"default", "linear", "llama3", "yarn"}  # kinds whose frequencies do not depend on the length


@dataclass(frozen=True)
class DecoderSpec:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    eps: float
    inv_freq: torch.Tensor  # [head_dim / 2], radians per position
    rope_scale: float  # factor of cos and sin (YaRN)
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool


@dataclass
class Weights:
    """Joined so that one product computes several: qkv is [q; k; v], gate_up is [gate; up]."""

    embedding: torch.Tensor
    head: torch.Tensor
    norm: torch.Tensor
    layers: Iterator[dict[str, torch.Tensor | None]]  # one at a time: memory holds them once


def spec_of(config: Any) -> DecoderSpec | None:
    """None when llama.py and fused.py lack some property of the model."""
    if (config.architectures or [None])[0] not in FAMILY or config.hidden_act != "silu":
        return None
    kind = config.model_type
    if kind == "mistral" and config.sliding_window is not None:
        return None
    if any(t != "full_attention" for t in getattr(config, "layer_types", None) or ()):
        return None
    rope = _rope(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if rope is None or head_dim % 2 or getattr(config, "quantization_config", None) is not None:
        return None
    attention_bias = bool(getattr(config, "attention_bias", False))
    return DecoderSpec(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        inv_freq=rope[0],
        rope_scale=rope[1],
        qkv_bias=kind == "qwen2" or attention_bias,
        out_bias=kind != "qwen2" and attention_bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=kind == "qwen3",
        tied=bool(config.tie_word_embeddings),
    )


def _rope(config: Any) -> tuple[torch.Tensor, float] | None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters or {}
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return None
    if kind == "default":
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 1.0 / parameters["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim), 1.0
    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return inv_freq.float(), float(scale)


def read_weights(
    folder: ModelFolder | GgufFile, spec: DecoderSpec, device: torch.device, dtype: torch.dtype
) -> Weights:
    def get(name: str, *shape: int) -> torch.Tensor:
        return folder.tensor(name, shape).to(device, dtype)

    hidden = spec.hidden
    embedding = get("model.embed_tokens.weight", spec.vocab, hidden)
    tied = spec.tied or "lm_head.weight" not in folder
    head = embedding if tied else get("lm_head.weight", spec.vocab, hidden)
    layers = (_layer(folder, spec, i, device, dtype) for i in range(spec.layers))
    return Weights(embedding, head, get("model.norm.weight", hidden), layers)


@dataclass
class StoredWeights:
    """As they lie in a file: the parts of each linear, one below the other."""

    embedding: StoredTensor
    head: StoredTensor
    norm: torch.Tensor
    layers: Iterator[dict[str, list[StoredTensor] | torch.Tensor | None]]


def read_stored(file: GgufFile, spec: DecoderSpec) -> StoredWeights:
    hidden = spec.hidden
    embedding = file.stored("model.embed_tokens.weight", (spec.vocab, hidden))
    head = embedding if spec.tied else file.stored("lm_head.weight", (spec.vocab, hidden))
    layers = (_stored_layer(file, spec, i) for i in range(spec.layers))
    return StoredWeights(embedding, head, file.tensor("model.norm.weight", (hidden,)), layers)


def _stored_layer(
    file: GgufFile, spec: DecoderSpec, i: int
) -> dict[str, list[StoredTensor] | torch.Tensor | None]:
    begin = f"model.layers.{i}."
    q, kv, hidden, inner = (
        spec.heads * spec.head_dim,
        spec.kv_heads * spec.head_dim,
        spec.hidden,
        spec.intermediate,
    )
    joined = {
        "qkv": ([(f"self_attn.{n}_proj", q if n == "q" else kv) for n in "qkv"], hidden, spec.qkv_bias),
        "out": ([("self_attn.o_proj", hidden)], q, spec.out_bias),
        "gate_up": ([("mlp.gate_proj", inner), ("mlp.up_proj", inner)], hidden, spec.mlp_bias),
        "down": ([("mlp.down_proj", hidden)], inner, spec.mlp_bias),
    }  # fmt: skip
    layer: dict[str, list[StoredTensor] | torch.Tensor | None] = {}
    for name, (parts, inputs, bias) in joined.items():
        layer[name] = [file.stored(f"{begin}{part}.weight", (rows, inputs)) for part, rows in parts]
        biases = [file.tensor(f"{begin}{part}.bias", (rows,)) for part, rows in parts] if bias else []
        layer[f"{name}_bias"] = torch.cat(biases) if biases else None
    layer["norm1"] = file.tensor(f"{begin}input_layernorm.weight", (hidden,))
    layer["norm2"] = file.tensor(f"{begin}post_attention_layernorm.weight", (hidden,))
    for name in ("q_norm", "k_norm"):
        whole = f"{begin}self_attn.{name}.weight"
        layer[name] = file.tensor(whole, (spec.head_dim,)) if spec.qk_norm else None
    return layer


def _layer(
    folder: ModelFolder | GgufFile, spec: DecoderSpec, i: int, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor | None]:
    def get(name: str, *shape: int) -> torch.Tensor:
        return folder.tensor(f"model.layers.{i}.{name}", shape).to(device, dtype)

    def join(
        part: str, rows: dict[str, int], inputs: int, bias: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight = torch.cat([get(f"{part}.{n}_proj.weight", size, inputs) for n, size in rows.items()])
        return weight, torch.cat(
            [get(f"{part}.{n}_proj.bias", size) for n, size in rows.items()]
        ) if bias else None

    q, kv, hidden, inner = (
        spec.heads * spec.head_dim,
        spec.kv_heads * spec.head_dim,
        spec.hidden,
        spec.intermediate,
    )
    layer: dict[str, torch.Tensor | None] = {}
    layer["qkv"], layer["qkv_bias"] = join("self_attn", {"q": q, "k": kv, "v": kv}, hidden, spec.qkv_bias)
    layer["out"], layer["out_bias"] = join("self_attn", {"o": hidden}, q, spec.out_bias)
    layer["gate_up"], layer["gate_up_bias"] = join("mlp", {"gate": inner, "up": inner}, hidden, spec.mlp_bias)
    layer["down"], layer["down_bias"] = join("mlp", {"down": hidden}, inner, spec.mlp_bias)
    layer["norm1"] = get("input_layernorm.weight", hidden)
    layer["norm2"] = get("post_attention_layernorm.weight", hidden)
    layer["q_norm"] = get("self_attn.q_norm.weight", spec.head_dim) if spec.qk_norm else None
    layer["k_norm"] = get("self_attn.k_norm.weight", spec.head_dim) if spec.qk_norm else None
    return layer
