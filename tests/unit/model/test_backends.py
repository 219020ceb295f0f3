"""The backend tables name classes that exist and accept megatron-core's arguments."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_itt.config.optional_packages import find_apex, find_transformer_engine
from megatron_itt.model.backends import BACKENDS, import_backend
from tests.helpers.one_rank import built_model, random_tokens, tiny_recipe

TABLE = [(name, role) for name, roles in BACKENDS.items() for role in roles]
# Arguments of megatron-core to the class of each role, beside the first two.
KEYWORDS = {
    "norm": {"eps"},
    "column_linear": {"config", "init_method", "gather_output", "bias", "skip_bias_add", "is_expert", "tp_group"},
    "row_linear": {"config", "init_method", "bias", "input_is_parallel", "skip_bias_add", "is_expert", "tp_group"},
    "attention": set(),
    "activation": set(),
}


@cache
def classes_of(module: str) -> dict[str, ast.ClassDef]:
    """Classes in a module's source, found without importing it: packages may be absent here."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize(("name", "role"), TABLE)
def test_every_named_class_exists_and_accepts_its_arguments(name: str, role: str) -> None:
    module, label = BACKENDS[name][role]
    node = classes_of(module).get(label)
    assert node is not None, f"{module} has no {label}"
    makers = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name in ("__init__", "__new__")]
    if makers:  # else those of a base class that is in the table itself
        arguments = makers[0].args
        names = {argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)}
        assert KEYWORDS[role] <= names


def test_all_backends_have_the_same_roles() -> None:
    assert {frozenset(roles) for roles in BACKENDS.values()} == {frozenset(KEYWORDS)}
    assert set(BACKENDS) == {"native", "transformer_engine", "apex"}


def test_a_model_here_has_native_modules() -> None:
    backend = import_backend("native")
    with built_model(tiny_recipe(), dtype=torch.float32) as built:
        layer = built.chunks[0].decoder.layers[0]
        assert type(layer.input_layernorm) is type(built.chunks[0].decoder.final_layernorm) is backend.norm
        assert type(layer.self_attention.core_attention) is backend.attention
        assert type(layer.mlp.linear_fc1) is backend.column_linear
        assert type(layer.mlp.linear_fc2) is backend.row_linear


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["transformer_engine", "apex"])
@pytest.mark.parametrize("thinking", [{}, {"attend": "selected"}, {"routing": "topp", "attend": "selected"}], ids=str)
def test_fused_backends_compute_what_the_native_one_computes(name: str, thinking: dict[str, str]) -> None:
    status = find_transformer_engine() if name == "transformer_engine" else find_apex()
    if not status.usable:
        pytest.skip(f"{status.name}: {status.reason}")
    shape = {"hidden_size": 256, "ffn_hidden_size": 512, "seq_length": 128, "num_layers": 2}
    found = []
    for backend in ("native", name):
        config = tiny_recipe(model=shape, thinking=thinking, precision={"parts": backend, "dtype": "bf16"})
        with built_model(config, dtype=torch.bfloat16) as built:
            from megatron_itt.model.builder import forward_logits

            device = next(built.chunks[0].parameters()).device
            names = {label for label, _ in built.chunks[0].named_parameters()}
            found.append((names, forward_logits(built, random_tokens(config).to(device)).float()))
    (native_names, native), (names, logits) = found
    assert names == native_names
    # bfloat16 has 8 bits, and near-ties among router logits may be decided otherwise.
    assert (logits - native).norm() <= 0.05 * native.norm()
