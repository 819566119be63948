"""TRL's `MergeModelCallback` without mergekit: the four names that it imports, under their names.

    from gemma_ext.souping.recipes import trl

    trl.install()                       # before trl's callback is imported
    from trl.experimental.merge_model_callback import MergeConfig, MergeModelCallback

`mergekit.config.MergeConfiguration`, `mergekit.merge.MergeOptions` and `run_merge` beside it are
then those of this file, and trl finds a package `mergekit`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from gemma_ext.souping.recipes.recipe import Recipe, parse_recipe
from gemma_ext.souping.recipes.run import Options, run_recipe


@dataclass(frozen=True)
class MergeConfiguration:
    """A recipe, made as trl makes it."""

    recipe: Recipe

    @classmethod
    def model_validate(cls, data: Mapping[str, Any]) -> MergeConfiguration:
        """A recipe from plain data; keys that are None count as absent.

        Raises:
            RecipeError: as `parse_recipe`.
        """
        return cls(parse_recipe(data))


@dataclass(frozen=True)
class MergeOptions:
    """mergekit's options by name; those that are not below are accepted and do nothing."""

    device: str = "cpu"
    cuda: bool = False
    copy_tokenizer: bool = True
    random_seed: int | None = None
    out_shard_size: int | None = None
    allow_crimes: bool = False
    trust_remote_code: bool = False
    write_model_card: bool = True
    quiet: bool = True

    def __init__(self, **options: Any) -> None:
        for name in self.__dataclass_fields__:
            object.__setattr__(self, name, options.get(name, getattr(type(self), name)))

    def run_options(self) -> Options:
        """The same for `run_recipe`."""
        device = self.device
        if device == "auto" or (self.cuda and device == "cpu"):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        sizes = {} if self.out_shard_size is None else {"shard_bytes": self.out_shard_size}
        return Options(
            device=device,
            seed=self.random_seed or 0,
            copy_tokenizer=self.copy_tokenizer,
            card=self.write_model_card,
            allow_crimes=self.allow_crimes,
            trust_remote_code=self.trust_remote_code,
            show_progress=not self.quiet,
            **sizes,
        )


def run_merge(
    config: MergeConfiguration, out_path: str | Path, options: MergeOptions | None = None
) -> None:
    """Merges into `out_path`, which may be inside the folder of a source: trl puts it there.

    Raises:
        RecipeError, ValueError, OSError: as `run_recipe`.
    """
    out = Path(os.path.abspath(out_path))
    options = options or MergeOptions()
    # beside the outermost source that holds it, on the same disk, then moved in one step
    sources = [Path(reference.model.path).resolve() for reference in config.recipe.models()]
    around = [source for source in sources if source in out.resolve().parents]
    if not around:
        run_recipe(config.recipe, out, options.run_options())
        return
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"out_path: expected a folder that is empty or not there yet, got {out}")
    outermost = min(around, key=lambda source: len(source.parts))
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=outermost.parent) as folder:
        done = run_recipe(config.recipe, Path(folder) / out.name, options.run_options())
        out.parent.mkdir(parents=True, exist_ok=True)
        os.replace(done, out)


def install() -> None:
    """Puts `mergekit`, `mergekit.config` and `mergekit.merge` in the place of the package.

    Raises:
        RuntimeError: the real mergekit is imported already.
    """
    present = sys.modules.get("mergekit")
    if present is not None and getattr(present, "__gemma_ext__", None) is None:
        raise RuntimeError("expected to run before mergekit is imported: it is already")
    contents = {
        "mergekit": {"__path__": [], "__gemma_ext__": True},
        "mergekit.config": {"MergeConfiguration": MergeConfiguration},
        "mergekit.merge": {"MergeOptions": MergeOptions, "run_merge": run_merge},
    }
    for name, attributes in contents.items():
        module = ModuleType(name, __doc__)
        module.__spec__ = ModuleSpec(name, None, is_package=name == "mergekit")
        vars(module).update(attributes)
        sys.modules[name] = module
    for name in ("config", "merge"):
        setattr(sys.modules["mergekit"], name, sys.modules[f"mergekit.{name}"])
