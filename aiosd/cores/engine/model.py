"""A loaded model: its vocabulary, its limits, and the core that runs it.

load() decides which core: the fused one (C++, CPU float32), plain torch for the Llama family, or
transformers' own modules for everything else. Never runs code from a model's folder.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from aiosd.cores.engine.constraint import Constraints
from aiosd.cores.engine.core import Core
from aiosd.cores.engine.family import DecoderSpec, spec_of
from aiosd.cores.engine.folder import ModelFolder
from aiosd.cores.engine.fused import STAY, FusedLlama
from aiosd.cores.engine.gguf import GgufFile, stored_bytes
from aiosd.cores.engine.kv import BLOCK
from aiosd.cores.engine.llama import TorchLlama
from aiosd.cores.engine.ops import library
from aiosd.cores.engine.packed_folder import FewBits, PackedFolder, is_packed
from aiosd.cores.engine.vocabulary import Vocabulary
from aiosd.cores.engine.weights import read_stored, read_weights
from aiosd.errors import BadRequest, ModelError


@dataclass
class LoadedModel:
    name: str
    identity: str  # hash of configuration, vocabulary and weights
    context_length: int
    vocab_size: int
    vocabulary: Vocabulary
    core: Core
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Any:
        return self.vocabulary.hf

    @property
    def kv_bytes_per_token(self) -> int:
        return self.core.kv_bytes_per_token

    @property
    def kv_layout(self) -> str:
        """Two engines of one model can exchange KV when this is the same."""
        info = self.core.info
        device = str(info["device"]).partition(":")[0]
        exact = "exact" if info["exact"] else "loose"
        form = f"{BLOCK} {self.core.kv_block_dim}"
        return f"{info['core']} {info['dtype']} {info.get('quantization', 'none')} {device} {exact} {form}"

    @property
    def kv_shapes(self) -> list[tuple[str, list[int]]]:
        """Dtype and shape of each KV tensor, with the dimension that counts blocks as -1."""
        dim = self.core.kv_block_dim
        return [
            (str(t.dtype).removeprefix("torch."), [*t.shape[:dim], -1, *t.shape[dim + 1 :]])
            for t in self.core.reserve(1)
        ]

    @property
    def eos(self) -> frozenset[int]:
        return self.vocabulary.eos

    @cached_property
    def constraints(self) -> Constraints:
        return Constraints(self.vocabulary, self.vocab_size)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
    ) -> list[int]:
        return self.vocabulary.render(messages, tools, variables)

    def encode(self, text: str) -> list[int]:
        return self.vocabulary.encode(text)

    def decode(self, tokens: list[int]) -> str:
        return self.vocabulary.decode(tokens)


def load(
    path: Path,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    threads: int | None = None,
    core: str = "auto",
    deterministic: bool = True,
    quantization: str = "none",
) -> LoadedModel:
    """`device`: cpu, cuda, cuda:N, or auto (accelerate spreads the model over all GPUs).

    `dtype`: auto is float32 on the CPU, what the weights are in or else bfloat16 on a GPU. `threads`: for the
    process, since torch has one pool; idle ones sleep (OMP_WAIT_POLICY, team.h). `core`: auto, or fused,
    torch, foreign to insist on one, as tests and benchmarks do. `info["exact"]` of the result says whether
    answers are free of the batch bit by bit: on the CPU in float32, if `deterministic`. `quantization`: none,
    int8 for weights of 8 bits with a scale for each output, or int4 for weights of 4 bits with a scale and a
    least value for each 32 (fused core only). Weights that are quantised in the file stay so with int4.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    _check_device(device)
    folder, config, vocabulary = _opened(Path(path))
    made = _core(folder, config, device, _dtype(dtype, device, config), core, deterministic, quantization)
    text = config.get_text_config()
    info = {
        "architecture": (config.architectures or [config.model_type])[0],
        "parameters": folder.parameters,
        **made.info,
        **facts(vocabulary, folder.path),
    }
    return LoadedModel(
        folder.path.resolve().name,
        folder.identity(),
        int(text.max_position_embeddings),
        int(text.vocab_size),
        vocabulary,
        made,
        info,
    )


