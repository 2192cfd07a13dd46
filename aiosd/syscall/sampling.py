"""The parameters of one request: how its prompt is cut and its next token chosen.

No torch; daemon and worker share it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sampling:
    """Field names and meanings follow the OpenAI chat-completion API where it has them.

    Greedy by default: the same question gives the same answer unless the caller asks otherwise.
    """

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    seed: int = 0  # with the position it fixes the random number: sampling resumes exactly
    max_tokens: int = 256
    min_tokens: int = 0  # end-of-sequence and stop strings are ignored before this many
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # None: off; n: the n likeliest alternatives beside the chosen token
    truncation: str = "disabled"  # auto: a conversation too long for the model loses its oldest turns
