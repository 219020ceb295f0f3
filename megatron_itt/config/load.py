"""Recipe loading: YAML and `section.key=value` overrides to a checked `RunConfig`, and back to YAML.

A recipe may name a parent with `base:`, in a chain of any length. Sections merge key by key, lists are replaced.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from megatron_itt.config.check import find_layout_problems, find_problems
from megatron_itt.config.run import RunConfig
from megatron_itt.errors import ConfigError

_RUN_CONFIG = TypeAdapter(RunConfig)
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")  # pydantic's error types for unknown keys
# Placeholders for required sections that hold a wrong value; their rules are skipped.
_PLACEHOLDERS: dict[str, dict[str, Any]] = {
    "model": {"hidden_size": 1, "ffn_hidden_size": 1, "num_layers": 1, "num_attention_heads": 1},
    "schedule": {"steps": 1},
    "logging": {"run_dir": ""},
}
# Options of Megatron that recipes do not have: pattern of `key=value`, reason and way out.
_UNSUPPORTED = {
    r"parallel\.(context|ulysses|ring)\w*=.*": (
        "context parallelism is not supported: it splits the sequence over ranks, but tokens are selected over the "
        "whole sequence; use parallel.tensor with parallel.sequence: true, which shards the sequence too"
    ),
    r"(parallel|model)\.(expert|moe|num_moe_experts|num_experts)\w*=.*": (
        "mixture-of-experts layers are not supported: their router needs losses of its own, and its interplay with the "
        "thinking router is undefined; remove it, layers are dense"
    ),
    r"precision\.((fp8|fp4)\w*=.*|dtype=fp8)": (
        "fp8 is not supported: routed steps multiply with slices of the QKV weight, which TransformerEngine's fp8 "
        "matrices do not offer, and coarser router logits would tie and change the selected tokens; use "
        "precision.dtype: bf16"
    ),
    r"precision\.dtype=fp16": (
        "fp16 is not supported: it needs loss scaling, whose skipped steps differ between layouts; use bf16"
    ),
}
_UNION_BRANCHES = ("int", "float", "str", "none", "RunConfig", "fixed", "sampled")


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 loader that reads 3e-4 as a number."""


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_config(
    path: str | Path | None,
    overrides: Iterable[str] = (),
    *,
    below: dict[str, Any] | None = None,
    world_size: int | Literal["fewest"] | None = None,
    world_size_from: str = "",
) -> RunConfig:
    """Read a recipe, apply its chain of `base:` and the overrides, and check every rule.

    Layout rules need a `world_size`: a number of processes, or the fewest that hold one replica of the model;
    `world_size_from` names the source of the number. `below` holds values that the recipe (None: there is none) may
    replace. Raises ConfigError naming all problems at once.
    """
    data = {} if path is None else _read_with_base(find_recipe(path))
    data = _merge(below or {}, data)
    for override in overrides:
        _apply_override(data, override)
    return parse_config(
        data, source="recipe" if path is None else str(path), world_size=world_size, world_size_from=world_size_from
    )


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe: a path, or the name of a shipped one such as 466m/itt_x4."""
    given = Path(name)
    package = Path(__file__).resolve().parents[1]
    shipped = [folder / f"{name}{ending}" for folder in (package, package.parent) for ending in ("", ".yaml")]
    shipped += [folder / "recipes" / f"{name}.yaml" for folder in (package, package.parent)]
    return given if given.exists() else next((path for path in shipped if path.is_file()), given)


def parse_config(
    data: dict[str, Any],
    *,
    source: str = "recipe",
    world_size: int | Literal["fewest"] | None = None,
    world_size_from: str = "",
) -> RunConfig:
    """Turn plain data (for example the recipe stored in a checkpoint) into a checked `RunConfig`.

    Raises ConfigError naming all problems at once; rules that read a section with a wrong value are skipped.
    """
    config, wrong, problems = _validate(data)
    if config is not None:
        problems += find_problems(config, without=wrong)
        if world_size is not None:
            fewest = config.parallel.tensor * config.parallel.pipeline
            processes = fewest if world_size == "fewest" else world_size
            problems += find_layout_problems(config, processes, world_size_from=world_size_from, without=wrong)
    if problems or config is None:
        raise ConfigError(f"{source}: " + "; ".join(problems))
    return config


def _validate(data: dict[str, Any]) -> tuple[RunConfig | None, set[str], list[str]]:
    """Return the config, the sections replaced by placeholders because of a wrong value, and the problems.

    Unknown keys are dropped and their sections kept. The config is None if nothing remains to be checked.
    """
    try:
        return _RUN_CONFIG.validate_json(json.dumps(data)), set(), []
    except ValidationError as error:
        found = error.errors()
    problems = [_describe(item) for item in found]
    wrong: set[str] = set()
    if not all(item["loc"] for item in found):  # not even a mapping
        return None, wrong, problems
    readable = json.loads(json.dumps(data))
    for item in found:
        keys = [str(part) for part in item["loc"] if not _is_union_branch(part)]
        if item["type"] in _UNKNOWN:
            _remove(readable, keys)
        else:
            wrong.add(keys[0])
    readable |= {section: _PLACEHOLDERS.get(section, {}) for section in wrong}
    try:
        return _RUN_CONFIG.validate_json(json.dumps(readable)), wrong, problems
    except ValidationError as error:
        return None, wrong, problems + [_describe(item) for item in error.errors() if item["type"] not in _UNKNOWN]


def _remove(data: Any, keys: list[str]) -> None:
    for key in keys[:-1]:
        data = data[int(key)] if isinstance(data, list) else data.get(key, {})
    data.pop(keys[-1], None)


def dump_config(config: RunConfig) -> dict[str, Any]:
    """Return a config as JSON types with every key present; `parse_config` reads it."""
    return json.loads(_RUN_CONFIG.dump_json(config, by_alias=True))


def config_to_yaml(config: RunConfig) -> str:
    """Return the resolved recipe as YAML text."""
    return yaml.safe_dump(dump_config(config), sort_keys=False)


def _read_with_base(path: Path) -> dict[str, Any]:
    chain = [path.resolve()]
    data = _read_yaml(path)
    while (base_name := data.pop("base", None)) is not None:
        if not isinstance(base_name, str) or not base_name:
            raise ConfigError(f"recipe {chain[-1]}: base is {base_name!r}; name one recipe, relative to this file")
        base_path = (chain[-1].parent / base_name).resolve()
        if base_path in chain:
            names = " -> ".join(str(each) for each in [*chain, base_path])
            raise ConfigError(f"recipe {path} is its own base: {names}; remove one `base:` of these")
        if not base_path.is_file():
            raise ConfigError(f"recipe {chain[-1]}: base is {base_name!r}, but {base_path} does not exist")
        chain.append(base_path)
        data = _merge(_read_yaml(base_path), data)
    return data


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"recipe {path} does not exist; see recipes/README.md for those that do") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error}") from None
    try:
        data = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"recipe {path} must be a mapping of sections, not {type(data).__name__}")
    for section, value in data.items():
        if section != "base" and not isinstance(value, dict):
            raise ConfigError(f"recipe {path}: {section} is {value!r}; a section must be a mapping of keys to values")
    return data


def _merge(base: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in child.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _apply_override(data: dict[str, Any], override: str) -> None:
    """Set one `section.key=value`; the value is YAML. Unknown keys are found later, by validation."""
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or len(keys) < 2 or not all(keys):
        raise ConfigError(f"override {override!r} must look like section.key=value, for example schedule.steps=100")
    try:
        value = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML; quote it if it holds : or [") from None
    target = data
    for key in keys[:-1]:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise ConfigError(f"override {override!r}: {key} is a value, not a section")
    target[keys[-1]] = value


def _describe(item: Any) -> str:
    """Format a pydantic error as key, value, rule, way out."""
    location = ".".join(str(part) for part in item["loc"] if not _is_union_branch(part)) or "recipe"
    value = json.dumps(item["input"], default=str)[:60]
    option = f"{location}={item['input']}"
    reason = next((why for pattern, why in _UNSUPPORTED.items() if re.fullmatch(pattern, option, re.DOTALL)), None)
    if reason is not None:
        return f"{location} is {value}: {reason}"
    if item["type"] in _UNKNOWN:
        parent, _, key = location.rpartition(".")
        return f"unknown key {location}{_near_miss(parent, key)}"
    if item["type"] in ("missing", "missing_argument"):
        return f"{location} is missing; set it in the recipe or on the command line"
    return f"{location} is {value}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _is_union_branch(part: int | str) -> bool:
    """Whether a part of an error's location is pydantic's name of a union branch, such as tuple[...]."""
    return isinstance(part, str) and ("[" in part or part in _UNION_BRANCHES)


def _near_miss(parent: str, key: str) -> str:
    known = _known_keys(parent)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {parent + '.' if parent else ''}{close[0]}?" if close else f"; known: {', '.join(known)}"


def _known_keys(parent: str) -> list[str]:
    """Return the keys of the section, or of the entry of a list or mapping, at a location of a recipe."""
    schema = _RUN_CONFIG.json_schema()
    node = schema
    for part in filter(None, parent.split(".")):
        node = node.get("properties", {}).get(part) or node.get("items") or node.get("additionalProperties") or {}
        choices = [node, *(choice for word in ("allOf", "anyOf", "oneOf") for choice in node.get(word, ()))]
        reference = next((choice["$ref"] for choice in choices if "$ref" in choice), None)
        node = schema["$defs"][reference.rpartition("/")[2]] if reference else node
    return list(node.get("properties", ()))
