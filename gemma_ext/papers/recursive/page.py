"""Tables and page of a study; every cell is a mean over seeds with its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_ext import report
from gemma_ext.papers.recursive.study import perplexity
from gemma_ext.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Tables = dict[str, dict[str, list[Record]]]
"""Records by table and row, one a seed; see `grid`."""
HEADS = {
    "inits": "initialisation",
    "teacher": "with a teacher",
    "controls": "control",
    "exits": "exit training",
}
CONTROLS = {"full size": "s", "same size from nothing": "v", "same size, layers cut": "^"}
SERVED = ("model", "requests at a time", "tokens / s", "loops of a token", "same as one by one")
# (better, worse) of the paper, rows of the first table; the rank of the study stands for {}
ORDERINGS = (
    ("stepwise r=0", "average r=0"),
    ("average r={}", "average r={} zero"),
    ("stepwise r={} zero", "stepwise r={}"),
    ("average r={}", "stepwise r={}"),
)


def interval(values: Sequence[float]) -> str:
    """Mean over seeds with the half width of its 95 % interval; see `report.interval`."""
    mean, half = report.interval(values)
    return f"{mean:.4g}" if half is None else f"{mean:.4g} ± {half:.2g}"


def rows_of(table: Mapping[str, Sequence[Record]], loops: int) -> list[list[str]]:
    """Rows: name, parameters outside the embedding, perplexity before, and of every loop after."""
    found = []
    for name, records in table.items():
        ends = len(records[0]["nats"])
        after = [_cell(records, "nats", loop) for loop in range(ends)]
        blank = [""] * (loops - ends)
        size = f"{records[0]['parameters']:,}"
        found.append([name, size, _cell(records, "before", -1), *blank, *after])
    return found


def exit_rows(table: Mapping[str, Sequence[Record]], loops: int) -> list[list[str]]:
    """Rows: name, perplexity of every loop before exit training, then after."""
    return [
        [
            name,
            *(_cell(records, w, loop) for w in ("before", "nats") for loop in range(loops)),
        ]
        for name, records in table.items()
    ]


def ordering_rows(inits: Mapping[str, Sequence[Record]]) -> list[list[str]]:
    """Rows: a pair, and nats of the second minus nats of the first, paired by seed."""
    found = []
    for better, worse in ORDERINGS:
        for rank in _ranks(inits):
            pair = better.format(rank), worse.format(rank)
            if pair[0] in inits and pair[1] in inits and [*pair] not in [r[:2] for r in found]:
                gaps = [
                    second["nats"][-1] - first["nats"][-1]
                    for first, second in zip(*(inits[name] for name in pair), strict=True)
                ]
                found.append([*pair, interval(gaps)])
    return found


def markdown(tables: Tables, start: Record) -> str:
    """All tables; `start` is the full-size model's record."""
    loops = loops_of(tables)
    parts = [
        (head, rows)
        for name in ("inits", "teacher", "controls")
        if name in tables
        for head, rows in [(_head(name, loops), rows_of(tables[name], loops))]
    ]
    if "exits" in tables:
        parts.append((_exit_head(loops), exit_rows(tables["exits"], loops)))
    if orderings := ordering_rows(tables.get("inits", {})):
        parts.append((["better", "worse", "nats between them"], orderings))
    texts = [f"Full size: perplexity {perplexity(start['nats'][-1]):.4g}.\n"]
    for head, rows in parts:
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        texts.append("\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n")
    return "\n".join(texts)


def loops_of(tables: Tables) -> int:
    """B."""
    return max(len(rs[0]["nats"]) for table in tables.values() for rs in table.values())


def figure(tables: Tables, start: Record) -> Figure:
    """Perplexity by size and initialisation, and of each loop before and after exit training."""
    drawn, (left, right) = plots.axes(1, 2, (9.8, 4.0))
    inits = tables.get("inits", {})
    colours = {"average": plots.BLUE, "stepwise": plots.INK, "lower": plots.GREY}
    for init, colour in colours.items():
        points = _points(inits, init)
        if points:
            x, y, half = zip(*points, strict=True)
            left.errorbar(x, y, half, color=colour, marker="o", capsize=3, label=f"{init}, SVD")
    for name, records in inits.items():
        if name.endswith(" zero"):
            init = name.split()[0]
            label = f"{init}, zero"
            _point(left, records, colours.get(init, plots.GREY), "x", label)
    for name, marker in CONTROLS.items():
        if records := tables.get("controls", {}).get(name):
            _point(left, records, plots.GREY, marker, name)
    whole = perplexity(start["nats"][-1])
    left.axhline(whole, color=plots.GREY, linestyle=":", linewidth=1, label="full size, as it was")
    left.set(xlabel="parameters outside the embedding", ylabel="held-out perplexity", yscale="log")
    left.legend(fontsize=7)
    _exit_bars(right, tables.get("exits", {}), loops_of(tables))
    return drawn


