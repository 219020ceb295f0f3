"""Tested ranges of megatron-core and TransformerEngine, compared with what would be imported.

A source tree on PYTHONPATH shadows an installed wheel, so the version is read from the files that Python would import.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from megatron_itt.errors import ConfigError

# First and first excluded release.
MEGATRON_CORE = ((0, 16), (0, 20))
# By the end of megatron-core's range. 0.16 says below 2.12; newer ones give no bound, and 2.20 has been tried.
TRANSFORMER_ENGINE = {(0, 17): ((2, 9), (2, 12)), (0, 20): ((2, 9), (2, 21))}


def check_megatron_core() -> None:
    """Raise ConfigError if megatron-core is missing or outside the tested range, with its version and path."""
    if _find_folder() is None:
        raise ConfigError(f"megatron-core is not installed; {_way_out()}")
    if problem := find_megatron_core_problem():
        raise ConfigError(problem)


def find_megatron_core_problem() -> str:
    """Describe why the megatron-core that Python would import is not supported; empty if it is, or if there is none."""
    folder = _find_folder()
    if folder is None:
        return ""
    version = _version_in(folder)
    if version is not None and is_within(version, MEGATRON_CORE):
        return ""
    first, end = (_text(release) for release in MEGATRON_CORE)
    return (
        f"megatron-core {version or 'of unknown version'} in {folder} is not supported; tested are {first} up to but "
        f"not including {end}: {_way_out()}, or remove another copy from PYTHONPATH"
    )


def transformer_engine_problem(version: str | None, megatron_core: str | None = None) -> str:
    """Describe why a version of TransformerEngine is outside the range tested with a megatron-core (the one that Python
    would import), or return an empty string.
    """
    core = megatron_core or installed_megatron_core() or ""
    ranges = (tested for end, tested in TRANSFORMER_ENGINE.items() if is_within(core, (MEGATRON_CORE[0], end)))
    tested = next(ranges, TRANSFORMER_ENGINE[MEGATRON_CORE[1]])
    if version is None or is_within(version, tested):
        return ""
    first, end = (_text(release) for release in tested)
    with_core = f" with megatron-core {core}" if core else ""
    return f"version {version} is outside the range tested{with_core}, {first} up to but not including {end}"


def installed_megatron_core() -> str | None:
    """The version of the megatron-core that Python would import; None if there is none."""
    folder = _find_folder()
    return None if folder is None else _version_in(folder)


def is_within(version: str, tested: tuple[tuple[int, int], tuple[int, int]]) -> bool:
    """Whether a version's first two numbers are in [first, end)."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and tested[0] <= (int(found[1]), int(found[2])) < tested[1]


def _find_folder() -> Path | None:
    """Return the folder that `import megatron.core` would read, without importing it."""
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _way_out() -> str:
    first, end = (_text(release) for release in MEGATRON_CORE)
    return f"pip install 'megatron-core>={first},<{end}'"


def _version_in(folder: Path) -> str | None:
    """Read the version from megatron-core's sources, without importing it."""
    try:
        text = (folder / "package_info.py").read_text(encoding="utf-8")
    except OSError:
        return None
    numbers = [re.search(rf"^{name} *= *(\d+)$", text, flags=re.MULTILINE) for name in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(number[1] for number in numbers if number is not None) if all(numbers) else None


def _text(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))
