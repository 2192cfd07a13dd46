"""Tools with a network: they reach the granted addresses, and no other address by any way that we know."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from aiosd.config import endpoints
from aiosd.errors import BadValue, NoNetwork
from aiosd.tools.run import network, nftables
from tests.running import wait_until
from tests.t5_sandbox import Host, add_tool, python
from tests.t5_users import ALICE, BOB

pytestmark = [pytest.mark.mount, pytest.mark.root]
HOST, FAR, OTHER = "203.0.113.1", "203.0.113.2", "203.0.113.3"  # TEST-NET-3
BEYOND = "198.51.100.2"  # TEST-NET-2: behind another interface of the host


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        where = {"/away": f"http://{OTHER}/", "/near": "/"}.get(self.path)
        self.send_response(404 if self.path == "/none" else 302 if where else 200)
        if where:
            self.send_header("Location", where)
        self.end_headers()
        self.wfile.write({"/long": b"x" * 100_000, "/binary": b"\0\1"}.get(self.path, b"Gr\xc3\xbc\xc3\x9fe"))

    def log_message(self, format: str, *args: object) -> None:
        pass


class Machines:
    """Other machines that are connected to the host. Their servers answer with the client's address."""

    def __init__(self, undo: ExitStack) -> None:
        self._undo = undo
        self.far = self._wired("test-far", HOST, FAR, OTHER)
        self.beyond = self._wired("test-beyond", "198.51.100.1", BEYOND)
        self.granted = self.serve(self.far, FAR)
        self.closed = self.serve(self.far, FAR)
        self.other = self.serve(self.far, OTHER, self.granted)
        self.own = self.serve(None, HOST)
        self.own_closed = self.serve(None, HOST)
        self.local = self.serve(None, "127.0.0.1")
        self.local_closed = self.serve(None, "127.0.0.1")
        self.pages = self._pages()

    def _wired(self, name: str, gateway: str, *addresses: str) -> int:
        def ip(*words: str) -> None:
            subprocess.run(["ip", *words], check=True)

        fd = network._new()
        self._undo.callback(os.close, fd)
        keeper = self._keeper(fd)
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(keeper.pid))
        self._undo.callback(subprocess.run, ["ip", "link", "del", name])
        ip("addr", "add", f"{gateway}/24", "dev", name)
        ip("link", "set", name, "up")
        with network.inside(fd):
            for address in addresses:
                ip("addr", "add", f"{address}/24", "dev", "eth0")
            ip("link", "set", "eth0", "up")
        keeper.kill()
        keeper.wait()
        return fd

    @staticmethod
    def _keeper(fd: int) -> subprocess.Popen[bytes]:
        with network.inside(fd):
            return subprocess.Popen(["sleep", "60"])

    def _listen(self, where: int | None, address: str, port: int) -> socket.socket:
        if where is None:
            return socket.create_server((address, port))
        with network.inside(where):
            return socket.create_server((address, port))

    def serve(self, where: int | None, address: str, port: int = 0) -> int:
        listening = self._listen(where, address, port)

        def accept() -> None:
            while True:
                try:
                    client, (who, _) = listening.accept()
                except OSError:
                    return
                client.sendall(f"hello {who}\n".encode())
                client.close()

        threading.Thread(target=accept, daemon=True).start()
        self._undo.callback(listening.shutdown, socket.SHUT_RDWR)
        return int(listening.getsockname()[1])

    def _pages(self) -> int:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self._undo.callback(server.shutdown)
        return server.server_address[1]


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with ExitStack() as undo:
        yield Machines(undo)


