"""The protocol between daemon and worker: round trips and refused frames."""

from __future__ import annotations

import socket
import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.cores import wire
from aiosd.errors import WireError

TOKENS = st.builds(
    wire.Tokens,
    id=st.integers(0, 1 << 60),
    tokens=st.lists(st.integers(0, 1 << 30)),
    text=st.text(),
    logprobs=st.just([]),
    cached_tokens=st.integers(0, 99),
    finish=st.sampled_from(["", "stop", "length"]),
)
MESSAGES = (
    st.builds(wire.Step, outputs=st.lists(TOKENS), stats=st.dictionaries(st.text(), st.integers()))
    | st.builds(wire.Remove, id=st.integers())
    | st.builds(wire.Refused, id=st.integers(), reason=st.text(), hint=st.text())
)


@given(MESSAGES)
def test_a_message_arrives_as_it_was_sent(message: wire.Message) -> None:
    assert wire.decode(wire.encode(message)[4:]) == message


@given(st.lists(MESSAGES, max_size=5), st.integers(1, 7))
def test_messages_cut_anywhere_by_the_socket_arrive_whole(messages: list[wire.Message], piece: int) -> None:
    ours, theirs = socket.socketpair()
    data = b"".join(map(wire.encode, messages))

    def send() -> None:
        for i in range(0, len(data), piece):
            ours.sendall(data[i : i + piece])
        ours.shutdown(socket.SHUT_WR)

    with ours, theirs:
        sender = threading.Thread(target=send)
        sender.start()
        channel = wire.Channel(theirs)
        received = []
        while (message := channel.receive()) is not None:
            received.append(message)
        sender.join()
    assert received == messages


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"5", b"{}", b'{"is":"Nonsense"}', b'{"is":"Remove"}', b'{"is":"Remove","id":"7"}',
     b'{"is":"Remove","id":7,"more":1}', b'{"is":"Step","outputs":[{}],"stats":{}}', b"\xff"],
)  # fmt: skip
def test_what_is_not_a_message_is_refused(body: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode(body)


def test_a_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(struct.pack("<I", wire.FRAME_BYTES_MAX + 1))
        with pytest.raises(WireError, match="is over"):
            wire.Channel(theirs).receive()
