"""Trains the built-in model from nothing on generate.py's dialogues, on a CPU or, when present, a GPU.

The schedule follows the wall clock: warm up, hold, then decay to zero over the last part of --minutes, so one
knob fits any machine. A checkpoint is a folder like the shipped one: --resume starts from one, and SIGTERM
ends the run with one. Loss is on the assistant's tokens only; beside it, some heads of attention are taught
directly where to look (pointers.py). Batches hold dialogues of like length, padded on the right, so plain
causal attention is exact and no dialogue sees another.
"""

import argparse
import collections
import copy
import functools
import itertools
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from generate import dialogue, render
from pointers import AFTER_NOUN, AFTER_VERB, COPY, NOUN, PICK, VERB, Encoded, Encoder
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from words import Split

HERE = Path(__file__).resolve().parent
VOCABULARY = 1024
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# A word is cut the same way wherever it stands (no space joins it), so copying is token by token; its first
# letter and any capital stand alone, so the rest is the same in label, Label and getLabel; the punctuation of
# JSON calls is kept whole, so a call costs few tokens.
PIECES = (
    r'": \{"|": "|", "|": |"\}+|\{"|\p{N}|(?<!\p{L})\p{L}|\p{Lu}|\p{Ll}+|\p{L}|\n|[^\S\n]|[^\s\p{L}\p{N}]'
)
POOL = 1024
IGNORED = -100
# (layer, head, what that head of attention is taught to look at): which tool is meant counts most
GUIDED = (
    *((2, 1, NOUN), (2, 2, VERB), (2, 3, AFTER_NOUN), (2, 4, AFTER_VERB)),
    *((3, 0, COPY), (3, 1, PICK), (3, 2, PICK), (4, 0, COPY), (4, 0, PICK), (4, 2, PICK)),
)
WEIGHTS = {COPY: 1.0, PICK: 2.0, NOUN: 0.3, VERB: 0.3, AFTER_NOUN: 0.3, AFTER_VERB: 0.3}


