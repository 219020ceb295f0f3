"""Patches of torch and megatron-core: one package, stated versions, and an undo that restores every attribute."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads
from packaging.specifiers import SpecifierSet

from megatron_itt.config.optional_packages import has_nvidia_gpu
from megatron_itt.parallel import megatron_compat
from megatron_itt.parallel.megatron_compat import Replacements
from megatron_itt.parallel.megatron_compat.checkpoint_format import checkpoint_reader
from megatron_itt.parallel.megatron_compat.distributed_optimizer import norms_on_device
from megatron_itt.parallel.megatron_compat.host_device import install_host_device, remove_host_device
from tests.helpers.waiting import WatchOperations

PACKAGE = Path(megatron_compat.__file__).parents[2]
PATCHES = [module.name for module in pkgutil.iter_modules(megatron_compat.__path__)]


@pytest.mark.parametrize("name", PATCHES)
def test_each_patch_states_its_undo_and_versions_that_include_the_installed_ones(name: str) -> None:
    module = importlib.import_module(f"{megatron_compat.__name__}.{name}")
    assert "Undo:" in (module.__doc__ or "")
    for package, versions in module.VERSIONS.items():
        assert importlib.metadata.version(package) in SpecifierSet(versions)


def foreign_assignments(tree: ast.AST) -> list[int]:
    """Lines that assign an attribute of a module imported from torch or megatron-core."""
    modules = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = getattr(node, "module", None) or ""
            for alias in node.names:
                if (origin or alias.name).split(".")[0] in ("torch", "megatron"):
                    modules.add(alias.asname or alias.name.split(".")[0])
    lines = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in [part for item in targets for part in getattr(item, "elts", [item])]:
            root = target
            while isinstance(root, ast.Attribute):
                root = root.value
            if root is not target and isinstance(root, ast.Name) and root.id in modules:
                lines.append(node.lineno)
    return lines


def test_no_other_module_assigns_attributes_of_torch_or_megatron_core() -> None:
    assert foreign_assignments(ast.parse("import torch\ntorch.cuda.device_count = len")) == [2]
    sources = [path for path in PACKAGE.rglob("*.py") if "megatron_compat" not in path.parts]
    found = {str(path): foreign_assignments(ast.parse(path.read_text(encoding="utf-8"))) for path in sources}
    assert not {path: lines for path, lines in found.items() if lines}


def test_replacements_restore_own_and_inherited_attributes() -> None:
    class Base:
        inherited = 1

    class Owner(Base):
        own = 2

    with Replacements() as replaced:
        replaced.replace(Owner, inherited=3, own=4)
        assert (Owner.inherited, Owner.own) == (3, 4)
    assert (Owner.inherited, Owner.own) == (1, 2) and "inherited" not in vars(Owner)


def test_the_checkpoint_reader_is_restored_after_an_error() -> None:
    from megatron.core.dist_checkpointing.strategies import torch as megatron_torch

    before = dict(vars(megatron_torch))
    with pytest.raises(OSError, match="unreadable"), checkpoint_reader(lambda folder: folder, SimpleNamespace):
        assert megatron_torch._get_filesystem_reader("here") == "here"
        raise OSError("unreadable")
    assert vars(megatron_torch) == before


def test_norms_on_the_device_have_the_bits_of_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, size, generator=generator) for size in (3, 40, 7, 129)]
    install_host_device()
    try:
        given = 2048 * 32, torch.zeros(1, dtype=torch.int), [tensors], False
        expected, _ = utils.local_multi_tensor_l2_norm(*given)
        monkeypatch.setattr(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
        with norms_on_device(), WatchOperations() as watch:
            found, _ = clip_grads.l2_norm_impl(*given)
    finally:
        remove_host_device()
    assert torch.equal(found, expected) and found.shape == expected.shape and watch.waiting == []
    assert clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm


@pytest.mark.skipif(has_nvidia_gpu(), reason="with a GPU megatron-core's functions are compiled")
def test_without_a_gpu_a_command_imports_no_compiler_and_leaves_torch_compile_as_it_was() -> None:
    code = (
        "import sys, torch; compile = torch.compile\n"
        "from megatron_itt.parallel.megatron_compat.eager_import import import_megatron_core\n"
        "import_megatron_core(); import megatron_itt.training.loop\n"
        "print(torch.compile is compile, 'torch._inductor.compile_fx' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["True", "False"]
