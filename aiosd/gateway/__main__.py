"""python -m aiosd.gateway: aios-gateway(8), on the sockets that systemd gives or on one that is named."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
from pathlib import Path

import uvicorn

from aiosd.gateway.aliases import alias
from aiosd.gateway.allowance import Allowances
from aiosd.gateway.front import Front
from aiosd.gateway.protocol import Protocol
from aiosd.gateway.sessions import UserSessions
from aiosd.host import journal

FIRST_SOCKET = 3  # sd_listen_fds(3)
HEADERS_MOST = 64 << 10  # bytes
IDLE_S = 75  # that a connection is kept for the next request


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("aios-gateway", description="HTTP for aiosd, see aios-gateway(8).")
    parser.add_argument("--root", type=Path, default=Path("/aios"), help="the tree")
    parser.add_argument("--sessions", type=Path, default=Path("/run/aios-gateway/session.sock"))
    parser.add_argument("--socket", type=Path, help="listen at this Unix socket, without systemd")
    parser.add_argument("--port", type=int, help="listen at this port of 127.0.0.1, without systemd")
    parser.add_argument("--host", action="append", default=[], help="a name under which a proxy serves it")
    parser.add_argument(
        "--model-alias", action="append", default=[], type=alias, metavar="PATTERN=NAME",
        help="the model that programs mean by such a name",
    )  # fmt: skip
    parser.add_argument("--cors-origin", action="append", default=[], help="an origin whose pages may use it")
    state = os.environ.get("STATE_DIRECTORY")  # of systemd
    parser.add_argument("--state", type=Path, default=Path(state) if state else None, help="keeps the counts")
    return parser


def sockets(given: argparse.Namespace) -> list[socket.socket]:
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        return [socket.socket(fileno=FIRST_SOCKET + i) for i in range(int(os.environ["LISTEN_FDS"]))]
    made = []
    if given.socket:
        made.append(socket.socket(socket.AF_UNIX))
        made[-1].bind(str(given.socket))
        given.socket.chmod(0o666)
    if given.port is not None:
        made.append(socket.create_server(("127.0.0.1", given.port)))
        made[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # which asyncio forgets here
    return made


def main() -> None:
    given = arguments().parse_args()
    journal.begin("info", "aios-gateway")
    sessions, allowances = UserSessions(given.sessions), Allowances(given.state)
    front = Front(given.root, sessions, allowances, given.host, given.cors_origin, given.model_alias)
    config = uvicorn.Config(
        front.application(), http=Protocol, loop="asyncio", ws="none", lifespan="on", log_config=None,
        access_log=False, proxy_headers=False, server_header=False,
        timeout_keep_alive=IDLE_S,
        h11_max_incomplete_event_size=HEADERS_MOST,
    )  # fmt: skip
    asyncio.run(uvicorn.Server(config).serve(sockets(given)))


if __name__ == "__main__":
    main()
