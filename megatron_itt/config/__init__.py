"""Recipes: typed sections (`model.py`, `run.py`), loading (`load.py`), rules between sections (`check.py`).

Imports neither torch nor megatron-core, so that a recipe can be checked and costed on a login node.
"""

from __future__ import annotations

from megatron_itt.config.load import dump_config, load_config, parse_config
from megatron_itt.config.model import ModelConfig, ThinkingConfig
from megatron_itt.config.run import RunConfig

__all__ = ["ModelConfig", "RunConfig", "ThinkingConfig", "dump_config", "load_config", "parse_config"]
