"""A model folder on disk: its files, its faults, and its identity (a hash of the content).

Finds the faults of a folder early and raises ModelError, because a framework would find them later and report
its own internals. Reads local files only. Runs no code from the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from aiosd.errors import ModelError, in_words

COPY_AGAIN = "copy the folder again from its source"
SAMPLE_BYTES, SAMPLES = 1 << 16, 16


def unreadable(path: Path, error: OSError) -> ModelError:
    """Only a disk that fails is a reason to copy: where the user of this process may not read, a mode is."""
    remedy = "check the disk, then copy the folder again"
    if isinstance(error, PermissionError):
        remedy = f"let uid {os.geteuid()} read it: chmod a+r {path}, and a+x the folders above"
    return ModelError(f"{path}: {in_words(OSError(error.errno, error.strerror or str(error)))}", remedy)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path}: no such file",
            "a model folder holds config.json, tokenizer.json and "
            "*.safetensors, as `huggingface-cli download` leaves them",
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: not UTF-8: {error}", COPY_AGAIN) from None
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}:{error.lineno}: not JSON: {error.msg}", COPY_AGAIN) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object", COPY_AGAIN)
    return value


class ModelFolder:
    """The files of one checkpoint. The constructor checks that all are there and complete."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ModelError(
                f"{self.path}: not a folder", "give the folder of a Hugging Face model on this machine"
            )
        self.config = read_json(self.path / "config.json")
        if not isinstance(self.config.get("model_type"), str):
            raise ModelError(
                f"{self.path / 'config.json'}: no model_type", "name the folder of a Hugging Face model"
            )
        self.headers = {shard: _check_shard(shard) for shard in self._shards()}
        self.place = {
            name: shard for shard, header in self.headers.items() for name in header if name != "__metadata__"
        }
        for name, shard in self._index().items():
            if name not in self.headers[self.path / shard]:
                raise ModelError(f"{self.path / shard}: tensor {name} is missing", COPY_AGAIN)

    def _index(self) -> Mapping[str, str]:
        index = self.path / "model.safetensors.index.json"
        if not index.exists():
            return {}
        weights = read_json(index).get("weight_map")
        if not isinstance(weights, dict) or not all(
            isinstance(v, str) and "/" not in v for v in weights.values()
        ):
            raise ModelError(f"{index}: no usable weight_map", COPY_AGAIN)
        return cast("dict[str, str]", weights)

    def _shards(self) -> list[Path]:
        single = self.path / "model.safetensors"
        if single.exists():
            return [single]
        shards = [self.path / name for name in sorted(set(self._index().values()))]
        if shards:
            return shards
        other = sorted(p.name for p in self.path.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        if other:
            raise ModelError(
                f"{self.path / other[0]}: aiosd reads only safetensors weights",
                "convert the model with transformers' save_pretrained()",
            )
        raise ModelError(f"{single}: no such file", "the folder has no weights; " + COPY_AGAIN)

    @property
    def parameters(self) -> int:
        count = 0
        for header in self.headers.values():
            for name, entry in header.items():
                if name != "__metadata__":
                    size = 1
                    for dim in entry["shape"]:
                        size *= dim
                    count += size
        return count

    def identity(self) -> str:
        """Hex digest that changes with configuration, vocabulary or weights.

        Reads only the headers and evenly spaced samples of the weights: milliseconds instead of minutes.
        """
        digest = hashlib.sha256()
        for name in ("config.json", "tokenizer.json"):
            file = self.path / name
            digest.update(file.read_bytes() if file.exists() else b"")
        for shard in sorted(self.headers):
            size = shard.stat().st_size
            digest.update(f"{shard.name}:{size}".encode())
            with shard.open("rb") as f:
                digest.update(f.read(8 + struct.unpack("<Q", f.read(8))[0]))
                for i in range(SAMPLES):
                    f.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                    digest.update(f.read(SAMPLE_BYTES))
        return digest.hexdigest()[:32]

    def __contains__(self, name: str) -> bool:
        return name in self.place

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        shard = self.place.get(name)
        if shard is None:
            raise ModelError(
                f"{self.path}: no tensor {name} in the weights",
                "the weights do not belong to this config.json; " + COPY_AGAIN,
            )
        try:
            with safe_open(shard, framework="pt") as f:
                value = cast(torch.Tensor, f.get_tensor(name))
        except SafetensorError as error:
            raise ModelError(f"{shard}: {error}", COPY_AGAIN) from None
        except OSError as error:
            raise unreadable(shard, error) from None
        if tuple(value.shape) != shape:
            raise ModelError(
                f"{shard}: {name} has shape {tuple(value.shape)}, config.json says {shape}",
                "the weights do not belong to this config.json; " + COPY_AGAIN,
            )
        return value


def _check_shard(path: Path) -> dict[str, Any]:
    """Read the header of a safetensors file. Raises ModelError when the file is shorter than the header says,
    as after a broken download."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = struct.unpack("<Q", f.read(8).ljust(8, b"\xff"))[0]
            header = json.loads(f.read(length)) if length <= size else None
        if not isinstance(header, dict):
            raise ModelError(f"{path}: truncated or not safetensors", COPY_AGAIN)
        end = (
            8
            + length
            + max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)
        )
    except FileNotFoundError:
        raise ModelError(f"{path}: missing shard", COPY_AGAIN) from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, KeyError, TypeError, IndexError):
        raise ModelError(f"{path}: damaged safetensors header", COPY_AGAIN) from None
    if size < end:
        raise ModelError(f"{path}: truncated: {size} bytes of {end}", COPY_AGAIN)
    return header
