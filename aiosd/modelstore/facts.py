"""What a model is, by its own words: architecture, size, context, quantisation, licence, chat template.

In the puller, because the file is anybody's.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any, BinaryIO

from aiosd.errors import ModelError

CONFIG_BYTES, TEXT_CHARS, TEMPLATE_CHARS = 4 << 20, 200, 64 << 10
OTHER = "choose another source"
CHECK = "compare its size and checksum with those at its source, or choose another source"


def of(file: int, name: str) -> dict[str, Any]:
    """`file` is closed. Raises ModelError."""
    with os.fdopen(file, "rb") as opened:
        return of_gguf(opened, name) if name.endswith(".gguf") else of_config(opened, name)


def of_config(file: BinaryIO, name: str) -> dict[str, Any]:
    try:
        config = json.loads(file.read(CONFIG_BYTES))
        found = {
            "architecture": config.get("architectures", [""])[0] or config.get("model_type", ""),
            "context_length": config.get("max_position_embeddings", 0),
            "quantization": config.get("quantization_config", {}).get("quant_method", "")
            or config.get("dtype", config.get("torch_dtype", "")),
        }
    except (ValueError, AttributeError, IndexError, TypeError) as error:
        raise ModelError(f"{name} is not the configuration of a model: {error}", OTHER) from None
    return tidy(found)


def of_gguf(file: BinaryIO, name: str) -> dict[str, Any]:
    from gguf import GGUFReader

    try:
        mapped: Any = file  # numpy maps an open file too; by a path this process may not open it
        reader = GGUFReader(mapped)
        told = {
            key: reader.fields[key].contents()
            for key in reader.fields
            if not key.startswith("tokenizer.ggml")
        }
        types = Counter[str]()
        for tensor in reader.tensors:
            types[tensor.tensor_type.name] += int(tensor.n_elements)
    except Exception as error:  # noqa: BLE001 the library checks little of a damaged file
        raise ModelError(f"{name} is not a GGUF file, or damaged or cut off: {error}", CHECK) from None
    architecture = str(told.get("general.architecture", ""))
    found = {
        "architecture": architecture,
        "parameters": sum(types.values()),
        "context_length": told.get(f"{architecture}.context_length", 0),
        "quantization": types.most_common(1)[0][0] if types else "",
        "licence": told.get("general.license", ""),
        "template": told.get("tokenizer.chat_template", ""),
    }
    return tidy(found)


def tidy(found: dict[str, Any]) -> dict[str, Any]:
    """Keep what has the type that it should have, and is not long."""
    kept: dict[str, Any] = {}
    for key, value in found.items():
        most = TEMPLATE_CHARS if key == "template" else TEXT_CHARS
        if isinstance(value, str) and value:
            kept[key] = value[:most]
        elif isinstance(value, int) and 0 < value < 1 << 53:
            kept[key] = int(value)
    return kept
