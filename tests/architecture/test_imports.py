"""Imports go down only, and heavy packages are imported only where they belong."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.architecture.sources import PACKAGE, ROOT, Source, all_sources, package_sources

# Room -> floor. A room imports itself and rooms on lower floors; rooms that share a floor never meet.
# A module of the package that is not listed is an entry point. Nobody imports a command; it imports anything.
FLOORS = {
    "errors": 0,
    "log": 1,
    "locks": 2,
    "files": 1,
    "tables": 2,
    "cli": 3,  # finds the commands by name, and imports the one that was asked for
    "config": 2,
    "accounting": 3,
    "ops": 3,
    "parallel": 3,
    "doctor": 4,
    "data": 4,
    "model": 4,
    "checkpoint": 5,
    "launch": 6,
    "training": 7,
    "hf": 8,
    "evaluation": 9,
    "analysis": 10,
    "benchmark": 10,
}
ENTRY_FLOOR = 11  # api, quickstart, study
FLOORS |= {
    "__init__": ENTRY_FLOOR + 1,
    "train": ENTRY_FLOOR + 1,
    "commands": ENTRY_FLOOR + 2,
}  # nobody imports commands; commands import anything

MEGATRON_ROOMS = ("parallel", "model", "data", "checkpoint", "training", "hf")
REMOTE_CODE = f"{PACKAGE}/hf/remote_code/"

# Who may import what: (rule, files it concerns, forbidden top-level packages).
BANS = [
    ("config is free of torch", f"{PACKAGE}/config/", {"torch", "megatron", "transformers"}),
    ("accounting is free of torch", f"{PACKAGE}/accounting/", {"torch", "megatron", "transformers", "numpy"}),
    ("launch is free of torch", f"{PACKAGE}/launch/", {"torch", "megatron", "transformers", "numpy"}),
    ("evaluation works on exports", f"{PACKAGE}/evaluation/", {"megatron"}),
    ("analysis works on exports", f"{PACKAGE}/analysis/", {"megatron"}),
]


def room_of(module: str) -> str:
    """The room of a dotted name or path inside the package: its second part."""
    parts = module.removesuffix(".py").replace("/", ".").split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def find_upward_imports(source: Source) -> list[str]:
    """Imports of `source` that stay on its floor or climb."""
    room = room_of(source.path)
    floor = FLOORS.get(room, ENTRY_FLOOR)
    targets = {room_of(name) for name in source.imports if name.startswith(f"{PACKAGE}.")} - {room, "__version__"}
    return [
        f"{source.path} imports {PACKAGE}.{target}" for target in targets if FLOORS.get(target, ENTRY_FLOOR) >= floor
    ]


def test_imports_go_down_only() -> None:
    problems = [problem for source in package_sources() for problem in find_upward_imports(source)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(("rule", "prefix", "banned"), BANS, ids=[rule for rule, _, _ in BANS])
def test_a_room_does_not_import_what_it_must_do_without(rule: str, prefix: str, banned: set[str]) -> None:
    problems = [
        f"{source.path} imports {name}: {rule}"
        for source in package_sources()
        if source.path.startswith(prefix)
        for name in source.imports
        if name.split(".")[0] in banned
    ]
    assert not problems, "\n".join(problems)


def test_megatron_is_imported_only_by_the_rooms_that_hold_parallelism() -> None:
    problems = [
        f"{source.path} imports {name}"
        for source in package_sources()
        if room_of(source.path) not in MEGATRON_ROOMS
        for name in source.imports
        if name.split(".")[0] == "megatron"
    ]
    assert not problems, "\n".join(problems)


def test_remote_code_imports_torch_transformers_and_the_standard_library_alone() -> None:
    problems = [
        f"{source.path} imports {name}"
        for source in package_sources()
        if source.path.startswith(REMOTE_CODE)
        for name in source.imports
        if not name.startswith(REMOTE_CODE.replace("/", "."))
        and name.split(".")[0] not in {"torch", "transformers", *sys.stdlib_module_names}
    ]
    assert not problems, "\n".join(problems)


def test_nothing_imports_an_entry_point() -> None:
    problems = [
        f"{source.path} imports {name}"
        for source in all_sources()
        if not source.path.startswith("tests/")
        for name in source.imports
        if name.split(".")[0] == "tools"
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("module", ["config", "accounting.report", "cli", "commands.recipe", "commands.status"])
def test_recipes_are_costed_without_loading_torch(module: str) -> None:
    code = f"import sys, {PACKAGE}.{module}; print(sorted({{'torch', 'megatron', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("path", "imported", "is_upward"),
    [
        ("megatron_itt/model/thinking_layer.py", "megatron_itt.data.batches.blend", True),
        ("megatron_itt/config/run.py", "megatron_itt.accounting.flops", True),
        ("megatron_itt/training/loop.py", "megatron_itt.train.main", True),
        ("megatron_itt/train.py", "megatron_itt.commands.train", True),
        ("megatron_itt/commands/train.py", "megatron_itt.api.train", False),
        ("megatron_itt/training/loop.py", "megatron_itt.model.thinking_layer", False),
        ("megatron_itt/analysis/report.py", "megatron_itt.evaluation.results", False),
    ],
)
def test_the_floor_rule_tells_up_from_down(path: str, imported: str, is_upward: bool) -> None:
    source = Source(path)
    source.__dict__["imports"] = [imported]  # what the parser would have found
    assert bool(find_upward_imports(source)) == is_upward
