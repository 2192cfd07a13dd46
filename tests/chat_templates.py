"""A chat template for each model family: the family's public syntax of calls, thinking and results in a plain
frame. The special tokens of each stand beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aiosd.cores.engine.vocabulary import Vocabulary

FRAME = """\
{%- if tools %}<|im_start|>system
{% for t in tools %}{{ t | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content is string %}THINK_OPEN{{ m.reasoning_content }}THINK_CLOSE{% endif %}
{{- m.content }}
{%- if m.tool_calls %}CALLS{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
EACH = "{%- for c in m.tool_calls %}{% set f = c.function %}CALL{% endfor %}"
ARGUMENTS = "{{ f.arguments | tojson }}"
OBJECT = '{"name": "{{ f.name }}", "KEY": ' + ARGUMENTS + "}"
COMMA = "{% if not loop.last %}, {% endif %}"
TEXT = "{{ v if v is string else v | tojson }}"
TAGS = "{% for k, v in f.arguments | items %}TAG{% endfor %}"
FUNCTION = "<function={{ f.name }}>\n" + TAGS.replace(
    "TAG", f"<parameter={{{{ k }}}}>\n{TEXT}\n</parameter>\n"
)
FUNCTION += "</function>\n"
PYTHON = (
    "{{ f.name }}({% for k, v in f.arguments | items %}{{ k }}={{ v | tojson }}" + COMMA + "{% endfor %})"
)
GEMMA = """\
{%- macro value(v) %}{% if v is string %}QUOTE{{ v }}QUOTE{% elif v is mapping %}{
{%- for k, w in v | items %}QUOTE{{ k }}QUOTE:{{ value(w) }}{% if not loop.last %},{% endif %}{% endfor %}}
{%- elif v is sequence %}[{% for w in v %}{{ value(w) }}{% if not loop.last %},{% endif %}{% endfor %}]
{%- else %}{{ v | tojson }}{% endif %}{% endmacro -%}
OPENcall:{{ f.name }}{ {%- for k, v in f.arguments | items %}{{ k }}:{{ value(v) }}
{%- if not loop.last %},{% endif %}{% endfor %}}CLOSE"""


def each(call: str, before: str = "", after: str = "") -> str:
    return before + EACH.replace("CALL", call) + after


def listed(before: str, after: str = "", call: str = OBJECT.replace("KEY", "arguments")) -> str:
    return each(call + COMMA, before + "[", "]" + after)


def invoke(dsml: str, attribute: str = "") -> str:
    tag = f'<{dsml}parameter name="{{{{ k }}}}"{attribute}>{TEXT}</{dsml}parameter>\n'
    return f'<{dsml}invoke name="{{{{ f.name }}}}">\n' + TAGS.replace("TAG", tag) + f"</{dsml}invoke>\n"


D = "｜DSML｜"
DEEPSEEK = [f"<｜tool▁{part}｜>" for part in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")]
STRING = " string=\"{{ 'true' if v is string else 'false' }}\""
# By family: how the template prints calls, and the special tokens in it. Those of thinking are added.
CALLS: dict[str, tuple[str, list[str]]] = {
    "hermes": (each("<tool_call>\n" + OBJECT.replace("KEY", "arguments") + "\n</tool_call>"), []),
    "llama": ("{#- ipython #}" + each(OBJECT.replace("KEY", "parameters")), ["<|python_tag|>"]),
    "mistral": (listed("[TOOL_CALLS] "), ["[TOOL_CALLS]"]),
    "mistral-args": (
        each("[TOOL_CALLS]{{ f.name }}[ARGS]" + ARGUMENTS), ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]
    ),
    "qwen-coder": (each(f"\n<tool_call>\n{FUNCTION}</tool_call>"), []),
    "seed": (
        each(f"<seed:tool_call>\n{FUNCTION}</seed:tool_call>"), ["<seed:tool_call>", "</seed:tool_call>"]
    ),
    "function": (each("<function={{ f.name }}>" + ARGUMENTS + "</function>\n"), []),
    "functionary": (each(">>>{{ f.name }}\n{{ f.arguments }}"), []),
    "nemotron": (listed("<TOOLCALL>", "</TOOLCALL>"), []),
    "harmony": (
        each(
            "<|start|>assistant<|channel|>commentary to=functions.{{ f.name }} <|constrain|>json<|message|>"
            + ARGUMENTS + "<|call|>"
        ),
        ["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"],
    ),
    "deepseek": (
        each(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ f.name }}\n```json\n" + ARGUMENTS
            + "\n```<｜tool▁call▁end｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
        ),
        DEEPSEEK,
    ),
    "deepseek-v3.1": (
        each(
            "<｜tool▁call▁begin｜>{{ f.name }}<｜tool▁sep｜>" + ARGUMENTS + "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
        ),
        DEEPSEEK,
    ),
    "deepseek-v3.2": (each(invoke(D, STRING), f"<{D}function_calls>\n", f"</{D}function_calls>"), [D]),
    "kimi": (
        each(
            "<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>" + ARGUMENTS + "<|tool_call_end|>",
            "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>",
        ),
        ["<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>",
         "<|tool_call_end|>", "<|tool_calls_section_end|>"],
    ),
    "glm": (
        each(
            "\n<tool_call>{{ f.name }}\n"
            + TAGS.replace("TAG", f"<arg_key>{{{{ k }}}}</arg_key>\n<arg_value>{TEXT}</arg_value>\n")
            + "</tool_call>"
        ),
        ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"],
    ),
    "minimax": (each(invoke(""), "<minimax:tool_call>\n", "</minimax:tool_call>"), []),
    "gemma": (
        each(
            GEMMA.replace("QUOTE", '<|"|>').replace("OPEN", "<|tool_call>").replace("CLOSE", "<tool_call|>")
        ),
        ["<|tool_call>", "<tool_call|>", '<|"|>'],
    ),
    "gemma-function": (
        each(
            GEMMA.replace("QUOTE", "<escape>").replace("OPEN", "<start_function_call>")
            .replace("CLOSE", "<end_function_call>")
        ),
        ["<escape>", "<start_function_call>", "<end_function_call>"],
    ),
    "command": (
        each(
            '{"tool_call_id": "{{ loop.index0 }}", "tool_name": "{{ f.name }}", "parameters": '
            + ARGUMENTS + "}" + COMMA, "<|START_ACTION|>[\n    ", "\n]<|END_ACTION|>",
        ),
        ["<|START_ACTION|>", "<|END_ACTION|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"],
    ),
    "command-r": (
        each(
            '{"tool_name": "{{ f.name }}", "parameters": ' + ARGUMENTS + "}" + COMMA,
            "Action: ```json\n[\n", "\n]```"
        ),
        [],
    ),
    "apertus": (
        listed("<|tools_prefix|>", "<|tools_suffix|>", '{"{{ f.name }}": ' + ARGUMENTS + "}"),
        ["<|tools_prefix|>", "<|tools_suffix|>"],
    ),
    "lfm2": (
        each(PYTHON + COMMA, "<|tool_call_start|>[", "]<|tool_call_end|>"),
        ["<|tool_call_start|>", "<|tool_call_end|>"],
    ),
    "phi": (listed("<|tool_call|>", "<|/tool_call|>"), ["<|tool_call|>", "<|/tool_call|>"]),
    "granite": (listed("<|tool_call|>"), ["<|tool_call|>"]),
    "tool-calls": (listed("<tool_calls>", "</tool_calls>"), ["<tool_calls>", "</tool_calls>"]),
    "olmo": (each(PYTHON + "\n", "<function_calls>\n", "</function_calls>"), []),
    "internlm": (
        each("<|action_start|><|plugin|>\n" + OBJECT.replace("KEY", "parameters") + "<|action_end|>"),
        ["<|action_start|>", "<|action_end|>", "<|plugin|>"],
    ),
    "pythonic": (
        each(PYTHON + COMMA, "<|python_start|>[", "]<|python_end|>"), ["<|python_start|>", "<|python_end|>"]
    ),
}  # fmt: skip


