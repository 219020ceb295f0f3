"""The house rules that a syntax tree shows: sizes, names, environment, side effects."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_itt.cli import COMMANDS
from tests.architecture.sources import PACKAGE, ROOT, Source, all_sources

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_POSITIONAL_ARGUMENTS = 5
ENVIRONMENT_FILE = f"{PACKAGE}/config/environment.py"
OTHER_TEXTS = ("Makefile", ".ci/run", "pyproject.toml")
OTHER_SUFFIXES = (".sh", ".sbatch", ".yaml", ".jinja", ".html")


def check_file_length(source: Source) -> Iterator[str]:
    num_lines = len(source.text.splitlines())
    if num_lines > MAX_FILE_LINES:
        yield f"{num_lines} lines, at most {MAX_FILE_LINES}: split the file"


def check_function_length(source: Source) -> Iterator[str]:
    for function in source.functions:
        num_lines = (function.end_lineno or function.lineno) - function.lineno + 1
        if num_lines > MAX_FUNCTION_LINES:
            yield f"{function.name} (line {function.lineno}) has {num_lines} lines, at most {MAX_FUNCTION_LINES}"


def check_positional_arguments(source: Source) -> Iterator[str]:
    overriding = {  # a method of a subclass has the signature that it is given
        method
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef) and node.bases
        for method in node.body
    }
    for function in source.functions:
        if function in overriding or function.name.startswith("test_"):  # pytest fills a test's arguments by name
            continue
        if any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list):
            continue  # Triton knows no other kind of argument
        arguments = [a.arg for a in function.args.posonlyargs + function.args.args if a.arg not in ("self", "cls")]
        if len(arguments) > MAX_POSITIONAL_ARGUMENTS:
            yield f"{function.name} (line {function.lineno}) has {len(arguments)} positional arguments, use *"


def check_file_name(source: Source) -> Iterator[str]:
    if Path(source.path).stem in ("utils", "util", "misc", "helpers", "common"):
        yield "a file is named for what it holds"


def check_ascii(source: Source) -> Iterator[str]:
    for number, line in enumerate(source.text.splitlines(), start=1):
        if not line.isascii():
            yield f"line {number} is not ASCII; use an escape"


def check_future_annotations(source: Source) -> Iterator[str]:
    has_code = any(not isinstance(node, ast.Expr) for node in source.tree.body)
    if has_code and "__future__.annotations" not in source.imports:
        yield "from __future__ import annotations is missing"


def check_environment(source: Source) -> Iterator[str]:
    if source.path == ENVIRONMENT_FILE or source.path.startswith("tests/"):
        return
    for node in ast.walk(source.tree):
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if name in ("os.environ", "os.getenv", "os.putenv"):
            yield f"line {node.lineno} uses {name}; that belongs in {ENVIRONMENT_FILE}"


def check_import_side_effects(source: Source) -> Iterator[str]:
    own_classes = {node.name for node in source.tree.body if isinstance(node, ast.ClassDef)}
    for node in source.tree.body:
        if source.path == "setup.py" or not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
            continue
        called = ast.unparse(node.value.func)
        if called.split(".")[0] not in own_classes:  # completing a class of this file touches nothing else
            yield f"line {node.lineno} calls {called} when the module is imported"


def check_globals(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield f"line {node.lineno} declares {', '.join(node.names)} global; pass the value instead"


RULES: dict[str, Callable[[Source], Iterator[str]]] = {
    "file length": check_file_length,
    "function length": check_function_length,
    "positional arguments": check_positional_arguments,
    "file name": check_file_name,
    "ASCII": check_ascii,
    "future annotations": check_future_annotations,
    "environment": check_environment,
    "import side effects": check_import_side_effects,
    "globals": check_globals,
}


@pytest.mark.parametrize("rule", RULES)
def test_every_source_keeps_the_rule(rule: str) -> None:
    problems = [f"{source.path}: {problem}" for source in all_sources() for problem in RULES[rule](source)]
    assert not problems, "\n".join(problems)


def test_other_texts_are_ascii_and_short() -> None:
    folders = [ROOT / name for name in (PACKAGE, "recipes", "slurm", "tools")]
    paths = [path for folder in folders for path in folder.rglob("*") if path.suffix in OTHER_SUFFIXES]
    problems = []
    for path in [*paths, *(ROOT / name for name in OTHER_TEXTS)]:
        text = path.read_text(encoding="utf-8")
        if not text.isascii():
            problems.append(f"{path}: not ASCII")
        if len(text.splitlines()) > MAX_FILE_LINES:
            problems.append(f"{path}: more than {MAX_FILE_LINES} lines")
    assert not problems, "\n".join(problems)


def test_every_tool_hands_its_arguments_to_a_command() -> None:
    tools = {path.stem: path.read_text("utf-8") for path in (ROOT / "tools").glob("*.py")}
    named = {stem: re.findall(r'main\(\["(\w+)", \*sys.argv\[1:\]\]\)', text) for stem, text in tools.items()}
    assert not [stem for stem, found in named.items() if len(found) != 1 or found[0] not in COMMANDS]
    assert not [stem for stem, text in tools.items() if len(text.splitlines()) > 10]


def test_every_command_is_a_file_of_its_own() -> None:
    files = {path.stem for path in (ROOT / PACKAGE / "commands").glob("*.py")} - {"__init__", "arguments"}
    assert files == {{"export": "export_hf", "import": "import_hf"}.get(name, name) for name in COMMANDS}


BROKEN = {
    "file length": "\n" * 401,
    "function length": "def f():\n" + "    x = 1\n" * 60,
    "positional arguments": "def f(a, b, c, d, e, g): ...",
    "ASCII": "x = '\u00e9'",
    "future annotations": "x = 1",
    "environment": "import os\nx = os.environ['A']",
    "import side effects": "print('hello')",
    "globals": "def f():\n    global x\n    x = 1",
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_rule_finds_what_breaks_it(rule: str) -> None:
    source = Source(f"{PACKAGE}/model/made_up.py")
    source.__dict__["text"] = BROKEN[rule]
    assert list(RULES[rule](source))
