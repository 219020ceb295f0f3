"""Time cached decoding of a random ITT beside transformers' LLaMA of the same weights."""

from __future__ import annotations

import argparse
import sys

from megatron_itt.log import run_command

NUMBERS = {
    "--hidden-size": ("hidden_size", 1024),
    "--ffn-hidden-size": ("ffn_hidden_size", 2560),
    "--num-layers": ("num_layers", 8),
    "--num-heads": ("num_heads", 32),
    "--num-kv-heads": ("num_kv_heads", 32),
    "--vocab-size": ("vocab_size", 32000),
    "--batch-size": ("batch_size", 1),
    "--prompt-tokens": ("num_prompt_tokens", 32),
    "--new-tokens": ("num_new_tokens", 128),
    "--repeats": ("num_repeats", 5),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line of this tool; the default shape is the paper's 162M."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python tools/decode_speed.py --batch-size 8 --capacity 0.5,0.5,0.5"
    )
    for option, (name, default) in NUMBERS.items():
        parser.add_argument(option, dest=name, type=int, default=default, metavar="N", help="default: %(default)s")
    parser.add_argument("--capacity", type=parse_shares, default=(0.5, 0.5, 0.5), metavar="A,B,C")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    return parser.parse_args(argv)


def parse_shares(text: str) -> tuple[float, ...]:
    """ "0.5,0.5" -> (0.5, 0.5)."""
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share <= 1 for share in shares):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of shares in (0, 1]; write for instance 0.5,0.5,0.5")
    return shares


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    arguments = vars(parse_arguments(argv))
    import torch

    from megatron_itt.hf.decode_speed import DecodeCase, measure_decode_speed

    threads = arguments.pop("threads")
    if threads is not None:
        torch.set_num_threads(threads)
    case = DecodeCase(**arguments)
    times = measure_decode_speed(case)
    print(f"{case}, {torch.get_num_threads()} threads")
    print(f"decoding: LLaMA {times.llama_s * 1e3:.2f} ms, ITT {times.itt_s * 1e3:.2f} ms per token of the batch")
    print(
        f"  ratio {times.itt_s / times.llama_s:.3f}, of FLOPs {times.flops_ratio:.3f} (mean share thinking "
        f"{times.mean_share:.3f}): {times.time_per_flops:.3f}; of weights read {times.weight_bytes_ratio:.3f}"
    )
    print(f"prompt: LLaMA {times.llama_prompt_s * 1e3:.1f} ms, ITT {times.itt_prompt_s * 1e3:.1f} ms")
    print(
        f"  ratio {times.itt_prompt_s / times.llama_prompt_s:.3f}, of FLOPs {times.prompt_flops_ratio:.3f}: "
        f"{times.prompt_time_per_flops:.3f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
