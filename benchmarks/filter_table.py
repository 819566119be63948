"""What the gradient filter does to the gradient of every parameter of a trained model.

    python benchmarks/filter_table.py --model FOLDER --save       # a causal LM and its tokenizer
    python benchmarks/filter_table.py --model FOLDER --text FILE
    python benchmarks/filter_table.py --pocket small --save       # the pocket Gemma-2

Errors are relative to the exact float32 gradients. That of dE does not show what matters: what a
filter leaves out may point the same way in every token, while the gradients of the tokens largely
cancel. The unit of comparison is the same model trained in bfloat16 by transformers.
"""

from __future__ import annotations

import argparse
import copy
import gc
import inspect
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from step_model import head_of
from torch import Tensor, nn

import gemma_ext
from gemma_ext.bench import report
from gemma_ext.bench.filtering import Gradients, Rule, gradients, large_blocks, sampled_strips
from gemma_ext.bench.options import parser_of
from gemma_ext.integrations.transformers import patch, unpatch

RESULTS = Path(__file__).parent / "results"
EPS = tuple(2.0**-k for k in (6, 7, 8, 10))
CUT_CE_EPS = 2.0**-12
SAMPLES = "filter_seed" in inspect.signature(gemma_ext.linear_cross_entropy).parameters
COLUMNS = {
    "row": ("gradient of the head", ""),
    "kept": ("kept", ".4f"),
    "de": ("dE err", ".1e"),
    "all": ("all parameters err", ".2e"),
    "backbone": ("without embeddings and head", ".2e"),
}


class Trained:
    """A float32 model on a text: hidden states with their graph, and exact gradients.

    Args:
        ids: [1, T]; its T - 1 next tokens are the labels.
    """

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.ids, self.labels = model, ids, ids[0, 1:]
        self.head = head_of(model)
        self.hidden = model.base_model(input_ids=ids).last_hidden_state[0, :-1]
        self.de = torch.empty(0)
        self.exact: dict[str, Tensor] = {}
        exact = self.by_rule()
        self.de = exact.de
        self.backward(exact)
        self.exact = {name: p.grad.clone() for name, p in model.named_parameters()}

    def by_rule(self, *rule: Rule) -> Gradients:
        e, c = self.hidden.detach(), self.head.weight.detach()
        return gradients(e, c, self.labels, self.head.softcap, *rule)

    def by_loss(self, **options: Any) -> Gradients:
        """Gradients of the head by `gemma_ext.linear_cross_entropy`."""
        e = self.hidden.detach().requires_grad_()
        c = self.head.weight.detach().requires_grad_()
        out = gemma_ext.linear_cross_entropy(
            e, c, self.labels, softcap=self.head.softcap, return_stats=True, **options
        )
        out.loss.backward()
        return Gradients(e.grad, c.grad, float(out.stats.kept_fraction))

    def backward(self, head: Gradients) -> None:
        """Gradients of all parameters from those of the head."""
        self.model.zero_grad(set_to_none=True)
        self.hidden.backward(head.de, retain_graph=True)
        weight = self.head.weight
        weight.grad = head.dc if weight.grad is None else weight.grad.add_(head.dc)

    def row(self, name: str, head: Gradients) -> dict[str, Any]:
        self.backward(head)
        error = ((head.de - self.de).norm() / self.de.norm()).item()
        return {"row": name, "kept": head.kept, "de": error} | self.errors(self.model)

    def errors(self, model: nn.Module) -> dict[str, float]:
        """Relative errors of the gradients that a model of the same parameters holds."""
        ends = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
        off, whole = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}
        for name, p in model.named_parameters():
            exact, at_end = self.exact[name], id(p) in ends
            off[at_end] += (p.grad.float() - exact).square().sum(dtype=torch.float64).item()
            whole[at_end] += exact.square().sum(dtype=torch.float64).item()
        return {
            "all": math.sqrt(sum(off.values()) / sum(whole.values())),
            "backbone": math.sqrt(off[False] / whole[False]),
        }


