"""Trains the built-in model from nothing on generate.py's dialogues, on a CPU or, when present, a GPU.

The schedule follows the wall clock: warm up, hold, then decay to zero over the last part of --minutes, so one
knob fits any machine. A checkpoint is a folder like the shipped one: --resume starts from one, and SIGTERM
ends the run with one. Loss is on the assistant's tokens only. Batches hold dialogues of like length, padded
on the right, so plain causal attention is exact and no dialogue sees another.
"""

import argparse
import collections
import copy
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from generate import Dialogue, dialogue, render
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from words import Split

HERE = Path(__file__).resolve().parent
VOCABULARY = 1024
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# A word is cut the same way wherever it stands (no space joins it), so copying is token by token; the
# punctuation of JSON calls is kept whole, so a call costs few tokens.
PIECES = r'": \{"|": "|", "|": |"\}+|\{"|\p{N}|\p{L}+|\n|[^\S\n]|[^\s\p{L}\p{N}]'
POOL = 1536
IGNORED = -100


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
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=2048,
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

    def to(self, device: str) -> "Batch":
        return Batch(self.tokens.to(device), self.labels.to(device))


class Encoder:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = tokenizer.encode("<|im_end|>\n").ids
        self.heads = {
            role: tokenizer.encode(f"<|im_start|>{role}\n").ids
            for role in ("system", "user", "assistant", "tool")
        }

    def __call__(self, talk: Dialogue) -> tuple[list[int], list[int]]:
        tokens: list[int] = []
        labels: list[int] = []
        for role, text in render(talk):
            body = self.tokenizer.encode(text).ids + self.end
            tokens += self.heads[role] + body
            scored = body[:-1] if role == "assistant" else [IGNORED] * (len(body) - 1)
            labels += [IGNORED] * len(self.heads[role]) + scored + [IGNORED]
        return tokens[:-1], labels[1:]


def batches(encode: Encoder, seed: str, tokens_per_batch: int, longest: int) -> Iterator[Batch]:
    rng = random.Random(seed)
    numbers = itertools.count()
    while True:
        pool: list[tuple[list[int], list[int]]] = []
        while len(pool) < POOL:
            pair = encode(dialogue(f"{seed} {next(numbers)}", Split.TRAIN))
            if len(pair[0]) <= longest:
                pool.append(pair)
        pool.sort(key=lambda pair: len(pair[0]))
        rows: list[list[tuple[list[int], list[int]]]] = [[]]
        for pair in pool:
            if rows[-1] and len(pair[0]) * (len(rows[-1]) + 1) > tokens_per_batch:
                rows.append([])
            rows[-1].append(pair)
        rng.shuffle(rows)
        for row in rows:
            width = max(len(tokens) for tokens, _ in row)
            yield Batch(
                torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in row]),
                torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in row]),
            )


def optimizers(model: LlamaForCausalLM, matrix_lr: float, other_lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    halves = (matrices[::2], matrices[1::2])  # two, for two threads
    return [
        *(torch.optim.Muon(half, lr=matrix_lr, weight_decay=0.01) for half in halves),
        torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def loss_of(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, int]:
    """The summed loss and the count of scored tokens; logits are made for those alone."""
    hidden = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
    scored = batch.labels != IGNORED
    logits = hidden[scored] @ model.lm_head.weight.T
    return cross_entropy(logits, batch.labels[scored], reduction="sum"), int(scored.sum())


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
    return 200 if done < 0.15 else 400 if done < 0.3 else 768


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
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def gradients(self, batches: list[Batch]) -> tuple[float, int]:
        """Leaves the mean over all scored tokens in .grad; gives the summed loss and the count of them."""
        queue = collections.deque(batches)
        parts = list(self.pool.map(lambda model: self._work(model, queue), self.models))
        count = sum(scored for _, scored in parts)
        for parameter, *others in zip(*(model.parameters() for model in self.models), strict=True):
            for other in others:
                if other.grad is not None:
                    parameter.grad = other.grad if parameter.grad is None else parameter.grad.add_(other.grad)
                    other.grad = None
            if parameter.grad is not None:
                parameter.grad.div_(count)
        return sum(loss for loss, _ in parts), count

    def _work(self, model: LlamaForCausalLM, queue: collections.deque[Batch]) -> tuple[float, int]:
        total, count = 0.0, 0
        while True:
            try:
                batch = queue.popleft()
            except IndexError:
                return total, count
            loss, scored = loss_of(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total, count = total + loss.item(), count + scored

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
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    encode, longest = Encoder(tokenizer), 0
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
            stream = batches(encode, f"{options.seed} {longest}", options.batch, longest)
        for group, rate in rates:
            group["lr"] = rate * lr_factor(done, step, options.decay)
        work = [next(stream).to(device) for _ in range(options.accumulate)]
        loss, count = team.gradients(work)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        team.update(optimizer)
        model.zero_grad(set_to_none=True)
        step, seen, scored = step + 1, seen + sum(batch.tokens.numel() for batch in work), scored + count
        if step % 20 == 0:
            print(
                f"{step} {done:.1%} loss {loss / count:.4f} tokens {seen:,} scored {scored:,} "
                f"{seen / (time.monotonic() - began):.0f}/s",
                flush=True,
            )
        if time.monotonic() - saved_at > options.save_every * 60:
            save(model, tokenizer, out)
            saved_at = time.monotonic()
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
    parser.add_argument("--decay", type=float, default=0.8)
    parser.add_argument("--batch", type=int, default=1024, help="tokens of one forward pass")
    parser.add_argument("--accumulate", type=int, default=4, help="forward passes of one step")
    parser.add_argument("--longest", type=int, default=768, help="tokens of the longest dialogue used")
    parser.add_argument("--save-every", type=float, default=5, help="minutes")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train(options)


if __name__ == "__main__":
    main()
