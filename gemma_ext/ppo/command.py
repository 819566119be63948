"""`gemma-ext ppo`."""

from __future__ import annotations

import dataclasses
import os
import sysconfig
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import gemma_ext
from gemma_ext.nn._deferred_logits import DeferredLogitsError
from gemma_ext.ppo.config import PPOConfig
from gemma_ext.ppo.opening import open_parts
from gemma_ext.ppo.run import summary, train_policy
from gemma_ext.ppo.trainer import PPOTrainer

_RUN = ("model", "prompts", "reward", "weight", "value", "reference", "lora", "device", "dtype")


def main(
    context: typer.Context,
    prompts: Annotated[
        str | None,
        typer.Option(help=".jsonl with a prompt a row, a text file of lines, or hf:NAME[:SPLIT]."),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            help="module:function, a reward model's folder or id, or with --lora adapter:FOLDER of "
            "peft; more than once."
        ),
    ] = None,
    weight: Annotated[list[float] | None, typer.Option(help="Of each reward, in order.")] = None,
    value: Annotated[
        str | None,
        typer.Option(help="Critic: shared, adapter, copy, or a model's folder or id."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Folder or id; by default the model as it is.")
    ] = None,
    lora: Annotated[int | None, typer.Option(help="Train adapters of this rank only.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML with any of these and of the settings.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, auto.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: auto, float32, ...")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Train a model by proximal policy optimisation against rewards: gemma-ext ppo MODEL ...

    MODEL is a folder, a hub id, pocket or pocket:small, before all flags. Every field of
    gemma_ext.ppo.PPOConfig is a flag, as --learning-rate 1e-6 --kl-coef 0.1 --advantage rloo
    --num-generations 4. The same command goes on where an interrupted run stopped. Under torchrun
    every process is a rank.

    Example: gemma-ext ppo pocket --prompts prompts.txt --reward rewards:brevity
    """
    with one_line_errors():
        given = read_config(config) if config else {}
        # an argument of click's would take the name of the first flag that is a setting
        rest = list(context.args)
        model = rest.pop(0) if rest and not rest[0].startswith("--") else None
        flags = {
            "model": model,
            "prompts": prompts,
            "reward": reward,
            "weight": weight,
            "value": value,
            "reference": reference,
            "lora": lora,
            "device": device,
            "dtype": dtype,
            "output_dir": None if out is None else str(out),
            **parse_flags(rest),
        }
        given |= {name: found for name, found in flags.items() if found not in (None, [])}
        settings = make_config({k: v for k, v in given.items() if k not in _RUN})
        join_ranks()
        parts = open_parts(settings, **{name: given.get(name) for name in _RUN})
        trainer = PPOTrainer(settings, **parts.arguments, show_progress=not quiet)
        if not quiet:
            typer.echo(trainer.plan().line(), err=True)
        done = train_policy(trainer, title=f"PPO of {given['model']}", facts=parts.facts)
        if not int(os.environ.get("RANK", "0")):
            typer.echo(summary(done.history))
            typer.echo(done.folder)
            typer.echo(done.page)


# flags that are no options here are fields of the configuration
main.context_settings = {"allow_extra_args": True, "ignore_unknown_options": True}


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors of the input as one sentence; a stopped run says how it goes on."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, DeferredLogitsError) as error:
        typer.echo(f"gemma-ext ppo: {error}{_place(error)}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from the last checkpoint", err=True)
        raise typer.Exit(130) from None


def _place(error: BaseException) -> str:
    """Where in the user's own functions an error arose, if it did."""
    others = (Path(gemma_ext.__file__).parent, *map(Path, sysconfig.get_paths().values()))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)  # of Python's own, <frozen ...>
        if file.is_file() and not any(file.is_relative_to(other) for other in others):
            return f" ({file.name}, line {frame.lineno})"
    return ""


def parse_flags(arguments: Sequence[str]) -> dict[str, str]:
    """Flags by name, as `--kl-coef 0.1`, `--kl_coef=0.1`, or `--bf16` for true.

    Raises:
        ValueError: an argument that is no flag.
    """
    found: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"expected a flag as --kl-coef, got {flag!r}")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        found[name.replace("-", "_")] = value
    return found


def make_config(values: Mapping[str, Any]) -> PPOConfig:
    """The settings of names and values, which may be texts.

    Raises:
        ValueError: an unknown name, a value of another type.
    """
    kinds = {field.name: str(field.type) for field in dataclasses.fields(PPOConfig)}
    unknown = [name for name in values if name not in kinds]
    if unknown:
        raise ValueError(f"expected settings of PPOConfig, got {', '.join(unknown)}")
    return PPOConfig(**{name: _typed(name, kinds[name], value) for name, value in values.items()})


def _typed(name: str, kind: str, value: Any) -> Any:
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        if "None" not in kind:
            raise ValueError(f"{name}: expected a value, got none")
        return None
    text, kind = str(value), kind.split(" ")[0]
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        return {"int": int, "float": float}.get(kind, str)(text)
    except (ValueError, KeyError):
        wanted = {"bool": "true or false", "int": "a whole number"}.get(kind, "a number")
        raise ValueError(f"{name}: expected {wanted}, got {text!r}") from None


def read_config(path: Path) -> dict[str, Any]:
    """A YAML file of settings.

    Raises:
        ValueError: no such file, or one that is no mapping.
        ImportError: pyyaml is missing.
    """
    from gemma_ext.extras import require

    require("a configuration file", "merge", "yaml")
    import yaml

    if not path.is_file():
        raise ValueError(f"config: expected a file, got {path}")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config: expected YAML in {path}, got {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"config: expected names and values in {path}, got {found!r}")
    return {str(name).replace("-", "_"): value for name, value in found.items()}


def join_ranks() -> None:
    """Opens the process group of torchrun, if there is one and nobody has."""
    from torch import distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # the weights may be asked for on the CPU where there are cards
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
