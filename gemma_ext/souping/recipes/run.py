"""A recipe run from disk to disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gemma_ext.progress import byte_bar
from gemma_ext.souping.engine.stream import CHUNK_BYTES, SHARD_BYTES, write_checkpoint
from gemma_ext.souping.recipes.output import output_config, write_extras
from gemma_ext.souping.recipes.prepare import Prepared, prepare
from gemma_ext.souping.recipes.recipe import Recipe


@dataclass(frozen=True)
class Options:
    """How a recipe is run.

    Attributes:
        device: that merges.
        seed: of everything random.
        shard_bytes: most bytes of a file of weights.
        chunk_bytes: of a source, read at once.
        threads: that read and write.
        copy_tokenizer: where the recipe asks for none of its own.
        card: write README.md and the recipe into the output.
        lora_dtype: that adapted weights are rounded to before the merge; None for not at all.
        allow_crimes: merge different architectures, keep the base's tensors where shapes differ.
        trust_remote_code: run the code of tokenizers and copy that of models.
        cache_dir: of huggingface_hub.
        show_progress: a bar on stderr.
    """

    device: str = "cpu"
    seed: int = 0
    shard_bytes: int = SHARD_BYTES
    chunk_bytes: int = CHUNK_BYTES
    threads: int = 4
    copy_tokenizer: bool = True
    card: bool = True
    lora_dtype: torch.dtype | None = None
    allow_crimes: bool = False
    trust_remote_code: bool = False
    cache_dir: str | None = None
    show_progress: bool = False


def open_recipe(
    recipe: Recipe, options: Options | None = None, names: Mapping[str, Path] | None = None
) -> Prepared:
    """`prepare` with the options that matter for it."""
    options = options or Options()
    return prepare(
        recipe,
        seed=options.seed,
        names=names,
        cache_dir=options.cache_dir,
        lora_dtype=options.lora_dtype,
        allow_crimes=options.allow_crimes,
        trust_remote_code=options.trust_remote_code,
    )


def run_recipe(
    recipe: Recipe,
    out: Path | str,
    options: Options | None = None,
    *,
    names: Mapping[str, Path] | None = None,
) -> Path:
    """Merges the models of a recipe into a new folder that transformers loads.

    Args:
        out: must not exist yet, or be empty. An interrupted run is gone on with by the next one.
        names: folders that earlier recipes of the same file went to, by the recipes' names.

    Raises:
        RecipeError, ValueError, OSError, ImportError: in one sentence; nothing is half written.

    Example:
        >>> recipe = parse_recipe(open("soup.yml").read())
        >>> souping.recipes.run.run_recipe(recipe, "soup")
    """
    options, out = options or Options(), Path(out)
    prepared = open_recipe(recipe, options, names)
    config = output_config(prepared)

    def finish(folder: Path) -> None:
        write_extras(
            prepared,
            config,
            folder,
            out.name,
            tokenizer=options.copy_tokenizer,
            card=options.card,
            trust_remote_code=options.trust_remote_code,
        )

    with byte_bar(recipe.name or prepared.method.name, options.show_progress) as progress:
        return write_checkpoint(
            prepared.targets,
            prepared.method,
            out,
            recipe=recipe.text,
            shard_bytes=options.shard_bytes,
            chunk_bytes=options.chunk_bytes,
            threads=options.threads,
            device=options.device,
            progress=progress,
            finish=finish,
        )


def run_recipes(
    recipes: list[Recipe],
    out: Path | str,
    options: Options | None = None,
    *,
    between: Path | None = None,
    announce: Callable[[str], None] = lambda text: None,
) -> Path:
    """Runs the recipes of one file, each into a folder of its name, the last into `out`.

    Args:
        recipes: in the order in which they need each other, as `read_recipes` gives them.
        between: folder of the named ones; `OUT-parts` by default. One that is there is not run
            again.
        announce: called with a line per recipe that is skipped.
    """
    out = Path(out)
    between = between or out.with_name(f"{out.name}-parts")
    names: dict[str, Path] = {}
    for recipe in recipes:
        target = out if recipe is recipes[-1] else between / recipe.name
        if target != out and (target / "config.json").is_file():
            announce(f"{recipe.name}: {target} is there")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            run_recipe(recipe, target, options, names=names)
        if recipe.name:
            names[recipe.name] = target
    return out