def make_host(folder: Path, model: Path, there: Machines) -> Host:
    host = Host(folder, model)
    granted = [f"{FAR}:{there.granted}", f"{HOST}:{there.own}", f"localhost:{there.local}"]
    add_tool(host.tools, "net", network=granted)
    add_tool(host.tools, "lost", network=["nowhere.invalid:80"])
    add_tool(host.tools, "nearby", network=[f"127.0.0.1:{there.local}"])
    with (folder / "aiosd.toml").open("a") as config:
        config.write(f'[tools.network]\nhttp_get = ["localhost:{there.pages}"]\n')
    return host


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, random_llama: Path, machines: Machines) -> Iterator[Host]:
    host = make_host(tmp_path_factory.mktemp("network"), random_llama, machines).start()
    yield host
    try:
        assert host.daemon.stop() == 0
        assert "Traceback" not in host.daemon.log.read_text()
        assert left() == []
    finally:
        host.daemon.clean()


def left() -> list[str]:
    """The parts of such calls that exist on the host now."""
    from pyroute2.nftables.main import NFTables

    nft = NFTables()
    tables = [table.get_attr("NFTA_TABLE_NAME") for table in nft.get_tables()]
    nft.close()
    forwarding = [name for name in ("all", "test-far") if network._forwarding(name).read_text() != "0\n"]
    record = network.RECORD.read_text().split() if network.RECORD.exists() else []
    return [*network._links(), *(table for table in tables if table == nftables.TABLE), *forwarding, *record]


CONNECT = """
import socket, struct
def attempt(address, port, *, kind=socket.SOCK_STREAM, options=(), source=None):
    try:
        with socket.socket(socket.AF_INET, kind) as s:
            s.settimeout(2)
            for level, name, value in options:
                s.setsockopt(level, name, value)
            if source:
                s.bind(source)
            s.connect((address, port))
            if kind != socket.SOCK_STREAM:
                s.send(b"x" * 40)
            print("GOT", s.recv(100), address, port)
    except OSError as error:
        print(error)
with open("/proc/net/route") as file:
    gateway = next(socket.inet_ntoa(struct.pack("<I", int(line.split()[2], 16)))
                   for line in file if line.split()[1] == "00000000")
"""


def test_a_tool_reaches_what_it_was_granted_and_is_masqueraded(host: Host, machines: Machines) -> None:
    there = [(FAR, machines.granted), (HOST, machines.own), ("localhost", machines.local)]
    script = CONNECT + "".join(f"attempt({name!r}, {port})\n" for name, port in there)
    said = host.call(python(script), tool="net")["output"].splitlines()
    assert len(said) == 3
    assert all(line.startswith("GOT b'hello ") for line in said)
    assert f"hello {HOST}\\n" in said[0], "the far machine knows no way to the call"


