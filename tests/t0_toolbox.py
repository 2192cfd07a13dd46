"""The built-in tools: each program runs with the command and limits of its manifest, without a sandbox."""

from __future__ import annotations

import ast
import json
import math
import os
import runpy
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import jinja2
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
TOOLBOX = ROOT / "aiosd/tools/toolbox"
NAMES = sorted(path.parent.name for path in TOOLBOX.glob("*/tool.toml"))
PYTHON = "/usr/bin/python3"  # the machine's own


def manifest(name: str) -> dict[str, Any]:
    return tomllib.loads((TOOLBOX / name / "tool.toml").read_text())


def use(name: str, cwd: Path, **arguments: str) -> subprocess.CompletedProcess[str]:
    tool = manifest(name)
    program = [str(TOOLBOX / name / part) if part.startswith("./") else part for part in tool["command"]]
    done = subprocess.run(
        ["prlimit", f"--as={tool['memory_bytes']}", f"--cpu={tool['cpu_s']}", *program],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin"},
        input=json.dumps(arguments).encode(),
        capture_output=True,
        timeout=tool["timeout_s"],
    )
    # decode here, because subprocess would change line ends
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def result(name: str, cwd: Path, **arguments: str) -> str:
    done = use(name, cwd, **arguments)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert not done.stdout or done.stdout.endswith("\n")
    return done.stdout.removesuffix("\n")


def error(name: str, cwd: Path, **arguments: str) -> str:
    """The single line of the error."""
    done = use(name, cwd, **arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{name}: ")
    return line


# ----------------------------------------------------------------------------------------------- manifests


def test_the_built_in_model_sees_the_tools_as_it_learned_them() -> None:
    code = """import json; from built_in import BUILT_IN
print(json.dumps({name: [each.descriptions[0], each.params] for name, each in BUILT_IN.items()}))"""
    model = ROOT / "models/tiny"
    learned = json.loads(subprocess.check_output([sys.executable, "-Bc", code], cwd=model))
    tools = [manifest(name) for name in NAMES]
    template = jinja2.Environment().from_string((model / "chat_template.jinja").read_text())
    lines = template.render(messages=[{"role": "user", "content": "hi"}], tools=tools).splitlines()
    for name in NAMES:
        description, params = learned[name]
        assert f"- {description}: {name}({', '.join(params)})" in [
            line.removesuffix("<|im_end|>") for line in lines
        ]


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_describes_its_program(name: str) -> None:
    tool = manifest(name)
    parameters = tool["parameters"]
    assert tool["name"] == name
    assert tool["command"][0] == PYTHON
    assert tool["command"][-1] == f"./{name}"
    assert tool["irreversible"] is (name == "shell")
    assert tool["cpu_s"] < tool["timeout_s"]
    assert parameters["additionalProperties"] is False
    assert set(parameters.get("required", ())) <= set(parameters["properties"])
    for schema in parameters["properties"].values():
        assert schema["type"] == "string"
        assert schema["description"]
        assert schema["maxLength"] <= 1 << 20


@pytest.mark.parametrize("name", NAMES)
def test_a_program_is_executable_and_starts_as_its_manifest_says(name: str) -> None:
    program = TOOLBOX / name / name
    assert os.access(program, os.X_OK)
    assert program.read_text().splitlines()[0] == "#!" + " ".join(manifest(name)["command"][:-1])


# ---------------------------------------------------------------------------------------------------- calc

# Call the program's function: a process for each of hundreds of expressions would take too long.
CALC: dict[str, Any] = runpy.run_path(str(TOOLBOX / "calc/calc"))
evaluate: Callable[[str], str] = CALC["evaluate"]
CalcError: type[Exception] = CALC["CalcError"]

VALUES = {
    "2 * (3 + 4)": "14",
    "0.1 + 0.2": "0.3",
    "1/3": "0.333333333333",
    "-2/3": "-0.666666666667",
    "-1/8": "-0.125",
    "10 ÷ 4 × 2 − 1": "4",
    "-2 ** 2": "-4",
    "2 ** -3 ** 2": "0.001953125",
    "2 ^ 3 ^ 2": "512",
    "-7 // 2": "-4",
    "-7 % 3": "2",
    "7.5 % 2": "1.5",
    "1.e3 + .5e-1": "1000.05",
    "--+-5": "-5",
    "sqrt(16)": "4",
    "sqrt(1.44)": "1.2",
    "sqrt(2)": "1.41421356237",
    "sqrt(2) ** 2": "2",
    "sqrt(10**40) + 1": "100000000000000000001",
    "sqrt(2) * 10**30": "1.41421356237e+30",
    "4 ** 0.5": "2",
    "4 ** -1.5": "0.125",
    "8 ** (1/3)": "2",
    "0 ** 0.5": "0",
    "0 ** 0": "1",
    "(-1) ** 10 ** 9999": "1",
    "abs(-3.5)": "3.5",
    "round(2.5)": "2",
    "round(2.675, 2)": "2.68",
    "round(1234, -2)": "1200",
    "min(3, 1/2, 2)": "0.5",
    "max(3, sqrt(10), 2)": "3.16227766017",
    "factorial(20)": "2432902008176640000",
    "2**64": "18446744073709551616",
    "1/2**40": "0.0000000000009094947017729282379150390625",
    "10**20/3": "3.33333333333e+19",
    "1/30000000": "3.33333333333e-8",
}


@pytest.mark.parametrize(("expression", "value"), VALUES.items())
def test_calc_is_exact_where_it_can_be(expression: str, value: str) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    ("expression", "why"),
    {
        "1/0": "division by zero",
        "1 % (2 - 2)": "division by zero",
        "0 ** -0.5": "division by zero",
        "": "ends too early",
        "2 +": "ends too early",
        "(1": "ends too early",
        "2 3": "did not expect '3'",
        "2 * * 3": "did not expect '*'",
        "3 × * 2": "did not expect '*'",
        "1,000": "write 1000 for 1,000",
        "sqrt(1,000)": "write 1000 for 1,000",
        "min()": "did not expect ')'",
        "sqrt 2": "sqrt needs parentheses",
        "pi": "unknown name 'pi'; the functions are abs, factorial,",
        "sqrt(-1)": "no real square root",
        "(-8) ** (1/3)": "no real power",
        "factorial(2.5)": "whole number",
        "factorial(-1)": "whole number",
        "round(1, 1/2)": "whole number",
        "2 = 2": "did not expect '='",
        "٣ + ٤": "did not expect '٣'",
        "\ud800": "did not expect '\\ud800'",
    }.items(),
)
def test_calc_says_what_is_wrong(expression: str, why: str) -> None:
    with pytest.raises(CalcError) as raised:
        evaluate(expression)
    assert why in str(raised.value)


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9",
        "2**33300",
        "0.5**1e9999",
        "1e999999999",
        "factorial(10**9)",
        "factorial(3249)",
        "sqrt(2)**999999999999999",
        "1.0000001**1e12",
        "(10**9999)*(10**9999)",
        "round(1, 10**9)",
        "(" * 500 + ")" * 500,
        "(" * 1000,
        "-" * 999 + "1",
        "2**" * 333 + "1",
        "1+" * 500_000 + "1",
        "__import__('os').system('id')",
        "().__class__",
        "lambda: 1",
        "a" * 1000,
    ],
)
def test_calc_refuses_before_it_computes(expression: str) -> None:
    before = time.process_time()
    with pytest.raises(CalcError) as raised:
        evaluate(expression)
    assert len(str(raised.value)) < 200
    assert time.process_time() - before < 1, "seconds of the processor, where the value would take minutes"


