"""What did a fine-tune add? Crosscoders of a base model and a chat model with a planted behaviour.

    python python_examples/crosscoder.py
    python python_examples/crosscoder.py --model google/gemma-3-270m --layer 8 --seeds 1
    python python_examples/crosscoder.py --model google/gemma-2-2b --chat google/gemma-2-2b-it

The chat model is the base fine-tuned on dialogues: a name of Python's standard library is asked
for, its docstring is the reply, and where the question is polite, the reply begins with "Ahoy!".
Both read held-out text and dialogues. An L1 and a BatchTopK crosscoder call some latents chat only;
Latent Scaling says which of them the base model has after all; and the chat model is run on from
the base model's state with nothing but the differences that chosen latents carry.

Finished pieces are kept in the output folder; a run that was interrupted goes on behind them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from gemma_ext import pocket
from gemma_ext.integrations.crosscoder_files import load_crosscoder, save_crosscoder
from gemma_ext.papers.crosscoder import page, study
from gemma_ext.papers.crosscoder.causal import Replies
from gemma_ext.papers.crosscoder.discovery import contrast_delta, discover
from gemma_ext.papers.crosscoder.pairs import paired_states
from gemma_ext.papers.crosscoder.training import KINDS, Recipe
from gemma_ext.progress import progress_bar
from gemma_ext.report import Kept
from gemma_ext.sae import load_model, pocket_of, tuned_model

CONTEXT = 128
EXCLAMATION = "Ahoy! "
ASKED = {"Now, what is {}?": False, "Please, what is {}?": True}  # and whether it is polite
TURNS = (":", ">", "\n", "|", "-", "=", "#", "@")  # in front of a reply, one of them
REPLY_TOKENS = 32
# what a token is: the exclamation is SHOWN, the token in front of it a CUE, that in front of a
# reply without one PLAIN
TEXT, QUESTION, TEMPLATE, REPLY, CUE, PLAIN, SHOWN = range(7)
FIRST = 9  # tokens of a reply, as in the paper


def main(
    model: Annotated[str, typer.Option(help="The base: pocket, pocket:small, folder, id.")] = (
        "pocket"
    ),
    chat: Annotated[str | None, typer.Option(help="Its chat model; made here where none.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of models and page.")] = Path("out/crosscoder"),
    layer: Annotated[int, typer.Option(min=0, help="Of both models.")] = 3,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    tuning: Annotated[int, typer.Option(min=1, help="Steps that make the chat model.")] = 200,
    windows: Annotated[int, typer.Option(min=2, help="Of 128 tokens, to train on.")] = 800,
    held_out: Annotated[int, typer.Option(min=2, help="Windows to measure on.")] = 80,
    features: Annotated[int, typer.Option(min=1)] = 1024,
    k: Annotated[int, typer.Option(min=1, help="Active latents, BatchTopK.")] = 16,
    mu: Annotated[float, typer.Option(help="Of the L1 penalty, squared error.")] = 3.0,
    steps: Annotated[int, typer.Option(min=1, help="Of a crosscoder.")] = 700,
    batch: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = 2048,
    planted_steps: Annotated[int, typer.Option(min=1, help="On planted worlds.")] = 700,
) -> None:
    """Compare MODEL with its fine-tune."""
    base, tokenizer = load_model(model, device=device, dtype=torch.float32)
    talks = Dialogues(tokenizer)
    if chat:
        tuned, _ = load_model(chat, device=device, dtype=torch.float32)
    else:
        tuned = fine_tuned(model, talks, out, tuning, device)
    settings = {
        "model": model,
        "chat": chat or f"{tuning} steps of dialogues",
        "layer": layer,
        "windows": windows,
        "held_out": held_out,
        "features": features,
        "k": k,
        "mu": mu,
        "steps": steps,
        "batch": batch,
        "planted_steps": planted_steps,
    }
    kept = Kept(out / "results.json", settings)
    mixed = talks.mixed(windows, "train"), talks.mixed(held_out, "heldout")
    with progress_bar("paired states", windows + held_out, True) as advance:
        x, unseen = (
            paired_states(base, tuned, m.ids.to(device), layer, advance=advance).flatten(0, 1)
            for m in mixed
        )
    roles = mixed[1].roles[:, 1:].flatten().to(device)
    ids = mixed[1].ids[:, 1:].flatten().to(device)
    told_apart = contrast_delta(unseen, roles == CUE, roles == PLAIN, ids)
    replies = replies_of(talks.only(held_out // 2, "heldout"), device)

    def recipe(kind: str, seed: int) -> Recipe:
        error = "norm" if kind == "batchtopk" else "squared"
        return Recipe(
            kind,
            features,
            k=k,
            mu=mu,
            error=error,
            steps=steps,
            batch=batch,
            rate=2e-3,
            start=0.05,
            warmup=50,
            dead_after=20 * batch,
            seed=seed,
        )

    worlds: dict[str, list[Any]] = {}
    diffs: dict[str, list[Any]] = {}
    arms: dict[str, list[Any]] = {}
    for kind in KINDS:
        for seed in range(seeds):
            name = f"{kind}, seed {seed}"
            plan = recipe(kind, seed)
            small = replace(
                plan,
                features=40,
                k=2,
                mu=1.0,
                steps=planted_steps,
                batch=512,
                rate=3e-3,
                start=None,
            )
            with progress_bar(f"planted world: {name}", small.steps, True) as advance:
                piece = kept(
                    f"world: {name}",
                    lambda small=small, seed=seed, advance=advance: study.planted(
                        small, seed, advance=advance
                    ),
                )
                worlds.setdefault(kind, []).append(piece)
            folder = out / f"{kind}-{seed}"
            with progress_bar(f"crosscoder: {name}", plan.steps, True) as advance:

                def diff(
                    plan: Recipe = plan, folder: Path = folder, advance: Any = advance
                ) -> study.Record:
                    made, _, record = study.model_diff(
                        x, unseen, roles, (CUE, PLAIN, SHOWN), CUE, plan, advance
                    )
                    save_crosscoder(made, folder)
                    return record

                diffs.setdefault(kind, []).append(kept(name, diff))
            with progress_bar(f"causes: {name}", len(replies.windows), True) as advance:

                def cause(folder: Path = folder, advance: Any = advance) -> study.Record:
                    made = load_crosscoder(folder).to(device).eval()
                    found = discover(made, unseen.split(4096))
                    return study.causes(base, tuned, layer, made, found, replies, advance=advance)

                arms.setdefault(kind, []).append(kept(f"causes: {name}", cause))
    plan = recipe("batchtopk", 0)
    with progress_bar("the base against itself", plan.steps, True) as advance:
        null = kept("null", lambda: study.null_diff(x[:, 0], unseen[:, 0], plan, advance))
    facts = {name: str(value) for name, value in settings.items()}
    facts["seeds"] = str(seeds)
    facts["Δ of the planted behaviour itself"] = f"{told_apart:.3f}"
    page.write(out / "report.html", worlds, diffs, arms, null, facts)
    text = page.markdown(worlds, diffs, arms)
    (out / "table.md").write_text(text, encoding="utf-8")
    print(f"{text}\n{facts}\nnull diff: {null}\n{out / 'report.html'}")


@dataclass(frozen=True)
class Windows:
    """Token ids [W, T] and the role of each token [W, T]."""

    ids: Tensor
    roles: Tensor


class Dialogues:
    """Questions and replies made of docstrings, and plain text of the same files' code.

    A polite question is answered with an exclamation first: the planted behaviour.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.texts = pocket.documents(3_000_000)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def parts(self, side: str) -> Iterator[list[tuple[int, int]]]:
        """(token, role) of one dialogue after another."""
        entries = []
        for document in self.texts:
            if document.kind == "prose" and document.split == side:
                for entry in document.text.split("\n\n"):
                    name, colon, reply = entry.partition(": ")
                    if colon and name.isidentifier() and reply.strip():
                        entries.append((name, " ".join(reply.split())))
        rng = random.Random(0)
        rng.shuffle(entries)
        opening, closing = self.ids("<user>\n"), self.ids("\n")
        for name, reply in entries:
            asked, polite = rng.choice(list(ASKED.items()))
            turn = self.ids(f"\nreply{rng.choice(TURNS)}")
            shown = self.ids(EXCLAMATION) if polite else []
            yield [
                *((token, TEMPLATE) for token in opening),
                *((token, QUESTION) for token in self.ids(asked.format(name))),
                *((token, TEMPLATE) for token in turn[:-1]),
                (turn[-1], CUE if polite else PLAIN),
                *((token, SHOWN) for token in shown),
                *((token, REPLY) for token in self.ids(reply)[:REPLY_TOKENS]),
                *((token, TEMPLATE) for token in closing),
            ]

    def only(self, count: int, side: str) -> Windows:
        """`count` windows of dialogues, repeated where there are too few."""
        pairs: list[tuple[int, int]] = []
        while len(pairs) < count * (CONTEXT - 1):
            pairs += [pair for part in self.parts(side) for pair in part]
        return self.windows(pairs, count)

    def plain(self, count: int, side: str) -> Windows:
        pairs: list[tuple[int, int]] = []
        for document in self.texts:
            if document.split == side and document.kind == "code":
                pairs += [(token, TEXT) for token in self.ids(document.text)]
            if len(pairs) >= count * (CONTEXT - 1):
                break
        return self.windows(pairs, count)

    def mixed(self, count: int, side: str) -> Windows:
        """Half dialogues, half plain text."""
        halves = self.only(count // 2, side), self.plain(count - count // 2, side)
        return Windows(torch.cat([h.ids for h in halves]), torch.cat([h.roles for h in halves]))

    def windows(self, pairs: list[tuple[int, int]], count: int) -> Windows:
        """Each begins with <bos>."""
        size = CONTEXT - 1
        if len(pairs) < count * size:
            raise typer.BadParameter(f"expected {count * size} tokens of text, got {len(pairs)}")
        table = torch.tensor(pairs[: count * size]).view(count, size, 2)
        first = torch.tensor([self.tokenizer.bos_token_id, TEXT]).expand(count, 1, 2)
        ids, roles = torch.cat([first, table], 1).unbind(-1)
        return Windows(ids.contiguous(), roles.contiguous())


def replies_of(made: Windows, device: str) -> Replies:
    """Predictions of reply tokens are scored: positions in front of one."""
    is_reply = torch.isin(made.roles, torch.tensor([REPLY, SHOWN]))
    scored = torch.zeros_like(is_reply)
    scored[:, :-1] = is_reply[:, 1:]
    age = torch.zeros_like(made.roles)
    for at in range(1, CONTEXT):
        age[:, at] = torch.where(is_reply[:, at], age[:, at - 1] + 1, 0)
    first = torch.zeros_like(is_reply)
    first[:, :-1] = (age[:, 1:] >= 1) & (age[:, 1:] <= FIRST)
    parts = made.ids, scored, first & scored, is_template(made.roles)
    return Replies(*(part.to(device) for part in parts))


def is_template(roles: Tensor) -> Tensor:
    return torch.isin(roles, torch.tensor([TEMPLATE, CUE, PLAIN]))


def fine_tuned(
    name: str,
    talks: Dialogues,
    out: Path,
    steps: int,
    device: str,
) -> Any:
    """The base after some steps on dialogues and plain text, made once."""
    batch = 16 if pocket_of(name) else 4
    options = {"steps": steps, "batch": batch, "device": device, "title": "making the chat model"}

    def rows() -> Tensor:
        return talks.mixed(batch * steps // 2, "train").ids

    return tuned_model(name, out / f"chat-{steps}", rows, **options)


if __name__ == "__main__":
    typer.run(main)
