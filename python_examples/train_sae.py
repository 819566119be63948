"""Train a sparse dictionary on one layer, save it for SAELens, load it back, steer with a latent.

    python python_examples/train_sae.py
    python python_examples/train_sae.py --model google/gemma-2-2b --text notes.txt --site 12

`--model pocket` (or pocket:small) needs no network. An interrupted run goes on where it stopped.
Writes the dictionary as a SAELens folder, a report of the training and a page of its latents, and
prints what the model writes with one latent held up, and how often that latent then fires when the
model reads its own text again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from gemma_ext.integrations.sae_files import load_dictionary
from gemma_ext.nn.sparse_autoencoder import SparseAutoencoder, latent_steering
from gemma_ext.nn.steering import steer_hook
from gemma_ext.progress import progress_bar
from gemma_ext.sae import (
    Activations,
    Latent,
    Opened,
    TrainConfig,
    inspect_latents,
    new_dictionary,
    open_model,
    train_dictionary,
    width_of,
)
from gemma_ext.sae.page import summary, write_latents
from gemma_ext.sae.tokens import count

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 12, 24
ROWS = 128  # held-out rows that are looked at for contexts
LATENTS = 120  # on the page, from dense to rare
SPECIFIC = (0.0005, 0.02)  # density of the latents that are candidates
BOOST = 4.0  # times the largest value that the latent has on held-out text


def main(
    model: Annotated[
        str, typer.Option(help="pocket, pocket:small, a folder or hub id.")
    ] = "pocket",
    text: Annotated[
        str | None, typer.Option(help="Text for another model than the pocket.")
    ] = None,
    site: Annotated[int, typer.Option(help="The block whose output is taken.")] = 2,
    features: Annotated[int, typer.Option(help="Latents F.")] = 1024,
    k: Annotated[int, typer.Option(help="Active latents per token.")] = 16,
    tokens: Annotated[str, typer.Option(help="Activations to train on.")] = "400k",
    batch: Annotated[int, typer.Option(help="Activations per step.")] = 1024,
    latent: Annotated[
        int | None, typer.Option(help="To steer with; a telling one if none.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of everything.")] = Path("out/train_sae"),
) -> None:
    """Train, save, load, steer."""
    opened = open_model(model, text=text, tokens=count(tokens), device=device)
    sae = new_dictionary(width_of(opened.model, site), features, "topk", k).to(device)
    config = TrainConfig(steps=max(1, count(tokens) // batch), save_every=100)
    done = train_dictionary(opened, str(site), sae, config, out, batch=batch)
    print(summary(done.evaluations))

    loaded = load_dictionary(done.folder).to(device)
    rows = opened.heldout[:ROWS]
    stream = Activations([opened.model], [site], rows, batch=1, buffer=1)
    with progress_bar("latents", len(rows), True) as advance:
        wanted = None if latent is None else [latent]
        found, densities = inspect_latents(
            loaded, stream, latents=wanted, count=LATENTS, progress=advance
        )
    decode = lambda token: opened.tokenizer.decode([token])  # noqa: E731
    page = out / "latents.html"
    write_latents(
        page, found, densities, decode, title=f"Latents of {done.folder}", facts={"model": model}
    )
    chosen = telling(found)
    print(f"\nlatent {chosen.number} fires on {chosen.density:.2%} of held-out tokens, writes for")
    print("  " + " ".join(repr(decode(token)) for token, _ in chosen.promoted))
    strength = BOOST * peak(chosen)
    plain, steered = (write(opened, loaded, site, chosen.number, s) for s in (0.0, strength))
    for name, ids in (("as it is", plain), (f"held up by {strength:.1f}", steered)):
        share = fires(opened, loaded, site, chosen.number, ids)
        print(f"\n{name}: fires on {share:.1%} of the tokens that were written")
        for line in ids[:3].tolist():
            start, rest = line[:PROMPT_TOKENS], line[PROMPT_TOKENS:]
            print("  " + repr(opened.tokenizer.decode(start[1:])))
            print("    -> " + repr(opened.tokenizer.decode(rest)))
    print(f"\n{done.folder}\n{done.page}\n{page}")


def telling(latents: list[Latent]) -> Latent:
    """The latent that at its strongest writes most pointedly: its first token against its last.

    Raises:
        ValueError: none has fired.
    """
    live = [x for x in latents if x.contexts and x.promoted]
    if not live:
        raise ValueError("latent: expected one that fires on the held-out text")
    specific = [x for x in live if SPECIFIC[0] <= x.density <= SPECIFIC[1]]

    def pointed(x: Latent) -> float:
        return (x.promoted[0][1] - x.promoted[-1][1]) * peak(x)

    return max(specific or live, key=pointed)


def peak(latent: Latent) -> float:
    """Its largest value in its contexts."""
    return max(max(context.values) for context in latent.contexts)


@torch.no_grad()
def write(
    opened: Opened, sae: SparseAutoencoder, block: int, latent: int, strength: float
) -> Tensor:
    """Greedy continuations [PROMPTS, tokens] of held-out rows, with `strength` added throughout."""
    prompts = opened.heldout[-PROMPTS:, :PROMPT_TOKENS].long().to(opened.model.device)
    with steer_hook(opened.model, block, latent_steering(sae, [latent], strength=strength)):
        return opened.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )


@torch.no_grad()
def fires(opened: Opened, sae: SparseAutoencoder, block: int, latent: int, ids: Tensor) -> float:
    """Share of the written tokens on which the latent fires when the plain model reads them."""
    stream = Activations([opened.model], [block], ids.cpu().int(), batch=1, buffer=1)
    x = stream.activations(ids.cpu())[:, PROMPT_TOKENS:]
    codes = sae.encode(x.flatten(0, 1))
    hits = ((codes.indices == latent) & (codes.values > 0)).sum()
    return float(hits) / (x.shape[0] * x.shape[1])


if __name__ == "__main__":
    typer.run(main)
