"""Programs that know nothing of aiosd, on the real mount."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from tests.running import Daemon, needs

pytestmark = [pytest.mark.mount]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("curl -sS -T {question} file://{llm} && curl -sS file://{llm}", "plum\n"),
        ("vi -u NONE -es -c '%s/.*/Repeat: plum/' -c 'wq!' {llm}; cat {llm}", "plum\n"),
        ("vi -u NONE -es -c '%s/.*/5/' -c 'wq!' nice && cat nice", "5\n"),
        ("vi -u NONE -es -c '%s/.*/77/' -c 'wq!' nice || cat nice", "0\n"),
        ("sed --in-place s/0/5/ nice 2>&1 | grep -o 'not permitted'", "not permitted\n"),
        ("""jq -nc '{{prompt: "Repeat: plum"}}' > {llm}; jq -r .choices[0].message.content {llm}""",
         "plum\n"),
        ("cat {question} > {llm}; cp {llm} {answer}; cat {answer}", "plum\n"),
        ("tail -c 1 usage | od -An -c; head -1 usage; sort usage | tail -1; wc -l < usage",
         "  \\n\nrequests 0\nrequests 0\n4\n"),
        ("find . -name nice; grep -rl idle state; test -s state || echo empty", "./nice\nstate\nempty\n"),
        ("tar cf - nice 2>&1 | tar tf -; stat -c '%A %s' nice; diff usage usage && du -s .",
         "nice\n-rw-r--r-- 0\n0\t.\n"),
        ("setfacl -m u:1:r state 2>&1; getfacl -c state 2> /dev/null",
         "setfacl: state: Operation not supported\nuser::r--\ngroup::r--\nother::r--\n\n"),
    ],
    ids=lambda text: text.split()[0] if " " in text else None,
)  # fmt: skip
def test_programs(aios: Daemon, agent: str, script: str, said: str, tmp_path: Path) -> None:
    needs(script.split()[0])
    (tmp_path / "question").write_text("Repeat: plum")
    folder = aios.root / agent
    text = script.format(
        llm=folder / "syscall/llm", question=tmp_path / "question", answer=tmp_path / "answer"
    )
    done = aios.sh(f"cd {folder}; {text}")
    assert done.stdout == said, done.stderr


def test_sendfile_writes_a_request_and_reads_a_stored_answer(
    aios: Daemon, agent: str, tmp_path: Path
) -> None:
    """sendfile reads nothing from a file of size 0, so it reads the answer in requests/, which has a size."""
    (tmp_path / "question").write_text("Repeat: plum")
    with open(tmp_path / "question", "rb") as question, open(tmp_path / "answer", "wb") as answer:
        with open(aios.root / agent / "syscall/llm", "wb", buffering=0) as llm:
            assert os.sendfile(llm.fileno(), question.fileno(), 0, 100) == 12
        assert aios.read(f"{agent}/syscall/llm") == "plum\n"
        with open(aios.root / agent / "requests/latest/response", "rb", buffering=0) as response:
            while os.sendfile(answer.fileno(), response.fileno(), None, 100):
                pass
    assert (tmp_path / "answer").read_text() == "plum\n"


def test_operations_that_need_a_size_are_refused(aios: Daemon, agent: str) -> None:
    with open(aios.root / agent / "usage", "rb") as file:
        with pytest.raises((OSError, ValueError)):
            mmap.mmap(file.fileno(), 4096, mmap.MAP_SHARED, mmap.PROT_READ)
        assert os.pread(file.fileno(), 10, 1 << 62) == b""
        with pytest.raises(OSError) as refused:
            os.posix_fallocate(file.fileno(), 0, 10)
        assert refused.value.errno in (errno.EBADF, errno.EOPNOTSUPP)
