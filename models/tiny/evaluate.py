"""The held-out evaluation of the shipped model, through transformers as any user would load it.

Every dialogue is made of words that training cannot produce (checked below, against training dialogues),
every prompt goes through the shipped chat template, and an answer counts only when it is exactly right.
Prints a table per skill; exits 1 when a skill is below its bar. Run: .venv/bin/python models/tiny/evaluate.py
"""

import argparse
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from generate import Dialogue, content, dialogue, render
from transformers import AutoModelForCausalLM, AutoTokenizer
from words import Split, split_of

HERE = Path(__file__).resolve().parent

# skill -> (held-out dialogues, bar in percent; none: measured, not promised)
BARS: dict[str, tuple[int, float | None]] = {
    "tool call": (300, 95.0),
    "answer from result": (150, 90.0),
    "two calls in turn": (60, None),
    "recall": (200, 95.0),
    "fact": (60, 90.0),
    "fact not told": (40, 90.0),
    "echo": (100, 90.0),
    "e-mail": (80, 90.0),
    "first/last word": (80, 90.0),
    "no tool": (80, 90.0),
    "cannot calculate": (40, 90.0),
    "greeting": (30, 90.0),
    "thanks": (30, 90.0),
    "identity": (30, 90.0),
    "newcomer": (150, 90.0),
    "does not know": (40, 90.0),
}
TRAINING_SAMPLE = 10_000
NEW_TOKENS = 160


class Leak(Exception):
    """A held-out word can occur in training, so the figures would be worth nothing."""


@dataclass(frozen=True)
class Check:
    skill: str
    dialogue: Dialogue

    @property
    def expected(self) -> str:
        return content(self.dialogue.messages[self.dialogue.target])


def held_out_checks(share: float, seed: str) -> list[Check]:
    return [
        Check(skill, dialogue(f"{seed}{skill} {n}", Split.HELD_OUT, skill))
        for skill, (count, _) in BARS.items()
        for n in range(max(1, round(count * share)))
    ]


def refuse_leaks(checks: list[Check]) -> int:
    """Raises Leak when a held-out content word is in a sampled training dialogue; counts those words."""
    held_out = {word for check in checks for word in check.dialogue.words}
    wrong = [
        word
        for word in held_out
        if split_of(word) is not Split.HELD_OUT and not (word.isdigit() and len(word) < 3)
    ]
    trained: set[str] = set()
    for number in range(TRAINING_SAMPLE):
        for _, text in render(dialogue(str(number), Split.TRAIN)):
            trained.update(re.findall(r"[^\W_]+", text.lower()))
    wrong += sorted(held_out & trained)
    if wrong:
        raise Leak(f"in both splits: {' '.join(wrong[:20])}")
    return len(held_out)


def prompts(tokenizer: Any, checks: list[Check]) -> list[str]:
    """Through the shipped template, which must agree with the rendering that training used."""
    made = []
    for check in checks:
        talk = check.dialogue
        before = list(talk.messages[: talk.target])
        text = tokenizer.apply_chat_template(
            before, tools=list(talk.tools) or None, tokenize=False, add_generation_prompt=True
        )
        turns = render(Dialogue(tuple(before), talk.tools, 0, talk.words))
        trained = (
            "".join(f"<|im_start|>{role}\n{body}<|im_end|>\n" for role, body in turns)
            + "<|im_start|>assistant\n"
        )
        if text != trained:
            raise ValueError(f"the chat template and render() differ:\n{text}\n---\n{trained}")
        made.append(text)
    return made


def answers(model: Any, tokenizer: Any, texts: list[str], batch: int) -> list[str]:
    """Greedy, in batches of like length padded on the left; in the order of texts."""
    found = [""] * len(texts)
    order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer(
            [texts[n] for n in chosen], return_tensors="pt", padding=True, add_special_tokens=False
        )
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
        for n, row in zip(chosen, output[:, inputs["input_ids"].shape[1] :], strict=True):
            found[n] = tokenizer.decode(row, skip_special_tokens=True)
    return found


def report(checks: list[Check], found: list[str], show: int) -> bool:
    print(f"{'skill':20} {'n':>5} {'exact %':>8} {'bar %':>6}")
    passed = True
    for skill, (_, bar) in BARS.items():
        results = [(check, text) for check, text in zip(checks, found, strict=True) if check.skill == skill]
        wrong = [(check, text) for check, text in results if text != check.expected]
        exact = 100 * (1 - len(wrong) / len(results))
        reached = bar is None or exact >= bar
        passed = passed and reached
        verdict = "" if bar is None else "pass" if reached else "FAIL"
        print(f"{skill:20} {len(results):5} {exact:8.1f} {bar or '-':>6}  {verdict}")
        for check, text in wrong[:show]:
            asked = content(check.dialogue.messages[check.dialogue.target - 1])
            print(f"    asked    {asked!r}\n    expected {check.expected!r}\n    got      {text!r}")
    exact = 100 * sum(text == check.expected for check, text in zip(checks, found, strict=True)) / len(checks)
    print(f"{'all':20} {len(checks):5} {exact:8.1f}")
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description="Evaluate the built-in model on held-out dialogues.")
    parser.add_argument("--model", type=Path, default=HERE)
    parser.add_argument("--share", type=float, default=1.0, help="share of the dialogues, for a quick look")
    parser.add_argument("--seed", default="", help="any other text makes other dialogues")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--show", type=int, default=0, help="wrong answers to show per skill")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    checks = held_out_checks(options.share, options.seed)
    words = refuse_leaks(checks)
    print(f"{len(checks)} held-out dialogues with {words} held-out words,")
    print(f"none of which is in {TRAINING_SAMPLE} training dialogues", flush=True)
    found = answers(model, tokenizer, prompts(tokenizer, checks), options.batch)
    passed = report(checks, found, options.show)
    print(f"{'pass' if passed else 'FAIL'} in {time.monotonic() - began:.0f} s")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
