"""Rules of the tests: public names only, and the room of a unit test is the room that it tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.architecture.sources import PACKAGE, ROOT, Source, all_sources

ROOMS = {path.name for path in (ROOT / PACKAGE).iterdir() if path.is_dir()}
# Tests that run a room through its commands or in a process of its own, and import nothing of it.
INDIRECT = {
    "tests/unit/data/text/test_tools.py",
    "tests/unit/hf/remote_code/test_cache_itt.py",
    "tests/unit/parallel/test_host_device.py",
}


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


def private_names(source: Source) -> Iterator[str]:
    """Private names of the package, and of other test modules, that a test imports, reads or replaces."""
    modules: set[str] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (PACKAGE, "tests"):
            modules |= {alias.asname or alias.name for alias in node.names}
            yield from (f"line {node.lineno} imports {alias.name}" for alias in node.names if is_private(alias.name))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in modules and is_private(node.attr):
                yield f"line {node.lineno} uses {node.value.id}.{node.attr}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr") and len(node.args) > 1:
            owner, name = node.args[0], node.args[1]
            if isinstance(owner, ast.Name) and owner.id in modules:
                value = name.value if isinstance(name, ast.Constant) else None
                if is_private(value):
                    yield f"line {node.lineno} replaces {owner.id}.{value}"
            path = f"{owner.value}" if isinstance(owner, ast.Constant) else ""
            if path.startswith(f"{PACKAGE}.") and is_private(path.split(".")[-1]):
                yield f"line {node.lineno} replaces {path}"


def test_tests_use_public_names_only() -> None:
    tests = [source for source in all_sources() if source.path.startswith("tests/")]
    problems = [f"{source.path}: {problem}" for source in tests for problem in private_names(source)]
    assert not problems, "\n".join(problems)


def test_unit_tests_are_in_the_folder_of_the_room_that_they_import() -> None:
    problems = []
    for source in all_sources():
        _, kind, room, *rest = [*source.path.split("/"), "", ""]
        if kind != "unit" or room not in ROOMS or not rest[-3].startswith("test_") or source.path in INDIRECT:
            continue
        if not any(
            name.startswith((f"{PACKAGE}.{room}.", f"{PACKAGE}.commands.", f"{PACKAGE}.cli")) for name in source.imports
        ):
            problems.append(f"{source.path} imports nothing of {PACKAGE}.{room}")
    assert not problems, "\n".join(problems)


def test_a_private_name_is_found_in_each_form() -> None:
    source = Source("tests/unit/model/test_made_up.py")
    source.__dict__["text"] = (
        "from megatron_itt.model import router, _hidden\n"
        "router._secret()\n"
        "monkeypatch.setattr(router, '_secret', 1)\n"
        "monkeypatch.setattr('megatron_itt.model.router._secret', 1)\n"
    )
    assert len(list(private_names(source))) == 4
