"""The tokenizer of a GGUF file, from its metadata. Raises ModelError for kinds that are not known, because a
tokenizer that is nearly right makes a model nearly mad.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from aiosd.cores.engine import template
from aiosd.errors import ModelError

CONTROL, USER_DEFINED = 3, 4  # kinds of tokens
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
CASED = (f"{BEFORE}{UPPER}*{LOWER}+", f"{BEFORE}{UPPER}+{LOWER}*")
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SLASHED = REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3, QWEN2 = WORDS + r"\p{N}{1,3}" + REST, WORDS + r"\p{N}" + REST
TEKKEN = "|".join(CASED) + r"|\p{N}" + SLASHED
GPT4O = "".join(f"{one}{ENDINGS}|" for one in CASED) + r"\p{N}{1,3}" + SLASHED
SPLITS = {  # the names that llama.cpp gives them (tokenizer.ggml.pre)
    "default": GPT2, "gpt-2": GPT2, "phi-2": GPT2, "mpt": GPT2, "olmo": GPT2, "jais": GPT2,
    "smollm": GPT2, "starcoder": GPT2, "refact": GPT2, "command-r": GPT2, "codeshell": GPT2,
    "llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3, "falcon3": LLAMA3, "dbrx": LLAMA3,
    "smaug-bpe": LLAMA3, "glm4": LLAMA3, "chatglm-bpe": LLAMA3,
    "qwen2": QWEN2, "deepseek-r1-qwen": QWEN2, "stablelm2": QWEN2, "megrez": QWEN2, "kormo": QWEN2,
    "tekken": TEKKEN, "pixtral": TEKKEN, "gpt-4o": GPT4O, "llama4": GPT4O,
}  # fmt: skip
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell"}  # each digit is a word
WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken", "pixtral"}  # found before any merge
COMPOSED = {"qwen2", "deepseek-r1-qwen"}  # in Unicode's form NFC


class FileTokenizer:
    """What the engine uses of transformers' PreTrainedTokenizerFast, without its import."""

    def __init__(self, made: Tokenizer, special: dict[str, str], chat_template: str | None) -> None:
        """`special`: tokens by their roles, such as bos_token."""
        self.backend_tokenizer = made
        self.chat_template = chat_template
        self._special = special
        made.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in special.values()])

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_id(self) -> int | None:
        end = self._special.get("eos_token")
        return None if end is None else self.backend_tokenizer.token_to_id(end)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.backend_tokenizer.encode(text).ids
        return ids

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False, **_: Any) -> str:
        return str(self.backend_tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        chat_template: str,
        tokenize: bool,
        add_generation_prompt: bool,
        **variables: Any,
    ) -> str:
        assert add_generation_prompt
        assert not tokenize
        return template.render(chat_template, messages, tools, self._special | variables)


def read(path: Path, metadata: dict[str, Any]) -> FileTokenizer:
    """Raises ModelError."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(one, str) for one in tokens):
        raise ModelError(f"{path}: no tokenizer in the file", "use a GGUF file of a language model")
    try:
        if kind == "gpt2":
            made = _byte_level(path, metadata, tokens)
        elif kind == "llama":
            made = _sentence_piece(metadata, tokens)
        else:
            raise ModelError(f"{path}: tokenizer {str(kind)[:40]!r} is not known", "use the model's folder")
        _add(made, metadata, tokens)
        named = ((f"{name}_token", _special(metadata, tokens, key)) for name, key in SPECIAL.items())
        special = {name: token for name, token in named if token is not None}
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001 - the library raises errors of any kind, and the file is a stranger's
        raise ModelError(
            f"{path}: its tokenizer cannot be built: {' '.join(str(error).split())[:200]}",
            "download the file again, or use another one",
        ) from None
    given = metadata.get("tokenizer.chat_template")
    return FileTokenizer(made, special, given if isinstance(given, str) else None)


def ends(metadata: dict[str, Any]) -> list[int]:
    """Return every token that the file calls its end."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = (metadata.get(f"tokenizer.ggml.{key}") for key in keys)
    return [one for one in found if isinstance(one, int)]


def _byte_level(path: Path, metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    split = metadata.get("tokenizer.ggml.pre", "default")
    if split not in SPLITS:
        raise ModelError(
            f"{path}: it splits words in a way that is not known: {str(split)[:40]!r}",
            "use the model's folder",
        )
    merges = [tuple(one.split(" ", 1)) for one in metadata.get("tokenizer.ggml.merges", [])]
    made = Tokenizer(
        BPE({token: id for id, token in enumerate(tokens)}, merges, ignore_merges=split in WHOLE_WORDS)
    )
    if split in COMPOSED:
        made.normalizer = normalizers.NFC()
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split in DIGITS else []
    words = pre_tokenizers.Split(Regex(SPLITS[split]), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*digits, words, bytes_])
    made.decoder = decoders.ByteLevel()
    if metadata.get("tokenizer.ggml.add_bos_token") is True:
        _begin(made, metadata, tokens)
    return made


def _begin(made: Tokenizer, metadata: dict[str, Any], tokens: list[str]) -> None:
    """Let each text begin with the token that the file names."""
    id = metadata["tokenizer.ggml.bos_token_id"]
    token = tokens[id]
    made.post_processor = processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, id)])


def _sentence_piece(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import sentencepiece_tokenizer

    begins = "tokenizer.ggml."
    fields = {key.removeprefix(begins): value for key, value in metadata.items() if key.startswith(begins)}
    build: Any = sentencepiece_tokenizer  # untyped
    made: Tokenizer = build({**fields, "tokens": tokens}).backend_tokenizer
    if metadata.get("tokenizer.ggml.add_bos_token", True) is True:
        _begin(made, metadata, tokens)
    return made


def _add(made: Tokenizer, metadata: dict[str, Any], tokens: list[str]) -> None:
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    for token, kind in zip(tokens, kinds, strict=False):
        if kind == CONTROL:
            made.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            made.add_tokens([AddedToken(token, special=False, normalized=False)])


def _special(metadata: dict[str, Any], tokens: list[str], name: str) -> str | None:
    id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return tokens[id] if isinstance(id, int) and 0 <= id < len(tokens) else None
