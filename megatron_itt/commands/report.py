"""Write one self-contained HTML page about training runs, an export and evaluations."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import UseAppendAction

from megatron_itt.commands.arguments import Flag
from megatron_itt.errors import ConfigError

EXAMPLES = """
  itt report --run runs/quickstart --export runs/quickstart/hf \\
      --evaluation runs/quickstart/evaluation/results.json --text passage.txt --output runs/quickstart/report.html
  itt report --run runs/466m_itt_x4 --run runs/466m_llama --output runs/compared.html
  itt report --run runs/466m_itt_x4 --output runs/466m_itt_x4/report.html --watch
"""


@dataclass(frozen=True, kw_only=True)
class Report:
    run: UseAppendAction[tuple[Path, ...]]  # run folder (logging.run_dir); repeat for several runs on the same text
    output: Path  # the page to write
    export: Path | None = None  # exported Hugging Face folder of the first run
    evaluation: UseAppendAction[tuple[Path, ...]] = ()  # results.json of itt evaluate, or its folder; one per run
    text: Path | None = None  # passage to trace (.txt, or the first .jsonl document)
    overwrite: Flag = False  # replace an existing output
    watch: Flag = False  # write the page again and again until the runs have ended
    interval_s: float = 30.0  # of --watch

    def execute(self) -> int:
        if not self.run:
            raise ConfigError("no run is given; name a run folder with --run")
        if self.watch and (self.export is not None or self.text is not None):
            raise ConfigError("--watch follows run folders; leave out --export and --text until the run is exported")
        if self.interval_s < 1:
            raise ConfigError(f"--interval-s is {self.interval_s:g}; give at least 1 second")
        # After parsing: --help must not wait for torch.
        from megatron_itt.analysis.status import has_ended

        overwrite = self.overwrite
        while self.watch and not all(map(has_ended, self.run)):
            self._write(overwrite=overwrite, refresh_s=self.interval_s)
            if not overwrite:
                print(f"written to {self.output} every {self.interval_s:g} s")
            overwrite = True
            time.sleep(self.interval_s)
        self._write(overwrite=overwrite)
        print(f"written to {self.output}")
        return 0

    def _write(self, *, overwrite: bool, refresh_s: float | None = None) -> None:
        from megatron_itt.analysis.report import write_report
        from megatron_itt.evaluation.heldout import read_texts

        texts = read_texts(self.text) if self.text is not None else None
        write_report(
            *self.run,
            output_html=self.output,
            export_dir=self.export,
            evaluations=self.evaluation,
            text=None if texts is None else (texts or [""])[0],
            overwrite=overwrite,
            refresh_s=refresh_s,
        )


COMMAND = Report
