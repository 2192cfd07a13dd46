"""Agents: named settings that requests start from, owned by a user. Not processes.

Holds every agent in memory and writes changes through to the store. aiosd.access.permissions.Permissions
holds owners and modes. Any thread may call.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from aiosd.agents.sweeping import Sweeping
from aiosd.database.store import Store
from aiosd.errors import BadRequest, BadValue, Exists, NotFound
from aiosd.syscall.foreign import read_json
from aiosd.syscall.keys import boolean
from aiosd.syscall.number import whole
from aiosd.syscall.request import Request, Usage
from aiosd.syscall.sampling import SAMPLING_KEYS, Sampling, sampling
from aiosd.syscall.template import TEMPLATE_KEYS, variables

LOG_LINES = 256
SYSTEM_BYTES_MAX = 64 << 10


@dataclass(frozen=True)
class Settings:
    model: str = ""  # empty: the default model
    context: str = ""  # empty: each request stands alone
    nice: int = 0
    system: str = ""
    paused: bool = False
    pid: int = 0  # the agent ends with this process; 0: with none
    pid_started: str = ""  # when that process started (lifetime.started_of)
    tools: Sequence[str] = ()  # names of the tools that the model is offered
    max_steps: int = 8  # how often a loop asks the model; 0: the model's calls are not run
    allowed: Sequence[str] = ()  # irreversible tools that the owner may call without a decision
    params: dict[str, Any] = field(default_factory=dict)  # keys of the chat-completion API

    @cached_property
    def sampling(self) -> Sampling:
        return sampling(self.params, Sampling())

    @cached_property
    def template(self) -> dict[str, Any]:
        """Return the variables for the model's chat template."""
        return variables(self.params, {})

    @property
    def parallel(self) -> bool:
        """Whether an answer may have several calls."""
        return boolean(self.params, "parallel_tool_calls", True)


DEFAULTS = Settings()
PARAMETERS = (*SAMPLING_KEYS, "parallel_tool_calls", *TEMPLATE_KEYS)


@dataclass(slots=True, eq=False)
class Agent:
    name: str
    id: int  # no later agent of the same name has it
    settings: Settings = field(default_factory=Settings)
    usage: Usage = field(default_factory=Usage)
    requests: int = 0  # how many have ended, ever
    born_s: float = field(default_factory=time.time)
    log: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES))

    def note(self, message: str, **facts: object) -> None:
        """Add a line to log.jsonl: why something was refused, or how it ended."""
        self.log.append(json.dumps({"time": round(time.time(), 3), "message": message, **facts}) + "\n")

    def account(self, request: Request) -> None:
        """Add an ended request to the sums. The store adds it to its own, in the transaction of the end."""
        self.requests += 1
        self.usage.add(request.spent)
        if request.error:
            self.note(request.error, request=request.id, state=str(request.state))


class Agents:
    def __init__(self, store: Store) -> None:
        self._store = store
        self.sweeping = Sweeping(store)
        self._lock = threading.Lock()
        self._by_name = {
            name: Agent(name, id, Settings(**settings), usage, count)
            for id, name, settings, usage, count in store.agents()
        }

    def __len__(self) -> int:
        return len(self._by_name)

    def names(self) -> list[str]:
        return list(self._by_name)

    def all(self) -> list[Agent]:
        return list(self._by_name.values())

    def get(self, name: str) -> Agent:
        try:
            return self._by_name[name]
        except KeyError:
            raise NotFound(f"no agent {name}") from None

    def find(self, name: str) -> Agent | None:
        return self._by_name.get(name)

    def add(self, name: str) -> Agent:
        with self._lock:
            if name in self._by_name:
                raise Exists(f"agent {name} exists")
            agent = Agent(name, self._store.add_agent(name, asdict(Settings())))
            self._by_name[name] = agent
            return agent

    def check(self, agent: Agent) -> None:
        """Raise NotFound if the agent was removed. A file opened before must not act on the next one of its
        name.
        """
        if self._by_name.get(agent.name) is not agent:
            raise NotFound(f"agent {agent.name} was removed")

    def remove(self, agent: Agent) -> None:
        with self._lock:
            self.check(agent)
            self._store.remove_agent(agent.id)
            self.sweeping.add(agent.id)
            del self._by_name[agent.name]

    def change(self, agent: Agent, **settings: Any) -> None:
        with self._lock:
            self.check(agent)
            changed = replace(agent.settings, **settings)
            self._store.save_agent(agent.id, asdict(changed))
            agent.settings = changed


def nice(text: str) -> int:
    return whole(text, -20, 19, "nice (the lowest is first)")


def system(text: str) -> str:
    if len(text.encode()) > SYSTEM_BYTES_MAX:
        raise BadValue(f"a system prompt has at most {SYSTEM_BYTES_MAX} bytes")
    if "\0" in text:
        raise BadValue("a system prompt holds no NUL bytes")
    return text


def params(text: str) -> dict[str, Any]:
    """Parse sampling parameters, one JSON object; an empty text means the defaults."""
    try:
        raw = read_json(text or "{}")
    except BadRequest as error:
        raise BadValue(str(error)) from None
    if not isinstance(raw, dict):
        raise BadValue("params.json takes one JSON object", '{"temperature": 0.7}')
    unknown = set(raw).difference(PARAMETERS)
    if unknown:
        raise BadValue(f"unknown key {min(unknown)!r}; keys are {', '.join(sorted(PARAMETERS))}")
    try:
        made = Settings(params=raw)
        _ = made.sampling, made.template, made.parallel  # raise if a value is wrong
    except BadRequest as error:
        raise BadValue(error.explanation) from None
    return raw
