"""The blend: weights, held-out documents, epochs, and refusals before a run starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_itt.commands.train import main
from megatron_itt.config import load_config
from megatron_itt.config.load import config_to_yaml
from megatron_itt.data.batches.blend import resolve_blend
from megatron_itt.data.indexed import read_index
from megatron_itt.data.text.download import DOMAINS
from megatron_itt.data.text.preprocess import PreprocessOptions, preprocess
from megatron_itt.errors import ConfigError, DataError
from megatron_itt.log import run_command
from tests.unit.data.conftest import write_jsonl

ROOT = Path(__file__).parents[4]


@pytest.fixture
def domains(write_dataset: Callable[..., str]) -> dict[str, tuple[str | None, float]]:
    return {
        "code": (write_dataset("code", seed=1), 0.6),
        "docs": (write_dataset("docs", seed=2), 0.3),
        "book": (None, 0.1),
    }


def test_weights_are_scaled_over_the_domains_that_are_there(domains: Any, make_config: Any) -> None:
    blend = resolve_blend(make_config(domains))
    assert [domain.name for domain in blend.domains] == ["code", "docs"]
    assert [domain.weight for domain in blend.domains] == pytest.approx([2 / 3, 1 / 3])
    assert blend.absent == ("book",)


def test_validation_is_the_fewest_last_documents_that_hold_the_share(domains: Any, make_config: Any) -> None:
    blend = resolve_blend(make_config(domains, validation_tokens=600))
    for domain, wanted in zip(blend.domains, (400, 200), strict=True):
        lengths = read_index(domain.prefix).lengths
        first = domain.first_validation_document
        assert lengths[first:].sum() == domain.validation_tokens >= wanted > lengths[first + 1 :].sum()
        assert domain.training_tokens + domain.validation_tokens == lengths.sum()


def test_many_documents_are_searched_from_the_end(make_config: Any, write_dataset: Any) -> None:
    prefix = write_dataset("large", count=3000)
    lengths = read_index(prefix).lengths
    wanted = int(lengths[-1400:].sum()) - 5
    (domain,) = resolve_blend(make_config({"large": (prefix, 1.0)}, validation_tokens=wanted)).domains
    assert domain.num_documents - domain.first_validation_document == 1400


def test_the_table_shows_tokens_needed_and_epochs(domains: Any, make_config: Any) -> None:
    blend = resolve_blend(make_config(domains))
    table = blend.table()
    needed = int(np.ceil(80 * 2 / 3)) * 32
    assert f"{needed:,}" in table and f"{needed / blend.domains[0].training_tokens:.2f}" in table
    assert "absent, weights renormalised over the others: book" in table


def test_too_many_epochs_are_refused(domains: Any, make_config: Any) -> None:
    with pytest.raises(ConfigError, match=r"data.max_epochs is 4 but domain code would be read \d+\.\d\d times"):
        resolve_blend(make_config(domains, steps=10_000))
    resolve_blend(make_config(domains, steps=10_000, max_epochs=1000.0))


def test_too_much_validation_is_refused(domains: Any, make_config: Any) -> None:
    with pytest.raises(ConfigError, match=r"validation\.tokens is 1,000,000"):
        resolve_blend(make_config(domains, validation_tokens=1_000_000))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([500], "one document of 501 tokens; cut its text into documents or add data"),
        ([20, 20, 500], "ends with a document of 501 of its 543 tokens, too many; cut it or add data"),
        ([20, 19], "has 41 tokens, too few to split off one sample of 33; add data"),
    ],
)
def test_a_domain_that_cannot_be_split_gets_a_true_sentence(
    words: list[int], sentence: str, make_config: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Lowering validation.tokens would help none of these."""
    source, prefix = write_jsonl(tmp_path / "in.jsonl", ["1" * count for count in words]), str(tmp_path / "set")
    preprocess(PreprocessOptions(inputs=(str(source),), tokenizer=str(tokenizer_dir), output_prefix=prefix))
    with pytest.raises(ConfigError, match=sentence):
        resolve_blend(make_config({"one": (prefix, 1.0)}, validation_tokens=1, max_epochs=1e6))


def test_a_blend_without_data_is_refused(make_config: Any) -> None:
    with pytest.raises(ConfigError, match="no domain with a path"):
        resolve_blend(make_config({"book": (None, 1.0)}))


