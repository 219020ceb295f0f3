"""Command line entry point: `itt COMMAND ...`, the same code as `python tools/NAME.py ...`.

A command is a file in `commands/`. Its `COMMAND` is a dataclass whose fields are the arguments and whose `execute` runs
it, or a dictionary of such classes by subcommand. Only the requested command is imported.
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
    "training": ("recipe", "train", "launch", "status", "sweep", "compare", "study", "quickstart"),
    "models": ("average", "export", "import", "evaluate", "generate"),
    "analysis": ("report", "analyse", "benchmark", "doctor"),
}
COMMANDS = tuple(name for names in GROUPS.values() for name in names)
_MODULES = {"export": "export_hf", "import": "import_hf"}  # `import` is a keyword of Python
_HELP = ("-h", "--help")
_COMPLETION = ("--tyro-write-completion", "--tyro-print-completion")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; a user error is one line on standard error."""
    return run_command(lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run the command line. Raises IttError for a user error, SystemExit(0) after help."""
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
    module, prog = _load(name), f"itt {name}"
    from megatron_itt.config.environment import keep_compiled_kernels_local  # with what commands need, `_load` looked

    keep_compiled_kernels_local()
    command, description, examples = module.COMMAND, module.__doc__, module.EXAMPLES
    if isinstance(command, dict):
        default = getattr(module, "DEFAULT", None)
        if rest and rest[0] in _HELP:
            print(_summary_of_group(prog, module))
            return 0
        if default is not None and (not rest or rest[0] not in command):
            rest = [default, *rest]
        elif not rest:
            raise ConfigError(f"{prog}: choose from {', '.join(command)}; {prog} --help explains them")
        inner, *rest = rest
        _check_name(prog, inner, command)
        command, prog = command[inner], f"{prog} {inner}"
        description = command.__doc__
        own = [line for line in examples.splitlines() if f"{line.strip()} ".startswith(f"{prog} ")]
        examples = "\n".join(own) or examples
    parse = _load("arguments").parse
    return int(parse(command, rest, prog=prog, description=description, examples=examples).execute())


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
    """List the commands by group, each with the first line of its file, without importing them."""
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
    """Write or print the completion script of a shell."""
    if len(argv) < (3 if argv[0] == _COMPLETION[0] else 2):
        raise ConfigError("name a shell and a file: itt --tyro-write-completion bash|zsh|fish FILE")
    return _load("arguments").write_completion({name: _load(name).COMMAND for name in COMMANDS}, argv)


if __name__ == "__main__":
    sys.exit(main())
