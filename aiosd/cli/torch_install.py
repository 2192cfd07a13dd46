"""aiosctl engine: install a PyTorch for GPUs in place of the package's, which is for CPUs.

The only command of aiosctl that changes files outside /aios. The package's lock files name the versions. A
link switches to the new folder after the installation, so workers never see an incomplete one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from aiosd.client import Failed, Files
from aiosd.host import torch_folder

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LOCKS = (Path("/usr/share/aios"), Path(__file__).parents[2])  # in the package, in a checkout
RESTART = "systemctl restart aiosd"


def install(_: Files, options: argparse.Namespace) -> None:
    check_root()
    kind = "cuda" if options.cuda else "cpu"
    locks = next((at for at in LOCKS if (at / "requirements.lock").exists()), None)
    if locks is None:
        raise Failed(f"the list of versions is not in {LOCKS[0]}: install aiosd again")
    version = locked(locks / "requirements.lock", "torch")
    target = torch_folder.FOLDER / f"{kind}-{version}-{torch_folder.PYTHON}"
    new = target.with_name(f"{target.name}.new")
    if not target.is_dir():
        print(f"installing PyTorch {version} for {kind.upper()} in {target}; with CUDA these are some 3 GB")
        shutil.rmtree(new, ignore_errors=True)
        torch_folder.FOLDER.mkdir(mode=0o755, exist_ok=True)
        wanted = [f"torch=={version}"] if options.cuda else [f"torch=={version}+cpu"]
        cuda = ["--requirement", str(locks / "requirements-cuda.lock")]
        more = cuda if options.cuda else ["--extra-index-url", CPU_INDEX]
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(new), *wanted, *more]
        if subprocess.run([*command, *options.pip]).returncode:
            shutil.rmtree(new, ignore_errors=True)
            raise Failed("pip failed, see its messages above; nothing was changed")
        new.rename(target)
    link = torch_folder.FOLDER / f"{torch_folder.CURRENT}.new"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.replace(torch_folder.FOLDER / torch_folder.CURRENT)
    print(f"workers use it after a restart: {RESTART}")


def locked(file: Path, package: str) -> str:
    for line in file.read_text().splitlines():
        name, _, version = line.split("#")[0].split(";")[0].strip().partition("==")
        if name == package:
            return version
    raise Failed(f"{file} names no version of {package}: install aiosd again")


def status(_: Files, __: argparse.Namespace) -> None:
    if torch_folder.preferred():
        current = os.readlink(torch_folder.FOLDER / torch_folder.CURRENT)
        print(f"workers use {current} in {torch_folder.FOLDER}")
    else:
        print("workers use the package's own PyTorch")


def remove(_: Files, __: argparse.Namespace) -> None:
    check_root()
    shutil.rmtree(torch_folder.FOLDER, ignore_errors=True)
    print(f"workers use the package's own PyTorch after a restart: {RESTART}")


def check_root() -> None:
    if os.geteuid() != 0:
        raise Failed("this changes files of the whole machine and needs root: sudo aiosctl engine …")
