"""The metadata of a GGUF file as config.json would say them, for each architecture that gguf.py reads.

The converter of llama.cpp leaves out some numbers that the code of llama.cpp knows. They stand here too.
Every value may be wrong or hostile. This module checks its kind (ModelError); transformers' configuration
classes and family.py check the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiosd.cores.engine.family import FULL, OWN_ROPES, SLIDING
from aiosd.errors import ModelError

if TYPE_CHECKING:
    from aiosd.cores.engine.gguf import GgufFile

AGAIN = "download the file again, and compare its checksum"
LAYERS_MAX, EXPERTS_MAX = 1_000, 1_024


class PlainConfig:
    """The values of a known architecture, without the import of transformers."""

    hidden_act = "silu"

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__ |= values

    def get_text_config(self) -> PlainConfig:
        return self


def of_gguf(file: GgufFile) -> Any:
    """Return a configuration as transformers has it. Raises ModelError."""
    rope = file.config["rope_parameters"]
    if all(one["rope_type"] in OWN_ROPES for one in (rope.get(FULL, rope), rope.get(SLIDING, rope))):
        return PlainConfig(file.config)
    from aiosd.cores.engine.config import of_values

    return of_values(file.path, file.config)


class Facts:
    """The keys of the file's architecture, and the shapes of its tensors."""

    def __init__(
        self, path: Path, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.path, self._metadata, self.shapes = path, metadata, shapes
        self.kind = str(metadata.get("general.architecture"))
        if self.kind not in ARCHITECTURES:
            raise ModelError(
                f"{path}: architecture {self.kind[:40]!r} is not read from GGUF",
                f"use one of {', '.join(ARCHITECTURES)}, or the model's folder with safetensors",
            )

    def key(self, name: str, default: Any = None) -> Any:
        return self._metadata.get(f"{self.kind}.{name}", default)

    def number(self, name: str, default: int = 0, most: int = (1 << 31) - 1) -> int:
        value = self.key(name, default)
        if not isinstance(value, int) or not 0 < value <= most:
            raise ModelError(
                f"{self.path}: {name} is {str(value)[:40]}, not a number from 1 to {most}", AGAIN
            )
        return value

    def real(self, name: str, default: float) -> float:
        value = self.key(name, default)
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ModelError(f"{self.path}: {name} is {str(value)[:40]}, not a number above 0", AGAIN)
        return float(value)

    def cap(self, name: str) -> float | None:
        return self.real(name, 0.0) if self.key(name) else None

    def rows(self, tensor: str) -> int:
        """How many outputs a linear has: the second dimension from the end; 0 without it."""
        shape = self.shapes.get(tensor, ())
        return shape[-2] if len(shape) >= 2 else 0

    @property
    def layers(self) -> int:
        return self.number("block_count", most=LAYERS_MAX)

    @property
    def head_dim(self) -> int:
        hidden, heads = self.number("embedding_length"), self.number("attention.head_count")
        return self.number("attention.key_length", max(1, hidden // heads))


def config(path: Path, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Raises ModelError."""
    facts = Facts(path, metadata, shapes)
    model_type, architecture, more = ARCHITECTURES[facts.kind]
    vocabulary = shapes.get("token_embd.weight")
    if vocabulary is None:
        raise ModelError(f"{path}: no tensor token_embd.weight", AGAIN)
    heads = facts.number("attention.head_count")
    made: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": vocabulary[0],
        "hidden_size": facts.number("embedding_length"),
        "intermediate_size": facts.number("feed_forward_length"),
        "num_hidden_layers": facts.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": facts.number("attention.head_count_kv", heads),
        "head_dim": facts.head_dim,
        "max_position_embeddings": facts.number("context_length"),
        "rms_norm_eps": facts.real("attention.layer_norm_rms_epsilon", 1e-6),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "rope_parameters": _rope(facts),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return made | more(facts, made)


def _rope(facts: Facts) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": facts.real("rope.freq_base", 10000.0)}
    turned = facts.number("rope.dimension_count", facts.head_dim)
    if turned != facts.head_dim:
        rope["partial_rotary_factor"] = turned / facts.head_dim
    scaling = facts.key("rope.scaling.type", "none")
    if scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": facts.real("rope.scaling.factor", 1.0)}
        if scaling == "yarn":
            rope["original_max_position_embeddings"] = facts.number("rope.scaling.original_context_length")
    elif scaling not in ("none", "longrope"):
        raise ModelError(f"{facts.path}: rope scaling {str(scaling)[:40]!r} is not known", "use another file")
    return rope


# What each architecture has beside the above.


def _llama(facts: Facts, made: dict[str, Any]) -> dict[str, Any]:
    if not facts.key("expert_count"):
        return {"hidden_act": "silu"}
    return {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "sliding_window": None} | {
        "num_experts": facts.number("expert_count", most=EXPERTS_MAX),
        "num_experts_per_tok": facts.number("expert_used_count", most=EXPERTS_MAX),
    }


def _plain(facts: Facts, made: dict[str, Any]) -> dict[str, Any]:
    return {}


def _sliding(facts: Facts, made: dict[str, Any]) -> dict[str, Any]:
    name = "attention.sliding_window"
    return {"sliding_window": facts.number(name) if facts.key(name) else None}


def _smollm3(facts: Facts, made: dict[str, Any]) -> dict[str, Any]:
    return {"no_rope_layers": [int((i + 1) % 4 != 0) for i in range(facts.layers)]}


def _phi3(facts: Facts, made: dict[str, Any]) -> dict[str, Any]:
    """With frequencies for short and for long texts (LongRoPE), the model is served for the short ones."""
    more = _sliding(facts, made)
    if "rope_factors_short.weight" in facts.shapes:
        whole, short = made["max_position_embeddings"], facts.number("rope.scaling.original_context_length")
        scale = math.sqrt(1 + math.log(max(whole / short, 1)) / math.log(max(short, 2)))
        scale = facts.real("rope.scaling.attn_factor", scale)
        more |= {"max_position_embeddings": min(whole, short)}
        more["rope_parameters"] = made["rope_parameters"] | {"scale": scale}
    return more


def _granite(facts: Facts, made: dict[str, Any]) -> dict[str, Any]:
    return {
        "embedding_multiplier": facts.real("embedding_scale", 1.0),
        "residual_multiplier": facts.real("residual_scale", 1.0),
        "attention_multiplier": facts.real("attention.scale", facts.head_dim**-0.5),
        "logits_scaling": facts.real("logit_scale", 1.0),
    }


def _olmo(facts: Facts, made: dict[str, Any]) -> dict[str, Any]:
    if not facts.key("attention.sliding_window"):
        return {}
    rope = made["rope_parameters"]
    if rope["rope_type"] == "yarn" and facts.key("rope.scaling.attn_factor"):
        rope = rope | {"attention_factor": facts.real("rope.scaling.attn_factor", 1.0)}
    local = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"]} | {
        "sliding_window": facts.number("attention.sliding_window"),
        "layer_types": _kinds(facts, 4),
        "rope_parameters": {FULL: rope, SLIDING: local},
    }


def _kinds(facts: Facts, period: int) -> list[str]:
    """Every `period`-th layer sees everything, unless the file names the layers that slide."""
    pattern = facts.key("attention.sliding_window_pattern", period)
    if isinstance(pattern, int) and pattern > 0:
        pattern = [(i + 1) % pattern != 0 for i in range(facts.layers)]
    if not isinstance(pattern, list) or len(pattern) != facts.layers:
        raise ModelError(f"{facts.path}: attention.sliding_window_pattern does not fit its layers", AGAIN)
    return [SLIDING if slides else FULL for slides in pattern]


def _gemma(facts: Facts, made: dict[str, Any], largest: int, period: int) -> dict[str, Any]:
    """`largest`: the layers of the one model whose attention has the scale of another width."""
    width = made["hidden_size"] // made["num_attention_heads"] if facts.layers == largest else facts.head_dim
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": max(1, width),
        "sliding_window": facts.number("attention.sliding_window", 4096),
        "layer_types": _kinds(facts, period),
        "attn_logit_softcapping": facts.cap("attn_logit_softcapping"),
        "final_logit_softcapping": facts.cap("final_logit_softcapping"),
    }


def _gemma2(facts: Facts, made: dict[str, Any]) -> dict[str, Any]:
    return _gemma(facts, made, 46, 2)


def _gemma3(facts: Facts, made: dict[str, Any]) -> dict[str, Any]:
    rope = made["rope_parameters"]
    local = {"rope_type": "default", "rope_theta": facts.real("rope.freq_base_swa", 10_000.0)}
    return _gemma(facts, made, 62, 6) | {"rope_parameters": {FULL: rope, SLIDING: local}}


def _qwen_moe(facts: Facts, made: dict[str, Any]) -> dict[str, Any]:
    sparse = {i for i in range(facts.layers) if f"blk.{i}.ffn_gate_inp.weight" in facts.shapes}
    first = min(sparse, default=0)
    return {
        "num_experts": facts.number("expert_count", most=EXPERTS_MAX),
        "num_experts_per_tok": facts.number("expert_used_count", most=EXPERTS_MAX),
        "moe_intermediate_size": facts.rows(f"blk.{first}.ffn_gate_exps.weight"),
        "mlp_only_layers": [i for i in range(facts.layers) if i not in sparse],
    } | (
        {"norm_topk_prob": True}
        if facts.kind == "qwen3moe"
        else {
            "norm_topk_prob": False,
            "qkv_bias": True,
            "shared_expert_intermediate_size": facts.rows(f"blk.{first}.ffn_gate_shexp.weight"),
        }
    )


More = Callable[[Facts, dict[str, Any]], dict[str, Any]]
ARCHITECTURES: dict[str, tuple[str, str, More]] = {  # of GGUF: model_type and class of transformers
    "llama": ("llama", "LlamaForCausalLM", _llama),
    "mistral": ("mistral", "MistralForCausalLM", _sliding),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", _plain),
    "qwen2moe": ("qwen2_moe", "Qwen2MoeForCausalLM", _qwen_moe),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", _plain),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM", _qwen_moe),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM", _smollm3),
    "phi3": ("phi3", "Phi3ForCausalLM", _phi3),
    "granite": ("granite", "GraniteForCausalLM", _granite),
    "olmo2": ("olmo2", "Olmo2ForCausalLM", _olmo),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", _gemma2),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", _gemma3),
    "glm4": ("glm4", "Glm4ForCausalLM", _plain),
}
