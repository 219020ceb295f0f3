"""Write one self-contained HTML page about a training run, its export and its evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_itt.commands.arguments import Flag

EXAMPLES = """
  itt report --run runs/quickstart --export runs/quickstart/hf \\
      --evaluation runs/quickstart/evaluation/results.json --text passage.txt --output runs/quickstart/report.html
"""


@dataclass(frozen=True, kw_only=True)
class Report:
    run: Path  # run folder (logging.run_dir)
    output: Path  # the page to write
    export: Path | None = None  # exported Hugging Face folder of the run
    evaluation: Path | None = None  # results.json of itt evaluate, or its folder
    text: Path | None = None  # passage to trace (.txt, or the first .jsonl document)
    overwrite: Flag = False  # replace an existing output

    def execute(self) -> int:
        """Write the page, and print where it is."""
        # After parsing: --help must not wait for torch.
        from megatron_itt.analysis.report import write_report
        from megatron_itt.evaluation.heldout import read_texts

        texts = read_texts(self.text) if self.text is not None else None
        write_report(
            self.run,
            output_html=self.output,
            export_dir=self.export,
            evaluation_json=self.evaluation,
            text=None if texts is None else (texts or [""])[0],
            overwrite=self.overwrite,
        )
        print(f"written to {self.output}")
        return 0


COMMAND = Report
