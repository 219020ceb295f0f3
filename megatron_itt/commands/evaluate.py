"""Evaluate an exported Hugging Face folder with lm-eval at one or more thinking budgets."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from megatron_itt.commands.arguments import Count, Repeated
from megatron_itt.evaluation.options import EvaluationOptions, EvaluationRequest, parse_budget
from megatron_itt.log import configure_logging

EXAMPLES = """
  itt evaluate --model runs/quickstart/hf --task-dir runs/quickstart/tasks \\
      --heldout code=data/code.jsonl.zst --heldout docs=data/docs.jsonl.zst \\
      --budget 0.25,0.25,0.25 --budget 0.5,0.5,0.5 --output runs/quickstart/evaluation
  itt evaluate --model runs/466m/hf --tasks paper --data-root ~/lm_eval_data --output runs/466m/evaluation
"""


@dataclass(frozen=True, kw_only=True)
class Evaluate(EvaluationOptions):
    tasks: Annotated[str | None, arg(metavar="paper|a,b,c")] = None
    """lm-eval task names (default: all tasks of --task-dir)"""
    task_dir: Path | None = None  # folder with further task files (YAML)
    budget: Annotated[Repeated, arg(metavar="0.5,0.5,0.5")] = ()
    """share of tokens at every routed thinking step; repeat for several budgets (default: as trained)"""
    heldout: Annotated[Repeated, arg(metavar="DOMAIN=FILE")] = ()
    """held-out documents (jsonl, .zst, .gz): measures their perplexity and, with --task-dir, writes the two held-out
    tasks there; repeat for several domains"""
    heldout_records: Count = 200  # records per held-out task
    text_key: str = "text"  # key of the text in the held-out documents

    def execute(self) -> int:
        configure_logging()
        # After parsing: --help must not wait for torch and lm-eval.
        from megatron_itt.evaluation.harness import choose_tasks, evaluate_export
        from megatron_itt.evaluation.heldout import parse_domains, prepare_heldout

        texts = prepare_heldout(
            parse_domains(self.heldout),
            task_dir=self.task_dir,
            text_key=self.text_key,
            num_records=self.heldout_records,
        )
        evaluate_export(
            EvaluationRequest(
                **{option.name: getattr(self, option.name) for option in fields(EvaluationOptions)},
                tasks=choose_tasks(self.tasks, self.task_dir),
                task_dirs=[self.task_dir] if self.task_dir is not None else [],
                budgets=[parse_budget(text) for text in self.budget],
                perplexity_texts=texts,
            )
        )
        print((self.output / "results.md").read_text(encoding="utf-8"))
        print(f"written to {self.output}")
        return 0


COMMAND = Evaluate
