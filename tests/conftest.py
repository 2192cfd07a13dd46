"""Fixtures for every layer: models, kernels without a mount, daemons with one."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from aiosd.config.config import Config, load
from aiosd.kernel import Kernel
from tests import random_model
from tests.gateway import Gateway
from tests.running import REPOSITORY, Daemon, Manager, mounts_work

# a slow or busy machine must not fail a test
settings.register_profile("anywhere", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("anywhere")
TINY = REPOSITORY / "models" / "tiny"
# A shell that runs the tests in the background makes them ignore interrupts. Their programs must not.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # start the long files first, because the last one runs alone
        items.sort(key=lambda item: item.path.name, reverse=True)
    if mounts_work():
        return
    skip = pytest.mark.skip(reason="needs root and /dev/fuse: run make test as root")
    for item in items:
        if item.get_closest_marker("mount") or item.get_closest_marker("root"):
            item.add_marker(skip)


@pytest.fixture
def own_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the files and variables that configure pip on this machine from the pip of this test."""
    for name in os.environ:
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model. Its answers are nonsense, but equal for equal tokens, so tests of exactness use it."""
    return random_model.make(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="session")
def slow_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model with one millisecond for each token, so that a test can act during an answer."""
    folder = tmp_path_factory.mktemp("models") / "slow"
    return random_model.make(folder, hidden=256, layers=6)


@pytest.fixture
def make_kernel(tmp_path: Path, random_llama: Path) -> Iterator[Callable[..., Kernel]]:
    """Make kernels on one state folder, not started. `text` is TOML."""
    made: list[Kernel] = []

    def make(text: str = "", model: Path | None = random_llama) -> Kernel:
        file = tmp_path / "aiosd.toml"
        file.write_text(text)
        config: Config = load(file)
        config = replace(config, daemon=replace(config.daemon, state=str(tmp_path / "state")))
        made.append(Kernel(config, model))
        return made[-1]

    yield make
    for kernel in made:
        kernel.stop()


@pytest.fixture
def make_daemon(tmp_path: Path, random_llama: Path) -> Iterator[Callable[..., Daemon]]:
    made: list[Daemon] = []

    def make(config: str = "", model: Path = random_llama, state: Path | None = None) -> Daemon:
        made.append(Daemon(tmp_path, model, config, state))
        return made[-1]

    yield make
    for daemon in made:
        daemon.clean()


@pytest.fixture(scope="session")
def aios(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon with the built-in model, shared by all tests that do not harm it."""
    folder = tmp_path_factory.mktemp("aios")
    folder.parent.chmod(0o755)  # other users must reach the mount
    for parent in [folder, *folder.parents][:4]:
        parent.chmod(0o755)
    daemon = Daemon(folder, TINY).start()
    yield daemon
    assert daemon.stop() == 0
    assert daemon.helped or not (daemon.root / "status").exists()
    daemon.clean()
    loud = [line for line in daemon.log.read_text().splitlines() if line.startswith(("ERROR", "CRITICAL"))]
    assert not loud, "unexpected errors in the daemon's log"


@pytest.fixture
def agent(aios: Daemon, request: pytest.FixtureRequest) -> Iterator[str]:
    """Make an agent in the shared daemon, and give its path below the root."""
    path = f"agents/{re.sub('[^A-Za-z0-9_]', '-', request.node.name)[:60]}"
    (aios.root / path).mkdir()
    yield path
    if (aios.root / path).exists():
        (aios.root / path).rmdir()


@pytest.fixture
def manager() -> Iterator[Manager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0aiosd-test-{os.getpid()}")
        manager = Manager(listening)
        yield manager
        listening.shutdown(socket.SHUT_RDWR)
        manager.listening.join()


@pytest.fixture(scope="module")
def gateway(aios: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The real programs of aios-gateway(8). A file of tests may have one with other options."""
    made = Gateway(tmp_path_factory.mktemp("gateway") / "run", aios)
    yield made.start()
    made.stop()
    assert "Traceback" not in made.log.read_text()