NOTHING: dict[str, Callable[[Machines], str]] = {
    "another port of a granted host": lambda m: f"attempt({FAR!r}, {m.closed})",
    "another host": lambda m: f"attempt({OTHER!r}, {m.granted})",
    "another port of this machine": lambda m: f"attempt({HOST!r}, {m.own_closed})",
    "another port of the loopback": lambda m: (
        f"""
for address in ("127.0.0.1", gateway, "127.0.0.2", {HOST!r}):
    attempt(address, {m.local_closed})
"""
    ),
    "a port of the loopback by another address": lambda m: f"attempt({HOST!r}, {m.local})",
    "the keys that clouds serve": lambda m: "attempt('169.254.169.254', 80)",
    "names": lambda m: (
        """
import time
began = time.monotonic()
for name in ("example.org", "localhost.localdomain.example"):
    try:
        print("GOT", socket.getaddrinfo(name, 80))
    except OSError as error:
        print(error)
if time.monotonic() - began > 3:
    print("GOT no answer in time")
for address in ("127.0.0.53", "8.8.8.8", gateway):
    attempt(address, 53)
    attempt(address, 53, kind=socket.SOCK_DGRAM)
"""
    ),
    "UDP to a granted port": lambda m: (
        f"""
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    try:
        s.sendto(b"x", ({FAR!r}, {m.granted}))
        print("GOT")
    except PermissionError as error:
        print(error)
"""
    ),
    "ICMP and raw packets": lambda m: (
        f"""
for kind, protocol in ((socket.SOCK_DGRAM, 1), (socket.SOCK_RAW, 1), (socket.SOCK_RAW, 255)):
    try:
        with socket.socket(socket.AF_INET, kind, protocol) as s:
            s.sendto(b"\\x08" + bytes(39), ({FAR!r}, 1))
            print("GOT")
    except OSError as error:
        print(error)
"""
    ),
    "a port by a route of its own": lambda m: (
        f"""
hop = bytes([131, 7, 4]) + socket.inet_aton({OTHER!r}) + b"\\x01"
attempt({FAR!r}, {m.granted}, options=[(0, socket.IP_OPTIONS, hop)])
attempt({FAR!r}, {m.granted}, options=[(0, socket.IP_OPTIONS, bytes([1] * 4))])
"""
    ),
    "an address that is not its own": lambda m: (
        f"""
attempt({FAR!r}, {m.granted}, options=[(0, 15, 1)], source=({OTHER!r}, 0))  # IP_FREEBIND
attempt({FAR!r}, {m.granted}, options=[(0, 19, 1)], source=({OTHER!r}, 0))  # IP_TRANSPARENT
attempt({FAR!r}, {m.closed}, source=("127.0.0.1", 0))
"""
    ),
    "IPv6": lambda m: (
        """
try:
    socket.create_server(("::1", 0), family=socket.AF_INET6)
    print("GOT")
except OSError as error:
    print(error)
"""
    ),
    "the rules": lambda m: (
        f"""
import subprocess
for words in (
    "addr add 203.0.113.9/24 dev eth0", "addr flush dev eth0", "link set eth0 down",
    "route add 8.8.8.8/32 dev eth0",
    "link add name dummy9 type dummy", "neigh add 198.18.0.9 lladdr 00:00:00:00:00:01 dev eth0",
    "netns exec 1 true", "rule add from all lookup 9",
):
    if subprocess.run(["ip", *words.split()], capture_output=True).returncode == 0:
        print("GOT", words)
with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as s:
    table = struct.pack("=BBH", 2, 0, 0) + struct.pack("=HH5s3x", 9, 1, b"aios")
    def message(kind, flags, body, seq):
        return struct.pack("=IHHII", 16 + len(body), kind, flags, seq, 0) + body
    edge = struct.pack(">BBH", 0, 0, 10)
    for family in (b"\\x01", b"\\x02"):
        delete = message(10 << 8 | 2, 5, family + table[1:], 2)
        s.send(message(16, 1, edge, 1) + delete + message(17, 1, edge, 3))
        s.settimeout(1)
        print(error := struct.unpack_from("=i", s.recv(9999), 16)[0])
        if error != -1:
            print("GOT")
import glob
for file in glob.glob("/proc/sys/net/**", recursive=True):
    try:
        open(file, "r+").close()
        print("GOT", file)
    except OSError:
        pass
attempt({FAR!r}, {m.closed})
"""
    ),
}


@pytest.mark.parametrize("uid", [ALICE, 0], ids=["a user", "root"])
@pytest.mark.parametrize("way", NOTHING)
def test_a_granted_tool_gets_nothing_of(host: Host, machines: Machines, way: str, uid: int) -> None:
    facts = host.call(python(CONNECT + NOTHING[way](machines) + "\nprint('ran')"), uid, tool="net")
    assert "GOT" not in facts["output"], facts
    assert facts["output"].endswith("ran\n"), facts