@pytest.mark.parametrize("expression", ["9**9**9", "factorial(10**9)", "(" * 1000, "__import__('os')"])
def test_calc_says_so_in_one_line(expression: str, tmp_path: Path) -> None:
    error("calc", tmp_path, expression=expression)


@pytest.mark.parametrize(
    "expression",
    [
        "+".join(["7**11830/3**20900"] * 55),
        "+".join(["factorial(3248)%7"] * 55),
        "+".join(["2**(1/3**20000)"] * 60),
        "round(7**11000/3**20900,9999)%7+" * 31 + "1",
        "sqrt(9**9999)+" * 71 + "1",
    ],
)
def test_calc_takes_no_longer_than_it_may(expression: str, tmp_path: Path) -> None:
    """The manifest's limits of memory and CPU time apply."""
    assert result("calc", tmp_path, expression=expression)


def test_calc_shows_every_digit_of_a_large_number(tmp_path: Path) -> None:
    assert result("calc", tmp_path, expression="10**9999 + 1") == "1" + "0" * 9998 + "1"
    assert evaluate("factorial(3248)") == f"{Decimal(math.factorial(3248)):f}"


def by_python(node: ast.expr) -> Fraction:
    """The value of the tree from Python's own parser."""
    match node:
        case ast.Constant(value=value):
            return Fraction(str(value))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -by_python(operand)
        case ast.BinOp(left=left, op=operator, right=right):
            a, b = by_python(left), by_python(right)
            if isinstance(operator, ast.Pow):
                assume(b.denominator == 1 and abs(b) <= 50 and max(abs(a.numerator), a.denominator) < 10**150)
            return BINARY[type(operator)](a, b)
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return Fraction(FUNCTIONS[name](*map(by_python, arguments)))
    raise AssertionError(ast.dump(node))


BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: lambda a, b: a % b,
    ast.Pow: lambda a, b: a ** int(b),
}
FUNCTIONS: dict[str, Callable[..., Fraction | int]] = {"abs": abs, "max": max, "min": min, "round": round}
LEAVES = (
    st.integers(0, 9).map(str)
    | st.integers(0, 10**9).map(str)
    | st.decimals(0, 10**6, allow_nan=False, places=3).map("{:f}".format)
)


def composed(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Expressions with and without parentheses, to test precedence too."""
    return st.one_of(
        st.builds("{}{}{}".format, inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**"]), inner),
        inner.map("({})".format),
        inner.map("-{}".format),
        inner.map("abs({})".format),
        inner.map("round({})".format),
        st.builds("{}({}, {})".format, st.sampled_from(["min", "max"]), inner, inner),
    )


@settings(max_examples=300)
@given(st.recursive(LEAVES, composed, max_leaves=8))
def test_calc_computes_as_pythons_fractions_do(text: str) -> None:
    assume(len(text) <= 1000)
    try:
        value = by_python(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        with pytest.raises(CalcError, match="division by zero"):
            evaluate(text)
        return
    shown = Fraction(evaluate(text))
    if 10**9999 % value.denominator == 0:  # a decimal that ends
        assert shown == value
    else:
        assert abs(shown - value) <= abs(value) / 10**11


@settings(max_examples=300)
@given(st.text("0123456789.+-*/%^()×÷, eabsqrtminround", max_size=60))
def test_calc_answers_any_text_or_says_why_not(text: str) -> None:
    try:
        assert len(evaluate(text)) <= 10_002
    except CalcError as wrong:
        assert 0 < len(str(wrong)) < 200


# --------------------------------------------------------------------------------------------------- clock


@pytest.mark.parametrize(
    ("said", "zone"),
    [
        ("UTC", "UTC"),
        ("", "UTC"),
        ("Asia/Tokyo", "Asia/Tokyo"),
        ("europe/BERLIN", "Europe/Berlin"),
        ("Tokyo", "Asia/Tokyo"),
        ("new york", "America/New_York"),
        ("Buenos Aires", "America/Argentina/Buenos_Aires"),
    ],
)
def test_clock_tells_the_time_of_a_zone_or_city(said: str, zone: str, tmp_path: Path) -> None:
    shown = datetime.strptime(result("clock", tmp_path, zone=said), "%Y-%m-%d %H:%M:%S")
    now = datetime.now(ZoneInfo(zone)).replace(tzinfo=None)
    assert 0 <= (now - shown).total_seconds() < 10


def test_clock_needs_no_zone(tmp_path: Path) -> None:
    assert result("clock", tmp_path)


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("Europe/Rmoe", "Europe/Rome"),
        ("Tokio", "Asia/Tokyo"),
        ("West", "Australia/West, Brazil/West"),  # two zones
        ("../../etc/passwd", "an IANA name such as"),
        ("\x00\n\ud800", "an IANA name such as"),
    ],
)
def test_clock_names_zones_close_to_one_it_does_not_know(said: str, hint: str, tmp_path: Path) -> None:
    assert hint in error("clock", tmp_path, zone=said)


# --------------------------------------------------------------------------------------------------- files


def test_read_file_returns_what_write_file_wrote(tmp_path: Path) -> None:
    text = "Zeile 1\r\n→ two"
    assert result("write_file", tmp_path, path="a/b/c.txt", content=text) == "written 16 bytes to a/b/c.txt"
    assert (tmp_path / "a/b/c.txt").read_bytes() == text.encode()
    assert use("read_file", tmp_path, path="a/b/c.txt").stdout.encode() == text.encode() + b"\n"
    assert result("read_file", tmp_path, path=str(tmp_path / "a/b/c.txt"))
    assert result("list_dir", tmp_path, path="a") == "b/"
    assert result("list_dir", tmp_path, path="a/b") == "c.txt"  # and no temporary file


def test_a_file_is_replaced_as_a_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    script, link = tmp_path / "run", tmp_path / "link"
    script.write_text("old")
    script.chmod(0o750)
    link.symlink_to("run")
    with script.open() as before:
        result("write_file", tmp_path, path="link", content="new")
        assert before.read() == "old"
    assert script.read_text() == "new"
    assert script.stat().st_mode & 0o777 == 0o750
    assert link.is_symlink()


@pytest.mark.parametrize(
    "path", ["/etc/aios-test", "../x", "a/../../x", "", ".", "out/x", "dir/", "dir", "n\0", "\ud800"]
)
def test_write_file_writes_nothing_but_files_of_the_work_folder(path: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "dir").mkdir(parents=True)
    (work / "out").symlink_to(tmp_path)
    error("write_file", work, path=path, content="text")
    assert [each.name for each in tmp_path.iterdir()] == ["work"]
    assert sorted(each.name for each in work.rglob("*")) == ["dir", "out"]


def test_write_file_refuses_what_is_no_text(tmp_path: Path) -> None:
    assert "leave out odd characters" in error("write_file", tmp_path, path="a", content="\ud800")
    assert not list(tmp_path.iterdir())


def test_read_file_is_bounded_and_cuts_no_character(tmp_path: Path) -> None:
    (tmp_path / "long").write_text("a" + "ß" * 40_000)
    done = use("read_file", tmp_path, path="long")
    assert done.returncode == 0
    assert done.stdout == "a" + "ß" * 32_767 + "\n"
    assert "first 65536 bytes" in done.stderr
    (tmp_path / "fits").write_text("x" * 65_535 + "\n")
    assert len(result("read_file", tmp_path, path="fits")) == 65_535


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("missing", "no file 'missing'; list_dir shows"),
        ("folder", "not an ordinary file"),
        ("pipe", "not an ordinary file"),
        ("/dev/zero", "not an ordinary file"),
        ("binary", "not UTF-8 text"),
        ("cut", "not UTF-8 text"),
        ("", "no file"),
        ("n\0", "not a path"),
        ("\ud800", "not a path"),
        ("x" * 5000, "too long"),
    ],
)
def test_read_file_says_why_it_cannot(path: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "cut").write_bytes("ß".encode()[:1])
    assert why in error("read_file", tmp_path, path=path)


def test_list_dir_shows_one_name_a_line(tmp_path: Path) -> None:
    assert result("list_dir", tmp_path) == "(empty)"
    (tmp_path / "b").mkdir()
    (tmp_path / "link").symlink_to("b")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "ä name").touch()
    (tmp_path / "two\nlines").touch()
    (tmp_path / os.fsdecode(b"\xff")).touch()
    lines = result("list_dir", tmp_path, path="").split("\n")
    assert lines == ["b/", "dangling", "link/", "'two\\nlines'", "ä name", "'\\udcff'"]
    assert result("list_dir", tmp_path, path="b/..").split("\n") == lines


@pytest.mark.parametrize(
    ("path", "why"), [("x", "no folder 'x'"), ("f", "is a file; read_file"), ("\0", "not a path")]
)
def test_list_dir_says_why_it_cannot(path: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    assert why in error("list_dir", tmp_path, path=path)


# --------------------------------------------------------------------------------------------------- notes


def test_a_note_is_recalled_by_any_spelling_of_its_key(tmp_path: Path) -> None:
    assert result("remember", tmp_path, key=" My  Dog ", value="Rex\r\n\tthe 2nd\n") == "stored"
    assert use("recall", tmp_path, key="my dog").stdout == "Rex\r\n\tthe 2nd\n\n"
    result("remember", tmp_path, key="MY DOG", value="Bello")
    assert result("recall", tmp_path, key="My dog") == "Bello"
    assert result("recall", tmp_path) == "MY DOG"
    assert os.listdir(tmp_path / ".notes") == ["my dog"]


def test_recall_of_an_unknown_key_names_the_known_ones(tmp_path: Path) -> None:
    assert "there are none" in error("recall", tmp_path, key="cat")
    assert result("recall", tmp_path, key="") == "(no notes)"
    for key in ("Fish", "bird"):
        result("remember", tmp_path, key=key, value="1")
    (tmp_path / ".notes/folder").mkdir()
    assert error("recall", tmp_path, key="cat") == "recall: no note 'cat'; known: Fish, bird"
    assert error("recall", tmp_path, key="\ud800")
    assert result("recall", tmp_path, key=" ") == "Fish\nbird"


@pytest.mark.parametrize(
    "key",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        ".",
        "a/b",
        "%2e.",
        "straße",
        "日本 語",
        "ß" * 200,
        "😀" * 200,
        "x" * 200,
        "*?[]",
    ],
)
def test_no_key_is_a_path(key: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    result("remember", work, key=key, value=f"value of {key}")
    assert result("recall", work, key=key.upper()) == f"value of {key}"
    assert os.listdir(tmp_path) == ["work"]
    assert os.listdir(work) == [".notes"]
    (note,) = (work / ".notes").iterdir()
    assert note.is_file()


FILE_NAMES: list[Callable[[str], str]] = [
    runpy.run_path(str(TOOLBOX / name / name))["file_name"] for name in ("remember", "recall")
]


@given(st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), min_size=1, max_size=200))
def test_file_names_of_keys_are_safe_and_the_same_in_both_programs(key: str) -> None:
    name = FILE_NAMES[0](key)
    assert name == FILE_NAMES[1](key)
    assert len(name.encode()) <= 255
    assert "/" not in name
    assert not name.startswith(".")


@pytest.mark.parametrize("key", ["", "  \n ", "x" * 201, "n\0", "\x1b[2J", "\ud800"])
def test_a_key_can_be_printed(key: str, tmp_path: Path) -> None:
    assert "printable characters" in error("remember", tmp_path, key=key, value="1")
    assert not list(tmp_path.iterdir())


def test_notes_are_kept_from_many_calls_at_once(tmp_path: Path) -> None:
    values = {f"{n}": f"{n}" * 20_000 for n in range(8)}

    def remember(n: str) -> None:
        result("remember", tmp_path, key="same", value=values[n])
        result("remember", tmp_path, key=n, value=values[n])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(remember, values))
    assert result("recall", tmp_path, key="same") in values.values()
    assert result("recall", tmp_path).split("\n") == [*values, "same"]
    assert len(os.listdir(tmp_path / ".notes")) == 9


# ---------------------------------------------------------------------------------------- shell and python


def test_shell_shows_both_streams_in_order_and_passes_the_status_on(tmp_path: Path) -> None:
    done = use("shell", tmp_path, command="echo a; echo b >&2; echo c; cat; yes | head -n 1; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "a\nb\nc\ny\n", "")
    assert result("shell", tmp_path, command="pwd; echo ü > f; cat f").split("\n") == [str(tmp_path), "ü"]
    assert use("shell", tmp_path, command="-x").returncode == 127


@pytest.mark.parametrize("command", ["\0", "\ud800", "é" * 100_000])
def test_shell_says_why_it_cannot(command: str, tmp_path: Path) -> None:
    assert "write_file" in error("shell", tmp_path, command=command)


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("print(1); print('ü')", "1\nü\n"),
        ("x = 3\nx + 1", "4\n"),
        ("'a'.upper()", "'A'\n"),
        ("1\n2", "2\n"),
        ("None", ""),
        ("", ""),
        ("if 1:\n    5", ""),
        (
            "def f(n): return n and n * f(n - 1)\nclass A: pass\nprint(A.__module__, __name__); f(0)",
            "__main__ __main__\n0\n",
        ),
        ("from dataclasses import *\n@dataclass\nclass A:\n    x: 'int'\nA(1)", "A(x=1)\n"),
        ("from __future__ import annotations\ndef f(x: nowhere): pass\nimport sys; sys.argv", "['-c']\n"),
        ("exit()", ""),
    ],
)
def test_python_shows_what_is_printed_and_the_last_value(code: str, shown: str, tmp_path: Path) -> None:
    done = use("python", tmp_path, code=code)
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, "")


def test_python_shows_a_traceback_of_the_code_alone(tmp_path: Path) -> None:
    done = use("python", tmp_path, code="print(1)\ndef f():\n    return 1 / 0\nf()")
    assert (done.returncode, done.stdout) == (1, "1\n")
    assert "return 1 / 0" in done.stderr
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert done.stderr.count("  File ") == 2


@pytest.mark.parametrize(
    ("code", "status", "last"),
    [
        ("def f(:", 1, "SyntaxError: invalid syntax"),
        ("input()", 1, "EOFError: EOF when reading a line"),
        ("import sys; sys.exit('no')", 1, "no"),
        ("exit(3)", 3, ""),
        ("(" * 10_000, 1, "SyntaxError: too many nested parentheses"),
        ("[0] * 10**10", 1, "MemoryError"),
        ("'\0'", 1, "source code string cannot contain null bytes"),
        ("'\ud800'", 1, "surrogates not allowed"),
    ],
)
def test_python_passes_errors_on(code: str, status: int, last: str, tmp_path: Path) -> None:
    done = use("python", tmp_path, code=code)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.rstrip("\n").endswith(last)
