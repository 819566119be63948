"""The model card of a merge: README.md with what it was made of and how to make it again."""

from __future__ import annotations

from gemma_ext._version import __version__
from gemma_ext.souping.recipes.prepare import Prepared


def write_card(prepared: Prepared, title: str) -> str:
    """Markdown with the metadata that the hub reads.

    Args:
        title: of the page, as the name of the output's folder.
    """
    models = [model.reference for model in prepared.models]
    repositories = dict.fromkeys(
        place.path
        for reference in models
        for place in (reference.model, reference.lora)
        if place and place.path.count("/") == 1 and not place.path.startswith((".", "/", "~"))
    )
    lines = ["---"]
    if repositories:
        lines += ["base_model:", *(f"- {name}" for name in repositories)]
    lines += ["library_name: transformers", "tags:", "- merge", "- gemma_ext", "---", ""]
    lines += [
        f"# {title}",
        "",
        f"Merged with gemma_ext {__version__}, method `{prepared.method.name}`.",
    ]
    lines += ["", "| model | role |", "|---|---|"]
    bases = {one.base.model for one in prepared.resolved if one.base}
    sources = {source.model for one in prepared.resolved for source in one.sources}
    for index, reference in enumerate(models):
        roles = [
            role for role, part in (("base", bases), ("source", sources)) if index in part
        ] or ["tokens"]
        lines.append(f"| {_name(str(reference))} | {' and '.join(roles)} |")
    lines += ["", "The recipe, for `gemma-ext merge`:", "", "```yaml"]
    lines += [prepared.recipe.text.rstrip(), "```", ""]
    return "\n".join(lines)


def _name(reference: str) -> str:
    """Of a local folder the last part alone: the way to it is nobody's business."""
    parts = [
        part.rstrip("/").rpartition("/")[2] if part.startswith(("/", ".", "~")) else part
        for part in reference.split("+")
    ]
    return f"`{'+'.join(parts)}`"
