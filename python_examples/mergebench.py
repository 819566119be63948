"""MergeBench: nine ways to merge five experts, tuned, tested and timed by one protocol.

    python python_examples/mergebench.py --model pocket
    python python_examples/mergebench.py --model FOLDER --steps 20 --windows 8 --calibration 8
    python python_examples/mergebench.py --model google/gemma-2-2b --tasks tasks.yml \
        --expert math=MergeBench/gemma-2-2b_math --expert coding=MergeBench/gemma-2-2b_coding ...

Without experts the model is fine-tuned on five domains of the text that comes with Python, one
expert per domain and seed, and scored by next-token accuracy on held-out text of each; with
`--questions 20` by lm-eval, which asks which of four lines of that text comes next. With experts of
your own `--tasks` names lm-eval tasks: domains: {math: {validation: {TASK: METRIC}, test: {...}}},
general: {TASK: METRIC}, falling: [METRIC], include: FOLDER (of task files of your own).

Results are kept beside the table: an interrupted run goes on.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn

from gemma_ext import pocket
from gemma_ext.files import new_folder
from gemma_ext.integrations.transformers import patch
from gemma_ext.papers import mergebench
from gemma_ext.papers.mergebench.scorers import held_out, preceded

GENERAL = "held-out text of all kinds"
SHOWN = 6  # lines before a question


def main(
    model: Annotated[str, typer.Option(help="pocket, a folder or a hub id.")] = "pocket",
    expert: Annotated[list[str] | None, typer.Option(help="DOMAIN=FOLDER_OR_ID, repeated.")] = None,
    tasks: Annotated[Path | None, typer.Option(help="YAML of lm-eval tasks.", exists=True)] = None,
    out: Annotated[Path, typer.Option(help="Folder of experts, results and table.")] = Path(
        "out/mergebench"
    ),
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of fine-tuning an expert.")] = 60,
    embeddings: Annotated[bool, typer.Option(help="Merge embeddings and head as well.")] = False,
    released: Annotated[bool, typer.Option(help="Also what the published code computes.")] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    context: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 128,
    windows: Annotated[int, typer.Option(min=1, help="Of validation; twice that of test.")] = 64,
    calibration: Annotated[int, typer.Option(min=1, help="Windows that methods look at.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Windows of a step; not of the pocket.")] = 4,
    rate: Annotated[float, typer.Option(help="Of learning; not of the pocket.")] = 2e-5,
    questions: Annotated[int, typer.Option(help="Of lm-eval per side, in place of windows.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Algorithm by name, repeated.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples per lm-eval task.")] = None,
) -> None:
    """Run the benchmark on MODEL and write its table and figure."""
    if expert and not tasks:
        raise typer.BadParameter("experts of your own need --tasks")
    if odd := [pair for pair in expert or () if "=" not in pair]:
        raise typer.BadParameter(f"--expert: expected DOMAIN=FOLDER_OR_ID, got {odd[0]!r}")
    recipe = ExpertRecipe(steps, batch, rate)
    makers = Makers(model, out, recipe, context, calibration, device, embeddings)
    if expert:
        folders = dict(pair.split("=", 1) for pair in expert)
        scorer: Any = lm_eval_scorer(tasks, makers.tokenizer, limit)

        def pool(seed: int) -> mergebench.Pool:
            return makers.pool({d: makers.load(folder) for d, folder in folders.items()})
    else:
        scorer = makers.questions(questions) if questions else makers.held_out(windows)

        def pool(seed: int) -> mergebench.Pool:
            return makers.pool({d: makers.expert(d, seed) for d in pocket.DOMAINS})

    ways = mergebench.algorithms(released=released)
    if only:
        known = {way.name: way for way in ways}
        if unknown := set(only) - set(known):
            raise typer.BadParameter(f"--only: expected one of {list(known)}, got {unknown}")
        ways = [known[name] for name in only]
    setting = {"model": model, "experts": expert or [*recipe], "embeddings": embeddings}
    setting |= {"context": context, "calibration": calibration, "limit": limit}
    setting |= {"tasks": tasks.read_text() if tasks else questions or windows}
    out = out / "questions" if questions else out
    outcomes = mergebench.run(pool, ways, scorer, range(seeds), out, typer.echo, setting)
    table = mergebench.rows(outcomes)
    text = mergebench.markdown(table)
    (out / "table.md").write_text(text, encoding="utf-8")
    scored = "next-token accuracy on held-out text"
    if tasks or questions:
        scored = f"lm-eval, tasks of {tasks or 'held-out text: which of four lines comes next'}"
    domains = ", ".join(table[0].by_domain)
    mergebench.write(out / "page.html", table, f"Experts of {model}: {domains}; {scored}.")
    typer.echo(f"{text}\n{out / 'table.md'}, {out / 'page.html'}")


class ExpertRecipe(NamedTuple):
    """Steps of `batch` windows at a peak learning rate."""

    steps: int
    batch: int
    rate: float


class Makers:
    """The base, its experts and their text."""

    def __init__(
        self,
        model: str,
        out: Path,
        recipe: ExpertRecipe,
        context: int,
        calibration: int,
        device: str,
        embeddings: bool,
    ) -> None:
        self.model, self.out, self.recipe = model, out, recipe
        self.context, self.calibrated = context, calibration
        self.device, self.embeddings = device, embeddings
        if model == "pocket":
            loaded = pocket.load("nano")
            self.base, self.tokenizer = loaded.model.to(device), loaded.tokenizer
            self.general = loaded.heldout_ids
            self.begin = None  # trained on windows of a stream
        else:
            from transformers import AutoTokenizer

            self.base = self.load(model)
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.general = None
            self.begin = self.tokenizer.bos_token_id
        self.text: dict[str, pocket.DomainText] = {}

    def load(self, folder: str) -> nn.Module:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(self.device).eval()

    def pool(self, experts: dict[str, nn.Module]) -> mergebench.Pool:
        calibration = {domain: self.calibration(domain) for domain in experts}
        return mergebench.Pool(self.base, experts, calibration, self.embeddings)

    def calibration(self, domain: str) -> list[Tensor]:
        name = domain if domain in pocket.DOMAINS else "prose"
        rows = self.rows(self.domain(name).validation)[: self.calibrated]
        return list(rows.to(self.device).split(8))

    def rows(self, ids: Tensor) -> Tensor:
        """[n, context] windows, behind the id that begins a text."""
        rows = ids[: ids.numel() // self.context * self.context].view(-1, self.context)
        return rows if self.begin is None else preceded(rows, self.begin)

    def domain(self, name: str) -> pocket.DomainText:
        if name not in self.text:
            self.text[name] = pocket.load_domain(name, self.tokenizer)
        return self.text[name]

    def held_out(self, windows: int) -> mergebench.HeldOut:
        def cut(ids: Tensor, count: int) -> Tensor:
            return ids[: count * self.context + 1]

        streams = {}
        for name in pocket.DOMAINS:
            text = self.domain(name)
            streams[name] = {
                "validation": cut(text.validation, windows),
                "test": cut(text.test, 2 * windows),
            }
        general = {GENERAL: cut(self.general_ids(), 2 * windows)}
        return mergebench.HeldOut(streams, general, self.context, batch=8, begin=self.begin)

    def questions(self, count: int) -> mergebench.LmEval:
        """lm-eval's tasks of the same text."""
        folder, metric = self.out / "tasks", "acc_norm,none"
        sides, general = {}, "general_test"
        for name in pocket.DOMAINS:
            text = self.domain(name)
            sides[name] = {side: {f"{name}_{side}": metric} for side in ("validation", "test")}
            write_questions(folder, f"{name}_validation", self.lines(text.validation), count)
            write_questions(folder, f"{name}_test", self.lines(text.test), count)
        write_questions(folder, general, self.lines(self.general_ids()), count)
        options = {"task_manager": tasks_in(folder), "bootstrap_iters": 0}
        return mergebench.LmEval(self.tokenizer, sides, {general: metric}, options=options)

    def lines(self, ids: Tensor) -> list[str]:
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return [line for line in text.splitlines() if line.strip()]

    def general_ids(self) -> Tensor:
        """Held-out text of all kinds."""
        if self.general is None:
            held = [doc.text for doc in pocket.documents() if doc.split == "heldout"][:40]
            self.general = self.tokenizer("\n".join(held), return_tensors="pt").input_ids[0]
        return self.general

    def expert(self, domain: str, seed: int) -> nn.Module:
        """The base fine-tuned on one domain, made once."""
        if self.model == "pocket":
            recipe = pocket.ExpertRecipe(steps=self.recipe.steps, seed=seed)
            return pocket.load_expert(domain, "nano", recipe).to(self.device)
        steps, batch, rate = self.recipe
        folder = self.out / "experts" / f"{domain}-{seed}-{steps}x{batch}x{self.context}-{rate:g}"
        if not folder.exists():
            tuned = self.fine_tuned(domain, seed)
            typer.echo(self.learned(domain, tuned))
            with new_folder(folder) as beside:
                tuned.save_pretrained(beside)
        return self.load(str(folder))

    def learned(self, domain: str, tuned: nn.Module) -> str:
        ids = self.domain(domain).validation[: self.calibrated * self.context + 1]
        options = {"context": self.context, "batch": 8, "begin": self.begin}
        before, after = (held_out(m, ids, **options)[0] for m in (self.base, tuned.eval()))
        return f"{domain}: held-out loss of a token {before:.3f}, after training {after:.3f}"

    def fine_tuned(self, domain: str, seed: int) -> nn.Module:
        from transformers import Trainer, TrainingArguments

        model = self.load(self.model).float()
        arguments = TrainingArguments(
            output_dir=str(self.out / "training"),
            per_device_train_batch_size=self.recipe.batch,
            max_steps=self.recipe.steps,
            learning_rate=self.recipe.rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, self.recipe.steps // 10),
            bf16=True,
            save_strategy="no",
            report_to=[],
            use_cpu=self.device == "cpu",
            seed=seed,
        )
        examples = [
            {"input_ids": row, "labels": row} for row in self.rows(self.domain(domain).train)
        ]
        Trainer(model=patch(model), args=arguments, train_dataset=examples).train()
        return model.to(self.base.dtype)


