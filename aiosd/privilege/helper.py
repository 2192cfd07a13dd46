"""aios-privileged: the root process beside a daemon that has no privileges of its own
(aiosd.privilege.orders).

It mounts the tree and hands the descriptor over, runs tools as their callers, and starts workers' units. It
knows no requests, reads no file of users and parses no more of what they say than it must. What the daemon
orders is held against the configuration, which it reads itself: a tool's manifest may grant paths, network
or secrets where the administrator's says so, and users' tools nothing. One daemon at a time; with it go all
tools that ran for it, and the tree is mounted again for the next, so that who comes meanwhile waits.
"""

from __future__ import annotations

import argparse
import logging
import os
import pwd
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from aiosd import __version__
from aiosd.config.config import load
from aiosd.cores import devices
from aiosd.cores.wire import Channel
from aiosd.errors import AiosError, ConfigError, Denied, Misconfigured, WireError
from aiosd.host import journal, mount
from aiosd.host.eventloop import Loop
from aiosd.host.notify import notify
from aiosd.privilege import orders
from aiosd.privilege.orders import PEER, SYSTEMD, Ended, Erred, Found, Mounted, Said, WorkerFailed
from aiosd.tools.catalog import Tools
from aiosd.tools.manifest import Manifest
from aiosd.tools.mcp import sessions
from aiosd.tools.run.runner import Places, Runner
from aiosd.tools.run.spawn import End, Events

log = logging.getLogger("aios-privileged")

NOWHERE = Path("/nonexistent")  # users' tools are none of its own
SYSTEMCTL = {
    "start": ["restart"],  # one of a daemon that just ended may be about to end too
    "stop": ["stop", "--no-block"],
    "kill": ["kill", "--signal=SIGKILL"],
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="aios-privileged", description="Acts as root for aiosd.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="default /etc/aios/aiosd.toml")
    parser.add_argument("--socket", type=Path, metavar="PATH", default=Path("/run/aios/privileged"))
    parser.add_argument("--user", default="aios", help="that the daemon runs as, by name or number")
    parser.add_argument("--version", action="version", version=f"aiosd {__version__}")
    options = parser.parse_args()
    journal.begin("info", "aios-privileged")
    try:
        Privileged(options.config, options.socket, uid_of(options.user)).serve()
    except AiosError as error:
        print(f"aios-privileged: {error.explanation}", file=sys.stderr)
        return os.EX_CONFIG if isinstance(error, Misconfigured) else 1
    return 0


class Privileged:
    def __init__(self, file: Path | None, address: Path, uid: int) -> None:
        """Raises Misconfigured."""
        self._file, self._address, self._uid = file, address, uid
        try:
            self._configure()
        except ConfigError as error:
            raise Misconfigured(str(error), error.hint) from None

    def _configure(self) -> None:
        """Raises ConfigError."""
        self.config = config = load(self._file)
        self.tools = Tools(Path(config.tools.folder), NOWHERE, config.tools.network)

    def serve(self) -> None:
        signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        folder = Path(self.config.daemon.mount)
        mount.clear_stale(folder)
        with ExitStack() as undo:
            self._fuse = mount.open_fuse(folder, shared=True)
            undo.callback(mount.unmount, folder)
            listener = undo.enter_context(self._listen())
            threading.Thread(target=self._accept, args=(listener, folder), daemon=True).start()
            notify(READY=1, STATUS=f"mounted {folder}")
            while (got := signal.sigwait(signals)) == signal.SIGHUP:
                self._reload()
            log.info("%s: stopping", signal.Signals(got).name)

    def _reload(self) -> None:
        try:
            self._configure()
            log.info("configuration reloaded")
        except AiosError as error:
            log.error("not reloaded, the old configuration stays: %s", error.explanation)

    def _listen(self) -> socket.socket:
        """It has its name once it can be connected to, by the daemon alone."""
        new = self._address.with_name(self._address.name + ".new")
        new.unlink(missing_ok=True)  # of one that was killed
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(new))
        os.chown(new, self._uid, -1)
        new.chmod(0o600)
        listener.listen(1)
        new.replace(self._address)
        return listener

    def _accept(self, listener: socket.socket, folder: Path) -> None:
        while True:
            sock, _ = listener.accept()
            pid, uid, _ = PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
            if uid not in (0, self._uid):
                log.warning("user %d is not the daemon", uid)
                sock.close()
                continue
            log.info("the daemon is here (pid %d)", pid)
            daemon = Daemon(self, Channel(sock, orders.ORDERS))
            try:
                daemon.serve(folder, self._fuse)
                mount.unmount(folder)
                self._fuse = mount.open_fuse(folder, shared=True)
                log.info("the daemon is gone; who opens something below %s waits for the next", folder)
                daemon.end()
            except Exception:
                log.exception("the daemon's orders")
                logging.shutdown()
                os._exit(70)  # EX_SOFTWARE: tools die with it, and the service manager starts it again


