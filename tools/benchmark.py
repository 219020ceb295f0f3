"""How long things take on this machine, side by side in one run, beside their FLOPs and the machine's matrix rate.

Parts: steps (training steps of LLaMA, megatron-core's own GPTModel, Loop and ITT models), routed (what a routed step
spends its time on), lengths (steps as sequences grow), decode (the exported model), data (preprocessing and loading),
scaling (ranks of this machine, with bytes), memory (activations by recompute mode), overhead (of the training loop).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_itt.config.parts import use_parts
from megatron_itt.log import positive_int, run_command, silence_known_warnings

EPILOG = """examples:
  python tools/benchmark.py
  python tools/benchmark.py --parts steps,routed --shape 162m --repeats 3 --output docs/results --name cpu-162m
  python tools/benchmark.py --parts steps --models "ITT x4;Loop x4" --shape recipes/466m/itt_x4.yaml model.num_layers=2
  python tools/benchmark.py --parts lengths --shape 162m --lengths 1024,2048,4096,8192 model.num_layers=2
  python tools/benchmark.py --parts overhead --repeats 40 model.hidden_size=384 logging.run_dir=runs/overhead
"""


def main(argv: list[str] | None = None) -> int:
    """Measure, print each part as it ends, write JSON and Markdown."""
    arguments = parse_arguments(argv)
    silence_known_warnings()
    import torch

    from megatron_itt.benchmark.models import load_shape
    from megatron_itt.parallel.groups import choose_device

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device, 0).type
    shape = load_shape(arguments.shape, [f"runtime.device={arguments.device}", *arguments.overrides], device=device)
    print(use_parts(shape.config.precision.parts, device=device), end="\n\n", flush=True)
    from megatron_itt.benchmark.parts import USUAL, Request, failed, run_request

    request = Request(
        shape=shape,
        parts=arguments.parts or USUAL,
        num_repeats=arguments.repeats,
        stop_after_s=arguments.seconds_per_part,
        models=arguments.models,
        batch_sizes=arguments.batches,
        num_new_tokens=arguments.new_tokens,
        num_prompt_tokens=arguments.prompt_tokens,
        lengths=arguments.lengths,
        num_ranks=arguments.ranks,
        inputs=tuple(arguments.input),
        tokenizer=arguments.tokenizer,
        command=f"python tools/benchmark.py {' '.join(sys.argv[1:] if argv is None else argv)}".strip(),
    )
    outcomes = run_request(
        request,
        folder=arguments.output,
        name=arguments.name,
        report=lambda outcome: print(outcome.as_markdown(), end="\n\n", flush=True),
    )
    print(f"written to {arguments.output}")
    return 1 if failed(outcomes) else 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line of this tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value")
    add("--parts", type=names(","), default=(), metavar="A,B", help="default: all but overhead")
    add("--shape", default="tiny", help="tiny, 162m, 230m, 466m (cut on CPUs), or a recipe (default: tiny)")
    add("--repeats", type=int, default=5, metavar="N", help="timed turns (default: 5)")
    add("--seconds-per-part", type=float, metavar="S", help="begin no further turn of a part after that")
    add("--threads", type=positive_int, metavar="N", help="of torch (default: its own choice)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--models", type=names(";"), default=(), metavar="A;B", help="of steps; LLaMA is always there")
    add("--batches", type=numbers, default=(1, 8), metavar="N,M", help="of decode (default: 1,8)")
    add("--prompt-tokens", type=positive_int, default=32, metavar="N", help="of decode (default: 32)")
    add("--new-tokens", type=positive_int, default=32, metavar="N", help="of decode (default: 32)")
    add("--lengths", type=numbers, default=(), metavar="N,M", help="of lengths (default: half to twice the recipe's)")
    add("--ranks", type=int, default=2, metavar="N", help="of scaling (default: 2)")
    add("--input", nargs="+", default=[], metavar="PATH", help="text for data (default: a sample corpus)")
    add("--tokenizer", metavar="DIR", help="for data, with --input")
    add("--output", type=Path, default=Path("runs/benchmark"), metavar="DIR")
    add("--name", default="benchmark", help="of the result files (default: %(default)s)")
    return parser.parse_intermixed_args(argv)


def names(separator: str) -> Callable[[str], tuple[str, ...]]:
    """A type of argument: names between separators."""
    return lambda text: tuple(name.strip() for name in text.split(separator) if name.strip())


def numbers(text: str) -> tuple[int, ...]:
    """ "1,8" -> (1, 8)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers; write for instance 1,8") from None


if __name__ == "__main__":
    sys.exit(run_command(main))