def table_rows(trained: Trained, form: str, seed: int) -> Iterator[dict[str, Any]]:
    """Heads in a float32 model, then whole models in bfloat16."""
    yield trained.row("ours, exact", trained.by_loss(impl="exact"))
    for eps in EPS:
        if form == "formula":
            row, head = "sampled by formula, tau", trained.by_rule(sampled_strips(eps, seed))
        else:
            row, options = "ours, filter_eps", {"filter_seed": seed} if SAMPLES else {}
            head = trained.by_loss(impl="cce", filter_eps=eps, **options)
        default = ", the default in 16 bits" if eps == 2.0**-8 else ""
        yield trained.row(f"{row} {power(eps)}{default}", head)
    cut_ce = trained.by_rule(large_blocks(CUT_CE_EPS))
    yield trained.row(f"cut-cross-entropy's rule by formula, {power(CUT_CE_EPS)}", cut_ce)
    del cut_ce
    trained.model.zero_grad(set_to_none=True)
    trained.hidden = None  # and its graph
    model = copy.deepcopy(trained.model).bfloat16()
    gc.collect()
    for name, options in (
        ("eager", None),
        ("ours, exact", {"impl": "exact"}),
        ("ours by default", {}),
    ):
        model.zero_grad(set_to_none=True)
        if options is not None:
            patch(model, **options)
        model(input_ids=trained.ids, labels=trained.ids).loss.backward()
        unpatch(model)
        yield {"row": f"whole model in bfloat16, {name}"} | trained.errors(model)


def power(eps: float) -> str:
    return f"2^{math.log2(eps):.0f}"


def trained_model(options: argparse.Namespace) -> tuple[str, Trained]:
    """The model and text that the options name, with a line about them."""
    if options.model is None:
        from gemma_ext.pocket import load

        pocket = load(options.pocket)
        model, name, text = pocket.model.float(), f"pocket {options.pocket}", "held-out text"
        longest = model.config.max_position_embeddings
        ids = pocket.heldout_ids.flatten()[: min(options.tokens, longest) + 1][None]
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        name, text = model.config.model_type, options.text.name
        ids = tokenizer(options.text.read_text(), return_tensors="pt").input_ids
        ids = ids[:, : options.tokens + 1]
    model.config.use_cache = False
    v, d = head_of(model).weight.shape
    return f"{name}: V={v} D={d}, {ids.shape[1] - 1} tokens of {text}", Trained(model.train(), ids)


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    facts = report.machine()
    about, trained = trained_model(options)
    form = options.form or ("kernels" if SAMPLES else "formula")
    facts |= {"model": about, "form": f"filtered rows by {form}, seed {options.seed}"}
    print(report.header(facts), flush=True)
    rows = []
    for row in table_rows(trained, form, options.seed):
        rows.append(row)
        print(f"{row['row']}: {row['all']:.2e}", flush=True)
    print(f"\n{report.table(rows, COLUMNS)}")
    if options.save:
        name = options.pocket if options.model is None else trained.model.config.model_type
        save(RESULTS / facts["device"], f"filter_{name}", facts, rows)


def save(folder: Path, stem: str, facts: dict[str, str], rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    header = report.header(facts).replace("# ", "- ")
    parts = ["# The gradient filter on a trained model", "`python benchmarks/filter_table.py`"]
    parts += [header, report.table(rows, COLUMNS)]
    (folder / f"{stem}.md").write_text("\n\n".join(parts) + "\n")
    record = {"machine": facts, "rows": rows}
    (folder / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__, threads=os.cpu_count())
    parser.add_argument("--model", help="folder or id of a causal LM with its tokenizer")
    parser.add_argument("--text", type=Path, default=Path(argparse.__file__))
    parser.add_argument("--pocket", choices=("nano", "small"), default="small")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--form", choices=("kernels", "formula"), help="who makes filtered rows")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    return parser.parse_args()


if __name__ == "__main__":
    main()
