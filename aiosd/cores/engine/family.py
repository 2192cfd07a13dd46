"""The Llama family and its relatives as data: a table of their classes, and the shapes and switches of one
model from config.json.

Decides which models llama.py and fused.py may run. foreign.py runs every model with a property that is not
known here. weights.py reads the weights by the names in the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

OWN_ROPES = {"default", "linear"}
ROPES = OWN_ROPES | {"llama3", "yarn"}  # kinds whose frequencies do not depend on the length
FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATIONS = {"silu", "gelu_pytorch_tanh"}
LAYERS_MAX, EXPERTS_MAX = 1_000, 1_024

# The norms of a layer: of the input of attention and MLP, and of what the two add to the residual. Classes
# have different names for the latter, so these names are our own.
BEFORE = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
AFTER = {"after1": "attention_out_norm", "after2": "mlp_out_norm"}
OLMO = {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
MIXTRAL = {
    "mlp.gate": "block_sparse_moe.gate", "mlp.experts": "block_sparse_moe.experts",
    "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2",
}  # fmt: skip
JOINED = {"gate_up": "mlp.gate_up_proj"}


@dataclass(frozen=True)
class Architecture:
    """What the models of one class have in common. A bias is there always (True), or if config.json says so
    under a key."""

    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    norms: Mapping[str, str] = field(default_factory=lambda: BEFORE)
    qk_norm: str = ""  # over each "head", or over "all" heads at once
    names: Mapping[str, str] = field(default_factory=dict)  # of tensors, where they are not those of Llama
    joined: Mapping[str, str] = field(default_factory=dict)  # linears whose parts lie in one tensor
    one_plus: bool = False  # the factor of a norm is 1 + its weight
    pairs: bool = False  # numbers that are rotated together stand side by side
    windows: bool = False  # sliding_window is for every layer, without layer_types
    slides: bool = True  # layer_types may name sliding layers
    experts: bool = False
    inside: str = ""  # the part of a larger model that is the decoder
    numbers: Callable[[Any], dict[str, float]] = lambda config: {}


def _granite(config: Any) -> dict[str, float]:
    return {
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "attention_scale": config.attention_multiplier,
        "logit_scale": 1 / config.logits_scaling,
    }


def _gemma2(config: Any) -> dict[str, float]:
    return _gemma3(config) | {"attention_cap": config.attn_logit_softcapping or 0.0}


def _gemma3(config: Any) -> dict[str, float]:
    return {
        "embedding_scale": config.hidden_size**0.5,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "logit_cap": config.final_logit_softcapping or 0.0,
    }


LLAMA = Architecture("attention_bias", "attention_bias", "mlp_bias")
QWEN3 = Architecture("attention_bias", "attention_bias", qk_norm="head")
OLMO2 = Architecture("attention_bias", "attention_bias", norms=AFTER, qk_norm="all", names=OLMO)
GEMMA2 = Architecture(
    "attention_bias",
    "attention_bias",
    norms=BEFORE | AFTER,
    names={**OLMO, "post_attention_layernorm": "pre_feedforward_layernorm"},
    one_plus=True,
    numbers=_gemma2,
)
GEMMA3 = replace(GEMMA2, qk_norm="head", numbers=_gemma3)
GLM = Architecture("attention_bias", joined=JOINED, pairs=True)
FAMILIES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": Architecture("attention_bias", "attention_bias", windows=True),
    "MixtralForCausalLM": Architecture(names=MIXTRAL, windows=True, experts=True),
    "Qwen2ForCausalLM": Architecture(True),
    "Qwen2MoeForCausalLM": Architecture("qkv_bias", slides=False, experts=True),
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": replace(QWEN3, windows=True, experts=True),
    "SmolLM3ForCausalLM": LLAMA,
    "Phi3ForCausalLM": Architecture(joined={**JOINED, "qkv": "self_attn.qkv_proj"}, windows=True),
    "GraniteForCausalLM": replace(LLAMA, numbers=_granite),
    "Olmo2ForCausalLM": OLMO2,
    "Olmo3ForCausalLM": OLMO2,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": replace(GEMMA3, inside="language_model."),
    "GlmForCausalLM": GLM,
    "Glm4ForCausalLM": replace(
        GLM,
        norms=BEFORE | AFTER,
        names={"attention_out_norm": "post_self_attn_layernorm", "mlp_out_norm": "post_mlp_layernorm"},
    ),
}


@dataclass(frozen=True)
class Rope:
    inv_freq: torch.Tensor  # [rotated numbers of a head / 2], radians per position
    scale: float  # factor of cos and sin (YaRN)


@dataclass(frozen=True)
class LayerSpec:
    window: int  # a row sees its own key and the window - 1 keys before it; 0: all keys before it
    rope: int  # which of the ropes; -1: positions do not matter
    inner: int  # width of the MLP, beside experts of the shared one; 0: there is none
    experts: int  # 0: there are none


@dataclass(frozen=True)
class DecoderSpec:
    family: Architecture
    layers: tuple[LayerSpec, ...]
    ropes: tuple[Rope, ...]
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied: bool
    gelu: bool
    expert_inner: int = 0
    chosen: int = 0  # experts of a row
    renormalise: bool = False  # the shares of the chosen experts add up to 1
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float = 1.0
    attention_cap: float = 0.0  # 0: none; else cap * tanh(score / cap)
    logit_scale: float = 1.0
    logit_cap: float = 0.0

    @property
    def turned(self) -> int:
        """How many numbers of a head are rotated."""
        return 2 * len(self.ropes[0].inv_freq)

    @property
    def experts(self) -> int:
        return max(layer.experts for layer in self.layers)


def spec_of(config: Any) -> DecoderSpec | None:
    """None when llama.py and fused.py lack some property of the model."""
    family = FAMILIES.get((config.architectures or [""])[0])
    if family is None or getattr(config, "quantization_config", None) is not None:
        return None
    config = config.get_text_config()
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ACTIVATIONS or not _is_usual(config, family):
        return None
    windows, ropes, numbers = _windows(config, family), _ropes(config), _numbers(config, family)
    head_dim = _head_dim(config)
    if windows is None or ropes is None or numbers is None:
        return None
    kinds = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
    turned = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
    order = list(ropes)
    layers = tuple(
        LayerSpec(
            window=window,
            rope=order.index(kind if len(ropes) > 1 else order[0]) if turns else -1,
            inner=_inner(config, family, i),
            experts=config.num_experts if _is_sparse(config, family, i) else 0,
        )
        for i, (window, kind, turns) in enumerate(zip(windows, kinds, turned, strict=False))
    )
    spec = DecoderSpec(
        family,
        layers,
        tuple(ropes.values()),
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        qkv_bias=_says(config, family.qkv_bias),
        out_bias=_says(config, family.out_bias),
        mlp_bias=_says(config, family.mlp_bias),
        tied=bool(config.tie_word_embeddings),
        gelu=activation != "silu",
        **_experts(config, family),
        **numbers,
    )
    fits = len(layers) == config.num_hidden_layers and 0 <= spec.chosen <= spec.experts
    return spec if fits else None


def _says(config: Any, key: bool | str) -> bool:
    return bool(getattr(config, key, False)) if isinstance(key, str) else key


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _is_usual(config: Any, family: Architecture) -> bool:
    """Whether the numbers are some that a model can have: a stranger wrote them."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    grouped = heads > 0 and kv_heads > 0 and heads % kv_heads == 0 and _head_dim(config) > 0
    experts = config.num_experts if family.experts else 0
    return grouped and 0 < config.num_hidden_layers <= LAYERS_MAX and 0 <= experts <= EXPERTS_MAX