def build_tokenizer(dialogues: int = 30_000) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for n in range(dialogues) for _, text in render(dialogue(f"bpe {n}", Split.TRAIN)))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(
        [AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.chat_template = (HERE / "chat_template.jinja").read_text()
    fast.save_pretrained(folder)
    config = folder / "tokenizer_config.json"  # by the class name that transformers 4 knows too
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Batch:
    tokens: torch.Tensor  # [batch, length]
    labels: torch.Tensor  # [batch, length], shifted: the token that follows, IGNORED where it is not scored
    pointers: torch.Tensor  # [count, 4]: kind, row, position, and a position to look at from there

    def to(self, device: str) -> "Batch":
        return Batch(self.tokens.to(device), self.labels.to(device), self.pointers.to(device))


def batch_of(talks: list[Encoded]) -> Batch:
    width = max(len(talk.tokens) for talk in talks) - 1
    tokens = torch.zeros(len(talks), width, dtype=torch.long)
    labels = torch.full((len(talks), width), IGNORED)
    pointers: list[tuple[int, int, int, int]] = []
    for row, talk in enumerate(talks):
        whole = torch.tensor(talk.tokens)
        tokens[row, : len(whole) - 1] = whole[:-1]
        for role, (start, end) in talk.turns:
            if role == "assistant":
                labels[row, start - 1 : end] = whole[start : end + 1]
        pointers += [(kind, row, at, place) for kind, at, place in talk.pointers]
    return Batch(tokens, labels, torch.tensor(pointers, dtype=torch.long).view(-1, 4))


@functools.cache
def encoder(tokenizer: str) -> Encoder:
    return Encoder(Tokenizer.from_str(tokenizer))


def pool_of(tokenizer: str, seed: str, tokens_per_batch: int, longest: int) -> list[list[Encoded]]:
    """The dialogues of many batches, shuffled; runs in a process of its own."""
    encode = encoder(tokenizer)
    pool: list[Encoded] = []
    for number in itertools.count():
        talk = dialogue(f"{seed} {number}", Split.TRAIN)
        made = encode(talk)
        if len(made.tokens) <= longest:
            encode.point(talk, made)
            pool.append(made)
            if len(pool) == POOL:
                break
    pool.sort(key=lambda made: len(made.tokens))
    rows: list[list[Encoded]] = [[]]
    for made in pool:
        if rows[-1] and len(made.tokens) * (len(rows[-1]) + 1) > tokens_per_batch:
            rows.append([])
        rows[-1].append(made)
    random.Random(seed).shuffle(rows)
    return rows


def batches(
    maker: Executor, tokenizer: str, seed: str, tokens_per_batch: int, longest: int
) -> Iterator[Batch]:
    """The next pool is made while this one is used."""
    coming = maker.submit(pool_of, tokenizer, f"{seed} 0", tokens_per_batch, longest)
    for number in itertools.count(1):
        rows = coming.result()
        coming = maker.submit(pool_of, tokenizer, f"{seed} {number}", tokens_per_batch, longest)
        yield from map(batch_of, rows)


def optimizers(model: LlamaForCausalLM, matrix_lr: float, other_lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    halves = (matrices[::2], matrices[1::2])  # two, for two threads
    return [
        *(torch.optim.Muon(half, lr=matrix_lr, weight_decay=0.01) for half in halves),
        torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class Target:
    """Where attention heads of one kind should look, for one batch."""

    def __init__(self, pointers: torch.Tensor, shape: torch.Size) -> None:
        asked, number = torch.unique(pointers[:, :2], dim=0, return_inverse=True)
        self.rows, self.positions = asked.unbind(1)
        self.others = torch.ones(len(asked), shape[1], dtype=torch.bool, device=pointers.device)
        self.others[number, pointers[:, 2]] = False
        self.future = torch.arange(shape[1], device=pointers.device) > self.positions[:, None]

    def loss(self, query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
        scores = (query @ key.transpose(1, 2) * scaling)[self.rows, self.positions]
        scores = scores.masked_fill(self.future, -torch.inf)
        return (scores.logsumexp(1) - scores.masked_fill(self.others, -torch.inf).logsumexp(1)).sum()


class Guide:
    """Sums what the guided heads of a model miss of their targets: a loss beside that of the tokens."""

    def __init__(self, batch: Batch) -> None:
        kinds = batch.pointers[:, 0]
        self.targets = {
            kind: Target(batch.pointers[kinds == kind, 1:], batch.tokens.shape)
            for kind in set(kinds.tolist())
        }
        self.loss = torch.zeros((), device=batch.tokens.device)

    def see(self, layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        for guided, head, kind in GUIDED:
            if guided == layer and kind in self.targets:
                missed = self.targets[kind].loss(query[:, head], key[:, head], scaling)
                self.loss = self.loss + WEIGHTS[kind] * missed


def guided_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    guide: Guide | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    if guide:
        guide.see(int(module.layer_idx), query, key, rest["scaling"])  # type: ignore[arg-type]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)


def loss_of(model: LlamaForCausalLM, batch: Batch, guidance: float) -> tuple[torch.Tensor, float, float, int]:
    """The loss to minimize; its two parts, summed, and the count of scored tokens. Logits for those alone."""
    guide = Guide(batch) if guidance else None
    hidden = model.model(input_ids=batch.tokens, use_cache=False, guide=guide).last_hidden_state
    scored = batch.labels != IGNORED
    logits = hidden[scored] @ model.lm_head.weight.T
    loss = cross_entropy(logits, batch.labels[scored], reduction="sum")
    aside = guide.loss if guide else torch.zeros((), device=batch.tokens.device)
    return loss + guidance * aside, loss.item(), aside.item(), int(scored.sum())


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Every file is written aside and renamed, so that a reader never sees half of one."""
    aside = folder / f".new-{os.getpid()}"
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=2, pad_token_id=0, do_sample=False
    )
    model.save_pretrained(aside)
    save_tokenizer(tokenizer, aside)
    for file in list(aside.iterdir()):
        file.chmod(0o644)
        file.replace(folder / file.name)
    aside.rmdir()


def longest_at(done: float) -> int:
    """Tokens of the longest dialogue after that share of the time: copying is learned first on short ones."""
    return 200 if done < 0.1 else 400 if done < 0.3 else 768


def lr_factor(done: float, step: int, decay: float) -> float:
    """done: the share of the time that is spent; decay: its last share, over which the rate falls."""
    return min(1.0, (step + 1) / 50) * min(1.0, max(0.0, 1 - done) / max(decay, 1e-9))


class Team:
    """Threads that share the weights and take batches from one queue. Each op runs on one core, so a core
    that other programs use slows one thread and not, at every barrier of every op, both."""

    def __init__(self, model: LlamaForCausalLM, threads: int) -> None:
        self.models = [model]
        for _ in range(threads - 1):
            twin = copy.deepcopy(model)
            for mine, shared in zip(twin.parameters(), model.parameters(), strict=True):
                mine.data = shared.data
            self.models.append(twin)
        self.pool = ThreadPoolExecutor(threads, initializer=self._start)

    def _start(self) -> None:
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)  # sharp attention is full of them: without, half of the time is theirs

    def gradients(self, batches: list[Batch], guidance: float) -> tuple[float, float, int]:
        """Leaves the mean over scored tokens in .grad; gives the losses' sums and the count of tokens."""
        queue = collections.deque(batches)
        parts = list(self.pool.map(lambda model: self._work(model, queue, guidance), self.models))
        loss, aside, count = (sum(values) for values in zip(*parts, strict=True))
        for parameter, *others in zip(*(model.parameters() for model in self.models), strict=True):
            for other in others:
                if other.grad is not None:
                    parameter.grad = other.grad if parameter.grad is None else parameter.grad.add_(other.grad)
                    other.grad = None
            if parameter.grad is not None:
                parameter.grad.div_(count)
        return loss, aside, int(count)

    def _work(
        self, model: LlamaForCausalLM, queue: collections.deque[Batch], guidance: float
    ) -> tuple[float, float, int]:
        total, total_aside, total_count = 0.0, 0.0, 0
        while True:
            try:
                batch = queue.popleft()
            except IndexError:
                return total, total_aside, total_count
            wanted, loss, aside, count = loss_of(model, batch, guidance)
            wanted.backward()  # type: ignore[no-untyped-call]
            total, total_aside, total_count = total + loss, total_aside + aside, total_count + count

    def update(self, optimizers: list[torch.optim.Optimizer]) -> None:
        list(self.pool.map(lambda one: one.step(), optimizers))


def train(options: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    saved = (options.resume or out) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(saved)) if saved.exists() else build_tokenizer()
    model = LlamaForCausalLM.from_pretrained(options.resume) if options.resume else build_model()
    model.to(torch.device(device)).float().train()  # type: ignore[arg-type]
    model.set_attn_implementation("guided")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    maker = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    text, longest = tokenizer.to_str(), 0
    stream: Iterator[Batch] = iter(())
    team = Team(model, options.threads if device == "cpu" else 1)
    optimizer = optimizers(model, options.matrix_lr, options.other_lr)
    rates = [(group, group["lr"]) for one in optimizer for group in one.param_groups]
    began = saved_at = time.monotonic()
    step, seen, scored = 0, 0, 0
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    while (done := (time.monotonic() - began) / (options.minutes * 60)) < 1 and not stopped.is_set():
        wanted = options.longest if options.resume else min(longest_at(done), options.longest)
        if wanted != longest:
            longest = wanted
            stream = batches(maker, text, f"{options.seed} {longest}", options.batch, longest)
        for group, rate in rates:
            group["lr"] = rate * lr_factor(done, step, options.decay)
        work = [next(stream).to(device) for _ in range(options.accumulate)]
        loss, aside, count = team.gradients(work, options.guidance)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        team.update(optimizer)
        model.zero_grad(set_to_none=True)
        step, seen, scored = step + 1, seen + sum(batch.tokens.numel() for batch in work), scored + count
        if step % 20 == 0:
            print(
                f"{step} {done:.1%} loss {loss / count:.4f} guide {aside / count:.4f} "
                f"tokens {seen:,} scored {scored:,} {seen / (time.monotonic() - began):.0f}/s",
                flush=True,
            )
        if time.monotonic() - saved_at > options.save_every * 60:
            save(model, tokenizer, out)
            saved_at = time.monotonic()
    maker.shutdown(cancel_futures=True)
    save(model, tokenizer, out)
    print(f"done: {step} steps, {seen:,} tokens, {scored:,} of them scored", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--resume", type=Path, help="a folder with weights to go on from")
    parser.add_argument("--seed", default="1", help="a new one when resuming, for dialogues not seen yet")
    parser.add_argument("--matrix-lr", type=float, default=0.015)
    parser.add_argument("--other-lr", type=float, default=2.5e-3)
    parser.add_argument("--decay", type=float, default=0.6)
    parser.add_argument("--batch", type=int, default=1024, help="tokens of one forward pass")
    parser.add_argument("--accumulate", type=int, default=8, help="forward passes of one step")
    parser.add_argument("--guidance", type=float, default=0.15, help="weight of the attention's own loss")
    parser.add_argument("--longest", type=int, default=768, help="tokens of the longest dialogue used")
    parser.add_argument("--save-every", type=float, default=5, help="minutes")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    AttentionInterface.register("guided", guided_attention)
    AttentionMaskInterface.register("guided", sdpa_mask)
    train(options)


if __name__ == "__main__":
    main()
