"""Small GGUF files with random weights, written by the `gguf` library, for the tests of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize

from aiosd.cores.engine.vocabulary import ALPHABET
from tests.running import REPOSITORY

REAL = REPOSITORY / ".venv/models/SmolLM2-135M-Instruct.Q4_1.gguf"  # ./setup --tests fetches it
BLOCKS = {
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}  # which the library cannot make: values and bytes
HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # places of the scales of a block, as 16 bits
MARKS = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
PIECES = ["▁", *"abcdehilmnorstuvwy", "th", "▁th", "▁the", "he", "in", "▁w", "er"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {"hidden": 256, "inner": 512, "layers": 2, "heads": 4, "kv_heads": 2, "dim": 64}


def values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    made: np.ndarray[Any, Any] = (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
    return made


def stored(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Random weights of that kind, as bytes [rows, bytes of a row]; F32 as floats."""
    if kind == "F32":
        return values(rng, shape)
    if kind not in BLOCKS:
        return np.asarray(quantize(values(rng, shape), Kind[kind]))
    numbers, size = BLOCKS[kind]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // numbers, size), np.uint8)
    for at in HALVES[kind]:
        small = (rng.random(blocks.shape[:-1]) * 1e-3).astype(np.float16)
        blocks[..., at : at + 2] = small[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def make(
    path: Path,
    kinds: dict[str, str] | str,
    architecture: str = "llama",
    pieces: bool = False,
    more: dict[str, str] | None = None,
) -> Path:
    """`kinds`: by the end of a tensor's name, or one for all matrices; `pieces`: a SentencePiece
    vocabulary; `more`: metadata to add or change.
    """
    s, rng = SIZES, np.random.default_rng(0)
    tokens = [*MARKS, *(f"<0x{i:02X}>" for i in range(256)), *PIECES] if pieces else [*MARKS, *ALPHABET]
    wide = s["heads"] * s["dim"], s["kv_heads"] * s["dim"]
    matrices = {"token_embd": (len(tokens), s["hidden"]), "output": (len(tokens), s["hidden"])}
    vectors: dict[str, tuple[int, ...]] = {"output_norm": (s["hidden"],)}
    for i in range(s["layers"]):
        matrices |= {
            f"blk.{i}.attn_q": (wide[0], s["hidden"]), f"blk.{i}.attn_k": (wide[1], s["hidden"]),
            f"blk.{i}.attn_v": (wide[1], s["hidden"]), f"blk.{i}.attn_output": (s["hidden"], wide[0]),
            f"blk.{i}.ffn_gate": (s["inner"], s["hidden"]), f"blk.{i}.ffn_up": (s["inner"], s["hidden"]),
            f"blk.{i}.ffn_down": (s["hidden"], s["inner"]),
        }  # fmt: skip
        vectors |= {f"blk.{i}.attn_norm": (s["hidden"],), f"blk.{i}.ffn_norm": (s["hidden"],)}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(s["hidden"])
    writer.add_feed_forward_length(s["inner"])
    writer.add_block_count(s["layers"])
    writer.add_head_count(s["heads"])
    writer.add_head_count_kv(s["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list(tokens)
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([0.0] * (len(MARKS) + 256) + [-float(i) for i in range(len(PIECES))])
        writer.add_token_types([3] * len(MARKS) + [6] * 256 + [1] * len(PIECES))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_types([3] * len(MARKS) + [1] * len(ALPHABET))
        writer.add_token_merges([])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for key, value in (more or {}).items():
        writer.add_string(key, value)
    for name, shape in matrices.items():
        kind = (
            kinds
            if isinstance(kinds, str)
            else next((k for end, k in kinds.items() if name.endswith(end)), "F32")
        )
        writer.add_tensor(
            f"{name}.weight", stored(kind, rng, shape), raw_dtype=None if kind == "F32" else Kind[kind]
        )
    for name, width in vectors.items():
        writer.add_tensor(f"{name}.weight", 1 + values(rng, width))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
