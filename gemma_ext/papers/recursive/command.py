"""`gemma-ext recursive`: convert, train, export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer

from gemma_ext.extras import require
from gemma_ext.nn.recursive import ORDERS, load
from gemma_ext.ops.cce.divergence import KINDS
from gemma_ext.papers.recursive.export import export_folder
from gemma_ext.papers.recursive.folders import check_source
from gemma_ext.papers.recursive.initialise import INITS
from gemma_ext.papers.recursive.objective import EXITS, Objective
from gemma_ext.papers.recursive.recipe import LORA_INITS, NORMS, SVDS, Recipe
from gemma_ext.papers.recursive.streaming import convert_folder, count_pieces
from gemma_ext.papers.recursive.text import text_windows
from gemma_ext.progress import progress_bar

TEXT_HELP = "A .jsonl with the key text, or a text file"
DTYPES = ("float32", "bfloat16", "float16")
app = typer.Typer(
    help="Relaxed Recursive Transformers: few stored layers run many times.",
    no_args_is_help=True,
    add_completion=False,
)
Source = Annotated[Path, typer.Argument(help="Folder of a model.", show_default=False)]
Out = Annotated[Path, typer.Argument(help="Folder that is written.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


@app.command()
def convert(
    source: Source,
    out: Out,
    loops: Annotated[int, typer.Option(min=1, help="B; the block is L / B layers.")] = 2,
    init: Annotated[str, typer.Option(help=f"One of {', '.join(INITS)}.")] = "average",
    rank: Annotated[int, typer.Option(min=0, help="Of every linear's matrices.")] = 0,
    rank_of: Annotated[
        list[str], typer.Option(help="LINEAR=RANK before --rank, as q_proj=128; repeatable.")
    ] = [],  # noqa: B006 (typer)
    order: Annotated[str, typer.Option(help=f"One of {', '.join(ORDERS)}.")] = "cycle",
    lora_init: Annotated[str, typer.Option(help=f"One of {', '.join(LORA_INITS)}.")] = "svd",
    lora_from_loop: Annotated[int, typer.Option(min=0, help="First loop with matrices.")] = 0,
    svd: Annotated[str, typer.Option(help=f"One of {', '.join(SVDS)}.")] = "auto",
    refine: Annotated[int, typer.Option(min=0, help="Rounds of refinement.")] = 0,
    prefix: Annotated[int, typer.Option(min=0, help="Trained keys and values of a depth.")] = 0,
    norms: Annotated[str, typer.Option(help=f"One of {', '.join(NORMS)}.")] = "average",
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    dtype: Annotated[str | None, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = None,
    quiet: Quiet = False,
) -> None:
    """Tie the layers of a pretrained decoder; an interrupted run goes on where it stopped.

    \b
    Example: gemma-ext recursive convert models/gemma-2-2b out/gemma-2-2b-r64 --rank 64
    """
    with _one_sentence("convert"):
        recipe = Recipe(
            loops,
            init,
            order,
            rank=rank,
            ranks=dict(map(_rank, rank_of)),
            lora_init=lora_init,
            lora_from_loop=lora_from_loop,
            svd=svd,
            refine=refine,
            prefix=prefix,
            norms=norms,
            seed=seed,
        )
        kind = _dtype(dtype)
        with progress_bar("converting", count_pieces(source, recipe), not quiet) as advance:
            convert_folder(source, out, recipe, dtype=kind, advance=advance)
    print(out)


@app.command()
def export(source: Source, out: Out, quiet: Quiet = False) -> None:
    """Write a recursive model as the vanilla one it equals, for any other engine."""
    with _one_sentence("export"), progress_bar("exporting", None, not quiet) as advance:
        export_folder(source, out, advance=advance)
    print(out)


@app.command()
def train(
    source: Source,
    out: Out,
    text: Annotated[list[Path], typer.Option(help=f"{TEXT_HELP}; repeatable.")],
    teacher: Annotated[
        Path | None, typer.Option(help="Full-size model of the same tokenizer.")
    ] = None,
    held_out: Annotated[Path | None, typer.Option(help="Text to evaluate on.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    sequence: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Windows of a device's step.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Such steps for one update.")] = 1,
    rate: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 2e-4,
    divergence: Annotated[str, typer.Option(help=f"One of {', '.join(KINDS)}.")] = "forward_kl",
    divergence_weight: Annotated[float, typer.Option(help="Of the teacher.")] = 1.0,
    ce_weight: Annotated[float, typer.Option(help="Of the text beside a teacher.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Of the divergence.")] = 1.0,
    exits: Annotated[str, typer.Option(help=f"One of {', '.join(EXITS)}.")] = "none",
    exit_weight: Annotated[float, typer.Option(help="Of loops before the last.")] = 0.1,
    self_distillation: Annotated[
        bool, typer.Option("--self-distillation", help="Early loops learn from the last one.")
    ] = False,
    head_rank: Annotated[int, typer.Option(min=1, help="Of the head of frozen exits.")] = 128,
    bf16: Annotated[bool, typer.Option("--bf16", help="Products in bfloat16.")] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Activations are computed twice.")
    ] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    device: Annotated[str, typer.Option(help="cpu, or cuda for what there is.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the order of windows.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Uptrain a recursive model, with a teacher or for early exits; goes on after an interruption.

    \b
    Example: gemma-ext recursive train out/r64 out/r64-up --text data.jsonl --teacher gemma-2-2b
    """
    with _one_sentence("train"):
        require("training", "hf", "transformers", "accelerate", "safetensors")
        from transformers import AutoTokenizer
        from transformers.trainer_utils import get_last_checkpoint

        from gemma_ext.papers.recursive.trainer import Bar, RecursiveTrainer, arguments

        if (out / "config.json").exists() and any(out.glob("*.safetensors")):
            raise ValueError(f"out: expected a folder without a model, got {out}")
        objective = Objective(
            divergence,
            divergence_weight,
            ce_weight,
            temperature,
            exits,
            exit_weight,
            self_distillation,
        )
        tokenizer = AutoTokenizer.from_pretrained(check_source(source))
        model = load(source, dtype=torch.float32)
        objective.prepare(model, head_rank)
        checkpoints = out / "checkpoints"
        options = arguments(
            checkpoints,
            steps,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            learning_rate=rate,
            bf16=bf16,
            activation_checkpointing=checkpointing,
            save_steps=save_every,
            save_total_limit=2,
            logging_steps=10,
            disable_tqdm=True,
            use_cpu=device == "cpu",
            seed=seed,
        )
        with progress_bar("training", steps, not quiet) as advance:
            trainer = RecursiveTrainer(
                model,
                options,
                train_dataset=text_windows(text, tokenizer, sequence),
                eval_dataset=text_windows([held_out], tokenizer, sequence) if held_out else None,
                objective=objective,
                teacher=load(teacher) if teacher else None,
                callbacks=[Bar(advance)],
            )
            last = get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None
            trainer.train(resume_from_checkpoint=last)
        if held_out:
            print(f"held-out loss {trainer.evaluate()['eval_loss']:.4f} nats")
        tokenizer.save_pretrained(out)
        trainer.save_model(str(out))
    print(out)


@contextmanager
def _one_sentence(command: str) -> Iterator[None]:
    """What is amiss as one line."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise SystemExit(f"gemma-ext recursive {command}: {error}") from None


def _rank(text: str) -> tuple[str, int]:
    name, equals, rank = text.partition("=")
    if not (equals and rank.isdigit()):
        raise ValueError(f"rank-of: expected LINEAR=RANK, got {text!r}")
    return name, int(rank)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return None if name is None else getattr(torch, name)
