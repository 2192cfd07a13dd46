"""A small Llama with random weights and a byte-level tokenizer, made without torch in a tenth of a second."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def make(
    folder: Path, *, hidden: int = 64, layers: int = 2, context_length: int = 1024, seed: int = 0
) -> Path:
    folder.mkdir(parents=True)
    vocabulary = {
        token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(vocabulary),
        "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4, "hidden_act": "silu",
        "max_position_embeddings": context_length, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None,
        "torch_dtype": "float32", "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(config, np.random.default_rng(seed)), folder / "model.safetensors", {"format": "pt"})
    return folder


def weights(config: dict[str, object], random: np.random.Generator) -> dict[str, np.ndarray]:
    def size(key: str) -> int:
        value = config[key]
        assert isinstance(value, int)
        return value

    hidden, inner, vocabulary = size("hidden_size"), size("intermediate_size"), size("vocab_size")
    kv = size("num_key_value_heads") * size("head_dim")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,)}
    for i in range(size("num_hidden_layers")):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm": (hidden,),
            layer + "post_attention_layernorm": (hidden,),
            layer + "self_attn.q_proj": (hidden, hidden),
            layer + "self_attn.k_proj": (kv, hidden),
            layer + "self_attn.v_proj": (kv, hidden),
            layer + "self_attn.o_proj": (hidden, hidden),
            layer + "mlp.gate_proj": (inner, hidden),
            layer + "mlp.up_proj": (inner, hidden),
            layer + "mlp.down_proj": (hidden, inner),
        }

    def tensor(shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return random.normal(0, 1.5 / np.sqrt(shape[1]), shape).astype(np.float32)

    return {name + ".weight": tensor(shape) for name, shape in shapes.items()}
