"""Download RedPajama-Data-1T, or a sample of it, from the published URL lists.

Parallel; the same command continues after any interruption. A file gets its name when it is complete and its checksum
(published beside the files) is right. --max-tokens draws whole files in LLaMA's proportions, always the same ones.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_itt.data.download import DownloadOptions, plan_download, run_download
from megatron_itt.data.http_file import Patience
from megatron_itt.data.url_list import DOMAINS, PUBLISHED_URLS, parse_tokens
from megatron_itt.errors import ConfigError
from megatron_itt.log import configure_logging, run_command

EXAMPLE = "example: python tools/download_redpajama.py --output /data/redpajama --max-tokens 50B --dry-run"


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, show the plan, download."""
    arguments = _parser().parse_args(argv)
    configure_logging()
    if arguments.workers < 1 or arguments.attempts < 1:
        raise ConfigError("--workers and --attempts must be at least 1")
    options = DownloadOptions(
        output=arguments.output,
        urls=tuple(arguments.urls),
        domains=tuple(name for name in arguments.domains.split(",") if name),
        max_tokens=None if arguments.max_tokens is None else parse_tokens(arguments.max_tokens),
        seed=arguments.seed,
        workers=arguments.workers,
        checksums=() if arguments.no_checksums else tuple(arguments.checksums) if arguments.checksums else None,
        verify=arguments.verify,
        patience=Patience(attempts=arguments.attempts),
        show_progress=not arguments.quiet,
    )
    plan = plan_download(options)
    print(plan.table())
    if arguments.dry_run:
        print(f"{len(plan.missing):,} files, {plan.bytes_to_fetch / 1e9:,.2f} GB to download to {options.output}")
        return 0
    report = run_download(plan, options)
    rate = report.fetched_bytes / 1e6 / max(report.seconds, 1e-9)
    print(
        f"{options.output}: {report.fetched_files:,} files fetched ({report.fetched_bytes / 1e9:,.2f} GB in "
        f"{report.seconds:,.0f} s, {rate:,.1f} MB/s), {report.present_files:,} were here"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="files come to OUTPUT/DOMAIN/...")
    parser.add_argument(
        "--urls", nargs="+", default=[PUBLISHED_URLS], help="lists of URLs: files or URLs (default %(default)s)"
    )
    parser.add_argument("--domains", default="", help=f"comma-separated, of {', '.join(DOMAINS)} (default: all)")
    parser.add_argument("--max-tokens", metavar="N", help="a sample of about that many tokens, such as 50B")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default %(default)s)")
    parser.add_argument("--workers", type=int, default=8, help="files at a time (default %(default)s)")
    parser.add_argument("--attempts", type=int, default=8, help="in a row without progress (default %(default)s)")
    checksums = parser.add_mutually_exclusive_group()
    checksums.add_argument("--checksums", nargs="+", help="SHA256SUMS lists: files or URLs (default: those published)")
    checksums.add_argument("--no-checksums", action="store_true", help="do not look for checksums")
    parser.add_argument("--verify", action="store_true", help="read files that are here and compare their checksums")
    parser.add_argument("--dry-run", action="store_true", help="show what would be downloaded, then stop")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
