"""Programs of others, as they come from PyPI and npm, ask the gateway with a user's key."""

from __future__ import annotations

import json
import os
import re
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.gateway import Gateway
from tests.running import REPOSITORY, Daemon
from tests.t5_gateway import GAMES, NEWS
from tests.t5_gateway_keys import key_of
from tests.t5_users import as_user

pytestmark = [pytest.mark.mount, pytest.mark.root, pytest.mark.slow]
HERE, CLIENTS = REPOSITORY / "tests/clients", REPOSITORY / ".venv/clients"
PYTHON = ("openai", "ollama", "anthropic", "litellm", "langchain", "llama-index", "instructor", "pydantic-ai",
          "autogen", "openai-agents", "llm")  # fmt: skip


@pytest.fixture(scope="module")
def key(aios: Daemon) -> str:
    return str(key_of(aios, NEWS)["key"])


def run(gateway: Gateway, key: str, home: Path, *command: str | Path) -> dict[str, str | int]:
    env = {
        "PATH": os.environ["PATH"], "HOME": str(home), "LLM_USER_PATH": str(home), "KEY": key,
        "MODEL": "tiny", "BASE": f"http://127.0.0.1:{gateway.port}/v1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }  # fmt: skip
    done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found: dict[str, str | int] = json.loads(done.stdout.splitlines()[-1])
    return found


def judge(found: dict[str, str | int]) -> None:
    assert str(found["answer"]).strip() == "plum"
    assert str(found.get("stream", "plum")).strip() == "plum"
    assert int(found.get("pieces", 2)) > 1, "it did not stream"
    assert "444" in str(found.get("result", "444"))
    assert found.get("error", "NotFoundError") == "NotFoundError"


@pytest.mark.parametrize("client", PYTHON)
def test_a_python_client_works_unmodified(
    client: str, gateway: Gateway, aios: Daemon, key: str, tmp_path: Path
) -> None:
    def newest(uid: int) -> str:
        return as_user(aios, uid, "cat models/tiny/llm").stdout

    before = newest(NEWS), newest(GAMES)
    judge(run(gateway, key, tmp_path, CLIENTS / "bin/python", HERE / "python.py", client))
    assert newest(NEWS) != before[0], "the user of the key asked"
    assert newest(GAMES) == before[1], "nobody else did"
    assert "running 0" in as_user(aios, NEWS, "cat status").stdout, (
        "a request of a client that left still runs"
    )


@pytest.mark.parametrize("script", ["openai.mjs", "ai.mjs"])
def test_a_javascript_client_works_unmodified(
    script: str, gateway: Gateway, key: str, tmp_path: Path
) -> None:
    module = tmp_path / script
    module.write_bytes((HERE / script).read_bytes())
    (tmp_path / "node_modules").symlink_to(CLIENTS / "node_modules")
    judge(run(gateway, key, tmp_path, "node", module))


def test_nothing_that_the_description_allows_is_the_gateways_own_fault(
    gateway: Gateway, key: str, tmp_path: Path
) -> None:
    served = f"http://127.0.0.1:{gateway.port}"
    with urllib.request.urlopen(f"{served}/openapi.json") as answer:
        described = answer.read().decode()
    model = '"model":{"type":"string"}'
    assert described.count(model) > 10
    (tmp_path / "openapi.json").write_text(described.replace(model, '"model":{"enum":["tiny"]}'))
    command: list[str | Path] = [
        CLIENTS / "bin/schemathesis", "run", tmp_path / "openapi.json", "--url", served,
        "--max-examples", "5", "--header", f"Authorization: Bearer {key}", "--checks", "not_a_server_error",
        "--seed", "5",
        "--phases", "examples,coverage,fuzzing", "--request-timeout", "30",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=230)
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(re.findall(r"(\d+) passed", done.stdout.replace(",", ""))[-1]) > 100, done.stdout
