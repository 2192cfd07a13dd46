"""The sampling parameters of one request. The daemon and the worker share this module; no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sampling:
    """Names and meanings as in the OpenAI chat-completion API, for the fields that it has.

    The default is greedy, so that the same question gives the same answer.
    """

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    seed: int = 0  # seed and position determine the random number, so sampling resumes exactly
    max_tokens: int = 256
    min_tokens: int = 0  # end-of-sequence and stop strings have no effect before this many tokens
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # None: off; n: the chosen token and the n likeliest ones
    truncation: str = "disabled"  # auto: drop the oldest turns of a conversation too long for the model
