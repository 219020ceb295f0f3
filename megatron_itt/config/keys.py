"""List of all recipe keys: type, default and meaning, read from the sections' own source."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any, get_type_hints

from pydantic.fields import FieldInfo

from megatron_itt.config.run import RunConfig

_FIELD = re.compile(r"    (\w+): (.+?)(?: = .*?)?(?:  # (.*))?$")


def describe_keys() -> Iterator[dict[str, str]]:
    """Yield key, type, default and meaning of every key of every section, in order."""
    hints = get_type_hints(RunConfig)
    for section in fields(RunConfig):
        kind = hints[section.name]
        types, meanings = _read_source(kind)
        for field in fields(kind):
            name = getattr(field.default, "alias", None) or field.name
            yield {
                "key": f"{section.name}.{name}",
                "type": types[field.name],
                "default": _default(field),
                "meaning": meanings.get(field.name, ""),
            }


def _default(field: Field[Any]) -> str:
    default, factory = field.default, field.default_factory
    if isinstance(default, FieldInfo):
        default, factory = default.default, default.default_factory or MISSING
    if factory is not MISSING:
        default = factory()  # type: ignore[misc]
    return "required" if default is MISSING or repr(default) == "PydanticUndefined" else repr(default)


def _read_source(kind: type) -> tuple[dict[str, str], dict[str, str]]:
    """Annotations of a section's fields as they are written, and the comments behind or above them."""
    types, meanings, above = {}, {}, []
    for line in inspect.getsource(kind).splitlines():
        if line.startswith("    # "):
            above.append(line[6:])
            continue
        if found := _FIELD.fullmatch(line):
            types[found[1]] = found[2]
            meanings[found[1]] = " ".join(filter(None, [*above, found[3]]))
        if line.strip():
            above = []
    return types, meanings
