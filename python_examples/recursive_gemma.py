"""A model of half the layers that runs them twice: convert, uptrain, serve, compare.

    python python_examples/recursive_gemma.py
    python python_examples/recursive_gemma.py --full --seeds 3 --steps 50
    python python_examples/recursive_gemma.py --model models/gemma-3-270m --ranks 64 --freeze \
        --rows "stepwise r=0" --rows "average r=64" --steps 20 --batch 4 --no-serving

Conversions of the model with several initialisations are uptrained on the same tokens, with and
without the full-size model as teacher, beside a model of the same size that is trained from
nothing; then the loops learn to answer early. Held-out perplexity of every loop is on the page.
What came of it is served, asked by several clients at a time, and compared with decoding one
request after another: the tokens are the same.

Finished pieces are kept in the output folder; a run that was interrupted goes on behind them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from gemma_ext import pocket
from gemma_ext.extras import require
from gemma_ext.papers.recursive import grid, page
from gemma_ext.papers.recursive.study import Bench
from gemma_ext.progress import progress_bar
from gemma_ext.report import Kept


def main(
    model: Annotated[str, typer.Option(help="pocket, pocket:small, folder or id.")] = "pocket",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of models and page.")] = Path("out/recursive"),
    loops: Annotated[int, typer.Option(min=2, help="B, a divisor of the layers.")] = 2,
    ranks: Annotated[str, typer.Option(help="Of matrices per depth, ascending.")] = "8,32,64",
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    full: Annotated[bool, typer.Option("--full", help="All rows of the tables.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Of uptraining.")] = 40,
    exit_steps: Annotated[int, typer.Option(min=1, help="Of exit training.")] = 30,
    batch: Annotated[int, typer.Option(min=1, help="Windows of a step.")] = 16,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 128,
    rate: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 1e-3,
    held_out: Annotated[int, typer.Option(min=1, help="Windows to measure on.")] = 160,
    freeze: Annotated[bool, typer.Option("--freeze", help="Embedding and head stay.")] = False,
    rows: Annotated[list[str], typer.Option(help="Only rows that begin so; repeatable.")] = [],  # noqa: B006
    serving: Annotated[bool, typer.Option(help="Serve what came of it.")] = True,
    requests: Annotated[int, typer.Option(min=1, help="Asked at a time, when served.")] = 12,
) -> None:
    """Tie the layers of MODEL and see what uptraining repairs."""
    source, tokenizer = load(model, device)
    wanted = max(steps, exit_steps) * batch * seeds
    bench = Bench(
        source,
        windows(model, tokenizer, "train", wanted, context),
        windows(model, tokenizer, "heldout", held_out, context),
        steps=steps,
        exit_steps=exit_steps,
        batch=batch,
        rate=rate,
        device=device,
        freeze_embedding=freeze,
    )
    settings = {
        "model": model,
        "loops": loops,
        "ranks": ranks,
        "steps": steps,
        "exit_steps": exit_steps,
        "batch": batch,
        "context": context,
        "rate": rate,
        "held_out": len(bench.held_out),
        "freeze": freeze,
        "rows": "all" if full else "a few",
    }
    kept = Kept(out / "results.json", settings)
    start = kept("start", lambda: bench.measure(source))
    tables: page.Tables = {}
    sizes = tuple(int(rank) for rank in ranks.split(","))
    for seed in range(seeds):
        for table, row, count, make in grid.runs(bench, loops, sizes, seed, out / "models", full):
            if rows and not row.startswith(tuple(rows)):
                continue
            with progress_bar(f"{row}, seed {seed}", count, True) as advance:
                record = kept(
                    f"{table}: {row}, seed {seed}", lambda make=make, advance=advance: make(advance)
                )
            tables.setdefault(table, {}).setdefault(row, []).append(record)
    facts = {name: str(value) for name, value in settings.items()}
    facts |= {"seeds": str(seeds), "tokens of uptraining": f"{steps * batch * context:,}"}
    served = []
    if serving:
        middle = grid.middle_rank(sizes)
        for label, folder in (("tied", "r=0"), ("relaxed", f"r={middle}")):
            folder = out / "models" / f"{folder}-0"
            tokenizer.save_pretrained(folder)
            served.append([label, *serve(folder, requests)])
    text = page.markdown(tables, start)
    page.write(out / "report.html", tables, start, facts, served)
    (out / "table.md").write_text(text, encoding="utf-8")
    print(f"{text}\n{out / 'report.html'}")


PROMPTS = ("def main(", "import os", "The value of", "class Node(", "    return self.", "for i in")
EXIT = {"name": "max_prob", "threshold": 0.4}


def serve(folder: Path, requests: int, tokens: int = 32) -> list[str]:
    """A server of the model asked by OpenAI clients at a time, with early exits.

    Returns:
        requests, tokens a second, loops of a token in the mean, and how many answers are those of
        one request after another.
    """
    require("serving", "recursive", "fastapi", "uvicorn", "openai")
    from gemma_ext.serve.exits import ExitTest
    from gemma_ext.serve.launch import Launch, ends_of_text, load_model
    from gemma_ext.serve.protocol import Request, SamplingParams
    from gemma_ext.serve.sequential import Sequential

    launch = Launch(
        str(folder),
        device="cpu",
        dtype="float32",
        engine={"width": 8, "max_model_len": 128},
        exits=EXIT,
    )
    app = launch.app()
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(requests)]
    with running(app) as port:
        begin = time.perf_counter()
        answers = asyncio.run(ask(port, folder.name, prompts, tokens))
        seconds = time.perf_counter() - begin
        exits = app.state.service.engine.stats.exits
    model, tokenizer = load_model(str(folder), torch.device("cpu"), torch.float32)
    alone = Sequential(model, ExitTest(**EXIT))
    stops = ends_of_text(model, tokenizer)
    same = 0
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        params = SamplingParams(max_tokens=tokens, temperature=0.8, seed=number, stop_ids=stops)
        found = alone.decode(Request(tuple(tokenizer(prompt)["input_ids"]), params))
        ids = [token.id for token in found if token.id not in stops]
        same += tokenizer.decode(ids) == answer
    loops = sum(n * count for n, count in enumerate(exits, 1)) / sum(exits)
    count = sum(exits)
    return [str(requests), f"{count / seconds:.0f}", f"{loops:.2f}", f"{same} of {requests}"]


async def ask(port: int, name: str, prompts: list[str], tokens: int) -> list[str]:
    """The texts that all clients get, each with a seed of its own."""
    import openai

    client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    async with client:
        made = await asyncio.gather(
            *(
                client.completions.create(
                    model=name, prompt=prompt, max_tokens=tokens, temperature=0.8, seed=number
                )
                for number, prompt in enumerate(prompts)
            )
        )
    return [answer.choices[0].text for answer in made]


@contextlib.contextmanager
def running(app: Any) -> Iterator[int]:
    """The app behind a free port, in a thread."""
    from gemma_ext.serve.http.server import Server

    server = Server(app, port=0, log_level="warning")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        time.sleep(0.01)
    try:
        yield server.port
    finally:
        server.should_exit = True
        thread.join()


def load(name: str, device: str) -> tuple[Any, Any]:
    kind, _, size = name.partition(":")
    if kind == "pocket":
        made = pocket.load(size or "nano")
        return made.model.to(device), made.tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)


def windows(name: str, tokenizer: Any, split: str, count: int, context: int) -> Tensor:
    """At most `count` windows [W, T] of the pocket's text."""
    kind, _, size = name.partition(":")
    if kind == "pocket":
        text = pocket.load_text(size or "nano")
        ids = text.train_ids if split == "train" else text.heldout_ids
    else:
        ids = stream(tokenizer, split, count * context)
    rows = ids[: len(ids) // context * context].view(-1, context)
    return rows if split == "train" else rows[:count]


def stream(tokenizer: Any, split: str, count: int) -> Tensor:
    """At least `count` tokens of the pocket's documents, if there are as many."""
    ids: list[int] = []
    for document in pocket.documents(None):
        if document.split == split:
            ids += [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
            ids += tokenizer(document.text, add_special_tokens=False, verbose=False).input_ids
        if len(ids) >= count:
            break
    return torch.tensor(ids)


if __name__ == "__main__":
    typer.run(main)
