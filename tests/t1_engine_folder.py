"""The error for a faulty model folder names the file and the remedy. A good folder loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig

from aiosd.cores.engine import build, config, fused, ops
from aiosd.cores.engine import model as model_module
from aiosd.cores.engine.family import spec_of
from aiosd.cores.engine.folder import ModelFolder
from aiosd.cores.engine.model import load
from aiosd.errors import ModelError
from aiosd.syscall.sampling import Sampling
from tests.running import needs
from tests.t1_engine_models import FAMILY, FOREIGN, alone, engine, folder, model, prompt, reference

WEIGHTS = "model.safetensors"


def broken(tmp_path: Path, name: str, damage: Callable[[Path], object]) -> Path:
    path = tmp_path / "model"
    shutil.copytree(folder(name), path)
    damage(path)
    return path


def cut(path: Path) -> None:
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[: len(data) // 2])


def edit_config(**changes: object) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return edit


def lose_tensor(path: Path) -> None:
    tensors = load_file(path / WEIGHTS)
    del tensors[min(k for k in tensors if "layers.1" in k)]
    save_file(tensors, path / WEIGHTS, {"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda p: (p / WEIGHTS).unlink(), WEIGHTS),
    "pickled weights": (lambda p: (p / WEIGHTS).rename(p / "pytorch_model.bin"), "reads only safetensors"),
    "truncated weights": (cut, "truncated"),
    "empty weights": (lambda p: (p / WEIGHTS).write_bytes(b""), WEIGHTS),
    "weights of zeros": (lambda p: (p / WEIGHTS).write_bytes(bytes(1000)), WEIGHTS),
    "a lost tensor": (lose_tensor, "layers.1"),
    "no config": (lambda p: (p / "config.json").unlink(), "config.json: no such file"),
    "bad JSON": (lambda p: (p / "config.json").write_text("{\n'a': 1}"), "config.json:2: not JSON"),
    "a list": (lambda p: (p / "config.json").write_text("[]"), "config.json: not a JSON object"),
    "no model_type": (lambda p: (p / "config.json").write_text("{}"), "no model_type"),
    "an unknown architecture": (edit_config(model_type="hal9000"), "hal9000"),
    "an encoder-decoder": (edit_config(model_type="t5", architectures=["T5"]), "t5"),
    "another size": (edit_config(hidden_size=128, head_dim=16), "shape"),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "tokenizer"),
    "a bad tokenizer": (lambda p: (p / "tokenizer.json").write_text("{}"), "tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_broken_folder_is_refused_with_reason_and_remedy(tmp_path: Path, damage: str, name: str) -> None:
    break_it, reason = DAMAGE[damage]
    path = broken(tmp_path, name, break_it)
    with pytest.raises(ModelError) as caught:
        load(path)
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a folder"):
        load(tmp_path / "none")


@pytest.mark.parametrize(
    "options", [{"device": "cuda:99"}, {"device": "toaster"}, {"dtype": "int8"}, {"dtype": "x"}]
)
def test_options_that_the_machine_lacks_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(ModelError) as caught:
        load(folder("llama"), device=options.get("device", "cpu"), dtype=options.get("dtype", "auto"))
    assert caught.value.hint


def test_other_dtypes_run_without_exactness() -> None:
    for name in ("llama", "phi3"):
        m = load(folder(name), dtype="bfloat16")
        assert not m.info["exact"]
        assert len(alone(m, prompt(70), Sampling(max_tokens=5, ignore_eos=True)).tokens) == 5
    assert all(model(name).info["exact"] for name in FAMILY + FOREIGN)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": None, "head_dim": None},
        {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
            "torch_dtype": "bfloat16",
        },
    ],
)
def test_our_reader_of_llama_agrees_with_that_of_transformers(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    path = broken(tmp_path, "llama", edit_config(**changes))
    ours, theirs = config.read(ModelFolder(path)), AutoConfig.from_pretrained(path)
    assert isinstance(ours, config.LlamaConfig)
    for name in [*config.LlamaConfig.__annotations__, "dtype", "architectures", "model_type"]:
        assert getattr(ours, name) == getattr(theirs, name), name
    a, b = spec_of(ours), spec_of(theirs)
    assert a
    assert b
    assert torch.equal(a.ropes[0].inv_freq, b.ropes[0].inv_freq)
    assert a.ropes[0].scale == b.ropes[0].scale
    assert replace(a, ropes=b.ropes) == b
    defaults = LlamaConfig()
    for name in config.LlamaConfig.__annotations__:
        assert getattr(config.LlamaConfig(), name) == getattr(defaults, name), name


@pytest.mark.parametrize("changes", [{"hidden_size": "wide"}, {"rope_parameters": 3}, {"vocab_size": None}])
def test_a_field_of_the_wrong_type_is_named(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=next(iter(changes))):
        load(broken(tmp_path, "llama", edit_config(**changes)))


def test_the_family_loads_without_most_of_transformers() -> None:
    """Importing all of transformers would more than double a worker's start-up time."""
    load = "from aiosd.cores.engine.model import load; [load(p) for p in sys.argv[1:]]"
    script = f"import sys; {load}; print(*sys.modules)"
    paths = [str(folder(name)) for name in ("llama", "mistral", "qwen2", "qwen3")]
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True)
    assert "transformers.integrations.hub_kernels" not in done.stdout.split()


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    def plant(path: Path) -> None:
        edit_config(
            model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
        )(path)
        (path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")

    with pytest.raises(ModelError, match="never run"):
        load(broken(tmp_path, "llama", plant))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_sharded_weights_load_and_a_missing_shard_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "sharded"
    shutil.copytree(folder(name), path)
    (path / WEIGHTS).unlink()
    reference(name).save_pretrained(path, max_shard_size="100KB")
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 1
    sampling = Sampling(max_tokens=8, ignore_eos=True, logprobs=0)
    assert alone(load(path), prompt(20), sampling) == alone(model(name), prompt(20), sampling)
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"{shards[1].name}: missing shard"):
        load(path)


