"""What the gradient filter keeps and errs on a trained model: the pocket Gemma-2.

    python benchmarks/filter_table.py --pocket small --save

Held-out tokens of the pocket model, exact float32 gradients as the truth. Orders and profiles
marked "other batch" come from as many tokens of the training text. Three tables: the fraction kept
by vocabulary order and granularity; errors without and with mass compensation; and the kernels
themselves. A flat, small model is the hard case for a filter: sharper ones keep less.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gemma_ext
from gemma_ext.bench import report
from gemma_ext.bench.filtering import Blocks, ExactRows, descending, keep_blocks, outcome
from gemma_ext.pocket import Pocket, load

RESULTS = Path(__file__).parent / "results"
EPS = 2.0**-12
GRANULARITIES = (Blocks(1, 256), Blocks(8, 256), Blocks(128, 128), Blocks(128, 256))
KEPT_COLUMNS = {"order": ("order of columns", "")} | {
    str(blocks): (str(blocks), ".3f") for blocks in GRANULARITIES
}
ERROR_COLUMNS = {
    "row": ("blocks, order, eps", ""),
    "kept": ("kept", ".3f"),
    "dropped": ("dropped", ".4f"),
    "de_plain": ("dE plain", ".1e"),
    "de": ("dE compensated", ".1e"),
    "dc_plain": ("dC plain", ".1e"),
    "dc": ("dC compensated", ".1e"),
}
KERNEL_COLUMNS = {
    "row": ("linear_cross_entropy(...)", ""),
    "kept": ("kept", ".3f"),
    "dropped": ("dropped", ".4f"),
    "eps": ("eps", ".2e"),
    "de": ("dE", ".1e"),
    "dc": ("dC", ".1e"),
}


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    pocket = load(options.pocket)
    facts = report.machine()
    softcap = pocket.model.config.final_logit_softcapping
    c = pocket.model.get_output_embeddings().weight.detach().float()
    batches = (
        hidden_states(pocket, ids, options.tokens) for ids in (pocket.heldout_ids, pocket.train_ids)
    )
    here, other = (ExactRows(e, c, targets, softcap) for e, targets in batches)
    model = (
        f"pocket {options.pocket}: V={c.shape[0]} D={c.shape[1]}, {len(here.targets)} held-out "
        f"tokens, entropy {here.entropy():.2f} nats, eps {EPS:.2e}"
    )
    counts = torch.bincount(pocket.train_ids.flatten(), minlength=len(c))
    tables = {
        "Fraction kept by order": (kept_rows(here, other, counts), KEPT_COLUMNS),
        "Errors without and with compensation": (error_rows(here, other), ERROR_COLUMNS),
        "The kernels, fp32": (kernel_rows(here, other, softcap), KERNEL_COLUMNS),
    }
    parts = [report.header(facts | {"model": model}).replace("# ", "- ")]
    for title, (rows, columns) in tables.items():
        parts += [f"## {title}", report.table(rows, columns)]
    text_out = "\n\n".join(parts) + "\n"
    print(text_out)
    if options.save:
        folder = RESULTS / facts["device"]
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"filter_{options.pocket}"
        flags = f"--pocket {options.pocket} --tokens {options.tokens} --save"
        command = f"`python benchmarks/filter_table.py {flags}`"
        title = f"# The gradient filter on the pocket model ({options.pocket})"
        (folder / f"{stem}.md").write_text(f"{title}\n\n{command}\n\n{text_out}")
        record = {"machine": facts, "model": model} | {t: rows for t, (rows, _) in tables.items()}
        (folder / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")


@torch.no_grad()
def hidden_states(pocket: Pocket, ids: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """[N, D] last hidden states and [N] next-token targets of the first ``tokens`` ids."""
    length = min(256, pocket.model.config.max_position_embeddings)
    ids = ids.flatten()[: tokens // length * (length + 1)]
    windows = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)
    if windows.numel() == 0:
        raise ValueError(f"tokens: expected at least {length + 1} ids, got {len(ids)}")
    pocket.model.eval()
    states = [pocket.model.model(part[:, :-1]).last_hidden_state for part in windows.split(4)]
    return torch.cat(states).flatten(0, 1).float(), windows[:, 1:].flatten()


def kept_rows(here: ExactRows, other: ExactRows, counts: Tensor) -> list[dict[str, Any]]:
    """Fraction of blocks kept under each vocabulary order."""
    own = descending(here.kept_count(EPS))
    orders = {
        "natural ids": torch.arange(here.p.shape[1]),
        "mean logit": descending(here.logits.mean(0)),
        "corpus unigram counts": descending(counts),
        "mean probability": descending(here.p.mean(0)),
        "kept count, same batch": own,
        "kept count, other batch": descending(other.kept_count(EPS)),
    }
    by_row = torch.argsort((here.distance >= EPS).sum(1), stable=True)
    rows = [kept_row(name, here.distance, order) for name, order in orders.items()]
    name = "kept count, same batch; rows by kept columns"
    return [*rows, kept_row(name, here.distance[by_row], own)]


def kept_row(name: str, distance: Tensor, order: Tensor) -> dict[str, Any]:
    fractions = {
        str(blocks): keep_blocks(distance, order, blocks, EPS).float().mean().item()
        for blocks in GRANULARITIES
    }
    return {"order": name, **fractions}


def error_rows(here: ExactRows, other: ExactRows) -> list[dict[str, Any]]:
    """Errors of dE and dC; bf16 rounding of G alone as the unit of comparison."""
    natural = torch.arange(here.p.shape[1])
    count = descending(other.kept_count(EPS))
    profile = other.p.mean(0)
    rows = []
    for blocks, order, label, eps, with_profile in (
        (Blocks(128, 128), natural, "natural", EPS, True),
        (Blocks(128, 128), natural, "natural, uniform profile", EPS, False),
        (Blocks(8, 256), natural, "natural", EPS, True),
        (Blocks(8, 256), count, "kept count", EPS, True),
        (Blocks(8, 256), count, "kept count", EPS / 2, True),
        (Blocks(8, 256), count, "kept count", EPS * 4, True),
        (Blocks(128, 128), count, "kept count", EPS, True),
        (Blocks(1, 256), natural, "natural, uniform profile", EPS, False),
        (Blocks(1, 256), count, "kept count", EPS, True),
        (Blocks(1, 256), count, "kept count", EPS / 4, True),
    ):
        found = outcome(here, order, blocks, eps, profile if with_profile else None)
        rows.append({"row": f"{blocks} {label} {power(eps)}", **asdict(found)})
    rounded = here.errors(here.g.bfloat16().float())
    return [*rows, {"row": "rounding G to bf16 alone", **asdict(rounded)}]


def kernel_rows(here: ExactRows, other: ExactRows, softcap: float) -> list[dict[str, Any]]:
    """The shipped operator on the same batch, stateless and with a state from the other batch."""
    rows = [
        kernel_row(here, softcap, label, impl=impl, filter_eps=eps)
        for label, impl, eps in (
            ('impl="exact"', "exact", None),
            (f"filter_eps={power(EPS)}", "cce", EPS),
            ('filter_eps="auto"', "cce", "auto"),
        )
    ]
    for eps, label in ((EPS, power(EPS)), (EPS / 4, power(EPS / 4)), ("auto", '"auto"')):
        state = gemma_ext.VocabState(len(here.c))
        for _ in range(2):  # the first call collects statistics, the second uses the order
            kernel_row(other, softcap, "", impl="cce", filter_eps=EPS, state=state)
        label = f"filter_eps={label}, state=state"
        rows.append(kernel_row(here, softcap, label, impl="cce", filter_eps=eps, state=state))
    return rows


def kernel_row(batch: ExactRows, softcap: float, label: str, **options: Any) -> dict[str, Any]:
    e = batch.e.clone().requires_grad_()
    c = batch.c.clone().requires_grad_()
    out = gemma_ext.linear_cross_entropy(
        e, c, batch.targets, softcap=softcap, reduction="sum", return_stats=True, **options
    )
    out.loss.backward()
    return {
        "row": label,
        "kept": float(out.stats.kept_fraction),
        "dropped": float(out.stats.dropped_mass),
        "eps": None if out.stats.eps is None else float(out.stats.eps),
        "de": ((e.grad - batch.de).norm() / batch.de.norm()).item(),
        "dc": ((c.grad - batch.dc).norm() / batch.dc.norm()).item(),
    }


def power(eps: float) -> str:
    return f"2^{torch.tensor(eps).log2().item():.0f}"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pocket", choices=("nano", "small"), default="small")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each batch")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<device>/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
