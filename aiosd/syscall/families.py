"""The model families: how each marks its thinking and prints a tool call.

FAMILIES has one row for each: how a chat template tells the family, the marks around thinking, the marks that
open a call, the reader of what stands behind them (aiosd.syscall.call_syntax), and the pieces of the grammar
by which a call is decoded (aiosd.syscall.grammar). A worker names the family of its model in `info`, and the
daemon reads the model's answers by that name (aiosd.syscall.toolcalls). The chat template itself writes what
goes back to the model: calls and results. Pure.

Large: one row for each family.
"""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass

from aiosd.syscall.call_syntax import (
    NAME,
    Reader,
    bare_calls,
    first_of,
    function_calls,
    gemma_calls,
    headed_calls,
    json_calls,
    python_calls,
    tagged_calls,
)

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Thinking:
    """The marks around what a model thinks before it answers."""

    opening: str
    closing: str


THINK = Thinking("<think>", "</think>")


@dataclass(frozen=True, slots=True)
class Style:
    """How a family prints calls, as pieces of a grammar.

    QUOTED and NAME stand for the function's name, ARGUMENTS for the JSON of its arguments, FIELDS for its
    arguments one by one: each is `field`, where KEY stands for its name, and then its value and `field_end`.
    """

    call: str
    before: str = ""  # stands before the first of the calls behind one opening
    between: str = ""  # stands between two of these calls; empty: each call has its own opening
    after: str = ""
    head: str = ""  # a part of a call that is one terminal: without white space in it
    bare: bool = False  # an answer that begins with { is a call too
    field: str = ""
    field_end: str = ""  # as in a literal, without its quotation marks


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    name: str
    template: str  # pattern that a chat template of this family has
    marks: tuple[str, ...]  # each opens calls
    read: Reader
    without: str = ""  # pattern that such a template lacks
    thinking: tuple[Thinking, ...] = (THINK,)
    style: Style | None = None
    by_mark: tuple[tuple[str, Reader], ...] = ()  # readers of single marks, in place of `read`
    bare: Reader | None = None  # reads an answer that is calls from its first character
    bare_begins: str = r"[{\[]"  # pattern of how such an answer begins
    dropped: str = ""  # pattern of further marks that are no part of the text
    tokens: tuple[str, ...] = ()  # special tokens inside a call, beside those of `style`
    answers: str = ""  # piece of a grammar: the marks before an answer that is no call
    call_id: str = ""  # the form of a call's id in the history, where the template insists on one


# A model may have learnt other marks than its template shows. Each of these opens thinking at the beginning
# of an answer, whatever the family is.
THINKING = (
    THINK,
    Thinking("<thinking>", "</thinking>"),
    Thinking("<thought>", "</thought>"),
    Thinking("<reasoning>", "</reasoning>"),
    Thinking("<seed:think>", "</seed:think>"),
    Thinking("[THINK]", "[/THINK]"),
    Thinking("<|START_THINKING|>", "<|END_THINKING|>"),
    Thinking("<|inner_prefix|>", "<|inner_suffix|>"),
    Thinking("<|channel>thought", "<channel|>"),
    Thinking("<|channel|>analysis<|message|>", "<|end|>"),
)

OBJECT = r'"{" "\"name\"" ":" QUOTED "," "\"KEY\"" ":" ARGUMENTS "}"'
WITH_ARGUMENTS, WITH_PARAMETERS = OBJECT.replace("KEY", "arguments"), OBJECT.replace("KEY", "parameters")
WITH_ID = WITH_ARGUMENTS.replace('"}"', r'("," "\"id\"" ":" /"[A-Za-z0-9]{1,64}"/)? "}"')


def _listed(end: str = "", call: str = WITH_ARGUMENTS) -> Style:
    return Style(call, '"["', '","', f'"]" "{end}"' if end else '"]"')