def test_the_identity_is_that_of_the_content(tmp_path: Path) -> None:
    a = load(folder("llama"))
    assert load(broken(tmp_path / "a", "llama", lambda p: None)).identity == a.identity

    def turn_one_bit(path: Path) -> None:
        data = bytearray((path / WEIGHTS).read_bytes())
        data[len(data) // 2] ^= 1
        (path / WEIGHTS).write_bytes(data)

    assert load(broken(tmp_path / "b", "llama", turn_one_bit)).identity != a.identity
    assert load(broken(tmp_path / "c", "llama", edit_config(rms_norm_eps=1e-3))).identity != a.identity


@pytest.mark.parametrize("name", FAMILY + FOREIGN)
def test_the_right_core_runs_a_model(name: str) -> None:
    m = model(name)
    own = "fused" if ops.library() else "torch"
    assert m.info["core"] == (own if name in FAMILY else "transformers")
    assert m.info["architecture"] == AutoConfig.from_pretrained(folder(name)).architectures[0]
    assert m.kv_bytes_per_token >= 4 * 2 * 2 * 16
    assert engine(m, tokens=100).stats["kv_blocks_total"] == 6


@pytest.mark.parametrize("name", ["mamba", "bloom"])
def test_a_model_whose_attention_cannot_be_paged_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=name) as caught:
        load(folder(name))
    assert "use another model" in caught.value.hint


def test_a_model_whose_rows_depend_on_the_batch_runs_one_by_one() -> None:
    assert model("phi").info["batched"]
    assert not model("phi3-long").info["batched"]


def test_without_the_compiled_operations_the_torch_path_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "library", lambda: None)
    assert load(folder("llama")).info["core"] == "torch"
    with pytest.raises(ModelError, match="not usable here"):
        load(folder("llama"), core="fused")


def test_unusable_operations_are_told_once_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ops, "HERE", tmp_path)
    ops.library.cache_clear()
    try:
        assert ops.library() is None
        assert ops.library() is None
        assert len(caplog.records) == 1
        (tmp_path / "_ops_avx2.so").write_bytes(b"no ELF")
        ops.library.cache_clear()
        assert ops.library("avx2") is None
        monkeypatch.setattr(ops, "cpu_flags", lambda: {"sse2"})
        ops.library.cache_clear()
        assert ops.library() is None
    finally:
        ops.library.cache_clear()


@pytest.mark.slow
def test_the_operations_build_with_a_compiler_alone(tmp_path: Path) -> None:
    needs("g++")
    made = build.build(tmp_path, {"avx2": []})
    assert [p.name for p in made] == ["_ops_avx2.so"]
    assert list(tmp_path.iterdir()) == made


def test_a_fused_model_frees_its_memory() -> None:
    if ops.library() is None:
        pytest.skip("compiled operations are not built")
    m = load(folder("llama"))
    assert isinstance(m.core, fused.FusedLlama)
    finalizer = m.core._free
    del m
    assert not finalizer.alive