def test_calls_do_not_reach_each_other_and_nobody_reaches_them(host: Host, machines: Machines) -> None:
    listen = python(
        """
import socket, time
with socket.socket() as s:
    s.connect(("203.0.113.1", OWN))
    own = s.getsockname()[0]
server = socket.create_server(("0.0.0.0", 8000))
print(own, flush=True)
time.sleep(20)
""".replace("OWN", str(machines.own))
    )
    client = host.begin(listen, said="", tool="net")
    try:
        own = client.stdout.readline().decode().strip()
        assert own
        attempts = f"attempt({own!r}, 8000)\nattempt({own!r}, {machines.granted})\nprint('ran')"
        assert host.say(python(CONNECT + attempts), BOB, tool="net").endswith("ran\n")
        assert "GOT" not in host.say(python(CONNECT + attempts), BOB, tool="net")
        for _ in range(2):
            with pytest.raises(OSError, match="timed out"):
                socket.create_connection((own, 8000), timeout=0.5)
        assert host.say("ls /sys/class/net; cut -d: -f1 -s /proc/net/dev", BOB) == "    lo\n"
    finally:
        client.kill()
        client.wait()


def test_the_host_forwards_nothing_else_meanwhile(host: Host, machines: Machines) -> None:
    """Forwarding is on for answers to calls. The far machine must not use it to reach other networks."""
    for fd, gateway in ((machines.far, HOST), (machines.beyond, "198.51.100.1")):
        with network.inside(fd):
            subprocess.run(["ip", "route", "add", "default", "via", gateway], check=True)
    port = machines.serve(machines.beyond, BEYOND)
    client = host.begin("echo begun; sleep 20", tool="net")
    try:
        assert network._forwarding("test-far").read_text() == "1\n"
        with network.inside(machines.far), pytest.raises(OSError, match="timed out"):
            socket.create_connection((BEYOND, port), timeout=1)
    finally:
        client.kill()
        client.wait()
    wait_until(lambda: left() == [], "the end of all of it")


def test_nothing_is_left_after_calls(host: Host, machines: Machines) -> None:
    for _ in range(3):
        assert host.say("echo ran", tool="net") == "ran\n"
    client = host.begin("echo begun; sleep 20", tool="nearby")
    assert set(left()) == {nftables.TABLE, *network._links()}, "the loopback takes no forwarding"
    client.kill()
    client.wait()
    wait_until(lambda: left() == [], "the end of all of it")


def test_a_call_cannot_begin_connections_without_end(host: Host, machines: Machines) -> None:
    """They would fill the host's table of connections."""
    many = python(f"""
import socket, time
began, n = time.monotonic(), 0
while time.monotonic() - began < 2:
    try:
        socket.create_connection(("127.0.0.1", {machines.local}), 0.1).close()
        n += 1
    except OSError:
        pass
print(n)
""")
    assert 100 < int(host.say(many, tool="nearby")) < 600


def test_a_tool_whose_hosts_are_not_found_says_so(host: Host) -> None:
    facts = host.call("echo ran", tool="lost")
    assert facts["output"] == ""
    assert "the granted hosts do not resolve: nowhere.invalid: " in facts["error"]
    assert host.say("echo ran") == "ran\n"


def test_after_kill_9_the_pair_goes_by_itself_and_the_rest_with_the_next_start(
    tmp_path: Path, random_llama: Path, machines: Machines
) -> None:
    host = make_host(tmp_path, random_llama, machines).start()
    try:
        host.begin("echo begun; sleep 20", tool="net")
        assert len(network._links()) == 1
        host.daemon.kill()
        wait_until(lambda: not network._links(), "the end of the pair", 5)
        assert nftables.TABLE in left(), "with it the rule that nothing else is forwarded"
        host.daemon.start(ready=False)
        wait_until(lambda: left() == [], "the end of the rest")
        assert host.say("echo ran", tool="net") == "ran\n"
    finally:
        host.daemon.clean()


def test_flushing_the_machines_rules_breaks_no_later_call(host: Host, machines: Machines) -> None:
    """A firewall flushes the rules when it is loaded again."""
    waiting = host.begin("echo begun; sleep 20", tool="net")
    try:
        nftables.apply(nftables.gone())
        assert get(host, f"http://localhost:{machines.pages}/") == "Grüße\n"
    finally:
        waiting.kill()
        waiting.wait()


# http_get


