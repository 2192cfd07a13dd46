"""The catalog of units/aiosd.catalog explains each main message, and systemd can read it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from aiosd.host.message_ids import Id, about
from tests.running import needs

CATALOG = Path(__file__).parent.parent / "units/aiosd.catalog"
ENTRY = re.compile(r"^-- ([0-9a-f]{32})\n((?:[A-Z][A-Za-z-]*: .*\n)+)\n", re.MULTILINE)


def test_every_main_message_is_explained() -> None:
    entries = dict(ENTRY.findall(CATALOG.read_text()))
    assert set(entries) == {id.value for id in Id}
    for head in entries.values():
        assert {"Subject", "Defined-By", "Documentation"} <= {
            line.split(":")[0] for line in head.splitlines()
        }
    texts = ENTRY.split(CATALOG.read_text())[3::3]
    assert all(len(text.strip()) > 60 for text in texts)


def test_systemd_reads_the_catalog(tmp_path: Path) -> None:
    needs("journalctl")
    folder = tmp_path / "usr/lib/systemd/catalog"
    folder.mkdir(parents=True)
    shutil.copy(CATALOG, folder)
    root = f"--root={tmp_path}"
    made = subprocess.run(["journalctl", root, "--update-catalog"], capture_output=True, text=True)
    assert (made.returncode, made.stderr) == (0, "")
    listed = subprocess.run(["journalctl", root, "--list-catalog"], capture_output=True, text=True)
    assert all(f"{id} aiosd: " in listed.stdout for id in Id)


def test_a_field_without_a_value_is_left_out() -> None:
    assert about(Id.READY, agent="", uid=0, worker=None) == {"MESSAGE_ID": Id.READY.value, "AIOS_UID": 0}