def _numbers(config: Any, family: Architecture) -> dict[str, Any] | None:
    try:
        numbers = {"attention_scale": _head_dim(config) ** -0.5, **family.numbers(config)}
    except ZeroDivisionError:
        return None
    usable = all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers.values())
    return numbers if usable else None


def _windows(config: Any, family: Architecture) -> list[int] | None:
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or 0
    known = {FULL, SLIDING} if family.slides else {FULL}
    if window < 0 or not set(kinds or ()) <= known or getattr(config, "use_bidirectional_attention", False):
        return None
    if kinds:
        return [window if kind == SLIDING else 0 for kind in kinds]
    return [window if family.windows else 0] * config.num_hidden_layers


def _is_sparse(config: Any, family: Architecture, i: int) -> bool:
    dense = i in (getattr(config, "mlp_only_layers", None) or ())
    return family.experts and not dense and (i + 1) % getattr(config, "decoder_sparse_step", 1) == 0


def _inner(config: Any, family: Architecture, i: int) -> int:
    if _is_sparse(config, family, i):
        return getattr(config, "shared_expert_intermediate_size", 0)
    return int(config.intermediate_size)


def _experts(config: Any, family: Architecture) -> dict[str, Any]:
    if not family.experts:
        return {}
    return {
        "expert_inner": getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
        "chosen": config.num_experts_per_tok,
        "renormalise": getattr(config, "norm_topk_prob", True),  # Mixtral always does
    }


def _ropes(config: Any) -> dict[str, Rope] | None:
    """The frequencies, by the kind of layer where kinds differ in them."""
    parameters = config.rope_parameters or {}
    nested = {kind: parameters[kind] for kind in (FULL, SLIDING) if isinstance(parameters.get(kind), dict)}
    found = {kind: _rope(config, own, kind) for kind, own in nested.items()} or {
        "": _rope(config, parameters, None)
    }
    most = _head_dim(config) // 2
    ropes = {kind: rope for kind, rope in found.items() if rope and 0 < len(rope.inv_freq) <= most}
    same = len({len(rope.inv_freq) for rope in ropes.values()}) == 1
    return ropes if same and len(ropes) == len(found) else None


def _rope(config: Any, parameters: dict[str, Any], layer_type: str | None) -> Rope | None:
    kind = parameters.get("rope_type", "default")
    if kind not in ROPES:
        return None
    if kind in OWN_ROPES:
        dim = int(_head_dim(config) * parameters.get("partial_rotary_factor", 1.0))
        inv_freq = 1.0 / parameters["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
        one = parameters["factor"] if kind == "linear" else 1.0
        factors = torch.tensor(parameters.get("factors", one))  # of a GGUF file: one for each frequency
        fits = dim % 2 == 0 and factors.numel() in (1, dim // 2)
        return Rope(inv_freq / factors, parameters.get("scale", 1.0)) if fits else None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), layer_type=layer_type)
    return Rope(inv_freq.float(), float(scale))
