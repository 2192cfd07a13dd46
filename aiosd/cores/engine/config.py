"""Read config.json with transformers' own classes: they know the defaults, older spellings and field errors.

No `from __future__ import annotations` here: `strict` needs the types as objects, not as text.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from aiosd.cores.engine.folder import ModelFolder
from aiosd.errors import ModelError


@strict
class LlamaConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Stand-in for transformers.LlamaConfig, whose import dominates a worker's start-up time."""

    model_type = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    head_dim: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]


def of_values(path: Path, values: Mapping[str, Any]) -> PreTrainedConfig:
    """Raises ModelError."""
    given = dict(values)
    kind = given.pop("model_type")
    try:
        return LlamaConfig(**given) if kind == "llama" else AutoConfig.for_model(kind, **given)
    except Exception as error:  # noqa: BLE001  configuration classes raise errors of any kind
        why = " ".join(str(error).split())[:300]
        raise ModelError(f"{path}: its metadata are no model: {why}", "download the file again") from None


def read(folder: ModelFolder) -> PreTrainedConfig:
    """Raises ModelError."""
    reader = LlamaConfig if folder.config["model_type"] == "llama" else AutoConfig
    try:
        return reader.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  configuration classes raise errors of any kind
        why = " ".join(str(error).split())[:300]
        if "auto_map" in folder.config:
            why = "only code in the model's own folder knows this type, and aiosd never runs such code"
        raise ModelError(
            f"{folder.path / 'config.json'}: model_type {folder.config['model_type']!r}: {why}",
            "use a model that transformers itself supports, or a newer transformers",
        ) from None
