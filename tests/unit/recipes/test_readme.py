"""recipes/README.md names every key that a recipe may have, with the default that the code has."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from megatron_itt.config.run import RunConfig

README = Path(__file__).resolve().parents[3] / "recipes" / "README.md"
TABLED = ("schedule", "batch", "optimizer", "precision", "parallel", "validation", "checkpoint", "logging", "runtime")
IN_PROSE = ("thinking", "data")


def section_type(name: str) -> Any:
    return next(hint for key, hint in typing.get_type_hints(RunConfig).items() if key == name)


def keys_of(section: Any, prefix: str) -> dict[str, Any]:
    """Dotted key -> default; sections that are absent by default are walked into as well."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        declared: Any = field.default
        name = "global" if field.name == "global_size" else field.name  # a keyword of Python
        default = getattr(declared, "default", declared)  # pydantic wraps some
        key = f"{prefix}.{name}"
        found[key] = default
        inner = [part for part in typing.get_args(hints[field.name]) if dataclasses.is_dataclass(part)]
        for part in inner:
            found.update(keys_of(part, key))
    return found


def table() -> dict[str, str]:
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| (.+?) \| .+ \|$", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(rows)


@pytest.mark.parametrize("section", TABLED)
def test_the_table_has_every_key_of_a_section_and_its_default(section: str) -> None:
    expected = keys_of(section_type(section), section)
    listed = {key: cell for key, cell in table().items() if key.split(".")[0] == section}
    assert listed.keys() == expected.keys()
    for key, cell in listed.items():
        if expected[key] is dataclasses.MISSING or "Undefined" in repr(expected[key]):
            assert cell == "required", key
        else:
            plain = TypeAdapter(Any).dump_python(expected[key], mode="json")
            assert as_number(yaml.safe_load(cell)) == plain, key


def as_number(value: Any) -> Any:
    """YAML 1.1 reads 3.0e-4 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


@pytest.mark.parametrize("section", IN_PROSE)
def test_the_text_names_every_key_of_the_other_sections(section: str) -> None:
    text = README.read_text(encoding="utf-8")
    keys = keys_of(section_type(section), section)
    assert not [key for key in keys if not re.search(rf"\b{key.split('.')[-1]}\b", text)]
