"""Which packages the check of a GPU needs: few, so that it runs on a bare machine. Imports none of them."""

from __future__ import annotations

from importlib.util import find_spec

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


def require_packages() -> None:
    """ConfigError that names every package that is missing."""
    missing = [label for name, label in PACKAGES.items() if find_spec(name) is None]
    if missing:
        raise ConfigError(f"not installed here: {', '.join(missing)}; pip install {' '.join(missing)}")
