"""A kind of syscall is a row of one table. This file adds a kind, which is judged, queued, run, answered,
stored."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from aiosd.access.caller import Caller
from aiosd.config.config import Config, DaemonConfig
from aiosd.cores.pool import Worker
from aiosd.errors import BadRequest
from aiosd.handlers import table
from aiosd.handlers.parts import Parts
from aiosd.handlers.table import KINDS, Kind
from aiosd.kernel import Kernel
from aiosd.scheduler.handler import Handler, Source
from aiosd.syscall import response
from aiosd.syscall.foreign import decode, prose
from aiosd.syscall.request import Request, State
from aiosd.syscall.spec import Spec
from tests.running import wait_until

ME = Caller(0, 0, 1)
FILE = Source("/echo", kind="echo")


@dataclass(frozen=True, slots=True)
class Echo(Spec):
    kind: ClassVar[str] = "echo"

    words: str

    @property
    def target(self) -> str:
        return "echo"

    def text(self) -> str:
        return self.words

    def document(self, request: Request) -> str:
        return response.line({"echo": request.text})


class EchoHandler(Handler):
    span: ClassVar[str] = "echo"
    most = 1

    def __init__(self, parts: Parts) -> None:
        self._ending = parts.ending
        self.started: list[Request] = []

    def judge(self, caller: Caller, source: Source, body: bytes) -> Echo:
        text = prose(decode(body))
        if text == "no":
            raise BadRequest("no is no echo")
        return Echo(text)

    def misunderstood(self, source: Source, body: bytes) -> Echo:
        return Echo("")

    def free(self, queue: str, running: object) -> bool:
        return len([r for r in self.started if not r.state.final]) < self.most

    def start(self, request: Request, worker: Worker | None) -> None:
        self.started.append(request)
        threading.Thread(target=self.answer, args=(request,)).start()

    def answer(self, request: Request) -> None:
        assert isinstance(request.spec, Echo)
        request.text = request.spec.words.upper()
        response.grow(request, [])
        self._ending.finish(request, State.DONE)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    monkeypatch.setattr(table, "KINDS", {**KINDS, "echo": Kind(Echo, EchoHandler)})
    kernel = Kernel(Config(daemon=DaemonConfig(state=str(tmp_path))), tmp_path / "no-model")
    yield kernel
    kernel.stop()


def test_a_kind_that_is_added_in_one_row_is_served(kernel: Kernel) -> None:
    kernel.start()
    asked = [kernel.admission.submit(ME, FILE, text.encode()) for text in ("a", "b", "c")]
    wait_until(lambda: all(r.state.final for r in asked), "the answers")
    assert [r.answer.text for r in asked] == ["A", "B", "C"]
    refused = kernel.admission.submit(ME, FILE, b"no")
    wait_until(lambda: refused.state.final, "the refusal")
    assert (refused.state, refused.error) == (State.FAILED, "no is no echo")
    kernel.saving.save()
    kept = kernel.store.request(asked[0].id)
    assert kept is not None
    assert (kept.spec, response.document(kept)) == (Echo("a"), '{"echo":"A"}\n')


def test_a_kind_goes_on_after_a_restart(kernel: Kernel, tmp_path: Path) -> None:
    waiting = kernel.admission.submit(ME, FILE, b"later")
    assert not waiting.state.final, "nothing runs before the start"
    kernel.stop()
    again = Kernel(Config(daemon=DaemonConfig(state=str(tmp_path))), tmp_path / "no-model")
    again.start()
    wait_until(lambda: again.admission.get(waiting.id).state.final, "the answer")
    assert again.admission.get(waiting.id).answer.text == "LATER"
    again.stop()
