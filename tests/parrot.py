"""A model that says prepared texts: the last character of a prompt chooses the answer.

Each piece of a text is one token, and the weights only say which token follows which.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# All that is said, then what chooses the answer.
FRAME = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{{ messages[-1].content[-1:] }}"
)


def make(folder: Path, scripts: dict[str, list[str]], template: str = FRAME, width: int = 512) -> Path:
    """`scripts`: by the character that chooses it, the pieces of a text."""
    folder.mkdir(parents=True)
    alphabet = {bytes([b]): c for b, c in zip(range(256), _letters(), strict=True)}
    marks = [
        piece
        for pieces in scripts.values()
        for piece in pieces
        if piece.startswith("[/") or piece == "[THINK]"
    ]
    special = [*SPECIAL, *dict.fromkeys(marks)]
    table = {word: i for i, word in enumerate([*special, *alphabet.values()])}
    after = dict[int, int]()
    for chosen, pieces in scripts.items():
        last = table[alphabet[chosen.encode()]]
        for piece in pieces:
            word = piece if piece in special else "".join(alphabet[bytes([b])] for b in piece.encode())
            after[last] = last = table.setdefault(word, len(table))
        after[last] = table["<|im_end|>"]
    _tokenizer(folder, table, special, template)
    _weights(folder, after, len(table), width)
    return folder


def _letters() -> list[str]:
    """The byte-level alphabet in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) if b in plain else chr(256 + others.index(b)) for b in range(256)]


def _tokenizer(folder: Path, table: dict[str, int], special: list[str], template: str) -> None:
    made = Tokenizer(models.BPE(vocab=table, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    made.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": template}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _weights(folder: Path, after: dict[int, int], size: int, width: int) -> None:
    """One layer that adds nothing: the output depends on the last token alone."""
    assert size <= width
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": size,
        "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "silu", "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "eos_token_id": 2,
        "pad_token_id": 0, "bos_token_id": None, "torch_dtype": "float32", "attention_bias": False,
        "mlp_bias": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {
        "self_attn.q_proj": (64, width), "self_attn.k_proj": (32, width), "self_attn.v_proj": (32, width),
        "self_attn.o_proj": (width, 64), "mlp.gate_proj": (32, width), "mlp.up_proj": (32, width),
        "mlp.down_proj": (width, 32),
    }  # fmt: skip
    tensors: dict[str, Any] = {
        f"model.layers.0.{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()
    }
    for name in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"):
        tensors[name + ".weight"] = np.ones(width, np.float32)
    tensors["model.embed_tokens.weight"] = np.eye(size, width, dtype=np.float32)
    head = np.zeros((size, width), np.float32)
    for token in range(size):
        head[after.get(token, 2), token] = 1
    tensors["lm_head.weight"] = head
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
