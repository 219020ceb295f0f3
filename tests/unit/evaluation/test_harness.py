"""The real lm-eval harness on tiny exports, offline."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import datasets.config
import huggingface_hub.constants
import pytest
import torch
import yaml

from megatron_itt.errors import EvaluationError
from megatron_itt.evaluation.exported_model import ExportedModel
from megatron_itt.evaluation.harness import EvaluationRequest, evaluate_export, offline_hub, task_names_in
from megatron_itt.evaluation.heldout import HELDOUT_TASKS, HeldoutSettings, write_heldout_tasks
from megatron_itt.evaluation.results import read_results, scores_of

SETTINGS = HeldoutSettings(
    num_last_word=24, num_continuation=12, num_context_characters=160, num_continuation_characters=24
)


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory, documents: dict[str, list[str]]) -> Path:
    folder = tmp_path_factory.mktemp("tasks") / "heldout"
    write_heldout_tasks(documents, folder, SETTINGS)
    return folder


def _scores(run: dict[str, object]) -> dict[tuple[str, str], float]:
    return {(row["task"], row["metric"]): row["value"] for row in scores_of(run)}


def _expected_last_word(export: ExportedModel, task_dir: Path) -> float:
    """Greedy accuracy computed here, without the harness."""
    hits, lines = 0, (task_dir / "heldout_last_word.jsonl").read_text(encoding="utf-8").splitlines()
    for record in map(json.loads, lines):
        context = export.tokenizer.encode(record["context"])
        whole = export.tokenizer.encode(f"{record['context']} {record['word']}")
        with torch.inference_mode():
            greedy = export.model(torch.tensor([whole])).logits.argmax(-1)[0]
        hits += greedy[len(context) - 1 : -1].tolist() == whole[len(context) :]
    return hits / len(lines)


def test_heldout_tasks_run_in_the_harness_with_errors_and_perplexity(
    llama: ExportedModel, llama_dir: Path, task_dir: Path, documents: dict[str, list[str]], tmp_path: Path
) -> None:
    request = EvaluationRequest(
        model=llama_dir,
        output=tmp_path / "out",
        tasks=HELDOUT_TASKS,
        task_dirs=[task_dir],
        device="cpu",
        perplexity_texts={"code": [documents["code"][0][:500]]},
    )
    evaluate_export(request)
    results = read_results(tmp_path / "out")
    (run,) = results["runs"]
    scores = _scores(run)
    assert scores["heldout_last_word", "acc"] == pytest.approx(_expected_last_word(llama, task_dir))
    assert 0 <= scores["heldout_continuation", "acc_norm"] <= 1
    assert all(row["stderr"] is not None for row in scores_of(run))
    assert run["thinking_budget"] is None
    assert results["perplexity"][0]["domain"] == "code"
    assert "heldout_last_word" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


def test_every_budget_is_a_run_and_the_harness_alone_gives_the_same_scores(
    itt_dir: Path, task_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    budgets = ((0.5, 0.25), (0.05, 0.05), (1.0, 1.0))
    request = EvaluationRequest(
        model=itt_dir,
        output=tmp_path / "out",
        tasks=HELDOUT_TASKS,
        task_dirs=[task_dir],
        budgets=budgets,
        device="cpu",
    )
    runs = evaluate_export(request)["runs"]
    assert [tuple(run["thinking_budget"]) for run in runs] == list(budgets)
    perplexities = [_scores(run)["heldout_last_word", "perplexity"] for run in runs]
    assert len(set(perplexities)) == 3
    monkeypatch.chdir(task_dir)
    unaided = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(itt_dir), "trust_remote_code": True, "dtype": "float32"},
        tasks=list(HELDOUT_TASKS),
        device="cpu",
        batch_size=8,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(task_dir), include_defaults=False),
    )
    for (task, metric), value in _scores(runs[0]).items():
        assert value == pytest.approx(unaided["results"][task][f"{metric},none"], rel=1e-4)  # float32, other batches


def test_logged_samples_are_the_records_behind_the_scores(itt_dir: Path, task_dir: Path, tmp_path: Path) -> None:
    request = EvaluationRequest(
        model=itt_dir,
        output=tmp_path / "out",
        tasks=HELDOUT_TASKS[:1],
        task_dirs=[task_dir],
        budgets=((0.5, 0.25), (0.0, 0.0)),
        limit=5,
        log_samples=True,
        device="cpu",
    )
    results = evaluate_export(request)
    assert all("samples" not in run for run in results["runs"])
    for run, budget in zip(results["runs"], ("0.5_0.25", "0_0"), strict=True):
        lines = (tmp_path / "out" / f"samples_{HELDOUT_TASKS[0]}_budget_{budget}.jsonl").read_text(encoding="utf-8")
        records = [json.loads(line) for line in lines.splitlines()]
        assert [record["doc_id"] for record in records] == list(range(5))
        correct = [record["acc"] for record in records]
        assert sum(correct) / 5 == pytest.approx(_scores(run)[HELDOUT_TASKS[0], "acc"])


def test_a_task_folder_can_move(llama_dir: Path, task_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(task_dir, moved)
    request = EvaluationRequest(
        model=llama_dir, output=tmp_path / "out", tasks=HELDOUT_TASKS, task_dirs=[moved], limit=2, device="cpu"
    )
    assert len(evaluate_export(request)["runs"]) == 1
    (moved / "heldout_last_word.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"elsewhere/heldout_last_word\.jsonl, which does not exist"):
        evaluate_export(replace(request, output=tmp_path / "again"))


def test_prompts_beyond_the_context_are_counted(
    llama_dir: Path, documents: dict[str, list[str]], tmp_path: Path
) -> None:
    settings = HeldoutSettings(num_last_word=5, num_continuation=5, num_context_characters=900)
    write_heldout_tasks(documents, tmp_path / "tasks", settings)
    request = EvaluationRequest(
        model=llama_dir,
        output=tmp_path / "out",
        tasks=["heldout_last_word"],
        task_dirs=[tmp_path / "tasks"],
        device="cpu",
    )
    (run,) = evaluate_export(request)["runs"]
    assert run["num_truncated_requests"] == 5


def test_an_existing_output_is_kept_unless_overwriting(llama_dir: Path, task_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    request = EvaluationRequest(
        model=llama_dir, output=output, tasks=["heldout_last_word"], task_dirs=[task_dir], limit=3, device="cpu"
    )
    with pytest.raises(EvaluationError, match="--overwrite"):
        evaluate_export(request)
    assert (output / "old").read_text() == "old"
    evaluate_export(replace(request, overwrite=True))
    assert not (output / "old").exists()
    assert read_results(output)["limit"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # lm-eval's 14,000 files are read before a name is unknown.
        pytest.param({"tasks": ["heldout_last_wrod"]}, "did you mean heldout_last_word", marks=pytest.mark.slow),
        ({"budgets": [(0.5, 0.5)]}, "no routed thinking steps"),
        ({"tasks": []}, "nothing to evaluate"),
        ({"task_dirs": [Path("nowhere")]}, "nowhere does not exist"),
        ({"data_root": Path("nowhere")}, "data root .*nowhere does not exist"),
    ],
)
def test_a_request_that_cannot_work_is_refused_and_leaves_nothing(
    llama_dir: Path, task_dir: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    settings: dict[str, object] = {
        "model": llama_dir,
        "output": tmp_path / "out",
        "tasks": ["heldout_last_word"],
        "task_dirs": [task_dir],
        "device": "cpu",
    }
    with pytest.raises(EvaluationError, match=message):
        evaluate_export(EvaluationRequest(**{**settings, **changes}))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_missing_data_file_of_a_task_is_named(llama_dir: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    settings = {
        "task": "lost",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "/nowhere/lost.jsonl"}},
        "output_type": "loglikelihood",
        "test_split": "test",
    }
    (tasks / "lost.yaml").write_text(yaml.safe_dump(settings))
    request = EvaluationRequest(
        model=llama_dir, output=tmp_path / "out", tasks=["lost"], task_dirs=[tasks], device="cpu"
    )
    with pytest.raises(EvaluationError, match=r"/nowhere/lost\.jsonl, which does not exist"):
        evaluate_export(request)


def _write_hub_task(tasks: Path) -> None:
    tasks.mkdir()
    settings = {
        "task": "local_copy",
        "dataset_path": "someone/letters",
        "dataset_name": "small",
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (tasks / "local_copy.yaml").write_text(yaml.safe_dump(settings))


def test_a_hub_task_reads_its_local_copy_under_the_data_root(llama_dir: Path, tmp_path: Path) -> None:
    _write_hub_task(tmp_path / "tasks")
    copy = tmp_path / "root" / "someone" / "letters"
    copy.mkdir(parents=True)
    generator = random.Random(0)
    rows = [{"question": f"Letter {n}:", "choices": ["a", "b"], "answer": generator.randrange(2)} for n in range(9)]
    (copy / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (copy / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: test\n    path: test.jsonl\n---\n"
    )
    request = EvaluationRequest(
        model=llama_dir,
        output=tmp_path / "out",
        tasks=["local_copy"],
        task_dirs=[tmp_path / "tasks"],
        data_root=tmp_path / "root",
        device="cpu",
    )
    (run,) = evaluate_export(request)["runs"]
    assert run["n-samples"]["local_copy"]["effective"] == 9
    assert Path.cwd() != tmp_path / "root"


def test_a_data_set_that_the_data_root_lacks_is_named(llama_dir: Path, tmp_path: Path) -> None:
    _write_hub_task(tmp_path / "tasks")
    (tmp_path / "root").mkdir()
    request = EvaluationRequest(
        model=llama_dir,
        output=tmp_path / "out",
        tasks=["local_copy"],
        task_dirs=[tmp_path / "tasks"],
        data_root=tmp_path / "root",
        device="cpu",
    )
    with pytest.raises(EvaluationError, match=r"root/someone/letters does not exist"):
        evaluate_export(request)


def test_a_task_folder_without_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="defines no task"):
        task_names_in(tmp_path)


def test_the_hub_is_switched_off_within_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = (huggingface_hub.constants, datasets.config)
    for module in modules:
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    with offline_hub():
        assert [module.HF_HUB_OFFLINE for module in modules] == [True, True]
    assert [module.HF_HUB_OFFLINE for module in modules] == [False, False]


@pytest.mark.slow
def test_the_papers_tasks_are_all_known_to_the_harness() -> None:
    from lm_eval.tasks import TaskManager

    from megatron_itt.evaluation.harness import choose_tasks

    assert set(choose_tasks("paper", None)) <= set(TaskManager().all_tasks)
