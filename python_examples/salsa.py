"""Hold a policy near the average of two fine-tuned models instead of one.

    python python_examples/salsa.py
    python python_examples/salsa.py --seeds 3
    python python_examples/salsa.py --model google/gemma-3-270m --dtype bfloat16 --lora 8 \
        --methods "ppo,salsa,soup start"

Two models are fine-tuned from one start to finish the first sentences of docstrings, with the same
data in two orders. PPO then teaches the first of them to write articles in distinct words, held
near itself (ppo), near the average of both (salsa), starting from that average as well (soup
start), near each of both (multi-kl) or near a moving average of itself (ema). What is compared is
the reward at equal measured divergence. Finished runs are kept in the output folder. Of other
models than the pocket the token embeddings stay as they are.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from gemma_ext import pocket
from gemma_ext.papers import salsa
from gemma_ext.papers.salsa import page, sft, study
from gemma_ext.papers.salsa.training import Options
from gemma_ext.ppo.opening import load_causal
from gemma_ext.report import Kept

ARTICLES = {"the", "a", "an"}
PROMPT = 5  # words
SENTENCE = re.compile(r"(.{40,140}?[a-z)]\.)(?: |$)")


def articles(completions: list[str], **columns: object) -> list[float]:
    """Half of the articles, four at most, and the share of words that are distinct."""
    found = []
    for text in completions:
        words = text.lower().split()
        count = sum(word in ARTICLES for word in words)
        found.append(min(count, 4) / 2 + (len(set(words)) / len(words) if words else 0.0))
    return found


def main(
    model: Annotated[str, typer.Option(help="pocket, pocket:small, a folder or a hub id.")] = (
        "pocket"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the weights that are trained.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder of models, runs and page.")] = Path("out/salsa"),
    seeds: Annotated[int, typer.Option(min=1, help="Pairs of parents, and runs of each.")] = 1,
    methods: Annotated[str, typer.Option(help="Some of them.")] = ",".join(study.METHODS),
    betas: Annotated[str, typer.Option(help="Weights of the divergence.")] = "0.05,0.2",
    sft_steps: Annotated[int, typer.Option(min=1, help="Of a parent.")] = 120,
    sft_rate: Annotated[float, typer.Option(help="Of a parent.")] = 2e-3,
    steps: Annotated[int, typer.Option(min=1, help="Batches of responses.")] = 12,
    batch: Annotated[int, typer.Option(min=2, help="Responses of a batch.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a response.")] = 16,
    rate: Annotated[float, typer.Option(help="Learning rate of the policy.")] = 1e-3,
    every: Annotated[int, typer.Option(min=1, help="Steps between measurements.")] = 4,
    prompts: Annotated[int, typer.Option(min=2, help="Held-out prompts of a measurement.")] = 64,
    held_out: Annotated[int, typer.Option(min=2, help="Held-out sentences of a loss.")] = 200,
    lora: Annotated[
        int, typer.Option(min=0, help="Rank of adapters of parents and policy; 0 for none.")
    ] = 0,
    collapse_beta: Annotated[
        float, typer.Option(help="Of runs that are to collapse; 0 for none.")
    ] = 4.0,
) -> None:
    """PPO, SALSA and their relatives on MODEL."""
    theta_0, tokenizer = load_causal(model, dtype, device)
    train, held = texts("train"), texts("heldout")
    pairs = sft.Pairs(list(map(cut, train)), tokenizer, 64)
    batches = sft.Pairs(list(map(cut, held[:held_out])), tokenizer, 64).batches(50)
    setting = study.Setting(
        steps=steps,
        batch=batch,
        length=length,
        rate=rate,
        betas=tuple(map(float, betas.split(","))),
        every=every,
        embeddings=model.startswith("pocket"),
        lora=lora,
        options=Options(collapse_patience=None),
    )
    facts = {
        "model": model,
        "weights": dtype,
        "seeds": str(seeds),
        "fine-tuning": f"{sft_steps} steps of 16 at {sft_rate:g}, {len(pairs):,} sentences",
        "held-out prompts": str(prompts),
        "held-out sentences": str(held_out),
        **study.facts(setting),
    }
    identity = {k: v for k, v in facts.items() if k not in ("seeds", "betas")}
    kept = Kept(out / "results.json", identity | {"sft": sft_rate, "collapse": collapse_beta})

    @cache
    def parents(seed: int) -> list[Any]:
        made = []
        for order in (2 * seed, 2 * seed + 1):
            folder = out / "parents" / str(order)
            if not folder.exists():
                # one draw of adapters: parents differ in their order alone
                tuned = study.trainable(copy.deepcopy(theta_0), setting.embeddings, lora)
                sft.tune(tuned, pairs, steps=sft_steps, rate=sft_rate, seed=order)
                whole = tuned.merge_and_unload() if lora else tuned
                whole.save_pretrained(folder)
            parent = load_parent(folder, theta_0, device)
            made.append(parent)
        return made

    def checked(seed: int) -> dict[str, Any]:
        """Losses of the parents and their soup, the sweep, and the folder of the soup."""
        two = parents(seed)
        soup = salsa.soup(two)
        mode = salsa.linear_mode(two, soup, batches).require()
        sweep = salsa.alpha_sweep(two, batches)
        folder = out / f"soup-{seed}"
        if not folder.exists():
            names = {f"parents/{2 * seed}": two[0], f"parents/{2 * seed + 1}": two[1]}
            losses = {"parents": mode.parents, "soup": mode.soup}
            entry = salsa.record(names, [0.5, 0.5], soup, checks=losses)
            salsa.save(folder, soup, entry, tokenizer)
        return {
            "seed": seed,
            "start": salsa.held_out_loss(theta_0, batches),
            "parents": mode.parents,
            "soup": mode.soup,
            "alphas": sweep.alphas,
            "losses": sweep.losses,
        }

    chosen = list(range(1, seeds + 1))
    checks = [kept(f"checks, seed {s}", lambda s=s: checked(s)) for s in chosen]
    common = {
        "rewards": articles,
        "prompts": [cut(text)[0] for text in train],
        "held_out": [cut(text)[0] for text in held[:prompts]],
        "tokenizer": tokenizer,
    }
    records = study.study(
        setting,
        seeds=chosen,
        methods=methods.split(","),
        parents=parents,
        theta_0=theta_0,
        kept=kept,
        folder=out / "runs",
        **common,
    )
    collapsing = []
    if collapse_beta:
        collapsing = collapses(setting, collapse_beta, parents, kept, out / "runs", common)
    page.write(out / "report.html", records, checks, collapsing, facts=facts)
    text = page.markdown(records, checks, collapsing)
    (out / "table.md").write_text(text, encoding="utf-8")
    print(f"{text}\n{out / 'report.html'}")


def collapses(
    setting: study.Setting,
    beta: float,
    parents: Callable[[int], list[Any]],
    kept: Kept,
    folder: Path,
    common: dict[str, Any],
) -> list[dict[str, Any]]:
    """Runs of the first seed at a weight that makes silence pay, with what may be done about it."""
    found, least = [], setting.length // 2
    runs = [
        ("ppo", "ppo", Options()),
        ("soup start", "soup start", Options()),
        ("salsa", "salsa", Options()),
        ("salsa, mean of the divergence", "salsa", Options(length_normalised=True)),
        ("salsa, beyond step 0", "salsa", Options(subtract_step_zero=True)),
        (f"salsa, at least {least} tokens", "salsa", Options(min_length=least)),
    ]
    for name, method, options in runs:
        place = f"collapse, {name}, beta {beta:g}"

        def made(method: str = method, options: Options = options, name: str = name) -> Any:
            two = parents(1)
            return study.run(
                method,
                beta,
                1,
                setting=replace(setting, options=replace(options, collapse_patience=2)),
                parents=two,
                anchors={"soup": salsa.soup(two)},
                folder=folder / f"collapse-{name}".replace(" ", "-").replace(",", ""),
                **common,
            )

        found.append({**kept(place, made), "name": name})
    return found


def load_parent(folder: Path, like: Any, device: str) -> Any:
    """A parent as it was written, with the attention of the model it was made from."""
    return (
        type(like)
        .from_pretrained(
            folder,
            dtype=next(like.parameters()).dtype,
            attn_implementation=like.config._attn_implementation,
        )
        .to(device)
        .eval()
    )


@cache
def texts(side: str) -> list[str]:
    """First sentences of docstrings of one side of the corpus; those on both are for training."""
    found: dict[str, dict[str, None]] = {"train": {}, "heldout": {}}
    for document in pocket.documents():
        if document.kind == "prose":
            for entry in document.text.split("\n\n"):
                sentence = SENTENCE.match(" ".join(entry.split()))
                if sentence and len(sentence[1].split()) >= 2 * PROMPT:
                    found[document.split][sentence[1]] = None
    made = [text for text in found[side] if side == "train" or text not in found["train"]]
    random.Random(0).shuffle(made)
    return made


def cut(text: str) -> tuple[str, str]:
    """(prompt, answer)."""
    words = text.split()
    return " ".join(words[:PROMPT]), " " + " ".join(words[PROMPT:])


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    typer.run(main)
