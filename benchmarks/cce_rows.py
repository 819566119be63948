"""Rows of the loss benchmark: columns, limits, bars, and what fills them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gemma_ext.bench import rows as bench_rows
from gemma_ext.bench.rows import Rows, verdict
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
# On an H100 or H200, D=2304 V=256000 bf16: most time as a multiple of another row, and bytes.
FULL_ROWS, FEW_ROWS = 8192, 1024
FORWARD_BAR = 1.06  # of the bare product, filtered
FILTERED_MS, PEER_BAR = 18.5, 2.2  # at FULL_ROWS with plaw-2.5; times faster than the best peer
FEW_ROWS_BAR = 1.1  # of torch.compile, below FEW_ROWS
EXACT_BARS = {8192: 1.42, 2048: 1.3}  # of the three bare products, by rows
EXACT_MB = 300
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
    row |= dict.fromkeys(["gemm_fp32", "gemm_bf16", "copy"])
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


def add_times(case: Case, rows: Rows, timed: Mapping[str, Any]) -> None:
    floor = FLOOR if FLOOR in rows else None
    bench_rows.add_times(rows, timed, flops=case.flops, peers=RATIOS, floor=floor)


def cpu_bars(case: Case, kind: str, row: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Each bar of time and memory with whether it is met, on a CPU."""
    least, ratio = SPEED_BARS.get((kind, case.dtype)), row["x_eager"]
    if least is not None and ratio is not None:
        yield f"{ratio:.2f} >= {least}x eager", ratio >= least
    if kind == "filtered":
        share = row["of_logits"]
        yield f"{share:.1%} < {MEMORY_BAR:.0%} of logits", share < MEMORY_BAR


def card_bars(case: Case, kind: str, row: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """As ``cpu_bars``, on a card; those of time are for bf16."""
    if case.dtype != "bf16":
        return
    forward, floor, ms = row["of_floor_forward"], row["of_floor"], row["total"]
    if kind == "exact":
        limit = EXACT_BARS.get(case.n)
        if limit is not None and floor is not None:
            yield f"{1 / floor:.2f} <= {limit}x the bare products", floor * limit >= 1
        yield f"{row['extra_mb']:.0f} <= {EXACT_MB} MB", row["extra_mb"] <= EXACT_MB
        return
    if forward is not None and case.n >= FEW_ROWS:
        yield f"forward {1 / forward:.2f} <= {FORWARD_BAR}x torch.mm", forward * FORWARD_BAR >= 1
    if row["x_compile"] is not None and case.n < FEW_ROWS:
        slower = 1 / row["x_compile"]
        yield f"{slower:.2f} <= {FEW_ROWS_BAR}x compile", slower <= FEW_ROWS_BAR
    if case.data == "plaw-2.5" and case.n == FULL_ROWS and ms is not None:
        yield f"{1e3 * ms:.1f} <= {FILTERED_MS} ms", 1e3 * ms <= FILTERED_MS
        if row["x_best"] is not None:
            yield f"{row['x_best']:.2f} >= {PEER_BAR}x best peer", row["x_best"] >= PEER_BAR


def bars(
    case: Case, subject: Subject, row: Mapping[str, Any], yardstick: Mapping[str, float]
) -> list[str]:
    """Each bar that applies to a row, with pass or MISS."""
    if not subject.ours or subject.bar is None:
        return []
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
