"""Which runs make the tables of a study.

| table    | rows                                                                              |
|----------|-----------------------------------------------------------------------------------|
| inits    | initialisations x ranks, matrices from the SVD or from zero                       |
| teacher  | uptraining with the full-size model's distributions                               |
| controls | the same tokens for the full-size model, a half, a random half, a random loop     |
| exits    | uptrained models trained for early exits, at ranks 0 and r, and r from loop 2 on  |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from gemma_ext.ops.cce.divergence import KINDS
from gemma_ext.papers.recursive.objective import Objective
from gemma_ext.papers.recursive.recipe import Recipe
from gemma_ext.papers.recursive.study import (
    Advance,
    Bench,
    Record,
    converted,
    exits,
    half_depth,
    vanilla,
)

Make = Callable[[Advance], Record]
EXIT_OBJECTIVES = {
    "aggressive 0.1": Objective(exits="aggressive"),
    "aggressive 0.1 + KD": Objective(exits="aggressive", self_distillation=True),
    "weighted": Objective(exits="weighted"),
    "frozen, head LoRA": Objective(exits="frozen"),
}


def name_of(recipe: Recipe) -> str:
    """Of a row: "average r=32", "stepwise r=0", "average r=32 zero"."""
    zero = " zero" if recipe.rank and recipe.lora_init == "zero" else ""
    free = " from loop 2" if recipe.lora_from_loop else ""
    return f"{recipe.init} r={recipe.rank}{zero}{free}"


def recipes(loops: int, ranks: tuple[int, ...], full: bool) -> list[Recipe]:
    """The conversions of the first table; the middle one of `ranks` also begins from zero."""
    middle = middle_rank(ranks)
    found = [Recipe(loops, "stepwise"), Recipe(loops, "average")]
    if full:
        found.append(Recipe(loops, "lower"))
    for rank in ranks if full else (middle,):
        found.append(Recipe(loops, "average", rank=rank))
        if full:
            found.append(Recipe(loops, "stepwise", rank=rank))
    if full:
        found.append(Recipe(loops, "stepwise", rank=middle, lora_init="zero"))
    found.append(Recipe(loops, "average", rank=middle, lora_init="zero"))
    return found


def middle_rank(ranks: tuple[int, ...]) -> int:
    """The rank of tables with one."""
    return ranks[len(ranks) // 2]


def runs(
    bench: Bench, loops: int, ranks: tuple[int, ...], seed: int, folder: Path, full: bool
) -> Iterator[tuple[str, str, int, Make]]:
    """(table, row, steps, what makes its record); a row of exits needs the rows before it.

    Args:
        loops: B.
        ranks: of the first table.
        folder: for models that go on to exit training.
        full: False for a handful of rows.
    """
    middle = middle_rank(ranks)
    bases = {
        "r=0": Recipe(loops, "stepwise"),
        f"r={middle}": Recipe(loops, "average", rank=middle),
    }
    extra = {f"r={middle} from loop 2": Recipe(loops, "average", rank=middle, lora_from_loop=1)}
    places = {name_of(r): folder / f"{label}-{seed}" for label, r in (bases | extra).items()}

    def conversion(recipe: Recipe, **options: object) -> Make:
        keep = places.get(name_of(recipe)) if not options else None
        return lambda advance: converted(bench, recipe, seed, keep=keep, advance=advance, **options)

    for recipe in recipes(loops, ranks, full):
        yield "inits", name_of(recipe), bench.steps, conversion(recipe)
    for recipe in bases.values():
        kinds = KINDS if full and not recipe.rank else KINDS[:1]
        for kind in kinds:
            make = conversion(recipe, objective=Objective(kind), teacher=True)
            yield "teacher", f"{name_of(recipe)}, {kind}", bench.steps, make
    yield from _controls(bench, loops, seed, full)
    if full:
        (recipe,) = extra.values()
        yield "inits", name_of(recipe), bench.steps, conversion(recipe)
    for label, recipe in (bases | (extra if full else {})).items():
        for name, objective in EXIT_OBJECTIVES.items():
            wanted = name == "aggressive 0.1 + KD" or (full and not recipe.lora_from_loop)
            if wanted and not (recipe.rank and name in ("weighted", "frozen, head LoRA")):
                place = places[name_of(recipe)]
                make = _exit(bench, place, seed, objective)
                yield "exits", f"{label}, {name}", bench.exit_steps, make


def _controls(
    bench: Bench, loops: int, seed: int, full: bool
) -> Iterator[tuple[str, str, int, Make]]:
    half = half_depth(bench.model.config.get_text_config().num_hidden_layers, loops)

    def control(**options: object) -> Make:
        return lambda advance: vanilla(bench, seed, advance=advance, **options)

    rows = {
        "full size": control(layers=None, loops=1, fresh=False),
        "same size from nothing": control(layers=half, loops=1, fresh=True),
    }
    if full:
        rows |= {
            "random recursive": control(layers=None, loops=loops, fresh=True),
            "same size, layers cut": control(layers=half, loops=1, fresh=False),
        }
    for name, make in rows.items():
        yield "controls", name, bench.steps, make


def _exit(bench: Bench, place: Path, seed: int, objective: Objective) -> Make:
    return lambda advance: exits(bench, place, seed, objective, advance)
