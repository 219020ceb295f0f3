"""Computed tables of docs/scaling.md and docs/performance.md: python docs/make_tables.py rewrites them.

To add a row to the scaling guide, write its first three cells and run this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_itt.accounting.flops import forward_flops
from megatron_itt.accounting.gpus import GIBI, GPUS
from megatron_itt.accounting.layout import Machine, layout_report
from megatron_itt.accounting.report import check_report, memory_report
from megatron_itt.accounting.roofline import routed_step_roofline
from megatron_itt.benchmark.shapes import BASE, STOCK, STOCK_SAME_PARTS, compared_models
from megatron_itt.config import load_config

DOCS = Path(__file__).parent
SHAPES = ("162m", "466m")
GPUS_PER_NODE = 8
FLOPS_PER_S, BYTES_PER_S = 989e12, 3.35e12  # of an H100's data sheet
SCALING = "| recipe | nodes | settings | GiB per GPU | data parallel | micro-batches per step |"
SEARCH = "| recipe | nodes | GPU | number | settings | GiB | s per step | MFU | largest parts of the step |"
SEARCHED = {
    "162m/itt_x4": 1,  # nodes
    "230m/itt_x4": 1,
    "466m/itt_x4": 2,
    "scale/1b3_itt_x4": 4,
    "scale/7b_itt_x4": 8,
    "scale/7b_llama": 8,
}
FLOPS = "| shape | model | TFLOPs of a step | over LLaMA | matrices | attention | head |"
ROOFLINE = "| shape | attend | part | GFLOPs | MB | us | share |"


def updated_pages() -> dict[Path, str]:
    """Return the pages with their tables computed again."""
    scaling, performance = DOCS / "scaling.md", DOCS / "performance.md"
    guide, page = scaling.read_text(encoding="utf-8"), performance.read_text(encoding="utf-8")
    rows = [scaling_row(*cells[:3]) for cells in cells_of(guide, SCALING)]
    page = with_table(with_table(page, FLOPS, flops_rows()), ROOFLINE, roofline_rows())
    guide = with_table(with_table(guide, SCALING, rows), SEARCH, list(search_rows()))
    return {scaling: guide, performance: page}


def scaling_row(recipe: str, nodes: str, settings: str) -> list[str]:
    """Memory of the rank that needs most, data-parallel ranks and micro-batches per step."""
    overrides = settings.strip("`").split() if settings != "-" else []
    config, world_size = load_config(recipe, overrides), GPUS_PER_NODE * int(nodes)
    report = check_report(config, world_size)
    memory = f"{memory_report(config, world_size)['worst_total'] / GIBI:.1f}"
    return [recipe, nodes, settings, memory, str(report["data_parallel"]), str(report["microbatches_per_step"])]


def search_rows(gpu: str = "a100-80gb") -> Iterator[list[str]]:
    """The best layout that `itt recipe layout` finds, and the recipe's own."""
    for recipe, nodes in SEARCHED.items():
        machine = Machine(num_nodes=nodes, gpus_per_node=GPUS_PER_NODE, gpu=GPUS[gpu])
        report = layout_report(load_config(recipe), machine, num_best=1)
        own = report["own"]
        for number, row in (("1", report["layouts"][0]), (f"{own['number']} (recipe)", own)):
            settings = f"`{row['overrides']}`".replace(" parallel.virtual_pipeline=1", "")
            parts = ", ".join(f"{part} {share:.0%}" for part, share in row["limits"][:3])
            figures = f"{row['memory_gib']:.1f}", f"{row['step_s']:.2f}", f"{row['mfu']:.0%}"
            yield [recipe, str(nodes), gpu, number, settings, *figures, parts]


def flops_rows() -> Iterator[list[str]]:
    """FLOPs of a step of one sequence, by operation."""
    for shape in SHAPES:
        models = compared_models(load_config(f"{shape}/itt_x4"))
        base = forward_flops(models[BASE].model, models[BASE].thinking)
        for name, config in models.items():
            flops = forward_flops(config.model, config.thinking)
            shares = (f"{part / flops.total:.0%}" for part in (flops.matrices, flops.attention, flops.head))
            if name not in (STOCK, STOCK_SAME_PARTS):
                yield [shape, name, f"{flops.training / 1e12:.2f}", f"{flops.total / base.total:.3f}", *shares]


def roofline_rows() -> Iterator[list[str]]:
    """Lower bounds of the operations of one layer's routed steps."""
    for shape in SHAPES:
        config = load_config(f"{shape}/itt_x4")
        for attend in ("all", "selected"):
            costs = routed_step_roofline(config.model, replace(config.thinking, attend=attend))
            total = sum(cost.seconds(FLOPS_PER_S, BYTES_PER_S) for cost in costs)
            for cost in costs:
                seconds = cost.seconds(FLOPS_PER_S, BYTES_PER_S)
                work = f"{cost.flops / 1e9:.1f}", f"{cost.num_bytes / 1e6:.1f}"
                yield [shape, attend, cost.operation, *work, f"{1e6 * seconds:.1f}", f"{seconds / total:.1%}"]


def cells_of(text: str, header: str) -> list[list[str]]:
    """Return the rows below a header."""
    table = text.split(header)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def with_table(text: str, header: str, rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    """Replace the rows below a header."""
    before, after = text.split(header)
    rule = "|" + "---|" * (header.count("|") - 1)
    table = "\n".join([header, rule, *("| " + " | ".join(cells) + " |" for cells in rows)])
    return f"{before}{table}\n\n{after.partition(chr(10) * 2)[2]}"


if __name__ == "__main__":
    for path, text in updated_pages().items():
        path.write_text(text, encoding="utf-8")
