"""Rows of the loss benchmark: columns, limits, bars, and what fills them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from gemma_ext.bench import timing
from gemma_ext.bench.subject import Case, Subject

SPEED_BARS = {  # least ratio to eager, forward and backward
    ("filtered", "bf16"): 3.2,
    ("filtered", "fp32"): 2.0,
    ("exact", "bf16"): 1.5,
    ("exact", "fp32"): 1.05,
}
MEMORY_BAR = 0.05  # of the fp32 logits, filtered subjects
ERROR_SLACK = 1.01  # where rounding the inputs is the whole error, equal codes differ by less
LOSS_LIMIT = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
EXACT_FP32_LIMIT = 5e-5  # relative error of the gradients
# Peers: wrong code is far above, rounding below. In fp32 torch's log-softmax adds V terms in fp32.
PEER_LIMIT = {"fp32": 1e-3, "bf16": 1e-1, "fp16": 1e-1}
CARD_FORWARD_BAR = 0.85  # of the rate of the bare product, on 90a
CARD_PEER_BAR = 2.0  # times the best peer, forward and backward, on trained-like rows
CARD_MEMORY_BAR = 0.01  # of the gradients
FLOOR = "torch.mm"  # the bare products, without a loss
ORDER = (
    FLOOR,
    "eager",
    "compile",
    "chunked",
    "torch-lce",
    "cut-ce",
    "liger",
    "quack",
    "exact",
    "cce",
    "cce+state",
    "auto",
    "reference",
)
RATIOS = ("eager", "compile", "chunked", "torch-lce")
KEY = ("n", "v", "d", "dtype", "data", "name")
COLUMNS = {
    "name": ("impl", ""),
    "forward": ("fwd s", ".3f"),
    "total": ("fwd+bwd s", ".3f"),
    "spread": ("spread", ".0%"),
    "gflops": ("GFLOP/s", ".0f"),
    "of_ceiling": ("of GEMM", ".0%"),
    "peak_mb": ("peak MB", ".0f"),
    "extra_mb": ("less grads", ".0f"),
    "of_logits": ("of logits", ".1%"),
    **{f"x_{peer}": (f"x {peer}", ".2f") for peer in RATIOS},
    "x_eager_cpu": ("x eager, cpu time", ".2f"),
    "kept": ("kept", ".3f"),
    "dropped": ("dropped", ".4f"),
    "de_error": ("dE err", ".1e"),
    "dc_error": ("dC err", ".1e"),
    "note": ("note", ""),
}
CARD_COLUMNS = {
    "name": ("impl", ""),
    "forward": ("fwd ms", ".2fms"),
    "total": ("fwd+bwd ms", ".2fms"),
    "spread": ("spread", ".0%"),
    "of_floor_forward": ("fwd floor", ".0%"),
    "of_floor": ("floor", ".0%"),
    "of_ceiling": ("of GEMM", ".0%"),
    "x_eager": ("x eager", ".2f"),
    "x_best": ("x best peer", ".2f"),
    "extra_mb": ("extra MB", ".0f"),
    "of_gradients": ("of grads", ".1%"),
    "of_logits": ("of logits", ".1%"),
    "kept": ("kept", ".3f"),
    "dropped": ("dropped", ".4f"),
    "de_error": ("dE err", ".1e"),
    "dc_error": ("dC err", ".1e"),
    "note": ("note", ""),
}


def columns_of(device: str) -> dict[str, tuple[str, str]]:
    """Columns of the printed table, on a CPU or a card."""
    return CARD_COLUMNS if device == "cuda" else COLUMNS


def blank_row(case: Case) -> dict[str, Any]:
    """Every column of the files, in order, empty."""
    row: dict[str, Any] = {name: getattr(case, name) for name in ("n", "d", "v", "dtype", "data")}
    row["threads"] = case.threads
    row |= dict.fromkeys(
        [*COLUMNS, *columns_of(case.device), "loss", "loss_error", "cpu", "rounds", "eps"]
    )
    row |= dict.fromkeys(["dropped_max", "gemm_fp32", "gemm_bf16", "copy"])
    row |= {"note": "", "bars": ""}
    return row


def check_columns(case: Case, result: Mapping[str, Any]) -> dict[str, Any]:
    figures = result["figures"]
    return {
        "loss": result["loss"],
        "loss_error": result["errors"]["loss"],
        "de_error": result["errors"]["de"],
        "dc_error": result["errors"]["dc"],
        "peak_mb": result["peak"] / 2**20,
        "extra_mb": result["extra"] / 2**20,
        "of_logits": result["extra"] / case.logits_bytes,
        **(
            {"of_gradients": result["extra"] / case.gradient_bytes} if case.device == "cuda" else {}
        ),
        "kept": figures.get("kept_fraction"),
        "dropped": figures.get("dropped_mass"),
        "dropped_max": figures.get("dropped_mass_max"),
        "eps": figures.get("eps"),
    }


def red(
    case: Case, subject: Subject, result: Mapping[str, Any], yardstick: Mapping[str, float]
) -> str | None:
    """Why a result is wrong, or None. Twice eager bf16's own error is the most we allow ours."""
    found = result["errors"]
    fp32 = case.dtype == "fp32"
    loss_limit = LOSS_LIMIT[case.dtype] if subject.ours or not fp32 else PEER_LIMIT["fp32"]
    if not found["loss"] <= loss_limit:
        return f"RED: loss off by {found['loss']:.1e}"
    for name in ("de", "dc"):
        limit = 2 * yardstick[name]
        if not subject.ours:
            limit = PEER_LIMIT[case.dtype]
        elif fp32 and subject.bar != "filtered" and subject.name != "auto":
            limit = EXACT_FP32_LIMIT
        if not found[name] <= limit:
            return f"RED: {name} error {found[name]:.1e} above {limit:.1e}"
    return None


