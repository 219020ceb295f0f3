"""The check of a GPU before anything is imported: which packages it needs (few: a bare machine), and its options."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from megatron_itt.errors import ConfigError

# Import name -> name for pip. pydantic and pyyaml read the recipes.
PACKAGES = {
    "torch": "torch",
    "numpy": "numpy",
    "transformers": "transformers",
    "megatron": "megatron-core",
    "pydantic": "pydantic",
    "yaml": "pyyaml",
}


@dataclass(frozen=True, kw_only=True)
class CheckRequest:
    """What to check, and how."""

    output: Path = Path("docs/results")  # folder of the results
    repeats: int = 7  # timed steps per model
    minutes: float = 8.0  # no section begins after that
    device: str = "cuda"  # cuda or cpu
    tiny: bool = False  # tiny shapes: figures without meaning, to try the check itself
    command: str = ""  # as the results name it


def require_packages() -> None:
    """ConfigError that names every package that is missing."""
    missing = [label for name, label in PACKAGES.items() if find_spec(name) is None]
    if missing:
        raise ConfigError(f"not installed here: {', '.join(missing)}; pip install {' '.join(missing)}")
