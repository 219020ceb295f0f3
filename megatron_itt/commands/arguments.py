"""Argument parsing with tyro: dataclass to command line, and the argument types that commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Annotated, Any, Literal, Union

import tyro
from tyro import _errors
from tyro.conf import DisallowNone, FlagCreatePairsOff, Positional, UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

from megatron_itt.config.run import parse_tokens
from megatron_itt.errors import ConfigError

Flag = FlagCreatePairsOff[bool]
Recipe = Annotated[Positional[str], arg(metavar="RECIPE", help="a YAML file, or a name such as 466m/itt_x4")]
Overrides = Annotated[
    Positional[tuple[str, ...]], arg(metavar="section.key=value", help="replace values of the recipe")
]
GpuName = Literal["a100-40gb", "a100-80gb", "h100", "h200", "b200"]  # the names of accounting.gpus.GPUS
Repeated = UseAppendAction[tuple[str, ...]]


def _count(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise ValueError(f"{word} is not a positive whole number")
    return int(word)


def _tokens(word: str) -> int:
    try:
        return parse_tokens(word)
    except ValueError as error:
        raise ValueError(f"{word!r} cannot be read; {error}") from None


def _number(read: Callable[[str], int]) -> PrimitiveConstructorSpec[Any]:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="N",
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: value is None or isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )


Count = Annotated[int, _number(_count)]
OptionalCount = Annotated[int | None, _number(_count)]
OptionalTokens = Annotated[int | None, _number(_tokens)]


def separated(separator: str, read: Callable[[str], Any] = str, *, like: str) -> PrimitiveConstructorSpec[Any]:
    """Parse a tuple from one word: "1,8" -> (1, 8). `like` is an example for messages."""

    def convert(words: list[str]) -> tuple[Any, ...]:
        parts = [part.strip() for part in words[0].split(separator) if part.strip()]
        try:
            return tuple(read(part) for part in parts)
        except ValueError:
            raise ValueError(f"{words[0]!r} cannot be read; write for instance {like}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=like,
        instance_from_str=convert,
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: [separator.join(map(str, value or ()))],
    )


Names = Annotated[tuple[str, ...], separated(",", like="A,B")]
Numbers = Annotated[tuple[int, ...], separated(",", int, like="1,8")]
Fractions = Annotated[tuple[float, ...] | None, separated(",", float, like="0.5,0.5,0.5")]


def parse(leaf: type, arguments: Sequence[str], *, prog: str, description: str | None, examples: str) -> Any:
    """Parse an instance of the dataclass `leaf`. Overrides may appear anywhere among the options.

    Raises ConfigError with one line for invalid arguments; SystemExit(0) after help, which ends with the examples.
    """
    parsed: Any
    try:
        with _errors.on_parse_error(_refuse):
            parsed, unknown = tyro.cli(
                leaf,
                args=arguments,
                prog=prog,
                description=inspect.cleandoc(description or ""),
                return_unknown_args=True,
                config=(DisallowNone,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            print(f"examples:\n{examples.strip(chr(10))}")
        raise
    takes_overrides = any(field.name == "overrides" for field in fields(leaf))
    if unknown and (not takes_overrides or any(word.startswith("-") for word in unknown)):
        wrong = next((word for word in unknown if word.startswith("-")), unknown[0])
        raise ConfigError(f"{prog} does not know {wrong!r}; {prog} --help lists its arguments")
    for field in fields(leaf):
        if field.default is MISSING and field.default_factory is MISSING and getattr(parsed, field.name) == ():
            raise ConfigError(f"{prog}: {field.name} is empty; give at least one ({prog} --help lists the arguments)")
    return replace(parsed, overrides=(*parsed.overrides, *unknown)) if unknown else parsed


def _refuse(event: _errors.ParseErrorEvent) -> None:
    """Raise a one-line error in place of tyro's box."""
    if isinstance(event, _errors.MissingArgs):
        reason = f"{', '.join(shown.arg.display_name() for shown in event.missing_arguments)} is missing"
        reason += f" (and {event.unrecognized_tokens[0]} unknown)" if event.unrecognized_tokens else ""
    elif isinstance(event, _errors.InvalidChoice):
        reason = f"{event.argument.display_name()} is {event.value!r}; choose from {', '.join(event.choices)}"
    elif isinstance(event, _errors.BadValue):
        reason = f"{event.argument.display_name()} is missing or has no value"
    elif isinstance(event, _errors.InstantiationFailure):
        reason = str(event.message).splitlines()[0]
        reason = f"{event.argument.display_name()}: {reason}" if event.argument else reason
    else:
        return
    raise ConfigError(f"{event.prog}: {reason}; {event.prog} --help lists its arguments")


def write_completion(commands: Mapping[str, Any], arguments: Sequence[str]) -> int:
    """Run `--tyro-write-completion SHELL FILE` or `--tyro-print-completion SHELL`."""
    if arguments[1] not in ("bash", "zsh", "fish", "tcsh"):
        raise ConfigError(f"there is no completion for {arguments[1]!r}; choose from bash, zsh, fish, tcsh")
    try:
        tyro.cli(_union(commands), args=arguments, prog="itt", config=(DisallowNone,))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _union(commands: Mapping[str, Any]) -> Any:
    kinds = [(name, _union(command) if isinstance(command, dict) else command) for name, command in commands.items()]
    return Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds)]  # noqa: UP007
