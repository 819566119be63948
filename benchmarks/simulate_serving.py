"""What exits are worth in simulated time: as the paper counts, then with all that it leaves out.

    python benchmarks/simulate_serving.py                   # tables, in a minute or two
    python benchmarks/simulate_serving.py --figure FILE     # and the ladder as SVG

The scheduler is the engine's own; only time is made up.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from gemma_ext.files import replacing
from gemma_ext.report.plots import BLUE, GREY, axes, svg
from gemma_ext.serve.simulate import (
    A100,
    H100,
    Workload,
    config_for,
    fixed,
    ladder,
    paper_speedups,
    simulate,
)

MACHINES = {"A100": A100, "H100": H100}
# Gemma, two loops: rank, data, ms per token and block, batch, share that leaves early, tokens/s:
# arXiv 2410.20672, table of throughput; shares as its rates imply
PAPER = (
    (0, "SlimPajama", 0.265, 43, 0.81, 3159),
    (0, "RedPajama", 0.265, 43, 0.78, 3050),
    (64, "SlimPajama", 0.323, 41, 0.69, 2357),
    (128, "SlimPajama", 0.324, 41, 0.69, 2355),
    (256, "SlimPajama", 0.372, 39, 0.69, 2047),
    (512, "SlimPajama", 0.422, 39, 0.69, 1806),
)


def line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return "\n".join([line(head), line("---" for _ in head), *map(line, rows)])


def own_simulation() -> str:
    rows = []
    for width, requests in ((43, 3000), (8, 600)):
        found = paper_speedups(Workload((0.8, 0.2), requests=requests), width)
        ideal = {"cdb": 2 / 1.2, "lockstep": 2 / (2 - 0.8**width)}
        rows += [(width, mode, f"{x:.3f}", f"{ideal[mode]:.3f}") for mode, x in found.items()]
    return table(("tokens a step", "mode", "x csb", "formula"), rows)


def own_throughput() -> str:
    rows = []
    for rank, data, ms, width, leave, told in PAPER:
        workload = Workload((leave, 1 - leave), requests=20 * width)
        costs = fixed(ms * width / 1e3)
        found = simulate(workload, config_for(workload, width), *costs, prompts=False, fills=False)
        rate = found["tokens_per_second"]
        rows.append((rank, data, ms, width, leave, told, f"{rate:.0f}", f"{rate / told - 1:+.1%}"))
    head = ("rank", "data", "ms", "batch", "leave", "paper, tokens/s", "simulated", "apart")
    return table(head, rows)


def ladders(ranks: Sequence[int], widths: Sequence[int]) -> dict[tuple, list[tuple[str, float]]]:
    found = {}
    for name, machine in MACHINES.items():
        for rank in ranks:
            for width in widths:
                workload = Workload((0.8, 0.2), requests=8 * width, prompt=64, output=256)
                found[name, rank, width] = ladder(workload, width, 2, machine, rank=rank)
    return found


def draw(found: dict[tuple, list[tuple[str, float]]], file: Path) -> None:
    """Bars from the paper's count to all of it, one panel for each rank."""
    shown = {key: rungs for key, rungs in found.items() if key[0] == "A100" and key[2] == 43}
    figure, panels = axes(1, len(shown), (11, 3.4), squeeze=False)
    for panel, ((machine, rank, width), rungs) in zip(panels[0], shown.items(), strict=True):
        names, values = zip(*rungs, strict=True)
        places = range(len(names))[::-1]
        colours = [GREY] * (len(names) - 2) + [BLUE, GREY]
        panel.barh(places, values, color=colours, height=0.7)
        panel.set_yticks(places, names)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_xlim(0, 1.8)
        panel.set_xlabel("x csb")
        panel.set_title(f"Gemma 2B, rank {rank}, {machine}, {width} tokens a step", fontsize=10)
        for place, value in zip(places, values, strict=True):
            panel.text(value + 0.02, place, f"{value:.2f}", va="center", fontsize=9)
    text = svg(figure, "What exits give, cost by cost, over continuous sequence batching")
    with replacing(file) as beside:
        beside.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figure", type=Path, metavar="FILE", help="SVG of the ladder")
    parser.add_argument("--rank", nargs="+", type=int, default=[0, 64])
    parser.add_argument("--width", nargs="+", type=int, default=[8, 43])
    options = parser.parse_args()
    print(f"## The paper's simulation\n{own_simulation()}\n", flush=True)
    print(f"## The paper's throughput\n{own_throughput()}\n", flush=True)
    found = ladders(options.rank, options.width)
    for rank in options.rank:
        cases = {key: dict(rungs) for key, rungs in found.items() if key[1] == rank}
        names = [name for name, _ in next(iter(found[key] for key in cases))]
        rows = []
        for i, name in enumerate(names):
            label = name if "tokens at a time" not in name else "head for W tokens at a time"
            values = (list(rungs.values())[i] for rungs in cases.values())
            rows.append((label, *(f"{value:.2f}" for value in values)))
        head = ("counted from here on", *(f"{key[0]}, W {key[2]}" for key in cases))
        print(f"## Rank {rank}, exits 0.8 and 0.2, x csb\n{table(head, rows)}\n", flush=True)
    if options.figure:
        draw(found, options.figure)


if __name__ == "__main__":
    main()
