"""What is odd about a recipe: it runs, and may not do what its author thinks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median

from gemma_ext.souping.methods.directions import STRAIGHT_ABOVE
from gemma_ext.souping.recipes.evaluate import pointless
from gemma_ext.souping.recipes.marks import Entry
from gemma_ext.souping.recipes.measure import measure_all
from gemma_ext.souping.recipes.prepare import Prepared
from gemma_ext.souping.recipes.tokenizer import load_tokenizer

READS = ("slerp", "nuslerp")  # methods whose weights have to be read
_SUM = 1e-6  # weights that sum to 1 in a recipe do so to this


@dataclass(frozen=True)
class Finding:
    """One oddity and its place."""

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


def lint_recipe(
    prepared: Prepared,
    *,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Finding]:
    """Everything odd.

    A slerp reads the weights of its models, to tell whether it is one; nothing else does.

    Args:
        trust_remote_code: of tokenizers.
        progress: called as progress(bytes read, bytes to read) while weights are read.
    """
    found = [
        *_pointless(prepared),
        *_weights_of_the_base(prepared),
        *_weights(prepared),
        *_densities(prepared),
        *_elections(prepared),
        *_vocabularies(prepared, trust_remote_code),
        *_straight(prepared, progress),
    ]
    return [Finding(entry.place, text) for entry, text in found]


_Found = Iterator[tuple[Entry, str]]


def _pointless(prepared: Prepared) -> _Found:
    for entry, reason in pointless(prepared.recipe):
        yield entry, f"has no effect: {reason}"


def _weights_of_the_base(prepared: Prepared) -> _Found:
    if prepared.method.base == "unused":
        return
    for module in prepared.recipe.modules:
        for part in module.slices:
            base = part.base or prepared.recipe.base
            for source in part.sources:
                if source.model == base and source.settings:
                    keys = ", ".join(source.settings)
                    yield source.entry, f"{keys} of the base do nothing: its delta is zero"


def _weights(prepared: Prepared) -> _Found:
    sums = [
        sum(one.values.of("weight")) * one.values.merge.get("lambda", 1.0)
        for one in prepared.resolved
        if one.values.models
        and "weight" in one.values.models[0]
        and not one.values.merge.get("normalize", False)
    ]
    odd = [total for total in sums if abs(total - 1) > _SUM]
    if odd:
        what = "weights" if prepared.method.base == "unused" else "weights times lambda"
        span = f"{min(odd):g}" if max(odd) - min(odd) < _SUM else f"{min(odd):g} to {max(odd):g}"
        yield (
            _entry(prepared),
            f"{what} sum to {span}, not 1, in {len(odd)} of {len(sums)} tensors, and normalize is "
            "false",
        )


def _densities(prepared: Prepared) -> _Found:
    empty, seen, all_kept = [], 0, True
    for one, target in zip(prepared.resolved, prepared.targets, strict=True):
        if not one.values.models or "density" not in one.values.models[0]:
            continue
        for density in one.values.of("density"):
            seen += 1
            all_kept &= density >= 1
            if 0 < density < 1 and int(density * target.info.numel) == 0:
                empty.append((one.info.name, density, target.info.numel))
    if empty:
        name, density, numel = empty[0]
        yield (
            _entry(prepared),
            f"density {density:g} keeps none of the {numel} elements of {name}"
            + (f", and the same in {len(empty) - 1} other places" if len(empty) > 1 else ""),
        )
    if seen and all_kept:
        yield _entry(prepared), "density is 1 everywhere: nothing is left out"


def _elections(prepared: Prepared) -> _Found:
    if not getattr(prepared.method, "elects", False):
        return
    single = [one for one in prepared.resolved if len(one.sources) == 1]
    if single:
        yield (
            _entry(prepared),
            f"{prepared.method.name} elects signs among models, and {len(single)} tensors have one "
            "model: there is nothing to elect",
        )


def _vocabularies(prepared: Prepared, trust_remote_code: bool) -> _Found:
    if prepared.recipe.tokenizer:
        return
    models = prepared.models
    rows = {model.layout.rows for model in models}
    if len(rows) > 1:
        counts = ", ".join(f"{model.reference} {model.layout.rows}" for model in models)
        yield (
            _entry(prepared),
            f"vocabularies differ in size ({counts}): embeddings are cut to the smallest; "
            "a tokenizer section maps them by token",
        )
        return
    lead, tables = prepared.lead, {}
    for index, model in enumerate(models):
        try:
            loaded = load_tokenizer(model.tokenizer_folder, trust_remote_code=trust_remote_code)
        except ValueError:
            continue
        tables[index] = loaded.get_vocab()
    for index, table in tables.items():
        if lead in tables and table != tables[lead]:
            moved = sum(tables[lead].get(token) != row for token, row in table.items())
            yield (
                _entry(prepared),
                f"{moved} tokens of {models[index].reference} have another id, or none, in "
                f"{models[lead].reference}: their rows are merged with those of other tokens; "
                "a tokenizer section maps them by token",
            )


def _straight(prepared: Prepared, progress: Callable[[int, int], None]) -> _Found:
    if prepared.method.name not in READS:
        return
    targets = prepared.targets
    if prepared.method.name == "slerp":  # the base is one of the two
        targets = [
            replace(target, sources=[target.base, *target.sources], base=None)
            for target in targets
            if target.base is not None
        ]
    cosines = [abs(float(found.cosines[0, 1])) for found in measure_all(targets, progress)]
    straight = [cosine for cosine in cosines if cosine > STRAIGHT_ABOVE]
    if straight:
        yield (
            prepared.recipe.keys["merge_method"],
            f"in {len(straight)} of {len(cosines)} tensors the cosine of the two models is above "
            f"{STRAIGHT_ABOVE} (median {median(straight):.6f}): there {prepared.method.name} is a "
            "straight line, as linear",
        )


def _entry(prepared: Prepared) -> Entry:
    return prepared.recipe.keys.get("parameters", prepared.recipe.keys["merge_method"])
