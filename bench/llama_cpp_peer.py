"""llama.cpp as a peer of bench.engine: the same weights as GGUF, decoded by its own library.

Needs `pip install llama-cpp-python gguf`; bench.engine leaves it out without them. It batches like the server
of llama.cpp: prompts in batches of up to 2,048 tokens, then one token for every request in each step.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as c
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
BATCH = 2048


def convert(folder: Path, kind: str) -> Path:
    """Convert the model to GGUF. `kind`: F32 or Q8_0."""
    file = folder / f"{kind}.gguf"
    if file.exists():
        return file
    config = json.loads((folder / "config.json").read_text())
    made = gguf.GGUFWriter(str(file), "llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    made.add_vocab_size(config["vocab_size"])
    made.add_context_length(config["max_position_embeddings"])
    made.add_embedding_length(config["hidden_size"])
    made.add_block_count(config["num_hidden_layers"])
    made.add_feed_forward_length(config["intermediate_size"])
    made.add_head_count(heads)
    made.add_head_count_kv(kv_heads)
    made.add_layer_norm_rms_eps(config["rms_norm_eps"])
    made.add_rope_freq_base(10000.0)
    made.add_rope_dimension_count(config["hidden_size"] // heads)
    add_tokenizer(made, folder, config["vocab_size"])
    wanted = gguf.GGMLQuantizationType[kind]
    for key, stored in load_file(folder / "model.safetensors").items():
        weight = np.ascontiguousarray(stored, np.float32)
        if "q_proj" in key or "k_proj" in key:  # llama.cpp rotates pairs of neighbours, this model halves
            halves = weight.reshape(heads if "q_proj" in key else kv_heads, 2, -1, weight.shape[1])
            weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
        if weight.ndim == 1 or kind == "F32":
            made.add_tensor(name_of(key), weight)
        else:
            made.add_tensor(name_of(key), gguf.quants.quantize(weight, wanted), raw_dtype=wanted)
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    return file


def add_tokenizer(made: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """Add the folder's tokenizer, and tokens without a use up to the size of the vocabulary."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    tokens = sorted(stored["model"]["vocab"], key=stored["model"]["vocab"].__getitem__)
    special = {token["content"] for token in stored["added_tokens"]}
    types = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    unused = [f"<unused{i}>" for i in range(len(tokens), size)]
    made.add_tokenizer_model("gpt2")
    made.add_tokenizer_pre("default")
    made.add_token_list(tokens + unused)
    made.add_token_types(types + [gguf.TokenType.UNUSED] * len(unused))
    made.add_token_merges([" ".join(pair) for pair in stored["model"]["merges"]])
    made.add_bos_token_id(0)
    made.add_eos_token_id(2)


def name_of(key: str) -> str:
    bare = key.removesuffix(".weight")
    if bare in TOP:
        return TOP[bare] + ".weight"
    _, _, layer, rest = bare.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def quantised(whole: Path, kind: str) -> Path:
    """Let llama.cpp store the weights of a GGUF file as files of that kind have them (Q4_K_M, Q8_0)."""
    file = whole.with_name(f"{whole.stem.split('.')[0]}.{kind}.gguf")
    if not file.exists():
        options = c.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = getattr(c, f"LLAMA_FTYPE_MOSTLY_{kind}"), True
        assert c.llama_model_quantize(os.fsencode(whole), os.fsencode(file), c.byref(options)) == 0
    return file


def side(path: Path, kind: str, threads: int) -> Callable[[list[list[int]], int], float]:
    """`path`: a GGUF file, or a model folder, which becomes one of that kind."""
    c.llama_log_set(_quiet, None)
    file = path if path.is_file() else convert(path, kind)
    model = c.llama_model_load_from_file(os.fsencode(file), c.llama_model_default_params())
    vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))

    def run(prompts: list[list[int]], new: int) -> float:
        options = c.llama_context_default_params()
        room = -(-(max(map(len, prompts)) + new) // 256) * 256
        options.n_ctx, options.n_seq_max = room * len(prompts), len(prompts)
        options.n_batch, options.n_ubatch = BATCH, 512
        options.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_ENABLED
        options.n_threads = options.n_threads_batch = threads
        context = c.llama_init_from_model(model, options)
        batch = c.llama_batch_init(BATCH, 0, 1)
        try:
            began = time.perf_counter()
            last = _prefill(context, batch, prompts, vocab)
            for step in range(new - 1):
                batch.n_tokens = 0
                for i, token in enumerate(last):
                    _add(batch, token, len(prompts[i]) + step, i, wanted=True)
                assert c.llama_decode(context, batch) == 0
                last = [_likeliest(context, i, vocab) for i in range(len(last))]
            return time.perf_counter() - began
        finally:
            c.llama_batch_free(batch)
            c.llama_free(context)

    return run


def _prefill(context: Any, batch: Any, prompts: list[list[int]], vocab: int) -> list[int]:
    """Return the first new token of each prompt."""
    last: list[int] = [0] * len(prompts)
    ends: list[tuple[int, int]] = []  # (row, prompt) for each row of logits that the batch gives

    def flush() -> None:
        assert c.llama_decode(context, batch) == 0
        for row, prompt in ends:
            last[prompt] = _likeliest(context, row, vocab)
        ends.clear()
        batch.n_tokens = 0

    batch.n_tokens = 0
    for i, prompt in enumerate(prompts):
        for at, token in enumerate(prompt):
            if batch.n_tokens == BATCH:
                flush()
            if at == len(prompt) - 1:
                ends.append((batch.n_tokens, i))
            _add(batch, token, at, i, wanted=at == len(prompt) - 1)
    flush()
    return last


def _add(batch: Any, token: int, position: int, sequence: int, wanted: bool) -> None:
    n = batch.n_tokens
    batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.logits[n] = token, position, 1, wanted
    batch.seq_id[n][0] = sequence
    batch.n_tokens = n + 1


def _likeliest(context: Any, row: int, vocab: int) -> int:
    return int(np.ctypeslib.as_array(c.llama_get_logits_ith(context, row), (vocab,)).argmax())


@c.llama_log_callback  # type: ignore[untyped-decorator]
def _quiet(level: int, text: bytes, data: Any) -> None:
    pass
