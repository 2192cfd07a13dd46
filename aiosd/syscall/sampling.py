"""The sampling parameters of one request: how to truncate its prompt and choose the next token.

No torch: the daemon and the workers share this module. Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

from aiosd.errors import BadRequest
from aiosd.syscall.keys import boolean, choice, integer, number

BIASES_MAX = 1024
BIAS_HINT = 'write {"902": -100}; models/NAME/tokenize has the ids of a text'
TOKEN = re.compile("0|[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class Sampling:
    """Names and meanings follow the OpenAI chat-completion API where it has the parameter.

    Greedy by default: the same question gives the same answer.
    """

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0  # a token needs this share of the likeliest one's probability
    seed: int = 0  # seed and position fix each random number, so sampling resumes exactly
    max_tokens: int = 256
    min_tokens: int = 0  # before this many, end-of-sequence and stop strings are ignored
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # None: off; n: report the chosen token and the n likeliest alternatives
    truncation: str = "disabled"  # auto: drop the oldest turns of a too long conversation
    frequency_penalty: float = 0.0  # subtracted for each time that the token is in the answer
    presence_penalty: float = 0.0  # subtracted once if the token is in the answer
    repetition_penalty: float = (
        1.0  # divides positive logits of tokens in prompt or answer, multiplies others
    )
    logit_bias: dict[str, float] = field(default_factory=dict)  # by token id, in decimal as JSON needs it

    @property
    def penalises(self) -> bool:
        """Whether the logits change before a token is chosen by them."""
        return bool(
            self.frequency_penalty
            or self.presence_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
        )


SAMPLING_KEYS = tuple(f.name for f in fields(Sampling))


def sampling(raw: dict[str, Any], base: Sampling) -> Sampling:
    """Parse the sampling keys of a request, or of an agent's params.json. Raises BadRequest."""
    stop = raw.get("stop", base.stop)
    stop = (stop,) if isinstance(stop, str) else stop or ()
    if (
        not isinstance(stop, (list, tuple))
        or len(stop) > 16
        or not all(isinstance(s, str) and 0 < len(s) <= 256 for s in stop)
    ):
        raise BadRequest("stop must be up to 16 texts of 1 to 256 characters")
    most = "max_completion_tokens" if "max_completion_tokens" in raw else "max_tokens"
    return Sampling(
        temperature=number(raw, "temperature", base.temperature, 0, 100) or 0.0,
        top_k=integer(raw, "top_k", base.top_k, 0, 1 << 30),
        top_p=number(raw, "top_p", base.top_p, 0, 1) or 0.0,
        min_p=number(raw, "min_p", base.min_p, 0, 1) or 0.0,
        seed=integer(raw, "seed", base.seed, -(1 << 63), (1 << 63) - 1),
        max_tokens=integer(raw, most, base.max_tokens, 1, 1 << 24),
        min_tokens=integer(raw, "min_tokens", base.min_tokens, 0, 1 << 24),
        ignore_eos=boolean(raw, "ignore_eos", base.ignore_eos),
        stop=tuple(stop),
        logprobs=logprobs(raw, base.logprobs),
        truncation=choice(raw, "truncation", base.truncation, "disabled", "auto"),
        frequency_penalty=number(raw, "frequency_penalty", base.frequency_penalty, -2, 2) or 0.0,
        presence_penalty=number(raw, "presence_penalty", base.presence_penalty, -2, 2) or 0.0,
        repetition_penalty=number(raw, "repetition_penalty", base.repetition_penalty, 0.01, 100) or 1.0,
        logit_bias=logit_bias(raw, base.logit_bias),
    )


def logprobs(raw: dict[str, Any], base: int | None) -> int | None:
    if "logprobs" not in raw and "top_logprobs" not in raw:
        return base
    wanted = raw.get("logprobs", True)
    if wanted is False or wanted is None:
        return None
    if isinstance(wanted, bool):
        return integer(raw, "top_logprobs", 0, 0, 20)
    return integer(raw, "logprobs", 0, 0, 20)


def logit_bias(raw: dict[str, Any], base: dict[str, float]) -> dict[str, float]:
    given = raw.get("logit_bias")
    if given is None:
        return base
    if not isinstance(given, dict) or len(given) > BIASES_MAX:
        raise BadRequest(f"logit_bias must be an object of at most {BIASES_MAX} tokens", BIAS_HINT)
    made = dict[str, float]()
    for token, bias in given.items():
        if not TOKEN.fullmatch(token):
            raise BadRequest(f"logit_bias: {token[:40]!r} is not the id of a token", BIAS_HINT)
        where = f"logit_bias of token {token}"
        made[token] = number({where: bias}, where, 0.0, -100, 100) or 0.0
    return made
