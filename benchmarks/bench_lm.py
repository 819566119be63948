"""Scoring by lm-eval's `hf` model and by `gemma_ext` of the same requests, in turn in one process.

    python benchmarks/bench_lm.py                        # small body, head of a Gemma 2: V=256000
    python benchmarks/bench_lm.py --model FOLDER         # a real model, on text of its own tokens
    python benchmarks/bench_lm.py --batch 1 4 16 --cases options --save

Both wrap one model. A batch of B is B requests to `hf`. Ours has no such number: it runs `--tokens`
at a time, and its memory, which is that of the model's own layers on so many, does not move with B.
A row whose log-probabilities differ from those of `hf` has no time.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from gemma_ext.bench import report, timing
from gemma_ext.bench.options import parser_of
from gemma_ext.bench.rows import verdict
from gemma_ext.bench.subject import DTYPES
from gemma_ext.lm.harness import GemmaExtLM

Request = tuple[None, list[int], list[int]]  # as lm-eval has it: text, context, continuation
RESULTS = Path(__file__).parent / "results"
KEY = ("model", "dtype", "case", "batch")
COLUMNS = {
    "name": ("scored by", ""),
    "total": ("s", ".2f"),
    "spread": ("spread", ".0%"),
    "rate": ("tokens/s", ".0f"),
    "x_hf": ("x hf", ".2f"),
    "x_hf_cpu": ("x hf, cpu time", ".2f"),
    "peak_mb": ("peak MB", ".0f"),
    "error": ("largest error", ".1e"),
    "same_greedy": ("same greedy", ".0%"),
    "note": ("note", ""),
}
ORDER = ("hf", "gemma_ext")
LAYOUT = report.Layout(
    title="Scoring by a language model",
    about="`python benchmarks/bench_lm.py --save`; columns are explained in `../../README.md`.",
    case=KEY,
    label=lambda row: f"{row['model']} {row['dtype']}, {row['case']}, batches of {row['batch']}",
    columns=COLUMNS,
    place=ORDER.index,
)
SLACK = {"fp32": 1e-4, "bf16": 0.1}  # of a token's log-probability; hf rounds bf16 logits
BAR = 1.5  # times the tokens/s of hf, at a vocabulary of 256,000 or more
WIDE = 256_000
CONTEXT = 96


@dataclass(frozen=True)
class Case:
    """Requests of one kind.

    Attributes:
        prompts: how many. options: of each. tokens: of an option, from least to most.
        context: tokens of a prompt; 1 is a text from its beginning.
    """

    prompts: int
    options: int
    tokens: tuple[int, int]
    context: int = CONTEXT


CASES = {
    "options": Case(4, 4, (4, 12)),
    "letters": Case(16, 4, (1, 1)),
    "continuations": Case(16, 1, (16, 32)),
    "passages": Case(16, 1, (CONTEXT, 128), context=1),
}


def requests_of(case: Case, ids: Callable[[int], list[int]], seed: int = 0) -> list[Request]:
    """Contexts of three quarters to all of the case's length, continuations between its bounds."""
    draw = random.Random(seed)
    made = []
    for _ in range(case.prompts):
        context = ids(draw.randint(max(1, 3 * case.context // 4), case.context))
        made += [(None, context, ids(draw.randint(*case.tokens))) for _ in range(case.options)]
    return made


def zipf_ids(vocab: int) -> Callable[[int], list[int]]:
    """Random ids, of which the n-th has a share of 1/n."""
    draw = random.Random(0)
    return lambda count: [int(vocab ** draw.random()) - 1 for _ in range(count)]


def text_ids(tokenizer: Any) -> Callable[[int], list[int]]:
    """One piece after another of Python's own sources."""
    from gemma_ext.pocket import documents

    text = "\n".join(document.text for document in documents(400_000))
    stream = iter(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return lambda count: [next(stream) for _ in range(count)]


def build(folder: str | None, dtype: torch.dtype) -> tuple[Any, Any, Callable[[int], list[int]]]:
    """A model, a tokenizer and a source of token ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    from gemma_ext import pocket

    if folder is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return model.eval(), tokenizer, text_ids(tokenizer)
    config = Gemma2Config(
        vocab_size=WIDE, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=128, query_pre_attn_scalar=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).to(dtype).eval()
    return model, pocket.load_text("nano").tokenizer, zipf_ids(WIDE)


def subjects(model: Any, tokenizer: Any, batch: int, tokens: int) -> dict[str, HFLM]:
    options = {"tokenizer": tokenizer, "max_length": 1024}
    ours = GemmaExtLM(model, **options, batch_tokens=tokens, show_progress=False)
    return {"hf": HFLM(model, **options, batch_size=batch), "gemma_ext": ours}


def run_case(
    model: Any,
    tokenizer: Any,
    asked: list[Request],
    dtype: str,
    batch: int,
    tokens: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """A row of each subject, without the columns of the case."""
    count = sum(len(context) + len(targets) for _, context, targets in asked)
    rows, steps, answers = {}, {}, {}
    for name, lm in subjects(model, tokenizer, batch, tokens).items():
        score = partial(lm._loglikelihood_tokens, asked, disable_tqdm=True)
        score()
        with timing.PeakMemory() as memory:
            answers[name] = score()
            peak = memory.peak() / 2**20
        rows[name] = {"name": name, "note": "", "bars": "", "peak_mb": peak}
        rows[name] |= compare(answers["hf"], answers[name], asked)
        if rows[name]["error"] <= SLACK[dtype]:
            steps[name] = lambda mark, score=score: score()
        else:
            rows[name]["note"] = f"RED: off by {rows[name]['error']:.1e} a token"
    timings = timing.interleave(steps, seconds=seconds, warmup=0)
    for name, own in timings.items():
        row = rows[name]
        row |= {"total": own.total, "spread": own.spread, "rate": count / own.total}
        if name != "hf":
            row["x_hf"] = timing.paired_ratio(timings["hf"], own)
            row["x_hf_cpu"] = timing.paired_ratio(timings["hf"], own, "cpu")
            if model.config.vocab_size >= WIDE:
                text = f"{row['x_hf']:.2f} x tokens/s of hf, {BAR} asked,"
                row["bars"] = verdict(text, row["x_hf"] >= BAR)
    return list(rows.values())


def compare(
    theirs: Sequence[tuple[float, bool]],
    ours: Sequence[tuple[float, bool]],
    asked: Sequence[Request],
) -> dict[str, float]:
    """Largest error of a request by its tokens; share of equal greedy flags."""
    errors = [
        abs(one[0] - other[0]) / len(tokens)
        for one, other, (_, _, tokens) in zip(theirs, ours, asked, strict=True)
    ]
    same = sum(one[1] == other[1] for one, other in zip(theirs, ours, strict=True))
    return {"error": max(errors), "same_greedy": same / len(asked)}


def label_of(config: Any, folder: str | None) -> str:
    text = config.get_text_config()
    name = f"{text.model_type}-{text.num_hidden_layers}x{text.hidden_size}-V{text.vocab_size}"
    return name if folder is None else f"{name}-trained"


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    model, tokenizer, ids = build(options.model, DTYPES[options.dtype])
    label = label_of(model.config, options.model)
    facts = report.machine()
    print(report.header(facts), flush=True)
    failed = False
    for case in options.cases:
        asked = requests_of(CASES[case], ids)
        for batch in options.batch:
            values = dict(zip(KEY, (label, options.dtype, case, batch), strict=True))
            blank: Mapping[str, Any] = {**values, **dict.fromkeys(COLUMNS)}
            sizes = (batch, options.tokens, options.seconds)
            found = run_case(model, tokenizer, asked, options.dtype, *sizes)
            rows = [{**blank, **row} for row in found]
            print(
                f"\n## {LAYOUT.label(rows[0])}\n{report.table_and_bars(rows, COLUMNS)}", flush=True
            )
            failed |= any(row["note"] for row in rows)
            if options.save:
                report.save(RESULTS / facts["device"], "lm", rows, facts, LAYOUT)
    raise SystemExit(int(failed))


def parse_options() -> argparse.Namespace:
    parser = parser_of(
        __doc__, dtype="bf16", dtypes=SLACK, threads=torch.get_num_threads(), seconds=10.0
    )
    parser.add_argument("--model", metavar="FOLDER", help="of weights and a tokenizer")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", type=int, default=512, help="that ours runs at a time")
    return parser.parse_args()


if __name__ == "__main__":
    main()