def lm_eval_scorer(tasks: Path, tokenizer: Any, limit: int | None) -> mergebench.LmEval:
    import yaml

    given = yaml.safe_load(tasks.read_text(encoding="utf-8"))
    if unknown := set(given) - {"domains", "general", "falling", "include"}:
        raise typer.BadParameter(f"{tasks}: expected domains and general, got {sorted(unknown)}")
    options: dict[str, Any] = {"bootstrap_iters": 0}
    if "include" in given:
        options["task_manager"] = tasks_in(tasks.parent / given["include"])
    return mergebench.LmEval(
        tokenizer,
        given["domains"],
        given["general"],
        frozenset(given.get("falling", ())),
        limit,
        options,
    )


def tasks_in(folder: Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder))


def write_questions(folder: Path, name: str, lines: list[str], count: int) -> None:
    """A task of lm-eval: after `SHOWN` lines, the next one or one of three from elsewhere."""
    import yaml

    draw = random.Random(name)
    records = []
    for start in draw.sample(range(len(lines) - SHOWN), count):
        before, right = lines[start : start + SHOWN], lines[start + SHOWN]
        wrong = draw.sample(sorted(set(lines) - {right}), 3)
        records.append({"before": "\n".join(before) + "\n", "options": [right, *wrong]})
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{before}}",
        "doc_to_choice": "options",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc_norm"}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


if __name__ == "__main__":
    torch.manual_seed(0)
    typer.run(main)
