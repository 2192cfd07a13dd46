"""The tree and its files without a mount: the effects of open, write, read and close."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiosd.access.caller import Caller
from aiosd.access.permissions import Permission
from aiosd.access.reasons import LINES, USERS
from aiosd.errors import (
    AiosError,
    BadRequest,
    BadSnapshot,
    BadValue,
    Busy,
    Denied,
    Exists,
    NotAllowed,
    NotFound,
    OverQuota,
    StoreFull,
    TooBig,
)
from aiosd.fs import layout
from aiosd.fs.files import File, Handle, Opening, Shared
from aiosd.fs.ops import ERRNO
from aiosd.fs.tree import Folder, Tree
from aiosd.kernel import Kernel
from aiosd.syscall.request import Request, State
from aiosd.tools import manifest
from aiosd.tools.catalog import Tools, arguments

ME = Caller(os.getuid(), os.getgid(), os.getpid())
OTHER = Caller(4321, 4321, 1 << 29)
LLM = "/agents/ada/syscall/llm"


@pytest.fixture
def kernel(make_kernel: Callable[..., Kernel]) -> Kernel:
    return make_kernel("[limits]\nrequest_bytes = 1000\n[quota]\nagents = 3\n")


@pytest.fixture
def tree(kernel: Kernel) -> Tree:
    tree = layout.build(kernel)
    tree.make(tree.find("/agents"), "ada", ME, 0o777)
    return tree


def opened(tree: Tree, path: str, flags: int = os.O_RDONLY, caller: Caller = ME) -> Handle:
    node = tree.find(path).node
    assert isinstance(node, File)
    return node.open(Opening(caller, flags, path))


def read(tree: Tree, path: str) -> str:
    data = opened(tree, path).read(1 << 20, 0)
    assert data is not None
    return data.decode()


def write(tree: Tree, path: str, text: str, caller: Caller = ME) -> None:
    handle = opened(tree, path, os.O_WRONLY, caller)
    handle.write(text.encode(), 0)
    handle.flush(caller.pid)
    handle.release()


def requests(kernel: Kernel) -> list[Request]:
    return kernel.scheduler.unfinished()


def test_every_domain_error_has_an_errno() -> None:
    kinds = set(AiosError.__subclasses__())
    assert kinds <= set(ERRNO)
    assert set(ERRNO) - kinds == {StoreFull}, "which is a StoreFailed with an errno of its own"


def test_every_name_listed_can_be_looked_up(tree: Tree) -> None:
    def walk(path: str) -> int:
        node = tree.find(path or "/").node
        names = list(node.names()) if isinstance(node, Folder) else []
        return 1 + sum(walk(f"{path}/{name}") for name in names)

    assert walk("") > 30


@pytest.mark.parametrize("name", ["", ".x", "a b", "a" * 65, "ä", "a:b"])
def test_a_bad_name_is_refused(tree: Tree, name: str) -> None:
    with pytest.raises((BadValue, Exists)):
        tree.make(tree.find("/agents"), name, ME, 0o700)


def test_an_object_is_private_and_its_files_are_its_owners(tree: Tree) -> None:
    assert tree.find("/agents/ada").permission == Permission(ME.uid, ME.gid, 0o700)
    assert tree.find(LLM).permission == Permission(ME.uid, ME.gid, 0o600)
    tree.make(tree.find("/agents"), "bob", OTHER, 0o755)
    assert tree.find("/agents/bob/requests").permission == Permission(4321, 4321, 0o700)
    with pytest.raises(Exists):
        tree.make(tree.find("/agents"), "bob", ME, 0o755)


def test_more_objects_than_the_bound_are_refused(tree: Tree) -> None:
    for name in ("b", "c"):
        tree.make(tree.find("/agents"), name, ME, 0o700)
    with pytest.raises(OverQuota, match="3 agents"):
        tree.make(tree.find("/agents"), "d", ME, 0o700)
    tree.remove(tree.find("/agents"), "b", ME)
    tree.make(tree.find("/agents"), "d", ME, 0o700)


def test_nothing_else_can_be_made_or_removed(tree: Tree) -> None:
    for path in ("/", "/agents/ada", "/agents/ada/requests", "/workers", "/scheduler"):
        with pytest.raises(NotAllowed):
            tree.make(tree.find(path), "x", ME, 0o700)
    with pytest.raises(NotAllowed):
        tree.remove(tree.find("/"), "agents", ME)


@pytest.mark.parametrize(
    ("file", "good", "bad"),
    [
        ("/agents/ada/nice", ["5", "-20", "19"], ["20", "x", "1_0", "+5", "٣", "9" * 5000]),
        ("/agents/ada/model", ["random", ""], ["nosuch", "../x"]),
        ("/agents/ada/context", [""], ["nosuch"]),
        ("/agents/ada/params.json", ['{"seed": 1}', "{}"], ["{", "[]", '{"x": 1}', '{"top_p": 9}', "5"]),
        ("/scheduler/policy", ["rr", "fifo"], ["best", ""]),
        ("/scheduler/quantum", ["1", "4096"], ["0", "-1", "many", "99999999"]),
    ],
)
def test_a_value_takes_good_ones_and_keeps_the_old_on_a_bad_one(
    tree: Tree, file: str, good: list[str], bad: list[str]
) -> None:
    for text in good:
        write(tree, file, text + "\n")
    now = read(tree, file)
    for text in bad:
        with pytest.raises((BadValue, NotFound)):
            write(tree, file, text + "\n")
    assert read(tree, file) == now


def test_a_refusal_is_explained_in_the_agents_log(tree: Tree, kernel: Kernel) -> None:
    tree.explain("/agents/ada/nice", BadValue("no", "do this"), 4242)
    note = json.loads(read(tree, "/agents/ada/log.jsonl"))
    assert note["file"] == "nice"
    assert note["message"] == "no; do this"


def test_a_system_prompt_adds_up_over_writes_and_continues_with_append(tree: Tree, kernel: Kernel) -> None:
    handle = opened(tree, "/agents/ada/system", os.O_WRONLY)
    handle.write(b"one\n", 0)
    handle.write(b"two\n", 4)
    assert kernel.agents.get("ada").settings.system == "one\ntwo"
    opened(tree, "/agents/ada/system", os.O_WRONLY | os.O_APPEND).write(b"three\n", 0)
    assert read(tree, "/agents/ada/system") == "one\ntwo\nthree\n"


@pytest.mark.parametrize("command", ["", "  ", "explode", "cancel", "cancel x", "pause now", "\xff"])
def test_a_bad_command_is_refused(tree: Tree, command: str) -> None:
    with pytest.raises((BadValue, NotFound)):
        opened(tree, "/agents/ada/ctl", os.O_WRONLY).write(command.encode("latin-1"), 0)


def test_several_writes_are_one_request_submitted_when_the_opener_closes(tree: Tree, kernel: Kernel) -> None:
    handle = opened(tree, LLM, os.O_WRONLY)
    handle.write(b"one ", 0)
    handle.flush(1)  # a child that inherited the file ends
    handle.write(b"two\n", 4)
    assert requests(kernel) == []
    handle.flush(ME.pid)
    [request] = requests(kernel)
    assert request.spec.text() == "one two\n"
    handle.release()
    assert len(requests(kernel)) == 1


def test_a_request_that_the_opener_did_not_close_is_submitted_at_release(tree: Tree, kernel: Kernel) -> None:
    handle = opened(tree, LLM, os.O_WRONLY)
    handle.write(b"x", 0)
    handle.flush(1)
    handle.release()
    assert len(requests(kernel)) == 1


def test_a_request_that_close_refused_is_not_submitted_at_release(
    tree: Tree, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = opened(tree, LLM, os.O_WRONLY)
    handle.write(b"x", 0)
    with monkeypatch.context() as full:
        full.setattr(kernel.store, "free_bytes", lambda: 0)
        with pytest.raises(StoreFull):
            handle.flush(ME.pid)
    handle.release()
    assert requests(kernel) == []
    assert not kernel.scheduler.queue.pending_bytes


def test_opening_without_writing_asks_nothing(tree: Tree, kernel: Kernel) -> None:
    for flags in (os.O_RDWR, os.O_RDONLY):
        handle = opened(tree, LLM, flags)
        handle.flush(ME.pid)
        handle.release()
    assert opened(tree, LLM).read(9, 0) == b"", "no request yet: an empty file"
    handle = opened(tree, LLM, os.O_WRONLY)
    with pytest.raises(BadRequest):
        handle.flush(ME.pid)
    handle.release()
    assert requests(kernel) == []


@pytest.mark.parametrize(
    "pieces",
    [[b"\xff"], [b"good \xc3", b"\x28"], [b"a\0b"], [b" \n"], [b'{"messages": 5}'], [b"{nonsense\n"]],
)
def test_bad_bytes_are_refused_by_the_write_that_carries_them(
    tree: Tree, kernel: Kernel, pieces: list[bytes]
) -> None:
    handle = opened(tree, LLM, os.O_WRONLY)
    for piece in pieces[:-1]:
        handle.write(piece, 0)
    with pytest.raises(BadRequest):
        handle.write(pieces[-1], 0)
    handle.flush(ME.pid)
    handle.release()
    assert requests(kernel) == [], "and nothing is asked"


def test_a_request_over_the_limit_is_refused_whole(tree: Tree, kernel: Kernel) -> None:
    handle = opened(tree, LLM, os.O_WRONLY)
    handle.write(b"x" * 900, 0)
    for _ in range(3):
        with pytest.raises(TooBig):
            handle.write(b"x" * 900, 900)
    handle.flush(ME.pid)
    handle.release()
    assert requests(kernel) == []


def test_a_half_json_request_ends_as_failed_with_the_reason(tree: Tree, kernel: Kernel) -> None:
    write(tree, LLM, '{"messages": [')
    assert requests(kernel) == []
    answer = json.loads(read(tree, LLM))
    assert "not JSON" in answer["error"]["message"]
    assert read(tree, "/agents/ada/requests/1/state") == "failed\n"


def test_a_private_file_is_submitted_by_the_first_read_and_cancelled_by_an_early_close(
    tree: Tree, kernel: Kernel
) -> None:
    handle = opened(tree, LLM, os.O_RDWR)
    handle.write(b"hi\n", 0)
    handle.flush(ME.pid)
    assert requests(kernel) == []
    assert handle.read(10, 3) is None, "nothing there yet"
    [request] = requests(kernel)
    handle.release()
    assert request.state is State.CANCELLED


def test_asking_a_private_file_for_readiness_submits_it(tree: Tree, kernel: Kernel) -> None:
    handle = opened(tree, LLM, os.O_RDWR)
    handle.write(b"hi\n", 0)
    assert not handle.readable()
    [request] = requests(kernel)
    request.answer.append(b"x")
    assert handle.readable()
    handle.release()


def test_reads_at_the_file_position_and_at_any_other_see_the_same_answer(tree: Tree, kernel: Kernel) -> None:
    handle = opened(tree, LLM, os.O_RDWR)
    handle.write(b"hello\n", 0)
    handle.read(1, 6)
    requests(kernel)[0].answer.append(b"0123456789")
    assert handle.read(4, 6) == b"0123", "read(2) goes on from where the write ended"
    assert handle.read(4, 10) == b"4567"
    assert handle.read(4, 0) == b"0123", "pread(2) names a place in the answer"
    assert handle.read(4, 2) == b"2345"
    assert handle.read(4, 14) == b"89"
    assert handle.read(4, 11) == b"5678", "a shell that has read ahead seeks back to the end of its line"
    assert handle.read(4, 15) == b"9"
    assert handle.read(7, 0) == b"0123456"
    assert handle.read(3, 7) == b"789", "what goes on from the beginning does"
    handle.release()


def reason(tree: Tree, file: str, caller: Caller) -> bytes:
    handle = opened(tree, file, caller=caller)
    return handle.read(1000, 0) or b""


def test_each_user_reads_why_what_that_user_asked_came_to_nothing(tree: Tree, kernel: Kernel) -> None:
    """A guest of an agent cannot read its log, and a call without an agent has none."""
    file, mine, theirs = "/agents/ada/syscall/error", ME, OTHER
    assert reason(tree, file, mine) == b""
    tree.explain(LLM, BadValue("no", "do this"), theirs.uid)
    assert reason(tree, file, theirs) == b"no; do this\n"
    assert reason(tree, file, mine) == b"", "it is nobody else's"
    assert reason(tree, "/tools/calc/error", theirs) == b"", "nor another folder's"
    write(tree, LLM, '{"prompt": ')
    assert reason(tree, file, mine).startswith(b"not JSON")
    assert reason(tree, file, theirs) == b"no; do this\n"
    write(tree, LLM, "well")
    assert reason(tree, file, mine) == b"", "the newest one is well so far"


def test_reasons_of_refusals_are_kept_for_a_bounded_number_of_users_and_files(kernel: Kernel) -> None:
    for number in range(2000):
        kernel.reasons.note(number % 1500, f"/agents/a{number}/ctl", BadValue("x"))
        kernel.reasons.note(7777, f"/agents/b{number}/ctl", BadValue("y"))
    assert kernel.reasons.last(7777, "/agents/b1999").message == "y"
    assert kernel.reasons.last(7777, "/agents/b1").message == ""
    assert kernel.reasons.lines(7777).count("\n") == LINES
    assert len(kernel.reasons._by_uid) == USERS


def test_what_was_refused_is_shown_as_it_was_written(tree: Tree, kernel: Kernel) -> None:
    text = '{"prompt": "x", '
    write(tree, LLM, text)
    [id] = kernel.store.request_ids(kernel.agents.get("ada").id)
    folder = f"/agents/ada/requests/{id}"
    assert opened(tree, f"{folder}/request").read(1000, 0) == f"{text}\n".encode()
    assert opened(tree, f"{folder}/state").read(1000, 0) == b"failed\n"


def test_a_fresh_open_reads_the_newest_request_at_that_time(tree: Tree, kernel: Kernel) -> None:
    write(tree, LLM, "first")
    early = opened(tree, LLM)
    write(tree, LLM, "second")
    late = opened(tree, LLM)
    for request, text in zip(requests(kernel), (b"1", b"2"), strict=True):
        request.answer.append(text)
    assert early.read(9, 0) == b"1"
    assert late.read(9, 0) == b"2"
    assert late.read(9, 0) == b"2", "reading never consumes"
    late.release()
    assert len(requests(kernel)) == 2, "closing a reader cancels nothing"


def test_names_in_a_request_are_checked_against_the_callers_rights(tree: Tree, kernel: Kernel) -> None:
    tree.make(tree.find("/contexts"), "secret", OTHER, 0o777)
    document = json.dumps({"messages": [{"role": "user", "content": "x"}], "context": "secret"})
    stranger = Caller(777, 777, 1 << 29)
    with pytest.raises(Denied, match="secret"):
        write(tree, LLM, document, stranger)
    tree.chmod("/models/random", ME, 0o750)
    tree.make(tree.find("/agents"), "guest", stranger, 0o777)
    with pytest.raises(Denied, match="model random"):
        write(tree, "/agents/guest/syscall/llm", "x", stranger)
    with pytest.raises(NotFound, match="no context none"):
        write(tree, LLM, document.replace("secret", "none"), ME)
    assert requests(kernel) == []
    write(tree, LLM, "x", stranger)  # who shares an agent shares the models that he may use
    [request] = requests(kernel)
    assert request.uid == 777


def test_an_allocated_request_is_written_and_read_by_its_id(tree: Tree, kernel: Kernel) -> None:
    id = read(tree, "/agents/ada/requests/new").strip()
    assert read(tree, f"/agents/ada/requests/{id}/state") == "new\n"
    write(tree, f"/agents/ada/requests/{id}/request", "hello")
    [request] = requests(kernel)
    assert str(request.id) == id
    assert read(tree, f"/agents/ada/requests/{id}/request") == "hello\n"
    write(tree, f"/agents/ada/requests/{id}/ctl", "cancel")
    assert read(tree, f"/agents/ada/requests/{id}/error") == "cancelled\n"
    with pytest.raises(NotAllowed):
        write(tree, f"/agents/ada/requests/{id}/ctl", "cancel")


def test_removing_an_agent_cancels_its_requests_and_forgets_them(tree: Tree, kernel: Kernel) -> None:
    write(tree, LLM, "x")
    [request] = requests(kernel)
    reader = opened(tree, LLM)
    assert reader.read(1, 0) is None
    tree.remove(tree.find("/agents"), "ada", ME)
    assert request.state is State.CANCELLED
    with pytest.raises(AiosError, match="its agent was removed"):
        reader.read(1, 0)
    tree.make(tree.find("/agents"), "ada", OTHER, 0o700)
    assert opened(tree, LLM, caller=OTHER).read(9, 0) == b"", "the next owner of the name sees nothing of it"


def test_the_answers_of_a_shared_model_file_are_each_users_own(tree: Tree, kernel: Kernel) -> None:
    write(tree, "/models/random/llm", "mine")
    write(tree, "/models/random/llm", "theirs", OTHER)
    mine, theirs = requests(kernel)
    mine.answer.append(b"m")
    theirs.answer.append(b"t")
    assert opened(tree, "/models/random/llm").read(9, 0) == b"m"
    assert opened(tree, "/models/random/llm", caller=OTHER).read(9, 0) == b"t"
    assert opened(tree, "/models/random/llm", caller=Caller(9, 9, 1 << 29)).read(9, 0) == b""


def test_messages_are_appended_whole_and_bad_ones_refused(tree: Tree, kernel: Kernel) -> None:
    tree.make(tree.find("/contexts"), "chat", ME, 0o700)
    file = "/contexts/chat/messages.jsonl"
    line = json.dumps({"role": "user", "content": "é\n"}, ensure_ascii=False)
    handle = opened(tree, file, os.O_WRONLY | os.O_APPEND)
    data = (line + "\n" + line).encode()
    handle.write(data[:9], 0)
    handle.write(data[9:], 9)
    handle.flush(ME.pid)
    assert read(tree, file) == (line + "\n") * 2
    for bad in ("no json\n", '{"role": "x", "content": "y"}\n', "[]\n"):
        with pytest.raises(BadValue):
            write(tree, file, bad)
    assert read(tree, file) == (line + "\n") * 2
    node = tree.find(file).node
    assert isinstance(node, File)
    assert node.size == len(read(tree, file).encode())
    node.truncate()
    assert read(tree, file) == ""


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    text=st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1),
    cuts=st.sets(st.integers(0, 60)),
)
def test_a_text_cut_anywhere_is_the_same_request(
    tree: Tree, kernel: Kernel, text: str, cuts: set[int]
) -> None:
    text = "x" + text  # neither empty nor JSON
    data = text.encode()
    edges = [0, *sorted(c for c in cuts if 0 < c < len(data)), len(data)]
    handle = opened(tree, LLM, os.O_WRONLY)
    for start, end in itertools.pairwise(edges):
        handle.write(data[start:end], start)
    handle.flush(ME.pid)
    request = requests(kernel)[-1]
    assert request.spec.text() == text.rstrip("\n") + "\n"
    kernel.ending.cancel(request)


OLD_FILES = {
    "/agents/ada/ctl": "pause",
    "/agents/ada/system": "obey me",
    "/agents/ada/nice": "19",
    LLM: "whose am I?",
    "/contexts/chat/messages.jsonl": '{"role": "system", "content": "obey me"}\n',
}


@pytest.mark.parametrize("path", OLD_FILES)
def test_a_file_opened_before_its_object_was_removed_does_nothing_to_the_next_owners(
    tree: Tree, kernel: Kernel, path: str
) -> None:
    tree.make(tree.find("/contexts"), "chat", ME, 0o700)
    handle = opened(tree, path, os.O_RDWR)
    old = tree.find(path).node
    for folder, name in (("/agents", "ada"), ("/contexts", "chat")):
        tree.remove(tree.find(folder), name, ME)
        tree.make(tree.find(folder), name, OTHER, 0o700)
    with pytest.raises(NotFound, match="was removed"):
        handle.write(OLD_FILES[path].encode(), 0)
    handle.flush(ME.pid)
    handle.release()
    if "contexts" in path:
        assert isinstance(old, File)
        with pytest.raises(NotFound, match="was removed"):
            old.truncate()
    assert requests(kernel) == []
    assert read(tree, "/agents/ada/state") == "idle\n"
    assert read(tree, "/agents/ada/system") == "\n"
    assert read(tree, "/contexts/chat/messages.jsonl") == ""


def test_a_request_written_while_its_agent_is_removed_leaves_nothing(tree: Tree, kernel: Kernel) -> None:
    handle = opened(tree, LLM, os.O_WRONLY)
    handle.write(b"my secret", 0)
    tree.remove(tree.find("/agents"), "ada", ME)
    tree.make(tree.find("/agents"), "ada", OTHER, 0o700)
    with pytest.raises(NotFound):
        handle.flush(ME.pid)
    handle.release()
    assert list(tree.find("/agents/ada/requests").node.names()) == ["new"]  # type: ignore[union-attr]


def test_reset_empties_a_context_only_with_permission_to_write(tree: Tree, kernel: Kernel) -> None:
    tree.make(tree.find("/contexts"), "chat", ME, 0o700)
    write(tree, "/agents/ada/context", "chat")
    tree.remove(tree.find("/contexts"), "chat", ME)
    tree.make(tree.find("/contexts"), "chat", OTHER, 0o700)
    stranger = Caller(777, 777, 1 << 29)
    with pytest.raises(Denied):
        opened(tree, "/agents/ada/ctl", os.O_WRONLY, stranger).write(b"reset", 0)


def test_an_unsubmitted_request_is_kept_and_never_answered_by_another_request(
    tree: Tree, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tree, LLM, "the one before")
    requests(kernel)[0].answer.append(b"its answer")
    handle = opened(tree, LLM, os.O_RDWR)
    handle.write(b"mine", 0)
    with monkeypatch.context() as full:
        full.setattr(kernel.admission, "admit", lambda *_: (_ for _ in ()).throw(Busy("full")))
        for _ in range(2):
            with pytest.raises(Busy):
                handle.read(10, 4)
    assert handle.read(10, 4) is None
    assert requests(kernel)[-1].spec.text() == "mine\n"
    handle.release()


def test_bytes_being_written_are_bounded_by_user_and_given_back(make_kernel: Callable[..., Kernel]) -> None:
    kernel = make_kernel("[quota]\npending_bytes = 1000\n")
    tree = layout.build(kernel)
    tree.make(tree.find("/agents"), "ada", ME, 0o700)
    first = opened(tree, LLM, os.O_WRONLY)
    first.write(b"x" * 900, 0)
    with pytest.raises(Busy):
        opened(tree, LLM, os.O_WRONLY).write(b"x" * 900, 0)
    opened(tree, LLM, os.O_WRONLY, OTHER).write(b"x" * 900, 0)
    first.flush(ME.pid)
    with pytest.raises(Busy):
        opened(tree, LLM, os.O_WRONLY).write(b"x" * 900, 0)
    kernel.ending.cancel(requests(kernel)[0])
    opened(tree, LLM, os.O_WRONLY).write(b"x" * 900, 0)


def test_a_refused_kv_file_gives_its_bytes_back(make_kernel: Callable[..., Kernel]) -> None:
    kernel = make_kernel("[quota]\nkv_bytes = 1000\n")
    tree = layout.build(kernel)
    tree.make(tree.find("/contexts"), "chat", ME, 0o700)
    for _ in range(3):
        handle = opened(tree, "/contexts/chat/kv", os.O_WRONLY)
        with pytest.raises(BadSnapshot):
            handle.write(b"\xff" * 900, 0)
        handle.release()


def test_a_context_is_bounded(make_kernel: Callable[..., Kernel]) -> None:
    tree = layout.build(make_kernel("[limits]\ncontext_bytes = 200\n"))
    tree.make(tree.find("/contexts"), "chat", ME, 0o700)
    with pytest.raises(OverQuota):
        write(
            tree, "/contexts/chat/messages.jsonl", json.dumps({"role": "user", "content": "x" * 200}) + "\n"
        )


def test_only_root_goes_before_the_others(tree: Tree, kernel: Kernel) -> None:
    stranger = Caller(777, 777, 1 << 29)
    with pytest.raises(Denied):
        write(tree, "/agents/ada/nice", "-1", stranger)
    with pytest.raises(Denied):
        write(tree, LLM, '{"messages":[{"role":"user","content":"x"}],"nice":-1}', stranger)
    write(tree, "/agents/ada/nice", "5", stranger)
    write(tree, "/agents/ada/nice", "-5", ME)


def test_a_slow_file_is_rendered_once_for_all_readers_of_a_moment() -> None:
    def render(seconds: float) -> str:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass
        made.append(seconds)
        return "x" * 10

    made: list[float] = []
    opening = Opening(ME, os.O_RDONLY, "/x")
    quick, slow = Shared(render=lambda: render(0)), Shared(render=lambda: render(0.1))
    for file in (quick, quick, slow, slow, slow):
        assert file.open(opening).read(100, 0) == b"x" * 10
    assert made == [0, 0, 0.1]


def test_a_long_manifest_in_lines_is_not_judged_at_each_of_them(
    tree: Tree, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, ask = list[int](), manifest.COURT.verdict

    def counted(text: str) -> str | None:
        asked.append(len(text))
        return ask(text)

    monkeypatch.setattr(manifest.COURT, "verdict", counted)
    tree.make(tree.find("/tools"), "mine", ME, 0o700)
    lines = ["description = 'x'\n", "command = ['/usr/bin/true']\n", "[env]\n"]
    lines += [f"name{i:04d} = 'x'\n" for i in range(2000)]
    handle, at = opened(tree, "/tools/mine/manifest", os.O_WRONLY), 0
    for line in [*lines, "[parameters]\n", "type = 'object'\n"]:
        handle.write(line.encode(), at)
        at += len(line)
    handle.flush(ME.pid)
    handle.release()
    tool = kernel.tools.get("mine")
    assert len(tool.manifest.env) == 2000
    assert sum(asked) < 30 * at, "a few times its length, not its square"


def test_a_manifest_in_lines_may_refer_to_what_a_later_line_brings(tree: Tree, kernel: Kernel) -> None:
    tree.make(tree.find("/tools"), "mine", ME, 0o700)
    lines = ["description = 'x'", "command = ['/bin/cat']", "[parameters]", "type = 'object'",
             "[parameters.properties.a]", "'$ref' = '#word'", "[parameters.'$defs'.w]", "'$anchor' = 'word'",
             "type = 'string'"]  # fmt: skip
    handle, at = opened(tree, "/tools/mine/manifest", os.O_WRONLY), 0
    for line in lines:
        handle.write(f"{line}\n".encode(), at)
        at += len(line) + 1
        if "$ref" in line:
            with pytest.raises(BadValue, match="'#word' names no part of the schema"):
                handle.flush(ME.pid)
    handle.flush(ME.pid)
    handle.release()
    assert arguments(kernel.tools.get("mine"), '{"a": "x"}') == {"a": "x"}
    with pytest.raises(BadRequest, match="a: 1 is not of type 'string'"):
        arguments(kernel.tools.get("mine"), '{"a": 1}')


def test_a_kept_manifest_is_not_judged_again_at_a_start(
    tree: Tree, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mine", "torn", "other"):
        tree.make(tree.find("/tools"), name, ME, 0o700)
        handle = opened(tree, f"/tools/{name}/manifest", os.O_WRONLY)
        handle.write(b"description='x'\ncommand=['/bin/cat']\nparameters={type='object',required=['a']}\n", 0)
        handle.flush(ME.pid)
        handle.release()
    before = [kernel.tools.get(name).manifest for name in ("mine", "torn", "other")]
    asked, ask = list[str](), manifest.COURT.verdict

    def counted(text: str) -> str | None:
        asked.append(json.loads(text)[0])
        return ask(text)

    monkeypatch.setattr(manifest.COURT, "verdict", counted)
    place = before[0].folder.parent
    (place / "torn/verdict.json").write_text('["0.1')
    (place / "other/tool.toml").write_text(
        "description='y'\ncommand=['/bin/cat']\nparameters={type='object'}\n"
    )
    again = Tools(Path("none"), place)
    assert [again.get(name).manifest for name in ("mine", "torn")] == before[:2]
    assert again.get("other").manifest.description == "y"
    assert asked == ["other", "torn"]
    assert Tools(Path("none"), place).get("torn").manifest == before[1]
    assert asked == ["other", "torn"]
    monkeypatch.setattr(manifest, "__version__", "another")
    assert Tools(Path("none"), place).get("mine").manifest == before[0]
    assert asked[2:] == ["mine", "other", "torn"]


def test_a_manifest_that_takes_long_to_read_is_refused(tree: Tree) -> None:
    tree.make(tree.find("/tools"), "mine", ME, 0o700)
    handle = opened(tree, "/tools/mine/manifest", os.O_WRONLY)
    parts = ",".join(["{}"] * 20_000)
    text = f"description='x'\ncommand=['/usr/bin/true']\nparameters={{type='object',anyOf=[{parts}]}}\n"
    with pytest.raises(BadValue, match="takes too long"):
        handle.write(text.encode(), 0)
