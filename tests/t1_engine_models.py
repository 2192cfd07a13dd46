"""Small random models of several architectures, with a tokenizer of their own; made once a session."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, logging
from transformers import models as arch

from aiosd.cores.engine.engine import Engine
from aiosd.cores.engine.model import LoadedModel, load
from aiosd.cores.engine.sampler import TokenLogprob
from aiosd.cores.engine.sequence import Output
from aiosd.syscall.sampling import Sampling

logging.disable_progress_bar()  # type: ignore[no-untyped-call]
torch.set_num_threads(1)  # tests share the machine, and OpenMP waits for its slowest thread

VOCAB = 384
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 172,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = {"intermediate_size": 160, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96}


def _wide(name: str) -> Any:
    config = CONFIGS[name]()
    for key, value in WIDE.items():
        if hasattr(config, key):
            setattr(config, key, value)
    return config


CONFIGS: dict[str, Any] = {
    "llama": lambda: arch.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    # odd shapes for the compiled operations: 40 is no multiple of 16, and 3 heads share one KV head
    "llama-odd": lambda: arch.LlamaConfig(
        **{
            **SHAPE,
            "hidden_size": 120,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "vocab_size": 387,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        }
    ),
    "mistral": lambda: arch.MistralConfig(**SHAPE, head_dim=24, sliding_window=None),
    "qwen2": lambda: arch.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2-sliding": lambda: arch.Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=40, max_window_layers=1
    ),
    "qwen3": lambda: arch.Qwen3Config(**SHAPE, head_dim=32),
    "mistral-sliding": lambda: arch.MistralConfig(**SHAPE, sliding_window=48),
    "smollm3": lambda: arch.SmolLM3Config(**{**SHAPE, "num_hidden_layers": 5}),
    "smollm3-sliding": lambda: arch.SmolLM3Config(
        **SHAPE, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=40, attention_bias=True
    ),
    "phi3": lambda: arch.Phi3Config(**SHAPE, tie_word_embeddings=True),
    "phi3-sliding": lambda: arch.Phi3Config(**SHAPE, sliding_window=33),
    "phi4-mini": lambda: arch.Phi3Config(
        **SHAPE,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    ),
    "granite": lambda: arch.GraniteConfig(
        **SHAPE,
        tie_word_embeddings=True,
        embedding_multiplier=6.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=3.0,
    ),
    "olmo2": lambda: arch.Olmo2Config(**SHAPE),
    "olmo3": lambda: arch.Olmo3Config(
        **SHAPE,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "gemma2": lambda: arch.Gemma2Config(
        **SHAPE, head_dim=24, sliding_window=40, attn_logit_softcapping=2.0, final_logit_softcapping=5.0
    ),
    "gemma3": lambda: arch.Gemma3TextConfig(
        **SHAPE,
        head_dim=16,
        sliding_window=40,
        query_pre_attn_scalar=30,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        },
    ),
    "gemma3-vision": lambda: arch.Gemma3Config(
        text_config=CONFIGS["gemma3"](),
        vision_config=arch.SiglipVisionConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=28
        ),
        mm_tokens_per_image=4,
    ),
    "glm": lambda: arch.GlmConfig(**SHAPE, head_dim=24),
    "glm4": lambda: arch.Glm4Config(**SHAPE, head_dim=24),
    "mixtral": lambda: arch.MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=None),
    "qwen2-moe": lambda: arch.Qwen2MoeConfig(
        **SHAPE,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=72,
        mlp_only_layers=[1],
    ),
    "qwen3-moe": lambda: arch.Qwen3MoeConfig(
        **{**SHAPE, "head_dim": 24},
        num_experts=18,
        num_experts_per_tok=5,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        decoder_sparse_step=2,
    ),
    "phi": lambda: arch.PhiConfig(**SHAPE),
    "phi3-long": lambda: arch.Phi3Config(
        **SHAPE,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
        },
    ),
    "mamba": lambda: arch.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=VOCAB),
    "bloom": lambda: arch.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=VOCAB),
    "gpt2": lambda: arch.GPT2Config(
        n_embd=64,
        n_layer=2,
        n_head=4,
        vocab_size=VOCAB,
        n_positions=512,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=2,
    ),
}
for _name in ("phi3", "glm4", "gemma3", "mixtral", "qwen2-moe"):  # with widths of whole blocks and panels
    CONFIGS[f"{_name}-wide"] = functools.partial(_wide, _name)

RELATIVES = [
    "mistral-sliding", "qwen2-sliding", "smollm3", "smollm3-sliding", "phi3", "phi3-sliding", "phi4-mini",
    "granite", "olmo2", "olmo3", "gemma2", "gemma3", "gemma3-vision", "glm", "glm4", "mixtral", "qwen2-moe",
    "qwen3-moe",
]  # fmt: skip
FAMILY = ["llama", "llama-odd", "mistral", "qwen2", "qwen3", *RELATIVES]
FOREIGN = ["mistral-sliding", "gemma2", "gemma3", "phi", "phi3", "gpt2", "mixtral"]


@functools.cache
def root() -> Path:
    holder = tempfile.TemporaryDirectory(prefix="aiosd-models-")
    _keep.append(holder)
    return Path(holder.name)


_keep: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def tokenizer(vocab: int = VOCAB) -> Any:
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bare.train_from_iterator([Path(__file__).read_text()] * 2 + ["größer 日本語 😀😃 naïve"] * 9, trainer)
    new: Any = PreTrainedTokenizerFast
    made = new(
        tokenizer_object=bare,
        eos_token="<|im_end|>",
        bos_token="<|end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    made.chat_template = TEMPLATE
    return made


@functools.cache
def folder(name: str) -> Path:
    """A Hugging Face model folder, shared by all tests. A test that changes it must copy it first."""
    path = root() / name
    torch.manual_seed(0)
    config = CONFIGS[name]()
    new: Any = AutoModelForCausalLM
    model = new.from_config(config)
    for key, parameter in model.named_parameters():
        if "norm" in key or key.endswith("bias"):  # replace the initial ones and zeros
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@functools.cache
def model(name: str, core: str = "auto") -> LoadedModel:
    """`core`: int8 means the fused core with 8-bit weights."""
    quantization = core if core == "int8" else "none"
    made = load(
        folder(name), core="auto" if core == "int8" else core, threads=2, quantization=quantization
    )  # the compiled operations still use two threads
    torch.set_num_threads(1)
    return made


@functools.cache
def reference(name: str) -> Any:
    new: Any = AutoModelForCausalLM
    return new.from_pretrained(folder(name), dtype=torch.float32, attn_implementation="eager").eval()


def engine(m: LoadedModel, tokens: int = 8192, **options: int) -> Engine:
    return Engine(m, kv_bytes=tokens * m.kv_bytes_per_token, **options)


def prompt(length: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    return [int(t) for t in np.random.default_rng([seed, length]).integers(3, vocab, length)]


@dataclass
class Answer:
    """All outputs of one request, joined."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    cached: int = 0

    def take(self, output: Output) -> None:
        assert self.finish is None or self.finish == "preempted"
        self.tokens += output.tokens
        self.text += output.text
        self.logprobs += output.logprobs or ()
        self.finish = output.finish
        self.cached = max(self.cached, output.cached_tokens)


def run(e: Engine, answers: dict[int, Answer]) -> None:
    """Step until all requests have ended."""
    steps = 0
    while not e.idle:
        for output in e.step():
            answers.setdefault(output.id, Answer()).take(output)
        steps += 1
        assert steps < 3000


def alone(
    m: LoadedModel, asked: Sequence[int], sampling: Sampling, grammar: str = "", **options: int
) -> Answer:
    e = engine(m, **options)
    e.add(1, list(asked), sampling, owner="ada", grammar=grammar)
    answers: dict[int, Answer] = {}
    run(e, answers)
    return answers[1]