def get(host: Host, url: str) -> str:
    """The output of the call, or its error."""
    client = host.client(ALICE, "agents/alice/syscall/tool")
    body = json.dumps({"name": "http_get", "arguments": {"url": url}})
    said, _ = client.communicate(body.encode(), 60)
    return said.decode() or host.daemon.read("agents/alice/requests/latest/error")


def test_http_get_fetches_from_granted_hosts_alone(host: Host, machines: Machines) -> None:
    at = f"http://localhost:{machines.pages}"
    assert get(host, f"{at}/") == "Grüße\n"
    assert get(host, f"{at}/near") == "Grüße\n"
    assert get(host, f"{at}/ä b?c=d&e#f") == "Grüße\n"
    assert get(host, f"{at}/long") == "x" * 65536 + "\n"
    assert "the server answers 404" in get(host, f"{at}/none")
    assert "is not text" in get(host, f"{at}/binary")
    said = get(host, f"{at}/away")
    assert f"{OTHER}:80 is not granted; the administrator adds" in said
    assert '"example.org:443" to http_get in [tools.network]' in get(host, "example.org/x")


# in this process


def answers(monkeypatch: pytest.MonkeyPatch, **names: str) -> None:
    def look_up(host: str, *_: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        address = names.get(host.partition(".")[0], host)
        if address == "late":
            time.sleep(5)
        if address == "none":
            raise socket.gaierror(-2, "Name or service not known")
        return [(2, 1, 6, "", (address, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_a_name_that_is_granted_is_known_inside(monkeypatch: pytest.MonkeyPatch, machines: Machines) -> None:
    answers(monkeypatch, far=FAR, gone="none")
    namespace = network.open(
        [f"far.example:{machines.granted}", f"far.example:{machines.closed}", "gone.x:1"]
    )
    try:
        assert namespace.hosts == f"127.0.0.1 localhost aios\n{FAR} far.example\n"
        with network.inside(namespace.fd):
            for port in (machines.granted, machines.closed):
                with socket.socket() as client:
                    client.connect((FAR, port))
    finally:
        namespace.close()
    assert left() == []


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "127.0.1.1", "169.254.169.254", HOST, "0.0.0.0", "224.0.0.1", "198.18.0.1"]
)
def test_no_name_leads_to_this_machine_or_to_link_local(
    address: str, monkeypatch: pytest.MonkeyPatch, machines: Machines
) -> None:
    """Otherwise the owner of a name could point the name there."""
    answers(monkeypatch, evil=address)
    with pytest.raises(NoNetwork, match="cannot be reached"):
        network.open(["evil.example:80"])
    assert left() == []


def test_names_are_looked_up_in_bounded_time(monkeypatch: pytest.MonkeyPatch, machines: Machines) -> None:
    answers(monkeypatch, slow="late", far=FAR)
    monkeypatch.setattr(endpoints, "RESOLVE_S", 0.3)
    began = time.monotonic()
    with pytest.raises(NoNetwork, match=r"no answer within 0.3 s"):
        network.open(["slow.example:80"])
    network.open(["slow.example:80", "far.example:80"]).close()
    assert time.monotonic() - began < 3


def test_without_root_the_error_says_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NoNetwork) as caught:
        network.open(["localhost:80"])
    assert "needs the daemon of root; it takes root with CAP_NET_ADMIN" in caught.value.explanation


@pytest.mark.parametrize(
    "text",
    ["", "host", "host:", ":80", "host:0", "host:65536", "host:080", "*:80", "host:80-90", "[::1]:80",
     "::1:80", "a b:80",
     "host:80 ", "-x:80", "x/24:80", "0.0.0.0:80", "127.0.0.2:80", "224.0.0.1:5", "198.18.0.1:80",
     "a\n:80"],
)  # fmt: skip
def test_an_invalid_grant_is_refused(text: str) -> None:
    with pytest.raises(BadValue):
        endpoints.parse(text)
