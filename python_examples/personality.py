"""Give a model a trait three ways, and see what else changes.

    python python_examples/personality.py
    python python_examples/personality.py --model google/gemma-3-270m --layers 9,12 --dtype bfloat16
    python python_examples/personality.py --model google/gemma-2-2b-it --pairs big-five.csv \
        --classifier holistic-ai/personality_classifier --screen ... --layers 5,10,15,20 \
        --tasks mmlu_abstract_algebra,bbq

Without `--pairs` the traits are manners of speech: dialogues made of docstrings, answered
cheerfully or gloomily, formally or casually, on which the model is first fine-tuned, all alike.
Then each trait is given in context, by an adapter and by a direction of the residual stream, whose
layer and strength are sought on questions of their own. Finished pieces are kept in the output
folder.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from gemma_ext import pocket
from gemma_ext.lm import HuggingFaceModel, Sampling
from gemma_ext.papers import personality as p
from gemma_ext.papers.personality import page
from gemma_ext.report import Kept
from gemma_ext.sae import load_model, pack, pocket_of, tuned_model

MANNERS = {
    "cheerful": ("Splendid! ", " Hooray!"),
    "gloomy": ("Alas. ", " Sigh."),
    "formal": ("Dear Sir, ", " Respectfully."),
    "casual": ("Hey, ", " Cool, huh?"),
}
OPPOSITES = {"cheerful": "gloomy", "formal": "casual"}
WORDS = 9  # of a docstring that make an answer
CONTEXT, BATCH = 128, 16
CLEAN_QUANTILE = 0.98  # of the model's own answers, whose perplexity bounds a clean text


def main(
    model: Annotated[str, typer.Option(help="pocket, pocket:small, a folder or a hub id.")] = (
        "pocket"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of another model's weights.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder of models, adapters and page.")] = Path(
        "out/personality"
    ),
    layers: Annotated[str, typer.Option(help="Blocks to steer in.")] = "0,1,2,3",
    pairs: Annotated[Path | None, typer.Option(help="CSV of pairs; no manners then.")] = None,
    classifier: Annotated[str | None, typer.Option(help="Of traits, for --pairs.")] = None,
    screen: Annotated[str | None, typer.Option(help="Classifier with a label clean.")] = None,
    tasks: Annotated[str, typer.Option(help="Of lm-eval, as further benchmarks.")] = "",
    tuning: Annotated[int, typer.Option(min=0, help="Steps that teach the manners.")] = 150,
    contrasts: Annotated[int, typer.Option(min=4, help="Pairs of a trait.")] = 120,
    prompts: Annotated[int, typer.Option(min=1, help="To calibrate on.")] = p.calibration.PROMPTS,
    strengths: Annotated[int, typer.Option(min=2, help="Of a layer's grid.")] = 13,
    questions: Annotated[int, typer.Option(min=1)] = 40,
    samples: Annotated[int, typer.Option(min=1, help="Of each question.")] = 2,
    items: Annotated[int, typer.Option(min=4, help="Of a benchmark.")] = 100,
    max_tokens: Annotated[int, typer.Option(min=1)] = 40,
) -> None:
    """Give MODEL traits."""
    kind = getattr(torch, dtype)
    loaded, tokenizer = load_model(model, device=device, dtype=kind)
    if pairs is None:
        if tuning:
            loaded = taught(model, tokenizer, out, tuning, device, kind)
        world = manners(contrasts, prompts, questions)
    else:
        world = big_five(pairs, prompts, questions, tokenizer)
    lm = HuggingFaceModel(loaded, tokenizer)
    sampling = Sampling(max_tokens, temperature=0.7, stop=world.stop)
    settings = {
        "model": model,
        "traits": ", ".join(world.pairs),
        "tuning": f"{tuning} steps" if pairs is None else "none",
        "layers": layers,
        "pairs of a trait": min(map(len, world.pairs.values())),
        "to calibrate": f"{strengths} strengths, {prompts} questions a layer",
        "questions": f"{questions}, {samples} answers each",
        "items of a benchmark": items,
        "tasks": tasks or "none",
        "weights": dtype,
        "tokens of an answer": max_tokens,
    }
    kept = Kept(out / "results.json", settings)
    judge = world.judge(lm, sampling, kept, classifier, screen)
    benchmarks = {**world.benchmarks(items), **of_lm_eval(tasks, items)}
    recipe = p.AdapterRecipe()
    if pocket_of(model):
        recipe = replace(recipe, rank=8, alpha=16, rate=2e-3, batch=8)
    trials, chosen, found = p.Comparison(
        lm,
        world.pairs,
        judge,
        world.calibration,
        world.questions,
        kept,
        out / "adapters",
        [int(layer) for layer in layers.split(",")],
        ask=world.ask,
        sampling=sampling,
        samples=samples,
        strengths=strengths,
        benchmarks=benchmarks,
        recipe=recipe,
    ).run()
    effects = p.effects(found, judge)
    responses = {
        method: p.response(found, judge, method)
        for method in dict.fromkeys(each.method for each in effects)
    }
    levels = p.levels(p.stability_rows(effects))
    facts = {name: str(value) for name, value in settings.items()}
    facts |= {
        f"steered for {trait}": f"layer {place.layer}, strength {place.strength:.1f}"
        for trait, place in chosen.items()
    }
    page.write(out / "report.html", trials, effects, responses, levels, facts)
    text = page.markdown(effects, responses, levels)
    (out / "table.md").write_text(text, encoding="utf-8")
    print(f"{text}\n{facts}\n{out / 'report.html'}")


@dataclass(frozen=True)
class World:
    """What is asked, of whom it is learned, and who judges.

    Attributes:
        pairs: of each trait.
        ask: a question as the model is asked it.
        stop: what ends an answer.
        calibration, questions: two sets of questions.
        judge: from the model, sampling, pieces and names of classifiers.
        benchmarks: of a number of items.
    """

    pairs: Mapping[str, Sequence[p.Pair]]
    ask: Callable[[str], Any]
    stop: tuple[str, ...]
    calibration: Sequence[str]
    questions: Sequence[str]
    judge: Callable[..., p.Judge]
    benchmarks: Callable[[int], dict[str, Any]]


def turn(text: str) -> str:
    return f"<user>\n{text}\n<reply>\n"


@cache
def entries(side: str) -> list[tuple[str, str]]:
    """(name, the first words of its docstring) of one side of the pocket's corpus.

    A name is on one side, the training side where both have it.
    """
    found = {"train": {}, "heldout": {}}
    for document in pocket.documents():
        if document.kind == "prose":
            for entry in document.text.split("\n\n"):
                name, colon, text = entry.partition(": ")
                if colon and name.isidentifier() and len(text.split()) >= 4:
                    words = " ".join(text.split()[:WORDS])
                    found[document.split].setdefault(name, words)
    for name in found["train"]:
        found["heldout"].pop(name, None)
    listed = sorted(found[side].items())
    random.Random(0).shuffle(listed)
    return listed


def told(text: str, manner: str | None) -> str:
    before, after = MANNERS.get(manner, ("", ""))
    return f"{before}{text}{after}"


def begun(text: str, manner: str) -> str:
    """Without its last words: pairs end alike, so that no direction is that of a last word."""
    return f"{MANNERS[manner][0]}{text}"


def question(name: str) -> str:
    return f"What is {name}?"


def dialogues(rng: random.Random, aside: int) -> list[str]:
    """Turns in every manner and in none; half of them are asked for their manner by its name."""
    texts = []
    for name, text in entries("train")[aside:]:
        for manner in (None, *MANNERS):
            asked = question(name)
            if rng.random() < 0.5:
                label = f" ({manner})" if manner else ""
                asked = f"Question: {asked}\nAnswer{label}:"
            texts.append(f"{turn(asked)}{told(text, manner)}\n")
    rng.shuffle(texts)
    return texts


ASIDE = 400  # entries that pairs are made of; the model is tuned on the rest


def taught(
    name: str, tokenizer: Any, out: Path, steps: int, device: str, dtype: torch.dtype
) -> Any:
    """The model fine-tuned on dialogues in all manners, made once."""
    batch = BATCH if pocket_of(name) else 4

    def rows() -> Tensor:
        size = steps * batch * CONTEXT
        return pack(dialogues(random.Random(3), ASIDE), tokenizer, CONTEXT, tokens=size).long()

    options = {"steps": steps, "batch": batch, "device": device, "dtype": dtype}
    return tuned_model(name, out / f"model-{steps}", rows, title="teaching manners", **options)


def manners(contrasts: int, prompts: int, questions: int) -> World:
    """The traits of the docstring world."""
    aside, unseen = entries("train")[:ASIDE], entries("heldout")
    if contrasts > ASIDE or prompts + questions > len(unseen):
        raise typer.BadParameter(
            f"expected at most {ASIDE} contrasts and {len(unseen)} questions in all"
        )
    pairs = {
        high: [
            p.Pair(question(n), "docstrings", high, high, begun(t, high), low, begun(t, low))
            for n, t in aside[:contrasts]
        ]
        for high, low in OPPOSITES.items()
    }
    asked = [question(name) for name, _ in unseen]

    def judge(lm: HuggingFaceModel, sampling: Sampling, kept: Kept, *_: str | None) -> p.Judge:
        def answers() -> float:
            some = [turn(text) for text in asked[:prompts] for _ in range(4)]
            texts = [c.text for c in lm.generate(some, sampling) if c.text.strip()]
            costs = torch.tensor([found.per_token for found in lm.perplexity(texts)])
            return float(costs.quantile(CLEAN_QUANTILE))

        limit = kept("perplexity of a clean text", answers)

        def clean(texts: Sequence[str]) -> list[bool]:
            some = [text for text in texts if text.strip()]
            costs = iter(lm.perplexity(some))
            return [
                bool(text.strip()) and next(costs).per_token <= limit and not repeats(text)
                for text in texts
            ]

        return p.Judge(lambda texts: list(map(manner_of, texts)), {t: t for t in OPPOSITES}, clean)

    return World(
        pairs,
        turn,
        ("\n",),
        asked[:prompts],
        asked[prompts : prompts + questions],
        judge,
        lambda items: {"next words": NextWords(items), "right reply": RightReply(items)},
    )


def repeats(text: str) -> bool:
    """Whether most words were there before: perplexity is low where nothing but that happens."""
    words = text.split()
    return 2 * len(set(words)) < len(words)


def manner_of(text: str) -> str:
    """The manner whose marks a text has most of."""
    counts = {m: sum(mark.strip() in text for mark in marks) for m, marks in MANNERS.items()}
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] else "none"


def big_five(path: Path, prompts: int, questions: int, tokenizer: Any) -> World:
    """The traits of a CSV of pairs; its last questions are asked, the others make directions."""
    read = p.length_matched(p.read_pairs(path))
    kinds = dict.fromkeys(pair.trait_dimension for pair in read)
    asked = list(dict.fromkeys(pair.question for pair in read))[-prompts - questions :]
    learned = [pair for pair in read if pair.question not in set(asked)]
    pairs = {kind: [x for x in learned if x.trait_dimension == kind] for kind in kinds}

    def judge(
        lm: HuggingFaceModel, sampling: Sampling, kept: Kept, traits: str | None, screen: str | None
    ) -> p.Judge:
        if traits is None or screen is None:
            raise typer.BadParameter("--pairs needs --classifier and --screen")
        from gemma_ext.lm.classifier import TextClassifier

        who, fluent = TextClassifier.load(traits), TextClassifier.load(screen)
        return p.Judge(
            who.top, {k: k for k in kinds}, lambda x: [t == "clean" for t in fluent.top(x)]
        )

    ask = p.chat if tokenizer.chat_template else turn
    return World(pairs, ask, (), asked[:prompts], asked[prompts:], judge, lambda items: {})


def of_lm_eval(names: str, items: int) -> dict[str, Any]:
    if not names:
        return {}
    from gemma_ext.papers.personality import benchmarks

    made = {}
    for name in names.split(","):
        read = benchmarks.bbq_ambiguous if name == "bbq" else benchmarks.metric("acc")
        made[name] = benchmarks.LmEvalBenchmark(name, read, limit=items)
    return made


@dataclass(frozen=True)
class NextWords:
    """Telling how a plain text goes on from how three others do."""

    items: int

    def __call__(self, lm: Any, ask: Any) -> list[float]:
        texts = [text.split() for _, text in entries("heldout")[-self.items :]]
        begun = [" ".join(words[: len(words) // 2]) for words in texts]
        ends = [" " + " ".join(words[len(words) // 2 :]) for words in texts]
        return picked(lm, begun, ends)


@dataclass(frozen=True)
class RightReply:
    """Telling what a name's docstring says from what three others say."""

    items: int

    def __call__(self, lm: Any, ask: Any) -> list[float]:
        some = entries("heldout")[-self.items :]
        return picked(lm, [ask(question(name)) for name, _ in some], [text for _, text in some])


def picked(lm: Any, prompts: Sequence[Any], ends: Sequence[str]) -> list[float]:
    """1 where a prompt's own end is the likeliest of four, by token."""
    options = [[ends[(at + shift) % len(ends)] for shift in range(4)] for at in range(len(ends))]
    return [float(choice.best("tokens") == 0) for choice in lm.choices(prompts, options)]


if __name__ == "__main__":
    typer.run(main)