def add_times(case: Case, rows: Mapping[str, dict[str, Any]], timed: Mapping[str, Any]) -> None:
    """Fill times, rates and ratios."""
    timings = {
        name: timing.Timing(tuple(timing.Measurement(**run) for run in runs))
        for name, runs in timed["timings"].items()
    }
    ceiling = max(timed["ceilings"]["gemm_fp32"], timed["ceilings"]["gemm_bf16"])
    for name, own in timings.items():
        row = rows[name]
        rate = case.flops / own.total / 1e9
        row |= timed["ceilings"]
        row |= {"forward": own.forward, "total": own.total, "cpu": own.cpu}
        row |= {"spread": own.spread, "rounds": len(own.runs)}
        row |= {"gflops": rate, "of_ceiling": rate / ceiling}
        for peer in RATIOS:
            if peer in timings and peer != name:
                row[f"x_{peer}"] = timing.paired_ratio(timings[peer], own)
        if "eager" in timings and name != "eager":
            row["x_eager_cpu"] = timing.paired_ratio(timings["eager"], own, "cpu")
        if case.device == "cuda" and FLOOR in timings and name != FLOOR:
            floor = timings[FLOOR]
            row["of_floor_forward"] = timing.paired_ratio(floor, own, "forward")
            row["of_floor"] = timing.paired_ratio(floor, own)


def compare_with_best(rows: Mapping[str, dict[str, Any]], peers: Collection[str]) -> None:
    """Fill the ratio to the fastest of the peers that have a time."""
    times = [rows[name]["total"] for name in peers if rows[name]["total"] is not None]
    for name, row in rows.items():
        if times and name not in peers and name != FLOOR and row["total"] is not None:
            row["x_best"] = min(times) / row["total"]


def cpu_bars(case: Case, kind: str, row: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Each bar of time and memory with whether it is met, on a CPU."""
    least, ratio = SPEED_BARS.get((kind, case.dtype)), row["x_eager"]
    if least is not None and ratio is not None:
        yield f"{ratio:.2f} >= {least}x eager", ratio >= least
    if kind == "filtered":
        share = row["of_logits"]
        yield f"{share:.1%} < {MEMORY_BAR:.0%} of logits", share < MEMORY_BAR


def card_bars(case: Case, kind: str, row: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """As ``cpu_bars``, on a card."""
    rate, ratio, share = row["of_floor_forward"], row["x_best"], row["of_gradients"]
    if kind == "filtered" and rate is not None:
        bar = CARD_FORWARD_BAR
        yield f"forward {rate:.0%} >= {bar:.0%} of the bare product", rate >= bar
    if kind == "filtered" and case.data.startswith("plaw") and ratio is not None:
        yield f"{ratio:.2f} >= {CARD_PEER_BAR}x best peer", ratio >= CARD_PEER_BAR
    yield f"{share:.1%} < {CARD_MEMORY_BAR:.0%} of gradients", share < CARD_MEMORY_BAR


def bars(
    case: Case, subject: Subject, row: Mapping[str, Any], yardstick: Mapping[str, float]
) -> list[str]:
    """Each bar that applies to a row, with pass or MISS."""
    if not subject.ours or subject.bar is None:
        return []

    def verdict(text: str, passed: bool) -> str:
        return f"{text} {'pass' if passed else 'MISS'}"

    found = [
        verdict(*bar)
        for bar in (card_bars if case.device == "cuda" else cpu_bars)(case, subject.bar, row)
    ]
    for name, key in (("dE", "de"), ("dC", "dc")):
        error, limit = row[f"{key}_error"], yardstick[key]
        found.append(
            verdict(f"{name} {error:.1e} <= eager bf16 {limit:.1e}", error <= ERROR_SLACK * limit)
        )
    return found


def place(name: str) -> int:
    """Position of a subject in every table; peers that are not in ORDER come last."""
    return ORDER.index(name) if name in ORDER else len(ORDER)
