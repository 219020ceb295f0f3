"""Measure what a trained model or a run does, one figure of the paper per name, and draw it.

Each name writes a measurement, a JSON file; --plot draws it as well, `plot` later. `causality` writes a folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from megatron_itt.commands.arguments import Count, Flag, Fractions, OptionalCount, Repeated
from megatron_itt.errors import DataError
from megatron_itt.evaluation.options import CausalitySettings, EvaluationRequest, parse_budget
from megatron_itt.log import configure_logging

if TYPE_CHECKING:
    from megatron_itt.analysis.measurement import Measurement
    from megatron_itt.evaluation.exported_model import ExportedModel

EXAMPLES = """
  itt analyse routing --model runs/quickstart/hf --text passage.txt --output analysis/routing.json --plot svg
  itt analyse weights --model runs/quickstart/hf --text heldout.jsonl.zst --output analysis/weights.json
  itt analyse oracle --model runs/quickstart/hf --text heldout.jsonl.zst --output analysis/oracle.json
  itt analyse steps --model runs/quickstart/hf --output analysis/steps.json
  itt analyse history --run runs/quickstart --output analysis/history.json
  itt analyse budgets --model runs/itt/hf --model runs/llama/hf --text heldout.jsonl.zst --output b.json
  itt analyse gradients --model gpt2_folder --questions aqua.jsonl --train 100 --output gradients.json
  itt analyse gradients --model runs/quickstart/hf --text heldout.jsonl.zst --output gradients.json
  itt analyse curves --run runs/llama --run runs/loop --run runs/itt --baseline runs/llama --output c.json
  itt analyse scaling --run runs/llama --run runs/itt_x2 --run runs/itt_x4 --output scaling.json
  itt analyse causality --model runs/quickstart/hf --heldout code=code.jsonl --output runs/quickstart/causality
  itt analyse plot runs/quickstart/analysis/*.json --format svg
"""
Folders = Annotated[UseAppendAction[tuple[Path, ...]], arg(metavar="DIR")]


@dataclass(frozen=True, kw_only=True)
class _Measuring:
    output: Path  # the measurement, a JSON file
    plot: tuple[Literal["png", "svg"], ...] | None = None  # draw it as well, beside the file (png if no format follows)
    overwrite: Flag = False  # replace existing files

    def execute(self) -> int:
        configure_logging()
        # After parsing: --help must not wait for torch or matplotlib.
        from megatron_itt.analysis.measurement import check_new, write_measurement

        if self.plot is not None:
            from megatron_itt.analysis.figures import draw_measurement
        check_new(self.output, "measurement", overwrite=self.overwrite)
        measurement = self.measure()
        write_measurement(measurement, self.output, overwrite=self.overwrite)
        for note in measurement.notes:
            print(f"note: {note}")
        print(f"written to {self.output}")
        for ending in () if self.plot is None else self.plot or ("png",):
            figure = self.output.with_suffix(f".{ending}")
            draw_measurement(measurement, figure, overwrite=self.overwrite)
            print(f"written to {figure}")
        return 0

    def measure(self) -> Measurement:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class _OfModel(_Measuring):
    model: Path  # Hugging Face folder
    device: str = "auto"  # auto, cpu, cuda, ...

    def _export(self) -> ExportedModel:
        from megatron_itt.evaluation.exported_model import load_export

        return load_export(self.model, device=self.device)


@dataclass(frozen=True, kw_only=True)
class _OfPassage(_OfModel):
    text: Path  # text (.txt, .jsonl, .zst, ...)
    max_tokens: OptionalCount = None  # read no more than so many tokens
    budget: Fractions = None  # share of tokens per routed step (default: as trained)


@dataclass(frozen=True, kw_only=True)
class Routing(_OfPassage):
    """Selected tokens in a passage, and which kinds of tokens are selected more often (Figure 7)."""

    def measure(self) -> Measurement:
        from megatron_itt.analysis.routing import measure_routing

        text = "\n\n".join(_texts(self.text))
        return measure_routing(self._export(), text, budget=self.budget, max_tokens=self.max_tokens or 2048)


@dataclass(frozen=True, kw_only=True)
class Weights(_OfPassage):
    """Distribution of router weights (appendix A.4)."""

    def measure(self) -> Measurement:
        from megatron_itt.analysis.routing import measure_router_weights

        texts = _texts(self.text)
        return measure_router_weights(self._export(), texts, budget=self.budget, max_tokens=self.max_tokens or 20_000)


@dataclass(frozen=True, kw_only=True)
class Oracle(_OfPassage):
    """Gain of each routed step for each token, and the router's share of what the best selection would gain."""

    batch_size: Count = 64  # tokens that are flipped at a time

    def measure(self) -> Measurement:
        from megatron_itt.analysis.oracle import measure_oracle

        texts, limit = _texts(self.text), self.max_tokens or 1024
        return measure_oracle(self._export(), texts, budget=self.budget, max_tokens=limit, batch_size=self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Steps(_OfModel):
    """Values of the step encodings (Figure 6, middle)."""

    def measure(self) -> Measurement:
        from megatron_itt.analysis.routing import measure_step_encoding

        return measure_step_encoding(self._export())


@dataclass(frozen=True, kw_only=True)
class History(_Measuring):
    """Thresholds and realised shares over training."""

    run: Path  # run folder

    def measure(self) -> Measurement:
        from megatron_itt.analysis.routing import measure_router_history
        from megatron_itt.analysis.runs import read_run

        return measure_router_history(read_run(self.run))


@dataclass(frozen=True, kw_only=True)
class Budgets(_Measuring):
    """Perplexity over thinking budgets (Table 2; Figure 6, left)."""

    model: Folders  # exports, LLaMA and Loop included
    text: Path  # text (.txt, .jsonl, .zst, ...)
    max_tokens: OptionalCount = None  # read no more than so many tokens
    budget: Annotated[Repeated, arg(metavar="0.9,0.7,0.5")] = ()  # default: Table 2
    grid: Fractions = None  # equal shares to sweep (default: 0 to 1)
    tasks: Annotated[str | None, arg(metavar="paper|a,b,c")] = None  # score lm-eval tasks at every budget as well
    task_dir: Path | None = None  # folder with further task files (YAML)
    data_root: Path | None = None  # offline copies of the data sets
    limit: OptionalCount = None  # records per task
    device: str = "auto"  # auto, cpu, cuda, ...

    def measure(self) -> Measurement:
        from megatron_itt.analysis.budgets import GRID, measure_budgets
        from megatron_itt.evaluation.harness import choose_tasks

        texts, tasks = _texts(self.text), None
        if self.tasks or self.task_dir:
            tasks = EvaluationRequest(
                model=self.model[0],
                output=self.output.with_suffix(".tasks"),
                tasks=choose_tasks(self.tasks, self.task_dir),
                task_dirs=[self.task_dir] if self.task_dir else [],
                data_root=self.data_root,
                limit=self.limit,
                device=self.device,
                overwrite=self.overwrite,
            )
        return measure_budgets(
            self.model,
            texts,
            budgets=[parse_budget(text) for text in self.budget],
            grid=self.grid or GRID,
            tasks=tasks,
            max_tokens=self.max_tokens,
            device=self.device,
        )


@dataclass(frozen=True, kw_only=True)
class Gradients(_OfModel):
    """Gradient nuclear norms by layer (Figure 2), of questions or of pieces of text."""

    questions: Path | None = None  # JSONL with question, options, correct (AQuA)
    text: Path | None = None  # any text; pieces of it are sorted by loss
    samples: Count = 100  # to measure
    train: int = 0  # questions to train on first
    tokens: Count = 64  # of a piece of text

    def measure(self) -> Measurement:
        from megatron_itt.analysis.gradients import measure_question_gradients, measure_text_gradients, read_questions

        if (self.questions is None) == (self.text is None):
            raise DataError("give one of --questions and --text")
        if self.text is not None:
            texts = _texts(self.text)
            return measure_text_gradients(self._export(), texts, num_samples=self.samples, num_tokens=self.tokens)
        assert self.questions is not None
        num_train = max(0, self.train)
        questions = read_questions(self.questions)[: num_train + self.samples]
        return measure_question_gradients(self._export(), questions, num_train=num_train)


@dataclass(frozen=True, kw_only=True)
class Curves(_Measuring):
    """Training curves of runs side by side (Figure 4)."""

    run: Folders  # run folders
    baseline: Path | None = None  # whose last loss others reach (default: first run)

    def measure(self) -> Measurement:
        from megatron_itt.analysis.curves import measure_curves

        return measure_curves(self.run, baseline=self.baseline)


@dataclass(frozen=True, kw_only=True)
class Scaling(_Measuring):
    """Perplexity by number of thinking steps (Figure 5)."""

    run: Folders  # run folders
    evaluation: Annotated[Folders, arg(metavar="FILE")] = ()  # results of itt evaluate

    def measure(self) -> Measurement:
        from megatron_itt.analysis.curves import measure_scaling

        return measure_scaling(self.run, evaluations=self.evaluation)


@dataclass(frozen=True, kw_only=True)
class Causality(CausalitySettings):
    """Perplexity under threshold routing against top-k, and tests for look-ahead."""

    model: Path  # exported Hugging Face folder
    output: Path  # folder for causality.json and causality.md
    heldout: Annotated[Repeated, arg(metavar="DOMAIN=FILE")]
    """held-out documents (jsonl, .zst, .gz, txt); repeat for several domains"""
    text_key: str = "text"  # key of the text in the documents
    lengths: Annotated[UseAppendAction[tuple[Count, ...]], arg(name="length", metavar="N")] = ()
    budget: Fractions = None
    max_tokens: Count = CausalitySettings.max_tokens
    batch_size: Count = CausalitySettings.batch_size
    num_cases: Annotated[Count, arg(name="cases")] = CausalitySettings.num_cases
    device: str = "auto"  # auto, cpu, cuda, ...
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights
    overwrite: Flag = False  # replace an existing output

    def execute(self) -> int:
        from megatron_itt.evaluation.causality import report_causality
        from megatron_itt.evaluation.exported_model import load_export
        from megatron_itt.evaluation.heldout import parse_domains, prepare_heldout

        texts = prepare_heldout(parse_domains(self.heldout), text_key=self.text_key)
        export = load_export(self.model, device=self.device, dtype=self.dtype)
        print(report_causality(export, texts, self.output, self, overwrite=self.overwrite))
        print(f"written to {self.output}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw measurements as PNG or SVG figures, each beside its file."""

    measurements: Annotated[Positional[tuple[Path, ...]], arg(metavar="FILE")]  # measurement files
    output: Path | None = None  # the figure, .png or .svg (for a single file)
    format: Literal["png", "svg"] = "png"  # without --output
    overwrite: Flag = False  # replace existing figures

    def execute(self) -> int:
        if self.output is not None and len(self.measurements) > 1:
            raise DataError(
                f"--output names one figure but there are {len(self.measurements)} measurements; use --format"
            )
        from megatron_itt.analysis.figures import draw_measurement
        from megatron_itt.analysis.measurement import read_measurement

        for path in self.measurements:
            figure = self.output or path.with_suffix(f".{self.format}")
            draw_measurement(read_measurement(path), figure, overwrite=self.overwrite)
            print(f"written to {figure}")
        return 0


def _texts(path: Path) -> list[str]:
    from megatron_itt.evaluation.heldout import read_texts

    texts = read_texts(path)
    if not texts:
        raise DataError(f"text {path} is empty; give a file with at least one word")
    return texts


_KINDS = (Routing, Weights, Oracle, Steps, History, Budgets, Gradients, Curves, Scaling, Causality, Plot)
COMMAND = {kind.__name__.lower(): kind for kind in _KINDS}