def _opened(path: Path) -> tuple[ModelFolder | GgufFile, Any, Vocabulary]:
    if path.suffix == ".gguf":
        from aiosd.cores.engine import gguf_vocabulary
        from aiosd.cores.engine.gguf_config import of_gguf

        file = GgufFile(path)
        hf = gguf_vocabulary.read(path, file.metadata)
        config = of_gguf(file)
        return (
            file,
            config,
            Vocabulary(path, {"eos_token_id": gguf_vocabulary.ends(file.metadata)}, config, hf),
        )
    from aiosd.cores.engine.config import read

    folder = ModelFolder(path)
    config = read(folder)
    if is_packed(folder):
        folder, config.quantization_config = PackedFolder(path), None
    return folder, config, Vocabulary(folder.path, folder.config, config)


def facts(vocabulary: Vocabulary, path: Path) -> dict[str, Any]:
    """What the chat template shows of the model, by a probe of each kind of message. Raises ModelError when
    the template cannot even print a user's message."""
    try:
        habits = vocabulary.habits
    except BadRequest as error:
        hint = "give its folder another chat_template.jinja, or use another file"
        raise ModelError(f"{path}: the model cannot be asked anything: {error}", hint) from None
    thinking = [[one.opening, one.closing] for one in habits.family.thinking] if vocabulary.thinks else []
    knows = [name for name in ("enable_thinking", "reasoning_effort") if vocabulary.mentions(name)]
    return {
        "tool_calls": habits.family.name,
        "thinking": thinking,
        "template_lacks": habits.lacks,
        "template_knows": knows,
    }


def _check_device(device: str) -> None:
    try:
        if device != "auto":
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ModelError(f"device {device!r}: {why}", "use cpu, cuda:N, or auto for all GPUs") from None


def _dtype(name: str, device: str, config: Any) -> torch.dtype:
    if name == "auto":
        stored = getattr(config, "dtype", None)
        return torch.float32 if device == "cpu" or not isinstance(stored, torch.dtype) else stored
    made = getattr(torch, name, None)
    if not isinstance(made, torch.dtype) or not made.is_floating_point:
        raise ModelError(f"dtype {name!r} is not one", "use auto, float32, bfloat16 or float16")
    return made


def _as_stored(folder: GgufFile | PackedFolder | FewBits, spec: DecoderSpec, lib: ctypes.CDLL) -> FusedLlama:
    if isinstance(folder, GgufFile):
        kind = max(sizes := stored_bytes(folder.tensors), key=lambda kind: sizes[kind])
    else:
        kind = folder.method if isinstance(folder, PackedFolder) else "int4"
    made = FusedLlama(spec, read_stored(folder, spec), lib, torch.get_num_threads(), kind)
    if isinstance(folder, GgufFile):
        expanded = sum(4 * one.count for one in folder.tensors.values() if one.type not in STAY)
    else:
        sizes, expanded = made.kept_bytes, getattr(folder, "expanded_bytes", 0)
    made.info |= {"stored_bytes": sizes, "expanded_bytes": expanded}
    return made


def _core(
    folder: ModelFolder | GgufFile,
    config: Any,
    device: str,
    dtype: torch.dtype,
    wanted: str,
    deterministic: bool,
    quantization: str,
) -> Core:
    if quantization != "none":
        wanted = "fused"
    spec = spec_of(config)
    if spec is None or wanted == "foreign" or device == "auto":
        if wanted in ("fused", "torch"):
            raise ModelError(
                f"{folder.path}: no own forward pass for this architecture", "no core or quantization then"
            )
        if isinstance(folder, GgufFile):
            raise ModelError(
                f"{folder.path}: a GGUF file runs on one device, by aiosd's own forward pass",
                "use the model's folder with safetensors",
            )
        from aiosd.cores.engine.foreign import Foreign

        return Foreign(folder, config, device, dtype, deterministic)
    packs = wanted in ("auto", "fused") and device == "cpu" and dtype == torch.float32
    packs = packs and quantization in ("none", "int4")
    if packs and (lib := library()) is not None:
        if quantization == "int4" and type(folder) is ModelFolder:
            folder = FewBits(folder.path)
        if isinstance(folder, (GgufFile, PackedFolder, FewBits)):
            return _as_stored(folder, spec, lib)
    weights = read_weights(folder, spec, torch.device(device), dtype)
    if wanted != "torch" and device == "cpu" and dtype == torch.float32 and (lib := library()) is not None:
        return FusedLlama(spec, weights, lib, torch.get_num_threads(), quantization)
    if wanted == "fused":
        raise ModelError(
            "the fused operations are not usable here: they need a CPU and float32",
            "build them with `python -m aiosd.cores.engine.build`, or use no quantization",
        )
    return TorchLlama(spec, weights, deterministic)
