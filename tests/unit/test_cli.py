"""Command line: help with examples, one-line errors, tools and `itt` alike, completion, and short start-up."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_itt import cli
from megatron_itt.config import load_config
from megatron_itt.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


def leaves() -> Iterator[list[str]]:
    """The words of every command that takes arguments."""
    for name in cli.COMMANDS:
        module = importlib.import_module(
            f"megatron_itt.commands.{ {'export': 'export_hf', 'import': 'import_hf'}.get(name, name) }"
        )
        yield from ([name, inner] for inner in module.COMMAND) if isinstance(module.COMMAND, dict) else [[name]]


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_overview_groups_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    text = capsys.readouterr().out
    assert [line[:-1] for line in text.splitlines() if line in {f"{group}:" for group in cli.GROUPS}] == list(
        cli.GROUPS
    )
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert tuple(listed) == cli.COMMANDS and 14 <= len(listed) <= 24
    assert cli.run([]) == 2


@pytest.mark.parametrize("words", list(leaves()), ids=" ".join)
def test_help_says_what_each_argument_is_and_ends_with_an_example(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.run([*words, "--help"])
    text, examples = capsys.readouterr().out.split("examples:\n")
    assert f"itt {' '.join(words)}" in text
    assert "itt " + " ".join(words) in examples or words == ["benchmark", "parts"]
    unexplained = [
        line for line in text.splitlines() if line.startswith("\u2502 --") and line.rstrip(" \u2502").count(" ") < 2
    ]
    wrapped = {line.strip("\u2502 ") for line in unexplained}
    following = dict(zip(text.splitlines(), text.splitlines()[1:], strict=False))
    assert not [line for line in unexplained if following[line].startswith(("\u2502 --", "\u2570"))], wrapped


@pytest.mark.parametrize("name", ["recipe", "verify", "download", "analyse", "benchmark"])
def test_help_of_a_command_with_several_names_lists_them_and_ends_with_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([name, "--help"]) == 0
    assert capsys.readouterr().out.split("examples:\n")[1].lstrip().startswith(f"itt {name}")


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_and_its_command_say_the_same(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "tools" / f"{tool}.py").read_text(encoding="utf-8")
    call = next(node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.List))
    name = ast.literal_eval(call.elts[0])
    done = python(f"tools/{tool}.py", "--nonsense")
    assert cli.main([name, "--nonsense"]) == done.returncode == 2
    assert done.stderr == capsys.readouterr().err


def test_the_same_arguments_give_the_same_through_itt_and_the_tool() -> None:
    arguments = ["flops", "recipes/162m/itt_x4.yaml", "--json", "model.num_layers=4"]
    itt, tool = python("-m", "megatron_itt.cli", "recipe", *arguments), python("tools/recipe.py", *arguments)
    assert itt.returncode == tool.returncode == 0
    assert itt.stdout == tool.stdout and '"parameters"' in itt.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("recpe", "there is no command `itt recpe`; did you mean recipe?"),
        ("recipe", "itt recipe: choose from check, layout"),
        ("recipe flop x", "there is no command `itt recipe flop`; did you mean flops?"),
        ("recipe flops", "itt recipe flops: recipe is missing"),
        ("train --check", "recipe is missing"),
        ("train a.yaml --chek", "itt train does not know '--chek'"),
        ("tokenizer --input --vocab-size 9 --output x", "itt tokenizer: input is empty"),
        ("preprocess --input a --tokeniser b", "--tokenizer, --output-prefix is missing (and --tokeniser unknown)"),
        ("preprocess --input a --tokenizer b --output-prefix c --part 0/2 --merge", "exclude each other"),
        ("preprocess --input a --tokenizer b --output-prefix c --workers x", "--workers: invalid literal"),
        ("evaluate --model a --output b --limit 0", "--limit is 0; it counts from 1"),
        ("evaluate --model a --output b --dtype int4", "--dtype is 'int4'; choose from auto, float32"),
        ("generate --model a --prompt b --budget x,y", "--budget: 'x,y' cannot be read; write for instance 0.5,0.5"),
        ("analyse weights --model a --text b --output c --max-tokens 0", "0 is not a positive whole number"),
        ("analyse curves --output c", "run is empty"),
        ("recipe show recipes/none.yaml", "recipes/none.yaml does not exist"),
        ("--tyro-print-completion powershell", "no completion for 'powershell'; choose from bash"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words.split()) == 2
    seen = capsys.readouterr()
    assert message in seen.err and seen.err.startswith("error: ") and seen.err.count("\n") == 1 and seen.out == ""


def test_overrides_stand_anywhere_among_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe", "memory", "parallel=x", "recipes/466m/itt_x4.yaml"]
    with pytest.raises(ConfigError, match="recipe parallel=x does not exist"):
        cli.run(words)
    one = "recipe memory recipes/466m/itt_x4.yaml --world-size 8 parallel.tensor=2 --json parallel.pipeline=2"
    other = "recipe memory --json --world-size 8 recipes/466m/itt_x4.yaml parallel.tensor=2 parallel.pipeline=2"
    assert cli.run(one.split()) == 0
    first = capsys.readouterr().out
    assert cli.run(other.split()) == 0
    assert capsys.readouterr().out == first and first.count('"pipeline_stage"') == 2


def test_switches_of_two_sides_are_read() -> None:
    from megatron_itt.commands.arguments import parse
    from megatron_itt.commands.preprocess import Preprocess

    given = ["--input", "a", "b", "--tokenizer", "t", "--output-prefix", "p"]
    for word, expected in (("--append-eod", True), ("--no-append-eod", False), ("--quiet", True)):
        options = parse(Preprocess, [*given, word], prog="itt preprocess", description="", examples="")
        assert options.inputs == ("a", "b") and options.append_eod is expected
    assert options.quiet and options.resume


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_commands_names_and_options(tmp_path: Path) -> None:
    script = tmp_path / "itt"
    assert cli.main(["--tyro-write-completion", "bash", str(script)]) == 0
    text = script.read_text(encoding="utf-8")
    for word in (*cli.COMMANDS, "gpu-check", "routing", "--output-prefix", "--perplexity-max-tokens"):
        assert word in text, word
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


@pytest.mark.parametrize(
    "words", [["--help"], ["preprocess", "--help"], ["evaluate", "--help"], ["recipe", "flops", "162m/llama"]]
)
def test_neither_help_nor_recipes_load_torch(words: list[str]) -> None:
    code = (
        "import sys; from megatron_itt import cli\n"
        f"try: cli.run({words!r})\nexcept SystemExit: pass\n"
        "print('loaded', sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    done = python("-c", code)
    assert done.stdout.splitlines()[-1] == "loaded []", done.stderr


def test_recipes_are_found_by_name_and_paths_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("466m/itt_x4") == load_config(ROOT / "recipes/466m/itt_x4.yaml")
    (tmp_path / "466m").mkdir()
    (tmp_path / "466m/itt_x4").write_text("model: 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="model is 3"):
        load_config("466m/itt_x4")
    with pytest.raises(ConfigError, match="recipe 466m/itt_x5 does not exist"):
        load_config("466m/itt_x5")
