"""The sampling parameters of one request: how to truncate its prompt and choose the next token.

No torch: the daemon and the workers share this module.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sampling:
    """Names and meanings follow the OpenAI chat-completion API where it has the parameter.

    Greedy by default: the same question gives the same answer.
    """

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    seed: int = 0  # seed and position fix each random number, so sampling resumes exactly
    max_tokens: int = 256
    min_tokens: int = 0  # before this many, end-of-sequence and stop strings are ignored
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # None: off; n: report the chosen token and the n likeliest alternatives
    truncation: str = "disabled"  # auto: drop the oldest turns of a too long conversation