def write(
    path: Path,
    tables: Tables,
    start: Record,
    facts: Mapping[str, str],
    served: Sequence[Sequence[str]] = (),
) -> None:
    """The page of a study; `facts` are rows about the run, `served` those of `SERVED`."""
    loops = loops_of(tables)
    first = next(iter(tables.values()))
    best = min(first, key=lambda name: _mean(first[name]))
    report.write_page(
        path,
        "gemma_ext.papers.recursive",
        "page.html.jinja",
        numbers=[
            ("perplexity of the full size", f"{perplexity(start['nats'][-1]):.4g}"),
            (f"best: {best}", interval([perplexity(r["nats"][-1]) for r in first[best]])),
            (
                "its parameters outside the embedding",
                f"{first[best][0]['parameters'] / start['parameters']:.0%}",
            ),
        ],
        machine=report.this_machine(),
        tables=[
            (HEADS[name], _head(name, loops)[1:], rows_of(tables[name], loops))
            for name in ("inits", "teacher", "controls")
            if name in tables
        ],
        exit_head=_exit_head(loops)[1:],
        exits=exit_rows(tables.get("exits", {}), loops),
        orderings=ordering_rows(tables.get("inits", {})),
        seeds=len(first[best]),
        served_head=SERVED[1:],
        served=[list(row) for row in served],
        facts=dict(facts),
        figure=plots.svg(figure(tables, start), "perplexity by size, and of early exits")
        if tables.keys() - {"teacher"}
        else "",
    )


def _head(name: str, loops: int) -> list[str]:
    after = [f"loop {loop + 1}" for loop in range(loops - 1)] + ["final"]
    return [HEADS[name], "parameters", "before", *after]


def _exit_head(loops: int) -> list[str]:
    names = [f"loop {loop + 1}" for loop in range(loops - 1)] + ["final"]
    return [HEADS["exits"], *(f"{n} {when}" for when in ("before", "after") for n in names)]


def _ranks(inits: Mapping[str, Any]) -> list[str]:
    ranks = {name.split("r=")[1].split()[0] for name in inits}
    return sorted(ranks - {"0"}, key=int) or ["0"]


def _points(inits: Mapping[str, Sequence[Record]], init: str) -> list[tuple[float, float, float]]:
    """(parameters, perplexity, half width) of an initialisation, by rank."""
    found = []
    for name, records in inits.items():
        words = name.split()
        if len(words) == 2 and words[0] == init:
            values = [perplexity(r["nats"][-1]) for r in records]
            mean, half = report.interval(values)
            found.append((records[0]["parameters"], mean, half or 0.0))
    return sorted(found)


def _point(axis: Any, records: Sequence[Record], colour: str, marker: str, label: str) -> None:
    values = [perplexity(r["nats"][-1]) for r in records]
    mean, half = report.interval(values)
    axis.errorbar(
        [records[0]["parameters"]],
        [mean],
        [half or 0.0],
        color=colour,
        marker=marker,
        linestyle="",
        label=label,
    )


def _exit_bars(axis: Any, table: Mapping[str, Sequence[Record]], loops: int) -> None:
    """First loop and final, before and after, of every row."""
    names = list(table)
    axis.set_visible(bool(names))
    for number, (loop, when, colour) in enumerate(
        (
            (0, "before", "#d7dce1"),
            (0, "nats", plots.BLUE),
            (loops - 1, "before", plots.GREY),
            (loops - 1, "nats", plots.INK),
        )
    ):
        label = f"{'loop 1' if loop == 0 else 'final'}, {'before' if when == 'before' else 'after'}"
        values = [[perplexity(r[when][loop]) for r in table[name]] for name in names]
        at = [place + 0.2 * number for place in range(len(names))]
        axis.barh(at, [sum(v) / len(v) for v in values], height=0.18, color=colour, label=label)
    axis.set(xlabel="held-out perplexity")
    axis.set_yticks([place + 0.3 for place in range(len(names))], names, fontsize=7)
    axis.invert_yaxis()
    if names:
        axis.legend(fontsize=7)


def _cell(records: Sequence[Record], when: str, loop: int) -> str:
    return interval([perplexity(r[when][loop]) for r in records])


def _mean(records: Sequence[Record]) -> float:
    return sum(r["nats"][-1] for r in records) / len(records)
