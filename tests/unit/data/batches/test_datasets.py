"""Datasets through megatron-core: disjoint, blended by weight, deterministic, cached safely, the same on every rank."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_itt.data.batches.datasets import build_datasets, prebuild_index
from megatron_itt.data.batches.loader import TrainLoader, gather
from megatron_itt.data.indexed import read_index
from megatron_itt.data.text.tokenizer import Tokenizer, train_tokenizer
from megatron_itt.errors import ConfigError, DataError
from megatron_itt.training.step import find_padding
from tests.unit.data.conftest import make_texts


@pytest.fixture
def domains(write_dataset: Callable[..., str]) -> dict[str, tuple[str | None, float]]:
    return {"code": (write_dataset("code", seed=1), 0.75), "docs": (write_dataset("docs", seed=2), 0.25)}


def all_tokens(dataset: Any, count: int | None = None) -> torch.Tensor:
    return torch.stack([dataset[idx]["tokens"] for idx in range(len(dataset) if count is None else count)])


def test_samples_are_shifted_pieces_of_the_documents(domains: Any, make_config: Any, tokenizer: Tokenizer) -> None:
    datasets = build_datasets(make_config(domains), tokenizer=tokenizer)
    sample = datasets.train[0]
    assert sample["tokens"].shape == sample["labels"].shape == (32,)
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert torch.equal(sample["position_ids"], torch.arange(32))
    assert sample["loss_mask"].sum() == 32


def test_the_blend_follows_the_weights_and_the_recipe_fixes_its_length(
    domains: Any, make_config: Any, tokenizer: Tokenizer
) -> None:
    datasets = build_datasets(make_config(domains, steps=20), tokenizer=tokenizer)
    assert len(datasets.train) >= 160
    from_code = np.mean([datasets.train[idx]["dataset_id"] == 0 for idx in range(160)])
    assert from_code == pytest.approx(0.75, abs=0.01)  # megatron-core keeps the blend exact to within one sample


def test_training_never_reads_a_held_out_document(domains: Any, make_config: Any, tokenizer: Tokenizer) -> None:
    datasets = build_datasets(make_config(domains, steps=60, max_epochs=20.0), tokenizer=tokenizer)
    for number, domain in enumerate(datasets.blend.domains):
        index = read_index(domain.prefix)
        texts = make_texts(index.num_documents, seed=number + 1)
        held_out = {f"{idx}: " for idx in range(domain.first_validation_document, index.num_documents)}
        assert {text.split(" ")[0] + " " for text in texts[domain.first_validation_document :]} == held_out
        used = datasets.train.datasets[number].document_index  # type: ignore[attr-defined]
        assert used.max() < domain.first_validation_document
        validated = datasets.validation[domain.name].document_index  # type: ignore[attr-defined]
        assert set(validated.tolist()) == set(range(domain.first_validation_document, index.num_documents))


def test_validation_weighs_every_held_out_token_but_the_first(domains: Any, make_config: Any, tokenizer: Any) -> None:
    datasets = build_datasets(make_config(domains), tokenizer=tokenizer)
    for domain in datasets.blend.domains:
        dataset = datasets.validation[domain.name]
        weighed = sum(float(dataset[idx]["loss_mask"].sum()) for idx in range(len(dataset)))  # type: ignore[arg-type]
        assert weighed == domain.validation_tokens - 1


def test_training_samples_are_whole_and_a_last_validation_sample_says_where_it_ends(
    domains: Any, make_config: Any, tokenizer: Any
) -> None:
    datasets = build_datasets(make_config(domains), tokenizer=tokenizer)
    train = gather(datasets.train, range(len(datasets.train)))  # type: ignore[arg-type]
    assert find_padding(train["loss_mask"]) is None
    for domain in datasets.blend.domains:
        dataset: Any = datasets.validation[domain.name]
        samples = gather(dataset, [*range(len(dataset)), None])
        real = find_padding(samples["loss_mask"])
        assert real is not None
        length = datasets.blend.sequence_length
        last = domain.validation_tokens - (len(dataset) - 1) * length
        # Samples are shuffled; the one that fills up counts as whole.
        assert sorted(real.sum(dim=0).tolist()) == [last] + [length] * len(dataset)


def test_validation_is_the_same_for_other_seeds_and_lengths_of_run(
    domains: Any, make_config: Any, tokenizer: Tokenizer
) -> None:
    first = build_datasets(make_config(domains), tokenizer=tokenizer)
    other = build_datasets(make_config(domains, seed=99, steps=15, global_batch=4), tokenizer=tokenizer)
    for name in ("code", "docs"):
        assert torch.equal(all_tokens(first.validation[name]), all_tokens(other.validation[name]))
    assert not torch.equal(all_tokens(first.train, 50), all_tokens(other.train, 50))


def test_a_rebuild_and_a_cached_build_give_the_same_samples(
    domains: Any, make_config: Any, tokenizer: Tokenizer
) -> None:
    config = make_config(domains)
    first = build_datasets(config, tokenizer=tokenizer)
    cache = Path(domains["code"][0]).parent / "index_cache"
    (folder,) = cache.iterdir()
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    second = build_datasets(config, tokenizer=tokenizer)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == files
    assert torch.equal(all_tokens(first.train), all_tokens(second.train))
    assert first.blend.fingerprint == second.blend.fingerprint


def test_a_killed_cache_build_is_not_read(domains: Any, make_config: Any, tokenizer: Tokenizer) -> None:
    config = make_config(domains)
    expected = all_tokens(build_datasets(config, tokenizer=tokenizer).train)
    cache = Path(domains["code"][0]).parent / "index_cache"
    (folder,) = cache.iterdir()
    half_built = folder.rename(cache / f"{folder.name}.building-dead")
    for path in half_built.glob("*.npy"):
        path.write_bytes(path.read_bytes()[:50])
    assert torch.equal(all_tokens(build_datasets(config, tokenizer=tokenizer).train), expected)


def test_a_damaged_index_is_built_again(domains: Any, make_config: Any, tokenizer: Tokenizer) -> None:
    config = make_config(domains)
    expected = all_tokens(build_datasets(config, tokenizer=tokenizer).train)
    (folder,) = (Path(domains["code"][0]).parent / "index_cache").iterdir()
    victim = next(folder.glob("*shuffle_index.npy"))
    victim.write_bytes(victim.read_bytes()[:-8] + bytes(8))
    assert torch.equal(all_tokens(build_datasets(config, tokenizer=tokenizer).train), expected)


def test_an_index_built_beforehand_is_the_one_that_training_reads(
    domains: Any, make_config: Any, tokenizer: Tokenizer
) -> None:
    config = make_config(domains)
    folder, was_built = prebuild_index(config, tokenizer=tokenizer)
    assert was_built and any(folder.iterdir())
    assert prebuild_index(config, tokenizer=tokenizer) == (folder, False)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    build_datasets(config, tokenizer=tokenizer)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    changed, was_built = prebuild_index(make_config(domains, steps=12), tokenizer=tokenizer)
    assert was_built and changed != folder  # an index of another run is not taken for this one's


def test_positions_begin_anew_after_every_document_end(domains: Any, make_config: Any, tokenizer: Tokenizer) -> None:
    plain = build_datasets(make_config(domains), tokenizer=tokenizer)
    separate = build_datasets(make_config(domains, reset_at_document_end=True), tokenizer=tokenizer)
    num_ends = 0
    for name, dataset in {"train": separate.train, **separate.validation}.items():
        other = plain.train if name == "train" else plain.validation[name]
        for idx in range(40 if name == "train" else len(dataset)):
            sample, expected = dataset[idx], other[idx]
            for key in ("tokens", "labels", "loss_mask"):
                assert torch.equal(sample[key], expected[key])  # the option moves positions, not tokens
            position, count = 0, int(sample["loss_mask"].sum())  # what fills the last sample up does not matter
            for token, found in zip(sample["tokens"][:count].tolist(), sample["position_ids"].tolist(), strict=False):
                assert found == position
                position = 0 if token == tokenizer.eod else position + 1
                num_ends += token == tokenizer.eod
    assert num_ends > 20


def test_a_padding_token_that_occurs_in_the_text_is_read_like_any_other(
    domains: Any, make_config: Any, tokenizer: Tokenizer
) -> None:
    plain = build_datasets(make_config(domains), tokenizer=tokenizer).train
    frequent = int(all_tokens(plain, 20).flatten().mode().values)
    other = build_datasets(make_config(domains), tokenizer=replace(tokenizer, pad=frequent)).train
    for idx in range(20):
        for key in ("tokens", "labels", "loss_mask"):
            assert torch.equal(plain[idx][key], other[idx][key])


def test_documents_without_ends_cannot_be_kept_apart(write_dataset: Any, make_config: Any, tokenizer: Any) -> None:
    prefix = write_dataset("endless", append_eod=False)
    build_datasets(make_config({"endless": (prefix, 1.0)}), tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"data\.reset_at_document_end is true .*--append-eod"):
        build_datasets(make_config({"endless": (prefix, 1.0)}, reset_at_document_end=True), tokenizer=tokenizer)


def test_data_with_another_end_of_document_token_is_refused(
    write_dataset: Any, make_config: Any, tokenizer: Tokenizer
) -> None:
    """It is named beside tokenizer.json, so the hash of that file does not tell."""
    other = replace(tokenizer, eod=1)
    config = make_config({"code": (write_dataset("code"), 1.0)})
    with pytest.raises(DataError, match=r"code was written with end-of-document token 0, but that of .* is 1; set eos"):
        build_datasets(config, tokenizer=other)
    build_datasets(make_config({"open": (write_dataset("open", append_eod=False), 1.0)}), tokenizer=other)


def test_changed_data_under_the_same_path_does_not_reuse_the_cache(
    domains: Any, make_config: Any, tokenizer: Tokenizer, write_dataset: Any
) -> None:
    config = make_config(domains)
    before = build_datasets(config, tokenizer=tokenizer)
    for suffix in ("bin", "idx", "json"):
        Path(f"{domains['code'][0]}.{suffix}").unlink()
    write_dataset("code", seed=3)
    after = build_datasets(config, tokenizer=tokenizer)
    assert before.blend.fingerprint != after.blend.fingerprint
    assert len(list((Path(domains["code"][0]).parent / "index_cache").iterdir())) == 2


def test_a_single_domain_works(domains: Any, make_config: Any, tokenizer: Tokenizer) -> None:
    datasets = build_datasets(make_config({"code": domains["code"]}), tokenizer=tokenizer)
    assert len(datasets.train) >= 80  # type: ignore[arg-type]
    assert list(datasets.validation) == ["code"]


def test_another_tokenizer_than_the_datas_is_refused(domains: Any, make_config: Any, tmp_path: Path) -> None:
    other = train_tokenizer(make_texts(50, seed=8), tmp_path / "other", vocab_size=300)
    with pytest.raises(DataError, match="was written with another tokenizer"):
        build_datasets(make_config(domains), tokenizer=other)


def test_a_tokenizer_larger_than_the_model_is_refused(domains: Any, make_config: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 384"):
        build_datasets(make_config(domains, vocab_size=384), tokenizer=tokenizer)


def read_as_rank(rank: int, store: Path, config: Any, tokenizer: Tokenizer, answers: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    answers.put((rank, read_batches(config, tokenizer, rank, 2)))
    dist.barrier()
    dist.destroy_process_group()


def read_batches(config: Any, tokenizer: Tokenizer, rank: int, size: int) -> list[Any]:
    train = build_datasets(config, tokenizer=tokenizer).train
    layout = {"micro_batch_size": 2, "num_microbatches": 4 // size, "data_parallel_rank": rank}
    with TrainLoader(train, consumed_samples=0, data_parallel_size=size, **layout) as loader:
        return [batch["tokens"].tolist() for batch in loader]


def test_ranks_build_once_and_read_the_order_of_a_single_rank(
    domains: Any, make_config: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config, context = make_config(domains), multiprocessing.get_context("fork")
    answers = context.Queue()
    arguments = (tmp_path / "store", config, tokenizer, answers)
    ranks = [context.Process(target=read_as_rank, args=(rank, *arguments), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict(answers.get(timeout=120) for _ in ranks)  # a guard against hangs
    for process in ranks:
        process.join(30)
    merged = [batch for together in zip(found[0], found[1], strict=True) for batch in together]
    assert merged == read_batches(config, tokenizer, 0, 1)
    assert len(list((Path(domains["code"][0]).parent / "index_cache").iterdir())) == 1