class Daemon:
    """What one daemon orders, for as long as it is there."""

    def __init__(self, privileged: Privileged, channel: Channel) -> None:
        self._privileged, self._channel = privileged, channel
        daemon, tools = privileged.config.daemon, privileged.config.tools
        places = Places(Path(daemon.state) / "work", Path(tools.credentials), Path(daemon.mount))
        self._runner = Runner(places)
        self._workers = Loop("workers")  # one order after the other: what is killed is not the next one

    def serve(self, folder: Path, fuse: int) -> None:
        self._runner.start()
        self._workers.start()
        try:
            self._send(Mounted(str(folder)), fuse)
            os.close(fuse)
            while (message := self._channel.receive()) is not None:
                self._obey(message)
        except (OSError, WireError) as error:
            log.error("the daemon's connection: %s", error)

    def end(self) -> None:
        self._workers.stop()
        self._runner.stop()
        self._channel.close()

    def _obey(self, message: Any) -> None:
        runner = self._runner
        match message:
            case orders.Run():
                self._run(message)
            case orders.Kill():
                runner.kill(message.id, message.why)
            case orders.Tell():
                runner.order(partial(runner.tell, message.id, message.data.encode("latin-1")))
            case orders.Shut():
                runner.order(partial(runner.shut, message.id))
            case orders.Rest():
                runner.order(partial(runner.rest, message.id, message.resting))
            case orders.Forget():
                runner.forget(message.agent)
            case orders.ForgetBut():
                runner.forget_but([int(agent) for agent in message.agents])
            case orders.Notify():
                facts = {key: str(value) for key, value in message.facts.items() if key.startswith("AIOS_")}
                if hook := self._privileged.config.tools.notify:
                    runner.notify(hook, facts, message.uid, message.gid)
            case orders.Worker():
                self._workers.order(partial(self._order_worker, message))
            case orders.Probe():
                self._workers.order(self._probe)

    def _run(self, message: orders.Run) -> None:
        program = self._channel.take_file() if message.with_program else None
        id = message.id
        events = Events(
            lambda: True,
            lambda data: self._send(Said(id, data.decode("latin-1"))),
            partial(self._ended, id),
            lambda data: self._send(Erred(id, data.decode("latin-1"))) if id < 0 else None,
        )
        call = orders.received(message, program, events)
        try:
            self._check(call.manifest, call.folder)
            if program is None and any(part.startswith("./") for part in call.manifest.command):
                raise Denied("the file beside the manifest did not come with the call")
        except AiosError as error:
            call.discard()
            log.error("call %d: %s", id, error.explanation)
            self._ended(id, End(-1, "", error.explanation))
            return
        self._runner.run(call)

    def _check(self, manifest: Manifest, folder: str) -> None:
        """Raises Denied: it would have more than the administrator gives it."""
        if (folder and not (folder.isdecimal() or folder.startswith("mcp-"))) or "/" in folder:
            raise Denied(f"{folder!r} is no work folder")
        if not (
            manifest.read or manifest.write or manifest.network or manifest.credentials or manifest.server
        ):
            return
        if manifest not in (lawful(self._privileged, manifest)):
            self._privileged._reload()  # it may have changed, and the daemon was told first
            if manifest not in (lawful(self._privileged, manifest)):
                raise Denied(
                    f"{manifest.name} is to have what its manifest does not say", "systemctl reload aiosd"
                )

    def _ended(self, id: int, end: End) -> None:
        self._send(Ended(id, end.status, end.stderr, end.why, asdict(end.spent) if end.spent else {}))

    def _send(self, message: Any, file: int | None = None) -> None:
        with suppress(OSError):  # it is gone, and serve() is about to see it
            self._channel.send(message, file)

    def _order_worker(self, order: orders.Worker) -> None:
        unit = f"aios-worker@{int(order.id)}.service"
        try:
            if order.what == "start":
                self._confine(unit, order.devices)
        except (AiosError, OSError, subprocess.SubprocessError) as error:
            why = error.explanation if isinstance(error, AiosError) else str(error)
            log.error("%s: %s", unit, why)
            self._send(WorkerFailed(order.id, why))
            return
        done = subprocess.run(
            ["systemctl", *SYSTEMCTL[order.what], unit], capture_output=True, text=True, check=False
        )
        if done.returncode and order.what == "start":
            why = done.stderr.strip() or f"{unit} cannot be started"
            log.error("%s", why)
            self._send(WorkerFailed(order.id, why))

    def _devices(self) -> list[devices.Device]:
        """By the configuration of now: the daemon may have reloaded it."""
        return devices.probe(load(self._privileged._file).engine.device_table)

    def _probe(self) -> None:
        try:
            found = self._devices()
        except AiosError as error:
            log.error("%s", error.explanation)
            found = [replace(devices.processor(), trouble=" ".join(error.explanation.split()))]
        self._send(Found([asdict(device) for device in found]))

    def _confine(self, unit: str, uuids: list[Any]) -> None:
        """To its devices, and the processors and memory next to them. Raises Denied, OSError."""
        there = {device.uuid: device for device in self._devices()}
        if unknown := [uuid for uuid in uuids if uuid not in there]:
            raise Denied(f"there is no device {unknown[0]!r}")
        text = devices.drop_in([there[uuid] for uuid in uuids])
        file = SYSTEMD / f"{unit}.d" / "device.conf"
        if text == (file.read_text() if file.exists() else ""):
            return
        if text:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        else:
            file.unlink()
        subprocess.run(["systemctl", "daemon-reload"], check=True, capture_output=True)


def uid_of(user: str) -> int:
    try:
        return int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ConfigError(f"there is no user {user}", "systemd-sysusers") from None


def lawful(privileged: Privileged, manifest: Manifest) -> list[Manifest]:
    """What one of that name may be: the administrator's tool, or the host of an MCP server."""
    found = []
    if tool := privileged.tools.find(manifest.name):
        found.append(replace(tool.manifest, description="", parameters={}, judge=None))
    if server := privileged.config.mcp.get(manifest.name):
        found.append(sessions.host(server))
    return found


if __name__ == "__main__":
    sys.exit(main())
