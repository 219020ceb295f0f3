"""The front door: `itt COMMAND ...`, the same code as `python tools/NAME.py ...`.

A command is a file of `commands/`. Its `COMMAND` is a dataclass whose fields are the arguments and whose `execute` does
the work, or a table of such classes by the name of a subcommand. Only the command that was asked for is imported.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_itt import __version__
from megatron_itt.errors import ConfigError
from megatron_itt.log import run_command

GROUPS = {
    "data": ("download", "tokenizer", "preprocess", "verify"),
    "training": ("recipe", "train", "status", "study", "quickstart"),
    "models": ("export", "import", "evaluate", "generate"),
    "looking": ("report", "analyse", "benchmark", "doctor"),
}
COMMANDS = tuple(name for names in GROUPS.values() for name in names)
_MODULES = {"export": "export_hf", "import": "import_hf"}  # `import` is a keyword, and the tools are named so
_HELP = ("-h", "--help")
_COMPLETION = ("--tyro-write-completion", "--tyro-print-completion")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, after one line on standard error for what a user got wrong."""
    return run_command(lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run the command line; IttError for what a user got wrong, SystemExit(0) after help."""
    name, *rest = argv or ["--help"]
    if name in _HELP:
        print(_overview())
        return 0 if argv else 2
    if name == "--version":
        print(f"megatron-itt {__version__}")
        return 0
    if name in _COMPLETION:
        return _complete(argv)
    _check_name("itt", name, COMMANDS)
    module = _load(name)
    command, prog = module.COMMAND, f"itt {name}"
    if not isinstance(command, dict):
        return _execute(command, rest, prog=prog, description=module.__doc__, examples=module.EXAMPLES)
    default = getattr(module, "DEFAULT", None)
    if rest and rest[0] in _HELP:
        print(_summary_of_group(prog, module))
        return 0
    if default is not None and (not rest or rest[0] not in command):
        rest = [default, *rest]
    elif not rest:
        raise ConfigError(f"{prog}: choose from {', '.join(command)}; {prog} --help explains them")
    _check_name(prog, rest[0], command)
    leaf, prog = command[rest[0]], f"{prog} {rest[0]}"
    own = [line for line in module.EXAMPLES.splitlines() if f"{line.strip()} ".startswith(f"{prog} ")]
    examples = "\n".join(own) or module.EXAMPLES
    return _execute(leaf, rest[1:], prog=prog, description=leaf.__doc__, examples=examples)


def _execute(leaf: type, arguments: Sequence[str], **texts: Any) -> int:
    return int(_load("arguments").parse(leaf, arguments, **texts).execute())


def _check_name(prog: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
        raise ConfigError(f"there is no command `{prog} {name}`; {hint}")


def _load(name: str) -> Any:
    try:
        return importlib.import_module(f"megatron_itt.commands.{_MODULES.get(name, name)}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "megatron_itt":
            raise
        raise ConfigError(f"itt needs {error.name}, which is not installed here; run make install") from None


def _overview() -> str:
    """The commands by group, each with the first line of its file; no file is imported."""
    lines = ["usage: itt COMMAND ...", "", "Inner Thinking Transformers: data, training, conversion and evaluation."]
    for group, names in GROUPS.items():
        lines += ["", f"{group}:"]
        for name in names:
            path = Path(__file__).parent / "commands" / f"{_MODULES.get(name, name)}.py"
            lines.append(f"  {name:<11} {path.read_text(encoding='utf-8').splitlines()[0].strip(chr(34))}")
    return "\n".join([*lines, "", "itt COMMAND --help explains a command; example: itt recipe flops 466m/itt_x4"])


def _summary_of_group(prog: str, module: Any) -> str:
    lines = [f"usage: {prog} {'|'.join(module.COMMAND)} ...", "", module.__doc__.strip(), ""]
    lines += [f"  {name:<11} {(leaf.__doc__ or '').splitlines()[0]}" for name, leaf in module.COMMAND.items()]
    if hasattr(module, "DEFAULT"):
        lines.append(f"\nWithout one of these names: {module.DEFAULT}.")
    return "\n".join([*lines, "", f"{prog} NAME --help explains each.", "", "examples:", module.EXAMPLES.strip("\n")])


def _complete(argv: Sequence[str]) -> int:
    """Write or print the completion script of a shell, with the arguments of every command."""
    if len(argv) < (3 if argv[0] == _COMPLETION[0] else 2):
        raise ConfigError("name a shell and a file: itt --tyro-write-completion bash|zsh|fish FILE")
    return _load("arguments").write_completion({name: _load(name).COMMAND for name in COMMANDS}, argv)


if __name__ == "__main__":
    sys.exit(main())
