"""Download RedPajama-Data-1T or a sample of it, or build a small corpus without network."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from tyro.conf import Suppress

from megatron_itt.commands.arguments import Flag, Names, OptionalTokens
from megatron_itt.data.text.corpora import build_sample_corpus
from megatron_itt.data.text.download import DownloadOptions, plan_download, run_download
from megatron_itt.data.text.http_file import RetryPolicy
from megatron_itt.errors import ConfigError
from megatron_itt.log import configure_logging

EXAMPLES = """
  itt download redpajama --output /data/redpajama --max-tokens 50B --dry-run
  itt download sample --output runs/quickstart/corpus
"""


@dataclass(frozen=True, kw_only=True)
class RedPajama(DownloadOptions):
    """RedPajama-Data-1T, or a sample of it, from the published URL lists.

    Parallel; the same command resumes after any interruption. A file gets its name when it is complete and its
    checksum (published beside the files) matches. --max-tokens draws whole files in LLaMA's proportions,
    deterministically.
    """

    domains: Names = ()  # some of the domains (default: all)
    max_tokens: OptionalTokens = None  # a sample of about that many tokens, such as 50B
    attempts: int = RetryPolicy().attempts  # in a row without progress
    no_checksums: Flag = False  # do not look for checksums
    dry_run: Flag = False  # show what would be downloaded, then stop
    quiet: Flag = False  # no progress bar
    retry_policy: Suppress[RetryPolicy] = field(default_factory=RetryPolicy)
    show_progress: Suppress[bool] = True

    def execute(self) -> int:
        configure_logging()
        if self.workers < 1 or self.attempts < 1:
            raise ConfigError("--workers and --attempts must be at least 1")
        if self.no_checksums and self.checksums:
            raise ConfigError("--checksums and --no-checksums exclude each other; give one of them")
        options = replace(
            self,
            checksums=() if self.no_checksums else self.checksums,
            retry_policy=RetryPolicy(attempts=self.attempts),
            show_progress=not self.quiet,
        )
        plan = plan_download(options)
        print(plan.table())
        if self.dry_run:
            print(f"{len(plan.missing):,} files, {plan.bytes_to_fetch / 1e9:,.2f} GB to download to {self.output}")
            return 0
        started = time.monotonic()
        num_bytes = run_download(plan, options)
        seconds = time.monotonic() - started
        print(
            f"{self.output}: {len(plan.missing):,} files fetched ({num_bytes / 1e9:,.2f} GB in {seconds:,.0f} s, "
            f"{num_bytes / 1e6 / max(seconds, 1e-9):,.1f} MB/s), {len(plan.files) - len(plan.missing):,} were complete"
        )
        return 0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A small corpus of real text (Python's library and documentation) that needs no network."""

    output: Path  # folder to create; an existing corpus is reused
    min_bytes: int = 8_000_000  # least size of the text

    def execute(self) -> int:
        for name, counts in build_sample_corpus(self.output, min_bytes=self.min_bytes).items():
            print(f"{name}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, {counts['shards']} shards")
        print(f"corpus: {self.output}")
        return 0


COMMAND = {"redpajama": RedPajama, "sample": Sample}