def _tagged(opening: str, closing: str) -> Style:
    return Style(
        r'HEAD FIELDS "</function>"',
        head='"<function=" NAME ">"',
        after=f'"{closing}"',
        field=r'"<parameter=" KEY ">\n"',
        field_end=r"\n</parameter>",
    )


def _invoked(dsml: str, closing: str, attribute: str) -> Style:
    return Style(
        f'HEAD FIELDS "</{dsml}invoke>"',
        head=rf'"<{dsml}invoke name=\"" NAME "\">"',
        between=r'"\n"',
        after=f'"{closing}"',
        field=rf'"<{dsml}parameter name=\"" KEY "\"{attribute}>"',
        field_end=f"</{dsml}parameter>",
    )


CALL_ID = r"(?:\[CALL_ID\]\w{1,64})?(?:\[ARGS\])?"
HERMES_END = "</tool_call>"
DSML = "｜DSML｜"
INVOKE = r'<{0}invoke name="(?P<name>[^"<>]{{1,256}})">'
PARAMETER = r'<{0}parameter name="(?P<key>[^"<>]{{1,256}})"(?: string="(?:true|false)")?>'

# The first row that fits a template is its family. Facts are from the public templates of the models named.
FAMILIES: tuple[Family, ...] = (
    Family(  # gpt-oss
        "harmony",
        r"<\|channel\|>",
        ("<|channel|>commentary to=functions.", "<|channel|>analysis to=functions.", " to=functions."),
        headed_calls(
            rf"\s*(?P<name>{NAME})(?:<\|channel\|>(?:commentary|analysis))?\s*(?:<\|constrain\|>)?(?:json)?\s*"
            r"<\|message\|>\s*(?=\{)",
            r"\s*<\|call\|>",
        ),
        thinking=(Thinking("<|channel|>analysis<|message|>", "<|end|>"),),
        style=Style(
            "HEAD ARGUMENTS", head='NAME (" "? "<|constrain|>json")? "<|message|>"', after='"<|call|>"'
        ),
        answers='"<|start|>assistant"? "<|channel|>final<|message|>"',
        dropped=r"<\|start\|>assistant|<\|channel\|>(?:final|commentary)[^<]{0,32}(?:<\|constrain\|>[^<]{0,32})?"
        r"<\|message\|>|<\|end\|>|<\|return\|>|<\|call\|>",
    ),
    Family(  # DeepSeek V3.2
        "deepseek-v3.2",
        DSML,
        (f"<{DSML}function_calls>",),
        tagged_calls(
            rf"\s*{INVOKE.format(DSML)}",
            PARAMETER.format(DSML),
            f"</{DSML}parameter>",
            f"</{DSML}invoke>",
            f"</{DSML}function_calls>",
        ),
        style=_invoked(DSML, rf"\n</{DSML}function_calls>", r" string=\"STRING\""),
    ),
    Family(  # DeepSeek R1, V3 and V3-0324
        "deepseek",
        r"<｜tool▁sep｜>[\s\S]*?```json",
        ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
        headed_calls(
            rf"\s*(?:<｜tool▁call▁begin｜>)?(?:function)?<｜tool▁sep｜>(?P<name>{NAME})\s*```json\s*",
            r"\s*```\s*(?:<｜tool▁call▁end｜>)?",
            "<｜tool▁calls▁end｜>",
        ),
        style=Style(
            r'HEAD ARGUMENTS "\n```<｜tool▁call▁end｜>"',
            before='""',
            between=r'"\n"',
            head=r'"<｜tool▁call▁begin｜>function<｜tool▁sep｜>" NAME "\n```json\n"',
            after='"<｜tool▁calls▁end｜>"',
        ),
    ),
    Family(  # DeepSeek V3.1
        "deepseek-v3.1",
        "<｜tool▁sep｜>",
        ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
        headed_calls(
            rf"\s*(?:<｜tool▁call▁begin｜>)?(?P<name>{NAME})<｜tool▁sep｜>",
            r"\s*(?:<｜tool▁call▁end｜>)?",
            "<｜tool▁calls▁end｜>",
        ),
        style=Style(
            'HEAD ARGUMENTS "<｜tool▁call▁end｜>"',
            before='""',
            between='""',
            head='"<｜tool▁call▁begin｜>" NAME "<｜tool▁sep｜>"',
            after='"<｜tool▁calls▁end｜>"',
        ),
    ),
    Family(  # Kimi K2
        "kimi",
        r"<\|tool_call_argument_begin\|>",
        ("<|tool_calls_section_begin|>",),
        headed_calls(
            rf"\s*<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>{NAME})(?::[0-9]+)?\s*"
            r"<\|tool_call_argument_begin\|>\s*",
            r"\s*<\|tool_call_end\|>",
            r"<\|tool_calls_section_end\|>",
        ),
        style=Style(
            'HEAD ARGUMENTS "<|tool_call_end|>"',
            before='""',
            between='""',
            head='"<|tool_call_begin|>functions." NAME /:[0-9]{1,2}/ "<|tool_call_argument_begin|>"',
            after='"<|tool_calls_section_end|>"',
        ),
        call_id="functions.{name}:{n}",
    ),
    Family(  # GLM 4.5 and 4.6
        "glm",
        "<arg_key>",
        ("<tool_call>",),
        tagged_calls(
            rf"\s*(?P<name>{NAME})(?=\s*(?:<arg_key>|</tool_call>))",
            r"<arg_key>(?P<key>[^<>]{1,256})</arg_key>\s*<arg_value>",
            "</arg_value>",
            HERMES_END,
        ),
        style=Style(
            f'HEAD FIELDS "{HERMES_END}"',
            head=r'NAME "\n"',
            field=r'"<arg_key>" KEY "</arg_key>\n<arg_value>"',
            field_end="</arg_value>",
        ),
    ),
    Family(  # MiniMax M2
        "minimax",
        "minimax:tool_call",
        ("<minimax:tool_call>",),
        tagged_calls(
            rf"\s*{INVOKE.format('')}",
            PARAMETER.format(""),
            "</parameter>",
            "</invoke>",
            "</minimax:tool_call>",
        ),
        style=_invoked("", r"\n</minimax:tool_call>", ""),
    ),
    Family(  # Seed-OSS
        "seed",
        "<seed:tool_call>|seed:tool_call",
        ("<seed:tool_call>",),
        function_calls("</seed:tool_call>", "<seed:tool_call>"),
        thinking=(Thinking("<seed:think>", "</seed:think>"),),
        style=_tagged("<seed:tool_call>", "</seed:tool_call>"),
    ),
    Family(  # Nemotron Nano 2
        "nemotron", "<TOOLCALL>", ("<TOOLCALL>",), json_calls("</TOOLCALL>"), style=_listed("</TOOLCALL>")
    ),
    Family(  # Qwen3-Coder, Qwen3.5, Nemotron 3, Step 3.5
        "qwen-coder",
        r"<function=[\s\S]*?<parameter=",
        ("<tool_call>", "<function="),
        function_calls(HERMES_END, "<tool_call>"),
        style=_tagged("<tool_call>", HERMES_END),
    ),
    Family(  # Functionary 3.2: an answer begins behind the >>> of its prompt
        "functionary",
        r">>>all|['\"]>>>['\"]",
        (">>>",),
        headed_calls(rf"\s*(?P<name>{NAME})\s*(?=\{{)", r"\s*", again=">>>"),
        style=Style("HEAD ARGUMENTS", head=r'NAME "\n"'),
        bare=headed_calls(rf"\s*(?P<name>{NAME})\s*(?=\{{)", r"\s*", again=">>>"),
        bare_begins=r"[^\n>]",
        dropped=r">>>all\n|\Aall\n",
    ),
    Family(  # Functionary 3.1, and Llama 3 prompted so
        "function",
        "<function=",
        ("<function=",),
        function_calls(),
        style=Style('HEAD ARGUMENTS "</function>"', head='NAME ">"'),
    ),
    Family(  # Gemma 4
        "gemma",
        r"<\|tool_call>",
        ("<|tool_call>",),
        gemma_calls('<|"|>', r"<tool_call\|>"),
        tokens=('<|"|>', "<tool_call|>"),
        thinking=(Thinking("<|channel>thought", "<channel|>"),),
    ),
    Family(  # FunctionGemma
        "gemma-function",
        "<start_function_call>",
        ("<start_function_call>",),
        gemma_calls("<escape>", "<end_function_call>"),
        tokens=("<escape>", "<end_function_call>"),
    ),
    Family(  # Command R7B and Command A
        "command",
        r"<\|START_ACTION\|>",
        ("<|START_ACTION|>",),
        json_calls(r"<\|END_ACTION\|>"),
        thinking=(Thinking("<|START_THINKING|>", "<|END_THINKING|>"),),
        style=Style(
            r'"{" "\"tool_call_id\"" ":" /"[0-9]{1,3}"/ "," "\"tool_name\"" ":" QUOTED '
            r'"," "\"parameters\"" ":" ARGUMENTS "}"',
            '"["',
            '","',
            '"]" "<|END_ACTION|>"',
        ),
        dropped=r"<\|(?:START|END)_(?:RESPONSE|TEXT)\|>",
    ),
    Family(  # Command R and R+
        "command-r", r"Action:[\s\S]*?```json", ("Action:",), json_calls()
    ),
    Family(  # Apertus
        "apertus",
        r"<\|tools_prefix\|>",
        ("<|tools_prefix|>",),
        json_calls(r"<\|tools_suffix\|>"),
        thinking=(Thinking("<|inner_prefix|>", "<|inner_suffix|>"),),
        style=_listed("<|tools_suffix|>", '"{" QUOTED ":" ARGUMENTS "}"'),
    ),
    Family(  # LFM2: a list of Python's calls, or one of JSON
        "lfm2",
        r"<\|tool_call_start\|>",
        ("<|tool_call_start|>",),
        first_of(python_calls(r"<\|tool_call_end\|>"), json_calls(r"<\|tool_call_end\|>")),
    ),
    Family(  # Phi-4-mini
        "phi",
        r"<\|/tool_call\|>",
        ("<|tool_call|>",),
        json_calls(r"<\|/tool_call\|>"),
        style=_listed("<|/tool_call|>"),
    ),
    Family(  # Granite 3
        "granite",
        r"<\|tool_call\|>",
        ("<|tool_call|>", "<tool_call>"),
        json_calls(),
        style=_listed(),
    ),
    Family(  # Mistral 7B v0.3, Nemo, Large 2407
        "mistral",
        r"\[TOOL_CALLS\]\s*\[(?!ARGS|CALL_ID)",
        ("[TOOL_CALLS]",),
        first_of(json_calls(), headed_calls(rf"\s*(?P<name>{NAME}){CALL_ID}\s*(?=\{{)")),
        without=r"\[ARGS\]",
        thinking=(Thinking("[THINK]", "[/THINK]"), THINK),
        style=_listed(call=WITH_ID),
        call_id="{n:09d}",
    ),
    Family(  # Mistral Small 3.1, Magistral, Devstral, Ministral 3
        "mistral-args",
        r"\[TOOL_CALLS\]",
        ("[TOOL_CALLS]",),
        first_of(json_calls(), headed_calls(rf"\s*(?P<name>{NAME}){CALL_ID}\s*(?=\{{)")),
        thinking=(Thinking("[THINK]", "[/THINK]"), THINK),
        style=Style("HEAD ARGUMENTS", head='NAME ("[CALL_ID]" /[A-Za-z0-9]{9}/)? "[ARGS]"'),
        call_id="{n:09d}",
    ),
    Family(  # Hunyuan, Jamba, Apriel, MiniMax M1
        "tool-calls",
        "<tool_calls>",
        ("<tool_calls>",),
        json_calls("</tool_calls>"),
        style=_listed("</tool_calls>"),
        dropped=r"</?answer>|\[(?:BEGIN|END) FINAL RESPONSE\]",
    ),
    Family(  # Hermes 2 and 3, Qwen 2.5 and 3, Granite 4, SmolLM3, Reka Flash, EXAONE 4
        "hermes",
        "<tool_call>",
        ("<tool_call>",),
        json_calls(HERMES_END, "<tool_call>"),
        thinking=(THINK, Thinking("<reasoning>", "</reasoning>")),
        style=Style(WITH_ARGUMENTS, after=f'"{HERMES_END}"'),
    ),
    Family(  # OLMo 3
        "olmo",
        "<function_calls>",
        ("<function_calls>",),
        python_calls("</function_calls>", listed=False),
    ),
    Family(  # InternLM 2
        "internlm",
        r"<\|action_start\|>",
        ("<|action_start|><|plugin|>", "<|action_start|>"),
        json_calls(r"<\|action_end\|>"),
        style=Style(WITH_PARAMETERS, after='"<|action_end|>"'),
    ),
    Family(  # Llama 4 and Llama 3.2, as far as they are asked for Python's calls
        "pythonic",
        r"<\|python_start\|>|\[func_name1\(",
        ("<|python_start|>",),
        python_calls(r"(?:<\|python_end\|>)?"),
        bare=first_of(python_calls(), bare_calls()),
    ),
    Family(  # Llama 3.1, 3.2, 3.3 and 4
        "llama",
        r'\A(?=[\s\S]*ipython)(?=[\s\S]*"name":)[\s\S]*"parameters":',
        ("<|python_tag|>",),
        json_calls(),
        style=Style(WITH_PARAMETERS, between='";"', bare=True),
        bare=bare_calls(),
    ),
)