def test_missing_truncated_and_replaced_files_are_named(domains: Any, make_config: Any) -> None:
    config = make_config(domains)
    path = Path(f"{domains['docs'][0]}.bin")
    original = path.read_bytes()
    path.write_bytes(original[:-2])
    with pytest.raises(DataError, match=r"docs\.bin is truncated"):
        resolve_blend(config)
    path.unlink()
    with pytest.raises(DataError, match=r"docs\.bin does not exist"):
        resolve_blend(config)


def test_the_fingerprint_follows_the_data_and_not_its_place(domains: Any, make_config: Any, tmp_path: Path) -> None:
    first = resolve_blend(make_config(domains)).fingerprint
    moved = tmp_path / "moved"
    Path(domains["code"][0]).parent.rename(moved)
    there = {name: (path and str(moved / Path(path).name), weight) for name, (path, weight) in domains.items()}
    assert resolve_blend(make_config(there)).fingerprint == first
    for change in ({"seq_length": 16}, {"steps": 11}, {"seed": 8}, {"validation_tokens": 2000}):
        assert resolve_blend(make_config(there, **change)).fingerprint != first
    swapped = {**there, "code": there["docs"], "docs": there["code"]}
    assert resolve_blend(make_config(swapped)).fingerprint != first


def test_data_without_a_manifest_is_used(domains: Any, make_config: Any) -> None:
    Path(f"{domains['code'][0]}.json").unlink()
    blend = resolve_blend(make_config(domains))
    assert blend.domains[0].tokenizer_sha256 is None
    assert blend.domains[0].training_tokens > 0


def write_floats(prefix: str) -> None:
    """The same documents as 32-bit numbers with a point, which Megatron's writer takes too."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    index = read_index(prefix)
    documents = np.split(np.array(index.tokens(), dtype=np.float32), np.cumsum(index.lengths)[:-1])
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.float32)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


def test_training_refuses_data_that_holds_no_token_ids(
    domains: Any, make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = domains["code"][0]
    Path(f"{prefix}.json").unlink()
    write_floats(prefix)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config_to_yaml(make_config(domains)))
    capsys.readouterr()
    assert run_command(lambda: main([str(recipe), "--check"])) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {prefix}.idx holds float32, not token ids") and message.count("\n") == 1


def test_data_with_more_tokens_than_the_vocabulary_is_refused(domains: Any, make_config: Any) -> None:
    with pytest.raises(DataError, match=r"code\.json: written with a vocabulary of 400, the limit is 399"):
        resolve_blend(make_config(domains, vocab_size=399))


def test_a_manifest_that_contradicts_the_index_is_refused(domains: Any, make_config: Any) -> None:
    path = Path(f"{domains['code'][0]}.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "int32"}))
    with pytest.raises(DataError, match=r"code\.json says \(documents, tokens, type\)"):
        resolve_blend(make_config(domains))


SMALL = ("base", "debug", "study", "ladder", "retrofit")  # parents, and recipes on data of their own
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name not in SMALL)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_recipes_blend_redpajama_by_its_weights_and_validate_on_two_million_tokens(recipe: Path) -> None:
    config = load_config(recipe)
    weights = {name: domain.weight for name, domain in config.data.blend.items()}
    assert weights == {name: facts.weight for name, facts in DOMAINS.items()}
    assert sum(weights.values()) == pytest.approx(1.0)
    assert config.data.blend["book"].path is None  # no longer distributed
    assert config.validation.tokens == 2_000_000
    assert config.data.max_epochs == 4


def test_validation_is_split_off_before_training_and_is_the_same_for_compared_models(
    domains: Any, make_config: Any
) -> None:
    first = resolve_blend(make_config(domains))
    other = resolve_blend(make_config(domains, seed=3, steps=11, global_batch=4, max_epochs=50.0))
    for one, two in zip(first.domains, other.domains, strict=True):
        assert (one.first_validation_document, one.validation_tokens) == (
            two.first_validation_document,
            two.validation_tokens,
        )
        assert 0 < one.first_validation_document < one.num_documents


def test_the_table_has_a_line_per_domain_with_its_scaled_weight(domains: Any, make_config: Any) -> None:
    lines = resolve_blend(make_config(domains)).table().splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["code", "0.6667"], ["docs", "0.3333"]]
    header = lines[0].split("  ")
    assert [cell.strip() for cell in header if cell.strip()] == [
        *("domain", "weight", "documents", "train tokens", "needed", "epochs", "validation tokens"),
    ]
