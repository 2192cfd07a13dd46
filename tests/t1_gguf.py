"""GGUF files: weights that stay quantised give the same bits as their floats; damaged files give an error."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from aiosd.cores.engine import fused, weights
from aiosd.cores.engine.core import Batch, Segment
from aiosd.cores.engine.engine import Engine
from aiosd.cores.engine.family import DecoderSpec, spec_of
from aiosd.cores.engine.fused import FusedLlama
from aiosd.cores.engine.gguf import GgufFile, plain
from aiosd.cores.engine.gguf_config import of_gguf
from aiosd.cores.engine.gguf_vocabulary import SPLITS
from aiosd.cores.engine.model import LoadedModel, load
from aiosd.cores.engine.ops import library
from aiosd.cores.engine.stored import StoredTensor
from aiosd.cores.engine.weights import Weights
from aiosd.errors import ModelError
from aiosd.syscall.sampling import Sampling
from tests import gguf_files

KINDS = ["F32", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
OTHERS = ["F16", "BF16"]  # become float32
MIXED = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K", "output": "Q8_0", "attn_output": "Q5_0"}
VARIANTS = [name for name in ("avx512", "avx2") if library(name)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("gguf")

    def one(kind: str) -> Path:
        path = folder / f"{kind}.gguf"
        kinds: Any = {**MIXED, "": "Q4_K"} if kind == "mixed" else kind
        return path if path.exists() else gguf_files.make(path, kinds)

    return one


def exactly(stored: StoredTensor) -> torch.Tensor:
    """The floats that packed weights stand for: one rounding of q * d + m, which float64 holds exactly."""
    if stored.type in ("F32", *OTHERS):
        return torch.from_numpy(plain(stored))
    sizes = {
        "Q4_0": 18,
        "Q4_1": 20,
        "Q5_0": 22,
        "Q5_1": 24,
        "Q8_0": 34,
        "Q4_K": 144,
        "Q5_K": 176,
        "Q6_K": 210,
    }
    stored = stored.ordered()
    b = np.frombuffer(stored.data, np.uint8).reshape(-1, sizes[stored.type])

    def half(at: int) -> Any:
        return b[:, at : at + 2].copy().view(np.float16).astype(np.float64)

    if stored.type in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        five, two = stored.type[1] == "5", stored.type[3] == "1"
        q = np.concatenate([b[:, -16:] & 15, b[:, -16:] >> 4], 1).astype(np.float64)
        if five:
            q += np.unpackbits(b[:, -20:-16], axis=1, bitorder="little") * 16.0
        made = q * half(0) + (half(2) if two else half(0) * (-16 if five else -8))
    elif stored.type == "Q8_0":
        made = b[:, 2:].view(np.int8).astype(np.float64) * half(0)
    elif stored.type in ("Q4_K", "Q5_K"):
        made = np.empty((len(b), 256))
        s = b[:, 4:16].astype(np.int64)
        for g in range(8):
            scale = s[:, g] & 63 if g < 4 else s[:, g + 4] & 15 | s[:, g - 4] >> 6 << 4
            least = s[:, g + 4] & 63 if g < 4 else s[:, g + 4] >> 4 | s[:, g] >> 6 << 4
            at = -128 + g // 2 * 32
            small = b[:, at : at + 32 or None] >> g % 2 * 4 & 15
            if stored.type == "Q5_K":
                small = small | (b[:, 16:48] >> g & 1) << 4
            d, m = half(0)[:, 0] * scale, half(2)[:, 0] * least
            made[:, g * 32 : g * 32 + 32] = small * d[:, None] - m[:, None]
    else:
        made = np.empty((len(b), 256))
        for k in range(256):
            part, at = divmod(k, 128)
            quarter, i = divmod(at, 32)
            low = b[:, part * 64 + quarter % 2 * 32 + i] >> quarter // 2 * 4 & 15
            six = low.astype(np.int64) | (b[:, 128 + part * 32 + i] >> quarter * 2 & 3).astype(np.int64) << 4
            d = half(208)[:, 0] * b[:, 192 + k // 16].view(np.int8)
            made[:, k] = six * d - 32 * d
    return torch.from_numpy(made.astype(np.float32).reshape(stored.shape))


def spec(file: GgufFile) -> DecoderSpec:
    found = spec_of(of_gguf(file))
    assert found
    return found


def as_floats(file: GgufFile, monkeypatch: pytest.MonkeyPatch) -> Weights:
    monkeypatch.setattr(file, "tensor", lambda name, shape: exactly(file.stored(name, shape)))
    return weights.read_weights(file, spec(file), torch.device("cpu"), torch.float32)


def logits(core: FusedLlama, tokens: list[int], cuts: list[int]) -> torch.Tensor:
    """Of each token, computed in segments of these lengths."""
    kv, made, at = core.reserve(16), [], 0
    for length in cuts:
        segment = Segment(array("i", range(16)), at, length, len(tokens))
        made.append(core.forward(Batch(tokens[at : at + length], [segment], [*range(length)]), kv)[0].clone())
        at += length
    return torch.cat(made)


def answers(model: LoadedModel, batch: list[list[int]]) -> list[list[int]]:
    engine, got = Engine(model, kv_bytes=1 << 27), [list[int]() for _ in batch]
    for i, prompt in enumerate(batch):
        engine.add(i, prompt, Sampling(max_tokens=24), owner=str(i))
    while not engine.idle:
        for output in engine.step():
            got[output.id] += output.tokens
    return got


TOKENS = [int(i) for i in np.random.default_rng(1).integers(3, 250, 130)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_packed_weights_give_the_bits_of_their_floats(
    made: Any, kind: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, lib = GgufFile(made(kind)), library(variant)
    assert lib
    packed = FusedLlama(spec(file), weights.read_stored(file, spec(file)), lib, 2, kind)
    floats = FusedLlama(spec(file), as_floats(file, monkeypatch), lib, 2, "none")
    want = logits(floats, TOKENS, [130])
    for cuts in ([130], [1] * 130, [2, 3, 4, 5, 6, 7, 103]):
        assert torch.equal(logits(packed, TOKENS, cuts), want), cuts


def test_both_instruction_sets_give_the_same_bits(made: Any) -> None:
    file = GgufFile(made("mixed"))
    cores = [
        FusedLlama(spec(file), weights.read_stored(file, spec(file)), lib, 1, "mixed")
        for lib in map(library, VARIANTS)
        if lib
    ]
    first, *others = [logits(core, TOKENS, [100, 30]) for core in cores]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_the_floats_are_those_of_the_reference(made: Any, kind: str) -> None:
    file = GgufFile(made(kind))
    theirs = {one.name: one for one in gguf.GGUFReader(made(kind)).tensors}
    assert theirs.keys() == file.tensors.keys()
    for name, stored in file.tensors.items():
        one = theirs[name]
        want = gguf.quants.dequantize(one.data, one.tensor_type).reshape(stored.shape)
        np.testing.assert_allclose(exactly(stored).numpy(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "BF16"])
def test_a_file_answers_alone_as_in_a_batch(made: Any, kind: str) -> None:
    model = load(made(kind), threads=2)
    assert model.info["quantization"] == kind
    prompts = [model.render([{"role": "user", "content": text}]) for text in ("a", "What now?", "x" * 60)]
    assert answers(model, prompts) == [answers(model, [prompt])[0] for prompt in prompts]


def test_the_chat_template_and_the_marks_come_from_the_file(made: Any) -> None:
    model = load(made("Q4_0"))
    tokens = model.render([{"role": "user", "content": "<|im_end|> 42"}])
    assert tokens[:1] == [1]
    assert tokens.count(2) == 1, "what a user writes is no mark"
    assert model.eos == {2}
    assert model.vocab_size == len(gguf_files.MARKS) + 256


def test_splitting_words_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    path = gguf_files.make(tmp_path / "x.gguf", "Q4_0", more={"tokenizer.ggml.pre": "next-year"})
    with pytest.raises(ModelError, match="next-year"):
        load(path)


@pytest.mark.parametrize("pre", SPLITS)
def test_every_way_to_split_words_gives_the_text_back(tmp_path: Path, pre: str) -> None:
    path = gguf_files.make(tmp_path / "x.gguf", "Q4_0", more={"tokenizer.ggml.pre": pre})
    model, text = load(path), "It's 2024: naïve café, 東京 — don't!\n\n\t x  y\r\nOK 🦜"
    assert model.decode(model.encode(text)) == text


def test_a_vocabulary_of_pieces_is_read_too(tmp_path: Path) -> None:
    model = load(gguf_files.make(tmp_path / "x.gguf", "Q4_0", pieces=True))
    begin, *tokens = model.encode("the winter, 東")
    pieces = [model.tokenizer.backend_tokenizer.id_to_token(token) for token in tokens]
    assert (begin, pieces[:5]) == (0, ["▁the", "▁w", "in", "t", "er"])
    assert pieces[-3:] == ["<0xE6>", "<0x9D>", "<0xB1>"]
    assert model.decode(tokens).strip() == "the winter, 東"


# a real model

QUESTIONS = ["What is the capital of France?", "Count from one to five.", "Say <|im_end|> twice. 2024!"]


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load(gguf_files.REAL, threads=2)


def test_a_real_model_loads_without_transformers() -> None:
    code = (
        "import sys; from pathlib import Path; from aiosd.cores.engine.model import load; "
        f"model = load(Path({str(gguf_files.REAL)!r})); model.constraints; "
        "model.render([{'role': 'user', 'content': 'hi'}]); print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_real_model_answers_alone_as_in_a_batch(smollm2: LoadedModel) -> None:
    assert (smollm2.info["quantization"], smollm2.info["expanded_bytes"]) == ("Q4_1", 0)
    prompts = [smollm2.render([{"role": "user", "content": text}]) for text in QUESTIONS]
    together = answers(smollm2, prompts)
    assert together == [answers(smollm2, [prompt])[0] for prompt in prompts]
    assert smollm2.decode(together[0]) == "The capital of France is Paris."


@pytest.mark.slow
def test_a_real_model_has_the_tokens_and_the_bits_of_its_floats(
    smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = AutoTokenizer.from_pretrained(gguf_files.REAL.parent, gguf_file=gguf_files.REAL.name)
    for text in ("naïve café, 東京 — it's 12345!\n\n x  y", *QUESTIONS[:2]):
        assert smollm2.encode(text) == theirs.encode(text)
    file, lib = GgufFile(gguf_files.REAL), library()
    assert lib
    floats = FusedLlama(spec(file), as_floats(file, monkeypatch), lib, 2, "none")
    packed = FusedLlama(spec(file), weights.read_stored(file, spec(file)), lib, 2, "Q4_1")
    tokens = smollm2.render([{"role": "user", "content": QUESTIONS[0]}])
    want = logits(floats, tokens, [len(tokens)])
    assert torch.equal(logits(packed, tokens, [1, 5, len(tokens) - 6]), want)


# damaged and hostile files


@pytest.mark.parametrize(
    ("cut", "why"),
    [
        (0, "empty"),
        (3, "truncated"),
        (20, "truncated"),
        (400, "truncated"),
        (-1, "truncated"),
        (-5000, "truncated"),
    ],
)
def test_a_truncated_file_says_so(made: Any, tmp_path: Path, cut: int, why: str) -> None:
    (path := tmp_path / "cut.gguf").write_bytes(made("Q4_0").read_bytes()[:cut])
    with pytest.raises(ModelError, match=why):
        GgufFile(path)


@pytest.mark.parametrize(
    ("architecture", "why"),
    [("mamba", "'mamba' is not read from GGUF"), ("x" * 500, "is not read from GGUF")],
)
def test_an_architecture_that_is_not_known_is_named(tmp_path: Path, architecture: str, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        GgufFile(gguf_files.make(tmp_path / "x.gguf", "Q4_0", architecture))


def test_a_part_that_is_missing_is_named(made: Any, tmp_path: Path) -> None:
    first = tmp_path / "m-00001-of-00003.gguf"
    first.write_bytes(made("Q4_0").read_bytes())
    with pytest.raises(ModelError, match=r"m-00002-of-00003\.gguf"):
        GgufFile(first)


@pytest.mark.slow
def test_no_header_does_more_than_raise_a_model_error(made: Any, tmp_path: Path) -> None:
    whole = made("Q4_0").read_bytes()
    rng, path, good = random.Random(5), tmp_path / "x.gguf", 0
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(12_000)
            if rng.random() < 0.3:
                struct.pack_into(
                    "<Q", data, at, rng.choice([0, 1, 1 << 31, 1 << 63, (1 << 64) - 1, len(whole)])
                )
            else:
                data[at] = rng.randrange(256)
        path.write_bytes(data)
        try:
            spec_of(of_gguf(GgufFile(path)))
            good += 1
        except ModelError as error:
            assert str(path) in str(error)
            assert error.hint
    assert good > 30, "most changes were not seen at all"


def test_what_has_no_whole_blocks_becomes_float32() -> None:
    whole = fused._readable(StoredTensor("BF16", (24, 60), memoryview(bytes(24 * 120))))
    assert (whole.type, len(whole.data), whole.shape) == ("F32", 24 * 64 * 4, (24, 64))