# A model whose template prints no call that is known here may have learnt one all the same.
GUESSED = Family(
    UNKNOWN,
    "",
    ("<tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "<function="),
    json_calls(),
    by_mark=(
        (
            "<tool_call>",
            first_of(function_calls(HERMES_END, "<tool_call>"), json_calls(HERMES_END, "<tool_call>")),
        ),
        ("<function=", function_calls(HERMES_END)),
        ("[TOOL_CALLS]", first_of(json_calls(), headed_calls(rf"\s*(?P<name>{NAME}){CALL_ID}\s*(?=\{{)"))),
    ),
    bare=bare_calls(),
)
BY_NAME = {family.name: family for family in (*FAMILIES, GUESSED)}


def of(name: str) -> Family:
    """The family that a worker named; that of a later version is unknown here."""
    return BY_NAME.get(name, GUESSED)


def detect(template: str) -> Family:
    """The family whose calls a chat template prints."""
    for family in FAMILIES:
        if re.search(family.template, template) and not (
            family.without and re.search(family.without, template)
        ):
            return family
    return GUESSED


def literals(family: Family) -> list[str]:
    """The marks of thinking that models have, and the marks of this family's calls."""
    return [*(mark for one in THINKING for mark in (one.opening, one.closing)), *family.marks, *family.tokens]


# Special tokens that any model may say: without them nobody could tell a call or thinking from an answer.
SPOKEN = re.compile(r"tool|python_tag|think|thought|reasoning|inner_|^\[(?:ARGS|CALL_ID)\]$", re.IGNORECASE)


def speaks(family: Family, token: str) -> bool:
    """Whether a special token is part of the text of an answer."""
    if SPOKEN.search(token):
        return True
    style = "".join(str(piece) for piece in astuple(family.style)) if family.style else ""
    dropped = family.dropped.replace("\\", "")
    thinking = "".join(one.opening + one.closing for one in family.thinking)
    return token in "\n".join((*family.marks, *family.tokens, style, dropped, thinking))


def opened(prompt: str) -> str:
    """The mark that a prompt ends with when the answer begins in the middle of thinking; else nothing."""
    end = prompt[-64:].rstrip()
    return next((one.opening for one in THINKING if end.endswith(one.opening)), "")
