"""Run every other decoder with transformers' own modules, whose attention paged.py replaces.

The tokens of all sequences pass through the modules as one row with position_ids. Loading a model tests it:
paged attention must agree with the model's eager attention, and a sequence must get the same bits alone and
among others. A model that fails the second test runs one sequence at a time.
"""

from __future__ import annotations

import inspect
from array import array
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from aiosd.cores.engine.core import CHUNK, KV, Batch, Segment
from aiosd.cores.engine.folder import COPY_AGAIN, ModelFolder
from aiosd.cores.engine.kv import BLOCK
from aiosd.cores.engine.paged import NAME, TRIED_BLOCKS, UNKNOWN, Layer, PagedPass, running
from aiosd.cores.engine.rowwise import make_rowwise
from aiosd.errors import ModelError, in_words

# Silence transformers' reports: _load raises an error for the faults that matter.
logging.set_verbosity_error()  # type: ignore[no-untyped-call]
logging.disable_progress_bar()  # type: ignore[no-untyped-call]

KINDS = {"full_attention", "sliding_attention"}


class Foreign:
    kv_block_dim = 0

    def __init__(
        self, folder: ModelFolder, config: Any, device: str, dtype: torch.dtype, deterministic: bool
    ) -> None:
        _refuse_unsupported(folder, config)
        self.layers: dict[int, Layer] = {}
        self.model = _load(folder, device, dtype)
        self._final = torch.empty(0)  # hidden states of the last forward pass, [rows, hidden]
        self.model.get_decoder().register_forward_hook(self._see)
        self.device: torch.device = self.model.get_input_embeddings().weight.device
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        text = config.get_text_config()
        tokens = torch.randint(
            0, text.vocab_size, (100,), generator=torch.Generator().manual_seed(1)
        ).tolist()
        with torch.inference_mode():
            eager = self._eager(tokens[:40])
            exact = deterministic and self.device.type == "cpu" and dtype == torch.float32
            self.chunk = CHUNK if exact else 1
            if exact:
                make_rowwise(self.model)
            try:
                kv = self._measure(text, tokens[:40], eager)
            except ModelError as error:
                raise ModelError(
                    f"{folder.path / 'config.json'}: {config.model_type}: {error}", error.hint
                ) from None
            # longrope changes its frequencies at some length, so a batch may hold only one sequence
            alone = "longrope" in str(getattr(text, "rope_parameters", None))
            self.together = not alone and (not exact or self._rows_are_independent(tokens, kv))
        self.kv_bytes_per_token = sum(layer.bytes_per_token for layer in self.layers.values())
        self.info: dict[str, Any] = {
            "core": "transformers",
            "dtype": str(dtype).removeprefix("torch."),
            "device": device,
            "exact": exact,
            "batched": self.together,
        }

    def reserve(self, blocks: int) -> KV:
        return [tensor for layer in self.layers.values() for tensor in layer.reserve(blocks)]

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: KV) -> tuple[torch.Tensor, torch.Tensor]:
        if self.together:
            return self._run(batch, kv), self._states(batch)
        wanted, rows, states, at = set(batch.rows), [], [], 0
        for s in batch.segments:
            for start, end in s.units(self.chunk):
                n = end - start
                last = [n - 1] if at + n - 1 in wanted else []
                own = [row - at for row in batch.states if at <= row < at + n]
                one = Batch(batch.tokens[at : at + n], [Segment(s.blocks, start, n, s.prompt)], last, own)
                rows.append(self._run(one, kv))
                states.append(self._states(one))
                at += n
        return torch.cat(rows), torch.cat(states)

    def _see(self, decoder: object, inputs: object, output: Any) -> None:
        self._final = output[0][0]

    def _states(self, batch: Batch) -> torch.Tensor:
        """The input of the head in the last forward pass."""
        return self._final[batch.states].float().cpu()

    def _run(self, batch: Batch, kv: KV) -> torch.Tensor:
        places = [
            (at, s.blocks[at // BLOCK] * BLOCK + at % BLOCK)
            for s in batch.segments
            for at in range(s.start, s.end)
        ]
        positions, slots = torch.tensor(places, device=self.device).unbind(1)
        tokens = torch.tensor([batch.tokens], device=self.device)
        rows = torch.tensor(batch.rows, dtype=torch.long, device=self.device)
        # Some heads fail on zero rows. So a prefill that needs no logits computes one row.
        keep = {"logits_to_keep": rows if batch.rows else 1} if self._keeps else {}
        step = PagedPass(
            self.layers, kv, batch.segments, slots, [s.units(self.chunk) for s in batch.segments]
        )
        with running(step):
            logits: torch.Tensor = self.model(
                tokens, position_ids=positions[None], use_cache=False, **keep
            ).logits[0]
        return (logits[: len(batch.rows)] if self._keeps else logits[rows]).float().cpu()

    # --- tests at load ---

    def _eager(self, tokens: list[int]) -> torch.Tensor:
        self.model.set_attn_implementation("eager")
        logits: torch.Tensor = self.model(torch.tensor([tokens], device=self.device), use_cache=False).logits[
            0
        ]
        self.model.set_attn_implementation(NAME)
        return logits.float().cpu()

    def _measure(self, text: Any, tokens: list[int], eager: torch.Tensor) -> KV:
        """Find the KV's shape, and check that paged and eager attention agree. Raises ModelError."""
        kv: KV = []
        n = len(tokens)
        paged = self._run(Batch(tokens, [Segment(array("i", range(8)), 0, n, n)], list(range(n))), kv)
        kinds = getattr(text, "layer_types", None) or ()
        if not self.layers or any(
            self.layers[i].window is None for i, k in enumerate(kinds) if k == "sliding_attention"
        ):
            raise ModelError("does not let its attention be replaced", UNKNOWN)
        float32 = next(iter(self.layers.values())).dtype == torch.float32
        limit = (1e-3 if float32 else 0.2) * max(1.0, float(eager.abs().max()))
        if not float((paged - eager).abs().max()) <= limit:
            raise ModelError("gives other results with a paged KV", UNKNOWN)
        return kv

    def _rows_are_independent(self, tokens: list[int], kv: KV) -> bool:
        """Whether a sequence gets the same bits alone and among others, in prefill and in decoding."""
        each = 6  # blocks of a sequence

        def part(sequence: int, start: int, n: int) -> Segment:
            return Segment(array("i", range(each * sequence, each * (sequence + 1))), start, n, 70)

        a, b = tokens[:70], tokens[30:]
        plan = [(a[:64], part(0, 0, 64)), (a[64:], part(0, 64, 6)), (a[:1], part(0, 70, 1))]
        alone = [self._run(Batch(own, [segment], [len(own) - 1]), kv)[0] for own, segment in plan]
        for others in (1, 3, TRIED_BLOCKS // each - 1):
            names = range(1, others + 1)
            self._run(Batch(b[:64] * others, [part(i, 0, 64) for i in names], []), kv)
            for at, ((own, segment), expected) in enumerate(zip(plan, alone, strict=True)):
                mixed = [part(i, 64 + at, 1) for i in names]
                got = self._run(Batch(b[:others] + own, [*mixed, segment], [0, others + len(own) - 1]), kv)[1]
                if not torch.equal(got, expected):
                    return False
        return True


def _load(folder: ModelFolder, device: str, dtype: torch.dtype) -> Any:
    where = None if device == "cpu" else device
    try:
        model: Any
        info: Any
        model, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            folder.path,
            dtype=dtype,
            device_map=where,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the error below names them
        )
    except ImportError as error:  # the library of a way to quantise, as a rule
        remedy = "install what it names beside aiosd, or use a GGUF file of the model"
        raise ModelError(f"{folder.path}: cannot be loaded: {in_words(error)}", remedy) from None
    except Exception as error:  # noqa: BLE001  the architecture's own code may raise anything
        how = folder.config.get("quantization_config")
        method = str(how.get("quant_method"))[:40] if isinstance(how, dict) else ""
        remedy = (
            f"aiosd does not read weights of {method}: use a GGUF file of the model" if method else COPY_AGAIN
        )
        raise ModelError(f"{folder.path}: cannot be loaded: {in_words(error)}", remedy) from None
    lacking = [*info["missing_keys"], *info.get("mismatched_keys", ())]
    if lacking:  # transformers would fill them with random numbers and go on
        raise ModelError(
            f"{folder.path}: tensors missing or of another shape than config.json says: "
            + ", ".join(sorted(map(str, lacking))[:3]),
            COPY_AGAIN,
        )
    return model.eval()


def _refuse_unsupported(folder: ModelFolder, config: Any) -> None:
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    why = ""
    if getattr(config, "is_encoder_decoder", False):
        why = "is an encoder-decoder"
    elif not kinds <= KINDS:
        why = f"has layers of kinds {sorted(kinds)}"
    elif "dynamic" in str(getattr(text, "rope_parameters", None)):
        why = "has rotary frequencies that depend on the longest sequence of the batch"
    elif getattr(text, "num_kv_shared_layers", 0):
        why = "shares keys and values between layers"
    if why:
        raise ModelError(f"{folder.path / 'config.json'}: {config.model_type} {why}", UNKNOWN)
