"""Continue a prompt with an exported model."""

from __future__ import annotations

import argparse
import sys

from megatron_itt.log import run_command


def parse_budget(text: str) -> list[float]:
    """ "0.5,0.5,0.5" -> [0.5, 0.5, 0.5]."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of shares; write for instance 0.5,0.5,0.5") from None


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line of this tool."""
    parser = argparse.ArgumentParser(
        description="Continue a prompt with an exported model.",
        epilog='example: python tools/generate.py --model runs/quickstart/hf --prompt "def main" --budget 0.5,0.5,0.5',
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="exported folder")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--budget", type=parse_budget, metavar="A,B,C", help="share of tokens per routed step, 0 to 1")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, default=1234, metavar="N")
    parser.add_argument("--show-thinking", action="store_true", help="also print the routed steps of each token")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Generate and print the continuation."""
    arguments = parse_arguments(argv)
    from megatron_itt.hf.generation import GenerationOptions, generate_text

    options = GenerationOptions(
        budget=arguments.budget,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        show_thinking=arguments.show_thinking,
    )
    generated = generate_text(arguments.model, arguments.prompt, options)
    print(f"{arguments.prompt}{generated.text}")
    if generated.thinking:
        print("\nrouted steps per thinking layer, and their sum:")
    for token in generated.thinking:
        mark = " " if token.prompt else "+"
        print(f"{mark} {token.text!r:<20} {' '.join(str(count) for count in token.steps)}  {sum(token.steps)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
