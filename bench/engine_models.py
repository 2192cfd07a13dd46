"""Random-weight Llama models for the engine's benchmark: shapes that people run on CPUs, and the shape of
AIOS.

Random weights take the same time as trained ones. Each model is made once, and all sides read its folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(os.environ.get("AIOSD_BENCH_MODELS", "/tmp/aiosd-bench-models"))


def _shape(
    hidden: int, layers: int, heads: int, kv: int, inner: int, vocab: int, tied: bool
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "A": _shape(256, 4, 4, 4, 688, 8192, False),  # the model of the measurements of the AIOS kernel
    "S": _shape(256, 6, 4, 2, 704, 4096, True),
    "M": _shape(768, 12, 12, 4, 2048, 8192, True),
    "L": _shape(1024, 24, 16, 8, 5120, 32768, True),
}


def path_of(name: str) -> Path:
    path = FOLDER / name
    if not (path / "model.safetensors").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            **SHAPES[name], max_position_embeddings=16384, bos_token_id=0, eos_token_id=2, pad_token_id=0
        )
        _tokenizer().save_pretrained(path)
        LlamaForCausalLM(config).save_pretrained(path)
    return path


def gguf_of(name: str) -> Path:
    """Let llama.cpp make a GGUF file. `name`: a shape or a GGUF file, and the kind: L-Q4_K_M, m.gguf-Q8_0."""
    from bench.llama_cpp_peer import convert, quantised

    of, _, kind = name.rpartition("-")
    whole = Path(of) if of.endswith(".gguf") else convert(path_of(of), "F32")
    return quantised(whole, kind)


def _tokenizer() -> Any:
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet)
    bare.train_from_iterator([Path(__file__).read_text()], trainer)
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=bare, bos_token="<|end|>", eos_token="<|im_end|>", pad_token="<|end|>")