def template(family: str, opening: str, closing: str) -> str:
    calls, _ = CALLS[family]
    framed = FRAME.replace("THINK_OPEN", opening).replace("THINK_CLOSE", closing).replace("CALLS", calls)
    if family == "functionary":  # it joins texts
        framed = framed.replace("{{ f.arguments }}", "{{ '' + f.arguments }}") + "{#- >>>all #}"
    return framed


def vocabulary(
    folder: Path, chat_template: Any, special: list[str], plain: list[str] | None = None, broken: bool = False
) -> Vocabulary:
    """A byte-level tokenizer of 256 characters, with these special tokens; `plain` are added and not special.
    With `broken` its model has the special tokens among its words, and finds them without being told."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    frame = ["<|im_start|>", "<|im_end|>", *special]
    table = {word: i for i, word in enumerate([*frame, *words] if broken else words)}
    made = Tokenizer(models.BPE(vocab=table, merges=[], ignore_merges=broken))
    made.pre_tokenizer = (
        pre_tokenizers.Split(" ", "removed") if broken else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(frame)
    made.add_tokens(plain or [])
    new: Any = PreTrainedTokenizerFast
    hf = new(tokenizer_object=made, eos_token="<|im_end|>")
    hf.chat_template = chat_template
    hf.save_pretrained(folder)
    return Vocabulary(folder, {})
