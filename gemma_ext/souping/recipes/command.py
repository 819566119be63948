"""`gemma-ext merge`: mergekit-yaml's arguments and flags."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from gemma_ext.command_line import one_sentence
from gemma_ext.progress import byte_bar
from gemma_ext.souping.recipes.explain import explain_recipe
from gemma_ext.souping.recipes.lint import READS, lint_recipe
from gemma_ext.souping.recipes.recipe import DTYPES, Recipe, read_recipes
from gemma_ext.souping.recipes.run import Options, open_recipe, run_recipes

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
# flags of mergekit-yaml that have nothing left to do here
_POINTLESS = {
    "low_cpu_memory": "memory never depends on the size of the models",
    "read_to_gpu": "weights go to --device as they are read",
    "multi_gpu": "one device keeps up with any disk",
    "gpu_rich": "one device keeps up with any disk",
    "lazy_unpickle": "weights are always read piece by piece",
    "clone_tensors": "no tensor of the output shares memory with another",
    "safe_serialization": "the output is always safetensors",
    "async_write": "reading, merging and writing always overlap",
    "write_threads": "-j counts the threads that read and write",
    "lora_merge_cache": "adapters are added while weights are read, without a merged copy",
}


def _pointless(*flags: str) -> Any:
    return typer.Option(*flags, hidden=True)


def main(
    recipe: Annotated[Path, typer.Argument(help="YAML as of mergekit; `---` between several.")],
    out: Annotated[
        Path | None, typer.Argument(help="Folder of the output; --lint and --explain need none.")
    ] = None,
    lint: Annotated[bool, typer.Option("--lint", help="Say what is odd about the recipe.")] = False,
    explain: Annotated[
        Path | None, typer.Option(help="Write a page about the models: cosines, norms, signs.")
    ] = None,
    device: Annotated[str, typer.Option(help="That merges: cpu, cuda, cuda:1, auto.")] = "cpu",
    cuda: Annotated[bool, typer.Option("--cuda/--no-cuda", help="Short for a device.")] = False,
    random_seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    out_shard_size: Annotated[
        str, typer.Option(help="Most bytes of a file of weights, as 5B, 500M or 2GB.")
    ] = "5B",
    threads: Annotated[
        int, typer.Option("--num-threads", "-j", help="Threads that read and write.")
    ] = 4,
    copy_tokenizer: Annotated[
        bool,
        typer.Option(
            "--copy-tokenizer/--no-copy-tokenizer",
            help="Copy the base's tokenizer where the recipe asks for no other.",
        ),
    ] = True,
    write_model_card: Annotated[
        bool,
        typer.Option(
            "--write-model-card/--no-write-model-card", help="Write README.md and the recipe."
        ),
    ] = True,
    lora_merge_dtype: Annotated[
        str | None,
        typer.Option(help="Round weights with an adapter to it first; not at all by default."),
    ] = None,
    allow_crimes: Annotated[
        bool,
        typer.Option(
            "--allow-crimes/--no-allow-crimes",
            help="Merge different architectures; keep the base's tensor where shapes differ.",
        ),
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code/--no-trust-remote-code",
            help="Run the code that comes with models.",
        ),
    ] = False,
    transformers_cache: Annotated[
        str | None, typer.Option(help="Cache of the hub, instead of huggingface_hub's own.")
    ] = None,
    intermediate_dir: Annotated[
        Path | None, typer.Option(help="Folder of the named recipes; OUT-parts by default.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="More words.")] = 0,
    low_cpu_memory: Annotated[bool, _pointless("--low-cpu-memory/--no-low-cpu-memory")] = False,
    read_to_gpu: Annotated[bool, _pointless("--read-to-gpu/--no-read-to-gpu")] = False,
    multi_gpu: Annotated[bool, _pointless("--multi-gpu/--no-multi-gpu")] = False,
    gpu_rich: Annotated[bool, _pointless("--gpu-rich")] = False,
    lazy_unpickle: Annotated[bool, _pointless("--lazy-unpickle/--no-lazy-unpickle")] = False,
    clone_tensors: Annotated[bool, _pointless("--clone-tensors/--no-clone-tensors")] = False,
    safe_serialization: Annotated[
        bool | None, _pointless("--safe-serialization/--no-safe-serialization")
    ] = None,
    async_write: Annotated[bool, _pointless("--async-write/--no-async-write")] = False,
    write_threads: Annotated[int | None, _pointless("--write-threads")] = None,
    lora_merge_cache: Annotated[str | None, _pointless("--lora-merge-cache")] = None,
) -> None:
    """Merge models by a recipe, from disk to a folder that transformers loads.

    An interrupted merge goes on where it stopped when the same command is given again.

    Example: gemma-ext merge soup.yml merged --out-shard-size 2GB
    """
    given = {key: value for key, value in locals().items() if key in _POINTLESS}
    if safe_serialization is False:
        raise typer.BadParameter("--no-safe-serialization: the output is always safetensors")
    if not quiet:
        for key, value in given.items():
            if value:
                flag = key.replace("_", "-")
                typer.echo(f"--{flag} has no effect: {_POINTLESS[key]}", err=True)
    if out is None and not lint and explain is None:
        raise typer.BadParameter("expected OUT, the folder of the output, or --lint or --explain")
    options = Options(
        device=_device("cuda" if cuda and device == "cpu" else device),
        seed=random_seed,
        shard_bytes=_bytes(out_shard_size),
        threads=threads,
        copy_tokenizer=copy_tokenizer,
        card=write_model_card,
        lora_dtype=_dtype(lora_merge_dtype),
        allow_crimes=allow_crimes,
        trust_remote_code=trust_remote_code,
        cache_dir=transformers_cache,
        show_progress=not quiet,
    )
    with nullcontext() if verbose else one_sentence("merge"):
        recipes = read_recipes(recipe)
        if lint or explain:
            _look(recipes, options, lint, explain)
        if out is not None:
            say = (lambda text: None) if quiet else (lambda text: typer.echo(text, err=True))
            done = run_recipes(recipes, out, options, between=intermediate_dir, announce=say)
            typer.echo(done)


def _look(recipes: list[Recipe], options: Options, lint: bool, explain: Path | None) -> None:
    if len(recipes) > 1:
        raise ValueError("--lint and --explain look at one recipe, got a file with several")
    prepared = open_recipe(recipes[0], options)
    if lint:
        reads = prepared.method.name in READS
        with byte_bar("reading", options.show_progress and reads) as progress:
            findings = lint_recipe(
                prepared, trust_remote_code=options.trust_remote_code, progress=progress
            )
        for finding in findings:
            typer.echo(str(finding))
        if not findings:
            typer.echo("nothing odd")
    if explain:
        with byte_bar("reading", options.show_progress) as progress:
            explain_recipe(prepared, explain, progress=progress)
        typer.echo(explain)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device {name}: torch sees no such device here")
    try:
        torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"--device: expected cpu, cuda or auto, got {name}") from None
    return name


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise typer.BadParameter(f"--lora-merge-dtype: expected {', '.join(DTYPES)}, got {name}")
    return getattr(torch, name)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTB]?)B?", text.strip(), re.IGNORECASE)
    count = float(match[1]) * _UNITS[match[2].upper()] if match else 0
    if count < 1:
        raise typer.BadParameter(f"--out-shard-size: expected a size as 5B or 500M, got {text}")
    return int(count)
